"""Where a run's time, tokens and money went."""

from dataclasses import dataclass

from llmevo.evaluation.judges.verdicts import Bill
from llmevo.reports.html.subject import Subject


@dataclass(frozen=True)
class Phase:
    """A part of the time."""

    name: str
    seconds: float
    share: float
    """Of the whole run."""


@dataclass(frozen=True)
class Costs:
    """What a run took."""

    phases: list[Phase]
    seconds: float
    """From the first event to the last, pauses included."""
    questions: int
    """Answered, held-out ones included."""
    cached: int
    """Scores taken over from equal candidates."""
    calls: int
    prompt_tokens: int
    completion_tokens: int
    money: float
    judges: str
    """What LLM judges took, in words; empty where none was asked."""


def costs(subject: Subject) -> Costs:
    """From the log's own clock."""
    state = subject.state
    trials, rows = [*state.trials.values()], [*state.heldout.values()]
    merge = sum(trial.seconds.get("merge", 0.0) for trial in trials)
    heldout = sum(sum(row.seconds.values()) for row in rows)
    llm = sum(event.seconds for event in state.prompted)
    parts = {
        "merging candidates": merge,
        "scoring candidates": sum(sum(trial.seconds.values()) for trial in trials) - merge,
        "held-out scores": heldout,
        "the LLM": llm,
    }
    whole = max(state.seconds, sum(parts.values()))
    parts["loading, optimizer, pauses"] = whole - sum(parts.values())
    return Costs(
        phases=[Phase(name, seconds, seconds / whole if whole else 0.0) for name, seconds in parts.items()],
        seconds=whole,
        questions=sum(trial.score.items for trial in trials if trial.score) + sum(row.items for row in rows),
        cached=sum(bool(trial.score) and not trial.seconds for trial in trials),
        calls=sum(event.calls for event in state.prompted),
        prompt_tokens=sum(event.tokens.get("prompt", 0) for event in state.prompted),
        completion_tokens=sum(event.tokens.get("completion", 0) for event in state.prompted),
        money=sum(event.cost for event in state.prompted),
        judges=str(Bill.of(state.judged)) if state.judged else "",
    )
