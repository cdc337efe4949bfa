"""A task that a person votes on.

A vote is on a pair of replies, so a candidate's score is no mean over questions: it hangs on whom it was compared
with, and on all other votes. Everything is therefore done where the replies of a candidate are complete, and lm-eval is
handed the result for every question, to be taken over as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from llmevo.errors import TaskError
from llmevo.evaluation.judges.poll import Pair, Poll, Showing, digest
from llmevo.evaluation.judges.records import Choice, Presentation, Vote
from llmevo.evaluation.tasks.prompts import Writing, config_of, read_prompts
from llmevo.evaluation.tasks.task import Task


class Voted(Writing):
    """Replies to prompts, with one score for all of them by a person's votes; see `Poll`."""

    def __init__(self, config: dict[str, Any], pairs: int) -> None:
        super().__init__(config=config)
        self.pairs = pairs
        self._score = 0.0, 0.0

    def consider(self, written: list[tuple[Mapping[str, str], str]]) -> None:
        """Raises TaskError when there is nobody to ask, and KeyboardInterrupt when the person has had enough."""
        prompts = [document["prompt"] for document, _ in written]
        replies = [reply for _, reply in written]
        name, player = digest(self.task_name, prompts), digest(replies)
        poll = self.book.poll(name)
        known = player in poll.replies
        self.book.note(Presentation(task=self.task_name, poll=name, player=player, replies=[] if known else replies))
        left = poll.left(player, self.pairs, self.seed)
        for place, pair in enumerate(left):
            choice = self._ask(poll, player, pair, prompts[pair.prompt], len(left) - place)
            self.book.note(
                Vote(task=self.task_name, poll=name, player=player, other=pair.other, prompt=pair.prompt, choice=choice)
            )
        self._score = poll.score(player)

    def _ask(self, poll: Poll, player: str, pair: Pair, prompt: str, left: int) -> Choice:
        if self.booth is None:
            raise TaskError(
                f"tasks: {self.task_name} is voted on by a person, and there is no terminal to ask in; run it in one"
            )
        names = [player, pair.other] if pair.own_first else [pair.other, player]
        first, second = (poll.replies[name][pair.prompt] for name in names)
        chosen = self.booth(Showing(self.task_name, prompt, first, second, left))
        if chosen in ("tie", "skip"):
            return chosen
        return "own" if (chosen == "first") == pair.own_first else "other"

    def result(self, document: Mapping[str, str], replies: Sequence[str]) -> dict[str, Any]:
        return {"votes": self._score, "votes_stderr": self._score}


def build_votes(task: Task, root: Path, _: Any) -> Any:
    """The task of a line with `votes:`. Its metric `votes` is the probability that a reply of the candidate is
    preferred to one of the first candidate's. Raises TaskError for prompts that cannot be used.
    """
    assert task.votes
    metrics = [
        {"metric": name, "aggregation": taken(place), "higher_is_better": not place}
        for place, name in enumerate(("votes", "votes_stderr"))  # lm-eval's name for a standard error
    ]
    rows = read_prompts(task.name, root / str(task.prompts))
    return Voted(config_of(task, rows, metrics), task.votes.pairs)


def taken(place: int) -> Callable[[Sequence[Any]], float]:
    """An aggregation that takes over what all questions have."""

    def take(values: Sequence[Any]) -> float:
        return cast(float, values[0][place])

    return take
