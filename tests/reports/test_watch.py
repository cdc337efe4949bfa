"""Following a run from another terminal: what is read of its log, and when it ends."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from llmevo.errors import RunError
from llmevo.reports.terminal.live import watch
from llmevo.run.log.events import Resumed
from llmevo.run.log.storage import LOG, RunLog, Tail, is_written
from support.made_logs import asked, evaluated, line, started, told, whole_run, written
from support.workspace import Workspace


def lines_to(screen: io.StringIO) -> Console:
    return Console(file=screen, width=100)


def steps(*actions: Callable[[], object]) -> Callable[[float], None]:
    """A sleep during which the next of these happens."""
    left: Iterator[Callable[[], object]] = iter(actions)
    return lambda _: (next(left)(), None)[1]


def test_only_lines_that_are_complete_are_read_and_each_once(tmp_path: Path) -> None:
    run, log = tmp_path / "run", whole_run()
    tail = Tail(run)
    assert tail.new() == []  # it is not there yet
    written(run, log[:2])
    assert [event.event for event in tail.new()] == ["run_started", "asked"]
    text = line(log[2])
    with (run / LOG).open("a") as stream:
        for part in (text[:9], text[9:-1]):
            stream.write(part)
            stream.flush()
            assert tail.new() == []
        stream.write("\n" + line(log[3]))
        stream.flush()
        assert tail.new() == log[2:4]
        assert tail.new() == []


def test_a_torn_line_that_a_resume_cuts_away_was_never_read(tmp_path: Path) -> None:
    run = written(tmp_path / "run", whole_run()[:2])
    (run / LOG).write_bytes((run / LOG).read_bytes() + b'{"event": "evalu')
    tail = Tail(run)
    assert len(tail.new()) == 2
    with RunLog(run, resume=True) as log:
        assert tail.new() == []
        log.append(evaluated(0, 0.5))
        assert [event.event for event in tail.new()] == ["evaluated"]


def test_a_line_that_a_power_cut_has_filled_with_zeros_is_left_to_the_resume(tmp_path: Path) -> None:
    run = written(tmp_path / "run", whole_run()[:2])
    (run / LOG).write_bytes((run / LOG).read_bytes() + b'{"event": "ev' + b"\0" * 40 + b"\n")
    assert len(Tail(run).new()) == 2


def test_a_budget_that_a_resume_changes_is_the_one_that_is_shown(tmp_path: Path) -> None:
    screen, log = io.StringIO(), whole_run()
    with RunLog(tmp_path / "run") as writer:
        for event in log[:4]:
            writer.append(event)

        def go_on() -> None:
            writer.append(Resumed(reason="--budget", budget=20))
            writer.append(log[4])
            writer.close()

        watch(lines_to(screen), writer.folder, 0, steps(go_on))
    assert "2 of 9 evaluations" in screen.getvalue()
    assert "[3/20] #2" in screen.getvalue()


def test_a_log_that_was_begun_anew_and_a_line_that_is_no_event_are_refused(tmp_path: Path) -> None:
    run = written(tmp_path / "run", whole_run())
    tail = Tail(run)
    tail.new()
    written(run, whole_run()[:1])
    with pytest.raises(RunError, match="another run has begun"):
        tail.new()
    (run / LOG).write_text(line(started()) + "nonsense\n")
    tail = Tail(run)
    assert len(tail.new()) == 1
    with pytest.raises(RunError, match=f"{LOG}:2"):
        tail.new()


def test_a_run_is_followed_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    screen, run, log = io.StringIO(), tmp_path / "run", whole_run()
    writers: list[RunLog] = []

    def begin() -> None:
        writers.append(RunLog(run))

    def go_on(events: slice) -> None:
        for event in log[events]:
            writers[0].append(event)

    moments = (begin, lambda: go_on(slice(0, 4)), lambda: go_on(slice(4, 11)), lambda: go_on(slice(11, None)))
    state = watch(lines_to(screen), run, 60, steps(*moments))
    assert state.finished is not None
    assert len(state.trials) == 9
    text = screen.getvalue()
    assert text.startswith(f"Waiting for {run}"[:80])
    assert "2 of 9 evaluations so far, best 0.350 ± 0.050" in text.replace("\n", " ")
    assert "[5/9] #4 (llm, more of two) 0.800 ± 0.050" in text
    assert "#5 (llm) failed: the merge is not finite" in text
    writers[0].close()


def test_a_run_whose_writer_has_died_is_said_to_be_resumable(workspace: Workspace) -> None:
    written(Path("run"), whole_run()[:8])
    before = Path("run", LOG).read_bytes()
    code, printed = workspace.llmevo("watch", "run")
    assert (code, "`llmevo resume run`" in printed) == (1, True)
    assert Path("run", LOG).read_bytes() == before
    assert [file.name for file in Path("run").iterdir()] == [LOG]


def test_what_was_written_just_before_the_writer_went_away_is_still_shown(tmp_path: Path) -> None:
    run, log = tmp_path / "run", whole_run()
    writer = RunLog(run)
    for event in log[:4]:
        writer.append(event)

    def end() -> None:
        for event in log[4:]:
            writer.append(event)
        writer.close()

    state = watch(lines_to(io.StringIO()), run, 0, steps(end))
    assert state.finished is not None


def test_a_run_that_died_before_its_first_event_has_nothing_to_show(workspace: Workspace) -> None:
    RunLog(Path("run")).close()
    assert workspace.llmevo("watch", "run")[0] == 1


def test_a_run_that_never_comes_is_an_error_after_the_wait(workspace: Workspace) -> None:
    code, printed = workspace.llmevo("watch", "nowhere", "--wait", "0")
    assert (code, "nowhere holds no run" in printed) == (2, True)
    assert not Path("nowhere").exists()


def test_a_finished_run_is_summed_up(workspace: Workspace) -> None:
    written(Path("run"), whole_run())
    code, printed = workspace.llmevo("watch", "run")
    assert code == 0
    assert "The best merge scores +0.300" in printed


def test_ctrl_c_leaves_the_run_alone(workspace: Workspace) -> None:
    with RunLog(Path("run")) as writer:
        for event in whole_run()[:8]:
            writer.append(event)

        def interrupt(_: float) -> None:
            raise KeyboardInterrupt

        workspace.monkeypatch.setattr(watch, "__defaults__", (interrupt,))
        code, printed = workspace.llmevo("watch", "run")
        assert (code, "left as it is" in printed) == (130, True)
        assert is_written(Path("run"))
        writer.append(told(1))


def test_a_terminal_sees_the_picture_of_the_run(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=80, height=24, force_terminal=True)
    with RunLog(tmp_path / "run") as writer:
        for event in whole_run()[:8]:
            writer.append(event)
        watch(console, writer.folder, 0, steps(writer.close))
    assert "3 of 9 evaluations" in screen.getvalue()


def test_ten_thousand_candidates_are_read_once_and_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = [started(budget=20_000)]
    text = [line(log[0])]
    for generation in range(1000):
        places = [*range(generation * 10, generation * 10 + 10)]
        text += [line(asked(generation, places)), *(line(evaluated(place, 0.4)) for place in places)]
    run = written(tmp_path / "run", [])
    (run / LOG).write_text("".join(text))
    pictures: list[int] = []
    monkeypatch.setattr(
        "llmevo.reports.terminal.live.Display.draw", lambda _, state: pictures.append(len(state.trials))
    )
    state = watch(lines_to(screen := io.StringIO()), run, 0)
    assert pictures == [10_000]
    assert len(state.trials) == 10_000
    assert len(screen.getvalue().splitlines()) <= 3
