"""`llmevo.testing` passes sound parts of somebody else and fails broken ones, and such parts run without a fork."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import llmevo
from llmevo.engines.hf import HfEngine
from llmevo.errors import ProposerError
from llmevo.llm import CLIENTS
from llmevo.llm.client import Client, Connection, Reply, Request
from llmevo.merging.kernels.task_vectors import weighted_sum
from llmevo.merging.merger import Merger
from llmevo.merging.methods.base import Merge, TensorGroup
from llmevo.merging.methods.method import Method, Parameter
from llmevo.merging.methods.registry import METHODS
from llmevo.merging.recipe import Recipe
from llmevo.models.checkpoints import Sources
from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.base import Asking, Optimizer, Setup, digest
from llmevo.search.trial import Suggestion, Trial
from llmevo.testing import ClientContract, EngineContract, MergeMethodContract, OptimizerContract
from llmevo.testing.merge_methods import EDGES
from llmevo.testing.optimizers import silent
from support.tiny_model import save_tiny
from support.workspace import Workspace


def scaled_sum(inputs: TensorGroup) -> Tensor:
    """The sum of all weights, times a number."""
    return weighted_sum(inputs.models, [inputs.shared["scale"]] * len(inputs.models), None, inputs.dtype)


SCALED_SUM = Method(
    name="scaled_sum",
    function=scaled_sum,
    paper="https://example.org/scaled-sum",
    shared={"scale": Parameter(default=0.5, low=0.0, high=1.0, start=0.5)},
)


class TestScaledSum(MergeMethodContract):
    @pytest.fixture
    def method(self) -> Method:
        return SCALED_SUM


class Halving(Optimizer):
    """Random points, in a box around the best one that halves every generation."""

    def __init__(self, setup: Setup) -> None:
        self._space, self._random = setup.space, np.random.default_rng(setup.seed)
        self._width, self._best = 1.0, -np.inf
        self._center = np.full(len(setup.space.genes), 0.5)

    def ask(self, size: int) -> Asking:
        anywhere = self._random.random((size, len(self._center)))
        near = np.clip(self._center + self._width * (anywhere - 0.5), 0.0, 1.0)
        is_choice = [bool(gene.choices) for gene in self._space.genes]
        points = np.where(is_choice, anywhere, near)  # a narrow box would reach one choice only
        return [Suggestion(self._space.from_unit(point), "halving") for point in points]
        yield  # a generator, as it may also yield prompts for an LLM

    def tell(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            if trial.value > self._best:
                self._best, self._center = trial.value, self._space.to_unit(trial.candidate.genes)
        self._width = max(self._width / 2, 0.05)

    def state(self) -> str:
        return digest(self._random, self._center.tolist(), self._width)


class TestHalving(OptimizerContract):
    @pytest.fixture
    def make(self) -> type[Optimizer]:
        return Halving


class Echo:
    """An LLM that repeats the last message."""

    style, model = "chat", "echo"

    def __init__(self, connection: Connection) -> None:
        self.lost = connection.model == "lost"

    def check(self) -> None:
        """It is always there."""

    def answer(self, request: Request) -> Reply:
        if self.lost:
            raise ProposerError("the line is dead")
        return Reply(request.messages[-1]["content"], self.model)


class TestEcho(ClientContract):
    @pytest.fixture
    def client(self) -> Client:
        return Echo(Connection())

    @pytest.fixture
    def lost_client(self) -> Client:
        return Echo(Connection(model="lost"))


# Broken parts


def in_place(inputs: TensorGroup) -> Tensor:
    model = inputs.models[0]
    assert isinstance(model, Tensor)
    return model.mul_(inputs.shared["scale"])


def in_16_bits(inputs: TensorGroup) -> Tensor:
    dense = [inputs.weight(place).to(inputs.dtype) for place in range(len(inputs.models))]
    return sum(dense, torch.zeros_like(dense[0])) * inputs.shared["scale"]


def with_global_noise(inputs: TensorGroup) -> Tensor:
    return inputs.weight(0) + torch.randn_like(inputs.weight(0))


def dividing(inputs: TensorGroup) -> Tensor:
    return inputs.weight(0) / inputs.shared["scale"]


def fails(method: Method) -> set[str]:
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
    assert not fails(SCALED_SUM)
    assert promise in fails(replace(SCALED_SUM, function=function))
    no_default = {"scale": Parameter(default=None)}
    assert fails(replace(SCALED_SUM, shared=no_default)) == {"what_it_declares_is_consistent"}


class OutOfBounds(Halving):
    def ask(self, size: int) -> Asking:
        drawn = yield from super().ask(size)
        return [replace(one, genes={name: value + 2.0 for name, value in one.genes.items()}) for one in drawn]


class Unseeded(Halving):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._random = np.random.default_rng()


def test_a_broken_optimizer_fails() -> None:
    contract = OptimizerContract()
    contract.test_all_candidates_have_every_gene_and_lie_inside_the_bounds(Halving, silent)
    with pytest.raises(AssertionError):
        contract.test_all_candidates_have_every_gene_and_lie_inside_the_bounds(OutOfBounds, silent)
    with pytest.raises(AssertionError):
        contract.test_the_same_seed_gives_the_same_candidates(Unseeded, silent)


class Raising(Echo):
    def answer(self, request: Request) -> Reply:
        raise TimeoutError("the line is dead")


def test_a_broken_client_fails() -> None:
    contract = ClientContract()
    with pytest.raises(TimeoutError):
        contract.test_an_llm_that_does_not_answer_is_an_error_of_a_proposer(Raising(Connection()))
    nameless = Echo(Connection())
    nameless.style = "sonnet"
    with pytest.raises(AssertionError):
        contract.test_it_names_its_model_and_a_style_of_prompts(nameless)


class Forgetful:
    """An engine that keeps the first model that it was given."""

    def __init__(self, engine: HfEngine) -> None:
        self._engine, self._swapped = engine, False
        self.lm, self.differences, self.close = engine.lm, engine.differences, engine.close

    def swap(self, recipe: Recipe) -> None:
        if not self._swapped:
            self._engine.swap(recipe)
        self._swapped = True


def test_a_broken_engine_fails(tmp_path: Path) -> None:
    models = save_tiny(tmp_path / "one", 1), save_tiny(tmp_path / "two", 2)
    engine = Forgetful(HfEngine(models[0], models[0], "float32", "cpu", Merger(Sources())))
    contract = EngineContract()
    with pytest.raises(AssertionError):
        contract.test_the_running_model_is_the_exported_one(engine, models, tmp_path)
    with pytest.raises(AssertionError):
        contract.test_answers_follow_from_the_recipe_alone(engine, models)


# Without a fork


def test_parts_of_somebody_else_run_by_their_names(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, SCALED_SUM.name, SCALED_SUM)
    monkeypatch.setitem(OPTIMIZERS, "halving", Halving)
    monkeypatch.setitem(CLIENTS, "echo", Echo)
    models = {"models": ["one", "two"], "merge_method": "scaled_sum", "dtype": "float32"}
    for search in ({"optimizer": "halving"}, {"optimizer": "llm"}):
        config = workspace.config(genome=models, search={**search, "budget": 9}, llm={"proposer": "echo"})
        run = llmevo.evolve(config, f"runs/{search['optimizer']}")
        assert run.best is not None
        assert run.best.recipe.merge_method == "scaled_sum"
        assert workspace.llmevo("replay", run.folder, "--verify")[0] == 0
        run.export(f"out-{search['optimizer']}")
    assert {event.model for event in llmevo.open_run("runs/llm").state.prompted} == {"echo"}
