"""Standard errors, against simulation and what is known of them."""

import math

import numpy as np
import pytest

from llmevo.evaluation.questions import clusters, clusters_of_texts
from llmevo.evaluation.racing import difference
from llmevo.evaluation.score import aggregate
from llmevo.evaluation.standard_errors import distinct, of_mean, one_after_another, unit
from llmevo.evaluation.tasks.task import Task

Answers = dict[str, list[float]]


def stated_and_true(
    sizes: dict[str, int], noise: dict[str, float], weights: dict[str, float], scale: dict[str, float]
) -> tuple[float, float]:
    """The standard error of a paired difference, root mean square over many draws, and what it should be."""
    random = np.random.default_rng(0)
    errors, means = list[float](), list[float]()
    for _ in range(2000):
        one, other = (
            {task: [*(scale[task] * noise[task] * random.standard_normal(size))] for task, size in sizes.items()}
            for _ in range(2)
        )
        found = difference(one, other, weights)
        errors.append(found.error)
        means.append(found.mean)
    return math.sqrt(np.mean(np.square(errors))), float(np.std(means))


def test_a_small_task_that_varies_more_than_a_large_one_is_not_hidden_by_it() -> None:
    sizes, noise = {"small": 50, "large": 1000}, {"small": 0.6, "large": 0.1}
    stated, true = stated_and_true(sizes, noise, {"small": 0.5, "large": 0.5}, {"small": 1.0, "large": 1.0})
    assert stated == pytest.approx(true, rel=0.1)


def test_the_unit_of_a_task_does_not_matter() -> None:
    sizes, noise = {"small": 50, "large": 200}, {"small": 0.5, "large": 0.5}
    stated, true = stated_and_true(sizes, noise, {"small": -0.001, "large": 0.5}, {"small": 1000.0, "large": 1.0})
    assert stated == pytest.approx(true, rel=0.1)


def test_questions_that_two_tasks_ask_count_once() -> None:
    random = np.random.default_rng(1)
    weights = {"one": 0.5, "two": 0.5}
    texts = {task: [(f"question {i}", task) for i in range(100)] for task in weights}
    stated, means = list[float](), list[float]()
    for _ in range(1000):
        gaps = random.integers(-1, 2, 100).astype(float)
        own, rival = ({task: [*(sign * gaps / 2)] for task in weights} for sign in (1, -1))
        found = difference(own, rival, weights, clusters_of_texts(texts))
        stated.append(found.error)
        means.append(found.mean)
    assert np.mean(stated) == pytest.approx(np.std(means), rel=0.05)


def test_answers_to_the_same_question_are_counted_in_words() -> None:
    texts = {"one": [("1 + 1 =", "2"), ("2 + 2 =", "4")], "two": [("1 +  1 =", " two"), ("3 + 3 =", "6")]}
    assert distinct(clusters_of_texts(texts)) == 3
    assert distinct(clusters_of_texts({"untold": [("", "a"), ("", "b")]})) == 2


def test_equal_texts_with_other_choices_are_other_questions() -> None:
    which, longer = "Which is correct?", "Read this. " * 100
    asked = [
        ("chosen", which, ("2 + 2 = 4", "2 + 2 = 5")),
        ("chosen", which, ("It rains.", "It rain.")),
        ("chosen", which, ("It rain.", "It rains.")),
        ("chosen", f"One. {longer}", ("yes", "no")),
        ("chosen", f"Two. {longer}", ("yes", "no")),
        ("chosen", "7 * 8 =", ("54", "56")),
        ("written", "7 * 8 =", ()),
    ]
    assert clusters(asked) == {"chosen": [0, 1, 1, 2, 3, 4], "written": [4]}


def test_the_numbers_of_several_sets_of_questions_do_not_meet() -> None:
    sets = [{"a": [0, 1], "b": [1]}, {"a": [0], "b": [0, 1]}, {}]
    assert one_after_another(sets) == {"a": [0, 1, 2], "b": [1, 2, 3]}


@pytest.mark.parametrize(("right", "of"), [(0, 8), (8, 8), (0, 1), (3, 8)])
def test_a_share_is_never_certain(right: int, of: int) -> None:
    answers = [1.0] * right + [0.0] * (of - right)
    share = (right + 0.5) / (of + 1)
    assert of_mean(answers) == pytest.approx(math.sqrt(share * (1 - share) / (of + 1)))
    score = aggregate([Task(name="t")], {"t": {"acc,none": right / of, "acc_stderr,none": 0.0}}, of, {"t": answers})
    assert score.stderr == score.tasks["t"]["acc_stderr,none"] == of_mean(answers) > 0


def test_a_scores_error_knows_the_questions_that_two_tasks_ask() -> None:
    random = np.random.default_rng(2)
    answers = [float(x) for x in random.random(400) < 0.3]
    tasks = [Task(name="one", weight=0.5), Task(name="two", weight=0.5)]
    results = {task.name: {"acc,none": 0.3} for task in tasks}
    same = clusters_of_texts({task.name: [(f"{i}", "") for i in range(400)] for task in tasks})
    both = aggregate(tasks, results, 800, {task.name: answers for task in tasks}, same)
    alone = aggregate(tasks, results, 800, {task.name: answers for task in tasks})
    assert both.stderr == pytest.approx(of_mean(answers), rel=0.01)
    assert alone.stderr == pytest.approx(of_mean(answers) / math.sqrt(2), rel=0.01)


def test_other_metrics_have_the_standard_error_of_a_mean() -> None:
    assert of_mean([2.0, 4.0, 9.0]) == pytest.approx(np.std([2, 4, 9], ddof=1) / math.sqrt(3))
    assert of_mean([2.0]) == 0


def test_the_size_of_an_unlike_answer_is_the_metrics_own() -> None:
    assert unit([[1, 0, 1, 0], [1, 1, 1], [0, 0, 1, 0]]) == 1
    assert unit([[10, 20, 30], [13, 20]]) == 3
    assert unit([[10, 20, 30], [10, 20, 30]]) == 20
    assert unit([[5, 5], [5, 5]]) == 1


def test_a_task_that_asks_its_questions_again_has_their_error() -> None:
    once = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    task, metric = Task(name="sums", metric="acc,none"), "acc_stderr,none"
    results = {"sums": {"acc,none": 0.5}}
    single = aggregate([task], results, 6, {"sums": once})
    again = aggregate([task], results, 24, {"sums": once * 4}, {"sums": [*range(6)] * 4})
    assert again.tasks["sums"][metric] == again.stderr
    assert again.stderr == pytest.approx(single.stderr, rel=0.1)
    assert aggregate([task], results, 24, {"sums": once * 4}).stderr < 0.6 * again.stderr
