"""What a person reads of a run."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from workspace import Workspace

from llmevo import display
from llmevo.bench import Bench
from llmevo.display import clock, short, verdict
from llmevo.events import HeldOut
from llmevo.runlog import RunState


def held_out(row: str, kind: str, score: float, stderr: float = 0.01) -> HeldOut:
    return HeldOut(
        row=row, kind=kind, candidate=None, score=score, stderr=stderr, tasks={}, items=100, seconds={"evaluate": 1.0}
    )


def state_of(*rows: HeldOut) -> RunState:
    return RunState(heldout={row.row: row for row in rows})


def test_a_merge_that_does_not_beat_the_best_parent_is_not_sold() -> None:
    lines = verdict(
        state_of(held_out("a", "parent", 0.6), held_out("uniform", "uniform", 0.4), held_out("best", "best", 0.55))
    )
    assert "-0.050" in lines[0]
    assert lines[1] == "It does not beat it: use a instead."


def test_a_gain_within_the_noise_is_called_luck() -> None:
    lines = verdict(state_of(held_out("a", "parent", 0.6, 0.03), held_out("best", "best", 0.63, 0.03)))
    assert "may be luck" in lines[1]


def test_a_clear_gain_stands_alone() -> None:
    assert len(verdict(state_of(held_out("a", "parent", 0.4), held_out("best", "best", 0.6)))) == 1


def test_task_names_lose_what_they_share() -> None:
    assert short(["q_words_heldout", "q_family_tree_heldout"]) == ["words", "family_tree"]
    assert short(["arc", "arc_easy"]) == ["arc", "arc_easy"]
    assert short(["only_one"]) == ["only_one"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.6, "1:02"), (3_725, "1:02:05")])
def test_times_read_as_people_write_them(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_picture_shows_progress_scores_the_last_answer_and_the_held_out_table(workspace: Workspace) -> None:
    workspace.llmevo("run", workspace.config(), "--out", "run", "--budget", 24)
    state = workspace.state("run")
    config = Bench.of_log(state.started, Path("run")).config
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(display.Display(console, config, Path("run")).picture(state))
    text = console.export_text()
    for words in ("24 of 24", "best so far", "uniform", "last answer of the LLM", "held-out questions", "step size"):
        assert words in text


def test_time_left_is_none_in_the_end_and_some_before(workspace: Workspace) -> None:
    workspace.llmevo("run", workspace.config(), "--out", "run")
    events, state = workspace.events("run"), RunState()
    config = Bench.of_log(workspace.state("run").started, Path("run")).config
    view = display.Display(Console(file=io.StringIO()), config, Path("run"))
    left: list[float] = []
    for event in events:
        state.apply(event)
        left.append(view.seconds_left(state))
    assert left[5] > 0
    assert left[-1] == 0


def test_a_replay_prints_the_lines_of_the_run_and_saves_its_picture(workspace: Workspace) -> None:
    _, live = workspace.llmevo("run", workspace.config(), "--out", "run")
    status, again = workspace.llmevo("replay", "run")
    assert status == 0
    assert [line for line in live.splitlines() if line.startswith("  [")] == [
        line for line in again.splitlines() if line.startswith("  [")
    ]
    assert workspace.llmevo("replay", "run", "--picture", "run.svg")[0] == 0
    assert Path("run.svg").read_text().startswith("<svg")


def test_a_terminal_gets_a_live_picture_instead_of_lines(workspace: Workspace) -> None:
    screen = io.StringIO()
    console = Console(width=140, file=screen, force_terminal=True)
    workspace.llmevo("run", workspace.config(), "--out", "run")
    config = Bench.of_log(workspace.state("run").started, Path("run")).config
    state = RunState()
    with display.Display(console, config, Path("run")) as view:
        for event in workspace.events("run"):
            state.apply(event)
            view.show(event, state)
    assert "best so far" in screen.getvalue()
    assert "  [1/9]" not in screen.getvalue()
