"""Verdicts of LLM judges and votes of a person: the statements that a log holds, and the memory that they fill.

Nothing that is in a `VerdictMemory` is asked again. A run's log fills it when the run is resumed.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, field
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from llmevo.errors import plural
from llmevo.evaluation.judges.bradley_terry import preference, strengths

Choice = Literal["own", "other", "tie", "skip"]
"""The better of two replies; `own` is that of the candidate that is voted on. A skipped pair counts nothing."""


class Statement(BaseModel):
    """The fields that all statements have."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    task: str
    questions: str = "search"
    """The set that was scored: `search`, `selection` or `heldout`."""


class Verdict(BaseModel):
    """An LLM's opinion of a reply, or of two."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    key: str
    """A digest of the judge's model and all that it was shown."""
    value: float
    """0 (the worst grade, or the second reply is better) to 1 (the best grade, or the first is better)."""
    reason: str = ""
    """The judge's own words, shortened."""
    replies: list[str] = Field(default_factory=list[str])
    """The judged replies, shortened; empty in older logs."""


class Judgement(Statement):
    """New verdicts of an LLM, and what they took."""

    model: str
    verdicts: list[Verdict]
    """Without the answers that could not be read."""
    calls: int
    """Answers of the judge, repairs included."""
    tokens: dict[str, int]
    """`prompt` and `completion`."""
    cost: float
    problems: list[str] = Field(default_factory=list[str])
    """The faults of answers, and what was done about them."""


class Presentation(Statement):
    """A candidate's replies are put to the vote."""

    poll: str
    """A digest of the task and its prompts: votes on other prompts are another poll."""
    player: str
    """A digest of the replies: candidates with equal replies are one player."""
    replies: list[str]
    """In the order of the prompts; empty for a player that is known already."""


class Vote(Statement):
    """A person's choice between two replies."""

    poll: str
    player: str
    other: str
    """The player it was compared with."""
    prompt: int
    """Its place in the poll."""
    choice: Choice


@dataclass(frozen=True)
class JudgeCost:
    """The expense of judgements."""

    verdicts: int
    calls: int
    read: int
    """Tokens."""
    written: int
    cost: float

    @classmethod
    def of(cls, judgements: Sequence[Judgement]) -> Self:
        return cls(
            verdicts=sum(len(judgement.verdicts) for judgement in judgements),
            calls=sum(judgement.calls for judgement in judgements),
            read=sum(judgement.tokens.get("prompt", 0) for judgement in judgements),
            written=sum(judgement.tokens.get("completion", 0) for judgement in judgements),
            cost=sum(judgement.cost for judgement in judgements),
        )

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        paid = f"{self.cost:.4g} in the units of judge.price"
        paid = paid if self.cost else "nothing paid, or no judge.price was given"
        return (
            f"{plural(self.verdicts, 'verdict')} of LLM judges in {plural(self.calls, 'call')}:"
            f" {plural(self.read, 'token')} read, {self.written:,} written; {paid}."
        )


@dataclass(frozen=True)
class Pair:
    """Two replies to the same prompt, to be compared by a person."""

    other: str
    """The player that the candidate is compared with."""
    prompt: int
    own_first: bool
    """True if the candidate's reply is shown first."""


@dataclass
class Poll:
    """Players, in the order in which they were presented, and the votes on them."""

    replies: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    votes: list[Vote] = field(default_factory=list[Vote])

    def present(self, presentation: Presentation) -> None:
        """Add a player; a known one changes nothing."""
        self.replies.setdefault(presentation.player, presentation.replies)

    def score(self, player: str) -> tuple[float, float]:
        """The probability, by all votes so far, that a reply of this player is preferred to one of the first player's,
        to 4 digits, and its standard error. The first player, the reference of all others, has 0.5.
        """
        theta, covariance = strengths(len(self.replies), self._games(self.votes))
        value, error = preference(theta, covariance, [*self.replies].index(player), 0)
        return round(value, 4), round(error, 4)

    def _games(self, votes: Sequence[Vote]) -> list[tuple[int, int, float]]:
        shares = {"own": 1.0, "tie": 0.5, "other": 0.0}
        places = {name: place for place, name in enumerate(self.replies)}
        return [(places[v.player], places[v.other], shares[v.choice]) for v in votes if v.choice in shares]

    def pairs(self, player: str, count: int, seed: int) -> list[Pair]:
        """The comparisons of a player: with the best so far, then with others drawn at random, each on a prompt to
        which the two reply differently. They depend only on earlier players, so they are the same after a stop.
        """
        before = [*self.replies][: [*self.replies].index(player)]
        if not before:
            return []
        draw = random.Random(f"{seed}/{player}/{len(before)}")
        theta, _ = strengths(len(before), self._games([v for v in self.votes if {v.player, v.other} <= {*before}]))
        best = before[int(theta.argmax())]
        rest = [name for name in before if name != best]
        draw.shuffle(rest)
        opponents = [best, *rest]
        found: list[Pair] = []
        for place in range(count):
            other = opponents[place % len(opponents)]
            used = {pair.prompt for pair in found if pair.other == other}
            both = enumerate(zip(self.replies[player], self.replies[other], strict=True))
            if unused := [prompt for prompt, (one, two) in both if one != two and prompt not in used]:
                found.append(Pair(other, draw.choice(unused), draw.random() < 0.5))
        return found

    def left(self, player: str, count: int, seed: int) -> list[Pair]:
        """The pairs that have no vote yet."""
        done = sum(vote.player == player for vote in self.votes)
        return self.pairs(player, count, seed)[done:]


def digest(*parts: object) -> str:
    """A short name that follows from the content."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class ShownPair:
    """A pair as a person sees it."""

    task: str
    prompt: str
    first: str
    second: str
    left: int
    """Votes on this candidate still to come, this one included."""


AskVoter = Callable[[ShownPair], Literal["first", "second", "tie", "skip"]]
"""Asks a person. Raises KeyboardInterrupt when the person wants to stop."""


@dataclass
class VerdictMemory:
    """All statements of a run so far."""

    verdicts: dict[str, Verdict] = field(default_factory=dict[str, Verdict])
    """By their keys."""
    by_task: dict[tuple[str, str], Verdict] = field(default_factory=dict[tuple[str, str], Verdict])
    """By task and key: keys of older logs do not tell judges on several servers apart."""
    polls: dict[str, Poll] = field(default_factory=dict[str, Poll])
    latest: dict[str, Presentation] = field(default_factory=dict[str, Presentation])
    """The last presentation of each task."""
    questions: str = "search"
    """The set that is being scored; new statements are marked with it."""
    ask_voter: AskVoter | None = None
    """Shows a pair of replies to a person and returns the vote; None without a terminal."""
    write: Callable[[Statement], None] | None = None
    """Receives new statements instead of `take`: a log, which has them taken when they are written."""
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered while a judge's answer is awaited: other runs of a comparison may go on meanwhile."""

    def note(self, statement: Statement) -> None:
        """Add a new statement."""
        (self.write or self.take)(statement.model_copy(update={"questions": self.questions}))

    def take(self, statement: object) -> None:
        """Add a statement, new or from a log."""
        match statement:
            case Judgement():
                self.verdicts |= {verdict.key: verdict for verdict in statement.verdicts}
                self.by_task |= {(statement.task, verdict.key): verdict for verdict in statement.verdicts}
            case Presentation():
                self.poll(statement.poll).present(statement)
                self.latest[statement.task] = statement
            case Vote():
                self.poll(statement.poll).votes.append(statement)
            case _:
                raise TypeError(f"{statement} is no statement")

    def poll(self, name: str) -> Poll:
        """The poll of that name; an empty one if it is new."""
        return self.polls.setdefault(name, Poll())

    def standing(self, task: str) -> float | None:
        """The score, by all votes so far, of the last player presented in a task; None if there is none."""
        last = self.latest.get(task)
        return self.poll(last.poll).score(last.player)[0] if last else None
