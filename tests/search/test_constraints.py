"""Constraints: how they are read, who violates them, and what that does to a run."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from llmevo.config import parse_config
from llmevo.errors import ConfigError
from llmevo.evaluation.score import Score
from llmevo.export.model import Export
from llmevo.models.sources import Sources
from llmevo.reports.conclusion import conclusion
from llmevo.reports.terminal.panel import outcome
from llmevo.reports.terminal.status import status, table
from llmevo.run.experiment import Experiment
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG
from llmevo.search.objectives.constraints import ConstraintChecker
from llmevo.search.objectives.objective import Constraint, Objective
from llmevo.search.objectives.scalarize import scalarize
from llmevo.search.trial import Candidate, Trial
from llmevo.workers.protocol import Result
from support import made_logs
from support.workspace import Workspace

SUMS, WORDS = "q_sums_search", "q_words_search"
TASKS = {SUMS: (0.5, "acc,none"), WORDS: (0.5, "acc,none")}


def score(sums: float, words: float, count: int = 10, items: Mapping[str, list[float]] | None = None) -> Score:
    tasks = {SUMS: {"acc,none": sums}, WORDS: {"acc,none": words}}
    return Score((sums + words) / 2, 0.01, tasks, 2 * count, items or {})


def trial(place: int, sums: float, words: float, origin: str = "gaussian", **keys: Any) -> Trial:
    return Trial(Candidate(place, int(origin == "gaussian"), origin, {}), score(sums, words, **keys))


def objective(*constraints: str) -> Objective:
    return Objective(TASKS, tuple(map(Constraint.parse, constraints)))


def judged(of: Objective, *trials: Trial, further: Mapping[int, Score] | None = None) -> list[Trial]:
    known = {each.candidate.id: each for each in trials}
    checker = ConstraintChecker(of, known, further or {})
    return [checker.judged(each) for each in trials]


PARENTS = (trial(0, 0.9, 0.2, "parent"), trial(1, 0.3, 0.8, "parent"), trial(2, 0.5, 0.6, "uniform"))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("arc >= parent - 0.01", ("arc", True, "parent", -0.01)),
        ("gsm8k>=0.4", ("gsm8k", True, "", 0.4)),
        ("wiki <= parent+.5", ("wiki", False, "parent", 0.5)),
        ("a task >= uniform", ("a task", True, "uniform", 0.0)),
        ("loss <= -1e-2", ("loss", False, "", -0.01)),
        ("arc ≥ 1", ("arc", True, "", 1.0)),
    ],
)
def test_a_constraint_is_read(text: str, read: tuple[object, ...]) -> None:
    found = Constraint.parse(text)
    assert (found.task, found.at_least, found.row, found.offset) == read


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        (["q_sums_search"], ("constraints: ", "'q_sums_search' compares nothing", "task >= 0.4")),
        (["q_sums_search > 3"], ("constraints: ", "'>' is unknown", ">= or <=")),
        (["q_sums_search >= half"], ("'half' is unknown", "parent")),
        (["q_sums_search >= parents - 0.1"], ("'parents' is unknown", "did you mean 'parent'?")),
        (["q_sums_search >= 1e400"], ("too large",)),
        (["q_sums_search >= base"], ("'base' is unknown", "nothing else is scored on the search questions")),
        (["q_sums_search >= parent 0.1"], ("'parent 0.1' is no bound",)),
        (["q_sum_search >= 0.4"], ("constraints:", "'q_sum_search'", "did you mean 'q_sums_search'?")),
        ("q_sums_search", ("constraints: ", "'q_sums_search' compares nothing", "task >= 0.4")),
        ({"q_sums_search": 1}, ("constraints: ", "list")),
    ],
)
def test_mistakes_are_named(constraints: Any, words: tuple[str, ...]) -> None:
    config = {"genome": {"models": ["a", "b"], "merge_method": "linear"}, "tasks": [SUMS], "constraints": constraints}
    with pytest.raises(ConfigError) as error:
        parse_config(config, "config.yml")
    assert all(word in str(error.value) for word in words), error.value


def test_one_constraint_needs_no_list() -> None:
    config = {"genome": {"models": ["a", "b"], "merge_method": "linear"}, "tasks": [SUMS]}
    assert parse_config({**config, "constraints": f"{SUMS} >= 0.3"}, "config.yml").constraints == [f"{SUMS} >= 0.3"]


def test_a_parents_bound_is_the_best_parents_at_that_task() -> None:
    of = objective(f"{SUMS} >= parent - 0.1", f"{WORDS} >= uniform")
    keeps, misses = judged(of, *PARENTS, trial(3, 0.8, 0.6), trial(4, 0.79, 0.6))[3:]
    assert (keeps.violation, keeps.reason) == (0.0, "")
    assert misses.violation == pytest.approx(0.01 / 0.8)
    assert misses.reason == f"violates {SUMS} >= parent - 0.1 (0.79 against 0.8)"


def test_where_less_is_to_be_kept_the_best_parent_is_the_lowest() -> None:
    assert [each.violation for each in judged(objective(f"{SUMS} <= parent"), *PARENTS)] == pytest.approx(
        [2.0, 0.0, 2 / 3]
    )


def test_a_row_without_a_score_binds_nobody() -> None:
    failed = Trial(Candidate(0, 0, "parent", {}), None, "NaN")
    found = judged(objective(f"{SUMS} >= parent"), failed, trial(1, 0.1, 0.1))
    assert [(each.violation, each.reason) for each in found] == [(0.0, "NaN"), (0.0, "")]


def test_who_keeps_the_constraints_ranks_first_and_who_misses_less_before_who_misses_more() -> None:
    keeps, near, far = judged(objective(f"{SUMS} >= 0.5"), trial(0, 0.5, 0.1), trial(1, 0.4, 0.9), trial(2, 0.2, 1.0))
    failed = Trial(Candidate(3, 1, "gaussian", {}), None, "NaN")
    assert sorted([failed, far, near, keeps], key=lambda each: each.rank, reverse=True) == [keeps, near, far, failed]


def test_a_stopped_candidate_is_held_against_the_same_questions() -> None:
    parent = trial(0, 0.5, 0.5, "parent", items={SUMS: [1, 1, 0, 0], WORDS: [1, 0, 1, 0]})
    stopped = trial(1, 0.5, 0.5, count=2, items={SUMS: [1, 0], WORDS: [1, 0]})
    _, found = judged(objective(f"{SUMS} >= parent"), parent, stopped)
    assert found.violation == pytest.approx(0.5)  # 1 of 2, where the parent has 2 of 2


def test_finalists_are_judged_by_all_they_were_asked() -> None:
    of, finalist = objective(f"{SUMS} >= parent"), trial(3, 0.95, 0.5)
    further = {3: score(0.7, 0.5), 0: score(0.9, 0.1)}
    assert not judged(of, *PARENTS, finalist)[3].violation
    assert not judged(of, *PARENTS, finalist, further={3: further[3]})[3].violation  # not the parent's questions yet
    assert judged(of, *PARENTS, finalist, further=further)[3].violation == pytest.approx((0.9 - 0.825) / 0.9)


def test_what_optimizers_are_told_has_the_same_order_and_stays_near_the_scores() -> None:
    random, of = np.random.default_rng(0), objective(f"{SUMS} >= 0.5")
    points = random.random((40, 2)).tolist()
    trials = judged(of, *(trial(place, float(a), float(b)) for place, (a, b) in enumerate(points)))
    told = scalarize(trials, trials, of, {})
    assert [each.candidate.id for each in sorted(trials, key=lambda each: each.rank)] == [
        each.candidate.id for each in sorted(told, key=lambda each: each.value)
    ]
    totals = [each.score.total for each in trials if each.score]
    values = [each.value for each in told]
    assert max(values) - min(values) <= 2 * (max(totals) - min(totals))
    assert [each.score for each in told] == [each.score for each in trials]  # what was measured is told as it is


def test_without_constraints_trials_are_told_as_they_are() -> None:
    assert scalarize(PARENTS, PARENTS, objective(), {}) == [*PARENTS]


# In a log


def evaluated(place: int, sums: float, words: float) -> events.Evaluated:
    found = score(sums, words)
    return events.Evaluated(candidate=place, **events.scored(Result(place, found, seconds={"merge": 1.0})))


def log(*scores: tuple[float, float], constraints: tuple[str, ...] = (f"{SUMS} >= parent - 0.1",)) -> list[Any]:
    tasks = [{"name": name, "weight": 0.5} for name in TASKS]
    held = [name.replace("search", "heldout") for name in TASKS]
    begun = made_logs.started(tasks=(SUMS, WORDS), constraints=[*constraints])
    begun.config.update(tasks=tasks, heldout=held)
    rows = [made_logs.asked(0, [0, 1], "parent", ("one", "two")), evaluated(0, 0.9, 0.2), evaluated(1, 0.3, 0.8)]
    rows += [made_logs.told(0, None), made_logs.asked(1, [*range(2, 2 + len(scores))])]
    return [begun, *rows, *(evaluated(2 + place, *found) for place, found in enumerate(scores)), made_logs.told(1)]


def held_out(row: str, kind: str, number: int, sums: float, words: float) -> events.HeldOut:
    tasks = {name.replace("search", "heldout"): values for name, values in score(sums, words).tasks.items()}
    found = Score((sums + words) / 2, 0.01, tasks, 20)
    return events.HeldOut(
        row=row, kind=kind, candidate=number, **events.scored(Result(row, found, seconds={"evaluate": 1.0}))
    )


def test_the_best_is_the_best_of_those_that_keep_the_constraints() -> None:
    state = made_logs.folded(log((0.7, 1.0), (0.8, 0.6), (0.85, 0.5)))
    assert [each.candidate.id for each in state.asked_all] == [3, 4, 0, 2, 1]
    assert state.best is not None
    assert state.best.candidate.id == 3
    assert not state.unmet
    assert "violates" in outcome(state.trials[2])


def test_the_bound_is_known_with_the_last_start_row_and_not_before() -> None:
    whole = log((0.7, 1.0))
    assert not any(each.violation for each in made_logs.folded(whole[:3]).trials.values())
    assert made_logs.folded(whole[:4]).trials[1].violation == pytest.approx(0.5 / 0.8)


def test_that_nobody_keeps_them_is_said_wherever_the_best_is_shown(tmp_path: Any) -> None:
    whole = log((0.7, 1.0), constraints=(f"{SUMS} >= 0.95",))
    state = made_logs.folded(whole)
    assert state.best is not None
    assert state.best.candidate.id == 0  # 0.9 of 0.95 is nearest
    said = f"violates {SUMS} >= 0.95 (0.9)"
    assert state.unmet == f"no candidate keeps all constraints; the best {said}"
    assert said in outcome(state.best)
    experiment = Experiment.of_log(state.started, tmp_path)
    experiment.scorer.sources = Sources()  # the models of this log are nowhere
    assert said in Export.of(tmp_path, whole, experiment).texts["README.md"]
    of = status(made_logs.written(tmp_path / "run", whole))
    assert of.violated == said
    console = Console(width=200, file=io.StringIO())
    with console.capture() as shown:
        console.print(table([of]))
    assert said in shown.get()
    assert "0.550 ± 0.010!" in shown.get()


def test_the_held_out_table_says_whether_the_constraints_hold_there() -> None:
    rows = [held_out("one", "parent", 0, 0.8, 0.1), held_out("best", "best", 2, 0.65, 0.9)]
    constraints = (f"{SUMS} >= parent - 0.1", f"{WORDS} >= 0.4")
    state = made_logs.folded([*log((0.85, 0.9), constraints=constraints), *rows])
    assert [each.holds for each in state.heldout_kept] == [False, True]
    found = "0.650 against 0.700 of one, the best of these in the search"
    assert str(state.heldout_kept[0]) == f"{SUMS} >= parent - 0.1 does not hold on held-out questions: {found}"


def test_a_rival_that_violates_a_constraint_is_not_recommended_instead() -> None:
    rows = [held_out("one", "parent", 0, 0.9, 0.2), held_out("two", "parent", 1, 0.3, 1.0)]
    state = made_logs.folded([*log((0.85, 0.5)), *rows, held_out("best", "best", 2, 0.6, 0.2)])
    assert "the best of parents and uniform that keep the constraints" in conclusion(state)[0]
    # Two scores more and violates.
    assert conclusion(state)[-1].startswith("one is the simpler choice: `llmevo export RUN OUT --candidate 0`. ")


def test_a_start_row_that_is_the_result_is_not_called_the_best_of_all_where_one_that_violates_is_better() -> None:
    def told(words: float) -> Sequence[str]:
        rows = [held_out("one", "parent", 0, 0.9, 0.2), held_out("two", "parent", 1, 0.3, words)]
        return conclusion(made_logs.folded([*log((0.85, 0.5)), *rows, held_out("best", "best", 0, 0.9, 0.2)]))

    plain = "No merge found is better than one, which is the run's result"
    assert told(0.5) == [f"{plain}."]
    assert told(1.0) == [f"{plain}, among those that keep the constraints; two, which does not, has a higher score."]


# In a run


def test_a_run_keeps_to_its_constraints_and_can_be_recomputed(workspace: Workspace) -> None:
    rows = [{"question": f"number {i}", "choices": [" a", f" {i}b", " zq"], "answer": i % 3} for i in range(24)]
    (workspace.root / "tasks" / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = workspace.config(
        constraints=["letters >= parent - 0.05"],
        limit=12,
        search={"optimizer": "llm-off", "budget": 9, "population": 3, "seed": 1, "racing": {"looks": 2}},
        llm=None,
    )
    run, printed = workspace.llmevo("run", given, "--out", "run")
    assert run == 0, printed
    state = workspace.state("run")
    parents = {
        number: each.score.tasks["letters"]["acc,none"]
        for number, each in state.trials.items()
        if each.score and each.candidate.origin == "parent"
    }
    whole = {n for n, each in state.trials.items() if each.score and each.score.items == 12}
    pooled = {
        n: (each.value + state.selected[n].score) / 2 if n in state.selected else each.value
        for n, each in state.trials.items()
    }
    best = max(parents, key=lambda n: parents[n])
    for number in whole:
        both = number in state.selected and best in state.selected
        value, bound = (pooled[number], pooled[best]) if both else (state.trials[number].value, parents[best])
        assert (state.trials[number].violation > 0) == (value < bound - 0.05 - 1e-9)
    assert state.finished
    assert state.best
    assert state.finished.best == state.best.candidate.id
    assert not state.best.violation
    assert "letters >= parent - 0.05 " in printed  # on the held-out questions
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert (status, "Verified" in printed) == (0, True), printed
    file = workspace.root / "run" / LOG
    lines = file.read_text().splitlines()
    line = next(i for i, text in enumerate(lines) if json.loads(text)["event"] == "told")
    raw = json.loads(lines[line])
    lines[line] = json.dumps({**raw, "violations": {**raw["violations"], "0": 0.25}})
    file.write_text("\n".join(lines) + "\n")
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert status != 0
    assert f"line {line + 1}: told.violations" in printed


def test_a_log_without_constraints_reads_as_ever() -> None:
    state = RunState.fold(iter(made_logs.whole_run()))
    assert state.objective.plain
    assert not state.front
    assert not state.heldout_kept
