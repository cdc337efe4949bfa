"""A run as a picture: progress, scores, and the LLM's last analysis. Fits a terminal of 80 × 24."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmevo.config import Config
from llmevo.errors import plural
from llmevo.evaluation.score import Metrics, Score, metric_of
from llmevo.evaluation.tasks.task import short
from llmevo.reports.quantized_scores import finalists
from llmevo.reports.terminal import workers
from llmevo.reports.text import clock, objective_value, with_error
from llmevo.run.log.events import OF_BEST
from llmevo.run.log.state import RunState, failures
from llmevo.run.progress import left, llm_wait, votes
from llmevo.run.spending import Spending
from llmevo.search.trial import START_ROWS, Trial
from llmevo.workers.protocol import Doing

THOUGHT = 3
"""Lines of the LLM's analysis, at most."""
FRAME = 10 + THOUGHT
"""Lines of the picture outside tables, at most."""
NAME, TASK, NARROW = 18, 20, 6
"""The widest names of a model and of a task, and the narrowest that a task's is cut to, in characters."""
SCORE = 13
"""Characters of a score with its standard error."""
NOTICED = 1.0
"""Seconds from which the wait for the LLM is shown."""
BEST, VIOLATES = "bold green", "bold yellow"
Row = TypeVar("Row")


@dataclass
class Ticking:
    """Text, or a table, that is made again for every frame."""

    text: Callable[[], str | RenderableType]

    def __rich__(self) -> RenderableType:
        text = self.text()
        return Text(text) if isinstance(text, str) else text


def picture(
    state: RunState,
    config: Config,
    folder: Path,
    width: int,
    height: int | None = None,
    live: bool = False,
    begun: datetime | None = None,
    doing: Callable[[], Sequence[Doing]] = lambda: (),
) -> RenderableType:
    """Return the picture, of `height` lines at most. `live`: time goes on since the last event.

    `begun`: when the current step began, where that is later than the last event, as after a pause. `doing` says what
    the workers do now.
    """
    wide = width - 4
    count = (
        0 if state.finished else len({of.name for of in state.worker_history.present} | {of.worker for of in doing()})
    )
    most = count if height is None else min(count, max(2, (height - FRAME) // 3))
    rows = None if height is None else max(2, height - FRAME - (most + 2 if count else 0))
    begun = max(filter(None, (begun, state.latest)), default=None)
    since = partial(_since, begun if live and not state.finished else None)
    parts: list[RenderableType] = [_head(state, config, live, since), _facts(state, config, since)]
    if state.best:
        parts.append(_best(state, state.best))
    if not state.heldout or height is None:
        parts += ["", scores(state, config, wide, rows)]
    if state.heldout:
        parts += ["", heldout(state, wide, None if rows is None else rows - 1)]
    if count:
        parts += ["", Ticking(lambda: workers.table(state.worker_history, doing(), most, wide) or "")]
    if state.prompted:
        parts += ["", *_last_prompt(state, wide)]
    return Panel(Group(*parts), title=Text(f"llmevo  {folder}"), title_align="left", width=width)


def _since(begun: datetime | None) -> float:
    return (datetime.now(UTC) - begun).total_seconds() if begun else 0.0


def _head(state: RunState, config: Config, live: bool, since: Callable[[], float]) -> RenderableType:
    done, last, ahead, budget = state.seconds, state.latest, left(state, config), config.search.budget

    def time() -> str:
        spent = clock(done + _since(last if live and not state.finished else None))
        rest = ahead.after(since())
        return f"{spent} {'in all' if state.finished else 'so far'}{f', {clock(rest)} left' if round(rest) else ''}"

    head = Table.grid(padding=(0, 2), expand=True)
    head.add_column(ratio=1, min_width=10)
    head.add_column(no_wrap=True, overflow="ellipsis")
    head.add_column(no_wrap=True, justify="right")
    head.add_row(
        ProgressBar(1.0, Spending(budget, state).progress, complete_style="cyan", finished_style="green"),
        Text(str(Spending(budget, state))),
        Ticking(time),
    )
    return head


def _facts(state: RunState, config: Config, since: Callable[[], float]) -> RenderableType:
    """Return the state of the search in one line, which begins with a long wait for the LLM."""
    told = state.told[-1] if state.told else None
    failed = failures(state)
    order = state.started.order if state.started else ""
    facts = [f"generation {state.generation}"] if order != "steady" else []
    if told and told.sigma is not None:
        facts.append(f"step size {told.sigma:.3f}")
    if told and told.trust is not None:
        facts.append(f"LLM trust {told.trust:.2f}")
    facts.append(f"{len(failed)} failed")
    given, most = votes(state, config)
    if most:
        facts.append(f"{given} of at most {plural(most, 'vote')}")
    if state.objective.pareto:
        facts.append(f"front of {len(state.front)}")
    waiting = [of for number, of in state.candidates.items() if number not in state.trials]
    if state.finished or state.heldout:
        facts.append("finished" if state.finished else "holding out")
    elif waiting:
        more = f" and {len(waiting) - 1} more" if order and len(waiting) > 1 else ""
        facts.append(f"now #{waiting[0].id} {waiting[0].origin}{more}")
    asked = llm_wait(state, config)

    def line() -> Text:
        waited = since()
        first: list[str] = []
        if asked and waited >= NOTICED:
            model, limit = asked
            first.append(f"waiting for {called(model)} for {clock(waited)}")
            if limit is not None:
                first.append(f"time-out after {clock(limit)}")
        text = _line(", ".join([*first, *facts]))
        if failed:
            text.highlight_words([f"{len(failed)} failed"], "red")
        return text

    return Ticking(line)


def called(model: str) -> str:
    """Return an LLM's name; of a path, that of the file."""
    return Path(model).name.removesuffix(".gguf") or model


def _best(state: RunState, best: Trial) -> Text:
    """Return the best score, its origin, and its gain over the best start row, in one line."""
    assert best.score is not None
    start = [trial for trial in state.trials.values() if trial.score and trial.candidate.generation == 0]
    strongest = max(start, key=lambda trial: trial.rank, default=best)
    line = _line("best so far ")
    line.append(total(best.score), BEST if not best.violation else VIOLATES)
    if best.violation:
        line.append(f" {best.reason}", VIOLATES)
    if strongest is not best:
        line.append(f", {best.value - strongest.value:+.3f} against {_called(strongest)}")
    line.append(f": #{best.candidate.id} from {best.candidate.origin}")
    if best.candidate.note and best.candidate.note != best.candidate.origin:
        line.append(f" ({best.candidate.note})")
    return line


def scores(state: RunState, config: Config, width: int | None = None, rows: int | None = None) -> RenderableType:
    """Return start rows, the best and the latest candidate, with their tasks.

    Within `width` columns and `rows` lines: rows without room are counted below, the weakest parents first.
    """
    start = [trial for trial in state.trials.values() if trial.candidate.generation == 0]
    latest = next(reversed(state.trials.values()), None)
    last = [("latest", latest)] if latest and latest not in (*start, state.best) else []
    last += [("best so far", state.best)] if state.best else []
    kept = _strongest(start, None if rows is None else rows - len(last) - 2, lambda trial: trial.value)
    shown = [*((_called(trial), trial) for trial in kept), *last]
    metrics = {task: metric for task, (_, metric) in config.counted.items()}
    table, tasks = _table([name for name, _ in shown], [*metrics], width)
    for name, trial in shown:
        best = VIOLATES if trial.violation else BEST
        style = "red" if trial.score is None else best if name == "best so far" else ""
        values = ["failed", *["–"] * len(tasks)]
        if trial.score:
            values = [total(trial.score), *(_number(trial.score.tasks, task, metrics[task]) for task in tasks)]
        table.add_row(Text(name), str(trial.candidate.id), *values, style=style)
    return _with_rest(table, len(start) - len(kept), len(metrics) - len(tasks))


def heldout(state: RunState, width: int | None = None, rows: int | None = None) -> RenderableType:
    """Return the scores on held-out questions; those of tasks with their errors where all have room."""
    metrics = {task.name: task.metric for task in state.heldout_tasks}
    held, failed = [*state.heldout.values()], [*state.failed_rows.values()]
    shown = failed[: None if rows is None else max(0, rows - 4)]
    room = None if rows is None else rows - 3 - len(shown)
    first = (*OF_BEST, "uniform", "coefficient")
    kept = _strongest(held, room, lambda row: (row.kind in first, row.score))
    names = [row.row for row in (*kept, *shown)]
    table, tasks = _table(names, [*metrics], width, SCORE)
    errors = len(tasks) == len(metrics)
    if not errors:
        table, tasks = _table(names, [*metrics], width)
    for row in kept:
        values = [_number(row.tasks, task, metrics[task], errors) for task in tasks]
        place = "" if row.candidate is None else str(row.candidate)
        table.add_row(Text(row.row), place, total(row.read()), *values, style=BEST if row.kind == "best" else "")
    for row in shown:
        place = "" if row.candidate is None else str(row.candidate)
        table.add_row(Text(row.row), place, "failed", *["–"] * len(tasks), style="red")
    asked, hidden = state.asked("heldout"), len(held) - len(kept) + len(failed) - len(shown)
    title = Text(f"{asked} held-out question{'' if asked == '1' else 's'} (± one standard error)", style="italic")
    parts: list[RenderableType] = [title, _with_rest(table, hidden, len(metrics) - len(tasks))]
    if rows is None:
        parts += [Text(str(each), style="" if each.holds else VIOLATES) for each in state.heldout_kept]
    return Group(*parts)


def served(state: RunState) -> RenderableType:
    """Return the finalists' scores as merged and as they will be served."""
    found, best = finalists(state), state.best
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    form = next(event.quantized for event in state.served.values())
    for head in ("#", "as merged", f"in {form}", "change"):
        table.add_column(head, justify="right", no_wrap=True)
    for of in found:
        number = of.trial.candidate.id
        cells = [total(of.merged), total(of.served), with_error(of.change, of.error, "+")]
        style = BEST if best and number == best.candidate.id else ""
        table.add_row(Text(_called(of.trial)), str(number), *cells, style=style)
    title = f"Finalists on all their {found[0].served.items} questions (± one standard error; changes are paired)"
    return Group(Text(title, style="italic"), table)


def front(state: RunState, width: int | None = None) -> RenderableType:
    """Return the Pareto front as a table."""
    objective, best = state.objective, state.best
    shown = state.front
    table, tasks = _table([_called(trial) for trial in shown], [*objective.objectives], width, SCORE)
    for trial in shown:
        if trial.score:
            metrics = trial.score.tasks
            values = [
                objective_value(objective, name, objective.value(metrics, name), objective.error(metrics, name))
                for name in tasks
            ]
            style = BEST if best and trial.candidate.id == best.candidate.id else ""
            table.add_row(Text(_called(trial)), str(trial.candidate.id), total(trial.score), *values, style=style)
    title = Text(f"Pareto front of {len(shown)}: none is better at one objective and worse at no other", style="italic")
    return Group(title, _with_rest(table, 0, len(objective.objectives) - len(tasks)))


def _strongest(rows: Sequence[Row], room: int | None, rank: Callable[[Row], Any]) -> list[Row]:
    """Return the best rows, as many as there is room for, in their order."""
    if room is None or len(rows) <= room:
        return [*rows]
    best = sorted(range(len(rows)), key=lambda place: rank(rows[place]), reverse=True)[: max(1, room)]
    return [rows[place] for place in sorted(best)]


def _table(
    names: Sequence[str], tasks: Sequence[str], width: int | None, least: int = NARROW
) -> tuple[Table, Sequence[str]]:
    """Return a table without rows, and the tasks that have room in it."""
    table = Table(box=None, pad_edge=False)
    shown, beside = short(tasks), 5 + 2 + SCORE
    wide = max(len(name) for name in ("best so far", *names))
    whole = wide + beside + sum(2 + max(least - 1, len(name)) for name in shown)
    if width is not None and whole > width:
        wide = min(NAME, wide)
    table.add_column("", no_wrap=True, overflow="ellipsis", min_width=wide, max_width=wide)
    table.add_column("#", justify="right", no_wrap=True, min_width=3)
    table.add_column("score", justify="right", no_wrap=True, min_width=SCORE)
    room = None if width is None or whole <= width else width - wide - beside
    chosen = fitted(dict(zip(tasks, shown, strict=True)), room, least)
    for called in chosen.values():
        table.add_column(Text(called), justify="right", no_wrap=True, min_width=5)
    return table, [*chosen]


def fitted(names: Mapping[str, str], room: int | None, least: int = NARROW) -> dict[str, str]:
    """Return the tasks with names that fit: cut where needed, and only the first tasks where that is not enough. No
    column is narrower than `least`. Of names that begin alike some are cut at their beginning, so that all differ.
    """
    if room is None:
        return {**names}
    for wide in range(TASK, least - 1, -1):
        if sum(2 + max(least - 1, min(len(name), wide)) for name in names.values()) <= room:
            break
    else:
        wide = least
        names = dict([*names.items()][: max(0, room // (2 + least))])
    shown: dict[str, str] = {}
    for task, name in names.items():
        cut = name if len(name) <= wide else f"{name[: wide - 1]}…"
        shown[task] = cut if cut not in shown.values() else f"…{name[1 - wide :]}"
    return shown


def _with_rest(table: Table, models: int, tasks: int) -> RenderableType:
    """Return the table, and below it the number of rows and tasks without room."""
    counts = ((models, "weaker model"), (tasks, "task"))
    rest = [plural(count, what) for count, what in counts if count]
    return Group(table, Text(f"and {' and '.join(rest)} more", style="dim")) if rest else table


def _number(tasks: Metrics, task: str, metric: str, error: bool = False) -> str:
    value, stderr = metric_of(tasks, task, metric)
    return with_error(value, stderr if error else None) or "–"


def _last_prompt(state: RunState, width: int) -> list[RenderableType]:
    event = state.prompted[-1]
    scored = sum(trial.candidate.origin == "llm" for trial in state.trials.values())
    gave = f"{called(event.model)} gave {plural(event.used, 'proposal')} in {event.seconds:.1f} s"
    lines = [_line(f"{gave}; {scored} of its scored so far", "bold")]
    if event.analysis:
        thought = textwrap.wrap(f"“{event.analysis}”", width, max_lines=THOUGHT, placeholder=" …”")
        lines += [_line(line, "italic") for line in thought]
    if event.problems:
        lines.append(_line(event.problems[-1], "yellow"))
    return [*lines]


def total(score: Score) -> str:
    """Return a score with its standard error."""
    return with_error(score.total, score.stderr)


def outcome(trial: Trial | None, none: str = "none yet") -> str:
    """Return a trial's score, and the constraints that it violates."""
    if trial is None or trial.score is None:
        return none
    return total(trial.score) + (f" ({trial.reason})" if trial.violation else "")


def _called(trial: Trial) -> str:
    """Return a start row's note, which is its name; of a later candidate the origin."""
    candidate = trial.candidate
    return candidate.note or candidate.origin if candidate.origin in START_ROWS else candidate.origin


def _line(text: str, style: str = "") -> Text:
    """Return one line, cut where the terminal ends."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
