"""What every optimizer owes the loop, and what the LLM's evolution strategy does on top."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llmevo.genes import Genes
from llmevo.genome import Genome
from llmevo.optimizers import OPTIMIZERS, Optimizer, Setup
from llmevo.optimizers.llm import FIRST_SIGMA, MOST_PROPOSALS, SIGMA_RANGE
from llmevo.prompting import Prompt, Reading, Templates
from llmevo.space import SearchSpace
from llmevo.trial import Candidate, Score, Trial

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
        genes, _origins = ask(optimizer, answer)
        told = [trial(len(asked) + i, g, objective(g) if objective else None, "llm") for i, g in enumerate(genes)]
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


def evolution() -> Optimizer:
    optimizer = OPTIMIZERS["llm"](setup())
    optimizer.tell(start_rows(space()))
    return optimizer


def test_the_llms_proposals_come_first_and_gaussian_mutations_fill_the_generation() -> None:
    genes, origins = ask(evolution())
    assert origins == ["llm"] * 2 + ["gaussian"] * (SIZE - 2)
    assert [*genes[0].values()] == [0.11, 0.49, 0.11, 0.49]


def test_without_an_answer_mutations_of_the_best_fill_the_whole_generation() -> None:
    genes, origins = ask(evolution(), silent)
    assert origins == ["gaussian"] * SIZE
    assert len({tuple(g.values()) for g in genes}) == SIZE


def test_the_llm_is_asked_once_a_generation_and_for_no_more_than_half_of_it() -> None:
    prompts: list[Prompt] = []

    def watch(prompt: Prompt) -> Reading:
        prompts.append(prompt)
        return silent(prompt)

    optimizer = evolution()
    for size in (1, 6, 40):
        ask(optimizer, watch, size)
    wanted: list[Any] = [(prompt.schema or {})["properties"]["proposals"]["maxItems"] for prompt in prompts]
    assert wanted == [1, 3, MOST_PROPOSALS]
    assert [prompt.generation for prompt in prompts] == [1, 2, 3]


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


def told(values: Sequence[float | None], generations: int = 1) -> float:
    """The step size after generations with these scores; the best of the start rows has 0.32."""
    optimizer = evolution()
    for _ in range(generations):
        genes, _ = ask(optimizer)
        optimizer.tell([trial(9, g, value) for g, value in zip(genes, values, strict=False)])
    assert optimizer.sigma is not None
    return optimizer.sigma


def test_the_step_size_grows_on_success_and_shrinks_without() -> None:
    assert told([0.5, 0.6, 0.7]) > FIRST_SIGMA
    assert told([0.1, 0.2, 0.32]) < FIRST_SIGMA  # equal is no success
    assert told([None, None, None]) < FIRST_SIGMA


def test_the_step_size_stays_in_its_range_however_long_the_luck_lasts() -> None:
    assert told([0.1] * SIZE, 60) == SIGMA_RANGE[0]
    optimizer = evolution()
    for generation in range(60):
        optimizer.tell([trial(i, g, 1.0 + generation) for i, g in enumerate(ask(optimizer)[0])])
    assert optimizer.sigma == SIGMA_RANGE[1]


def test_mutations_gather_around_the_best_trial() -> None:
    optimizer = OPTIMIZERS["llm"](setup())
    over = space()
    best = over.clamp({gene.name: 0.5 for gene in over.genes})
    optimizer.tell([*start_rows(over), trial(7, best, 0.99)])
    genes, _ = ask(optimizer, silent, 200)
    centre = [sum(over.to_unit(g)[i] for g in genes) / 200 for i in range(len(over.genes))]
    assert centre == pytest.approx([*over.to_unit(best)], abs=0.05)


def test_mutations_of_a_best_trial_on_the_bounds_do_not_pile_up_there() -> None:
    optimizer = OPTIMIZERS["llm"](setup())
    over = space()
    optimizer.tell([trial(0, {gene.name: gene.low for gene in over.genes}, 0.5)])
    genes, _ = ask(optimizer, silent, 100)
    at_bound = sum(value == 0.0 for g in genes for value in g.values())
    assert at_bound < 10


def test_the_search_climbs_without_any_answer_of_the_llm() -> None:
    _, asked, _ = run("llm", 15, silent, height)
    assert max(map(height, asked)) > max(map(height, [*asked[:SIZE], space().uniform()]))


# Several merge methods


def several() -> SearchSpace:
    return space(method=["dare_ties", "ties", "linear", "karcher"], layer_granularity=2, method_per_slice=True)


@every
def test_every_choice_is_reached_however_small_the_step_size(kind: str) -> None:
    over = several()
    _, asked, _ = run(kind, 150, silent, lambda _: 0.0, over=over)
    for gene in over.genes:
        if gene.choices:
            assert {genes[gene.name] for genes in asked} == {0.0, 1.0, 2.0, 3.0}


def test_mutations_mostly_keep_the_choices_of_the_best() -> None:
    over = several()
    best = {gene.name: 2.0 if gene.choices else gene.high / 2 for gene in over.genes}
    optimizer = OPTIMIZERS["llm"](setup(over))
    optimizer.tell([trial(0, best, 0.9)])
    genes, _ = ask(optimizer, silent, 200)
    kept = sum(g["0-1/merge_method"] == 2.0 for g in genes) / 200
    assert kept == pytest.approx(1 - 0.75 * FIRST_SIGMA, abs=0.08)
