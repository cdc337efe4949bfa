"""The simulated LLMs answer as chat models do, each by its policy."""

import json
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import pytest

from llmevo.errors import ConfigError, ProposerError
from llmevo.evaluation.score import Score
from llmevo.llm.client import Connection
from llmevo.llm.templates import Templates
from llmevo.search.prompts import STYLES
from llmevo.search.prompts.question import Prompt, Question, Reading
from llmevo.search.prompts.reading import read
from llmevo.search.prompts.schema import answer_model
from llmevo.search.prompts.table import GeneTable
from llmevo.search.simulated_llm import NEED_OPTIMUM, POLICIES, SimulatedClient
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Candidate, Suggestion, Trial
from support import spaces

space = partial(spaces.space, 2, layer_granularity=1)


def question(over: SearchSpace) -> Question:
    trials: list[Trial] = []
    for place, level in enumerate([0.2, 0.4, 0.5, 0.6]):
        genes = {gene.name: 0.0 if gene.choices else level for gene in over.genes}
        score = Score(level, 0.01, {"sums": {"acc,none": level}}, 10)
        trials.append(Trial(Candidate(place, 0, "parent", genes, "alpha"), score))
    return Question(over, trials, {"sums": (1.0, "acc,none")}, 3, 1, 0.1, 4, 60)


HONEST = [policy for policy in POLICIES if policy not in ("refuser", "babbler")]


def optimum_of(over: SearchSpace) -> Genes:
    return {gene.name: 0.0 if gene.choices else 0.9 for gene in over.genes}


def answered(policy: str, over: SearchSpace | None = None, seed: int = 0, prompt_seed: int = 5) -> Reading:
    over = over or space()
    prompt = STYLES["chat"].ask(question(over), Templates(), prompt_seed)
    return prompt.read(SimulatedClient(Connection(policy), optimum_of(over), seed).answer(prompt).text)


def levels(policy: str) -> list[list[float]]:
    return [[*proposal.genes.values()] for proposal in answered(policy).proposals]


@pytest.mark.parametrize("policy", HONEST)
def test_answers_pass_the_reader_or_are_repetitions(policy: str) -> None:
    reading = answered(policy)
    known = ("repeats", "lowest or highest")
    assert all(any(words in problem for words in known) for problem in reading.problems)
    assert all(space().contains(proposal.genes) for proposal in reading.proposals)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_prompt_has_the_same_answer(policy: str) -> None:
    assert answered(policy) == answered(policy)


@pytest.mark.parametrize("policy", HONEST)
@pytest.mark.parametrize("keys", [{}, {"filters": ["mlp"], "merge_method": ["ties", "linear"]}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_answers_have_the_form_that_servers_are_asked_for(policy: str, keys: dict[str, Any], masked: bool) -> None:
    over = space(**keys)
    asked = replace(question(over), slots=2, mask_names=masked)
    client = SimulatedClient(Connection(policy), optimum_of(over))
    prompt = Prompt((), read=lambda text: read(text, asked), seed=5, question=asked)
    text = client.answer(prompt).text
    assert answer_model(asked, GeneTable.of(over, 5)).model_validate_json(text)
    reading = prompt.read(text)
    assert not [problem for problem in reading.problems if "unknown" in problem]
    assert len(reading.beliefs) == len(json.loads(text)["beliefs"])


def test_a_refuser_and_a_babbler_have_nothing_to_rely_on() -> None:
    assert SimulatedClient(Connection("refuser")).answer(prompt_of(1)).text == ""
    assert answered("refuser").problems == ["the answer holds no JSON object"]
    for seed in range(30):
        reading = answered("babbler", prompt_seed=seed)
        assert reading.problems
        assert all(space().contains(proposal.genes) for proposal in reading.proposals)
        names = {gene.name for gene in space().genes}
        assert all({*belief.genes} <= names and 0 <= belief.confidence <= 1 for belief in reading.beliefs)


def test_who_knows_the_signs_is_right_about_that_share_of_the_genes_in_every_prompt_of_a_search() -> None:
    best = question(space()).incumbent  # everywhere below the optimum

    def rising(proposal: Suggestion) -> tuple[bool, ...]:
        return tuple(proposal.genes[name] > value for name, value in best.items())

    for policy, right in (("signs:0.75", 6), ("signs:1", 8), ("signs:0", 0), ("signs:0.05", 0)):
        said = {rising(p) for seed in range(5) for p in answered(policy, prompt_seed=seed).proposals}
        assert [sum(one) for one in said] == [right]
        beliefs = answered(policy).beliefs
        assert sum(len(b.genes) for b in beliefs if b.direction == 1) == right
        assert sum(len(b.genes) for b in beliefs if b.direction == -1) == 8 - right
    assert len({rising(answered("signs:0.5", seed=seed).proposals[0]) for seed in range(5)}) > 1


def test_an_approximate_recipe_is_one_of_the_search_and_as_near_as_its_share() -> None:
    def distance(policy: str, seed: int) -> float:
        genes = answered(policy, seed=seed).beliefs
        return fmean(abs((belief.value or 0.0) - 0.9) for belief in genes)

    near, far = (fmean(distance(policy, seed) for seed in range(10)) for policy in ("recipe:0.02", "recipe:0.25"))
    assert 0.01 < near < 0.04 < 0.1 < far  # the weights' range is 1.5
    assert answered("recipe").beliefs == answered("recipe:0.25", prompt_seed=9).beliefs
    assert answered("recipe", seed=1).beliefs != answered("recipe", seed=2).beliefs


def test_the_late_one_improves_with_the_scores() -> None:
    def error(scores: int) -> float:
        over = space()
        first = question(over).trials[0]
        trials = [replace(first, candidate=replace(first.candidate, id=place)) for place in range(scores)]
        asked = Question(over, trials, {"sums": (1.0, "acc,none")}, 20, 1, 0.1, 4, 60)
        prompt = Prompt((), read=lambda text: read(text, asked), seed=5, question=asked)
        proposals = prompt.read(SimulatedClient(Connection("late"), optimum_of(over)).answer(prompt).text).proposals
        return fmean(abs(value - 0.9) for p in proposals for value in p.genes.values())

    assert error(0) > 2 * error(40)


@pytest.mark.parametrize("name", ["signs:many", "recipe:", "signs:0.8"])
def test_the_share_in_a_name_is_a_number(name: str) -> None:
    over = space()
    if name == "signs:many":
        with pytest.raises(ConfigError, match="many"):
            SimulatedClient(Connection(name), optimum_of(over))
    else:
        assert SimulatedClient(Connection(name), optimum_of(over)).model == name


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


@pytest.mark.parametrize("policy", [*NEED_OPTIMUM, "signs:0.9"])
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


def prompt_of(seed: int) -> Prompt:
    asked = Question(space(), [], {"sums": (1.0, "acc,none")}, 2, 1, 0.1, 0, 60)
    return STYLES["chat"].ask(asked, Templates(), seed)


@pytest.mark.parametrize("policy", HONEST)
def test_before_any_score_there_is_an_answer(policy: str) -> None:
    over, prompt = space(), prompt_of(1)
    reading = prompt.read(SimulatedClient(Connection(policy), optimum_of(over)).answer(prompt).text)
    assert all(over.contains(proposal.genes) for proposal in reading.proposals)
    assert reading.proposals
