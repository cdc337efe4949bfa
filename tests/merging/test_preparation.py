"""Preparation: the steps against their papers' formulas in float64, and recipes that have one."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

import llmevo
from llmevo.engines.hf import HfEngine
from llmevo.errors import RecipeError, SourceError, UserError
from llmevo.export.experts import write_experts
from llmevo.merging.merger import Merger
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.methods.registry import METHODS
from llmevo.merging.preparation.prepared import Prepared
from llmevo.merging.preparation.registry import STEPS
from llmevo.merging.preparation.texts import read_texts
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.checkpoints import LowRank, Weight
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.run.calibration.activations import Sums
from llmevo.run.calibration.layer_inputs import device_for, measure
from llmevo.run.calibration.sequential import SequentialPass
from merging.test_separating import NEUTRAL, SEPARATING, adapters, deltas, dense, random, with_values
from support.checkpoints import assert_same_bits, mergekit, new_adapter, weights_of
from support.families import new_family
from support.tiny_model import save_tiny, tiny_llama, tiny_tokenizer

Matrix = NDArray[np.float64]
ONES = (1.0, 1.0, 1.0)


def gram(size: int, seed: int) -> Tensor:
    rows = random((3 * size, size), seed)
    return rows.T @ rows / len(rows)


MEASURED = {"magnitudes": [random((24,), 50).abs()], "grams": [gram(24, seed) for seed in (51, 52, 53)], "": []}


def changes(inputs: TensorGroup, weights: list[Weight] | tuple[Weight, ...]) -> list[Matrix]:
    dense_ = [weight.dense() if isinstance(weight, LowRank) else weight.float() for weight in weights]
    return [(weight - inputs.origin).double().numpy() for weight in dense_]


def stepped(inputs: TensorGroup, name: str, **values: float) -> list[Matrix]:
    step = STEPS[name]
    parameters = {key: float(p.default or 0.0) for key, p in step.parameters.items()} | values
    given = with_values(inputs, METHODS["task_arithmetic"], weights=ONES)
    return changes(inputs, [*step.prepare(given, parameters, MEASURED[step.measures])])


def assert_close(actual: Matrix, expected: Matrix) -> None:
    np.testing.assert_allclose(actual, expected, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("of", [lambda: adapters(), lambda: dense(adapters())], ids=["adapters", "dense"])
@pytest.mark.parametrize("omega", [0.0, 0.4])
def test_aim_scales_the_columns_of_important_channels(of: Any, omega: float) -> None:
    inputs = of()
    (magnitudes,) = MEASURED["magnitudes"]
    channels = magnitudes.double().numpy() / float(magnitudes.max())
    for found, delta in zip(stepped(inputs, "aim", omega=omega), deltas(inputs), strict=True):
        assert_close(found, delta * (1 - channels * (1 - omega)))


@pytest.mark.parametrize("of", [lambda: adapters(), lambda: dense(adapters())], ids=["adapters", "dense"])
def test_the_sum_of_regmeans_experts_is_regmean(of: Any) -> None:
    """(ΣWᵢGᵢ)(ΣGᵢ)⁻¹ of whole weights, with the entries of G off the diagonal times 0.9."""
    inputs = of()
    base = inputs.origin.double().numpy()
    grams = [g.double().numpy() * 0.9 + np.diag(np.diag(g.double().numpy())) * 0.1 for g in MEASURED["grams"]]
    weights = [base + delta for delta in deltas(inputs)]
    whole = np.sum([w @ g for w, g in zip(weights, grams, strict=True)], axis=0) @ np.linalg.inv(np.sum(grams, axis=0))
    assert_close(np.sum(stepped(inputs, "regmean", blend=1.0, alpha=0.9), axis=0), whole - base)


@pytest.mark.parametrize(
    ("name", "values"),
    [("regmean", {"blend": 1.0, "alpha": 1.0}), ("svd_llm", {"rank": 0.7})],
    ids=["regmean", "svd_llm"],
)
def test_a_channel_that_no_text_reaches_leaves_the_experts_finite(name: str, values: Mapping[str, float]) -> None:
    inputs = adapters()
    empty = [g.clone() for g in MEASURED["grams"]]
    for g in empty:
        g[:, :5] = g[:5] = 0.0
    given = with_values(inputs, METHODS["task_arithmetic"], weights=ONES)
    for weight in STEPS[name].prepare(given, values, empty):
        assert isinstance(weight, LowRank)
        assert torch.isfinite(weight.dense()).all()
        assert float(weight.down.abs().max()) < 100 * max(float(m.down.abs().max()) for m in inputs.models)  # type: ignore[union-attr]


@pytest.mark.parametrize("of", [lambda: adapters(), lambda: dense(adapters())], ids=["adapters", "dense"])
def test_svd_llm_has_the_least_error_on_the_experts_inputs(of: Any) -> None:
    """Eckart and Young: the squared error is the sum of the squares of the singular values of δL that are cut."""
    inputs = of()
    kept = 2 if isinstance(inputs.models[0], LowRank) else 9
    share = kept / (3 if isinstance(inputs.models[0], LowRank) else 18)
    for found, delta, given in zip(
        stepped(inputs, "svd_llm", rank=share), deltas(inputs), MEASURED["grams"], strict=True
    ):
        root = np.linalg.cholesky(given.double().numpy())
        left, values, right = np.linalg.svd(delta @ root)
        cut = left[:, :kept] * values[:kept] @ right[:kept] @ np.linalg.inv(root)
        assert np.linalg.matrix_rank(found, tol=1e-3) <= kept
        assert np.linalg.norm((found - delta) @ root) == pytest.approx(
            np.linalg.norm(values[kept:]), rel=1e-3, abs=1e-4
        )
        if isinstance(inputs.models[0], LowRank):
            assert_close(found, np.asarray(cut, np.float64))
            plain, own, other = np.linalg.svd(delta)  # which cuts without the inputs
            worse = plain[:, :kept] * own[:kept] @ other[:kept]
            assert np.linalg.norm((found - delta) @ root) < 0.999 * np.linalg.norm((worse - delta) @ root)


@pytest.mark.parametrize("name", ["regmean", "regmean_plusplus", "svd_llm"])
def test_the_order_of_the_experts_does_not_matter(name: str) -> None:
    inputs = adapters()
    step = STEPS[name]
    parameters = {key: float(p.default or 0.0) for key, p in step.parameters.items()}
    given = with_values(inputs, METHODS["task_arithmetic"], weights=ONES)
    turned = replace(given, models=[*reversed(given.models)])
    found = changes(given, [*step.prepare(given, parameters, MEASURED["grams"])])
    again = changes(turned, [*step.prepare(turned, parameters, [*reversed(MEASURED["grams"])])])
    for one, other in zip(found, reversed(again), strict=True):
        assert_close(one, other)


def test_regmean_leaves_experts_that_meet_other_inputs_as_they_are() -> None:
    """Orthogonal experts: where their inputs have no channel in common, their sum is the plain one there; and one alone
    is itself."""
    inputs = adapters(2)
    halves = [torch.diag((torch.arange(24) < 12).float()), torch.diag((torch.arange(24) >= 12).float())]
    one, two = inputs.models
    assert isinstance(one, LowRank)
    assert isinstance(two, LowRank)
    ours = [replace(of, down=of.down @ half) for of, half in zip((one, two), halves, strict=True)]
    given = with_values(replace(inputs, models=ours), METHODS["task_arithmetic"], weights=(1.0, 1.0))
    step = STEPS["regmean"]
    found = changes(given, [*step.prepare(given, {"blend": 1.0, "alpha": 1.0}, halves)])
    for each, delta in zip(found, deltas(given), strict=True):
        assert_close(each, delta)
    alone = with_values(replace(inputs, models=[one]), METHODS["task_arithmetic"], weights=(1.0,))
    (itself,) = changes(alone, [*step.prepare(alone, {"blend": 1.0, "alpha": 0.9}, MEASURED["grams"][:1])])
    assert_close(itself, deltas(alone)[0])


@pytest.mark.parametrize(
    ("name", "values"), [("tsv", {"rank": 0.7}), ("wudi", {"blend": 0.6}), ("star", {"eta": 0.5})], ids=lambda v: str(v)
)
@pytest.mark.parametrize("of", [lambda: adapters(), lambda: dense(adapters())], ids=["adapters", "dense"])
def test_a_step_without_texts_is_the_method_of_its_name(of: Any, name: str, values: Mapping[str, float]) -> None:
    inputs, weights = of(), (0.7, 0.4, 1.1)
    method = METHODS[name]
    shared = {**({"blend": 1.0} if name == "tsv" else {}), **values}
    merged = method.merge(with_values(inputs, method, shared, weights)) - inputs.origin
    found = stepped(inputs, name, **values)
    total = np.sum([weight * change for weight, change in zip(weights, found, strict=True)], axis=0)
    assert_close(total, merged.double().numpy())


@pytest.mark.parametrize("name", [name for name in STEPS if name not in ("tsv", "align")])
def test_neutral_values_leave_the_experts_as_they_are(name: str) -> None:
    """TSV-M has none: it leaves out what is beyond the rank; `prepare` 0 is neutral for every step."""
    neutral = {key: p.neutral for key, p in STEPS[name].parameters.items() if p.neutral is not None}
    inputs = adapters()
    for found, delta in zip(stepped(inputs, name, **neutral), deltas(inputs), strict=True):
        np.testing.assert_allclose(found, delta, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in STEPS if name != "align"])
def test_an_expert_that_changes_nothing_stays_the_base(name: str) -> None:
    inputs = adapters()
    one = inputs.models[0]
    assert isinstance(one, LowRank)
    nothing = LowRank(inputs.origin, 0 * one.up, one.down)
    given = replace(inputs, models=[one, inputs.origin.clone(), nothing])
    found = stepped(given, name)
    assert np.isfinite(found[0]).all()
    assert np.abs(found[0]).max() > 0.1
    np.testing.assert_array_equal(found[1], 0.0)
    np.testing.assert_array_equal(found[2], 0.0)


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, two adapters of it and a full fine-tune."""
    save_tiny(tmp_path / "base")
    for seed, name in enumerate(("one", "two"), 1):
        new_adapter(tmp_path / name, tmp_path / "base", seed, target_modules=["q_proj", "v_proj", "down_proj"])
    tuned = tiny_llama(0)
    with torch.no_grad():
        for place, weight in enumerate(tuned.parameters()):
            weight.add_(random(tuple(weight.shape), place) * 0.02)
    tuned.save_pretrained(tmp_path / "tuned")
    (tmp_path / "texts.json").write_text('{"letters": ["abc def", "x y z"], "digits": ["12 34", "5 6 7 8"]}')
    return tmp_path


def recipe(
    prepare: Any,
    models: tuple[str, ...] = ("base+one", "base+two"),
    weights: tuple[float, ...] = (0.6, 0.7),
    **changes: Any,
) -> Recipe:
    each = [{"model": name, "parameters": {"weight": w}} for name, w in zip(models, weights, strict=True)]
    given = {"merge_method": "task_arithmetic", "base_model": "base", "models": each, "dtype": "float32"}
    return Recipe.model_validate({**given, **({"prepare": prepare} if prepare else {}), **changes})


def merged(of: Recipe, folder: Path) -> dict[str, Tensor]:
    return dict(Merger(Sources(folder), cache_gb=1.0).merge(of))


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear"])  # the latter, with density 1, for all methods
@pytest.mark.parametrize("step", ["wudi", "tsv"])
@pytest.mark.parametrize("models", [("base+one", "base+two"), ("base+one", "tuned")])
def test_the_parameter_prepare_goes_from_the_experts_to_the_prepared_ones(
    folder: Path, models: tuple[str, ...], step: str, method: str, cache: Path
) -> None:
    def made(share: float | None) -> dict[str, Tensor]:
        own: dict[str, Any] = {} if share is None else {"parameters": {"prepare": share}}
        return merged(recipe(None if share is None else [step], models, merge_method=method, **own), folder)

    plain = made(None)
    assert_same_bits(made(0.0), plain)
    assert not (cache / "prepared").exists()
    whole = made(1.0)
    assert difference(whole, plain) > 1e-3
    for share in (0.5, 0.2):
        expected = {name: torch.lerp(plain[name], whole[name], share) for name in plain}
        assert difference(made(share), expected) < 1e-5


@pytest.mark.parametrize("models", [("base+one", "base+two"), ("base+one", "tuned")])
def test_a_step_makes_what_the_method_of_its_name_does(folder: Path, models: tuple[str, ...]) -> None:
    whole = merged(recipe(["wudi"], models), folder)
    by_method = merged(recipe(None, models, merge_method="wudi"), folder)
    layers = [name for name in whole if name.endswith("proj.weight")]
    assert difference({n: whole[n] for n in layers}, {n: by_method[n] for n in layers}) < 1e-4


def test_prepared_experts_are_made_once_whatever_the_order_of_the_models(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = merged(recipe(["wudi"]), folder)
    assert len([*(cache / "prepared").iterdir()]) == 1
    monkeypatch.setattr("llmevo.merging.preparation.prepared.Prepared._changed", None)
    again = recipe(["wudi"]).as_dict()
    again["models"].reverse()
    assert difference(merged(Recipe.model_validate(again), folder), first) < 1e-6


def test_one_prepared_expert_alone_is_that_expert_and_every_method_merges_them(folder: Path) -> None:
    found = merged(recipe(["star"], weights=(1.0, 0.0)), folder)
    expected = merged(recipe(["star"], weights=(1.0, 0.0), merge_method="ties"), folder)
    assert_same_bits(found, expected)
    plain = merged(recipe(None, weights=(1.0, 0.0)), folder)
    assert difference(found, plain) > 1e-3
    assert_same_bits(merged(recipe(["star"], weights=(1.0, 0.0), parameters={"prepare": 0.0}), folder), plain)


@pytest.mark.parametrize(
    ("method", "prepare"), [*((name, None) for name in SEPARATING), ("ties", ["wudi", "star"])], ids=str
)
@pytest.mark.parametrize("models", [("base+one", "base+two"), ("base+one", "tuned")], ids=["adapters", "whole"])
def test_the_running_model_has_the_weights_that_are_exported(
    folder: Path, method: str, prepare: Any, models: tuple[str, ...]
) -> None:
    """Also after other candidates, whose values the merger keeps."""
    parameter = "prepare" if prepare else next(iter(NEUTRAL[method]))
    engine = HfEngine(folder / "base", folder / "base", "float32", "cpu", Merger(Sources(folder), cache_gb=1.0))
    for share, weights in ((0.2, (0.6, 0.7)), (1.0, (0.1, 1.2)), (0.7, (0.6, 0.7))):
        given = recipe(prepare, models, weights, parameters={parameter: share}, merge_method=method)
        engine.swap(given)
    write_model(given, Sources(folder), folder / "out")
    assert engine.differences(folder / "out") == []


@pytest.mark.parametrize("step", ["aim", "regmean", "regmean_plusplus"])
def test_models_that_read_texts_otherwise_are_measured_again(folder: Path, step: str) -> None:
    given = recipe({"steps": [step], "text": "texts.json"}, models=("base+one", "tuned"))

    def places() -> set[Path]:
        prepared = Merger(Sources(folder)).prepared(given)
        assert prepared
        return {prepared.folder, *(of.folder for of in prepared.all_measurements)}

    first = places()
    assert places() == first
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps({**config, "rope_theta": 100.0}))
    second = places()
    tiny_tokenizer(begin=True).save_pretrained(folder / "base")
    assert len(first | second | places()) == 3 * len(first)


def test_aim_and_regmean_measure_the_inputs_of_linear_layers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"base+one": ["letters"], "base+two": ["digits"]}
    given = recipe({"steps": ["aim", "regmean"], "text": "texts.json", "tasks": tasks})
    with pytest.raises(RecipeError, match="not measured"):
        merged(given, folder)
    sources = Sources(folder)
    prepared = Merger(sources).prepared(given)
    assert prepared
    wanted = [of for every in prepared.measurements.values() for of in every]
    monkeypatch.setattr("llmevo.run.calibration.progress.EVERY", 0.0)
    said: list[str] = []
    cost = measure(wanted, prepared.base, sources, folder / "base", "cpu", said.append)
    assert (cost.models, cost.texts) == (3, 4 + 2 + 2)
    shares = [float(found[1]) for line in said if (found := re.match(r"  (\d+)% measured", line))]
    assert shares == sorted(shares)
    assert {33, 67} <= {*shares}
    assert 100 not in shares
    assert measure(wanted, prepared.base, sources, folder / "base", "cpu").models == 0
    assert difference(merged(given, folder), merged(recipe(None), folder)) > 1e-3

    one, base = ModelReference.parse("base+one"), ModelReference.parse("base")
    found = next(of for of in prepared.measurements["regmean"] if of.model == one)
    assert found.texts.all == ["abc def", "x y z"]
    name = "model.layers.1.mlp.down_proj.weight"
    rows = _inputs(folder, merged(Recipe.of_one(one, "float32"), folder), name, found.texts.all)
    torch.testing.assert_close(found.open().tensor(name), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    (magnitudes,) = prepared.measurements["aim"]
    assert magnitudes.model == base
    rows = _inputs(folder, weights_of(folder / "base"), name, magnitudes.texts.all)
    torch.testing.assert_close(magnitudes.open().tensor(name), rows.abs().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", ["regmean", "regmean_plusplus"])
def test_experts_are_measured_with_the_config_of_the_base_whatever_their_own(folder: Path, step: str) -> None:
    shutil.copytree(folder / "tuned", folder / "other")
    given = recipe({"steps": [step], "text": "texts.json"}, models=("tuned", "base+one"))
    renamed = recipe({"steps": [step], "text": "texts.json"}, models=("other", "base+one"))
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps({**config, "rope_theta": 100.0, "rms_norm_eps": 0.1}))
    found: list[list[dict[str, Tensor]]] = []
    for of in (given, renamed):
        sources = Sources(folder)
        prepared = Merger(sources).prepared(of)
        assert prepared
        measure(prepared.all_measurements, prepared.base, sources, folder / "base", "cpu")
        every = sorted(prepared.all_measurements, key=lambda each: "one" in str(each.model))
        found.append([weights_of(each.folder) for each in every])
    assert [difference(one, other) for one, other in zip(*found, strict=True)] == [0.0, 0.0]


def test_the_texts_are_read_with_the_tokenizer_of_the_result(folder: Path) -> None:
    other = tiny_llama(1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["abc"])
    other.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    other.save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    tiny_tokenizer().save_pretrained(folder / "tuned")
    said: list[str] = []
    counts: list[int] = []
    for source in ("base", "union"):
        given = recipe({"steps": ["regmean"], "text": "texts.json"}, ("tuned", "other"), tokenizer_source=source)
        llmevo.merge(given, folder / f"by {source}", root=folder, say=said.append)
        reader = AutoTokenizer.from_pretrained(folder / f"by {source}")
        counts.append(2 * sum(len(reader(text)["input_ids"]) for text in read_texts("texts.json", folder).all))
    assert counts[0] != counts[1]
    told = [line for line in said if line.startswith("Measured")]
    assert [f"over {count} tokens" in line for count, line in zip(counts, told, strict=True)] == [True, True]


def test_texts_are_cut_at_the_positions_that_a_model_has(tmp_path: Path) -> None:
    new_family(tmp_path, "OPT")
    (tmp_path / "texts.json").write_text(json.dumps({"letters": ["abc " * 400]}))
    llmevo.merge(
        recipe({"steps": ["regmean"], "text": "texts.json"}, ("one",), (1.0,)), tmp_path / "out", root=tmp_path
    )


@pytest.mark.parametrize("step", ["wudi", "star", "svd_llm", "regmean", "aim"])
def test_adapters_of_different_layers_stay_adapters(folder: Path, step: str) -> None:
    for seed, (name, layer) in enumerate((("query", "q_proj"), ("value", "v_proj")), 5):
        new_adapter(folder / name, folder / "base", seed, target_modules=[layer])
    text = {"text": "texts.json"} if STEPS[step].measures else {}
    given = recipe({"steps": [step], **text}, ("base+query", "base+value"))
    llmevo.merge(given, folder / "out", root=folder, as_="lora")
    assert json.loads((folder / "out" / "lora_report.json").read_text())["exact"]
    prepared = Merger(Sources(folder)).prepared(given)
    assert prepared
    assert {name[-3:] for name in weights_of(prepared.folder)} <= {"/up", "own"}


def test_an_interrupt_leaves_no_products_of_inputs_for_good(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe({"steps": ["regmean"], "text": "texts.json"})

    def stopped(_: Prepared) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Prepared, "forget", stopped)
        with pytest.raises(KeyboardInterrupt):
            llmevo.merge(given, folder / "out", root=folder)
    kept = folder / "cache" / "activations"
    assert len([*kept.iterdir()]) == 2
    llmevo.merge(given, folder / "out", root=folder)
    assert [*kept.iterdir()] == []
    with pytest.raises(UserError, match="exists already"):
        llmevo.merge(recipe({"steps": ["aim"], "text": "texts.json"}), folder / "out", root=folder)
    assert [*kept.iterdir()] == []


def test_a_model_that_is_not_finite_is_named_with_its_tensor(folder: Path) -> None:
    weights = weights_of(folder / "tuned")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "tuned" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"prepare: model\.layers\.1\.mlp\.up_proj\.weight of tuned is not finite"):
        merged(recipe(["tsv"], ("base+one", "tuned")), folder)


def test_matrices_whose_inputs_are_not_read_are_counted(tmp_path: Path) -> None:
    new_family(tmp_path, "Qwen3-MoE")
    (tmp_path / "texts.json").write_text('{"letters": ["abc def"]}')
    said: list[str] = []
    given = recipe({"steps": ["regmean"], "text": "texts.json"}, ("one",), (1.0,))
    llmevo.merge(given, tmp_path / "out", root=tmp_path, say=said.append)
    left = next(line for line in said if line.startswith("Prepared"))
    assert re.fullmatch(r"Prepared \(regmean left \d+ matrices as before: no single linear layer has them\)\.", left)


def test_an_unknown_task_is_said_of_the_users_file_or_of_the_search_questions(folder: Path) -> None:
    given = recipe({"steps": ["regmean"], "text": "texts.json", "tasks": {"base+one": ["leters"]}})
    (folder / "recipe.yml").write_text(given.to_yaml())
    said = "has no task 'leters', did you mean 'letters'"
    with pytest.raises(RecipeError, match=rf"prepare\.tasks: texts\.json {said}"):
        llmevo.merge(folder / "recipe.yml", folder / "out")
    prepared = Merger(Sources(folder)).prepared(given.with_text(read_texts("texts.json", folder).keep()))
    assert prepared
    with pytest.raises(RecipeError, match=rf"prepare\.tasks: the search questions {said}"):
        _ = prepared.measurements


@pytest.mark.parametrize("texts", ["texts.json", "questions.json"])  # the latter is the name in an export
def test_the_written_recipe_names_the_texts_from_its_folder(folder: Path, texts: str) -> None:
    (folder / "texts.json").rename(folder / texts)
    (folder / "recipe.yml").write_text(recipe({"steps": ["aim"], "text": texts}).to_yaml())
    llmevo.merge(folder / "recipe.yml", folder / "out")
    for name, text in (("mergekit_config.yml", f"../{texts}"), ("README.md", texts)):
        assert f"text: {text}\n" in (folder / "out" / name).read_text()
    llmevo.merge(folder / "out" / "mergekit_config.yml", folder / "again")
    assert_same_bits(weights_of(folder / "again"), weights_of(folder / "out"))


@pytest.mark.parametrize("models", [("base+one", "base+two"), ("base+one", "tuned")], ids=["adapters", "whole"])
def test_regmean_plusplus_measures_each_layer_above_merged_ones(folder: Path, models: tuple[str, ...]) -> None:
    """Against the merge that it makes: the inputs of a layer in it, the layer itself being the expert's."""
    texts = {"letters": ["abc def", "x y z"], "digits": ["12 34", "5 6 7 8"]}
    tasks = {model: [task] for model, task in zip(models, texts, strict=True)}
    given = recipe({"steps": ["regmean_plusplus"], "text": "texts.json", "tasks": tasks}, models, (1.0, 1.0))
    sources = Sources(folder)
    prepared = Merger(sources).prepared(given)
    assert prepared
    cost = measure(prepared.all_measurements, prepared.base, sources, folder / "base", "cpu")
    assert (cost.models, cost.texts) == (2, 4)
    made = merged(given, folder)
    for of in prepared.all_measurements:
        own = merged(Recipe.of_one(of.model, "float32"), folder)
        for block in range(2):
            here = {name: own[name] if f".layers.{block}." in name else tensor for name, tensor in made.items()}
            for layer in ("self_attn.v_proj", "mlp.down_proj"):
                name = f"model.layers.{block}.{layer}.weight"
                rows = _inputs(folder, here, name, texts[tasks[str(of.model)][0]])
                torch.testing.assert_close(of.open().tensor(name), rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)

    plain = recipe({"steps": ["regmean"], "text": "texts.json", "tasks": tasks}, models, (1.0, 1.0))
    regmean = Merger(sources).prepared(plain)
    assert regmean
    measure(regmean.all_measurements, regmean.base, sources, folder / "base", "cpu")
    assert {of.folder for of in regmean.all_measurements}.isdisjoint(of.folder for of in prepared.all_measurements)
    name = "model.layers.1.mlp.down_proj.weight"
    assert difference({name: made[name]}, {name: merged(plain, folder)[name]}) > 1e-5


@pytest.mark.parametrize("depends", [False, True])
def test_blocks_run_for_their_arguments_only_where_these_depend_on_the_blocks_below(
    folder: Path, depends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"letters": ["abc def", "x y z"], "digits": ["12 34", "5 6 7 8"]}
    tasks = {model: [task] for model, task in zip(("base+one", "tuned"), texts, strict=True)}
    given = recipe({"steps": ["regmean_plusplus"], "text": "texts.json", "tasks": tasks}, (*tasks,), (1.0, 1.0))
    sources = Sources(folder)
    prepared = Merger(sources).prepared(given)
    assert prepared
    of = prepared.all_measurements[0].sequential
    assert of
    found: list[dict[str, Tensor]] = []
    runs: list[int] = []
    for forced in (False, True):
        engine = HfEngine(sources.engine_folder(of.base), folder / "base", "float32", "cpu", Merger(sources))
        first, second = engine.model.model.layers
        if depends:
            second.register_forward_pre_hook(
                lambda _, args, named: (args, {**named, "note": args[0].mean()}), with_kwargs=True
            )
        runs.append(0)

        def count(*_: Any) -> None:
            runs[-1] += 1

        first.self_attn.register_forward_hook(count)
        with torch.no_grad(), monkeypatch.context() as patch:
            if forced:
                patch.setattr("llmevo.run.calibration.sequential._alike", lambda *_: False)
            blocks = SequentialPass(of, engine, sources)
            found.append({f"{model} {name}": mean for model, means in blocks for name, mean in means.items()})
        engine.close()
    assert_same_bits(*found)
    batches = 4  # two texts of different lengths an expert; each is measured, then merged
    assert runs == [1 + 2 * batches + batches * depends, 1 + 3 * batches]


@pytest.mark.parametrize("family", ["Zamba2", "GPT-2"])
@pytest.mark.parametrize("step", ["aim", "regmean_plusplus"])
def test_other_blocks_are_measured_or_refused_in_one_line(tmp_path: Path, family: str, step: str) -> None:
    """Zamba2's blocks have arguments without a name; GPT-2's layers are of another class, and transposed."""
    new_family(tmp_path, family)
    (tmp_path / "texts.json").write_text('{"letters": ["abc def"]}')
    given = recipe({"steps": [step], "text": "texts.json"}, ("one", "two"), (1.0, 1.0))
    (tmp_path / "recipe.yml").write_text(given.to_yaml())
    if family == "GPT-2":
        with pytest.raises(SourceError, match="GPT2LMHeadModel has no layers of the class"):
            llmevo.merge(tmp_path / "recipe.yml", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        llmevo.merge(tmp_path / "recipe.yml", tmp_path / "out")
        plain = merged(given.model_copy(update={"prepare": None}), tmp_path)
        assert difference(weights_of(tmp_path / "out"), plain) > 1e-4


@pytest.mark.parametrize(("free", "expected"), [(3 * 2**30, "cuda"), (2**30, "cpu")])
def test_sums_that_a_gpu_has_no_room_for_are_kept_on_the_cpu(
    free: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 4 * 2**30))
    assert device_for("cuda", [2**14], "grams") == expected  # 1 GiB
    assert device_for("cuda", [2**14], "magnitudes") == "cuda"
    assert device_for("cpu", [2**14], "grams") == "cpu"


def test_sums_are_the_same_wherever_they_are_kept() -> None:
    found = [Sums("grams"), Sums("grams", "cpu")]
    for sums in found:
        for seed in range(2):
            sums.add("a", torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))
    (_, first), (_, second) = (next(sums.means()) for sums in found)
    assert torch.equal(first, second)


def _inputs(folder: Path, weights: Mapping[str, Tensor], name: str, texts: list[str]) -> Tensor:
    """The inputs of one linear layer, by a plain hook on a model of its own."""
    from transformers import AutoTokenizer

    model, tokenizer = tiny_llama(0), AutoTokenizer.from_pretrained(folder / "base")
    model.load_state_dict(weights, strict=False)
    rows: list[Tensor] = []
    layer: Any = model.get_submodule(name.removesuffix(".weight"))
    layer.register_forward_pre_hook(lambda _, given: rows.append(given[0][0].detach()))
    with torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"))
    return torch.cat(rows)


def test_prepared_adapters_are_exported_as_adapters_that_mergekit_merges(folder: Path) -> None:
    given = recipe(["wudi"], parameters={"prepare": 0.7})
    assert write_experts(given, Sources(folder), folder / "out", 0, {}) == 2
    assert [*(folder / "out").rglob("adapter_config.json")]
    assert not [*(folder / "out").rglob("model*.safetensors")]
    text = (folder / "out" / "recipe.yml").read_text()
    mergekit("config").MergeConfiguration.model_validate(yaml.safe_load(text))
    assert difference(merged(Recipe.from_yaml(text), folder), merged(given, folder)) < 1e-5


@pytest.mark.parametrize(("method", "bases"), [("linear", (None, None)), ("task_arithmetic", ("base", "tuned"))])
def test_prepared_experts_of_slices_with_bases_of_their_own_or_without_one_are_exported(
    folder: Path, method: str, bases: tuple[str | None, ...]
) -> None:
    slices: list[dict[str, Any]] = []
    for layer, base in enumerate(bases):
        names = ["base+one", "base+two", *([base] if base else [])]
        sources = [{"model": name, "layer_range": [layer, layer + 1]} for name in names]
        slices.append({"sources": sources, "base_model": base})
    parameters = {"prepare": 1.0, "weight": 0.6}
    given = Recipe.model_validate(
        {
            "merge_method": method,
            "base_model": "base",
            "slices": slices,
            "prepare": ["tsv"],
            "parameters": parameters,
            "dtype": "float32",
        }
    )
    write_experts(given, Sources(folder), folder / "out", 0, {})
    again = Recipe.from_yaml((folder / "out" / "recipe.yml").read_text())
    assert difference(merged(again, folder), merged(given, folder)) < 1e-5


def test_prepared_experts_of_a_base_with_an_adapter_are_merged_on_that_base(folder: Path) -> None:
    given = recipe(["tsv"], base_model="base+three", parameters={"prepare": 1.0})
    new_adapter(folder / "three", folder / "base", 3, target_modules=["q_proj", "up_proj"])
    assert write_experts(given, Sources(folder), folder / "out", 0, {}) == 2
    again = Recipe.from_yaml((folder / "out" / "recipe.yml").read_text())
    assert str(again.base_model) == f"{folder / 'base'}+{folder / 'three'}"
    assert difference(merged(again, folder), merged(given, folder)) < 1e-5


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        ([], "prepare"),
        (["wudy"], "no step 'wudy', did you mean 'wudi'"),
        ([{"wudi": {"rank": 1.0}}], "wudi has no parameter 'rank'"),
        ([{"star": {"eta": 0.0}}], "eta of star is 0; give a number from 0.05 to 1"),
        (["wudi", "wudi"], "wudi is listed twice"),
        (["aim"], "aim reads texts; write prepare"),
        ({"steps": ["aim"], "text": "none.json"}, "none.json cannot be read"),
        ({"steps": ["regmean"], "text": "texts.json", "tasks": {"base+one": ["x"]}}, "texts.json has no task 'x'"),
        ({"steps": ["regmean"], "text": "texts.json", "tasks": {"base+one": ["none"]}}, "no text of the task 'none'"),
        ({"steps": ["regmean"], "text": "texts.json", "tasks": {"base": ["letters"]}}, "base is the base, which has"),
        (
            {"steps": ["aim"], "text": "texts.json", "tasks": {"base+one": ["letters"]}},
            "regmean.*, and aim does not",
        ),
    ],
)
def test_a_preparation_that_cannot_be_made_is_refused_in_one_line(folder: Path, prepare: Any, reason: str) -> None:
    (folder / "texts.json").write_text('{"letters": ["abc def"], "none": []}')
    text = recipe(None).to_yaml() + f"prepare: {prepare!r}\n"
    with pytest.raises(RecipeError, match=reason) as error:
        merged(Recipe.from_yaml(text), folder)
    assert "\n" not in str(error.value)


def test_widen_which_takes_the_models_as_they_are_has_no_preparation() -> None:
    with pytest.raises(RecipeError, match="prepare: widen takes the models as they are"):
        Recipe.from_yaml(recipe(["wudi"]).to_yaml().replace("task_arithmetic", "widen"))


def test_a_recipe_with_a_preparation_says_that_mergekit_cannot_read_it_and_stays_the_same_in_yaml() -> None:
    given = recipe([{"wudi": {"blend": 0.9}}, "star"], parameters={"prepare": 0.5})
    assert Recipe.from_yaml(given.to_yaml()) == given
    assert given.mergekit_clause == "mergekit cannot: it has no prepare"


def test_json_lines_are_texts_without_their_syntax(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a{b}"}\n\n"c"\n{"text": "  "}\n')
    assert read_texts("texts.jsonl", tmp_path).tasks == {"texts": ["a{b}", "c"]}
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"question": "b"}\n')
    with pytest.raises(RecipeError, match=r'texts.jsonl, line 2: it has no text; write {"text": "…"}'):
        read_texts("texts.jsonl", tmp_path)
    (tmp_path / "texts.jsonl").write_text("a\n")
    with pytest.raises(RecipeError, match=r'cannot be read .*JSON Lines with "text"'):
        read_texts("texts.jsonl", tmp_path)
