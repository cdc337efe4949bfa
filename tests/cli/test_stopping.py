"""A run in a terminal that is stopped: by Ctrl-C, by `kill`, or by closing the terminal. All end it alike."""

import fcntl
import json
import multiprocessing
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import typer

from llmevo.cli import live, terminal
from llmevo.config import Llm
from llmevo.errors import MachineError
from llmevo.run.experiment import Experiment
from llmevo.run.log.storage import LOG, RunLog
from support import resumable
from support.fake_server import Answer, chat, serving
from support.workspace import Workspace

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
SHOWN, HIDDEN = "\x1b[?25h", "\x1b[?25l"
PATIENCE = 120.0
"""Seconds that a run may take to come so far."""


@dataclass
class Screen:
    """A program in a terminal of its own, and everything that it has written."""

    process: BaseProcess
    device: int
    other: int
    """The program's side of the terminal."""
    written: list[bytes] = field(default_factory=list[bytes])
    closed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    @property
    def text(self) -> str:
        return b"".join(self.written).decode(errors="replace")

    def read(self) -> None:
        """Take in what is written, until the program has ended or the terminal is closed."""
        while not self.closed.is_set():
            if select.select([self.device], [], [], 0.05)[0]:
                try:
                    self.written.append(os.read(self.device, 65536))
                except OSError:  # nothing comes any more
                    break
        os.close(self.device)

    def end(self) -> int:
        """The exit status."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None
        self.close()
        return self.process.exitcode

    def close(self) -> None:
        """Read what was written last: there is no more once both sides of the terminal are closed."""
        if self.other >= 0:
            os.close(self.other)
            self.other = -1
        self.reader.join()


def carry_on(root: Path, url: str, name: str) -> None:
    """The end of `llmevo run`, in the terminal that this process gets: scores are made up, the LLM is a server."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests' own parent ignores, as nohup does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.login_tty(os.open(name, os.O_RDWR))
    os.chdir(root)
    terminal.console = terminal.console_of()
    config = resumable.config_in(root, "llm", 24)
    config = config.model_copy(update={"llm": Llm(proposer="openai", base_url=url, model="some-llm", timeout=100)})
    scorer = resumable.CountedRig(config, root, seconds=0.05)
    with terminal.errors_shown(), terminal.stoppable(), RunLog(Path("run")) as log:
        try:
            live.carry_on(Experiment(config, root, shared=scorer), log, config)
        except typer.Exit as end:
            raise SystemExit(end.exit_code) from None


@contextmanager
def in_terminal(root: Path, url: str) -> Generator[Screen]:
    device, other = pty.openpty()
    fcntl.ioctl(device, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resumable", "lm_eval.evaluator", "lm_eval.tasks", "optuna", "torch"])
    process = context.Process(target=carry_on, args=(root, url, os.ttyname(other)))
    process.start()
    screen = Screen(process, device, other)
    try:
        yield screen
    finally:
        process.kill()
        process.join()
        screen.close()


def wait_for_llm(screen: Screen, model: str = "served-model", run: Path | None = None) -> None:
    """Until it is said that the LLM is waited for, which never answers; with a `run`, after its start rows are told."""
    end, seen = time.monotonic() + PATIENCE, 0 if run is None else None
    while seen is None or f"waiting for {model}" not in screen.text[seen:]:
        assert screen.process.is_alive(), screen.text
        assert time.monotonic() < end, screen.text
        if run and seen is None and (run / LOG).exists() and '"event":"told"' in (run / LOG).read_text():
            seen = len(screen.text)
        time.sleep(0.05)


PROPOSAL = chat(json.dumps({"proposals": [{"reason": "both", "genome": [[40, 60]]}]}))


def events_in(run: Path) -> list[str]:
    """Every line of the log is whole."""
    lines = (run / LOG).read_text().splitlines(keepends=True)
    assert all(line.endswith("\n") for line in lines)
    return [json.loads(line)["event"] for line in lines]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_every_signal_leaves_the_table_the_cursor_and_the_line_that_says_how_to_go_on(
    workspace: Workspace, number: signal.Signals
) -> None:
    with serving(PROPOSAL, Answer(silent=True)) as server, in_terminal(workspace.root, server.url) as screen:
        wait_for_llm(screen, run=workspace.root / "run")
        assert screen.process.pid
        os.kill(screen.process.pid, number)
        status = screen.end()
    text = screen.text
    assert status == 128 + number
    assert "time-out after 8:35" in text
    assert not re.search(r"(?<!\d)0:00 left", text)
    assert text.rindex(SHOWN) > text.rindex(HIDDEN)
    last = text[text.rindex("╭─ llmevo") :]
    assert "best so far" in last
    assert "\x1b[1A" not in last  # nothing is drawn over it
    assert "Stopped. Nothing is lost: `llmevo resume run` goes on." in last.splitlines()
    assert events_in(workspace.root / "run")[-1] == "told"


def test_a_run_that_waits_for_the_llms_start_rows_can_be_stopped(workspace: Workspace) -> None:
    with serving(Answer(silent=True)) as server, in_terminal(workspace.root, server.url) as screen:
        wait_for_llm(screen, "some-llm")
        assert screen.process.pid
        os.kill(screen.process.pid, signal.SIGINT)
        assert screen.end() == 128 + signal.SIGINT
    assert "Stopped. Nothing is lost: `llmevo resume run` goes on." in screen.text
    assert events_in(workspace.root / "run") == ["run_started"]


def test_a_terminal_that_is_closed_ends_a_run_in_order(workspace: Workspace) -> None:
    with serving(PROPOSAL, Answer(silent=True)) as server, in_terminal(workspace.root, server.url) as screen:
        wait_for_llm(screen, run=workspace.root / "run")
        screen.closed.set()
        status = screen.end()
    assert status == 128 + signal.SIGHUP
    assert events_in(workspace.root / "run")[-1] == "told"


def test_a_second_signal_ends_at_once_what_takes_long_to_end() -> None:
    code = """
import signal
import time
from llmevo.cli import terminal
signal.signal(signal.SIGINT, signal.default_int_handler)
with terminal.stoppable():
    try:
        print("begun", flush=True)
        time.sleep(100)
    finally:
        print("ending", flush=True)
        time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for word in ("begun\n", "ending\n"):
            assert process.stdout.readline() == word
            process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == -signal.SIGINT


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_during_the_checks_before_a_run_ends_it_with_one_line(
    workspace: Workspace, number: signal.Signals
) -> None:
    """There is no run folder yet."""
    workspace.config()
    code = f"""
import os, signal, sys, time
from llmevo.cli.app import main
from llmevo.run.experiment import Experiment

def check(experiment):
    os.kill(os.getpid(), {number.value})
    time.sleep(100)

Experiment.check = check
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.argv = ["llmevo", "run", "config.yml", "--out", "run", "--api-key", "secret"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=workspace.root, check=False)
    assert done.returncode == 128 + number
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert line == (
        f"Stopped by {number.name}; the same command starts again: `llmevo run config.yml --out run --api-key ***`"
    )
    assert not (workspace.root / "run").exists()


@pytest.mark.parametrize("end", [KeyboardInterrupt(), MachineError("the GPU is gone")], ids=repr)
def test_a_run_that_ends_before_its_first_event_leaves_no_folder_of_its_own(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    def started(_: Experiment) -> None:
        raise end

    workspace.config(search={"optimizer": "random", "budget": 5, "seed": 3}, heldout=None)
    folder = Path("given")
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "started", started)
        for out in ([], ["--out", folder]):
            status, text = workspace.llmevo("run", "config.yml", *out)
            assert status
            assert "llmevo resume" not in text
    assert not [*Path("runs").iterdir()]
    assert folder.exists()
    assert workspace.llmevo("run", "config.yml")[0] == 0
    assert [*Path("runs").iterdir()] == [Path("runs/config")]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    code = """
import os, signal
from llmevo.cli import terminal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with terminal.stoppable():
    os.kill(os.getpid(), signal.SIGHUP)
print("goes on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "goes on\n"
