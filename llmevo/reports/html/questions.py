"""Held-out questions, one by one: what the best merge answers that its best parent did not, and the other way round."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmevo.evaluation.racing import difference
from llmevo.reports.html.subject import Subject


@dataclass(frozen=True)
class Item:
    """A question on which the two differ."""

    task: str
    question: str
    answer: str
    """The right one."""
    best: float
    rival: float
    best_reply: str
    rival_reply: str


@dataclass(frozen=True)
class TaskItems:
    """A task's questions, counted."""

    task: str
    questions: int
    gained: Sequence[Item]
    lost: Sequence[Item]
    difference: float
    """The mean of best minus parent in the counted metric, question by question; more is better."""
    stderr: float
    """Of that difference: smaller than that of either score, for both answer the same questions."""


def items(subject: Subject) -> list[TaskItems]:
    """Task by task; empty where the log does not have the questions, or there is no parent to set beside."""
    best, rival, texts = subject.state.heldout.get("best"), subject.rival, subject.started.texts.get("heldout", {})
    if best is None or rival is None:
        return []
    found: list[TaskItems] = []
    for name, asked in texts.items():
        ours, theirs = best.item_scores.get(name, []), rival.item_scores.get(name, [])
        if not asked or not len(ours) == len(theirs) == len(asked):
            continue
        shown, task = subject.heldout_tasks.get(name, (name, None))  # of a group, one of its tasks
        sign = -1.0 if task and task.weight < 0 else 1.0
        replies = [(of.replies.get(name) or [""] * len(asked)) for of in (best, rival)]
        rows = [
            Item(shown, question, answer, one, other, ours_reply, theirs_reply)
            for (question, answer), one, other, ours_reply, theirs_reply in zip(
                asked, ours, theirs, *replies, strict=True
            )
        ]
        differences = [sign * (row.best - row.rival) for row in rows]
        stderr = difference({name: ours}, {name: theirs}, {name: 1.0}).error
        gained, lost = ([row for row, by in zip(rows, differences, strict=True) if by * way > 0] for way in (1, -1))
        found.append(TaskItems(shown, len(rows), gained, lost, float(np.mean(differences)), stderr))
    return found
