"""What a person sees of a run: a live picture in a terminal, plain lines elsewhere. Reads events only."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from llmevo import events
from llmevo.config import Config
from llmevo.runlog import RunState
from llmevo.trial import Score, Trial

TROUBLE = {
    "lost": "never came",
    "unreadable": "held nothing usable",
    "capped": "were not asked for, as llm.max_calls or llm.max_cost was reached",
}
"""What may become of a prompt, as people say it."""


class Display:
    """Follows a run. Use as a context manager; give `show` to the journal as an observer."""

    def __init__(self, console: Console, config: Config, folder: Path) -> None:
        self.console, self.config, self.folder = console, config, folder
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
            self._live.update("Loading models and tasks…")
        else:
            self.console.print("Loading models and tasks…")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, event: events.Event, state: RunState) -> None:
        """Take in one event."""
        if self._live:
            self._live.update(self.picture(state))
        elif line := self.line(event, state):
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def line(self, event: events.Event, state: RunState) -> str | None:
        """One event as a line of text; None for those that need none."""
        match event:
            case events.Prompted():
                problems = f"; {'; '.join(event.problems)}" if event.problems else ""
                said = f" It says: {event.analysis}" if event.analysis else ""
                return f"  {event.model} gave {event.used} proposals in {event.seconds:.1f} s{problems}.{said}"
            case events.Evaluated() | events.Failed():
                trial = state.trials[event.candidate]
                result = _total(trial.score) if trial.score else f"failed: {trial.reason}"
                spent = f"{len(state.trials)}/{self.config.search.budget}"
                note = f", {trial.candidate.note}" if trial.candidate.note else ""
                left = f", {clock(self.seconds_left(state))} left"
                return f"  [{spent}] #{trial.candidate.id} ({trial.candidate.origin}{note}) {result}{left}"
            case events.Told():
                best = state.best
                sigma = "" if event.sigma is None else f", step size {event.sigma:.3f}"
                value = _total(best.score) if best and best.score else "none yet"
                return f"generation {event.generation}: best {value}{sigma}"
            case events.HeldOut():
                return f"  held out: {event.row} {_total(event.read())}"
            case _:
                return None

    def seconds_left(self, state: RunState) -> float:
        """From the mean time an item has taken so far, over the candidates and held-out rows still to come."""
        items, seconds = spent(state)
        return items_left(state, self.config.search.budget) * seconds / items if items else 0.0

    def picture(self, state: RunState) -> RenderableType:
        """The whole display."""
        budget, done = self.config.search.budget, len(state.trials)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            "generation", str(len(state.told)), "evaluations", f"{done} of {budget}", ProgressBar(budget, done, 30)
        )
        items = sum(trial.score.items for trial in state.trials.values() if trial.score)
        of = budget * (state.started.items if state.started else 0)
        spent = f"{clock(state.seconds)} so far, {clock(self.seconds_left(state))} left"
        head.add_row("questions", f"{items:,} of {of:,}", "time", spent)
        parts: list[RenderableType] = [head, scores(state, self.config)]
        if state.told and state.told[-1].sigma is not None:
            parts.append(f"step size {state.told[-1].sigma:.3f} of a gene's range")
        if state.prompted:
            parts.append(_last_prompt(state.prompted[-1]))
        if state.heldout:
            parts.append(heldout(state))
        return Panel(Group(*parts), title=f"llmevo  {self.folder}", title_align="left")


def spent(state: RunState) -> tuple[int, float]:
    """Questions answered, and the seconds that took; what was taken over from another candidate took none."""
    items = sum(trial.score.items for trial in state.trials.values() if trial.score)
    seconds = sum(sum(trial.seconds.values()) for trial in state.trials.values() if trial.score)
    rows = state.heldout.values()
    return items + sum(row.items for row in rows), seconds + sum(sum(row.seconds.values()) for row in rows)


def items_left(state: RunState, budget: int) -> int:
    """Questions still to be answered, those held out included."""
    if state.started is None or state.finished:
        return 0
    start_rows = sum(candidate.generation == 0 for candidate in state.candidates.values())
    rows = start_rows + 2 if state.started.heldout_items else 0  # the base and the best besides
    searched = max(0, budget - len(state.trials)) * state.started.items
    return searched + max(0, rows - len(state.heldout)) * state.started.heldout_items


def scores(state: RunState, config: Config) -> Table:
    """Parents, uniform merge, the best and the latest candidate, with their tasks."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "from", "score", *short([*config.counted])):
        table.add_column(column, justify="left" if column in ("", "from") else "right", overflow="fold")
    rows: list[tuple[str, Trial]] = [
        (trial.candidate.note or trial.candidate.origin, trial)
        for trial in state.trials.values()
        if trial.candidate.generation == 0
    ]
    if state.trials:
        rows.append(("latest", [*state.trials.values()][-1]))
    if state.best:
        rows.append(("best so far", state.best))
    for name, trial in rows:
        style = "bold green" if name == "best so far" else ""
        origin = f"#{trial.candidate.id} {trial.candidate.origin}"
        if trial.score is None:
            table.add_row(name, origin, f"failed: {trial.reason[:60]}", style="red")
            continue
        values = [f"{trial.score.tasks[task][metric]:.3f}" for task, (_, metric) in config.counted.items()]
        table.add_row(name, origin, _total(trial.score), *values, style=style)
    return table


def short(names: Sequence[str]) -> list[str]:
    """Task names without the words that all of them begin or end with: what tells them apart."""
    words = [name.split("_") for name in names]
    if len(words) < 2:
        return [*names]
    while all(len(word) > 1 for word in words) and len({word[0] for word in words}) == 1:
        words = [word[1:] for word in words]
    while all(len(word) > 1 for word in words) and len({word[-1] for word in words}) == 1:
        words = [word[:-1] for word in words]
    return ["_".join(word) for word in words]


def _last_prompt(event: events.Prompted) -> RenderableType:
    text = f"{event.model} (generation {event.generation}): {event.used} proposals in {event.seconds:.1f} s"
    if event.analysis:
        text += f"\n“{event.analysis}”"
    if event.problems:
        text += f"\n{event.problems[-1]}"
    return Panel(text, title="last answer of the LLM", title_align="left")


def heldout(state: RunState) -> Table:
    """The table that counts: questions nothing was chosen by."""
    config = state.started.config if state.started else {}
    metrics = [
        (t, "acc,none") if isinstance(t, str) else (t["name"], t.get("metric", "acc,none"))
        for t in config.get("heldout", [])
    ]
    table = Table(title="held-out questions (± one standard error)", title_justify="left", box=None, pad_edge=False)
    for column in ("model", "score", *short([name for name, _ in metrics])):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for row in state.heldout.values():
        values = [f"{row.tasks[name][metric]:.3f}" for name, metric in metrics]
        style = "bold green" if row.kind == "best" else ""
        table.add_row(row.row, _total(row.read()), *values, style=style)
    return table


def summary(console: Console, state: RunState, folder: Path, config: Config) -> None:
    """The end of a run: what came out, how much the LLM had to do with it, and what to do next."""
    finished, best = state.finished, state.best
    if finished is None or best is None:
        console.print("Every candidate failed; the reasons are in the log.", style="red")
        return
    if state.heldout:
        console.print(heldout(state))
        for line in verdict(state):
            console.print(line, highlight=False)
    else:
        console.print(scores(state, config))
        console.print(
            "No `heldout:` tasks were given: the search score is the best of many and flatters.", style="yellow"
        )
    counts = finished.proposals
    if counts["prompts"]:
        console.print(
            f"The LLM was asked {counts['prompts']} times and answered {counts['answered']};"
            f" {counts['used']} of {len(state.trials)} candidates are its proposals. The best, #{best.candidate.id},"
            f" comes from {best.candidate.origin}{' (' + best.candidate.note + ')' if best.candidate.note else ''}.",
            highlight=False,
        )
        if trouble := [f"{counts[kind]} {what}" for kind, what in TROUBLE.items() if counts.get(kind)]:
            console.print(f"Of its answers, {', '.join(trouble)}.", highlight=False)
    console.print(f"\nThe run lies in {folder}. Next:", highlight=False)
    for command, what in (
        (f"llmevo export {folder} OUT", "the merged model as a Hugging Face folder"),
        (f"llmevo replay {folder} --verify", "show the run again and check it against its log"),
    ):
        console.print(f"  {command:<42} {what}", highlight=False, soft_wrap=True)


def verdict(state: RunState) -> Sequence[str]:
    """Whether the merge is worth having, by held-out scores alone."""
    rows = {row.row: row for row in state.heldout.values()}
    best = rows["best"]
    rivals = [row for row in rows.values() if row.kind in ("parent", "uniform")]
    strongest = max(rivals, key=lambda row: row.score)
    gain = best.score - strongest.score
    noise = (best.stderr**2 + strongest.stderr**2) ** 0.5
    text = f"The best merge scores {gain:+.3f} ± {noise:.3f} against {strongest.row}, the best of parents and uniform."
    if gain <= 0:
        return [text, f"It does not beat it: use {strongest.row} instead."]
    return [text] if gain > 2 * noise else [text, "That is within two standard errors: it may be luck."]


def _total(score: Score) -> str:
    return f"{score.total:.3f} ± {score.stderr:.3f}"


def clock(seconds: float) -> str:
    """A time span as people write it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
