"""Racing stops who cannot win, finalists are chosen among by further questions, and both can be recomputed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmevo.config import Budget, read_config
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.questions import blocks
from llmevo.evaluation.racing import bound, difference, is_beaten, predict_gap
from llmevo.evaluation.standard_errors import ItemScores
from llmevo.merging.recipe import Recipe
from llmevo.run.log import events
from llmevo.run.log.storage import LOG
from llmevo.run.scorer import Scorer
from llmevo.run.spending import Spending
from support.workspace import CHOICE, Workspace, write_task

WEIGHTS = {"sums": 0.5, "words": 0.5}
LOOKS = 5


def answers(random: np.random.Generator, share: float, count: int = 80) -> dict[str, list[float]]:
    return {task: [float(x) for x in random.random(count) < share] for task in WEIGHTS}


def merges(random: np.random.Generator, count: int, size: int = 80) -> list[dict[str, list[float]]]:
    """As many candidates that are equally good, and answer questions of unlike difficulty more alike than by chance."""
    ease = {task: random.normal(0.3, 1.0, size) for task in WEIGHTS}
    return [
        {task: [float(x) for x in random.normal(0, 0.7, size) < ease[task]] for task in WEIGHTS} for _ in range(count)
    ]


def stopped_after(own: dict[str, list[float]], *field: ItemScores, error_rate: float = 0.05) -> int | None:
    """Questions a task after which it is stopped; None when it never is."""
    for look in range(1, LOOKS + 1):
        count = len(own["sums"]) * look // LOOKS
        seen = {task: values[:count] for task, values in own.items()}
        if is_beaten(seen, field, WEIGHTS, look, LOOKS, error_rate):
            return count
    return None


def test_one_look_halfway_has_the_bound_of_a_single_test() -> None:
    assert bound(2, 0.025) == pytest.approx(1.960, abs=0.001)


@pytest.mark.parametrize(("looks", "error_rate"), [(5, 0.05), (10, 0.05), (10, 0.2)])
def test_sums_of_questions_whose_total_is_nothing_cross_the_bound_as_often_as_stated(
    looks: int, error_rate: float
) -> None:
    random, size, count = np.random.default_rng(0), 40, 20_000
    steps = random.standard_normal((count, looks, size)).sum(axis=2)
    walk = (steps - steps.mean(axis=1, keepdims=True)).cumsum(axis=1)[:, :-1]
    done = np.arange(1, looks) / looks
    crossed = (walk / np.sqrt(size * looks * done * (1 - done)) < -bound(looks, error_rate)).any(axis=1)
    assert crossed.mean() == pytest.approx(error_rate, abs=4 * np.sqrt(error_rate / count))


def test_of_candidates_that_would_get_ahead_no_more_are_stopped_than_stated() -> None:
    random = np.random.default_rng(0)
    ahead, behind = list[bool](), list[bool]()
    for _ in range(300):
        own, *field = merges(random, 7)
        gap = difference(own, field[0], WEIGHTS).mean
        (ahead if gap > 0 else behind).append(stopped_after(own, *field) is not None)
    assert len(ahead) > 100
    assert np.mean(ahead) <= 0.05
    assert np.mean(behind) > 0.2


def test_what_others_answered_tells_of_questions_that_were_not_asked() -> None:
    random = np.random.default_rng(3)
    plain, known = list[float](), list[float]()
    for _ in range(200):
        own, *field = merges(random, 7)
        seen, rival = ({task: values[:16] for task, values in scores.items()} for scores in (own, field[0]))
        truth = difference(own, field[0], WEIGHTS).mean
        plain.append(difference(seen, rival, WEIGHTS).mean - truth)
        known.append(predict_gap(seen, field, WEIGHTS).mean - truth)
    assert np.std(known) < 0.9 * np.std(plain)
    assert abs(np.mean(known)) < 3 * np.std(known) / np.sqrt(200)


def test_who_can_only_come_out_equal_is_stopped() -> None:
    same = {task: [1.0, 0.0] * 40 for task in WEIGHTS}
    seen = {task: values[:72] for task, values in same.items()}
    assert is_beaten(seen, [same], WEIGHTS, 9, 10, 0.05)
    ahead = {task: [1.0, 1.0, *values[2:]] for task, values in seen.items()}
    assert not is_beaten(ahead, [same], WEIGHTS, 9, 10, 0.05)


@pytest.mark.parametrize(
    ("sizes", "spreads"),
    [
        ({"sums": 50, "words": 1000}, {"sums": 1.5, "words": 0.2}),
        ({"sums": 8, "words": 200}, {"sums": 1.5, "words": 0.2}),
        ({"sums": 1, "words": 200}, {"sums": 0.7, "words": 0.7}),
    ],
)
def test_no_more_than_stated_are_stopped_wrongly_on_tasks_that_differ(
    sizes: dict[str, int], spreads: dict[str, float]
) -> None:
    random, stopped = np.random.default_rng(0), list[bool]()
    parts = blocks({task: range(size) for task, size in sizes.items()}, LOOKS)
    for _ in range(300):
        ease = {task: random.normal(0.3, 1.0, size) for task, size in sizes.items()}
        found: list[dict[str, Any]] = [
            {task: (random.normal(0, spreads[task], size) < ease[task]) * 1.0 for task, size in sizes.items()}
            for _ in range(7)
        ]
        own, *field = sorted(found, key=lambda one: -sum(one[task].mean() for task in sizes))
        if difference(own, field[0], WEIGHTS).mean > 0:
            counts = [{t: sum(len(part.get(t, ())) for part in parts[:look]) for t in sizes} for look in range(1, 5)]
            looks = [{t: own[t][:count] for t, count in of.items()} for of in counts]
            stopped.append(
                any(is_beaten(seen, field, WEIGHTS, n, LOOKS, 0.05) for n, seen in enumerate(looks, start=1))
            )
    assert len(stopped) > 200
    assert np.mean(stopped) <= 0.05


def test_the_unit_of_a_metric_decides_nothing() -> None:
    random = np.random.default_rng(5)
    found = [merges(random, 7) for _ in range(40)]
    scaled = [[{**one, "words": [1000 * x - 7 for x in one["words"]]} for one in field] for field in found]
    weights = {"sums": 0.5, "words": 0.0005}
    decided = [[is_beaten(_first(own, 32), field, WEIGHTS, 2, LOOKS, 0.2)] for own, *field in found]
    assert decided == [[is_beaten(_first(own, 32), field, weights, 2, LOOKS, 0.2)] for own, *field in scaled]
    assert 0 < np.mean(decided) < 1


def _first(own: dict[str, list[float]], count: int) -> dict[str, list[float]]:
    return {task: values[:count] for task, values in own.items()}


def test_who_is_ahead_on_what_it_was_asked_is_not_stopped() -> None:
    """Though the others' answers foresee that it falls behind: its score would lead."""
    rival = {"sums": [1.0, 0.0] * 10 + [1.0] * 80}
    others = [{"sums": [1.0, 0.0] * 10 + [0.0] * 80} for _ in range(5)]
    own = {"sums": [1.0, 0.0] * 9 + [1.0, 1.0]}
    assert difference(own, rival, {"sums": 1.0}).mean > 0
    assert not is_beaten(own, [rival, *others], {"sums": 1.0}, 1, LOOKS, 0.49)


def test_a_much_worse_candidate_is_stopped_early_and_a_better_one_never() -> None:
    random = np.random.default_rng(1)
    good, bad = answers(random, 0.8), answers(random, 0.3)
    assert (stopped_after(bad, good) or 80) <= 32
    assert stopped_after(good, bad) is None


def test_the_error_vanishes_when_all_questions_are_asked_and_stays_for_questions_in_general() -> None:
    random = np.random.default_rng(2)
    own, rival = answers(random, 0.5), answers(random, 0.6)
    assert predict_gap(own, [rival], WEIGHTS).error == 0
    gaps = [np.subtract(own[task], rival[task]) for task in WEIGHTS]
    error = np.sqrt(sum(0.25 * gap.var(ddof=1) / 80 for gap in gaps))
    assert difference(own, rival, WEIGHTS).error == pytest.approx(error, rel=0.02)


# In a run

WIDE = {
    "base_model": "base",
    "models": ["one", "two"],
    "merge_method": "task_arithmetic",
    "dtype": "float32",
    "bounds": {"weight": [-2.0, 2.0]},
}
"""Weights that make some candidates much worse than others."""


def write_many(workspace: Workspace, size: int = 60) -> None:
    """A task of that many questions, whose right answers are of one kind, so that merges differ."""
    rows = [
        {"question": f"number {i}", "choices": [" a", f" {i}b", " zq", f" c{i}"], "answer": i % 4} for i in range(size)
    ]
    folder = workspace.root / "tasks"
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "many.yaml").write_text(CHOICE.format(task="many", file=folder / "many.jsonl"))


def config(workspace: Workspace, **changes: Any) -> Path:
    write_many(workspace)
    search = {"optimizer": "random", "budget": 12, "population": 3, "seed": 3, **changes.pop("search", {})}
    return workspace.config(tasks=["many"], search=search, **changes)


def evaluated(workspace: Workspace) -> list[events.Evaluated]:
    return [event for event in workspace.events("run") if isinstance(event, events.Evaluated)]


def test_a_stopped_candidates_score_is_its_rivals_and_the_difference(workspace: Workspace) -> None:
    given = config(workspace, genome=WIDE, search={"racing": {"error_rate": 0.4, "looks": 3}})
    status, printed = workspace.llmevo("run", given, "--out", "run")
    assert status == 0, printed
    state, found = workspace.state("run"), evaluated(workspace)
    stopped = [event for event in found if event.rival is not None]
    assert stopped
    assert found[0].rival is None  # the uniform merge, which the parents are raced against
    for event in stopped:
        rival = state.trials[event.rival or 0]
        assert rival.score
        assert event.items in (20, 40)
        asked = len(event.item_scores["many"])
        assert event.items == asked
        behind = np.mean(event.item_scores["many"]) - np.mean(rival.score.item_scores["many"][:asked])
        assert event.score == pytest.approx(rival.value + behind)
    assert "(stopped after" in printed
    assert state.best
    assert state.best.score
    assert state.best.score.items == 60
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert (status, "Verified" in printed) == (0, True)
    log = workspace.root / "run" / LOG
    lines = log.read_text().splitlines()
    line = next(i for i, text in enumerate(lines) if json.loads(text).get("rival") is not None)
    raw = json.loads(lines[line])
    lines[line] = json.dumps({**raw, "score": raw["score"] + 0.01})
    log.write_text("\n".join(lines) + "\n")
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert status != 0
    assert f"line {line + 1}: evaluated.score" in printed


def test_who_was_stopped_and_is_met_again_answers_the_rest_only(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(workspace, genome=WIDE, search={"racing": {"error_rate": 0.4, "looks": 3}}, heldout=None)
    assert workspace.llmevo("run", given, "--out", "run")[0] == 0
    state = workspace.state("run")
    stopped = next(event for event in evaluated(workspace) if event.rival is not None)
    recipe = Recipe.model_validate(state.recipes[stopped.candidate])
    asked: list[int] = []
    real = Evaluator.score_block
    monkeypatch.setattr(Evaluator, "score_block", lambda self, lm, place: asked.append(place) or real(self, lm, place))
    scorer = Scorer(read_config(given), workspace.root)
    scorer.remember(state)
    rival = state.trials[stopped.rival or 0].score
    assert rival
    again, seconds = scorer.score(recipe, rivals=[rival])
    assert (again.total, again.items, asked, seconds) == (pytest.approx(stopped.score), stopped.items, [], {})
    whole, seconds = scorer.score(recipe)
    assert asked == [*range(stopped.items // 20, 3)]
    assert seconds
    fresh, _ = Scorer(read_config(given), workspace.root).score(recipe)
    assert (whole.total, whole.items, whole.item_scores) == (fresh.total, 60, fresh.item_scores)
    assert scorer.score(recipe) == (whole, {})


def test_parents_far_behind_the_uniform_merge_are_stopped_but_not_where_a_constraint_counts_from_them(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmevo.evaluation.evaluator.is_beaten", lambda *_: True)
    given = config(workspace, search={"racing": {"looks": 3}}, limit=25)
    assert workspace.llmevo("run", given, "--out", "run")[0] == 0
    uniform, *rows = evaluated(workspace)[:4]
    assert (uniform.items, [(row.rival, row.items < 25) for row in rows]) == (25, [(0, True)] * 3)
    state = workspace.state("run")
    assert state.best_parent
    assert state.best_parent.candidate.id in state.selected
    assert {number for number, of in state.candidates.items() if of.origin == "coefficient"} <= state.selected.keys()
    assert [row.kind for row in state.heldout.values()] == [
        *("base", "parent", "parent", "uniform", "coefficient", "best")
    ]
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0
    given = config(workspace, search={"racing": {"looks": 3}}, constraints=["many >= parent - 0.5"], heldout=None)
    assert workspace.llmevo("run", given, "--out", "kept")[0] == 0
    kept = [event for event in workspace.events("kept") if isinstance(event, events.Evaluated)]
    assert [event.items for event in kept[:4]] == [60] * 4


def test_without_racing_everything_is_asked(workspace: Workspace) -> None:
    given = config(workspace, search={"racing": False})
    assert workspace.llmevo("run", given, "--out", "run")[0] == 0
    assert {event.items for event in evaluated(workspace)} == {60}


def test_the_best_of_the_finalists_by_all_their_questions_is_handed_over(workspace: Workspace) -> None:
    given = config(workspace, limit=25)
    status, printed = workspace.llmevo("run", given, "--out", "run")
    assert status == 0, printed
    state = workspace.state("run")
    assert state.started
    assert (state.started.items, state.started.selection_items) == (25, 25)
    asked = [event for event in workspace.events("run") if isinstance(event, events.Selected)]
    origins = [state.candidates[event.candidate].origin for event in asked]
    assert {"parent", "uniform", "coefficient"} <= {*origins}
    assert 4 <= len(asked) <= 7
    assert {event.finalists for event in asked} == {len(asked)}
    both = {event.candidate: (event.score + state.trials[event.candidate].value) / 2 for event in asked}
    assert state.finished
    assert state.best
    assert state.finished.best == state.best.candidate.id == max(both, key=lambda number: both[number])
    assert state.heldout["best"].candidate == state.finished.best
    assert {*state.started.texts} == {"search", "selection", "heldout"}
    sets = [{text for text, _ in state.started.texts[name]["many"]} for name in ("search", "selection")]
    assert not sets[0] & sets[1]
    assert "further questions" in printed
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_a_finalist_that_was_stopped_is_asked_the_rest_before_it_can_lead(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llmevo.evaluation.evaluator.is_beaten", lambda *_: True
    )  # the parents are stopped, and are finalists
    given = config(workspace, limit=25)
    assert workspace.llmevo("run", given, "--out", "run")[0] == 0
    state, log = workspace.state("run"), workspace.events("run")
    assert state.started
    assert state.selected
    assert all(trial.score and trial.score.items == 25 for n in state.selected if (trial := state.trials[n]))
    twice = [event.candidate for event in log if isinstance(event, events.Evaluated)]
    again = {number for number in twice if twice.count(number) == 2}
    assert again
    assert again <= {*state.selected}
    searched = {event.candidate: event for event in reversed(evaluated(workspace))}.values()  # the first of each
    spent = Spending(Budget(items=10_000), state).spent
    assert spent["items"] == sum(event.items for event in searched)
    asked = sum(event.seconds for event in log if isinstance(event, events.Prompted))
    assert spent["seconds"] == pytest.approx(asked + sum(sum(event.seconds.values()) for event in searched))
    assert state.best
    assert state.best.candidate.id in state.selected
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_a_task_of_one_question_turns_racing_not_off_and_finalists_not_without_a_word(workspace: Workspace) -> None:
    write_task(workspace.root, "single", shift=3, size=1)
    given = config(workspace, genome=WIDE, limit=25, search={"racing": {"error_rate": 0.4, "looks": 3}})
    raw = yaml.safe_load(given.read_text())
    given.write_text(yaml.safe_dump({**raw, "tasks": ["many", {"name": "single", "weight": 0.1}]}))
    status, printed = workspace.llmevo("run", given, "--out", "run")
    assert status == 0, printed
    asked = {(len(e.item_scores["many"]), len(e.item_scores["single"])) for e in evaluated(workspace)}
    assert (25, 1) in asked
    assert asked <= {(9, 1), (17, 1), (25, 1)}
    assert len(asked) > 1
    assert "search.finalists" in printed
    assert "single has no questions" in printed
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_what_one_task_is_searched_on_another_is_not_selected_by(workspace: Workspace) -> None:
    write_many(workspace)
    folder = workspace.root / "tasks"
    (folder / "again.yaml").write_text(CHOICE.format(task="again", file=folder / "many.jsonl"))
    given = workspace.config(tasks=["many", "again"], limit=20, shuffle=True)
    scorer = Scorer(read_config(given), workspace.root)
    searched, selected = (
        {text for _, text in each.questions()} for each in (scorer.evaluator, scorer.selection) if each
    )
    assert 20 < len(searched) < 40  # each task draws its own
    assert selected
    assert not searched & selected


def test_a_finalist_of_an_earlier_end_is_not_asked_again(workspace: Workspace) -> None:
    given = config(workspace, limit=25)
    assert workspace.llmevo("run", given, "--out", "run")[0] == 0
    assert workspace.llmevo("resume", "run", "--budget", "15")[0] == 0
    asked = [event for event in workspace.events("run") if isinstance(event, events.Selected)]
    numbers = [event.candidate for event in asked]
    again = [event for place, event in enumerate(asked) if event.candidate in numbers[:place]]
    assert again
    assert all(event.cached and not event.seconds for event in again)
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_one_task_is_split_into_three_sets(workspace: Workspace) -> None:
    given = config(workspace, heldout=None, split={"search": 0.5, "selection": 0.2, "heldout": 0.3})
    status, printed = workspace.llmevo("run", given, "--out", "run")
    assert status == 0, printed
    started = workspace.state("run").started
    assert started
    assert started.items + started.selection_items + started.heldout_items == 60
    texts = [text for part in started.texts.values() for text, _ in part["many"]]
    assert len(texts) == len({*texts}) == 60
    assert "held-out" in printed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": {"search": 0.8, "heldout": 0.3}}, ("split", "more than 1", "0.8 + 0 + 0.3")),
        ({"split": {"search": 0.5, "heldout": 0.3}}, ("split.heldout", "keep one of the two")),
        ({"split": {"search": 0.5, "selection": 0.001}}, ("many has no questions", "split")),
        ({"search": {"racing": {"error_rate": 0.7}}}, ("search.racing", "error_rate", "0.7")),
    ],
)
def test_mistakes_are_named(workspace: Workspace, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    status, printed = workspace.llmevo("run", config(workspace, **changes), "--out", "run")
    assert status == 2
    assert all(word in printed for word in words), printed
    assert not (workspace.root / "run").exists()
