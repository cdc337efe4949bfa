"""A run as it goes on: a live picture in a terminal, lines elsewhere; its summary; and following it from outside."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live

from llmevo.config import Config, parse_logged
from llmevo.errors import RunError, plural, quoted
from llmevo.evaluation.judges.verdicts import JudgeCost
from llmevo.reports.conclusion import conclusion
from llmevo.reports.terminal.panel import called, front, heldout, outcome, picture, scores, served, total
from llmevo.reports.terminal.workers import noticed
from llmevo.reports.text import clock, say
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, Tail, is_written, readable
from llmevo.run.progress import seconds_left
from llmevo.run.spending import Spending
from llmevo.workers.protocol import Doing

POLL = 0.5
"""Seconds between two reads of a log."""
TROUBLE = {
    "lost": "never came",
    "unreadable": "held nothing usable",
    "capped": "were not asked for, as llm.max_calls or llm.max_cost was reached",
}
"""The ways in which a prompt gives no proposal."""


class LiveView:
    """A context in which one picture is redrawn, where the console is a terminal."""

    def __init__(self, console: Console, loading: str = "Loading models and tasks…") -> None:
        """`loading` is shown before the first event."""
        self.console, self.loading = console, loading
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
            self.live.update(self.loading)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Keep the picture of a run that was stopped or has failed: nothing else shows its progress."""
        if self.live:
            self.live.transient = kind is None
            with suppress(OSError):  # a terminal that is gone is no failure
                self.live.stop()


class Display(LiveView):
    """The display of one run; give `show` to the journal as an observer."""

    def __init__(self, console: Console, config: Config, folder: Path, earlier: int = 0, **options: str) -> None:
        """`earlier`: the first events that `show` gets are so many of a log that goes on; they are one line."""
        super().__init__(console, **options)
        self.config, self.folder, self.earlier = config, folder, earlier
        self.doing: Callable[[], Sequence[Doing]] = lambda: ()
        """What the workers of a run in this process do now."""
        self._seen: datetime | None = None
        """When the last event was shown: a resumed run waits since then, not since it was stopped."""

    def __enter__(self) -> Self:
        if self.loading and not self.live:
            self.console.print(self.loading)
        return super().__enter__()

    def show(self, event: events.Event, state: RunState) -> None:
        """Show one event."""
        if isinstance(event, events.Resumed) and state.started:
            self.config = parse_logged(state.started.config, str(self.folder))
        self._seen = datetime.now(UTC)
        if self.earlier:
            self.earlier -= 1
            if not self.earlier:
                self._catch_up(state)
        elif self.live:
            if isinstance(event, events.Worker) and event.change != "ready":
                self.warn(noticed(event))
            self.draw(state)
        elif line := self.line(event, state):
            say(self.console, line)

    def _catch_up(self, state: RunState) -> None:
        """Show the events that were in the log before."""
        self.draw(state)
        if not self.live:
            best = f", best {outcome(state.best)}" if state.best else ""
            say(self.console, f"{Spending(self.config.search.budget, state)} are in the log{best}")

    @contextmanager
    def paused(self) -> Generator[None]:
        """Hide the live picture, while a person is asked."""
        if self.live:
            self.live.stop()
        try:
            yield
        finally:
            if self.live:
                self.live.start()

    def warn(self, line: str) -> None:
        """Print a warning, above the picture or among the lines."""
        say(self.console, line, "yellow")

    def draw(self, state: RunState) -> None:
        """Update the live picture; in a terminal only."""
        if self.live:
            self.live.update(self.picture(state, self.console.height, live=True))

    def line(self, event: events.Event, state: RunState) -> str | None:
        """Return one event as a line of text; None for events without one."""
        match event:
            case events.Prompted():
                problems = f"; {'; '.join(event.problems)}" if event.problems else ""
                said = f" It says: {event.analysis}" if event.analysis else ""
                gave = plural(event.used, "proposal")
                return f"  {called(event.model)} gave {gave} in {event.seconds:.1f} s{problems}.{said}"
            case events.Judged() if event.problems:
                return f"  {event.model}, the judge of {event.task}: {'; '.join(event.problems[:3])}"
            case events.Evaluated() | events.Failed():
                trial, budget = state.trials[event.candidate], self.config.search.budget
                done = f"{len(state.trials)}/{budget.evaluations}"
                if [*budget.bounds] != ["evaluations"]:
                    done = str(Spending(budget, state))
                note = f", {trial.candidate.note}" if trial.candidate.note else ""
                early = ""
                if isinstance(event, events.Evaluated) and event.rival is not None:
                    early = f" (stopped after {plural(event.items, 'question')})"
                result = outcome(trial, f"failed: {trial.reason}")
                left = f"{clock(seconds_left(state, self.config))} left"
                return f"  [{done}] #{trial.candidate.id} ({trial.candidate.origin}{note}) {result}{early}, {left}"
            case events.Worker():
                return f"  {noticed(event)}"
            case events.Told() if state.started and state.started.order == "steady" and len(event.candidates) == 1:
                return None  # the line of the candidate says it all
            case events.Told():
                sigma = "" if event.sigma is None else f", step size {event.sigma:.3f}"
                return f"generation {event.generation}: best {outcome(state.best)}{sigma}"
            case events.Selected():
                further = plural(event.items, "further question")
                return f"  finalist #{event.candidate}: {total(event.read())} on {further}"
            case events.Served():
                asked = plural(event.items, "question")
                return f"  finalist #{event.candidate} in {event.quantized}: {total(event.read())} on {asked}"
            case events.HeldOut():
                return f"  held out: {event.row} {total(event.read())}"
            case events.Unscored():
                return f"  {event}"
            case _:
                return None

    def picture(self, state: RunState, height: int | None = None, live: bool = False) -> RenderableType:
        """Return the whole display, `height` lines at most; see `llmevo.reports.terminal.panel`."""
        return picture(state, self.config, self.folder, self.console.width, height, live, self._seen, self.doing)


def summary(console: Console, state: RunState, folder: Path, config: Config) -> None:
    """Print the result of a finished run, the LLM's part in it, and the next commands."""
    finished, best = state.finished, state.best
    assert finished is not None
    if best is None:
        console.print("Every candidate failed; `llmevo replay` shows the reasons.", style="red", highlight=False)
        return
    if state.served_finalists:
        console.print(served(state))
    if state.heldout:
        console.print(heldout(state, console.width))
        for line in conclusion(state, folder):
            say(console, line)
    else:
        console.print(scores(state, config, console.width))
        if not state.failed_rows:
            console.print(
                "No `heldout:` tasks were given: the search score is the best of many and flatters.", style="yellow"
            )
    for failed in state.failed_finals:
        say(console, str(failed), "red")
    if state.unmet:
        console.print(f"{state.unmet[0].upper()}{state.unmet[1:]}.", style="yellow", highlight=False)
    if state.front:
        console.print(front(state, console.width))
        export = f"`llmevo export {quoted(folder)} OUT --candidate N` writes any other."
        there = any(trial.candidate.id == best.candidate.id for trial in state.front)
        apart = "" if there else ", which is not on this front of search scores, for the finals counted as well"
        console.print(f"The result, by the weighted sum, is #{best.candidate.id}{apart}; {export}", highlight=False)
    counts, place = finished.proposals, quoted(folder)
    if counts["prompts"]:
        note = f" ({best.candidate.note})" if best.candidate.note else ""
        console.print(
            f"The LLM was asked {plural(counts['prompts'], 'time')} and answered {counts['answered']};"
            f" {counts['used']} of {plural(len(state.trials), 'candidate')} are its proposals."
            f" The best, #{best.candidate.id}, comes from {best.candidate.origin}{note}.",
            highlight=False,
        )
        if trouble := [f"{counts[kind]} {what}" for kind, what in TROUBLE.items() if counts.get(kind)]:
            console.print(f"Of its answers, {', '.join(trouble)}.", highlight=False)
    if state.judged:
        console.print(f"{JudgeCost.of(state.judged)}", highlight=False)
    console.print(f"\nThe run is in {folder}. Next:", highlight=False)
    for command, what in (
        (f"llmevo export {place} OUT", "the merged model as a Hugging Face folder"),
        (f"llmevo report {place}", "all results as one HTML page"),
        (f"llmevo replay {place} --verify", "show the run again and check it against its log"),
    ):
        console.print(f"  {command:<42} {what}", highlight=False, soft_wrap=True)


def watch(console: Console, run: Path, patience: float, sleep: Callable[[float], None] = time.sleep) -> RunState:
    """Show a run from another terminal, until it ends or no process writes it any more. Changes nothing.

    Earlier events are shown at once, as one picture. Waits `patience` seconds for a run that is not there yet. Raises
    RunError when none comes, or when the log is broken.
    """
    tail, state = Tail(run), RunState()
    with readable(tail.file):
        is_written(run)
    for event in _first_events(console, tail, patience, sleep):
        state.apply(event)
    if state.started is None:
        return state
    config = parse_logged(state.started.config, str(tail.file))
    with Display(console, config, run, loading="") as view:
        view.draw(state)
        if not console.is_terminal:
            best = f", best {outcome(state.best)}" if state.best else ""
            say(console, f"{run}: {Spending(config.search.budget, state)} so far{best}")
        while state.finished is None:
            # In this order, so that the last lines of a writer that ends are not missed.
            written = is_written(run)
            found = tail.new()
            for event in found:
                state.apply(event)
                view.show(event, state)
            if not written and not found:
                break
            if not found:
                sleep(POLL)
    return state


def _first_events(console: Console, tail: Tail, patience: float, sleep: Callable[[float], None]) -> list[events.Event]:
    """Wait for the first events; none when a run has ended before its first."""
    run, waited = tail.file.parent, 0.0
    while not (found := tail.new()):
        if tail.file.exists() and not is_written(run):
            return tail.new()
        if not tail.file.exists() and waited >= patience:
            raise RunError(f"{run} holds no run (there is no {LOG}), and none came in {patience:g} s")
        if not waited:
            console.print(f"Waiting for {run} to begin; Ctrl-C ends the waiting.", highlight=False, markup=False)
        sleep(POLL)
        waited += POLL
    return found
