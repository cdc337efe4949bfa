"""The merge of whole checkpoints: what mergekit makes, rounded once, and the same every time."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from llmevo.errors import CandidateError, RecipeError, SourceError
from llmevo.merging.merger import Merger, masks_of, merge
from llmevo.merging.methods.registry import METHODS
from llmevo.merging.plan import plan
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.architecture import depth_of
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.search.genome import Genome
from llmevo.search.space import SearchSpace
from support.checkpoints import (
    assert_near,
    assert_same_bits,
    merged_by_peft,
    mergekit,
    new_adapter,
    new_checkpoint,
    quietly,
    weights_of,
)
from support.tiny_model import save_tiny, tiny_tokenizer

MODELS = ("base", "one", "two", "three")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32 Llamas with four layers; `tied-*` with tied heads, `qwen-*` Qwen2s, `half-*` in bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(MODELS):
        new_checkpoint(folder / name, seed)
        new_checkpoint(folder / f"half-{name}", seed + 10, dtype=torch.bfloat16)
    for seed, name in enumerate(MODELS[:3]):
        new_checkpoint(folder / f"tied-{name}", seed + 20, tied=True)
        new_checkpoint(folder / f"qwen-{name}", seed + 30, family="qwen2")
    new_adapter(folder / "lora-one", folder / "base", seed=1)
    new_adapter(folder / "lora-two", folder / "base", seed=2, target_modules=["k_proj", "up_proj"])
    return folder


def merged(recipe: Mapping[str, Any] | Recipe, root: Path, seed: int = 0) -> dict[str, Tensor]:
    known = Recipe.model_validate(recipe)
    return dict(merge(known, Sources.open(known.references, root), seed))


def by_mergekit(recipe: Mapping[str, Any], root: Path, out: Path) -> dict[str, Tensor]:
    """What mergekit's run_merge writes for the recipe, its models taken from `root`."""
    text = yaml.safe_dump(recipe)
    for folder in root.iterdir():
        text = text.replace(f"model: {folder.name}\n", f"model: {folder}\n")
    run = mergekit("merge")
    config = mergekit("config").MergeConfiguration.model_validate(yaml.safe_load(text))
    options = run.MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, clone_tensors=True)
    quietly(lambda: run.run_merge(config, str(out), options))
    return weights_of(out)


def model(name: str, **parameters: Any) -> dict[str, Any]:
    return {"model": name, **({"parameters": parameters} if parameters else {})}


def layers(name: str, first: int, last: int, **parameters: Any) -> dict[str, Any]:
    return {**model(name, **parameters), "layer_range": [first, last]}


BY_PART = [
    {"filter": "self_attn", "value": [0.2, 0.9]},
    {"filter": "mlp", "value": [1.0, 0.4, 0.1]},
    {"value": 0.6},
]

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": [model("one", weight=0.3), model("two", weight=0.9)]},
    "linear without normalizing": {
        "merge_method": "linear",
        "models": [model("one", weight=0.3), model("two", weight=-0.4), model("three", weight=BY_PART)],
        "parameters": {"normalize": False},
    },
    "linear with gradients and filters": {
        "merge_method": "linear",
        "models": [model("one", weight=[0.1, 0.5, 0.9]), model("two", weight=BY_PART)],
        "parameters": {"weight": 0.5},
    },
    "linear in slices": {
        "merge_method": "linear",
        "slices": [
            {"sources": [layers("one", 0, 1, weight=1.0), layers("two", 0, 1, weight=0.2)]},
            {"sources": [layers("one", 1, 4, weight=[0.3, 0.8]), layers("three", 1, 4, weight=BY_PART)]},
        ],
    },
    "linear of other layers": {
        "merge_method": "linear",
        "slices": [
            {"sources": [layers("one", 0, 2, weight=0.5), layers("two", 2, 4, weight=0.2)]},
            {
                "sources": [
                    layers("one", 1, 4, weight=[{"filter": "layers.3.", "value": 0.9}, {"value": 0.1}]),
                    layers("two", 0, 3, weight=[{"filter": "layers.0.", "value": 0.7}, {"value": 0.5}]),
                ]
            },
        ],
    },
    "task arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [model("one", weight=0.7), model("two", weight=-0.3), model("three", weight=BY_PART)],
        "parameters": {"lambda": 0.8},
    },
    "task arithmetic, normalized, in slices": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [
            {"sources": [layers("base", 0, 2), layers("one", 0, 2, weight=0.7), layers("two", 0, 2, weight=BY_PART)]},
            {"sources": [layers("one", 2, 4), layers("base", 2, 4)], "parameters": {"weight": [0.1, 1.2]}},
        ],
        "parameters": {"normalize": True},
    },
    "task arithmetic on other layers of the base": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [
            {"sources": [layers("one", 0, 2, weight=0.7), layers("two", 1, 3, weight=0.2), layers("base", 2, 4)]},
            {"sources": [layers("one", 2, 4, weight=0.4), layers("two", 0, 2, weight=0.5), layers("base", 1, 3)]},
        ],
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            model("one", weight=0.7, density=0.4),
            model("two", weight=BY_PART, density=[0.2, 0.9]),
            model("three", weight=1.1),
            model("base"),
        ],
        "parameters": {"density": 0.6, "lambda": 1.2},
    },
    "ties in slices": {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [
            {
                "sources": [
                    layers("one", 0, 2, weight=0.7, density=0.4),
                    layers("two", 0, 2, weight=BY_PART),
                    layers("base", 0, 2),
                ],
                "parameters": {"density": [0.3, 0.5]},
            },
            {"sources": [layers("one", 2, 4, weight=0.2), layers("three", 2, 4, weight=0.8), layers("base", 2, 4)]},
        ],
        "parameters": {"normalize": False, "density": 0.5},
    },
    "dare-ties that drops nothing": {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": [model("one", weight=0.7), model("two", weight=BY_PART)],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "one",
        "models": [model("one"), model("two")],
        "parameters": {"t": 0.4},
    },
    "slerp with gradients and filters": {
        "merge_method": "slerp",
        "base_model": "two",
        "slices": [{"sources": [layers("one", 0, 4), layers("two", 0, 4)]}],
        "parameters": {"t": BY_PART},
    },
    "slerp with a base for each slice": {
        "merge_method": "slerp",
        "slices": [
            {"sources": [layers("one", 0, 2), layers("two", 0, 2)], "base_model": "one", "parameters": {"t": 0.3}},
            {
                "sources": [layers("one", 2, 4), layers("three", 0, 2)],
                "base_model": "three",
                "parameters": {"t": [0, 1]},
            },
        ],
    },
}


def renamed(recipe: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The recipe over the models `prefix-…` instead."""
    text = json.dumps(recipe)
    for name in MODELS:
        text = text.replace(f'model": "{name}"', f'model": "{prefix}-{name}"')
    return json.loads(text)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_merge_in_float32_equals_mergekits(kind: str, root: Path, tmp_path: Path) -> None:
    recipe = {**RECIPES[kind], "dtype": "float32"}
    assert_near(merged(recipe, root), by_mergekit(recipe, root, tmp_path), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "slerp", "dare-ties that drops nothing"])
@pytest.mark.parametrize("family", ["tied", "qwen"])
def test_models_with_tied_heads_or_biases_merge_as_mergekit_merges_them(
    kind: str, family: str, root: Path, tmp_path: Path
) -> None:
    recipe = renamed({**RECIPES[kind], "dtype": "float32"}, family)
    result = merged(recipe, root)
    assert ("lm_head.weight" in result) is (family == "qwen")
    assert ("model.layers.0.self_attn.q_proj.bias" in result) is (family == "qwen")
    assert_near(result, by_mergekit(recipe, root, tmp_path), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_merge_of_16_bit_models_is_float32_arithmetic_rounded_once(kind: str, root: Path) -> None:
    recipe = renamed(RECIPES[kind], "half")
    exact = merged({**recipe, "dtype": "float32"}, root)
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    rounded = {name: tensor.bfloat16() for name, tensor in exact.items()}
    assert_same_bits(merged({**recipe, "dtype": "bfloat16"}, root), rounded)
    assert_same_bits(merged(recipe, root), rounded)
    assert_same_bits(merged({**recipe, "dtype": "float16", "out_dtype": "bfloat16"}, root), rounded)


# --- parents ----------------------------------------------------------------------------------------------------

GENOMES: list[dict[str, Any]] = [
    {"merge_method": "linear"},
    {"merge_method": "linear", "layer_granularity": 2, "smooth": True, "filters": ["mlp"]},
    {"merge_method": "task_arithmetic"},
    {"merge_method": "task_arithmetic", "normalize": True, "layer_granularity": 1, "smooth": True},
    {"merge_method": "ties", "layer_granularity": 2},
    {"merge_method": "dare_ties", "filters": ["self_attn"]},
    {"merge_method": "slerp"},
]


def parents(genome: Mapping[str, Any], models: list[str], base: str, root: Path) -> dict[str, dict[str, Tensor]]:
    """The merge at every parent's genes, by the parent."""
    given = {"models": models, "base_model": base, **genome}
    space = SearchSpace(Genome.model_validate(given), 4)
    return {str(parent): merged(space.decode(space.parent(parent)), root) for parent in space.merged}


@pytest.mark.parametrize("genome", GENOMES, ids=lambda genome: "-".join(map(str, genome.values())))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_parent_is_that_model_bit_for_bit(genome: dict[str, Any], dtype: str, root: Path, tmp_path: Path) -> None:
    prefix = "" if dtype == "float32" else "half-"
    models = [f"{prefix}{name}" for name in MODELS]
    for name in models:
        # Weights of very different sizes, and zeros of both signs, which base + (model - base) does not give back.
        shutil.copytree(root / name, tmp_path / name)
        weights = weights_of(root / name)
        hard = weights["model.layers.1.mlp.up_proj.weight"]
        hard.mul_(torch.logspace(-9, 3, hard.numel()).view_as(hard).to(hard.dtype))[0, :8] = 0.0
        hard[0, :4] = -0.0
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
    results = parents({**genome, "dtype": dtype}, models[1:], models[0], tmp_path)
    assert len(results) == 3
    for name, result in results.items():
        assert_same_bits(result, weights_of(tmp_path / name))


@pytest.mark.parametrize("genome", GENOMES, ids=lambda genome: "-".join(map(str, genome.values())))
def test_a_parent_with_an_adapter_is_that_model_with_its_adapter(genome: dict[str, Any], root: Path) -> None:
    models = ["base+lora-one", "base+lora-two"]
    results = parents({**genome, "dtype": "float32"}, models, "base", root)
    for name, result in results.items():
        reference = ModelReference.parse(name)
        assert reference.lora is not None
        source = Sources(root)[reference]
        assert_same_bits(result, {name: source.tensor(name) for name in source.shapes})
        assert_near(result, merged_by_peft(root / "base", root / reference.lora.path), rtol=0, atol=1e-6)


@pytest.mark.parametrize("genome", GENOMES[2:6], ids=lambda genome: "-".join(map(str, genome.values())))
def test_adapters_merge_like_the_full_models_they_stand_for(genome: dict[str, Any], root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "base", tmp_path / "base")
    for name in ("lora-one", "lora-two"):
        shutil.copytree(root / name, tmp_path / name)
        shutil.copytree(root / "base", tmp_path / f"full-{name}")
        whole = Sources(root)[ModelReference.parse(f"base+{name}")]
        weights = {key: whole.tensor(key).clone() for key in whole.shapes}
        save_file(weights, tmp_path / f"full-{name}" / "model.safetensors", {"format": "pt"})

    def at_uniform(models: list[str]) -> dict[str, Tensor]:
        given = {"models": models, "base_model": "base", "dtype": "float32", **genome}
        space = SearchSpace(Genome.model_validate(given), 4)
        return merged(space.decode(space.uniform()), tmp_path)

    adapted = at_uniform(["base+lora-one", "base+lora-two"])
    assert_near(adapted, at_uniform(["full-lora-one", "full-lora-two"]), rtol=1e-4, atol=1e-6)


def test_what_no_model_changes_is_the_bases_own_weight(root: Path) -> None:
    recipe = {"merge_method": "ties", "base_model": "base", "models": [model("base+lora-one", weight=0.5, density=0.5)]}
    known = Recipe.model_validate(recipe)
    sources = Sources.open(known.references, root)
    base = sources[ModelReference.parse("base")]
    result = dict(merge(known, sources))
    name = "model.layers.0.self_attn.k_proj.weight"
    assert result[name].data_ptr() == base.tensor(name).data_ptr()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(result[name], base.tensor(name))


@pytest.mark.parametrize("kind", RECIPES)
def test_a_merge_leaves_the_models_as_they_were(kind: str, root: Path) -> None:
    known = Recipe.model_validate(RECIPES[kind])
    sources = Sources.open(known.references, root)
    for _ in merge(known, sources):
        pass
    for reference in known.references:
        source = sources[reference]
        assert_same_bits({name: source.tensor(name) for name in source.shapes}, weights_of(root / reference.model.path))


# --- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["linear", "task arithmetic", "ties", "slerp"])
def test_a_weight_that_is_not_finite_fails_the_candidate_by_name(
    kind: str, value: float, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "models")
    name = "model.layers.2.mlp.gate_proj.weight"
    weights = weights_of(root / "one")
    weights[name][3, 5] = value
    save_file(weights, tmp_path / "models" / "one" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CandidateError, match=rf"{name}: in one it is not finite"):
        merged(RECIPES[kind], tmp_path / "models")


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.takes_base])
def test_a_nan_that_trimming_would_drop_is_not_lost(method: str, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "models")
    weights = weights_of(root / "one")
    weights["model.layers.2.mlp.gate_proj.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "models" / "one" / "model.safetensors", {"format": "pt"})
    own = {name: p.start or 0.5 for name, p in METHODS[method].each.items()}
    recipe = {"merge_method": method, "base_model": "base", "models": [model(name, **own) for name in ("one", "two")]}
    with pytest.raises(CandidateError, match="in one it is not finite"):
        merged(recipe, tmp_path / "models")


def test_a_weight_beyond_the_range_of_the_output_type_fails_the_candidate(root: Path) -> None:
    recipe = {"merge_method": "linear", "models": [model("one", weight=1e7)], "parameters": {"normalize": False}}
    with pytest.raises(CandidateError, match=r"is not finite"):
        merged({**recipe, "dtype": "float16"}, root)
    assert merged({**recipe, "dtype": "float32"}, root)


@pytest.mark.parametrize("span", [(3, 5), (-1, 1)])
def test_a_slice_outside_the_layers_is_refused_by_name(span: tuple[int, int], root: Path) -> None:
    recipe = {"merge_method": "linear", "slices": [{"sources": [layers("one", *span, weight=1.0)]}]}
    with pytest.raises(RecipeError, match=r"layer_range \[.*\] of one is outside its 4 layers"):
        merged(recipe, root)


def test_a_parameter_that_is_missing_is_refused_by_name(root: Path) -> None:
    with pytest.raises(RecipeError, match="the parameter 'weight' is missing for the tensor"):
        merged({"merge_method": "linear", "models": [model("one"), model("two", weight=1.0)]}, root)


def test_the_number_of_layers_comes_from_the_config() -> None:
    assert depth_of({"num_hidden_layers": 4}) == depth_of({"n_layer": 4}) == 4
    with pytest.raises(SourceError, match="names no number of layers"):
        depth_of({"hidden_size": 4})


def test_layers_of_different_kinds_are_refused_by_both_names() -> None:
    spans = {"merge_method": "linear", "slices": [{"sources": [layers("one", 0, 1, weight=1), layers("two", 1, 2)]}]}
    names = ["model.layers.0.mixer.weight", "model.layers.1.self_attn.weight"]
    with pytest.raises(RecipeError, match=r"layers\.0\.mixer\.weight cannot be merged with model\.layers\.1\.mixer"):
        plan(Recipe.model_validate(spans), names, 2)


def test_every_tensor_is_counted_as_merged_copied_or_left_out(root: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(root / name, tmp_path / name)
        file, weights = tmp_path / name / "model.safetensors", weights_of(root / name)
        weights["model.position_ids"] = torch.arange(4)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        save_file(weights, file, {"format": "pt"})
    adapter = new_adapter(tmp_path / "adapter", root / "one")
    merger = Merger(Sources(tmp_path))
    both = {"merge_method": "linear", "models": [model("one", weight=0.5), model("two", weight=0.5)]}
    counted = merger.count(Recipe.model_validate(both))
    total = len(weights_of(root / "one"))
    assert (counted.merged, counted.copied) == (total, {"integers": ["model.position_ids"]})
    assert counted.left_out == {"the config determines them": ["model.layers.0.self_attn.rotary_emb.inv_freq"]}
    assert str(counted) == f"{total} merged, 1 copied (integers), 1 left out (the config determines them)"
    adapted = {"merge_method": "task_arithmetic", "base_model": "one", "models": [model(f"one+{adapter}", weight=1)]}
    counted = merger.count(Recipe.model_validate(adapted))
    copied = {reason: len(names) for reason, names in counted.copied.items()}
    assert (counted.merged, copied) == (8, {"no model changes them": total - 8, "integers": 1})  # q_proj and down_proj
    first = {"merge_method": "passthrough", "slices": [{"sources": [layers("one", 0, 3)]}]}
    left = merger.count(Recipe.model_validate(first)).left_out["the recipe's slices leave their layers out"]
    assert {name for name in left if ".layers.3." in name} == {name for name in weights if ".layers.3." in name}


# --- masks and order --------------------------------------------------------------------------------------------

DARE: dict[str, Any] = {
    "merge_method": "dare_ties",
    "base_model": "base",
    "models": [model("one", weight=0.7, density=0.5), model("two", weight=0.4, density=0.3)],
}


def test_two_merges_with_one_seed_are_the_same_and_another_seed_is_not(root: Path) -> None:
    first = merged(DARE, root, seed=3)
    torch.rand(7)  # the global generator must not matter
    assert_same_bits(merged(DARE, root, seed=3), first)
    other = merged(DARE, root, seed=4)
    assert all(not torch.equal(other[name], first[name]) for name in first if "norm" not in name)


def test_masks_do_not_depend_on_the_order_of_the_tensors(root: Path, tmp_path: Path) -> None:
    for name in ("base", "one", "two"):
        folder = new_checkpoint(tmp_path / name, MODELS.index(name), shard="5KB")
        parts = sorted(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        listed = json.loads(index.read_text())
        back = {part.name: f"model-{len(parts) - place:05}.safetensors" for place, part in enumerate(parts)}
        for part in parts:
            part.rename(folder / back[part.name])
        listed["weight_map"] = {key: back[shard] for key, shard in listed["weight_map"].items()}
        index.write_text(json.dumps(listed))
    here, there = (Sources(folder)[ModelReference.parse("base")] for folder in (root, tmp_path))
    assert [*here.shapes] != [*there.shapes]
    assert_same_bits(merged(DARE, tmp_path, seed=3), merged(DARE, root, seed=3))


def test_every_tensor_and_every_model_has_a_mask_of_its_own(root: Path) -> None:
    alone = {**DARE, "models": [model("one", weight=0.7, density=0.5)]}
    base, result = weights_of(root / "base"), merged(alone, root)

    def dropped(name: str) -> Tensor:
        return result[name] == base[name]

    up, gate = (dropped(f"model.layers.0.mlp.{part}_proj.weight") for part in ("up", "gate"))
    assert float(up.float().mean()) == pytest.approx(0.5, abs=0.12)
    assert not torch.equal(up, gate)
    assert not torch.equal(up, dropped("model.layers.1.mlp.up_proj.weight"))
    other = {**DARE, "models": [model("two", weight=0.7, density=0.5)]}
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(up, merged(other, root)[name] == base[name])


def test_a_merge_that_is_exported_alone_has_the_masks_of_the_search(root: Path) -> None:
    known = Recipe.from_yaml(Recipe.model_validate(DARE).to_yaml())
    assert_same_bits(dict(merge(known, Sources(root), 3)), merged(DARE, root, seed=3))


def test_a_method_with_random_masks_has_them_whatever_its_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS["dare_linear"]
    monkeypatch.setitem(METHODS, "mine", replace(method, name="mine", function=method.merge))
    one = {"sources": [layers("base", 0, 1), layers("one", 0, 1, weight=0.7, density=0.5)]}
    recipe = Recipe.model_validate({"merge_method": "mine", "base_model": "base", "slices": [one, one]})
    sources = Sources(root)
    assert masks_of(recipe, sources, 0)
    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    digests, weights = Merger(sources).digests(recipe), dict(Merger(sources).merge(recipe))
    assert digests[first] != digests[second]
    assert not torch.equal(weights[first], weights[second])


# --- the folder of the result -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("types", "wanted"), [(("bfloat16", "bfloat16"), "bfloat16"), (("bfloat16", "float32"), "float32")]
)
def test_the_config_names_the_widest_type_of_the_floating_point_weights(
    types: Sequence[str], wanted: str, root: Path, tmp_path: Path
) -> None:
    for place, name in enumerate(("base", "one")):
        weights = weights_of(shutil.copytree(root / f"half-{name}", tmp_path / name))
        up = "model.layers.0.mlp.up_proj.weight"
        changed = {up: weights[up].to(getattr(torch, types[place])), "model.position_ids": torch.arange(4)}
        save_file(weights | changed, tmp_path / name / "model.safetensors", {"format": "pt"})
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float16"}))
    recipe = {"merge_method": "linear", "models": [model("base", weight=0.5), model("one", weight=0.5)]}
    write_model(Recipe.model_validate(recipe), Sources(tmp_path), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == wanted


def test_the_folder_has_all_chat_templates_and_no_other_folder_of_the_models(tmp_path: Path) -> None:
    save_tiny(tmp_path / "one")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "tokenizer").mkdir()
    recipe = {"merge_method": "passthrough", "models": [model("one")]}
    write_model(Recipe.model_validate(recipe), Sources(tmp_path), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    write_model(Recipe.model_validate({**recipe, "chat_template": "{{ 1 }}"}), Sources(tmp_path), tmp_path / "own")
    assert AutoTokenizer.from_pretrained(tmp_path / "own").chat_template == "{{ 1 }}"


# --- the tensors of the result ----------------------------------------------------------------------------------


def test_stacked_layers_are_numbered_anew_and_keep_their_weights(root: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "slices": [{"sources": [layers(name, *span, weight=1.0)]} for name, span in (("one", (0, 3)), ("two", (1, 4)))],
        "dtype": "float32",
    }
    result, one, two = merged(recipe, root), weights_of(root / "one"), weights_of(root / "two")
    assert {name.split(".")[2] for name in result if ".layers." in name} == {*"012345"}
    expected = {name: tensor for name, tensor in one.items() if ".layers." not in name or ".layers.3." not in name}
    for source, to in ((1, 3), (2, 4), (3, 5)):
        own = {name: tensor for name, tensor in two.items() if f".layers.{source}." in name}
        expected |= {name.replace(f".{source}.", f".{to}."): tensor for name, tensor in own.items()}
    # What stands after the layers takes the last slice's model, as in mergekit.
    expected |= {name: two[name] for name in ("model.norm.weight", "lm_head.weight")}
    assert_same_bits(result, expected)
    assert_near(result, by_mergekit(recipe, root, tmp_path))


def test_layers_may_be_repeated(root: Path) -> None:
    spans = [(0, 2), (0, 2), (1, 4)]
    recipe = {"merge_method": "linear", "slices": [{"sources": [layers("one", *span, weight=1.0)]} for span in spans]}
    result, one = merged(recipe, root), weights_of(root / "one")
    for to, source in enumerate([0, 1, 0, 1, 1, 2, 3]):
        name = "model.layers.{}.self_attn.q_proj.weight"
        assert torch.equal(result[name.format(to)], one[name.format(source)])
    assert len([*result]) == len(one) + 3 * len([name for name in one if ".layers.0." in name])


def test_a_plan_goes_from_the_embedding_through_the_layers_to_the_head(root: Path) -> None:
    known = Recipe.model_validate(RECIPES["linear"])
    names = [*Sources(root)[ModelReference.parse("one")].shapes]
    steps = plan(known, names, 4)
    assert sorted(step.name for step in steps) == sorted(names)
    assert steps[0].name == "model.embed_tokens.weight"
    assert {step.name for step in steps[-2:]} == {"model.norm.weight", "lm_head.weight"}
    order = [int(step.name.split(".")[2]) for step in steps if ".layers." in step.name]
    assert order == sorted(order)
    assert [step.depth for step in steps if step.name.endswith("q_proj.weight")] == pytest.approx([0, 1 / 3, 2 / 3, 1])
