"""A comparison while it runs: a cell for each run, a line for each that goes on now, and the time left."""

from contextlib import closing
from pathlib import Path
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llmevo.errors import plural
from llmevo.reports.comparison.compare import Comparison, compare
from llmevo.reports.comparison.tables import publish, tables
from llmevo.reports.terminal.live import LiveView
from llmevo.reports.text import clock, say
from llmevo.run.comparison import ComparedRun, ComparisonRuns
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.progress import left, seconds_spent


class Scoreboard(LiveView):
    """The progress of a comparison; give `watch` to `ComparisonRuns.play`."""

    def __init__(self, console: Console, runs: ComparisonRuns) -> None:
        super().__init__(console)
        self.runs = runs
        self._states, self._entries = runs.states(), runs.entries
        self._scored = {entry: len(state.trials) for entry, state in self._states.items()}
        """The candidates in the log of each run, which is read again from its beginning where the run goes on."""
        self._now: dict[ComparedRun, None] = {}
        """The runs that go on, in the order in which they began, and the one that changed last."""

    def __enter__(self) -> Self:
        done = sum(state.finished is not None for state in self._states.values())
        found = f", {done} of them finished already" if done else ""
        self.console.print(f"{plural(len(self._entries), 'run')} below {self.runs.out}{found}.", highlight=False)
        return super().__enter__()

    def watch(self, entry: ComparedRun, event: events.Event, state: RunState) -> None:
        """Show one event of a run; of those that were in its log before, the last candidate only."""
        if len(state.trials) < self._scored[entry]:
            return
        self._states[entry] = state
        self._now = {each: None for each in self._now if not self._states[each].finished} | {entry: None}
        if self.live:
            self.live.update(self.picture())
        elif isinstance(event, events.Evaluated | events.Failed | events.RunFinished):
            say(self.console, self.line(entry))

    def line(self, entry: ComparedRun) -> str:
        """Return the progress of a run, and the time left of all."""
        state, place = self._states[entry], self._entries.index(entry) + 1
        done = f"{len(state.trials)}/{self.runs.config.search.budget.evaluations}"
        if state.finished:
            done = "finished"
        best = f"best {state.best.value:.3f}" if state.best else "no score yet"
        best += " (violates a constraint)" if state.unmet else ""
        left = f"{clock(self.seconds_left())} left in all"
        return f"  [run {place} of {len(self._entries)}] {entry.name}: {done}, {best}, {left}"

    def seconds_left(self) -> float:
        """Return the time left of all runs, at the pace of those that have begun; as many as there are workers go on at
        the same time.
        """
        begun = [state for state in self._states.values() if state.started]
        if not begun:
            return 0.0
        config = self.runs.config
        ahead = [left(state, config, [other for other in begun if other is not state]).after() for state in begun]
        # A run that has not begun is expected to take the mean of those that have.
        whole = (sum(ahead) + sum(map(seconds_spent, begun))) / len(begun)
        alone = sum(ahead) + whole * (len(self._states) - len(begun))
        unfinished = sum(state.finished is None for state in self._states.values())
        return alone / max(1, min(self.runs.at_once, unfinished))

    def picture(self) -> RenderableType:
        """Return a cell for every run, its best score and progress, and a line for each that goes on."""
        seeds = sorted({each.seed for each in self._entries})
        table = Table(box=None, pad_edge=False)
        for name in ("", *(f"seed {seed}" for seed in seeds)):
            table.add_column(name, justify="left" if not name else "right", min_width=12)
        for optimizer in self.runs.optimizers:
            of = {each.seed: each for each in self._entries if each.optimizer == optimizer}
            table.add_row(optimizer, *(self._cell(of[seed]) for seed in seeds))
        return Panel(
            Group(table, *map(self.line, self._now)),
            title=Text(f"llmevo  {self.runs.out}"),
            title_align="left",
        )

    def _cell(self, entry: ComparedRun) -> Text:
        state = self._states[entry]
        best = f"{state.best.value:.3f}{'!' if state.unmet else ''}" if state.best else "…"
        if state.finished:
            return Text(best, "green")
        if entry in self._now:
            return Text(f"{best} {len(state.trials)}/{self.runs.config.search.budget.evaluations}", "bold")
        return Text(best) if state.started else Text("–", "dim")


def play(console: Console, runs: ComparisonRuns) -> Comparison:
    """Carry a comparison to its end and return it; its files are written after every seed but the last."""
    with Scoreboard(console, runs) as board:
        runs.scorer.warn = lambda line: say(console, line, "yellow")
        finished: set[ComparedRun] = set()
        published = 0
        with closing(runs.play(board.watch)) as ended:
            for entry in ended:
                finished.add(entry)
                whole = runs.whole(finished)
                if published < len(whole) < len(runs.entries):
                    published = len(whole)
                    publish(compare([each.folder for each in whole]), runs.out)
    return compare([entry.folder for entry in runs.entries])


def report(console: Console, comparison: Comparison, out: Path) -> None:
    """Write the files of a comparison, and print its tables."""
    publish(comparison, out)
    for table in tables(comparison):
        console.print(table.rich())
        console.print()
    console.print(f"{out}/comparison.png, comparison.md and comparison.json hold this and more.", highlight=False)
