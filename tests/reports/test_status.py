"""What `llmevo status` says of runs in every state."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from llmevo.reports.terminal.status import ago, status
from llmevo.run.log.events import HeldOut
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, RunLog, runs_below
from llmevo.run.progress import ECONOMY
from support.made_logs import asked, evaluated, folded, held_out, line, started, told, whole_run, written
from support.workspace import Workspace

WRITER = """
import sys, time
from pathlib import Path
from llmevo.run.log.storage import RunLog
with RunLog(Path(sys.argv[1]), resume=True):
    print("written", flush=True)
    time.sleep(600)
"""


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def test_a_finished_run_tells_its_scores_and_what_failed(tmp_path: Path) -> None:
    found = status(written(tmp_path / "run", whole_run()))
    assert (found.state, found.evaluations, found.failed, found.progress) == ("finished", 9, 1, 1.0)
    assert (found.best, found.score, found.stderr, found.heldout, found.heldout_stderr) == (4, 0.8, 0.05, 0.7, 0.01)
    assert (found.spent, found.generation, found.left) == ("9 of 9 evaluations", 2, None)


def test_a_run_is_running_as_long_as_its_process_lives(tmp_path: Path) -> None:
    run = written(tmp_path / "run", whole_run()[:6])
    assert status(run).state == "stopped"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(run)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        found = status(run)
        writer.kill()
    assert (found.state, found.evaluations) == ("running", 3)
    assert status(run).state == "stopped"


def test_a_running_one_tells_how_long_still_and_a_stopped_one_does_not(tmp_path: Path) -> None:
    log = [started(), asked(0, [0]), evaluated(0, 0.3)]
    with RunLog(tmp_path / "run") as run:
        assert (status(run.folder).state, status(run.folder).age) == ("running", None)
        for event in log:
            run.append(event)
        found = status(run.folder)
    # 8 candidates of 3 s and 2 rows of 20 questions are still to come; some moments of it have passed.
    assert found.left == pytest.approx(8 * 3 + 2 * (1 + 20 * 0.2 * (2 / 20) ** ECONOMY), abs=10)
    assert status(tmp_path / "run").left is None


def test_a_run_of_a_comparison_is_told_with_what_the_others_know_already(tmp_path: Path) -> None:
    """Start rows and held-out rows are taken over; a run that only lies next to others has none that it knows."""
    search = {"optimizer": "llm", "seed": 0, "budget": 9}
    log = [started(search={**search, "seed": seed}) for seed in (0, 1)]
    known = [
        event.model_copy(update={"seconds": {"evaluate": 60.0}}) if isinstance(event, HeldOut) else event
        for event in whole_run()[1:]
    ]
    written(tmp_path / "c" / "llm-0", [log[0], *known])
    written(tmp_path / "c" / "llm-2", [evaluated(7, 0.5)])
    for name, expected in (("c/llm-1", 7 * 3 + 60), ("single/llm-1", None), ("c/other", None)):
        with RunLog(tmp_path / name) as run:
            run.append(log[1])
            run.append(asked(0, [0, 1], "parent", ("one", "two")))
            left = status(run.folder).left
        assert left == (expected and pytest.approx(expected, rel=0.2)), name


def test_looking_neither_changes_a_run_nor_hinders_its_writer(tmp_path: Path) -> None:
    run = written(tmp_path / "run", whole_run()[:6])
    (run / LOG).write_bytes((run / LOG).read_bytes() + b'{"event": "to')
    before = contents(run)
    assert status(run).evaluations == 3
    assert contents(run) == before
    with RunLog(run, resume=True) as log:
        status(run)
        log.append(told(1))
    assert len(RunState.fold(iter(log.recorded)).trials) == 3


def test_a_broken_log_is_told_with_its_reason_and_what_stands_before_the_break(tmp_path: Path) -> None:
    run = written(tmp_path / "run", whole_run()[:5])
    (run / LOG).write_text((run / LOG).read_text() + "no event\n")
    found = status(run)
    assert found.state == "broken"
    assert f"{LOG}:6" in found.reason
    orphan = status(written(tmp_path / "orphan", [started(), evaluated(7, 0.5)]))
    assert (orphan.state, "candidate 7" in orphan.reason) == ("broken", True)
    newer = status(written(tmp_path / "newer", [started(llm={"telepathy": True})]))
    assert (newer.state, "llm.telepathy" in newer.reason) == ("broken", True)
    headless = status(written(tmp_path / "headless", [event for event in whole_run()[1:] if event.event == "prompted"]))
    assert (headless.state, "its first line is missing" in headless.reason) == ("broken", True)


@pytest.mark.parametrize("change", ["a candidate of the finals without a score", "brackets in brackets"])
def test_a_log_whose_events_do_not_fit_together_is_broken(tmp_path: Path, change: str) -> None:
    log = whole_run()
    if change.startswith("a"):
        run = written(tmp_path / "run", [event for event in log if getattr(event, "candidate", None) != 4])
        with (run / LOG).open("a") as stream:
            stream.write(line(held_out("best", "best", 0.7).model_copy(update={"candidate": 4})))
    else:
        run = written(tmp_path / "run", log)
        with (run / LOG).open("a") as stream:
            stream.write('{"event": ' + "[" * 100_000 + "\n")
    found = status(run)
    assert (found.state, "changed by hand" in found.reason) == ("broken", True)


def test_a_log_in_place_of_its_folder_is_named(workspace: Workspace) -> None:
    run = written(Path("runs/run"), whole_run())
    for command in ("status", "report"):
        code, printed = workspace.llmevo(command, run / LOG)
        assert (code, f"{LOG} is the log of a run; give its folder" in " ".join(printed.split())) == (2, True), printed


def test_runs_are_found_in_folders_of_folders(tmp_path: Path) -> None:
    for name in ("runs/a", "runs/b-compare/llm-0", "runs/b-compare/random-0"):
        written(tmp_path / name, whole_run())
    assert [str(run.relative_to(tmp_path)) for run in runs_below(tmp_path / "runs")] == [
        "runs/a",
        "runs/b-compare/llm-0",
        "runs/b-compare/random-0",
    ]
    assert runs_below(tmp_path / "runs" / "a") == [tmp_path / "runs" / "a"]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "run").symlink_to(tmp_path / "runs" / "a")
    (tmp_path / "linked" / "round").symlink_to(tmp_path / "linked")
    assert runs_below(tmp_path / "linked") == [tmp_path / "linked" / "run"]


def test_the_command_lists_all_runs_below_runs_within_80_columns(workspace: Workspace) -> None:
    assert "There is no run below ./runs" in workspace.llmevo("status")[1]
    assert workspace.llmevo("status", "--json") == (0, "[]\n")
    written(Path("runs/one"), whole_run())
    written(Path("runs/both-compare/a-run-with-quite-a-long-name-0"), whole_run()[:8])
    written(Path("runs/broken"), [evaluated(1, 0.5)])
    workspace.monkeypatch.setattr("llmevo.cli.terminal.console.width", 80)
    code, printed = workspace.llmevo("status")
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 80
    (line,) = [line for line in printed.splitlines() if line.startswith("one ")]
    assert line.split()[1:5] == ["finished", "9", "of", "9,"]
    assert "0.800 ± 0.050 0.700 ± 0.010" in line
    assert "runs/broken: " in printed
    found: list[dict[str, Any]] = json.loads(workspace.llmevo("status", "--json", "runs/one")[1])
    assert [(run["run"], run["state"], run["heldout"]) for run in found] == [("runs/one", "finished", 0.7)]


def test_a_place_without_a_run_is_named(workspace: Workspace) -> None:
    code, printed = workspace.llmevo("status", "one")
    assert (code, "one holds no run" in printed) == (2, True)


def test_a_log_that_may_not_be_read_is_broken(workspace: Workspace) -> None:
    run = Path("runs/run")
    (run / LOG).mkdir(parents=True)  # root may read every file
    assert (status(run).state, "cannot be read" in status(run).reason) == ("broken", True)
    for command in ("watch", "replay", "report"):
        code, printed = workspace.llmevo(command, run)
        assert (code, f"{run / LOG} cannot be read" in printed) == (2, True), printed
    written(Path("runs/other"), whole_run())
    code, printed = workspace.llmevo("status")
    assert (code, "other " in printed) == (0, True), printed


def test_a_clock_that_was_set_back_gives_no_time_below_zero(tmp_path: Path) -> None:
    ahead = (datetime.now(UTC) + timedelta(minutes=2)).isoformat(timespec="milliseconds")
    log = [event.model_copy(update={"time": ahead}) for event in whole_run()]
    assert status(written(tmp_path / "ahead", log)).left is None
    back = [log[0], *whole_run()[1:]]
    assert folded(back).seconds == 0


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0 s"), (90, "90 s"), (600, "10 min"), (9e3, "2 h"), (9e5, "10 d")])
def test_ages_read_as_people_say_them(seconds: float, text: str) -> None:
    assert ago(seconds) == text
