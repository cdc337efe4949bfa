"""The contract of every optimizer, and what the LLM's evolution strategy does on top."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmevo.evaluation.score import Score
from llmevo.llm.client import Connection
from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.llm import PRIOR
from llmevo.search.optimizers.recommendation import recommend
from llmevo.search.optimizers.surrogate_cma_es import FIRST_SIGMA, LARGEST, NOISY_SIGMA, SMALLEST, Distribution
from llmevo.search.prompts.question import Prompt, Reading
from llmevo.search.simulated_llm import SimulatedClient
from llmevo.search.space import Genes
from llmevo.search.trial import Candidate, Trial
from llmevo.testing import OptimizerContract
from llmevo.testing.optimizers import (
    SIZE,
    Answer,
    Make,
    ask,
    good,
    height,
    run,
    setup,
    silent,
    space,
    start_rows,
    trial,
)


class TestEveryOptimizer(OptimizerContract):
    @pytest.fixture(params=OPTIMIZERS.values(), ids=[*OPTIMIZERS])
    def make(self, request: pytest.FixtureRequest) -> Make:
        return request.param


# The evolution strategy with an LLM in it


def evolution(kind: str = "llm", **changes: Any) -> Any:
    optimizer = OPTIMIZERS[kind](replace(setup(), **changes))
    optimizer.tell(start_rows(space()))
    return optimizer


def watched(prompts: list[Prompt], answer: Answer = good) -> Answer:
    def watch(prompt: Prompt) -> Reading:
        prompts.append(prompt)
        return answer(prompt)

    return watch


def simulated(policy: str) -> Answer:
    proposer = SimulatedClient(Connection(policy), {gene.name: 0.4 for gene in space().genes})
    return lambda prompt: prompt.read(proposer.answer(prompt).text)


def test_the_llms_proposals_come_first_and_the_numeric_engine_fills_the_generation() -> None:
    genes, origins = ask(evolution())
    assert origins == ["llm"] + ["gaussian"] * (SIZE - 1)
    assert [*genes[0].values()] in ([0.11, 0.49, 0.11, 0.49], [0.61, 0.49, 0.61, 0.49])


@pytest.mark.parametrize("kind", ["llm", "llm-off"])
def test_without_an_answer_the_numeric_engine_fills_the_whole_generation(kind: str) -> None:
    genes, origins = ask(evolution(kind), silent)
    assert origins == ["gaussian"] * SIZE
    assert len({tuple(g.values()) for g in genes}) == SIZE


def test_without_an_llm_nobody_is_asked() -> None:
    prompts: list[Prompt] = []
    run(OPTIMIZERS["llm-off"], 3, watched(prompts), height)
    assert not prompts


def test_the_same_history_gives_the_same_prompt() -> None:
    texts: list[str] = []

    def watch(prompt: Prompt) -> Reading:
        texts.append(repr((prompt.messages, prompt.seed)))
        return good(prompt)

    run(OPTIMIZERS["llm"], 3, watch, height)
    run(OPTIMIZERS["llm"], 3, watch, height)
    assert texts[:3] == texts[3:]


def test_histories_with_other_scores_or_other_points_have_other_states() -> None:
    def state(rows: Sequence[Trial]) -> str:
        optimizer = OPTIMIZERS["llm"](setup())
        optimizer.tell(rows)
        return optimizer.state()

    rows = start_rows(space())
    elsewhere = [trial(0, space().clamp({g.name: 0.9 for g in space().genes}), 0.3), *rows[1:]]
    better = [trial(0, rows[0].candidate.genes, 0.9), *rows[1:]]
    assert len({state(rows), state(elsewhere), state(better)}) == 3


@pytest.mark.parametrize(("policy", "share"), [("copier", 0.0), ("corner", 0.05), ("random", 0.15), ("adversary", 0.3)])
def test_a_hostile_llm_is_hardly_asked_and_hardly_scored(policy: str, share: float) -> None:
    prompts: list[Prompt] = []
    found = run(OPTIMIZERS["llm"], 20, watched(prompts, simulated(policy)), height)
    own = sum(trial.candidate.origin == "llm" for trial in found.optimizer._trials)
    # The adversary's steps away from the optimum shrink with the best's distance to it, until they cost nothing.
    assert own <= share * len(found.asked)
    assert len(prompts) < 18
    assert found.optimizer.trust < PRIOR["chat"]


def test_an_llm_that_knows_the_optimum_earns_its_share() -> None:
    optimizer = run(OPTIMIZERS["llm"], 4, simulated("oracle"), height).optimizer
    assert optimizer.trust > PRIOR["chat"]


def test_answers_lost_now_and_then_are_not_held_against_an_llm_but_one_that_is_gone_is_hardly_asked() -> None:
    prompts: list[Prompt] = []
    oracle = simulated("oracle")
    lossy = watched(prompts, lambda prompt: oracle(prompt) if len(prompts) > 2 else Reading(lost=True))
    flaky = run(OPTIMIZERS["llm"], 4, lossy, height).optimizer
    assert flaky.trust > PRIOR["chat"]
    asked: list[Prompt] = []
    gone = run(OPTIMIZERS["llm"], 20, watched(asked, lambda _: Reading(lost=True)), height).optimizer
    assert gone.trust == 0
    assert len(asked) < 18


@pytest.mark.parametrize(("stderr", "lucky"), [(0.0, True), (0.15, False)])
def test_what_is_recommended_is_the_best_score_where_scores_are_exact_and_the_likeliest_where_they_are_noisy(
    stderr: float, lucky: bool
) -> None:
    over, random = space(method="task_arithmetic"), np.random.default_rng(0)
    assert recommend(over, []) is None
    assert recommend(over, [trial(0, over.uniform(), None)]) is None
    points = random.random((60, len(over.genes)))
    heights = 1 - 2 * ((points - 0.4) ** 2).mean(axis=1)
    scores = heights + stderr * random.standard_normal(len(points))
    # Where it is worst, a score that is higher than all others.
    points, scores = np.vstack([points, np.ones(len(over.genes))]), np.append(scores, scores.max() + 0.01)
    trials = [
        Trial(Candidate(i, 0, "random", over.from_unit(point), ""), Score(score, stderr, {}, 10))
        for i, (point, score) in enumerate(zip(points, scores.tolist(), strict=True))
    ]
    failed = Trial(Candidate(99, 0, "random", over.uniform(), ""), None, "it is not finite")
    for rows in (trials, [*trials, failed]):
        found = recommend(over, rows)
        assert found is not None
        assert (found == trials[-1]) is lucky
        assert lucky or heights[found.candidate.id] > np.quantile(heights, 0.9)


def test_what_is_recommended_of_very_many_trials_is_still_told_in_a_moment() -> None:
    over, random = space(models=3, method="task_arithmetic", layer_granularity=1), np.random.default_rng(0)
    points = random.random((900, len(over.genes)))
    heights = 0.6 - ((points - 0.5) ** 2).mean(axis=1)
    scores = heights + 0.05 * random.standard_normal(len(points))
    trials = [
        Trial(Candidate(i, 0, "random", over.from_unit(point), ""), Score(score, 0.05, {}, 10))
        for i, (point, score) in enumerate(zip(points, scores.tolist(), strict=True))
    ]
    found = recommend(over, trials)
    assert found is not None
    assert heights[found.candidate.id] > heights[int(np.argmax(scores))]


@pytest.mark.parametrize("kind", ["cma-es", "sep-cma-es", "spsa", "mergekit-evolve"])
def test_a_search_starts_from_the_best_start_row_and_as_mergekit_evolve_from_the_uniform_merge(kind: str) -> None:
    over = space(method="task_arithmetic", layer_granularity=1)
    scaled = next(iter(over.coefficients().values()))
    for best in (scaled, over.parent(over.merged[1])):
        optimizer = OPTIMIZERS[kind](setup(over))
        rows = start_rows(over)
        optimizer.tell([*rows, trial(len(rows), best, 0.9, "coefficient")])
        points = np.array([over.to_unit(genes) for _ in range(20) for genes in ask(optimizer)[0]])
        starts = {"best": best, "uniform": over.uniform()}
        far = {name: np.abs(points.mean(axis=0) - over.to_unit(genes)).mean() for name, genes in starts.items()}
        assert min(far, key=lambda name: far[name]) == ("uniform" if kind == "mergekit-evolve" else "best")


@pytest.mark.parametrize("kind", ["cma-es", "sep-cma-es", "spsa"])
def test_a_log_of_before_starts_from_the_uniform_merge(kind: str) -> None:
    over, asked = space(), list[list[Genes]]()
    for best in (0.1, 0.9):  # of another start row
        optimizer = OPTIMIZERS[kind](replace(setup(over), from_uniform=True))
        optimizer.tell([*start_rows(over), trial(9, over.clamp(dict.fromkeys(over.uniform(), 0.8)), best, "user")])
        asked.append(ask(optimizer)[0])
    assert asked[0] == asked[1]


def test_nothing_is_asked_for_twice() -> None:
    for answer in (silent, simulated("copier"), simulated("recombiner")):
        asked = run(OPTIMIZERS["llm"], 12, answer, height).asked
        assert len({tuple(genes.values()) for genes in asked}) == len(asked)


def test_the_llm_is_told_of_the_models_best_and_of_what_became_of_its_predictions() -> None:
    prompts: list[Prompt] = []
    run(OPTIMIZERS["llm"], 6, watched(prompts, simulated("recombiner")), height)
    first, last = prompts[0].question, prompts[-1].question
    assert first is not None
    assert last is not None
    assert len(first.suggestions) == 3
    assert not first.predictions
    assert len(prompts) < 2 or last.predictions
    assert all(space().contains(genes) and deviation >= 0 for genes, _, deviation in last.suggestions)


@pytest.mark.parametrize(("stderr", "sigma"), [(0.0, FIRST_SIGMA), (0.03, NOISY_SIGMA)])
def test_the_first_steps_are_longer_where_scores_are_noisy(stderr: float, sigma: float) -> None:
    optimizer = OPTIMIZERS["llm-off"](setup())
    rows = [(row.candidate, row.score) for row in start_rows(space())]
    optimizer.tell([Trial(candidate, replace(score, stderr=stderr)) for candidate, score in rows if score])
    ask(optimizer)
    assert optimizer.sigma == sigma


def told(values: Sequence[float | None], generations: int = 1, rule: str = "csa", kind: str = "llm-off") -> float:
    """The step size after generations with these scores, in first ones; the best of the start rows has 0.32."""
    optimizer = evolution(kind, sigma_rule=rule)
    ask(optimizer, silent)
    first = optimizer.sigma
    for _ in range(generations):
        genes, _ = ask(optimizer, silent)
        optimizer.tell([trial(9, g, value, "gaussian") for g, value in zip(genes, values, strict=False)])
    return optimizer.sigma / first


@pytest.mark.parametrize("rule", ["csa", "llm"])
def test_the_step_size_of_cma_es_follows_the_path(rule: str) -> None:
    assert told([0.1 * place for place in range(SIZE)], rule=rule) != 1


def test_a_generation_in_which_some_failed_moves_the_distribution_at_once() -> None:
    assert told([0.1, 0.2, 0.3, 0.4, None, None]) != 1


def test_failures_do_not_move_the_distribution() -> None:
    assert told([None] * SIZE, 3) == 1


def test_the_step_size_stays_in_its_range_however_long_the_luck_lasts() -> None:
    for first, last in ((1e-9, SMALLEST), (0.9, LARGEST)):
        distribution = Distribution(np.full(3, 0.5), first, SIZE, 0)
        distribution.tell([np.full(3, 0.5)] * SIZE, range(SIZE))
        assert distribution.sigma == last


def test_the_search_climbs_without_any_answer_of_the_llm() -> None:
    asked = run(OPTIMIZERS["llm"], 8, silent, height).asked
    assert max(map(height, asked)) > max(map(height, [*asked[:SIZE], space().uniform()]))
