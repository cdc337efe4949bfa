"""A task that an LLM judges."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmevo.evaluation.judges.client import Asking
from llmevo.evaluation.judges.judge import Judging, Written
from llmevo.evaluation.judges.rubric import Rubric
from llmevo.evaluation.tasks.prompts import Writing, config_of, read_prompts
from llmevo.evaluation.tasks.task import Task
from llmevo.llm.templates import Templates

METRICS = (("judge", True), ("unreadable", False))
"""The mean of the scores, and the share of replies whose verdict could not be read."""


class Judged(Writing):
    """Replies to prompts, each with a score from 0 to 1 by an LLM; see `Judging`."""

    def __init__(self, config: dict[str, Any], judging: Judging, fingerprint: str) -> None:
        super().__init__(config=config)
        self.judging, self.fingerprint = judging, fingerprint
        self.texts = {f"{self.task_name}/{name}": text for name, text in judging.rubric.texts.items()}
        self._scores: dict[tuple[str, ...], float | None] = {}

    def inquiries(self, document: Mapping[str, str]) -> int:
        return 2 if document["reference"] else 1

    def check(self) -> None:
        """Raises ProposerRefused where the judge's server does not answer, or refuses the key."""
        self.judging.asking.check()

    def consider(self, written: list[tuple[Mapping[str, str], str]]) -> None:
        """Raises JudgeError when the judge is lost."""
        replies = [Written(document["prompt"], reply, document["reference"]) for document, reply in written]
        keys = [_key(document, reply) for document, reply in written]
        self._scores = dict(zip(keys, self.judging.scores(replies, self.book), strict=True))

    def result(self, document: Mapping[str, str], replies: Sequence[str]) -> dict[str, float]:
        score = self._scores[_key(document, str(replies[0]))]
        # The lowest grade for what the judge cannot deal with: see `llmevo.evaluation.judges.judge`.
        return {"judge": round(score or 0.0, 4), "unreadable": float(score is None)}


def build_judge(task: Task, root: Path, _: Any) -> Any:
    """The task of a line with `judge:`. Its metric `judge` is the mean over prompts of a score from 0 to 1.

    Raises TaskError for prompts or a rubric that cannot be used, and ProposerRefused where a key is missing.
    """
    assert task.judge
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": better} for name, better in METRICS]
    rows = read_prompts(task.name, root / str(task.prompts))
    rubric = Rubric(task.name, task.judge, root, Templates())
    fingerprint = hashlib.sha256(json.dumps([rubric.texts, rows]).encode()).hexdigest()
    judging = Judging(task.name, Asking(task.name, task.judge, root), rubric)
    return Judged(config_of(task, rows, metrics), judging, fingerprint)


def _key(document: Mapping[str, str], reply: str) -> tuple[str, ...]:
    return document["prompt"], document["reference"], reply
