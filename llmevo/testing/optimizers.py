"""The contract of an optimizer."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from llmevo.evaluation.score import Score
from llmevo.llm.templates import Templates
from llmevo.search.genome import Genome
from llmevo.search.optimizers.base import Answer, Optimizer, Setup, answered
from llmevo.search.prompts.question import Prompt, Reading
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Candidate, Suggestion, Trial

SIZE = 6
"""Candidates of a generation."""

Make = Callable[[Setup], Optimizer]


def silent(_: Prompt) -> Reading:
    """An LLM that gives no answer."""
    return Reading(problems=["no answer"])


def good(prompt: Prompt) -> Reading:
    """A valid answer for the four genes of `space()`, another one in every generation."""
    place = prompt.generation
    proposals = [{"reason": "r", "genome": [start + place, 50 - place] * 2} for start in (10, 60)]
    return prompt.read(json.dumps({"analysis": "a", "proposals": proposals}))


def space(models: int = 2, method: str | list[str] = "dare_ties", **keys: Any) -> SearchSpace:
    """The genes of so many models of four layers; `keys` are further keys of the genome."""
    names = ["alpha", "beta", "gamma"][:models]
    genome = {"models": names, "merge_method": method, "base_model": "base", **keys}
    return SearchSpace(Genome.model_validate(genome), 4)


def setup(over: SearchSpace | None = None, seed: int = 0) -> Setup:
    return Setup(over or space(), seed, 60, {"sums": (1.0, "acc,none")}, "chat", Templates())


def trial(place: int, genes: Genes, total: float | None, origin: str = "parent") -> Trial:
    """A trial with this score; None is a failure."""
    candidate = Candidate(place, 0, origin, genes, "alpha")
    if total is None:
        return Trial(candidate, None, "the merged norm.weight is not finite")
    return Trial(candidate, Score(total, 0.01, {"sums": {"acc,none": total}}, 10))


def start_rows(over: SearchSpace) -> list[Trial]:
    points = [over.uniform(), *(over.parent(model) for model in over.merged)]
    return [trial(place, genes, 0.3 + place / 100) for place, genes in enumerate(points)]


def ask(optimizer: Optimizer, answer: Answer = good, size: int = SIZE) -> tuple[list[Genes], list[str]]:
    """Genes and origins of the next candidates; every prompt is answered by `answer`."""
    suggestions = answered(optimizer.ask(size), answer)
    return [s.genes for s in suggestions], [s.origin for s in suggestions]


class History(NamedTuple):
    """Some generations of an optimizer, and its state after each."""

    optimizer: Any
    asked: list[Genes]
    states: list[str]


def run(
    make: Make,
    generations: int = 4,
    answer: Answer = good,
    objective: Callable[[Genes], float] | None = None,
    **keys: Any,
) -> History:
    """Search for some generations; without an objective every candidate fails. `keys` are those of `setup`."""
    made = setup(**keys)
    history = History(make(made), [], [])
    told: Sequence[Trial] = start_rows(made.space)
    for _ in range(generations):
        history.optimizer.tell(told)
        genes, origins = ask(history.optimizer, answer)
        values = [objective(g) if objective else None for g in genes]
        told = [trial(len(history.asked) + i, genes[i], values[i], origins[i]) for i in range(len(genes))]
        history.asked.extend(genes)
        history.states.append(history.optimizer.state())
    return history


def height(genes: Genes) -> float:
    """An objective with its optimum at 0.4 in every gene."""
    return 1.0 - sum((value - 0.4) ** 2 for value in genes.values()) / 10


class OptimizerContract:
    """What an optimizer promises to the loop. Subclass it with a fixture `make`, which takes a Setup.

    Every test runs with an LLM that answers and with one that does not; optimizers that ask none see no difference.
    """

    @pytest.fixture
    def make(self) -> Make:
        raise NotImplementedError("give the subclass a fixture `make` that returns the class of the optimizer to test")

    @pytest.fixture(params=[good, silent])
    def answer(self, request: pytest.FixtureRequest) -> Answer:
        return request.param

    @pytest.mark.parametrize("size", [1, 2, 7])
    def test_it_asks_for_at_least_one_candidate_and_at_most_size(self, make: Make, answer: Answer, size: int) -> None:
        optimizer = make(setup())
        optimizer.tell(start_rows(space()))
        assert 1 <= len(ask(optimizer, answer, size)[0]) <= size

    def test_with_more_workers_it_asks_for_more_candidates_at_once_and_no_two_are_equal(
        self, make: Make, answer: Answer
    ) -> None:
        one, many = make(setup()), make(replace(setup(), parallel=12))
        for optimizer in (one, many):
            optimizer.tell(start_rows(space()))
        few, more = (ask(optimizer, answer, 12)[0] for optimizer in (one, many))
        assert len(few) <= len(more) <= 12
        assert len({tuple(genes.values()) for genes in more}) == len(more)

    def test_a_steady_one_is_told_of_single_trials_and_repeats_none_that_is_being_scored(
        self, make: Make, answer: Answer
    ) -> None:
        optimizer = make(replace(setup(), parallel=3))
        if not optimizer.is_steady:
            with pytest.raises(NotImplementedError, match="whole generations"):
                optimizer.expect(())
            return
        optimizer.tell(start_rows(space()))
        pending, seen = list[Suggestion](), list[tuple[float, ...]]()
        for number in range(12):
            optimizer.expect(pending)
            genes, origins = ask(optimizer, answer, max(1, 3 - len(pending)))
            pending += [Suggestion(*each) for each in zip(genes, origins, strict=True)]
            seen += [tuple(each.values()) for each in genes]
            done = pending.pop(number % len(pending))
            optimizer.tell([trial(10 + number, done.genes, height(done.genes), done.origin)])
        assert len({*seen}) == len(seen) >= 12

    def test_all_candidates_have_every_gene_and_lie_inside_the_bounds(self, make: Make, answer: Answer) -> None:
        over = space(bounds={"weight": [-0.35, 0.7]}, layer_granularity=4)
        asked = run(make, 6, answer, height, over=over).asked
        assert asked
        for genes in asked:
            assert genes.keys() == {gene.name for gene in over.genes}
            assert over.contains(genes)

    def test_the_same_seed_gives_the_same_candidates(self, make: Make, answer: Answer) -> None:
        first, second = (run(make, answer=answer, objective=height) for _ in range(2))
        assert (first.asked, first.states) == (second.asked, second.states)

    def test_another_seed_gives_other_candidates(self, make: Make) -> None:
        first, second = (run(make, answer=silent, objective=height, seed=seed) for seed in (0, 1))
        assert first.asked != second.asked

    def test_the_state_changes_whenever_candidates_are_drawn(self, make: Make) -> None:
        assert len({*run(make, 4, objective=height).states}) == 4

    def test_generations_that_fail_as_a_whole_do_not_stop_it(self, make: Make) -> None:
        assert len(run(make, 5, objective=None).asked) >= 5

    def test_it_can_be_asked_although_no_start_row_was_within_the_bounds(self, make: Make, answer: Answer) -> None:
        optimizer = make(setup())
        optimizer.tell([])
        assert all(space().contains(genes) for genes in ask(optimizer, answer)[0])

    def test_it_can_be_asked_after_start_rows_that_failed(self, make: Make, answer: Answer) -> None:
        optimizer = make(setup())
        rows = start_rows(space())
        optimizer.tell([rows[0], *(trial(row.candidate.id, row.candidate.genes, None) for row in rows[1:])])
        assert ask(optimizer, answer)[0]

    def test_it_goes_on_after_an_empty_generation(self, make: Make) -> None:
        optimizer = make(setup())
        optimizer.tell(start_rows(space()))
        ask(optimizer)
        optimizer.tell([])
        assert ask(optimizer)[0]

    def test_it_can_search_a_single_gene(self, make: Make) -> None:
        over = space(1, "task_arithmetic")
        assert len(over.genes) == 1
        found = run(make, 3, silent, lambda genes: -abs(genes["alpha/all/weight"] - 0.7), over=over)
        assert all(over.contains(genes) for genes in found.asked)

    def test_it_reaches_every_choice_of_a_merge_method(self, make: Make) -> None:
        over = space(method=["dare_ties", "ties", "linear", "karcher"], layer_granularity=2, method_per_slice=True)
        optimizer = make(setup(over))
        optimizer.tell(start_rows(over))
        left = {(gene.name, float(choice)) for gene in over.genes for choice in range(len(gene.choices))}
        for generation in range(300):
            genes, _ = ask(optimizer, silent)
            left -= {item for asked in genes for item in asked.items()}
            if not left:
                break
            optimizer.tell([trial(generation, asked, 0.0) for asked in genes])
        assert not left

    def test_its_step_size_is_none_or_a_share_of_a_genes_range(self, make: Make) -> None:
        sigma = run(make, objective=height).optimizer.sigma
        assert sigma is None or 0 < sigma <= 1
