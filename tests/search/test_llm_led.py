"""The search that an LLM leads: its start rows, its share of the evaluations, and what it is told and believed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmevo.llm.client import Connection
from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.base import answered
from llmevo.search.optimizers.features import Features
from llmevo.search.optimizers.llm import FIRST, GENERATION, LEFT, PROPOSALS, STEP
from llmevo.search.optimizers.llm_share import LEAST, MOST, SUCCESS, Share
from llmevo.search.prompts.question import Belief, Prompt, Question, Reading
from llmevo.search.simulated_llm import SimulatedClient
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Suggestion, Trial
from llmevo.testing.optimizers import Answer, ask, good, setup, silent, space, start_rows, trial

OVER = space(models=3, method="task_arithmetic", layer_granularity=2)
CENTRE = np.array([0.25, 0.7, 0.5, 0.3, 0.6, 0.4])
OPTIMUM = OVER.from_unit(CENTRE)


def quadratic(genes: Genes) -> float:
    return 1.0 - float(((OVER.to_unit(genes) - CENTRE) ** 2).mean())


def rows(over: SearchSpace) -> list[Suggestion]:
    return [Suggestion(row.candidate.genes, row.candidate.origin) for row in start_rows(over)]


def led(over: SearchSpace | None = None, **changes: Any) -> Any:
    return OPTIMIZERS["llm"](replace(setup(over or OVER), **changes))


def proposing(*points: Sequence[float] | float, **keys: Any) -> Answer:
    """An LLM that proposes these points of the unit cube; `keys` are further parts of the reading."""

    def answer(prompt: Prompt) -> Reading:
        over = asked(prompt).space
        genes = [over.from_unit(np.broadcast_to(np.array(point), len(over.genes))) for point in points]
        return Reading([Suggestion(of, "llm", "r", expected=0.5) for of in genes], **keys)

    return answer


def asked(prompt: Prompt) -> Question:
    assert prompt.question
    return prompt.question


def watched(prompts: list[Prompt], answer: Answer) -> Answer:
    def watch(prompt: Prompt) -> Reading:
        prompts.append(prompt)
        return answer(prompt)

    return watch


def simulated(policy: str, seed: int = 0) -> Answer:
    client = SimulatedClient(Connection(policy), OPTIMUM, seed)
    return lambda prompt: prompt.read(client.answer(prompt).text)


def scored(suggestions: Sequence[Suggestion], objective: Callable[[Genes], float], first: int) -> list[Trial]:
    return [trial(first + i, of.genes, objective(of.genes), of.origin) for i, of in enumerate(suggestions)]


class Searched:
    """A search of so many evaluations after the start rows, the LLM's included in these evaluations."""

    def __init__(
        self,
        answer: Answer,
        evaluations: int = 20,
        seed: int = 0,
        kind: str = "llm",
        objective: Callable[[Genes], float] = quadratic,
    ) -> None:
        self.prompts: list[Prompt] = []
        self.optimizer: Any = OPTIMIZERS[kind](replace(setup(OVER, seed), budget=evaluations + 4))
        answer = watched(self.prompts, answer)
        given = rows(OVER)
        first = answered(self.optimizer.ask_start(given), answer)
        told = scored([*given, *first], objective, 0)
        self.trials = told[len(given) :]
        while True:
            self.optimizer.tell(told)
            if (left := evaluations - len(self.trials)) <= 0:
                break
            told = scored(answered(self.optimizer.ask(min(6, left)), answer), objective, 100 + len(self.trials))
            self.trials += told
        self.own = [of for of in self.trials if of.candidate.origin == "llm"]
        self.regret = 1 - max(of.value for of in self.trials)


# The share


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=60))
def test_the_share_has_bounds_and_so_have_the_candidates_it_gives(worths: list[tuple[float, bool]]) -> None:
    share, given_to = Share(0.5), 0
    for worth, own in worths:
        share.observe(worth, own)
        assert LEAST <= share.value <= MOST
        slots = share.slots(3)
        assert 0 <= slots <= 3
        share.spend(3, slots)
        given_to += slots
    assert given_to <= MOST * 3 * len(worths) + 1e-6


@pytest.mark.parametrize("style", SUCCESS)
def test_after_eight_worthless_candidates_the_share_is_the_least_and_an_llm_that_has_learnt_gets_it_back(
    style: str,
) -> None:
    share = Share(SUCCESS[style])
    values = [share.value]
    for _ in range(8):
        share.observe(0.0, own=True)
        values.append(share.value)
    assert all(after <= before for before, after in pairwise(values))
    assert values[-1] == LEAST
    for _ in range(8):
        share.observe(1.0, own=True)
    assert share.value == MOST


def test_the_share_rises_with_the_llms_candidates_and_falls_with_the_numeric_ones() -> None:
    share = Share(0.3)
    first = share.value
    share.observe(0.9, own=True)
    better = share.value
    assert better > first
    share.observe(0.9, own=False)
    assert share.value < better


def test_fractions_of_candidates_are_saved_up_and_what_is_not_spent_is_no_debt() -> None:
    share = Share(0.35)  # as good as the numeric engine: a half
    assert share.value == pytest.approx(0.5)
    given_to: list[int] = []
    for _ in range(4):
        given_to.append(share.slots(1))
        share.spend(1, given_to[-1])
    assert given_to == [0, 1, 0, 1]
    for _ in range(20):
        assert share.slots(3) <= 3
    share.spend(3, 5)
    assert share.slots(1) == 0


# Start rows


def test_before_anything_is_scored_the_llm_is_asked_and_its_first_recipes_are_start_rows_in_its_order() -> None:
    prompts: list[Prompt] = []
    optimizer = led()
    found = answered(optimizer.ask_start(rows(OVER)), watched(prompts, proposing(0.9, 0.1, 0.6, 0.4)))
    assert [of.genes for of in found] == [OVER.from_unit(np.full(6, level)) for level in (0.9, 0.1, 0.6)]
    assert len(found) == FIRST
    (prompt,) = prompts
    question = asked(prompt)
    assert (list(question.trials), question.slots, question.wanted) == ([], FIRST, PROPOSALS)
    assert question.belief_weight is None
    assert not question.suggestions
    text = prompt.messages[1]["content"]
    assert f"NOW: {len(rows(OVER))} of {question.budget} evaluations are used" in text
    assert "No recipe is scored yet. Tried without you, so not to be proposed: each model alone.\n" in text


def test_a_start_row_that_is_there_already_is_no_start_row_again() -> None:
    prompts: list[Prompt] = []
    optimizer = led()
    given = rows(OVER)
    parent = OVER.to_unit(given[1].genes).tolist()
    answer = watched(prompts, proposing(parent, 0.2, 0.2))
    found = answered(optimizer.ask_start(given), answer)
    assert [of.genes for of in found] == [OVER.from_unit(np.full(6, 0.2))]
    optimizer.tell(scored([*given, *found], quadratic, 0))
    answered(optimizer.ask(6), answer)
    assert [of.fate for of in asked(prompts[1]).proposed] == [
        "it repeats a candidate",
        "scored",
        "it repeats a candidate",
    ]


def test_the_llms_start_rows_are_a_part_of_the_budget_that_is_left() -> None:
    answer = proposing(0.9, 0.1, 0.6, 0.4)
    for left in range(20):
        found = answered(led(budget=len(rows(OVER)) + left).ask_start(rows(OVER)), answer)
        assert len(found) == min(left // LEFT, FIRST)


def test_without_an_answer_there_are_no_more_start_rows() -> None:
    for answer in (silent, lambda _: Reading(lost=True)):
        optimizer = led()
        assert answered(optimizer.ask_start(rows(OVER)), answer) == []
        optimizer.tell(start_rows(OVER))
        assert answered(optimizer.ask(6), proposing(0.3))


def test_a_completion_model_is_not_asked_before_there_are_scores() -> None:
    prompts: list[Prompt] = []
    optimizer = led(style="completion")
    assert answered(optimizer.ask_start(rows(OVER)), watched(prompts, good)) == []
    assert not prompts
    optimizer.tell(start_rows(OVER))
    for generation in range(20):
        genes, _ = ask(optimizer, watched(prompts, silent))
        optimizer.tell([trial(10 + 3 * generation + i, one, quadratic(one), "gaussian") for i, one in enumerate(genes)])
    assert prompts


@pytest.mark.parametrize("kind", [name for name in OPTIMIZERS if name != "llm"])
def test_other_optimizers_ask_for_no_more_start_rows(kind: str) -> None:
    assert answered(OPTIMIZERS[kind](setup(OVER)).ask_start(rows(OVER)), good) == []


# Generations


def started(answer: Answer = silent, count: int = 0, **changes: Any) -> Any:
    """An optimizer that knows its start rows and so many random recipes."""
    optimizer = led(**changes)
    found = answered(optimizer.ask_start(rows(OVER)), answer)
    points = np.random.default_rng(4).random((count, len(OVER.genes)))
    more = [Suggestion(OVER.from_unit(point), "gaussian") for point in points]
    optimizer.tell(scored([*rows(OVER), *found, *more], quadratic, 0))
    return optimizer


def test_the_llms_recipes_come_first_and_numeric_candidates_fill_the_generation() -> None:
    prompts: list[Prompt] = []
    genes, origins = ask(started(), watched(prompts, proposing(0.9, 0.1, 0.6)))
    slots = asked(prompts[0]).slots
    assert 1 <= slots < GENERATION
    assert origins == ["llm"] * slots + ["gaussian"] * (GENERATION - slots)
    assert genes[:slots] == [OVER.from_unit(np.full(6, level)) for level in (0.9, 0.1, 0.6)][:slots]


def test_it_asks_for_a_candidate_for_each_worker_and_the_llm_hears_what_is_being_scored() -> None:
    prompts: list[Prompt] = []
    optimizer = started(parallel=8)
    found = answered(optimizer.ask(8), watched(prompts, proposing(0.9, 0.1, 0.6)))
    assert len(found) == 8
    assert [of.origin for of in found[:3]] == ["llm"] * 3
    optimizer.expect(found[:2])
    optimizer.tell(scored(found[2:], quadratic, 10))
    while len(prompts) < 2:
        answered(optimizer.ask(8), watched(prompts, silent))
    fates = [of.fate for of in asked(prompts[1]).proposed]
    assert fates[:3] == ["it is being scored", "it is being scored", "scored"]


def test_the_model_of_the_scores_does_not_reject_the_llms_recipes_nor_order_them() -> None:
    corner = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    optimizer = started(count=30)
    optimizer._fit()
    low, high = optimizer._model.mean(np.array([corner, CENTRE + 0.02]))
    assert low < min(optimizer._model._values) + 0.5 < high  # it expects the corner to be among the worst
    found = answered(optimizer.ask(6), proposing(corner, (CENTRE + 0.02).tolist()))
    assert [of.origin for of in found[:2]] == ["llm", "llm"]
    assert found[0].genes == OVER.from_unit(np.array(corner))


def test_without_an_answer_numeric_candidates_fill_the_whole_generation() -> None:
    genes, origins = ask(started(), silent)
    assert origins == ["gaussian"] * GENERATION
    assert len({tuple(of.values()) for of in genes}) == GENERATION


def test_an_answer_without_a_recipe_is_no_bad_score() -> None:
    optimizer = started()
    before = optimizer.trust
    for answer in (silent, lambda _: Reading(lost=True)):
        ask(optimizer, answer)
        assert optimizer.trust == before
    flaky = Searched(lambda prompt: silent(prompt) if prompt.seed % 3 else simulated("oracle")(prompt), 30)
    assert flaky.own
    assert flaky.optimizer.trust > 0.6


def gaps(answer: Answer, generations: int = 40) -> list[int]:
    """The generations from one prompt to the next."""
    optimizer, prompts = started(), list[int]()
    for generation in range(generations):
        genes, origins = ask(optimizer, lambda prompt, now=generation: (prompts.append(now), answer(prompt))[1])
        optimizer.tell([trial(10 + 3 * generation + i, one, 0.9, origins[i]) for i, one in enumerate(genes)])
    return [after - before for before, after in pairwise(prompts)]


def test_after_some_empty_answers_the_llm_is_asked_less_and_less_often() -> None:
    found = gaps(silent)
    assert found[0] == 1
    assert found == sorted(found)
    assert 8 <= found[-1] <= 32
    assert sum(found) > 3 * len(found)


def test_an_llm_that_answers_again_is_asked_again_at_once() -> None:
    optimizer, asked_at = started(), list[int]()
    random = np.random.default_rng(0)
    for generation in range(40):

        def answer(_: Prompt, now: int = generation) -> Reading:
            asked_at.append(now)
            return Reading(lost=True) if len(asked_at) < 5 else proposing(random.random(6).tolist())(_)

        found = answered(optimizer.ask(6), answer)
        optimizer.tell([trial(10 + 3 * generation + i, of.genes, 0.9, of.origin) for i, of in enumerate(found)])
    recovered = asked_at[4:]
    assert recovered[0] - asked_at[3] > 1
    assert recovered[1] - recovered[0] <= 2


def test_one_evaluation_at_a_time_is_one_candidate_and_the_llm_gets_its_share_of_them() -> None:
    optimizer, origins, random = started(), list[str](), np.random.default_rng(0)
    for place in range(8):
        found = answered(optimizer.ask(1), proposing(*random.random((4, 6)).tolist()))
        assert len(found) == 1
        origins.append(found[0].origin)
        optimizer.tell([trial(20 + place, found[0].genes, 0.9, found[0].origin)])
    assert {*origins} == {"llm", "gaussian"}


def test_a_generation_is_never_larger_than_what_is_asked_for() -> None:
    for size in range(1, 8):
        for answer in (silent, proposing(0.1, 0.2, 0.3, 0.6)):
            assert 1 <= len(answered(started().ask(size), answer)) <= min(size, GENERATION)


def test_nothing_is_asked_for_twice() -> None:
    for policy in ("copier", "recombiner", "corner"):
        trials = Searched(simulated(policy), 25).trials
        assert len({tuple(of.candidate.genes.values()) for of in trials}) == len(trials)


# What the LLM is told


def test_what_the_llm_said_before_and_what_became_of_it_is_told_again() -> None:
    prompts: list[Prompt] = []
    start = ([0.2] * 6, [0.8] * 6, [0.6] * 6, [0.7] * 6)
    answer = Reading()

    def first(prompt: Prompt) -> Reading:
        nonlocal answer
        answer = prompt.read(
            json.dumps(
                {
                    "analysis": "late layers matter",
                    "beliefs": [{"model": "alpha", "direction": "higher", "confidence": 0.7, "why": "its card"}],
                    "proposals": [],
                    "hypotheses": [],
                }
            )
        )
        return replace(proposing(*start)(prompt), analysis=answer.analysis, beliefs=answer.beliefs)

    optimizer = started(watched(prompts, first))
    second = answered(optimizer.ask(6), watched(prompts, proposing(0.35, 0.36)))
    optimizer.tell(scored(second, quadratic, 50))
    while len(prompts) < 3:
        optimizer.tell(scored(answered(optimizer.ask(6), watched(prompts, silent)), quadratic, 60))
    question, third = asked(prompts[1]), asked(prompts[2])
    assert question.analysis == "late layers matter"
    assert [*question.beliefs] == answer.beliefs != []
    assert question.beliefs[0].direction == 1
    assert [of.fate for of in question.proposed] == ["scored"] * 3 + ["no evaluation was left for it"]
    for one, level in zip(question.proposed[:3], (0.2, 0.8, 0.6), strict=True):
        assert one.trial
        assert one.trial.candidate.genes == one.suggestion.genes == OVER.from_unit(np.full(6, level))
        assert one.generation == 0
    assert question.proposed[3].trial is None
    assert [predicted for predicted, _ in question.predictions] == [0.5] * 3
    assert [actual for _, actual in question.predictions] == [of.trial.value for of in question.proposed if of.trial]
    assert question.belief_weight is not None
    assert question.share == pytest.approx(LEAST, abs=1)
    assert question.used == len(question.trials) == len(rows(OVER)) + 3
    assert len(question.suggestions) == 3
    assert all(OVER.contains(genes) and deviation > 0 for genes, _, deviation in question.suggestions)
    spread = float(np.std([trial.value for trial in question.trials]))
    assert question.suggestions[0][2] > 0.1 * spread  # none of them is taken for scored
    assert len(third.proposed) > 4
    assert [*third.beliefs] == answer.beliefs  # an answer without beliefs takes none back
    assert third.analysis == "late layers matter"


def test_hypotheses_of_all_answers_are_told() -> None:
    prompts: list[Prompt] = []

    def answer(prompt: Prompt) -> Reading:
        said = {"claim": f"claim {len(prompts)}", "task": None, "better": "P1", "worse": "P2"}
        table = [[10 + 5 * len(prompts)] * 3, [20] * 3]
        proposals = [{"reason": "r", "genome": table}, {"reason": "r", "genome": [[90] * 3, [80 - len(prompts)] * 3]}]
        return prompt.read(json.dumps({"analysis": "", "proposals": proposals, "hypotheses": [said], "beliefs": []}))

    optimizer = started(watched(prompts, answer))
    for generation in range(6):
        optimizer.tell(scored(answered(optimizer.ask(6), watched(prompts, answer)), quadratic, 20 + 3 * generation))
    told = [[of.text for of in asked(prompt).hypotheses] for prompt in prompts]
    assert told[0] == []
    assert len(told) > 2
    for count, texts in enumerate(told):
        assert texts == [f"claim {place + 1}" for place in range(count)]


def test_the_same_history_gives_the_same_prompts() -> None:
    def texts() -> list[str]:
        return [repr((prompt.messages, prompt.seed)) for prompt in Searched(simulated("signs:0.9"), 15).prompts]

    assert len(texts()) > 2
    assert texts() == texts()


def test_other_answers_and_other_beliefs_are_other_states() -> None:
    def state(answer: Answer) -> str:
        return started(answer).state()

    beliefs = [Belief((OVER.genes[0].name,), 1)]
    answers = [silent, proposing(0.2), proposing(0.3), proposing(0.2, beliefs=beliefs)]
    assert len({state(answer) for answer in answers}) == 4
    assert state(proposing(0.2)) == state(proposing(0.2))


# Beliefs


def test_a_belief_is_a_value_with_a_width_or_a_step_from_the_best_recipe() -> None:
    optimizer, names = started(), [gene.name for gene in OVER.genes]
    best = max(optimizer._trials, key=lambda of: of.value)
    start = OVER.to_unit(best.candidate.genes)
    range_ = OVER.genes[1].high - OVER.genes[1].low
    beliefs = [
        Belief((names[0],), 1, confidence=0.9),
        Belief((names[0], names[2]), -1, confidence=0.4),
        Belief((names[1],), 0, OVER.from_unit(np.full(6, 0.8))[names[1]], spread=0.1 * range_),
        Belief(("unknown",), 1),
    ]
    centres, precisions = optimizer._centres_of(beliefs)
    expected = np.clip([start[0] + STEP, 0.8, start[2] - STEP, *start[3:]], 0, 1)
    assert centres == pytest.approx(expected, abs=0.01)
    assert precisions[1] == pytest.approx(100)
    assert precisions[0] == precisions[2] > 0
    assert not precisions[3:].any()


def believing(point: Sequence[float]) -> Answer:
    """An LLM that proposes nothing and believes in a recipe."""
    values = OVER.from_unit(np.array(point)).items()
    said = [Belief((name,), 0, value, confidence=0.9) for name, value in values]
    return lambda _: Reading(beliefs=said)


def test_the_scores_decide_the_weight_of_beliefs() -> None:
    chances: list[float] = []
    for point in (CENTRE.tolist(), [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]):
        optimizer = started(believing(point), 12)
        optimizer._fit()
        chances.append(optimizer._model.belief_probability)
    assert chances[0] > 0.8
    assert chances[1] < 0.3


def test_wrong_beliefs_hardly_hold_up_the_search() -> None:
    wrong = fmean(Searched(believing([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]), 25, seed).regret for seed in range(2))
    without = fmean(Searched(silent, 25, seed, "llm-off").regret for seed in range(2))
    assert wrong < 2 * without + 0.002


def test_right_beliefs_alone_lead_the_numeric_candidates() -> None:
    def distance(answer: Answer) -> float:
        return float(np.abs(OVER.to_unit(ask(started(answer), silent)[0][0]) - CENTRE).mean())

    assert distance(believing(CENTRE.tolist())) < 0.6 * distance(silent)


def test_beliefs_count_where_merge_methods_are_searched_but_for_no_method_by_genes_that_only_it_has() -> None:
    over = space(method=["ties", "linear"], layer_granularity=2)
    numbers = [gene.name for gene in over.genes if not gene.choices]
    weights, densities = ([name for name in numbers if part in name] for part in ("weight", "density"))
    assert weights
    assert densities
    features = Features(over)
    for believed in (weights, densities):
        beliefs = [Belief((name, over.genes[0].name), 0, value=0.9) for name in believed]
        optimizer = led(over)
        answered(optimizer.ask_start(rows(over)), lambda _, said=beliefs: Reading(beliefs=said))
        optimizer.tell(start_rows(over))
        mean = optimizer._prior_mean()
        points = np.random.default_rng(0).random((4000, len(over.genes)))
        values, method = mean(features.of(points)), np.array([features.chosen(point)[0] for point in points])
        kinds = [values[method == kind] for kind in range(2)]
        assert np.isclose(kinds[0].mean(), kinds[1].mean(), rtol=0.05)
        assert [kind.std() > 0.01 for kind in kinds] == [True, believed is weights]
        near = np.array([over.to_unit(over.clamp({**over.uniform(), **dict.fromkeys(believed, 0.9)}))])
        assert mean(features.of(near)) > values.mean()


def test_a_model_alone_that_is_no_point_of_the_space_is_shown_and_counted_but_not_learnt_from() -> None:
    prompts: list[Prompt] = []
    optimizer = led()
    answered(optimizer.ask_start(rows(OVER)), watched(prompts, silent))
    inside, outside = start_rows(OVER)[:-1], start_rows(OVER)[-1]
    optimizer.beside = [outside]
    optimizer.tell(inside)
    answered(optimizer.ask(6), watched(prompts, silent))
    question = asked(prompts[-1])
    assert [*question.trials] == [*inside, outside]
    assert question.used == len(rows(OVER))
    assert outside not in optimizer._trials


# Good and bad LLMs


def test_an_llm_that_knows_the_way_has_a_large_share_and_helps() -> None:
    known = [Searched(simulated("oracle", seed), 12, seed) for seed in range(3)]
    without = [Searched(silent, 12, seed, "llm-off") for seed in range(3)]
    assert all(of.optimizer.trust > 0.6 for of in known)
    assert all(len(of.own) >= 6 for of in known)
    assert fmean(of.regret for of in known) < 0.5 * fmean(of.regret for of in without)


def test_the_harm_of_an_adversary_is_bounded() -> None:
    hostile = [Searched(simulated("adversary", seed), 30, seed) for seed in range(3)]
    without = [Searched(silent, 30, seed, "llm-off") for seed in range(3)]
    assert fmean(of.regret for of in hostile) < 2 * fmean(of.regret for of in without) + 0.002
    assert all(len(of.own) < 15 for of in hostile)


@pytest.mark.parametrize("policy", ["copier", "corner", "random"])
def test_an_llm_without_knowledge_has_a_small_part_of_the_evaluations(policy: str) -> None:
    found = Searched(simulated(policy), 40)
    assert len(found.own) <= 16
    assert found.regret < 0.01


@pytest.mark.parametrize("policy", ["refuser", "babbler"])
def test_answers_that_nothing_can_be_made_of_do_not_stop_the_search(policy: str) -> None:
    for seed in range(2):
        found = Searched(simulated(policy, seed), 25, seed)
        assert len(found.trials) >= 25
        assert found.regret < 0.02
        assert found.prompts
        for of in found.trials:
            assert OVER.contains(of.candidate.genes)


def test_failures_of_all_recipes_of_the_llm_take_its_share() -> None:
    random = np.random.default_rng(0)
    optimizer = started()
    for generation in range(12):
        found = answered(optimizer.ask(6), proposing(*random.random((4, 6)).tolist()))
        numeric = 0.5 + generation / 100
        values = [None if of.origin == "llm" else numeric for of in found]
        pairs = enumerate(zip(found, values, strict=True), start=20 + 3 * generation)
        optimizer.tell([trial(i, of.genes, value, of.origin) for i, (of, value) in pairs])
    assert optimizer.trust < 0.1


def test_the_search_climbs_without_any_answer_of_the_llm() -> None:
    assert Searched(silent, 25).regret < 0.01
