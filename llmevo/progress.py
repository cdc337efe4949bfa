"""How far a run is, and how long it still takes; read off its events."""

from collections.abc import Sequence

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
    chosen = _current(state)
    count = int(started.config.get("search", {}).get("finalists", Search().finalists))
    most = finalists_at_most(count, len(state.aims.constraints), _origins(state))
    return started.selection_items * ((chosen[0].finalists if chosen else most) - len(chosen))


def _heldout_items(state: RunState) -> int:
    if state.started is None or not state.started.heldout_items:
        return 0
    return max(0, heldout_rows(_origins(state)) - len(state.heldout)) * state.started.heldout_items


def finalists_at_most(count: int, constraints: int, origins: Sequence[str]) -> int:
    """The config's number of finalists, the best parent, the uniform merge, the best other weight for all models, and
    the parents that constraints are counted from. `origins` are the start rows'.
    """
    return count + 2 + ("coefficient" in origins) + constraints


def heldout_rows(origins: Sequence[str]) -> int:
    """Models that are held out, at most: base, parents, uniform merge, the best other weight for all models, and the
    best. `origins` are the start rows'.
    """
    return 2 + sum(origin in ("parent", "uniform") for origin in origins) + ("coefficient" in origins)


def _origins(state: RunState) -> list[str]:
    """Of the start rows."""
    return [candidate.origin for candidate in state.candidates.values() if candidate.generation == 0]


def _current(state: RunState) -> list[Selected]:
    """Finalists that have been asked since the search came to its end."""
    return [event for event in state.selected.values() if event.generation == len(state.told)]


def votes_at_most(config: Config, candidates: int, origins: Sequence[str], selected: bool) -> int:
    """What a person is asked in a run of so many candidates, at most: on each of them but the first of every set of
    questions, which has nobody to be compared with. Candidates that reply as another did are not asked about again.
    `origins` are the start rows'.
    """
    search, heldout = (sum(t.votes.pairs for t in tasks if t.votes) for tasks in (config.tasks, config.heldout_tasks))
    finalists = finalists_at_most(config.search.finalists, len(config.constraints), origins) if selected else 0
    return search * (candidates - 1 + max(0, finalists - 1)) + heldout * (heldout_rows(origins) - 1)


def votes(state: RunState, config: Config) -> tuple[int, int]:
    """How many a person has given in a run, and how many it will be at most as far as that is known now."""
    given = sum(len(poll.votes) for poll in state.book.polls.values())
    if state.started is None or state.finished or not state.trials:  # before the first nothing is known of the time
        return given, given
    candidates = max(len(state.candidates), len(state.trials) + config.search.budget.ahead(state))
    most = votes_at_most(config, candidates, _origins(state), state.started.selection_items > 0)
    return given, max(given, most)


def failures(state: RunState) -> list[str]:
    """The reasons of the candidates that failed, in their order."""
    return [trial.reason for trial in state.trials.values() if trial.score is None]


def clock(seconds: float) -> str:
    """A time span as people write it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
