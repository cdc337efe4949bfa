"""What a logged score has to be: recomputed from the tasks, the votes and the rival it was compared with."""

import math
from collections.abc import Mapping

from llmevo import events
from llmevo.journal import Journal
from llmevo.racing import difference
from llmevo.trial import Trial


def check_score(
    journal: Journal, event: events.Evaluated, rival: Trial | None, counted: Mapping[str, tuple[float, str]]
) -> None:
    """Of a candidate that was stopped, the rival's score and the difference on what both were asked."""
    if event.rival is None:
        check_sum(journal, event, counted)
        return
    journal.expect(event, rival=rival.candidate.id if rival else None)
    assert rival
    assert rival.score
    weights = {task: weight for task, (weight, _) in counted.items()}
    journal.expect(
        event, score=rival.score.total + difference(event.item_scores, rival.score.item_scores, weights).mean
    )


def check_sum(journal: Journal, event: events.Scored, counted: Mapping[str, tuple[float, str]]) -> None:
    """A score is the weighted sum of its tasks' metrics: see `weigh`."""
    total, book = 0.0, journal.state.book
    for task, (weight, metric) in counted.items():
        standing = None if event.cached else book.standing(task)
        if standing is not None and event.tasks[task][metric] != standing:
            raise journal.broken(f"{task} is {event.tasks[task][metric]} in the log and {standing} by its votes")
        total += weight * event.tasks.get(task, {}).get(metric, math.nan)
    if math.isfinite(total):
        journal.expect(event, score=total)
