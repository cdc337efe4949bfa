"""A poll: the replies of several candidates to the same prompts, and a person's votes on pairs of them."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llmevo.evaluation.judges.bradley_terry import preference, strengths
from llmevo.evaluation.judges.records import Presentation, Vote

SHARE = {"own": 1.0, "tie": 0.5, "other": 0.0}
"""What a vote gives to the candidate that it is about."""


@dataclass(frozen=True)
class Pair:
    """Two replies to be compared."""

    other: str
    """Whose reply the candidate's is compared with."""
    prompt: int
    own_first: bool
    """Whether the candidate's reply is shown first."""


@dataclass
class Poll:
    """Players, in the order in which they came, and the votes on them."""

    replies: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    votes: list[Vote] = field(default_factory=list[Vote])

    def present(self, presentation: Presentation) -> None:
        """A candidate's replies are put to the vote."""
        self.replies.setdefault(presentation.player, presentation.replies)

    def score(self, player: str) -> tuple[float, float]:
        """The probability, by all votes so far, that a reply of this player is preferred to one of the first player's,
        to 4 digits, and its standard error. 0.5 for the first player, whom all others are measured against.
        """
        places = {name: place for place, name in enumerate(self.replies)}
        theta, covariance = strengths(len(places), self._games(self.votes))
        value, error = preference(theta, covariance, places[player], 0)
        return round(value, 4), round(error, 4)

    def _games(self, votes: Sequence[Vote]) -> list[tuple[int, int, float]]:
        places = {name: place for place, name in enumerate(self.replies)}
        return [(places[v.player], places[v.other], SHARE[v.choice]) for v in votes if v.choice in SHARE]

    def pairs(self, player: str, count: int, seed: int) -> list[Pair]:
        """What is asked about a player: against the best so far, then against others drawn at random, each on a prompt
        to which the two reply differently. Follows from those who came before it, so it is the same after a stop.
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
            asked = {pair.prompt for pair in found if pair.other == other}
            both = enumerate(zip(self.replies[player], self.replies[other], strict=True))
            if open_ := [prompt for prompt, (one, two) in both if one != two and prompt not in asked]:
                found.append(Pair(other, draw.choice(open_), draw.random() < 0.5))
        return found

    def left(self, player: str, count: int, seed: int) -> list[Pair]:
        """The pairs that nobody was asked about yet."""
        done = sum(vote.player == player for vote in self.votes)
        return self.pairs(player, count, seed)[done:]


def digest(*parts: object) -> str:
    """A name for what is in it."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Showing:
    """What a person is shown."""

    task: str
    prompt: str
    first: str
    second: str
    left: int
    """Votes on this candidate still to come, this one included."""


AskVoter = Callable[[Showing], Literal["first", "second", "tie", "skip"]]
"""Asks a person. Raises KeyboardInterrupt when the person wants to stop."""
