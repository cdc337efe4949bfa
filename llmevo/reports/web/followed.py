"""Runs that are followed: each log is read piece by piece, once for all viewers, and only read."""

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from llmevo.errors import LlmevoError, RunError, plural
from llmevo.reports.html.analysis import Subject
from llmevo.reports.html.comparison import comparison_page
from llmevo.reports.html.page import Live, fragment, render, report, rows
from llmevo.reports.html.predictions import predictions
from llmevo.reports.terminal.status import Status, status_of
from llmevo.reports.terminal.workers import last
from llmevo.reports.text import printable
from llmevo.run.comparison import siblings
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, Tail, consistent_log, is_written, runs_below

RUNS = Path("runs")
"""The folder in which runs are made where no other is given."""
POLL = 0.5
"""Seconds between two looks at the logs while a page is open."""
IDLE = 3.0
"""The same while none is; also between two searches for new runs."""
SHARE = 0.1
"""The share of one core that following may take: what took a second of it is repeated after ten."""
REFRESH = 2.0
"""Seconds between two renderings of a page, at least."""
KEPT = 60.0
"""Seconds for which a run that is not being written stays in memory after its page was asked for."""
LATEST = 3
"""Candidates above the report."""
NOW = Markup("<!--now-->")
"""The place of what happens now in a page that is kept."""


@dataclass(frozen=True)
class Remaining:
    """The time that a run still takes, for a page that counts it down."""

    step: float | None
    """Seconds until the next event is expected; negative where it is late, None where nothing is known of it."""
    later: float
    """Seconds of all steps after it."""

    @property
    def seconds(self) -> float:
        return max(0.0, self.step or 0.0) + self.later


class Followed:
    """One run. Every method may be called from any thread."""

    def __init__(self, folder: Path, name: str, root: str) -> None:
        """`root` is the address of what is served, from the run's page."""
        self.folder, self.name, self.root = folder, name, root
        self.key = "run-" + hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        self.status: Status | None = None
        """None before the log is read."""
        self._settled = 0.0
        """When the status was found."""
        self.turn = 0
        """Grows with everything that a viewer may want to know."""
        self.viewers = 0
        self._lock = threading.RLock()
        self._used = -KEPT
        """When the page was asked for last."""
        self._seen: tuple[int, int] | None = None
        """Size and time of change of the log when it was read last."""
        self._forget()

    def _forget(self) -> None:
        self._tail: Tail | None = None
        self._state = RunState()
        self._others: list[RunState] | None = None
        self._trouble, self._begun, self._count = "", "", 0
        self._known: tuple[int, bool, str] = (-1, False, "")
        """What the status depends on."""
        self._rows: dict[int, tuple[int, dict[str, Any]]] = {}
        """The row of each candidate, and the number of lines after which it changed."""
        self._of_rows = 0
        self._latest = deque[int](maxlen=LATEST)
        """The candidates that were scored last."""
        self._parts: tuple[Any, ...] = ()
        self._page, self._of_page, self._offered, self._due, self._took = b"", -1, 0, 0.0, 0.0
        self._message: tuple[tuple[str, int, int], bytes] = (("", -1, 0), b"")

    @property
    def version(self) -> str:
        """Of the log as it was read: the digest of its first line, and the number of its lines."""
        return f"{self._begun}-{self._count}"

    def read(self, wanted: bool = False) -> None:
        """Read what is new in the log. `wanted`: even if nothing is new since it was forgotten."""
        with self._lock:
            try:
                self._read(wanted or self.viewers > 0)
            except OSError as error:  # it may come again, as with a network mount
                log, gone = self.folder / LOG, isinstance(error, FileNotFoundError | NotADirectoryError)
                reason = f"{log} cannot be read ({error.strerror})"
                if gone:
                    reason = f"{log} is gone: the run was deleted or moved while it was served"
                known = self.status or Status(str(self.folder), "deleted")
                self._seen, self._known = None, (-1, False, "")
                state = "deleted" if gone else "broken"
                self._settle(replace(known, state=state, reason=reason, workers=[], left=None, step=None, rate=None))

    def _read(self, wanted: bool) -> None:
        now = (self.folder / LOG).stat()
        seen = (now.st_size, now.st_mtime_ns)
        if seen != self._seen or (self._tail is None and wanted):
            if self._trouble:  # the log may be whole again
                self._forget()
            self._add()
            self._seen = seen
        elif self._tail is None:
            return
        written = not (self._state.finished or self._trouble) and is_written(self.folder)
        if written and self._others is None and self._state.started:
            self._others = siblings(self.folder, self._state.started)
        known = (self._count, written, self._trouble)
        if known != self._known:
            self._known = known
            try:
                with consistent_log(self.folder):
                    found = status_of(self.folder, self._state, written, self._trouble, self._others or ())
            except RunError as error:
                found = Status(str(self.folder), "broken", str(error))
            self._settle(replace(found, age=None, reason=printable(found.reason)))
        if self.viewers:
            self._update()
        self._offer()

    def _add(self) -> None:
        """Add the new events to the state."""
        log = self.folder / LOG
        if not self._tail:
            self._tail = Tail(self.folder)
        if self._begun and self._begun != _digest(log):  # another run has begun in its place
            self._forget()
            self._tail = Tail(self.folder)
        try:
            with consistent_log(self.folder):
                while found := self._tail.new():
                    for event in found:
                        self._state.apply(event)
                        self._count += 1
                        if isinstance(event, events.Evaluated | events.Failed):
                            self._latest.appendleft(event.candidate)
        except RunError as error:
            self._trouble = str(error)
        self._begun = self._begun or _digest(log)

    def _subject(self) -> Subject:
        """Return the subject of the report; config and space are made once."""
        started = self._state.started
        if not self._parts or self._parts[0] is not started:
            made = Subject.of_state(self.folder, self._state)
            self._parts = (started, made.config, made.space)
        return Subject(self.folder, self._state, *self._parts)

    def _update(self) -> None:
        """Find the candidates that have changed; none where the log does not allow a report."""
        if self._of_rows == self._count or self._state.started is None:
            return
        self._of_rows = self._count
        with suppress(LlmevoError), consistent_log(self.folder):
            subject = self._subject()
            for row in rows(subject, predictions(subject)):
                known = self._rows.get(row["id"])
                if known is None or known[1] != row:
                    self._rows[row["id"]] = (self._count, row)

    def _settle(self, status: Status) -> None:
        self._settled = time.monotonic()
        if status != self.status:
            self.status = status
            self.turn += 1

    def _offer(self) -> None:
        """Offer the page anew when that is due."""
        if self._count > self._offered and time.monotonic() >= self._due:
            self._offered = self._count
            self.turn += 1

    def rest(self) -> None:
        """Forget the state of a run that is not written and whose page is not open; it is read again when needed."""
        with self._lock:
            idle = not self.viewers and time.monotonic() - self._used > KEPT
            if self._tail and idle and self.status and self.status.state != "running":
                self._forget()

    @property
    def remaining(self) -> Remaining | None:
        """The time that the run still takes from now on, or None where it is not known."""
        status = self.status
        if status is None or status.left is None:
            return None
        step = None if status.step is None else status.step - (time.monotonic() - self._settled)
        return Remaining(step, status.left - max(0.0, status.step or 0.0))

    def now(self) -> Markup:
        """Return the HTML above the report: the state, the workers and the LLM's last analysis."""
        said = self._state.prompted[-1] if self._state.prompted else None
        status = self.status or Status(str(self.folder), "stopped")
        thought, latest = said if said and said.analysis else None, [self._state.trials[n] for n in self._latest]
        return fragment("now.html.j2", of=status, remaining=self.remaining, thought=thought, latest=latest, last=last)

    def message(self, since: str) -> tuple[str, bytes]:
        """Return the version, and what a viewer of version `since` does not know, as JSON: the state now, changed
        candidates, the newest version of the page that may be fetched, or `anew` where another run has begun or the log
        was cut.
        """
        with self._lock:
            key = (since, self.turn, int(time.monotonic()))  # a second later, the time left is another one
            if self._message[0] != key:
                begun, _, number = since.rpartition("-")
                count = int(number[:12]) if number.isdecimal() else 0
                self._update()
                content = {
                    "version": self.version,
                    "now": self.now(),
                    "rows": printable([row for at, row in self._rows.values() if at > count]),
                    "page": f"{self._begun}-{self._offered}",
                    "anew": begun not in ("", self._begun) or count > self._count,
                }
                self._message = (key, json.dumps(content).encode())
            return self.version, self._message[1]

    def page(self) -> bytes:
        """Return the page, rendered anew if that is due; what it lacks, its viewer gets as a message."""
        with self._lock:
            self._used = time.monotonic()
            self.read(wanted=True)
            if not self._page or (self._of_page != self._count and self._used >= self._due):
                self._render()
            return self._page.replace(NOW.encode(), self.now().encode(errors="replace"), 1)

    def _render(self) -> None:
        begun, live = time.thread_time(), Live(self.version, NOW, self.root)
        try:
            with consistent_log(self.folder):
                self._update()
                text = report(self._subject(), live)
        except LlmevoError as error:
            reason = self.status.reason if self.status else ""
            begins = self._state.started is None and not reason
            said = "The run has not begun; this page shows it once it has." if begins else reason or str(error)
            text = message_page(self.name, said, live)
        self._page, self._of_page = text.encode(errors="replace"), self._count
        self._offered = max(self._offered, self._count)
        took = time.thread_time() - begun
        self._due = time.monotonic() + max(REFRESH, min(took, self._took) / SHARE)  # one that imports is an exception
        self._took = took


def _digest(log: Path) -> str:
    """Return a name for the run that a log begins; empty before its first line is whole."""
    with log.open("rb") as stream:
        line = stream.readline()
    return hashlib.sha256(line).hexdigest()[:12] if line.endswith(b"\n") else ""


def message_page(name: str, text: str, live: Live | None = None) -> str:
    """Return a page that says one thing."""
    return render("message.html.j2", {}, {}, live, name=name, text=text)


class Runs:
    """A run, or all runs of a folder, those that appear later included; followed by one thread for all viewers."""

    def __init__(self, place: Path, say: Callable[[str], None]) -> None:
        """`say` prints a line about a run that is broken or deleted. Raises RunError where there is no such place;
        `RUNS` may appear later.
        """
        if not place.exists() and place != RUNS:
            raise RunError(f"{place}: there is no such run or folder; `llmevo run CONFIG` makes runs in ./runs")
        if place.exists() and not place.is_dir():
            raise RunError(f"{place} is a file; give the folder of a run, or one that holds runs")
        self.place, self.say = place, say
        self.single = (place / LOG).exists()
        self.changed = threading.Condition()
        self.closed = threading.Event()
        self.turn = 0
        self.viewers = 0
        """Of the list."""
        self._runs: dict[str, Followed] = {}
        self._said: dict[str, str] = {}
        self.discover()

    @property
    def name(self) -> str:
        return self.place.resolve().name

    @property
    def runs(self) -> list[Followed]:
        return [run for _, run in sorted(self._runs.items())]

    def get(self, name: str) -> Followed | None:
        """Return a run by its name; the path of a file is never made from a name."""
        return self._runs.get(name)

    def discover(self) -> bool:
        """Find new runs; return whether there are any."""
        new = False
        for folder in [self.place] if self.single else runs_below(self.place):
            name = self.name if folder == self.place else folder.relative_to(self.place).as_posix()
            if name not in self._runs:
                self._runs[name] = Followed(folder, name, "./" if self.single else "../../")
                new = True
        return new

    def follow(self) -> None:
        """Follow the runs until `close`."""
        search, pause, before, told = time.monotonic(), 0.0, 0.0, dict[str, int]()
        while not self.closed.wait(pause):
            begun = time.thread_time()
            if not self.single and time.monotonic() >= search:
                if self.discover():
                    self._tell()
                search = time.monotonic() + max(IDLE, (time.thread_time() - begun) / SHARE)
            for run in self.runs:
                if self.closed.is_set():
                    return
                self._read(run)
                if told.get(run.name) != run.turn:  # a viewer may have read it before
                    told[run.name] = run.turn
                    self._tell()
                run.rest()
            watched = self.viewers or any(run.viewers for run in self.runs)
            took = time.thread_time() - begun
            pause = max(POLL if watched else IDLE, min(took, before) / SHARE)  # the first reading is an exception
            before = took

    def _read(self, run: Followed) -> None:
        """Read a run, and say what is wrong with it, once."""
        try:
            run.read()
            reason = run.status.reason if run.status else ""
        except Exception as error:  # of one run; the others are followed all the same
            reason = f"{run.folder} cannot be followed ({type(error).__name__}: {error})"
        if reason != self._said.get(run.name, ""):
            self._said[run.name] = reason
            if reason:
                with suppress(OSError):  # the terminal is gone
                    self.say(f"! {reason}")

    def _tell(self) -> None:
        with self.changed:
            self.turn += 1
            self.changed.notify_all()

    def close(self) -> None:
        """End `follow` and all streams."""
        self.closed.set()
        self._tell()

    @contextmanager
    def watching(self, run: Followed | None) -> Generator[None]:
        """Count a viewer of a run, or of the list."""
        of = run or self
        with self.changed:
            of.viewers += 1
        try:
            yield
        finally:
            with self.changed:
                of.viewers -= 1

    def news(self, run: Followed | None, since: str, beat: float) -> Generator[tuple[str, bytes]]:
        """Yield the version and what is new in a run, or in the list, at once and whenever there is something; an empty
        message after `beat` seconds without. Ends with `close`.
        """
        of, turn = run or self, -1
        while not self.closed.is_set():
            if of.turn != turn:
                turn = of.turn
                since, message = of.message(since)
                yield since, message
            elif not self._wait(of, turn, beat):
                yield since, b""

    def _wait(self, of: "Followed | Runs", turn: int, seconds: float) -> bool:
        """Wait for news; return whether there are any, or the end."""
        with self.changed:
            return self.changed.wait_for(lambda: of.turn != turn or self.closed.is_set(), seconds)

    # The list

    def now(self) -> Markup:
        """Return the HTML above the list: how many runs there are."""
        states = [run.status.state if run.status else "being read" for run in self.runs]
        kinds = ", ".join(f"{states.count(kind)} {kind}" for kind in sorted({*states}))
        said = f"{plural(len(states), 'run')}{': ' if kinds else ''}{kinds}"
        return fragment("runs_now.html.j2", said=said)

    def listed(self) -> Markup:
        """Return the HTML of the list."""
        found = [
            (run.key, run.name, f"runs/{quote(os.fsencode(run.name), safe='')}/", run.status, run.remaining)
            for run in self.runs
        ]
        return fragment("list.html.j2", runs=found)

    def message(self, since: str) -> tuple[str, bytes]:
        """Return the list for its viewers, in the form of `Followed.message`."""
        content = {"version": "-0", "now": self.now(), "list": self.listed(), "rows": [], "page": "-0", "anew": False}
        return "-0", json.dumps(content).encode()

    def page(self) -> bytes:
        """Return the page of the list."""
        text = render("runs.html.j2", {}, {}, Live("-0", self.now()), name=self.name, listed=self.listed())
        return text.encode(errors="replace")

    def compared(self, keys: Sequence[str]) -> str:
        """Return the page that compares some of the runs. Raises RunError for fewer than two, and for runs that cannot
        be compared.
        """
        chosen = [run.folder for run in self.runs if run.key in keys]
        if len(chosen) < 2:
            raise RunError("tick two runs or more to compare them")
        return comparison_page(chosen, self.name)
