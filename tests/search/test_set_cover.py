"""Merges of the fewest models that cover the tasks, and when optimizers propose them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from llmevo.evaluation.score import Score
from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.base import Optimizer, answered
from llmevo.search.optimizers.set_cover import KEPT, covers
from llmevo.search.prompts.question import Reading
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Candidate, Suggestion, Trial
from llmevo.testing.optimizers import setup, silent, space

TASKS = {"sums": (0.5, "acc,none"), "facts": (0.5, "acc,none"), "errors": (-1.0, "acc,none")}
PAIR = {"alpha": (0.9, 0.2, 0.1), "beta": (0.3, 0.3, 0.3), "gamma": (0.2, 0.8, 0.2)}
"""The accuracies of models at the tasks: alpha and gamma are the best ones."""


def scored(place: int, genes: Genes, origin: str, accuracies: Sequence[float] | None, note: str = "") -> Trial:
    """A trial with these accuracies; None is a failure."""
    candidate = Candidate(place, 0, origin, genes, note)
    if accuracies is None:
        return Trial(candidate, None, "the merged norm.weight is not finite")
    total = sum(factor * value for (factor, _), value in zip(TASKS.values(), accuracies, strict=True))
    tasks = {task: {"acc,none": value} for task, value in zip(TASKS, accuracies, strict=True)}
    return Trial(candidate, Score(total, 0.01, tasks, 10))


def start(over: SearchSpace, parents: Mapping[str, Sequence[float] | None] = PAIR) -> list[Trial]:
    """The start rows: the merge with the second coefficient is the best."""
    places = count()
    rows = [scored(next(places), over.uniform(), "uniform", (0.5, 0.4, 0.2))]
    for place, (value, genes) in enumerate(over.coefficients().items()):
        rows.append(scored(next(places), genes, "coefficient", (0.5, 0.6 - place / 10, 0.2), f"coefficient {value:g}"))
    for model in over.merged:
        name = over.names[model]
        rows.append(scored(next(places), over.parent(model), "parent", parents[name], name))
    return rows


def found(over: SearchSpace, trials: Sequence[Trial]) -> list[Genes]:
    return [one.genes for one in covers(replace(setup(over).question, tasks=TASKS, trials=trials))]


OVER = space(3, "task_arithmetic")


def test_the_smallest_set_of_models_has_their_best_shared_weight_times_the_share_of_models() -> None:
    shared = next(iter(OVER.coefficients()))
    pair = OVER.clamp({"alpha/all/weight": 1.5 * shared, "beta/all/weight": 0.0, "gamma/all/weight": 1.5 * shared})
    assert found(OVER, start(OVER)) == [pair]
    sliced = space(3, "ties", layer_granularity=2)
    best = next(iter(sliced.coefficients().values()), sliced.uniform())
    (genes,) = found(sliced, start(sliced))
    for gene in sliced.genes:
        whole = best[gene.name]
        expected = whole if gene.parameter != "weight" else 0.0 if gene.model == "beta" else 1.5 * whole
        assert genes[gene.name] == pytest.approx(expected, abs=1e-3)


def test_sets_that_keep_most_are_enough_and_the_best_comes_first() -> None:
    nearly = {"alpha": (0.9, 0.2, 0.1), "beta": (0.2, 0.78, 0.2), "gamma": (0.2, 0.8, 0.2)}
    first, second = found(OVER, start(OVER, nearly))
    assert (first["beta/all/weight"], second["gamma/all/weight"]) == (0.0, 0.0)
    gain = 0.5 * (0.8 - 0.2)  # of gamma at facts over alpha alone, which is the best single model
    least = 0.2 + 2 * KEPT * gain
    for facts, many in ((least + 0.01, 2), (least - 0.01, 1)):
        assert len(found(OVER, start(OVER, {**nearly, "beta": (0.2, facts, 0.2)}))) == many


@pytest.mark.parametrize(
    "parents",
    [
        {**PAIR, "alpha": (0.9, 0.8, 0.1)},  # a single model is enough
        {**PAIR, "alpha": (0.9, 0.2, 0.2), "beta": (0.3, 0.3, -0.3)},  # all are needed
        {**PAIR, "beta": None},  # a parent is unknown
    ],
)
def test_there_are_none_where_one_or_all_are_needed_or_a_parent_is_unknown(
    parents: Mapping[str, Sequence[float] | None],
) -> None:
    assert found(OVER, start(OVER, parents)) == []


def test_there_are_none_for_two_models_and_where_weights_cannot_be_0() -> None:
    assert found(space(2), start(space(2))) == []
    bounded = space(3, "task_arithmetic", bounds={"weight": [0.1, 1.0]})
    assert found(bounded, start(bounded)) == []
    assert found(OVER, []) == []


def asked(optimizer: Optimizer, size: int, reading: Reading | None = None) -> list[Suggestion]:
    return answered(optimizer.ask(size), lambda prompt: reading or silent(prompt))


def made(name: str, **changes: Any) -> Optimizer:
    return OPTIMIZERS[name](replace(setup(OVER), tasks=TASKS, **changes))


def test_they_are_the_first_candidates_and_each_is_proposed_once() -> None:
    rows = start(OVER)
    (cover,) = found(OVER, rows)
    optimizer = made("llm-off", parallel=3)
    optimizer.tell(rows)
    first, *others = asked(optimizer, 3)
    assert (first.genes, first.note) == (cover, "covers the tasks: alpha, gamma")
    assert cover not in [one.genes for one in others]
    optimizer.expect([first])
    assert cover not in [one.genes for one in asked(optimizer, 3)]
    optimizer.expect([])
    optimizer.tell([scored(20, first.genes, "gaussian", None)])
    assert cover not in [one.genes for one in asked(optimizer, 3)]


def test_they_are_not_proposed_where_their_models_were_merged_before() -> None:
    optimizer = made("llm-off")
    own = {"alpha/all/weight": 0.3, "beta/all/weight": 0.0, "gamma/all/weight": 0.2}
    optimizer.tell([*start(OVER), scored(20, own, "user", (0.1, 0.1, 0.9))])
    assert not asked(optimizer, 1)[0].note.startswith("covers")


def test_logs_by_earlier_rules_have_none() -> None:
    optimizer = made("llm-off", before_rules_5=True)
    optimizer.tell(start(OVER))
    assert not asked(optimizer, 1)[0].note.startswith("covers")


@pytest.mark.parametrize(("accuracies", "is_best"), [((0.9, 0.9, 0.1), True), ((0.1, 0.1, 0.9), False)])
def test_an_llm_whose_first_recipe_is_the_best_start_row_needs_none(
    accuracies: tuple[float, ...], is_best: bool
) -> None:
    optimizer, rows = made("llm"), start(OVER)
    own = Suggestion({"alpha/all/weight": 0.3, "beta/all/weight": 0.1, "gamma/all/weight": 0.2}, "llm")
    asking = optimizer.ask_start([trial.candidate.suggestion for trial in rows])
    assert answered(asking, lambda _: Reading([own])) == [own]
    optimizer.tell([*rows, scored(20, own.genes, "llm", accuracies)])
    notes = [one.note for one in asked(optimizer, 3)]
    assert any(note.startswith("covers") for note in notes) != is_best
