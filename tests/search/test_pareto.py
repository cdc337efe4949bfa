"""Several objectives at once: the Pareto front, what optimizers are told of it, and runs that end with one."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llmevo.config import parse_config
from llmevo.errors import ConfigError
from llmevo.evaluation.score import Score
from llmevo.llm.templates import Templates
from llmevo.run.log.state import RunState
from llmevo.search.genome import Genome
from llmevo.search.objectives.objective import Objective, front
from llmevo.search.objectives.scalarize import random_weights, scalarize
from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.base import Setup, answered
from llmevo.search.prompts import STYLES
from llmevo.search.prompts.question import Question, Reading
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Candidate, Trial
from support import made_logs
from support.workspace import Workspace, write_task

TASKS = {"sums": (1.0, "acc,none"), "loss": (-2.0, "bits,none")}
PARETO = Objective(TASKS, objective="pareto", seed=5)


def score(sums: float, loss: float, error: float = 0.1) -> Score:
    tasks = {"sums": {"acc,none": sums, "acc_stderr,none": error}, "loss": {"bits,none": loss}}
    return Score(sums - 2 * loss, 0.1, tasks, 10)


def trial(place: int, sums: float, loss: float, violation: float = 0.0, genes: Genes | None = None) -> Trial:
    return Trial(Candidate(place, 1, "gaussian", genes or {}), score(sums, loss), violation=violation)


def test_the_front_is_what_nothing_else_is_as_good_as() -> None:
    trials = [trial(0, 0.5, 0.5), trial(1, 0.6, 0.6), trial(2, 0.5, 0.6), trial(3, 0.5, 0.5), trial(4, 0.2, 0.4)]
    failed = Trial(Candidate(5, 1, "gaussian", {}), None, "NaN")
    assert [each.candidate.id for each in front([*trials, failed], PARETO)] == [0, 1, 3, 4]
    assert front([failed], PARETO) == []


def test_a_front_agrees_with_its_definition() -> None:
    points = np.random.default_rng(0).integers(0, 6, (60, 2)).tolist()
    trials = [trial(place, float(a), float(b)) for place, (a, b) in enumerate(points)]

    def dominated(own: Sequence[float]) -> bool:
        return any(a >= own[0] and b <= own[1] and (a, b) != tuple(own) for a, b in points)

    expected = [place for place, point in enumerate(points) if not dominated(point)]
    assert [each.candidate.id for each in front(trials, PARETO)] == expected


def test_who_violates_a_constraint_is_not_on_the_front_unless_nobody_keeps_them() -> None:
    trials = [trial(0, 0.9, 0.1, violation=0.2), trial(1, 0.5, 0.5), trial(2, 0.4, 0.6)]
    assert [each.candidate.id for each in front(trials, PARETO)] == [1]
    assert [each.candidate.id for each in front([trials[0], trial(3, 0.1, 0.9, violation=0.1)], PARETO)] == [3]


def test_the_emphasis_changes_from_generation_to_generation_and_follows_from_the_seed() -> None:
    drawn = [random_weights(PARETO, generation) for generation in range(200)]
    assert drawn == [random_weights(PARETO, generation) for generation in range(200)]
    assert drawn[0] != random_weights(Objective(TASKS, objective="pareto", seed=6), 0)
    assert all(sum(each.values()) == pytest.approx(1) and min(each.values()) >= 0 for each in drawn)
    shares = sorted(each["sums"] for each in drawn)
    assert shares == pytest.approx([(place + 0.5) / 200 for place in range(200)], abs=0.12)  # evenly
    assert random_weights(Objective(TASKS), 3) == {}


def test_the_score_told_is_the_augmented_chebyshev_distance_to_the_best_of_each_aim() -> None:
    known = [trial(0, 0.0, 3.0), trial(1, 1.0, 5.0), trial(2, 0.8, 3.5)]
    told = scalarize(known, known, PARETO, {"sums": 0.25, "loss": 0.75})
    gaps = [(0.25, 0.0), (0.0, 0.75), (0.05, 0.75 * 0.25)]
    assert [each.value for each in told] == pytest.approx([1 - max(pair) - 0.05 * sum(pair) for pair in gaps])
    errors = [each.score.stderr for each in told if each.score]
    assert errors == pytest.approx([1.05 * 0.025, 0.05 * 0.025, 0.05 * 0.025])
    assert told[0].score is not None
    assert told[0].score.tasks == score(0.0, 3.0).tasks


def test_a_violation_counts_among_several_aims_too() -> None:
    known = [trial(0, 1.0, 1.0, violation=0.1), trial(1, 0.2, 2.0), trial(2, 0.1, 3.0), trial(3, 1.0, 1.0, 0.3)]
    told = scalarize(known, known, PARETO, {"sums": 0.5, "loss": 0.5})
    assert sorted(range(4), key=lambda place: -told[place].value) == [1, 2, 0, 3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ["sums"]}, ("search.objective", "two tasks", "use `sum`")),
        ({"tasks": ["sums", {"name": "loss", "weight": 0}]}, ("search.objective", "loss has the weight 0")),
        ({"search": {"objective": "max"}}, ("search.objective", "'sum'", "'pareto'", "'max'")),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    config = {
        "genome": {"models": ["a", "b"], "merge_method": "linear"},
        "tasks": ["sums", "loss"],
        "search": {"objective": "pareto"},
    }
    with pytest.raises(ConfigError) as error:
        parse_config({**config, **changes}, "config.yml")
    assert all(word in str(error.value) for word in words), error.value


# Optimizers

GENOME = {"models": ["a", "b", "c"], "merge_method": "task_arithmetic", "base_model": "base", "layer_granularity": 2}
SPACE = SearchSpace(Genome.model_validate(GENOME), 4)


def two_ends(genes: Genes) -> Score:
    """One task is best at a quarter of every range, the other at three quarters."""
    point = SPACE.to_unit(genes)
    return score(1 - 4 * float(np.mean((point - 0.25) ** 2)), 4 * float(np.mean((point - 0.75) ** 2)), error=0.0)


def searched(kind: str, objective: Objective, budget: int = 70) -> list[Trial]:
    """A search as the loop does it."""
    optimizer = OPTIMIZERS[kind](Setup(SPACE, 0, budget, TASKS, "", Templates(), pareto=True))
    trials: list[Trial] = []
    new = [SPACE.parent(model) for model in SPACE.merged] + [SPACE.uniform()]
    for generation in range(budget):
        weights, known = random_weights(objective, generation), [*trials]
        trials += [
            Trial(Candidate(len(known) + place, generation, kind, g), two_ends(g)) for place, g in enumerate(new)
        ]
        optimizer.retell(scalarize(known, trials, objective, weights), weights)
        optimizer.tell(scalarize(trials[len(known) :], trials, objective, weights))
        if len(trials) >= budget:
            break
        weights = random_weights(objective, generation + 1)
        optimizer.retell(scalarize(trials, trials, objective, weights), weights)
        asking = optimizer.ask(min(6, budget - len(trials)))
        try:
            next(asking)
        except StopIteration as done:
            new = [suggestion.genes for suggestion in done.value]
    return trials


def volume(trials: Sequence[Trial]) -> float:
    """The area that the front dominates above no sums and a loss of 1."""
    found = [
        (each.score.tasks["sums"]["acc,none"], each.score.tasks["loss"]["bits,none"]) for each in trials if each.score
    ]
    area, level = 0.0, 1.0
    for sums, loss in sorted(found, reverse=True):
        if loss < level and sums > 0:
            area, level = area + sums * (level - loss), loss
    return area


@pytest.mark.parametrize("kind", ["nsga2", "llm-off", "tpe"])
def test_an_optimizer_finds_more_of_the_front_than_chance(kind: str) -> None:
    random = np.mean([volume(searched("random", Objective(TASKS, objective="pareto", seed=seed))) for seed in range(3)])
    assert volume(searched(kind, PARETO)) > random + 0.03


@pytest.mark.parametrize("pareto", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_takes_constraints_and_several_aims(kind: str, pareto: bool) -> None:
    setup = Setup(SPACE, 0, 40, TASKS, "chat", Templates(), pareto=pareto, constraints=("sums >= 0.5",))
    objective = PARETO if pareto else Objective(TASKS)
    optimizer, states, trials = OPTIMIZERS[kind](setup), list[str](), list[Trial]()
    new = [SPACE.parent(model) for model in SPACE.merged] + [SPACE.uniform()]
    for generation in range(3):
        weights, known = random_weights(objective, generation), [*trials]
        for genes in new:
            found = two_ends(genes)
            short = max(0.0, 0.5 - found.tasks["sums"]["acc,none"])
            trials.append(Trial(Candidate(len(trials), generation, kind, genes), found, violation=short))
        optimizer.retell(scalarize(known, trials, objective, weights), weights)
        optimizer.tell(scalarize(trials[len(known) :], trials, objective, weights))
        new = [suggestion.genes for suggestion in answered(optimizer.ask(4), lambda _: Reading())]
        assert all(SPACE.contains(genes) for genes in new)
        states.append(optimizer.state())
    assert len({*states}) == 3


def test_nsga2_starts_from_what_there_is() -> None:
    setup = Setup(SPACE, 0, 64, TASKS, "", Templates(), pareto=True)
    optimizer: Any = OPTIMIZERS["nsga2"](setup)
    start = [SPACE.uniform(), SPACE.parent(SPACE.merged[0])]
    rows = [Trial(Candidate(n, 0, "parent", g), two_ends(g)) for n, g in enumerate(start)]
    optimizer.tell(rows)
    first = optimizer._study.trials
    assert [each.values for each in first] == [
        [each.score.tasks["sums"]["acc,none"], -each.score.tasks["loss"]["bits,none"]] for each in rows if each.score
    ]
    assert all(each.system_attrs for each in first)  # they belong to the first population


def test_the_llm_is_told_what_counts_now_and_what_is_to_be_kept() -> None:
    genes = SPACE.uniform()
    rows = [Trial(Candidate(0, 0, "uniform", genes), two_ends(genes), "violates sums >= 1 (0.75)", violation=0.25)]
    question = Question(
        SPACE, rows, TASKS, 2, 1, 0.1, 1, 50, constraints=("sums >= 1",), weights={"sums": 0.3, "loss": 0.7}
    )
    text = STYLES["chat"].ask(question, Templates(), 0).messages[1]["content"]
    assert "sums: weight 0.30, acc, more is better\n- loss: weight 0.70, bits, less is better\n" in text
    assert "CONSTRAINTS: sums >= 1." in text
    assert "violates sums >= 1 (0.75)" in text
    assert "sum of factor" not in text


# In a run


def test_a_run_with_two_objectives_ends_with_a_front_and_any_of_it_can_be_had(workspace: Workspace) -> None:
    write_task(workspace.root, "words", 5, size=20)
    write_task(workspace.root, "letters", 0, size=20)
    search = {"optimizer": "nsga2", "budget": 14, "seed": 2, "objective": "pareto"}
    given = workspace.config(tasks=["letters", "words"], search=search, llm=None)
    status, printed = workspace.llmevo("run", given, "--out", "run")
    assert status == 0, printed
    state = workspace.state("run")
    assert {each.score.items for each in state.trials.values() if each.score} == {40}  # nobody was stopped
    assert state.finished
    shown = [each.candidate.id for each in state.front]
    assert shown
    assert state.finished.front == shown
    assert state.finished.best in shown
    assert f"Pareto front of {len(shown)}" in printed
    status, printed = workspace.llmevo("status", "run")
    assert f"Pareto front #{shown[0]}" in printed
    assert json.loads(workspace.llmevo("status", "run", "--json")[1])[0]["front"] == shown
    assert workspace.llmevo("report", "run")[0] == 0
    assert "The Pareto front" in (workspace.root / "run" / "report.html").read_text()
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert (status, "Verified" in printed) == (0, True), printed
    last = shown[-1]
    status, printed = workspace.llmevo("export", "run", "out", "--candidate", last, "--recipe-only")
    assert status == 0, printed
    card = (workspace.root / "out" / "README.md").read_text()
    assert f"Candidate {last} of" in card
    assert f"one of {len(shown)} candidates on the Pareto front of letters, words" in card


def test_with_a_sum_there_is_no_front() -> None:
    assert not RunState.fold(iter(made_logs.whole_run())).front
