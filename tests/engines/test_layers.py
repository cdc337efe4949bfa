"""Paths in the transformers engine: other layers than the running model's, as the exported checkpoint has them."""

from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from llmevo.engines.hf import HfEngine
from llmevo.errors import CandidateError, RecipeError
from llmevo.merging.merger import Merger
from llmevo.merging.path import LayerPath
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.testing.engines import answers, requests
from support.checkpoints import quietly
from support.families import DENSE, FAMILIES, new_family
from support.family_checks import loaded, logits_of, recipe_of

NAMED: Mapping[str, ModelReference | Recipe] = {
    "A": ModelReference.model_validate("one"),
    "B": ModelReference.model_validate("two"),
    "M": recipe_of("ties"),
}
PATHS = ("A 0-3 | B 1-3 gain 0.5 | A 2-4", "A 0-1 | B 2-4", "M 0-4 | M 2-4 attention 0.5", "A 0-1 | B 1-2 | A 2-4")
"""Deeper, shallower, deeper with a weight merge, and as deep as the model."""
PERIODS = ("A 0-4 | B 0-4 gain 0.5 | A 4-8", "B 4-8", "M 0-8 | M 4-8", "A 0-4 | B 4-8")
"""The same where only whole periods of layers can be exported."""
HYBRID: Mapping[str, Mapping[str, Any]] = {
    "Qwen3-Next": {"num_hidden_layers": 8},
    "Qwen3.5 (text)": {"num_hidden_layers": 8},
    "Jamba": {"num_hidden_layers": 8},
    "Granite 4 (hybrid)": {"num_hidden_layers": 4, "layer_types": ["mamba", "attention", "mamba", "attention"]},
    "Bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "LFM2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "Nemotron-H": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "mlp", "attention", "mamba"]},
}
WITHOUT_GAINS: Mapping[str, tuple[str, str]] = dict.fromkeys(("Mamba", "Mamba 2", "Nemotron-H"), ("gain", "attention"))
"""Families with layers of one branch: what to write in their paths instead."""
CORE = (
    *("Llama", "Llama, tied", "GPT-2", "Qwen3", "Gemma 2", "OLMo 2", "GPT-NeoX", "Qwen3-Next"),
    *("Granite 4 (hybrid)", "Mixtral", "Gemma 3"),
)
"""Families whose layers differ most; the others are slow tests, as there are many."""

each_family = pytest.mark.parametrize(
    "name", [pytest.param(of, marks=[] if of in CORE else pytest.mark.slow) for of in FAMILIES if of != "Zamba2"]
)


def family(folder: Path, name: str) -> Path:
    return new_family(folder, name, **HYBRID.get(name, {"num_hidden_layers": 4}))


def engine_of(root: Path, dtype: str = "float32") -> HfEngine:
    return quietly(lambda: HfEngine(root / "base", root / "base", dtype, "cpu", Merger(Sources(root), 0)))


def path(text: str, dtype: str = "float32") -> Recipe:
    return LayerPath.parse(text).recipe(NAMED, dtype=dtype)


def described(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """What every module of a model knows besides weights: its class, its layer's number, its kind."""
    for name, module in model.named_modules():
        plain = {key: of for key, of in vars(module).items() if isinstance(of, int | str | float | None)}
        said = {key: of for key, of in plain.items() if key != "name_or_path" and not key.startswith("_is_hf")}
        yield name, {"class": type(module), **said}


@torch.inference_mode()
def by_token(model: Any) -> Tensor:
    """Logits with keys and values kept from token to token.

    The weights are copied: on some CPUs the product of a matrix and one vector is rounded by where the matrix begins in
    memory, and a loaded file begins anywhere.
    """
    argument = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    weights = {name: of.clone() for name, of in model.named_parameters()}
    cache: Any = None
    pieces: list[Tensor] = []
    for token in torch.arange(4, 28).split(1):
        given = {"input_ids": token.unsqueeze(0), argument: cache, "use_cache": True}
        done = functional_call(model, weights, kwargs=given)
        cache = done.past_key_values
        pieces.append(done.logits)
    return torch.cat(pieces, 1)


@each_family
def test_a_path_in_memory_is_the_exported_model(name: str, tmp_path: Path) -> None:
    root = family(tmp_path, name)
    dtype = "float32" if FAMILIES[name].kind == DENSE else "bfloat16"
    engine = engine_of(root, dtype)
    plain = recipe_of("linear", dtype=dtype)
    engine.swap(plain)
    found: dict[str, Tensor] = {"": logits_of(engine.model)}
    depth = engine.model.config.get_text_config().num_hidden_layers
    texts = [text.replace(*WITHOUT_GAINS.get(name, ("", ""))) for text in (PERIODS if depth == 8 else PATHS)]
    for text in (texts[0], texts[1], texts[2], "", texts[3], texts[0], texts[2], texts[1], ""):
        recipe = path(text, dtype) if text else plain
        engine.swap(recipe)
        made = logits_of(engine.model)
        assert torch.equal(made, found.setdefault(text, made)), f"{text}: other logits after a swap to and fro"
        if text and not (out := root / text.replace(" ", "").replace("|", ",")).exists():
            write_model(recipe, Sources(root), out, trim=False)
            exported = loaded(out, getattr(torch, dtype))
            assert torch.equal(logits_of(exported), made), f"{text}: other logits than the exported model's"
            assert [*described(engine.model)] == [*described(exported)]
            assert not engine.differences(out)
            if name not in WITHOUT_GAINS:  # without attention transformers cannot tell how long the text is
                assert torch.equal(by_token(engine.model), by_token(exported)), text
                assert dtype != "float32" or torch.allclose(by_token(engine.model), made, rtol=1e-2, atol=1e-2), text
    assert len({str(of) for of in found.values()}) == len(found)


WITHOUT_ROPE: Mapping[str, str] = {
    **dict.fromkeys(
        ("BLOOM", "GPT-2", "GPT-J", "Jamba", "Mamba", "Mamba 2", "MPT", "OPT", "Nemotron-H"), "no rope_theta"
    ),
    "Granite 4 (hybrid)": "no rotary embedding of its own",
}
"""Families without the base of a rotary embedding, and the reason of the refusal."""


@each_family
def test_another_base_of_the_rotary_embedding_is_that_of_the_export(name: str, tmp_path: Path) -> None:
    engine = engine_of(root := family(tmp_path, name))
    depth = engine.model.config.get_text_config().num_hidden_layers
    plain, recipe = path(f"A 0-{depth}"), path(f"A 0-{depth} | rope 0.001")
    engine.swap(plain)
    before = logits_of(engine.model)
    if name in WITHOUT_ROPE:
        with pytest.raises(CandidateError, match=WITHOUT_ROPE[name]):
            engine.swap(recipe)
        if "rope_theta" in WITHOUT_ROPE[name]:
            with pytest.raises(RecipeError, match=WITHOUT_ROPE[name]):
                write_model(recipe, Sources(root), root / "out")
        return
    engine.swap(recipe)
    made = logits_of(engine.model)
    write_model(recipe, Sources(root), root / "out", trim=False)
    assert torch.equal(logits_of(loaded(root / "out", torch.float32)), made)
    assert not torch.allclose(made, before, rtol=1e-4, atol=1e-4)
    engine.swap(plain)
    assert torch.equal(logits_of(engine.model), before)


def weights(engine: HfEngine) -> dict[int, int]:
    """The bytes of every weight in memory, once each."""
    return {weight.data_ptr(): weight.nbytes for weight in engine.model.parameters()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return family(tmp_path, "Llama")


def test_only_scaled_copies_take_memory_and_only_they_are_merged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(root)
    engine.swap(path("A 0-4"))
    before = weights(engine)
    written: list[str] = []
    merger: Any = engine.merger
    merge = merger.merge

    def counted(*given: Any) -> Iterator[tuple[str, Tensor]]:
        for name, weight in merge(*given):
            written.append(name)
            yield name, weight

    monkeypatch.setattr(merger, "merge", counted)
    engine.swap(path("A 0-3 | A 1-4"))
    assert weights(engine) == before
    engine.swap(path("A 0-3 | A 1-3 gain 0.5 | A 3-4"))
    scaled = [f"model.layers.{place}.{part}_proj.weight" for place in (3, 4) for part in ("mlp.down", "self_attn.o")]
    assert sorted(written) == scaled
    parameters = dict(engine.model.named_parameters())
    assert sum(weights(engine).values()) == sum(before.values()) + sum(parameters[name].nbytes for name in scaled)
    engine.swap(path("A 0-1 | A 3-4"))
    assert sorted(written) == scaled
    assert sum(weights(engine).values()) < sum(before.values())


def test_a_swap_that_fails_halfway_is_replaced_as_a_whole_by_the_next(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, merger = engine_of(root), Merger
    engine.swap(recipe_of("linear", dtype="float32"))
    merge = merger.merge

    def torn(*given: Any) -> Iterator[tuple[str, Tensor]]:
        for place, pair in enumerate(merge(*given)):
            if place == 12:
                raise CandidateError("the merged weight is not finite")
            yield pair

    monkeypatch.setattr(merger, "merge", torn)
    with pytest.raises(CandidateError, match="not finite"):
        engine.swap(path("A 0-3 | A 1-4"))
    monkeypatch.setattr(merger, "merge", merge)
    for text in ("A 0-3 | A 1-4", "A 0-4"):
        engine.swap(path(text))
        fresh = engine_of(root)
        fresh.swap(path(text))
        assert torch.equal(logits_of(engine.model), logits_of(fresh.model))
        assert answers(engine) == answers(fresh)


def test_memory_that_runs_out_spoils_no_later_candidate(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(root)
    engine.swap(path("A 0-4"))
    before = logits_of(engine.model)

    def full(*_: Any, **__: Any) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("llmevo.engines.layers._empty", full)
        with pytest.raises(MemoryError):
            engine.swap(path("A 0-4 | B 2-4"))
    engine.swap(path("A 0-4"))
    assert torch.equal(logits_of(engine.model), before)


def test_random_masks_of_repeated_layers_are_those_of_the_export(root: Path) -> None:
    models = [{"model": name, "parameters": {"weight": 0.5, "density": 0.5}} for name in ("one", "two")]
    merge = recipe_of("linear", merge_method="dare_linear", base_model="base", models=models)
    recipe = LayerPath.parse("D 0-4 | D 2-4").recipe({"D": merge}, dtype="float32")
    engine = engine_of(root)
    engine.swap(path("A 0-4"))
    engine.swap(recipe)
    write_model(recipe, Sources(root), root / "out", trim=False)
    assert torch.equal(logits_of(engine.model), logits_of(loaded(root / "out", torch.float32)))


def test_ready_weights_replace_a_path(root: Path) -> None:
    engine = engine_of(root)
    engine.swap(path("A 0-3 | A 1-4"))
    model = loaded(root / "two", torch.float32)
    engine.load(model.state_dict().items())
    assert torch.equal(logits_of(engine.model), logits_of(model))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("Jamba", "A 0-3 | A 2-8", "attn_layer_period is 2: layer 2 of the model would be layer 3"),
        ("Zamba2", "A 0-3 | A 1-4", "layers of Zamba2ForCausalLM have weights in common"),
        ("Llama", "A 0-4 | A 2-5", "is outside its 4 layers"),
        ("Mamba", "A 0-3 | A 1-4 mlp 0.5", "there is no mlp branch in layers 1 to 3"),
    ],
)
def test_a_path_that_cannot_be_exported_is_refused_and_changes_nothing(
    name: str, text: str, reason: str, tmp_path: Path
) -> None:
    engine = engine_of(family(tmp_path, name))
    engine.swap(recipe_of("linear", dtype="float32"))
    before = logits_of(engine.model)
    with pytest.raises(CandidateError, match=reason) as refused:
        engine.swap(path(text))
    assert "\n" not in str(refused.value)
    assert torch.equal(logits_of(engine.model), before)


@pytest.mark.vllm
def test_vllm_runs_paths_as_their_exports_with_layers_that_change_nothing(tmp_path: Path) -> None:
    from llmevo.engines.vllm import PROBES, VllmEngine, deepened

    root = family(tmp_path, "Llama")
    sources, asked = Sources(root), requests("loglikelihood", [*PROBES])
    alone = recipe_of("linear", models=[{"model": "base"}], merge_method="passthrough")
    engine = VllmEngine(deepened(alone, sources, 8), root / "base", "float32", root, base=root / "base", deepest=8)
    try:
        plain = recipe_of("ties", dtype="float32")
        found: dict[str, Any] = {}
        for text in (PATHS[0], "", PATHS[1], PATHS[2], PATHS[0]):
            recipe = path(text) if text else plain
            engine.swap(recipe)
            own = engine.lm.loglikelihood(asked)
            assert own == found.setdefault(text, own), f"{text}: other likelihoods after a swap to and fro"
            if not (out := root / f"out{len(found)}").exists():
                write_model(recipe, sources, out, trim=False)
                exported = [score for score, _ in engine.reference(out).lm.loglikelihood(asked)]
                assert [score for score, _ in own] == pytest.approx(exported, abs=1e-3), text
        with pytest.raises(CandidateError, match="has 9 layers in slices; it cannot be filled up to 8"):
            engine.swap(path("A 0-3 | A 1-3 | A 0-4"))
    finally:
        engine.close()
    assert len({str(of) for of in found.values()}) == len(found)
