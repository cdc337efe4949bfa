"""Racing stops who cannot win, finalists are chosen among by further questions, and both can be recomputed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workspace import CHOICE, Workspace

from llmevo import events
from llmevo.racing import beaten, difference, pocock
from llmevo.runlog import LOG

WEIGHTS = {"sums": 0.5, "words": 0.5}
LOOKS = 5


def answers(random: np.random.Generator, share: float, count: int = 80) -> dict[str, list[float]]:
    return {task: [float(x) for x in random.random(count) < share] for task in WEIGHTS}


def stopped_after(own: dict[str, list[float]], rival: dict[str, list[float]], error_rate: float = 0.05) -> int | None:
    """Questions a task after which it is stopped; None when it never is."""
    for look in range(1, LOOKS + 1):
        count = len(own["sums"]) * look // LOOKS
        seen = {task: values[:count] for task, values in own.items()}
        if beaten(difference(seen, rival, WEIGHTS), look, LOOKS, error_rate):
            return count
    return None


@pytest.mark.parametrize(("looks", "bound"), [(1, 1.960), (2, 2.178), (3, 2.289), (5, 2.413)])
def test_the_bounds_are_pococks(looks: int, bound: float) -> None:
    assert pocock(looks, 0.025) == pytest.approx(bound, abs=0.003)


def test_of_equally_good_candidates_no_more_are_stopped_than_stated() -> None:
    random = np.random.default_rng(0)
    pairs = [(answers(random, 0.6), answers(random, 0.6)) for _ in range(600)]
    wrongly = [
        stopped_after(own, rival) is not None and difference(own, rival, WEIGHTS).mean >= 0 for own, rival in pairs
    ]
    assert np.mean(wrongly) <= 0.05
    assert any(stopped_after(own, rival) for own, rival in pairs)  # those that are behind in the end may be


def test_a_much_worse_candidate_is_stopped_early_and_a_better_one_never() -> None:
    random = np.random.default_rng(1)
    good, bad = answers(random, 0.8), answers(random, 0.3)
    assert (stopped_after(bad, good) or 80) <= 32
    assert stopped_after(good, bad) is None


def test_the_error_vanishes_when_all_questions_are_asked_and_stays_for_questions_in_general() -> None:
    random = np.random.default_rng(2)
    own, rival = answers(random, 0.5), answers(random, 0.6)
    assert difference(own, rival, WEIGHTS).error == 0
    gaps = [np.subtract(own[task], rival[task]) for task in WEIGHTS]
    error = np.sqrt(sum(0.25 * gap.var(ddof=1) / 80 for gap in gaps))
    assert difference(own, rival, WEIGHTS, in_general=True).error == pytest.approx(error, rel=0.02)


# In a run


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
    bounds = {"bounds": {"weight": [-2.0, 2.0]}}
    genome = {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic", "dtype": "float32"}
    given = config(workspace, genome={**genome, **bounds}, search={"racing": {"error_rate": 0.4, "looks": 3}})
    status, printed = workspace.llmevo("run", given, "--out", "run")
    assert status == 0, printed
    state, found = workspace.state("run"), evaluated(workspace)
    stopped = [event for event in found if event.rival is not None]
    assert stopped
    assert all(event.rival is None for event in found[:3])  # the start rows
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
    assert {"parent", "uniform"} <= {*origins}
    assert 4 <= len(asked) <= 6
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
