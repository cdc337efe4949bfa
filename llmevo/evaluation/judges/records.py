"""What judges and voters say, as the log has it."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from llmevo.errors import plural

Choice = Literal["own", "other", "tie", "skip"]
"""Which of two replies is better; `own` is that of the candidate that is voted on. Nothing follows from `skip`."""


class Statement(BaseModel):
    """What every one of them has."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    task: str
    questions: str = "search"
    """Which set was scored: `search`, `selection` or `heldout`."""


class Verdict(BaseModel):
    """What an LLM says of a reply, or of two."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    key: str
    """A digest of the judge's model and all that it was shown."""
    value: float
    """0 (the worst grade, or the second reply is better) to 1 (the best grade, or the first is better)."""
    reason: str = ""
    """Why, in its own words, shortened."""
    replies: list[str] = Field(default_factory=list[str])
    """What it judged, shortened; empty in older logs."""


class Judgement(Statement):
    """Verdicts that an LLM has just given, and what they took."""

    model: str
    verdicts: list[Verdict]
    """Without those that could not be read."""
    calls: int
    """Answers asked for, repairs included."""
    tokens: dict[str, int]
    """`prompt` and `completion`."""
    cost: float
    problems: list[str] = Field(default_factory=list[str])
    """What was wrong with answers, and what was done about it."""


@dataclass(frozen=True)
class Bill:
    """What judgements took."""

    verdicts: int
    calls: int
    read: int
    """Tokens."""
    written: int
    cost: float

    @classmethod
    def of(cls, judgements: Sequence[Judgement]) -> Self:
        return cls(
            verdicts=sum(len(said.verdicts) for said in judgements),
            calls=sum(said.calls for said in judgements),
            read=sum(said.tokens.get("prompt", 0) for said in judgements),
            written=sum(said.tokens.get("completion", 0) for said in judgements),
            cost=sum(said.cost for said in judgements),
        )

    def __add__(self, other: Self) -> Self:
        mine, theirs = astuple(self), astuple(other)
        return type(self)(*(one + another for one, another in zip(mine, theirs, strict=True)))

    def __str__(self) -> str:
        paid = f"{self.cost:.4g} in the units of judge.price"
        paid = paid if self.cost else "nothing paid, or no judge.price was given"
        return (
            f"{plural(self.verdicts, 'verdict')} of LLM judges in {plural(self.calls, 'call')}:"
            f" {plural(self.read, 'token')} read,"
            f" {self.written:,} written; {paid}."
        )


class Presentation(Statement):
    """A candidate's replies are put to the vote."""

    poll: str
    """A digest of the task and its prompts: votes on other prompts are another poll."""
    player: str
    """A digest of the replies: candidates that reply alike are one player."""
    replies: list[str]
    """In the order of the prompts; empty for a player that is known already."""


class Vote(Statement):
    """What a person thinks of two replies."""

    poll: str
    player: str
    other: str
    """The player it was compared with."""
    prompt: int
    """Its place in the poll."""
    choice: Choice
