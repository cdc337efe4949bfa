"""The raw responses of a model to lm-eval's requests: recorded in one process, to be scored in another.

A worker has no keys of judges, writes no log and shows nothing to a person. So where replies are to be judged, it sends
what its model answered, and the run computes the score of that as if the model was here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Unjudged(BaseException):
    """Raised where replies would be judged that are judged elsewhere. lm-eval comes there after its last request."""


@dataclass(frozen=True)
class Responses:
    """What a model answered to one block of questions."""

    items: int
    """Questions."""
    answers: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, Sequence[Any]])
    """{kind of request: the response to each, in the order of lm-eval's}."""
