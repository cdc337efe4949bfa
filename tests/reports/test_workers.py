"""What a person reads of a run's workers: the picture, the lines, the status and the report."""

import io
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from llmevo.cli.terminal import Terminal
from llmevo.config import parse_config
from llmevo.reports.html.page import run_page
from llmevo.reports.terminal.live import Display, watch
from llmevo.reports.terminal.panel import picture
from llmevo.reports.terminal.status import status, table
from llmevo.reports.terminal.workers import noticed
from llmevo.run.log import events
from llmevo.run.log.storage import RunLog
from llmevo.workers.protocol import Doing
from support.made_logs import asked, evaluated, finished, folded, held_out, prompted, started, told, whole_run, written
from support.workspace import Workspace

DIED = "its process died (killed by signal 9, as the system does when memory runs out)"
LOST = events.Worker(worker="2", change="lost", place="node-07, process 12, cuda:1", reason=DIED, request=7)


def score(place: int, value: float, workers: dict[str, int]) -> events.Evaluated:
    return evaluated(place, value).model_copy(update={"workers": workers})


def begun(workers: int = 4, order: str = "strict") -> list[events.Event]:
    """The log of a run with workers in its second generation, one of them lost and one refused."""
    log: list[events.Event] = [
        started(30).model_copy(update={"order": order, "workers": workers}),
        asked(0, [0, 1, 2], "parent", ("", "one", "two")),
    ]
    log += [
        events.Worker(worker=f"{n}", change="ready", place=f"node-07, process {n + 10}, cuda:{n - 1}")
        for n in range(1, workers + 1)
    ]
    log += [score(0, 0.3, {"1": 6, "2": 4}), score(1, 0.35, {"1": 10}), score(2, 0.4, {"2": 10}), told(0, None)]
    log += [prompted(1), asked(1, [*range(3, 11)], "llm"), LOST]
    refused = events.Worker(
        worker="3", change="refused", reason="it differs from this machine: version of torch is 2.4"
    )
    log += [refused, score(5, 0.5, {"1": 10})]
    end = datetime.now(UTC)
    times = [(end - timedelta(seconds=3 * ahead)).isoformat() for ahead in range(len(log), 0, -1)]
    return [event.model_copy(update={"time": time}) for event, time in zip(log, times, strict=True)]


def shown(log: Sequence[events.Event], width: int, height: int | None, doing: Sequence[Doing] = ()) -> str:
    state = folded([*log])
    assert state.started
    config = parse_config(state.started.config, "test")
    console = Terminal(width=width, file=io.StringIO(), record=True)
    console.print(picture(state, config, Path("run"), width, height, live=True, doing=lambda: doing))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("height", [24, 30, 60])
@pytest.mark.parametrize("workers", [3, 8, 128])
@pytest.mark.parametrize("live", [False, True])
def test_the_picture_with_workers_fits_the_terminal(width: int, height: int, workers: int, live: bool) -> None:
    doing = [Doing(f"{n}", "scoring", time.monotonic() - 70, "held-out row coefficient 0.5") for n in range(1, workers)]
    text = shown(begun(workers), width, height, doing if live else ())
    lines = text.rstrip("\n").split("\n")
    assert len(lines) <= height
    assert all(cell_len(line) <= width for line in lines)
    assert "left out: it differs from" in text
    assert "#" in text


def test_the_picture_has_a_line_for_each_worker_from_the_log() -> None:
    text = shown(begun(), 140, 40)
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("│ ") and line.split()[1:2]}
    assert "scored candidate 5" in rows["1"]
    # 6 of 10 questions of 3 s, and twice 10 questions in 3 s
    assert "26" in rows["1"]
    assert "3.3" in rows["1"]
    assert "lost; another is started" in rows["2"]
    assert "node-07, process 12" in rows["2"]
    assert "left out: it differs from this machine" in rows["3"]
    assert "ready" in rows["4"]
    assert "now #3 llm and 6 more" in text


@pytest.mark.parametrize("kind", [events.Selected, events.Served])
def test_the_questions_of_finalists_count_for_their_workers(kind: type[events.Selected | events.Served]) -> None:
    before = begun()
    scored = score(5, 0.5, {"1": 10}).model_dump(exclude={"event"})
    state = folded([*before, kind.model_validate({**scored, "questions": "search", "generation": 1, "finalists": 1})])
    assert state.worker_history.questions == folded(before).worker_history.questions + 10
    assert state.worker_history.members["1"].last == "finalist 5"
    assert state.worker_history.finals.busy == pytest.approx(3.0)


def test_the_driver_also_says_what_each_worker_does_now() -> None:
    doing = [Doing("1", "scoring", time.monotonic() - 70, 7), Doing("2", "loading", time.monotonic() - 3)]
    text = shown(begun(), 140, 40, [*doing, Doing("4", "idle", time.monotonic() - 3)])
    assert "scoring candidate 7, 1:10" in text
    assert "loading, 0:03" in text
    assert "idle " in text


def test_workers_that_have_no_room_are_counted_and_those_in_trouble_are_shown() -> None:
    text = shown(begun(128), 80, 24)
    assert "lost; another is started" in text
    assert "and 126 more: 126 ready" in text


def test_a_run_without_workers_shows_none() -> None:
    text = shown(whole_run()[:-4], 120, 40)
    assert "worker" not in text
    assert "now #" not in text


def test_workers_of_an_earlier_session_are_not_shown() -> None:
    again = events.Worker(worker="1", change="ready", place="other-node")
    rows = shown([*begun(), again], 140, 40).splitlines()
    assert [line for line in rows if "other-node" in line]
    assert not [line for line in rows if "node-07" in line or "left out" in line]


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (LOST, f"worker 2 was lost ({DIED}); candidate 7 is scored elsewhere"),
        (
            LOST.model_copy(update={"request": "finalist 3"}),
            f"worker 2 was lost ({DIED}); finalist 3 is scored elsewhere",
        ),
        (LOST.model_copy(update={"request": None}), f"worker 2 was lost ({DIED}); another is started"),
        (
            events.Worker(worker="3", change="refused", place="node", reason="cannot see\nthe models"),
            "worker 3 (node) is left out: cannot see the models",
        ),
        (events.Worker(worker="3.2", change="ready", place="node"), "worker 3.2 (node) is ready"),
    ],
)
def test_a_change_among_the_workers_is_one_line(event: events.Worker, line: str) -> None:
    assert noticed(event) == line


HOSTILE = "\x1b[2J\x1b]52;c;AAAA\x07 bad\r\n\u202etxt [bold]"


def hostile(*changes: str) -> list[events.Event]:
    made = [
        events.Worker.model_validate(
            {"worker": f"1{HOSTILE}", "change": change, "place": HOSTILE, "reason": HOSTILE * 50, "request": HOSTILE}
        )
        for change in changes
    ]
    row = held_out("base", "base", 0.5).model_copy(update={"workers": {f"1{HOSTILE}": 20}})
    return [*begun(), *made, score(6, 0.5, {f"1{HOSTILE}": 10}), row]


@pytest.mark.parametrize("change", ["ready", "lost", "refused"])
def test_what_workers_say_controls_no_terminal(tmp_path: Path, change: str) -> None:
    log = hostile(change)
    texts = [noticed(event) for event in log if isinstance(event, events.Worker)]
    texts += [shown(log, width, 40) for width in (80, 120)]
    with RunLog(tmp_path / "run") as run:
        for event in log:
            run.append(event)
        texts += [str(line) for line in printed_status(run.folder)]
    assert not any("bad\n" in text for text in texts)
    texts.append(run_page(written(tmp_path / "page", log)))
    for text in texts:
        assert not set("\x1b\x07\r\u202e") & set(text)
    assert all(
        len(noticed(event)) < 900 and "\n" not in noticed(event) for event in log if isinstance(event, events.Worker)
    )


def printed_status(run: Path) -> list[str]:
    console = Terminal(width=200, file=io.StringIO(), record=True)
    console.print(table([status(run)]))
    return console.export_text().splitlines()


def test_status_has_a_line_for_each_worker_of_a_running_run(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run") as run:
        for event in begun(12):
            run.append(event)
        found, lines = status(run.folder), printed_status(run.folder)
    assert [(member.name, member.state) for member in found.workers][:4] == [
        ("1", "ready"),
        ("2", "lost"),
        ("3", "refused"),
        ("4", "ready"),
    ]
    own = [line.partition(": ")[2].strip() for line in lines if line.startswith(str(run.folder))]
    assert own[0] == "10 of 12 workers ready, 3.3 questions a second, 1 loss"
    assert own[1] == "worker 2: lost; another is started; 14 questions, 3.3 a second, 1 lost"
    assert "worker 1: scored candidate 5; 26 questions, 3.3 a second" in own
    assert own[-1] == "and 5 more workers"
    assert len(own) == 9
    assert status(tmp_path / "run").workers == []  # no process writes it any more


def test_status_as_json_lists_the_workers(workspace: Workspace) -> None:
    with RunLog(workspace.root / "run") as run:
        for event in begun():
            run.append(event)
        code, printed = workspace.llmevo("status", "run", "--json")
    assert code == 0
    (found,) = json.loads(printed)
    assert found["workers"][1]["losses"] == 1
    assert found["workers"][1]["reason"] == DIED
    assert found["rate"] == pytest.approx(40 / 12, rel=0.01)  # four scores of 10 questions, 3 s after each other


@pytest.mark.parametrize("terminal", [False, True])
def test_watch_shows_losses_as_lines_and_the_rest_where_there_is_no_picture(tmp_path: Path, terminal: bool) -> None:
    screen = io.StringIO()
    console = Terminal(file=screen, width=120, force_terminal=terminal)
    run = tmp_path / "run"
    log = [*begun(), *(score(n, 0.4, {"1": 10}) for n in (3, 4, 6, 7, 8, 9, 10)), told(1), finished(5, 0.5)]
    with RunLog(run) as writer:
        writer.append(log[0])
        ahead = iter(log[1:])
        watch(console, run, 0.0, sleep=lambda _: writer.append(next(ahead)))
    printed = screen.getvalue()
    assert f"worker 2 was lost ({DIED}); candidate 7 is scored elsewhere" in printed
    assert "worker 3 is left out: it differs from this machine" in printed
    assert ("worker 1 (node-07, process 11, cuda:0) is ready" in printed) is not terminal


def test_in_the_order_steady_a_candidate_has_one_line() -> None:
    log = [*begun(order="steady"), told(1).model_copy(update={"candidates": [5]})]
    state = folded(log)
    assert state.started
    view = Display(Console(file=io.StringIO()), parse_config(state.started.config, "test"), Path("run"))
    assert view.line(log[-2], state)
    assert view.line(log[-1], state) is None
    assert "generation" not in shown(log, 120, 40)


def test_the_report_has_a_row_for_each_worker_and_says_whose_time_it_is(tmp_path: Path) -> None:
    page = run_page(written(tmp_path / "run", begun()))
    rows = page.partition('id="workers"')[2].partition("</table>")[0]
    assert rows.count("<tr>") == 5
    assert "killed by signal 9" in rows
    assert "node-07, process 11" in rows
    assert "time of all workers together" in page
    assert "time of all workers" not in run_page(written(tmp_path / "alone", whole_run()))
