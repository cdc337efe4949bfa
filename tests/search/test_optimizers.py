"""What every optimizer owes the loop, and what the LLM's evolution strategy does on top."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmevo.evaluation.score import Score
from llmevo.llm.client import Connection
from llmevo.llm.templates import Templates
from llmevo.search.genome import Genome
from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.base import Optimizer, Setup
from llmevo.search.optimizers.llm import PRIOR
from llmevo.search.optimizers.recommendation import recommend
from llmevo.search.optimizers.surrogate_cma_es import FIRST_SIGMA, LARGEST, NOISY_SIGMA, SMALLEST, Distribution
from llmevo.search.prompts.question import Prompt, Reading
from llmevo.search.simulated_llm import SimulatedClient
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Candidate, Trial

SIZE = 6
Answer = Callable[[Prompt], Reading]
Objective = Callable[[Genes], float]


def silent(_: Prompt) -> Reading:
    return Reading(problems=["no answer"])


def good(prompt: Prompt) -> Reading:
    """A valid answer for the four genes of `space()`, another one in every generation."""
    place = prompt.generation
    proposals = [{"reason": "r", "genome": [start + place, 50 - place] * 2} for start in (10, 60)]
    return prompt.read(json.dumps({"analysis": "a", "proposals": proposals}))


def space(models: int = 2, method: str | list[str] = "dare_ties", **keys: Any) -> SearchSpace:
    names = ["alpha", "beta", "gamma"][:models]
    genome = {"models": names, "merge_method": method, "base_model": "base", **keys}
    return SearchSpace(Genome.model_validate(genome), 4)


def setup(over: SearchSpace | None = None, seed: int = 0) -> Setup:
    return Setup(over or space(), seed, 60, {"sums": (1.0, "acc,none")}, "chat", Templates())


def trial(place: int, genes: Genes, total: float | None, origin: str = "parent") -> Trial:
    candidate = Candidate(place, 0, origin, genes, "alpha")
    if total is None:
        return Trial(candidate, None, "the merged norm.weight is not finite")
    return Trial(candidate, Score(total, 0.01, {"sums": {"acc,none": total}}, 10))


def start_rows(over: SearchSpace) -> list[Trial]:
    points = [over.uniform(), *(over.parent(model) for model in over.merged)]
    return [trial(place, genes, 0.3 + place / 100) for place, genes in enumerate(points)]


def ask(optimizer: Optimizer, answer: Answer = good, size: int = SIZE) -> tuple[list[Genes], list[str]]:
    """Genes and origins of the next candidates; every prompt is answered by `answer`."""
    asking = optimizer.ask(size)
    try:
        prompt = next(asking)
        while True:
            prompt = asking.send(answer(prompt))
    except StopIteration as stop:
        suggestions = stop.value
    return [s.genes for s in suggestions], [s.origin for s in suggestions]


def run(kind: str, generations: int = 4, answer: Answer = good, objective: Objective | None = None, **keys: Any) -> Any:
    """Some generations: the optimizer, everything it asked for, and its state after each."""
    made = setup(**keys)
    optimizer = OPTIMIZERS[kind](made)
    told = start_rows(made.space)
    asked: list[Genes] = []
    states: list[str] = []
    for _ in range(generations):
        optimizer.tell(told)
        genes, origins = ask(optimizer, answer)
        values = [objective(g) if objective else None for g in genes]
        told = [trial(len(asked) + i, genes[i], values[i], origins[i]) for i in range(len(genes))]
        asked += genes
        states.append(optimizer.state())
    return optimizer, asked, states


def height(genes: Genes) -> float:
    return 1.0 - sum((value - 0.4) ** 2 for value in genes.values()) / 10


every = pytest.mark.parametrize("kind", OPTIMIZERS)
answers = pytest.mark.parametrize("answer", [good, silent])

# What every optimizer owes


@every
@answers
@pytest.mark.parametrize("size", [1, 2, 7])
def test_an_optimizer_asks_for_at_most_the_candidates_it_may_and_at_least_one(
    kind: str, answer: Answer, size: int
) -> None:
    optimizer = OPTIMIZERS[kind](setup())
    optimizer.tell(start_rows(space()))
    assert 1 <= len(ask(optimizer, answer, size)[0]) <= size


@every
@answers
def test_all_candidates_have_every_gene_and_lie_inside_the_bounds(kind: str, answer: Answer) -> None:
    over = space(bounds={"weight": [-0.35, 0.7]}, layer_granularity=4)
    _, asked, _ = run(kind, 6, answer, height, over=over)
    assert asked
    for genes in asked:
        assert genes.keys() == {gene.name for gene in over.genes}
        assert over.contains(genes)


@every
@answers
def test_the_same_seed_gives_the_same_candidates(kind: str, answer: Answer) -> None:
    assert run(kind, answer=answer, objective=height)[1:] == run(kind, answer=answer, objective=height)[1:]


@every
def test_another_seed_gives_other_candidates(kind: str) -> None:
    assert run(kind, answer=silent, objective=height, seed=1)[1] != run(kind, answer=silent, objective=height)[1]


@every
def test_the_state_changes_whenever_candidates_are_drawn(kind: str) -> None:
    _, _, states = run(kind, 4, objective=height)
    assert len({*states}) == 4


@every
def test_generations_that_fail_as_a_whole_do_not_stop_an_optimizer(kind: str) -> None:
    _, asked, _ = run(kind, 5, objective=None)
    assert len(asked) >= 5


@every
@answers
def test_an_optimizer_can_be_asked_although_no_start_row_was_within_the_bounds(kind: str, answer: Answer) -> None:
    optimizer = OPTIMIZERS[kind](setup())
    optimizer.tell([])
    genes, _ = ask(optimizer, answer)
    assert all(space().contains(g) for g in genes)


@every
@answers
def test_a_generation_after_start_rows_that_failed_can_be_asked(kind: str, answer: Answer) -> None:
    optimizer = OPTIMIZERS[kind](setup())
    rows = start_rows(space())
    optimizer.tell([rows[0], *(trial(row.candidate.id, row.candidate.genes, None) for row in rows[1:])])
    assert ask(optimizer, answer)[0]


@every
def test_a_single_gene_can_be_searched(kind: str) -> None:
    over = space(1, "task_arithmetic")
    assert len(over.genes) == 1
    _, asked, _ = run(kind, 3, silent, lambda genes: -abs(genes["alpha/all/weight"] - 0.7), over=over)
    assert all(over.contains(genes) for genes in asked)


@every
def test_an_optimizer_goes_on_after_being_told_of_an_empty_generation(kind: str) -> None:
    optimizer = OPTIMIZERS[kind](setup())
    optimizer.tell(start_rows(space()))
    ask(optimizer)
    optimizer.tell([])
    assert ask(optimizer)[0]


@every
def test_the_step_size_is_none_or_a_share_of_a_genes_range(kind: str) -> None:
    sigma = run(kind, objective=height)[0].sigma
    assert sigma is None or 0 < sigma <= 1


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
    run("llm-off", 3, watched(prompts), height)
    assert not prompts


def test_the_same_history_gives_the_same_prompt() -> None:
    texts: list[str] = []

    def watch(prompt: Prompt) -> Reading:
        texts.append(repr((prompt.messages, prompt.seed)))
        return good(prompt)

    run("llm", 3, watch, height)
    run("llm", 3, watch, height)
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
    optimizer, asked, _ = run("llm", 20, watched(prompts, simulated(policy)), height)
    own = sum(trial.candidate.origin == "llm" for trial in optimizer._trials)
    # The adversary's steps away from the optimum shrink with the best's distance to it, until they cost nothing.
    assert own <= share * len(asked)
    assert len(prompts) < 18
    assert optimizer.trust < PRIOR["chat"]


def test_an_llm_that_knows_the_optimum_earns_its_share() -> None:
    optimizer, _, _ = run("llm", 4, simulated("oracle"), height)
    assert optimizer.trust > PRIOR["chat"]


def test_answers_lost_now_and_then_are_not_held_against_an_llm_but_one_that_is_gone_is_hardly_asked() -> None:
    prompts: list[Prompt] = []
    oracle = simulated("oracle")
    flaky, _, _ = run(
        "llm", 4, watched(prompts, lambda p: oracle(p) if len(prompts) > 2 else Reading(lost=True)), height
    )
    assert flaky.trust > PRIOR["chat"]
    asked: list[Prompt] = []
    gone, _, _ = run("llm", 20, watched(asked, lambda _: Reading(lost=True)), height)
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
        _, asked, _ = run("llm", 12, answer, height)
        assert len({tuple(genes.values()) for genes in asked}) == len(asked)


def test_the_llm_is_told_of_the_models_best_and_of_what_became_of_its_predictions() -> None:
    prompts: list[Prompt] = []
    run("llm", 6, watched(prompts, simulated("recombiner")), height)
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
    _, asked, _ = run("llm", 8, silent, height)
    assert max(map(height, asked)) > max(map(height, [*asked[:SIZE], space().uniform()]))


# Several merge methods


def several() -> SearchSpace:
    return space(method=["dare_ties", "ties", "linear", "karcher"], layer_granularity=2, method_per_slice=True)


@every
def test_every_choice_is_reached_however_small_the_step_size(kind: str) -> None:
    over = several()
    optimizer = OPTIMIZERS[kind](setup(over))
    optimizer.tell(start_rows(over))
    left = {(gene.name, float(choice)) for gene in over.genes for choice in range(len(gene.choices))}
    for generation in range(300):
        genes, _ = ask(optimizer, silent)
        left -= {item for asked in genes for item in asked.items()}
        if not left:
            break
        optimizer.tell([trial(generation, asked, 0.0) for asked in genes])
    assert not left
