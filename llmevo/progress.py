"""How far a run is, and how long it still takes; read off its events."""

from llmevo.budget import Budget
from llmevo.config import Config
from llmevo.events import RunStarted, Selected
from llmevo.schema import Search
from llmevo.state import RunState


def seconds_left(state: RunState, budget: Budget) -> float:
    """From the mean time a question has taken so far, over the candidates and held-out rows still to come."""
    items, seconds = spent(state)
    return items_left(state, budget) * seconds / items if items else 0.0


def spent(state: RunState) -> tuple[int, float]:
    """Questions answered, and the seconds that took; what was taken over from another candidate took none."""
    items = sum(trial.score.items for trial in state.trials.values() if trial.score)
    seconds = sum(sum(trial.seconds.values()) for trial in state.trials.values() if trial.score)
    rows = [*state.selected.values(), *state.heldout.values()]
    return items + sum(row.items for row in rows), seconds + sum(sum(row.seconds.values()) for row in rows)


def items_left(state: RunState, budget: Budget) -> int:
    """Questions still to be answered, those of finalists and those held out included."""
    if state.started is None or state.finished:
        return 0
    return round(_search_items(state, budget) + _selection_items(state, state.started) + _heldout_items(state))


def _search_items(state: RunState, budget: Budget) -> float:
    """Candidates to come answer what those of the search have answered on average: racing stops many early."""
    if _current(state) or (state.heldout and not state.resumed):
        return 0
    searched = [t.score.items for t in state.trials.values() if t.score and t.candidate.generation]
    items = sum(searched) / len(searched) if searched else state.started.items if state.started else 0
    return budget.ahead(state) * items


def _selection_items(state: RunState, started: RunStarted) -> int:
    """Those who reach the end are at most the finalists of the config, the best parent and the uniform merge, and the
    parents that constraints are counted from.
    """
    chosen = _current(state)
    most = int(started.config.get("search", {}).get("finalists", Search().finalists)) + 2 + len(state.aims.constraints)
    return started.selection_items * ((chosen[0].finalists if chosen else most) - len(chosen))


def _heldout_items(state: RunState) -> int:
    if state.started is None or not state.started.heldout_items:
        return 0
    start_rows = sum(candidate.generation == 0 for candidate in state.candidates.values())
    rows = start_rows + 2  # the base and the best besides
    return max(0, rows - len(state.heldout)) * state.started.heldout_items


def _current(state: RunState) -> list[Selected]:
    """Finalists that have been asked since the search came to its end."""
    return [event for event in state.selected.values() if event.generation == len(state.told)]


def votes_at_most(config: Config, candidates: int, start_rows: int, selected: bool) -> int:
    """What a person is asked in a run of so many candidates, at most: on each of them but the first of every set of
    questions, which has nobody to be compared with. Candidates that reply as another did are not asked about again.
    """
    search, heldout = (sum(t.votes.pairs for t in tasks if t.votes) for tasks in (config.tasks, config.heldout_tasks))
    finalists = config.search.finalists + 2 + len(config.constraints) if selected else 0
    return search * (candidates - 1 + max(0, finalists - 1)) + heldout * (start_rows + 1)  # base and best besides


def votes(state: RunState, config: Config) -> tuple[int, int]:
    """How many a person has given in a run, and how many it will be at most as far as that is known now."""
    given = sum(len(poll.votes) for poll in state.book.polls.values())
    if state.started is None or state.finished or not state.trials:  # before the first nothing is known of the time
        return given, given
    start_rows = sum(candidate.generation == 0 for candidate in state.candidates.values())
    candidates = max(len(state.candidates), len(state.trials) + config.search.budget.ahead(state))
    most = votes_at_most(config, candidates, start_rows, state.started.selection_items > 0)
    return given, max(given, most)


def failures(state: RunState) -> list[str]:
    """The reasons of the candidates that failed, in their order."""
    return [trial.reason for trial in state.trials.values() if trial.score is None]


def clock(seconds: float) -> str:
    """A time span as people write it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
