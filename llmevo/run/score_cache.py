"""The scores that are known: what one run has scored is not scored again, by it or by others that share its scorer."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from llmevo.evaluation.score import Score
from llmevo.merging.recipe import Recipe
from llmevo.run.log.state import RunState


class ScoreCache:
    """Scores by the run and `cache_key`; of a stopped candidate those on the questions that it was asked."""

    def __init__(self) -> None:
        self.by_run: dict[tuple[str, str], Score] = {}
        """{(run, key): the run's own score}"""
        self.by_items: dict[str, dict[int, Score]] = {}
        """{key: {number of questions: the score of any run}}"""

    def of_all(self, key: str) -> list[Score]:
        """Return the scores of all runs, the one on most questions first."""
        return sorted(self.by_items.get(key, {}).values(), key=lambda score: score.items, reverse=True)

    def keep(self, run: str, key: str, score: Score) -> None:
        """Keep a run's score, in place of its earlier one."""
        self.by_run[run, key] = score
        self.by_items.setdefault(key, {})[score.items] = score

    def take_over(self, state: RunState, checksums: Mapping[str, str], run: str) -> None:
        """Keep the scores of a run's log. `checksums` are those of its models. Scores of other models or questions have
        other keys.
        """
        for key, score in _recorded(state, checksums):
            self.by_items.setdefault(key, {}).setdefault(score.items, score)
            own = self.by_run.get((run, key))
            if own is None or own.items < score.items:
                self.by_run[run, key] = score


def _recorded(state: RunState, checksums: Mapping[str, str]) -> Iterator[tuple[str, Score]]:
    """Yield the key and the score of all that a log has scores of."""
    started = state.started
    assert started

    def known(candidate: int, score: Score, questions: str, quantize: str) -> tuple[str, Score]:
        recipe = Recipe.model_validate(state.recipes[candidate])
        asked, searched = started.questions[questions], started.questions.get("search", "")
        return cache_key(recipe, checksums, asked, started.masks, quantize, searched), score

    for candidate, trial in state.trials.items():
        if trial.score and (trial.score.items == started.items or trial.score.item_scores):
            yield known(candidate, trial.score, "search", state.search_format)
    for candidate, event in state.selected.items():
        yield known(candidate, event.read(), "selection", event.quantized)
    for (candidate, questions), event in state.served.items():
        yield known(candidate, event.read(), questions, event.quantized)
    for row in state.heldout.values():
        if row.candidate is not None:
            yield known(row.candidate, row.read(), "heldout", row.quantized)


def cache_key(
    recipe: Recipe,
    checksums: Mapping[str, str],
    questions: str,
    seed: int,
    quantize: str = "",
    searched: str = "",
) -> str:
    """Return a digest of all that decides a score: the recipe, its models' weights, the seed of its random masks, the
    questions, the format that its weights are rounded to, and the search questions where a preparation reads them.
    """
    read = searched if recipe.prepare and recipe.prepare.reads_text else ""
    weights = {str(reference): checksums[str(reference)] for reference in recipe.references}
    return digest(recipe.as_dict(), weights, questions, seed, *filter(None, [quantize, read]))


def digest(*parts: Any) -> str:
    """Return the checksum of some values as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
