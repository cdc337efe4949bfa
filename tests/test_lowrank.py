"""Candidates of LoRA adapters asked together over their base: the answers of merged weights, with nothing merged."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import new_adapter
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from llmevo.engines.hf import HfEngine
from llmevo.engines.lora_batching.coefficients import Shares
from llmevo.engines.lora_batching.scorer import Together
from llmevo.errors import CandidateError, ConfigError, SourceError
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.models.checkpoints import Sources
from llmevo.models.references import ModelReference
from llmevo.search.genome import Genome
from llmevo.search.space import SearchSpace

LAYERS = 2
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ("base+one", "base+two", "base+three")
TASK_ARITHMETIC = {"base_model": "base", "merge_method": "task_arithmetic", "layer_granularity": 1}
GENOMES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {**TASK_ARITHMETIC, "allow_negative_weights": True},
    "in parts": {**TASK_ARITHMETIC, "filters": ["self_attn", "mlp"], "parameters": {"lambda": 0.7}},
    "normalized": {**TASK_ARITHMETIC, "normalize": True, "smooth": True},
    "linear": {"merge_method": "linear"},
    "linear, with its base": {"merge_method": "linear", "models": ["base", *EXPERTS]},
    "several methods": {**TASK_ARITHMETIC, "merge_method": ["linear", "task_arithmetic"], "method_per_slice": True},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and three adapters of unlike rank that adapt unlike layers."""
    root = tmp_path_factory.mktemp("adapters")
    save_tiny(root / "base", tied=True)
    new_adapter(root / "one", root / "base", 1)
    new_adapter(root / "two", root / "base", 2, r=3, target_modules=EVERYWHERE)
    new_adapter(root / "three", root / "base", 3, target_modules=["v_proj", "up_proj"], use_rslora=True)
    return root


@pytest.fixture(scope="module")
def sources(root: Path) -> Sources:
    return Sources(root)


@pytest.fixture(scope="module")
def engine(root: Path, sources: Sources) -> HfEngine:
    return HfEngine(root / "base", root / "base", "float32", "cpu", Merger(sources))


def genome(**changes: Any) -> Genome:
    return Genome.model_validate({"models": [*EXPERTS], "dtype": "float32", **changes})


def together(engine: HfEngine, sources: Sources, references: Sequence[ModelReference]) -> Together:
    return Together(engine, sources, references, "float32")


def recipes(of: Genome, count: int = 4) -> list[Recipe]:
    """The first model alone, the uniform merge, and points anywhere."""
    space, random = SearchSpace(of, LAYERS), torch.Generator().manual_seed(0)
    points = [torch.rand(len(space.genes), generator=random).double().numpy() for _ in range(count - 2)]
    return [
        space.decode(genes) for genes in (space.parent(space.merged[0]), space.uniform(), *map(space.from_unit, points))
    ]


def requests(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


BEGINNING = "solved examples that all of them see 1 2 3 "
CHOICES = [(f"question {i} is", f" {answer}{i}") for i in range(9) for answer in "abcd"]
ASKED = {
    "alike": requests("loglikelihood", CHOICES),
    "unlike": requests("loglikelihood", [("", "x y"), ("a" * 90, " cut"), ("b", "c" * 70), *CHOICES[:6]]),
    "behind one stem": requests("loglikelihood", [(f"{BEGINNING}{i}:", " yes") for i in range(40)]),
    "windows": requests("loglikelihood_rolling", [("abc " * 40,), ("word",), ("other words",)]),
    "texts": requests(
        "generate_until", [(f"{i} say", {"until": ["a", "\n"], "max_gen_toks": 7 + i % 2}) for i in range(9)]
    ),
    "texts behind one stem": requests(
        "generate_until",
        [(f"{BEGINNING}{i % 7}{'y' * (i % 3)}:", {"until": ["?"], "max_gen_toks": 9}) for i in range(30)],
    ),
    "beams": requests(
        "generate_until", [(f"{i} to", {"until": [], "max_gen_toks": 5, "num_beams": 2}) for i in range(3)]
    ),
}


def assert_same(found: list[Any], expected: list[Any]) -> None:
    """Texts and greedy choices to the letter, log-likelihoods within 1e-3."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, tuple):
            assert one == (pytest.approx(other[0], abs=1e-3), other[1])
        else:
            assert one == (pytest.approx(other, abs=1e-3) if isinstance(other, float) else other)


def answers(lm: Any, names: Sequence[str]) -> list[list[Any]]:
    return [getattr(lm, ASKED[name][0].request_type)(ASKED[name]) for name in names]


@pytest.mark.parametrize("name", GENOMES)
def test_the_answers_are_those_of_merged_weights(engine: HfEngine, sources: Sources, name: str) -> None:
    given = genome(**GENOMES[name])
    asked = [*ASKED] if name == "task_arithmetic" else ["alike", "texts"]
    merges = recipes(given)
    expected: list[list[list[Any]]] = []
    for recipe in merges:
        engine.swap(recipe)
        expected.append(answers(engine.lm, asked))
    assert all(one != other for one, other in pairwise(expected))
    shared = together(engine, sources, given.references)
    with shared.candidates(merges) as members:
        for member, theirs in zip(members, expected, strict=True):
            for found, right in zip(answers(member, asked), theirs, strict=True):
                assert_same(found, right)
    engine.swap(merges[-1])  # the engine is as it was
    assert answers(engine.lm, asked) == expected[-1]


def test_batches_are_computed_once_for_all_who_are_still_in(
    engine: HfEngine, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = genome(**TASK_ARITHMETIC)
    shared = together(engine, sources, given.references)
    backbone = shared.scorer.shared
    rows: list[int] = []
    seen: Callable[..., Any] = backbone.hidden
    monkeypatch.setattr(backbone, "hidden", lambda tokens, *rest: rows.append(len(tokens)) or seen(tokens, *rest))
    with shared.candidates(recipes(given, 4)) as members:
        first = answers(members[0], ["alike"])
        passes = len(rows)
        assert answers(members[1], ["alike"]) != first
        assert len(rows) == passes
        members[1].leave()
        members[3].leave()
        answers(members[0], ["texts"])
        assert max(rows[passes:]) == 2 * 5  # the contexts of one length to be written, twice
        passes = len(rows)
        answers(members[2], ["texts"])
        assert len(rows) == passes


def test_the_base_has_to_count_one(sources: Sources) -> None:
    shares = Shares(sources, [ModelReference.parse(text) for text in ("base", *EXPERTS)])
    weights = {"base+one": 0.5, "base+two": -0.2, "base+three": 0.1}

    def linear(normalize: bool, **changed: float) -> Recipe:
        models = [{"model": model, "parameters": {"weight": w}} for model, w in {**weights, **changed}.items()]
        return Recipe.model_validate(
            {"merge_method": "linear", "models": models, "parameters": {"normalize": normalize}}
        )

    found = shares.of(linear(normalize=True))
    assert {*found} == {*sources[ModelReference.parse("base")].shapes}
    for vector in found.values():
        assert vector.tolist() == pytest.approx([1.25, -0.5, 0.25])
    with pytest.raises(CandidateError, match=r"the base counts 0.4 in it, not 1"):
        shares.of(linear(normalize=False))
    with pytest.raises(CandidateError, match=r"the base counts 0 in it"):  # weights that cancel out divide nothing
        shares.of(linear(normalize=True, **{"base+three": -0.3}))


def test_an_adapted_head_cannot_be_shared(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", tied=False)
    folder = new_adapter(tmp_path / "head", tmp_path / "base", target_modules=["lm_head", "q_proj"])
    change(folder, lambda factors: {name: x for name, x in factors.items() if "base_layer" not in name})
    with pytest.raises(ConfigError, match=r"base\+head adapts lm_head.weight.*adapters: merged"):
        built(tmp_path, "base+head")


def test_an_adapter_of_no_numbers_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", tied=False)
    folder = new_adapter(tmp_path / "torn", tmp_path / "base")
    change(folder, lambda factors: {name: x * float("nan") for name, x in factors.items()})
    with pytest.raises(SourceError, match=r"base\+torn: its model.layers.0.* is not finite"):
        built(tmp_path, "base+torn")


def change(folder: Path, to: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write an adapter's factors anew."""
    file = folder / "adapter_model.safetensors"
    save_file(to(load_file(file)), file)


def test_layers_that_lose_the_rows_of_a_batch_are_found_before_anything_is_asked(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: real(self, x.flatten(0, 1)).view(x.shape))
    with pytest.raises(ConfigError, match=r"layers.0.mlp.*_proj.weight of this architecture.*adapters: merged"):
        built(root, "base+one")


def built(root: Path, expert: str) -> Together:
    opened = Sources(root)
    engine = HfEngine(root / "base", root / "base", "float32", "cpu", Merger(opened))
    return together(engine, opened, [ModelReference.parse(expert)])
