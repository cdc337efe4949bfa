"""The examples of CONTRIBUTING.md keep the contracts of `llmevo.testing` and run without a fork; broken parts fail."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llmevo
from llmevo.cli import terminal
from llmevo.config import TRACKERS
from llmevo.engines.hf import HfEngine
from llmevo.llm import CLIENTS
from llmevo.llm.client import Client, Connection, Reply, Request
from llmevo.merging.merger import Merger
from llmevo.merging.methods.base import Merge, TensorGroup
from llmevo.merging.methods.registry import METHODS, Method, Parameter
from llmevo.merging.recipe import Recipe
from llmevo.models.sources import Sources
from llmevo.run.trackers import LOGGERS
from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.base import Asking, Optimizer, Setup
from llmevo.search.optimizers.random_search import RandomSearch
from llmevo.testing import ClientContract, EngineContract, MergeMethodContract, OptimizerContract
from llmevo.testing.merge_methods import EDGES
from llmevo.testing.optimizers import silent
from support.tiny_model import save_tiny
from support.workspace import Workspace

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"
REGISTRIES: tuple[Any, ...] = (METHODS, OPTIMIZERS, CLIENTS, LOGGERS, TRACKERS)


def executed() -> dict[str, Any]:
    """What the examples of the guide define. The registries are left as they were."""
    parts: dict[str, Any] = {}
    before = [dict(registry) for registry in REGISTRIES]
    for code in re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL):
        exec(code, parts)
    for registry, known in zip(REGISTRIES, before, strict=True):
        parts.update({name: part for name, part in registry.items() if name not in known})
        registry.clear()
        registry.update(known)
    return parts


PARTS = executed()
SCALED_SUM: Method = PARTS["scaled_sum"]
Halving: type[Optimizer] = PARTS["Halving"]


class TestScaledSum(MergeMethodContract):
    @pytest.fixture
    def method(self) -> Method:
        return SCALED_SUM


class TestHalving(OptimizerContract):
    @pytest.fixture
    def make(self) -> type[Optimizer]:
        return Halving


class TestFileClient(ClientContract):
    @pytest.fixture
    def client(self, tmp_path: Path) -> Client:
        (tmp_path / "reply").write_text("one\n")
        return PARTS["FileClient"](Connection(model="reply", root=tmp_path))

    @pytest.fixture
    def lost_client(self, tmp_path: Path) -> Client:
        return PARTS["FileClient"](Connection(model="away", root=tmp_path))


class TestEngineOfTheGuide(PARTS["TestMyEngine"]):
    @pytest.fixture
    def model_folders(self, tmp_path: Path) -> tuple[Path, Path]:
        return save_tiny(tmp_path / "one", 1), save_tiny(tmp_path / "two", 2)


def test_parts_of_somebody_else_run_by_their_names(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "scaled_sum", SCALED_SUM)
    monkeypatch.setitem(OPTIMIZERS, "halving", Halving)
    monkeypatch.setitem(CLIENTS, "file", PARTS["FileClient"])
    for registry in (LOGGERS, TRACKERS):
        monkeypatch.setitem(registry, "text-file", PARTS["text-file"] if registry is TRACKERS else PARTS["TextFile"])
    (workspace.root / "reply").write_text("no proposal")
    genome = {"models": ["one", "two"], "merge_method": "scaled_sum", "dtype": "float32"}
    llm = {"proposer": "file", "model": "reply"}
    trackers = [{"name": "text-file", "file_name": "scores.txt"}]
    for name in ("halving", "llm"):
        config = workspace.config(
            genome=genome, search={"optimizer": name, "budget": 9}, llm=llm, loggers=trackers, engine={"backend": "hf"}
        )
        run = llmevo.evolve(config, f"runs/{name}")
        assert run.best is not None
        assert run.best.recipe.merge_method == "scaled_sum"
        assert workspace.llmevo("replay", run.folder, "--verify")[0] == 0
        assert (run.folder / "scores.txt").read_text()
        run.export(f"out-{name}")
    assert {event.reply for event in llmevo.open_run("runs/llm").state.prompted} == {"no proposal"}
    with terminal.console.capture() as printed:
        PARTS["origins"](Path("runs/halving"))
    assert "8 halving" in printed.get()
    assert PARTS["Search"].model_validate({"patience": 3}).patience == 3


def test_the_files_that_the_guide_names_are_there() -> None:
    places = [GUIDE.parent, GUIDE.parent / "llmevo"]
    named = {*re.findall(r"`([\w/.-]+(?:\.py|/))`", GUIDE.read_text())} - {"merging/methods/scaled_sum.py"}
    assert len(named) > 30
    assert not [name for name in named if not any((place / name).exists() for place in places)]


# Broken parts


def in_place(inputs: TensorGroup) -> Tensor:
    model = inputs.models[0]
    assert isinstance(model, Tensor)
    return model.mul_(inputs.shared["scale"])


def in_16_bits(inputs: TensorGroup) -> Tensor:
    dense = [inputs.weight(place).to(inputs.dtype) for place in range(len(inputs.models))]
    return torch.stack(dense).sum(0) * inputs.shared["scale"]


def with_global_noise(inputs: TensorGroup) -> Tensor:
    return inputs.weight(0) + torch.randn_like(inputs.weight(0))


def dividing(inputs: TensorGroup) -> Tensor:
    return inputs.weight(0) / inputs.shared["scale"]


def broken_promises(method: Method) -> set[str]:
    """The tests of the contract that a method fails."""
    contract, failed = MergeMethodContract(), set[str]()
    for test, arguments in (
        (contract.test_what_it_declares_is_consistent, {}),
        (contract.test_a_merge_leaves_its_inputs_as_they_were, {}),
        (contract.test_16_bit_inputs_are_merged_in_float32_and_rounded_once, {}),
        (contract.test_the_bits_follow_from_the_inputs_alone, {}),
        (contract.test_no_point_within_the_bounds_gives_what_is_not_finite, {"tensors": EDGES["zeros"]}),
    ):
        try:
            test(method, **arguments)
        except AssertionError:
            failed.add(test.__name__.removeprefix("test_"))
    return failed


@pytest.mark.parametrize(
    ("function", "promise"),
    [
        (in_place, "a_merge_leaves_its_inputs_as_they_were"),
        (in_16_bits, "16_bit_inputs_are_merged_in_float32_and_rounded_once"),
        (with_global_noise, "the_bits_follow_from_the_inputs_alone"),
        (dividing, "no_point_within_the_bounds_gives_what_is_not_finite"),
    ],
)
def test_a_broken_merge_method_fails(function: Merge, promise: str) -> None:
    assert not broken_promises(SCALED_SUM)
    assert promise in broken_promises(replace(SCALED_SUM, function=function))
    without_default = replace(SCALED_SUM, shared={"scale": Parameter(default=None)})
    assert "what_it_declares_is_consistent" in broken_promises(without_default)


class OutOfBounds(RandomSearch):
    def ask(self, size: int) -> Asking:
        drawn = yield from super().ask(size)
        return [replace(one, genes={name: value + 2.0 for name, value in one.genes.items()}) for one in drawn]


class Unseeded(RandomSearch):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._random = np.random.default_rng()


def test_a_broken_optimizer_fails() -> None:
    contract = OptimizerContract()
    with pytest.raises(AssertionError):
        contract.test_all_candidates_have_every_gene_and_lie_inside_the_bounds(OutOfBounds, silent)
    with pytest.raises(AssertionError):
        contract.test_the_same_seed_gives_the_same_candidates(Unseeded, silent)


class Raising:
    style, model = "chat", ""

    def check(self) -> None:
        """It is always there."""

    def answer(self, request: Request) -> Reply:
        raise TimeoutError("the line is dead")


def test_a_broken_client_fails() -> None:
    contract = ClientContract()
    with pytest.raises(TimeoutError):
        contract.test_an_llm_that_does_not_answer_is_an_error_of_a_proposer(Raising())
    with pytest.raises(AssertionError):
        contract.test_it_names_its_model_and_a_style_of_prompts(Raising())


class Forgetful:
    """An engine that keeps the first model that it was given."""

    def __init__(self, engine: HfEngine) -> None:
        self._engine, self._swapped = engine, False
        self.lm, self.differences, self.close = engine.lm, engine.differences, engine.close

    def swap(self, recipe: Recipe, quantize: str = "") -> None:
        if not self._swapped:
            self._engine.swap(recipe, quantize)
        self._swapped = True


def test_a_broken_engine_fails(tmp_path: Path) -> None:
    folders = save_tiny(tmp_path / "one", 1), save_tiny(tmp_path / "two", 2)
    engine = Forgetful(HfEngine(folders[0], folders[0], "float32", "cpu", Merger(Sources())))
    contract = EngineContract()
    with pytest.raises(AssertionError):
        contract.test_the_running_model_is_the_exported_one(engine, folders, tmp_path)
    with pytest.raises(AssertionError):
        contract.test_answers_follow_from_the_recipe_alone(engine, folders)
