"""The dense proxy: how probable a model finds the right answer, in place of whether it finds it the likeliest.

Of a question with choices that is the softmax of their log-likelihoods. It moves where the answer stays the same, so
two merges can be told apart by fewer questions: on the quickstart's its differences vary half as much. But it is
another aim than the metric, and a model may be sure of fewer answers and right more often. So it is for screening
only, and only as long as both rank the candidates of the run alike.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy  # its parts are opened when they are used

from llmevo.evaluation.score import Score
from llmevo.evaluation.standard_errors import ItemScores

METRICS = ("acc", "acc_norm")
"""Whether the right choice is the likeliest, and the same by the likelihood of a character."""


AGREEING = 0.5
"""The rank correlation that can at least be believed in."""


def probability(leaf: Any, sample: Mapping[str, Any], metric: str) -> float | None:
    """Of the right choice in one of lm-eval's samples; None where there is no such thing."""
    if leaf.OUTPUT_TYPE != "multiple_choice" or metric not in METRICS or getattr(leaf, "multiple_input", False):
        return None
    choices, found, target = leaf.doc_to_choice(sample["doc"]), sample["filtered_resps"], sample["target"]
    place = choices.index(target) if target in choices else target
    if len(found) != len(choices) or not isinstance(place, int) or not 0 <= place < len(choices):
        return None
    likelihoods = np.array([likelihood for likelihood, _ in found])
    if metric == "acc_norm":
        lengths = np.array([len(choice) for choice in choices], dtype=float)
        likelihoods *= lengths.mean() / lengths
    return round(float(scipy.special.softmax(likelihoods)[place]), 4)


def answers(score: Score) -> ItemScores:
    """What a candidate is compared by: probabilities where there are any, else the metric."""
    return {**score.item_scores, **score.item_probabilities}


def worth(score: Score, weights: Mapping[str, float]) -> float:
    """The objective, by the proxy."""
    return _total(answers(score), weights)


def holds(scores: Sequence[Score], weights: Mapping[str, float]) -> bool:
    """Whether it ranks candidates as the metrics do, each on the questions that it was asked: the lower end of a
    one-sided 95 % interval of Spearman's correlation is above `AGREEING` (its variance: Bonett and Wright 2000,
    https://doi.org/10.1007/BF02294183). Five candidates whose ranks are the same are enough; without probabilities
    it does not hold.
    """
    some = [score for score in scores if score.item_probabilities]
    if len(some) < 5:
        return False
    true = [_total(score.item_scores, weights) for score in some]
    dense = [worth(score, weights) for score in some]
    if min(map(len, ({*true}, {*dense}))) < 2:
        return False
    correlation = float(scipy.stats.spearmanr(true, dense).statistic)
    error = math.sqrt((1 + correlation**2 / 2) / (len(some) - 3))
    return math.atanh(min(correlation, 0.999)) - scipy.special.ndtri(0.95) * error > math.atanh(AGREEING)


def _total(of: ItemScores, weights: Mapping[str, float]) -> float:
    return sum(weight * float(np.mean(of[task])) for task, weight in weights.items())
