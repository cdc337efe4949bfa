"""The dense proxy: probabilities of right answers race candidates while they rank them as the metrics do."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from test_racing import WIDE, config, evaluated
from workspace import Workspace

from llmevo.config import read_config
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.racing_proxy import holds, probability
from llmevo.evaluation.score import Score
from llmevo.merging.recipe import Recipe
from llmevo.run.scorer import Scorer

WEIGHTS = {"sums": 1.0}


def score(right: Sequence[float], probable: Sequence[float]) -> Score:
    return Score(float(np.mean(right)), 0.0, {}, len(right), {"sums": right}, {}, {"sums": probable})


def field(agreement: float, count: int = 20) -> list[Score]:
    """Candidates whose probabilities follow their metric that much."""
    random = np.random.default_rng(1)
    found: list[Score] = []
    for level in np.linspace(0.2, 0.8, count):
        seen = agreement * level + (1 - agreement) * random.random()
        found.append(score([float(x) for x in random.random(200) < level], [float(seen)] * 200))
    return found


def test_it_holds_as_long_as_it_ranks_candidates_as_the_metric_does() -> None:
    assert holds(field(1.0), WEIGHTS)
    assert not holds(field(0.0), WEIGHTS)
    assert not holds(field(1.0)[::6], WEIGHTS)  # four are too few
    upside_down = [
        score(one.item_scores["sums"], [1 - x for x in one.item_probabilities["sums"]]) for one in field(1.0)
    ]
    assert not holds(upside_down, WEIGHTS)
    equal = [score([1.0, 0.0], [0.5, 0.5])] * 10
    assert not holds(equal, WEIGHTS)
    without = [Score(one.total, 0.0, {}, one.items, one.item_scores) for one in field(1.0)]
    assert not holds(without, WEIGHTS)


class _Leaf:
    OUTPUT_TYPE = "multiple_choice"

    @staticmethod
    def doc_to_choice(_: object) -> list[str]:
        return ["a", "bbb"]


def test_a_probability_is_the_softmax_over_the_choices() -> None:
    sample = {"doc": {}, "filtered_resps": [(-1.0, True), (-2.0, False)], "target": 1}
    assert probability(_Leaf, sample, "acc") == pytest.approx(1 / (1 + math.e), abs=1e-4)
    assert probability(_Leaf, {**sample, "target": "bbb"}, "acc") == probability(_Leaf, sample, "acc")
    # -1 and -2 nats a character's share of two: -2 and -4/3
    assert probability(_Leaf, sample, "acc_norm") == pytest.approx(1 / (1 + math.exp(-2 / 3)), abs=1e-4)
    assert probability(_Leaf, {**sample, "target": [0, 1]}, "acc") is None
    assert probability(_Leaf, sample, "f1") is None


def test_a_run_is_raced_by_it_and_whoever_is_stopped_stays_behind(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmevo.evaluation.racing_proxy.AGREEING", -0.9)  # random weights agree by chance only
    search = {"budget": 24, "racing": {"error_rate": 0.4, "looks": 3, "proxy": True}}
    given = config(workspace, genome=WIDE, search=search, heldout=None)
    status, printed = workspace.llmevo("run", given, "--out", "run")
    assert status == 0, printed
    state, found = workspace.state("run"), evaluated(workspace)
    assert all(len(event.item_probabilities["many"]) == event.items for event in found)
    stopped = [event for event in found if event.proxy]
    assert stopped
    for event in stopped:
        rival = state.trials[event.rival or 0]
        assert event.score < rival.value
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0
    scorer = Scorer(read_config(given), workspace.root)
    scorer.remember(state)
    assert (
        scorer.score(Recipe.model_validate(state.recipes[stopped[0].candidate]))[0].items == 60
    )  # it goes on from there


def test_where_it_says_another_than_the_metric_of_the_questions_asked_nobody_is_stopped(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(read_config(config(workspace, search={"racing": {"looks": 3, "proxy": True}})), workspace.root)
    evaluator: Evaluator = scorer.evaluator
    monkeypatch.setattr("llmevo.evaluation.evaluator.is_beaten", lambda *_: True)

    def made(right: float, probable: float, items: int) -> Score:
        return Score(right, 0.0, {}, items, {"many": [right] * items}, {}, {"many": [probable] * items})

    best = made(0.5, 0.9, 60)
    assert evaluator.stopped(made(0.6, 0.1, 20), [best], 0.05) is None
    seen: list[object] = []
    monkeypatch.setattr("llmevo.evaluation.evaluator.is_beaten", lambda own, *_: seen.append(own["many"][0]) or True)
    behind = evaluator.stopped(made(0.4, 0.1, 20), [best], 0.05)
    assert behind
    assert behind.total == pytest.approx(0.4)
    without = replace(made(0.4, 0.1, 20), item_probabilities={})  # of a log of before it was asked for
    assert evaluator.stopped(without, [best], 0.05)
    assert seen == [0.1, 0.4]
