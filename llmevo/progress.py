"""How far a run is, and how long it still takes; read off its events."""

from llmevo.budget import Budget
from llmevo.runlog import RunState


def seconds_left(state: RunState, budget: Budget) -> float:
    """From the mean time a question has taken so far, over the candidates and held-out rows still to come."""
    items, seconds = spent(state)
    return items_left(state, budget) * seconds / items if items else 0.0


def spent(state: RunState) -> tuple[int, float]:
    """Questions answered, and the seconds that took; what was taken over from another candidate took none."""
    items = sum(trial.score.items for trial in state.trials.values() if trial.score)
    seconds = sum(sum(trial.seconds.values()) for trial in state.trials.values() if trial.score)
    rows = state.heldout.values()
    return items + sum(row.items for row in rows), seconds + sum(sum(row.seconds.values()) for row in rows)


def items_left(state: RunState, budget: Budget) -> int:
    """Questions still to be answered, those held out included."""
    if state.started is None or state.finished:
        return 0
    start_rows = sum(candidate.generation == 0 for candidate in state.candidates.values())
    rows = start_rows + 2 if state.started.heldout_items else 0  # the base and the best besides
    searched = 0 if state.heldout else budget.ahead(state) * state.started.items
    return searched + max(0, rows - len(state.heldout)) * state.started.heldout_items


def failures(state: RunState) -> list[str]:
    """The reasons of the candidates that failed, in their order."""
    return [trial.reason for trial in state.trials.values() if trial.score is None]


def clock(seconds: float) -> str:
    """A time span as people write it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
