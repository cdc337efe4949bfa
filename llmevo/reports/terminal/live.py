"""What a person sees of a run: a live picture in a terminal, plain lines elsewhere. Reads events only."""

import shlex
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live

from llmevo.config import Config, parse_logged
from llmevo.errors import plural
from llmevo.evaluation.judges.verdicts import Bill
from llmevo.reports.terminal.panel import called, clock, front, heldout, outcome, picture, scores, total
from llmevo.reports.verdict import verdict
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.progress import seconds_left
from llmevo.run.spending import Spending

TROUBLE = {
    "lost": "never came",
    "unreadable": "held nothing usable",
    "capped": "were not asked for, as llm.max_calls or llm.max_cost was reached",
}
"""What may become of a prompt, as people say it."""


def end(live: Live, kept: bool) -> None:
    """Stop a live picture. `kept`: it stays, for the run was stopped or has failed and nothing else shows how far it
    came. A terminal that is gone is no failure.
    """
    live.transient = not kept
    with suppress(OSError):
        live.stop()


class Display:
    """Follows a run. Use as a context manager; give `show` to the journal as an observer."""

    def __init__(
        self, console: Console, config: Config, folder: Path, loading: str = "Loading models and tasks…"
    ) -> None:
        """`loading` is shown before the first event."""
        self.console, self.config, self.folder = console, config, folder
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._loading = loading
        self._seen: datetime | None = None
        """When the last event was shown: a run that goes on waits since then, not since it was stopped."""

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
            self._live.update(self._loading)
        elif self._loading:
            self.console.print(self._loading)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live:
            end(self._live, kept=kind is not None)

    def show(self, event: events.Event, state: RunState) -> None:
        """Take in one event."""
        if isinstance(event, events.Resumed) and state.started:
            self.config = parse_logged(state.started.config, str(self.folder))
        self._seen = datetime.now(UTC)
        if self._live:
            self.draw(state)
        elif line := self.line(event, state):
            self.say(line)

    @contextmanager
    def paused(self) -> Generator[None]:
        """Show nothing meanwhile: somebody is being asked."""
        if self._live:
            self._live.stop()
        try:
            yield
        finally:
            if self._live:
                self._live.start()

    def say(self, line: str) -> None:
        """Print a line; not in a terminal, which has the picture."""
        if not self._live:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Print what a person should know, above the picture or among the lines."""
        self.console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def draw(self, state: RunState) -> None:
        """Show a state as a picture; in a terminal only."""
        if self._live:
            self._live.update(self.picture(state, self.console.height, live=True))

    def line(self, event: events.Event, state: RunState) -> str | None:
        """One event as a line of text; None for those that need none."""
        match event:
            case events.Prompted():
                problems = f"; {'; '.join(event.problems)}" if event.problems else ""
                said = f" It says: {event.analysis}" if event.analysis else ""
                gave = plural(event.used, "proposal")
                return f"  {called(event.model)} gave {gave} in {event.seconds:.1f} s{problems}.{said}"
            case events.Judged() if event.problems:
                return f"  {event.model}, the judge of {event.task}: {'; '.join(event.problems[:3])}"
            case events.Evaluated() | events.Failed():
                trial = state.trials[event.candidate]
                result = outcome(trial, f"failed: {trial.reason}")
                budget = self.config.search.budget
                done = f"{len(state.trials)}/{budget.evaluations}"
                done = done if [*budget.bounds] == ["evaluations"] else str(Spending(budget, state))
                note = f", {trial.candidate.note}" if trial.candidate.note else ""
                left = f", {clock(seconds_left(state, self.config))} left"
                early = ""
                if isinstance(event, events.Evaluated) and event.rival is not None:
                    early = f" (stopped after {plural(event.items, 'question')})"
                return f"  [{done}] #{trial.candidate.id} ({trial.candidate.origin}{note}) {result}{early}{left}"
            case events.Told():
                sigma = "" if event.sigma is None else f", step size {event.sigma:.3f}"
                return f"generation {event.generation}: best {outcome(state.best)}{sigma}"
            case events.Selected():
                return (
                    f"  finalist #{event.candidate}: {total(event.read())} on {plural(event.items, 'further question')}"
                )
            case events.HeldOut():
                return f"  held out: {event.row} {total(event.read())}"
            case _:
                return None

    def picture(self, state: RunState, height: int | None = None, live: bool = False) -> RenderableType:
        """The whole display, `height` lines at most; see `llmevo.reports.terminal.panel`."""
        return picture(state, self.config, self.folder, self.console.width, height, live, self._seen)


def summary(console: Console, state: RunState, folder: Path, config: Config) -> None:
    """The end of a run: what came out, how much the LLM had to do with it, and what to do next."""
    finished, best = state.finished, state.best
    if finished is None or best is None:
        console.print("Every candidate failed; the reasons are in the log.", style="red")
        return
    if state.heldout:
        console.print(heldout(state, console.width))
        for line in verdict(state, folder):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(scores(state, config, console.width))
        console.print(
            "No `heldout:` tasks were given: the search score is the best of many and flatters.", style="yellow"
        )
    if state.unmet:
        console.print(f"{state.unmet[0].upper()}{state.unmet[1:]}.", style="yellow", highlight=False)
    if state.front:
        console.print(front(state, console.width))
        console.print(
            f"The best by the weighted sum is #{best.candidate.id}; `llmevo export {folder} OUT --candidate N` writes"
            " any other.",
            highlight=False,
        )
    counts, place = finished.proposals, shlex.quote(str(folder))
    if counts["prompts"]:
        console.print(
            f"The LLM was asked {plural(counts['prompts'], 'time')} and answered {counts['answered']};"
            f" {counts['used']} of {plural(len(state.trials), 'candidate')} are its proposals."
            f" The best, #{best.candidate.id}, comes from {best.candidate.origin}"
            f"{' (' + best.candidate.note + ')' if best.candidate.note else ''}.",
            highlight=False,
        )
        if trouble := [f"{counts[kind]} {what}" for kind, what in TROUBLE.items() if counts.get(kind)]:
            console.print(f"Of its answers, {', '.join(trouble)}.", highlight=False)
    if state.judged:
        console.print(f"{Bill.of(state.judged)}", highlight=False)
    console.print(f"\nThe run lies in {folder}. Next:", highlight=False)
    for command, what in (
        (f"llmevo export {place} OUT", "the merged model as a Hugging Face folder"),
        (f"llmevo replay {place} --verify", "show the run again and check it against its log"),
    ):
        console.print(f"  {command:<42} {what}", highlight=False, soft_wrap=True)
