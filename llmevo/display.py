"""What a person sees of a run: a live picture in a terminal, plain lines elsewhere. Reads events only."""

import shlex
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live

from llmevo import events
from llmevo.config import Config, parse_config
from llmevo.judging.statements import Bill
from llmevo.picture import called, front, heldout, outcome, picture, scores, total
from llmevo.plurals import plural
from llmevo.progress import clock, seconds_left
from llmevo.racing import difference
from llmevo.standard_errors import clusters
from llmevo.state import RunState
from llmevo.trial import START_ROWS

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
            self.config = parse_config(state.started.config, str(self.folder))
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
                done = done if [*budget.bounds] == ["evaluations"] else budget.words(state)
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
        """The whole display, `height` lines at most; see `llmevo.picture`."""
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


def _noise(one: events.HeldOut, other: events.HeldOut, state: RunState) -> float:
    """The standard error of the difference of two rows: paired where every question's score is known."""
    weights = {task.name: task.weight for task in state.heldout_tasks}
    if weights and weights.keys() <= one.item_scores.keys() & other.item_scores.keys():
        same = clusters(state.started.texts.get("heldout", {})) if state.started else None
        return difference(one.item_scores, other.item_scores, weights, same).error
    return (one.stderr**2 + other.stderr**2) ** 0.5


def verdict(state: RunState, run: object = "RUN") -> Sequence[str]:
    """Whether the merge is worth having, by held-out scores alone. `run` is its folder, for what to do instead."""
    rows = {row.row: row for row in state.heldout.values()}
    best = rows["best"]
    rivals = [row for row in rows.values() if row.kind in ("parent", "uniform", "coefficient")]
    trials = {row.row: None if row.candidate is None else state.trials.get(row.candidate) for row in rivals}
    keeping = [row for row in rivals if not (trial := trials[row.row]) or not trial.violation]
    strongest = max(keeping or rivals, key=lambda row: row.score)
    gain = best.score - strongest.score
    noise = _noise(best, strongest, state)
    if best.candidate is not None and best.candidate == strongest.candidate:
        return [f"No merge found is better than {strongest.row}, which best.yml and export hand over."]
    handed = state.trials[best.candidate].candidate if best.candidate in state.trials else None
    if handed and handed.origin in START_ROWS:
        return [
            "No merge that the search found is better than the start row"
            f" {handed.note or handed.origin}, which best.yml and export hand over. On the held-out questions it scores"
            f" {gain:+.3f} ± {noise:.3f} against {strongest.row}."
        ]
    scaled = any(row.kind == "coefficient" for row in rivals)
    those = ("parents, uniform and coefficients" if scaled else "parents and uniform") + (
        " that keep the constraints" if 0 < len(keeping) < len(rivals) else ""
    )
    text = f"The best merge scores {gain:+.3f} ± {noise:.3f} against {strongest.row}, the best of {those}."
    if gain <= 0 and not keeping:
        return [text, "But neither they nor the uniform merge keep the constraints."]
    if gain <= 0:
        way = (
            ""
            if strongest.candidate is None
            else f": `llmevo export {shlex.quote(str(run))} OUT --candidate {strongest.candidate}`"
        )
        return [text, f"It does not beat it: use {strongest.row} instead{way}."]
    return [text] if gain > 2 * noise else [text, "That is within two standard errors: it may be luck."]
