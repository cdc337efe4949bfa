"""The simulated LLMs answer as chat models do, each by its policy."""

from typing import Any

import pytest

from llmevo.errors import ConfigError, ProposerError
from llmevo.evaluation.score import Score
from llmevo.llm.client import Connection
from llmevo.llm.templates import Templates
from llmevo.search.genome import Genome
from llmevo.search.prompts import STYLES
from llmevo.search.prompts.question import Prompt, Question, Reading
from llmevo.search.simulated_llm import NEED_OPTIMUM, POLICIES, SimulatedClient
from llmevo.search.space import SearchSpace
from llmevo.search.trial import Candidate, Trial


def space(**keys: Any) -> SearchSpace:
    genome = {"models": ["alpha", "beta"], "merge_method": "task_arithmetic", "base_model": "base", **keys}
    return SearchSpace(Genome.model_validate({"layer_granularity": 1, **genome}), 4)


def question(over: SearchSpace) -> Question:
    trials: list[Trial] = []
    for place, level in enumerate([0.2, 0.4, 0.5, 0.6]):
        genes = {gene.name: 0.0 if gene.choices else level for gene in over.genes}
        score = Score(level, 0.01, {"sums": {"acc,none": level}}, 10)
        trials.append(Trial(Candidate(place, 0, "parent", genes, "alpha"), score))
    return Question(over, trials, {"sums": (1.0, "acc,none")}, 3, 1, 0.1, 4, 60)


def answered(policy: str, over: SearchSpace | None = None) -> Reading:
    over = over or space()
    optimum = {gene.name: 0.0 if gene.choices else 0.9 for gene in over.genes}
    prompt = STYLES["chat"].ask(question(over), Templates(), 5)
    return prompt.read(SimulatedClient(Connection(policy), optimum).answer(prompt).text)


def levels(policy: str) -> list[list[float]]:
    return [[*proposal.genes.values()] for proposal in answered(policy).proposals]


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_pass_the_reader_or_are_repetitions(policy: str) -> None:
    reading = answered(policy)
    known = ("repeats", "lowest or highest")
    assert all(any(words in problem for words in known) for problem in reading.problems)
    assert all(space().contains(proposal.genes) for proposal in reading.proposals)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_prompt_has_the_same_answer(policy: str) -> None:
    assert answered(policy) == answered(policy)


def test_the_copier_has_nothing_new_to_say() -> None:
    assert not levels("copier")


def test_the_recombiner_stays_among_the_best() -> None:
    assert all(0.4 <= level <= 0.6 for genes in levels("recombiner") for level in genes)


def test_corners_are_corners() -> None:
    bounds = {bound for gene in space().genes for bound in (gene.low, gene.high)}
    assert {level for genes in levels("corner") for level in genes} == bounds


def test_the_oracle_goes_to_the_optimum_and_the_adversary_away_from_it() -> None:
    assert all(0.6 < level < 0.9 for genes in levels("oracle") for level in genes)
    assert all(level < 0.6 for genes in levels("adversary") for level in genes)


def test_methods_are_named_where_there_are_several() -> None:
    over = space(merge_method=["ties", "linear"], method_per_slice=True)
    assert answered("recombiner", over).proposals


@pytest.mark.parametrize("policy", NEED_OPTIMUM)
def test_a_config_cannot_have_a_policy_that_needs_the_optimum(policy: str) -> None:
    with pytest.raises(ConfigError, match="optimum"):
        SimulatedClient(Connection(policy))


def test_an_unknown_policy_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="recombiner"):
        SimulatedClient(Connection("recombinr"))


def test_the_recombiner_is_the_default() -> None:
    proposer = SimulatedClient(Connection())
    proposer.check()
    assert (proposer.model, proposer.style) == ("recombiner", "chat")


def test_a_prompt_without_its_question_cannot_be_answered() -> None:
    with pytest.raises(ProposerError):
        SimulatedClient(Connection()).answer(Prompt((), read=lambda _: Reading()))


def test_before_any_score_there_is_an_answer() -> None:
    over = space()
    asked = Question(over, [], {"sums": (1.0, "acc,none")}, 2, 1, 0.1, 0, 60)
    prompt = STYLES["chat"].ask(asked, Templates(), 1)
    reading = prompt.read(SimulatedClient(Connection("corner")).answer(prompt).text)
    assert all(over.contains(proposal.genes) for proposal in reading.proposals)
    assert reading.proposals
