"""Scoring on lm-eval's tasks: the same numbers as lm-eval, and mistakes found before the first candidate."""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import lm_eval
import pytest
from lm_eval.api import metrics
from lm_eval.tasks import TaskManager

from llmevo.engines.scoring.hf import HfScorer
from llmevo.errors import CandidateError, TaskError
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.score import Score, aggregate, concatenate, logged, pooled
from llmevo.evaluation.standard_errors import of_mean
from llmevo.evaluation.tasks.task import AskingOptions, Task
from support.tasks import GENERATION, ROWS, add_task, asked
from support.tiny_model import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("cached")


def evaluator(folder: Path, *tasks: Task, **protocol: Any) -> Evaluator:
    options: dict[str, Any] = {"apply_chat_template": False, **protocol}
    return Evaluator(tasks, AskingOptions(**options), [folder])


def by_lm_eval(folder: Path, lm: Any, *names: str, **options: Any) -> Mapping[str, Mapping[str, Any]]:
    """lm-eval's own results."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        simple_evaluate: Any = lm_eval.simple_evaluate
        found: Any = simple_evaluate(
            model=lm, tasks=[*names], task_manager=manager, bootstrap_iters=100, log_samples=False, **options
        )
    return found["results"]


# Scores


def test_scores_are_those_of_lm_eval(tmp_path: Path, lm: HfScorer) -> None:
    sums = add_task(tmp_path, "sums")
    said = add_task(tmp_path, "said", **GENERATION).model_copy(update={"metric": "exact_match,none"})
    results = by_lm_eval(tmp_path, lm, "sums", "said")
    score = evaluator(tmp_path, sums, said).score(lm)
    assert score.tasks["sums"]["acc,none"] == results["sums"]["acc,none"]
    assert score.tasks["said"]["exact_match,none"] == results["said"]["exact_match,none"]
    assert score.total == results["sums"]["acc,none"] + results["said"]["exact_match,none"]
    assert score.tasks["sums"]["acc_stderr,none"] == pytest.approx(results["sums"]["acc_stderr,none"], rel=0.05)
    assert results["said"]["exact_match_stderr,none"] == 0  # none of them right; that is no certainty
    assert score.stderr == pytest.approx(math.hypot(*(of_mean(own) for own in score.item_scores.values())))
    assert 0 < score.tasks["sums"]["acc,none"] < 1
    assert score.items == 40


def test_errors_that_need_resamples_are_those_of_lm_eval_without_a_fork_or_a_word(
    tmp_path: Path, lm: HfScorer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    own: Any = metrics._bootstrap_internal_no_mp  # pyright: ignore[reportPrivateUsage]
    listed = [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ]
    task = add_task(
        tmp_path, "words", output_type="loglikelihood", doc_to_target="x", doc_to_choice=None, metric_list=listed
    )
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "bootstrap_stderr", lambda f, xs, iters: metrics.sample_stddev(own(f, xs, iters)))
        results = by_lm_eval(tmp_path, lm, "words")
    capfd.readouterr()
    monkeypatch.setattr("os.fork", None)
    score = evaluator(tmp_path, task).score(lm)
    for key in ("perplexity,none", "perplexity_stderr,none"):
        assert score.tasks["words"][key] == pytest.approx(results["words"][key])
    assert score.tasks["words"]["perplexity_stderr,none"] > 0
    assert capfd.readouterr().out == ""


def test_values_of_small_numbers_keep_their_order() -> None:
    assert [logged(value) for value in (0.333333, 1.0, 0.00002, 0.0000251234)] == [0.3333, 1.0, 0.00002, 0.00002512]


def test_a_generated_answer_that_is_right_counts(tmp_path: Path, lm: HfScorer) -> None:
    instance: Any = type("Request", (), {"args": ("0 + 0 =", GENERATION["generation_kwargs"])})
    (answer,) = lm.generate_until([instance])
    rows = [
        {"question": "0 + 0 =", "choices": [answer], "answer": 0},
        {"question": "1 + 1 =", "choices": ["x"], "answer": 0},
    ]
    add_task(tmp_path, "said", rows, **GENERATION)
    assert evaluator(tmp_path, Task(name="said", metric="exact_match,none")).score(lm).total == 0.5


def test_the_chat_template_and_solved_examples_are_asked_as_by_lm_eval(tmp_path: Path, lm: HfScorer) -> None:
    sums = add_task(tmp_path, "sums", fewshot_split="test")
    options: dict[str, Any] = {"apply_chat_template": True, "num_fewshot": 2}
    results = by_lm_eval(tmp_path, lm, "sums", fewshot_as_multiturn=True, fewshot_random_seed=3, **options)
    score = evaluator(tmp_path, sums, seed=3, fewshot_as_multiturn=True, **options).score(lm)
    assert score.tasks["sums"]["acc,none"] == results["sums"]["acc,none"]


def test_the_total_weighs_the_tasks_and_lower_is_better_with_a_negative_weight(tmp_path: Path, lm: HfScorer) -> None:
    add_task(tmp_path, "sums")
    add_task(tmp_path, "more", ROWS[::-1][:7])
    tasks = [Task(name="sums", weight=2.0), Task(name="more", weight=-0.5)]
    score = evaluator(tmp_path, *tasks).score(lm)
    values = [score.tasks[name]["acc,none"] for name in ("sums", "more")]
    errors = [score.tasks[name]["acc_stderr,none"] for name in ("sums", "more")]
    assert score.total == pytest.approx(2 * values[0] - 0.5 * values[1])
    assert score.stderr == pytest.approx(math.hypot(2 * errors[0], 0.5 * errors[1]))


def test_scoring_again_gives_the_same_score(tmp_path: Path, lm: HfScorer) -> None:
    scoring = evaluator(tmp_path, add_task(tmp_path, "sums"), limit=9, shuffle=True)
    assert scoring.score(lm) == scoring.score(lm)


def test_requests_are_built_once(tmp_path: Path, lm: HfScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = add_task(tmp_path, "sums", fewshot_split="test")
    said = add_task(tmp_path, "said", fewshot_split="test", **GENERATION).model_copy(
        update={"metric": "exact_match,none"}
    )
    made = evaluator(tmp_path, sums, said, num_fewshot=2)
    first = made.score(lm)

    def fewshot_context(*_: Any, **__: Any) -> str:
        raise AssertionError("a request was built again")

    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.fewshot_context", fewshot_context)
    assert made.score(lm) == first


def test_every_candidate_sees_the_same_solved_examples(tmp_path: Path, lm: HfScorer) -> None:
    sums = add_task(tmp_path, "sums", fewshot_split="test")
    scoring = evaluator(tmp_path, sums, num_fewshot=2, seed=3)
    seen: list[list[tuple[Any, ...]]] = []

    class Watched:
        """The model, with what it is asked."""

        def __getattr__(self, name: str) -> Any:
            return getattr(lm, name)

        def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            seen.append([request.args for request in requests])
            return lm.loglikelihood(requests)

    for _ in range(2):
        watched: Any = Watched()
        scoring.score(watched)
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_a_group_is_scored_by_what_it_aggregates(tmp_path: Path, lm: HfScorer) -> None:
    add_task(tmp_path, "one", ROWS[:5])
    add_task(tmp_path, "two", ROWS[5:])
    group = {
        "group": "all_sums",
        "task": ["one", "two"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "all_sums.yaml").write_text(json.dumps(group))
    whole = evaluator(tmp_path, add_task(tmp_path, "sums")).score(lm)
    score = evaluator(tmp_path, Task(name="all_sums")).score(lm)
    assert score.total == pytest.approx(whole.total)
    assert score.items == 20


def test_every_question_has_its_score_its_text_and_its_reply(tmp_path: Path, lm: HfScorer) -> None:
    sums = add_task(tmp_path, "sums")
    said = add_task(tmp_path, "said", **GENERATION).model_copy(update={"metric": "exact_match,none"})
    scoring = evaluator(tmp_path, sums, said, limit=7, shuffle=True)
    score, texts = scoring.score(lm), scoring.texts()
    for task, metric in (("sums", "acc,none"), ("said", "exact_match,none")):
        assert len(score.item_scores[task]) == len(score.replies[task]) == len(texts[task]) == 7
        assert sum(score.item_scores[task]) / 7 == pytest.approx(score.tasks[task][metric])
    for (_, right), reply, value in zip(texts["sums"], score.replies["sums"], score.item_scores["sums"], strict=True):
        assert (reply == right) == bool(value)
    assert [text for text, _ in texts["sums"]] == asked(scoring)[:7]


def test_a_groups_tasks_are_kept_question_by_question(tmp_path: Path, lm: HfScorer) -> None:
    add_task(tmp_path, "one", ROWS[:5])
    add_task(tmp_path, "two", ROWS[5:])
    group = {"group": "all_sums", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "all_sums.yaml").write_text(json.dumps(group))
    scoring = evaluator(tmp_path, Task(name="all_sums"))
    score = scoring.score(lm)
    assert {task: len(values) for task, values in score.item_scores.items()} == {"one": 5, "two": 15}
    assert scoring.groups == {"all_sums": {"one": 0.25, "two": 0.75}}
    shares = scoring.groups["all_sums"]
    assert sum(share * fmean(score.item_scores[task]) for task, share in shares.items()) == pytest.approx(score.total)
    unweighted = {"metric": "acc", "weight_by_size": False}
    (tmp_path / "all_sums.yaml").write_text(json.dumps({**group, "aggregate_metric_list": [unweighted]}))
    assert evaluator(tmp_path, Task(name="all_sums")).groups == {"all_sums": {"one": 0.5, "two": 0.5}}


def test_a_metric_that_no_question_has_is_not_kept(tmp_path: Path, lm: HfScorer) -> None:
    perplexity = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    text = add_task(
        tmp_path,
        "text",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_choice=None,
        doc_to_target="{{question}}",
        metric_list=[perplexity],
    )
    score = evaluator(tmp_path, text.model_copy(update={"metric": "word_perplexity,none"})).score(lm)
    assert score.total > 1
    assert score.item_scores == {}


def test_parts_together_are_the_whole(tmp_path: Path, lm: HfScorer) -> None:
    sums = add_task(tmp_path, "sums", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}])
    said = add_task(tmp_path, "said", ROWS[:13], **GENERATION).model_copy(
        update={"metric": "exact_match,none", "weight": 0.3}
    )
    whole = evaluator(tmp_path, sums, said).score(lm)
    parted = evaluator(tmp_path, sums, said, blocks=5)
    parts = [parted.score_block(lm, place) for place in range(5)]
    assert [part.items for part in parts] == [7, 7, 7, 6, 6]
    again = concatenate(parted.tasks, parts)
    assert again.total == pytest.approx(whole.total)
    assert again.stderr == pytest.approx(whole.stderr)
    assert again.tasks["sums"]["acc_norm,none"] == pytest.approx(whole.tasks["sums"]["acc_norm,none"])
    assert parted.score(lm) == again
    places = [place for block in parted.blocks for place in block["sums"]]
    assert again.item_scores["sums"] == [whole.item_scores["sums"][place] for place in places]
    assert again.replies["sums"] == [whole.replies["sums"][place] for place in places]
    assert parted.texts()["sums"] == [evaluator(tmp_path, sums).texts()["sums"][place] for place in places]
    assert parted.digest == evaluator(tmp_path, sums, said).digest


def test_on_two_sets_of_questions_every_question_of_a_task_counts_alike() -> None:
    tasks = [Task(name="many", weight=1.0), Task(name="few", weight=-0.5), Task(name="whole", metric="ppl,none")]

    def scored(many: list[float], few: list[float], whole: float) -> Score:
        means = {"many": many, "few": few}
        results = {task: {"acc,none": sum(own) / len(own)} for task, own in means.items()}
        found = aggregate(tasks, {**results, "whole": {"ppl,none": whole}}, len(many) + len(few), means)
        return Score(found.total, found.stderr, found.tasks, found.items, means)

    first, second = scored([1, 0, 1, 1], [1, 1, 0, 1], 3.0), scored([0, 0, 1, 1, 0, 1, 0], [0], 5.0)
    both = pooled(tasks, [first, second])
    assert both.total == pytest.approx(6 / 11 - 0.5 * 3 / 5 + (8 * 3.0 + 8 * 5.0) / 16)
    assert both.items == 16
    assert both.item_scores == {"many": [1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0], "few": [1, 1, 0, 1, 0]}
    assert both.stderr == pytest.approx(math.hypot(of_mean(both.item_scores["many"]), 0.5 * of_mean([1, 1, 0, 1, 0])))


def test_a_metric_that_is_no_mean_is_asked_at_once(tmp_path: Path) -> None:
    f1 = [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]
    task = add_task(tmp_path, "f1", metric_list=f1).model_copy(update={"metric": "f1,none"})
    scoring = evaluator(tmp_path, task, blocks=5)
    assert not scoring.raceable
    assert len(scoring.blocks) == 1
    assert evaluator(tmp_path, add_task(tmp_path, "sums"), blocks=5).raceable


# Which questions


def test_a_limit_takes_that_many_questions_of_each_task(tmp_path: Path, lm: HfScorer) -> None:
    tasks = add_task(tmp_path, "sums"), add_task(tmp_path, "few", ROWS[:3])
    scoring = evaluator(tmp_path, *tasks, limit=6)
    assert scoring.items == 9
    assert asked(scoring)[:6] == [row["question"] for row in ROWS[:6]]
    assert scoring.score(lm).items == 9
    results = by_lm_eval(tmp_path, lm, "sums", limit=6)
    assert scoring.score(lm).tasks["sums"]["acc,none"] == results["sums"]["acc,none"]


def test_shuffled_questions_depend_on_the_seed_alone(tmp_path: Path) -> None:
    sums = add_task(tmp_path, "sums")
    first, again, other = (evaluator(tmp_path, sums, limit=6, shuffle=True, seed=seed) for seed in (1, 1, 2))
    plain = evaluator(tmp_path, sums, limit=6)
    assert asked(first) == asked(again)
    assert len({tuple(asked(scoring)) for scoring in (first, other, plain)}) == 3


def test_every_question_is_asked_without_a_limit_shuffled_or_not(tmp_path: Path) -> None:
    sums = add_task(tmp_path, "sums")
    for shuffle in (True, False):
        assert sorted(asked(evaluator(tmp_path, sums, shuffle=shuffle))) == sorted(row["question"] for row in ROWS)


# Mistakes


def test_an_unknown_task_is_named_with_the_nearest(tmp_path: Path) -> None:
    add_task(tmp_path, "arithmetic_sums")
    with pytest.raises(TaskError, match="'arithmetic_sumz', did you mean 'arithmetic_sums'"):
        evaluator(tmp_path, Task(name="arithmetic_sumz"))


@pytest.mark.parametrize("metric", ["exact_match,none", "acc", "accuracy,none", "acc,strict"])
def test_an_unknown_metric_is_named_with_those_there_are(tmp_path: Path, metric: str) -> None:
    add_task(tmp_path, "sums")
    with pytest.raises(TaskError, match=f"sums has no metric '{metric}'.*its metrics are 'acc,none'"):
        evaluator(tmp_path, Task(name="sums", metric=metric))


def test_a_tag_is_refused_with_its_tasks(tmp_path: Path) -> None:
    add_task(tmp_path, "sums", tag="maths")
    with pytest.raises(TaskError, match=r"maths.*sums"):
        evaluator(tmp_path, Task(name="maths"))


def test_a_group_that_aggregates_nothing_is_refused(tmp_path: Path) -> None:
    add_task(tmp_path, "sums")
    (tmp_path / "group.yaml").write_text(json.dumps({"group": "maths", "task": ["sums"]}))
    with pytest.raises(TaskError, match=r"maths.*aggregates nothing.*sums"):
        evaluator(tmp_path, Task(name="maths"))


def test_a_group_is_refused_for_a_metric_that_it_does_not_aggregate(tmp_path: Path) -> None:
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    add_task(tmp_path, "sums", metric_list=metrics)
    group = {"group": "maths", "task": ["sums"], "aggregate_metric_list": [{"metric": "acc_norm"}]}
    (tmp_path / "group.yaml").write_text(json.dumps(group))
    with pytest.raises(TaskError, match=r"maths has no metric 'acc,none'.*'acc_norm,none'"):
        evaluator(tmp_path, Task(name="maths"))
    evaluator(tmp_path, Task(name="maths", metric="acc_norm,none"))


def test_a_task_without_questions_is_named(tmp_path: Path) -> None:
    empty = add_task(tmp_path, "nothing")
    (tmp_path / "none.py").write_text("def none(docs):\n    return docs.select([])\n")
    text = (tmp_path / "nothing.yaml").read_text().removesuffix("}")
    (tmp_path / "nothing.yaml").write_text(text + ', "process_docs": !function none.none }')
    with pytest.raises(TaskError, match=r"nothing.* no questions"):
        evaluator(tmp_path, empty)


def test_a_task_whose_data_is_missing_is_named_with_the_reason(tmp_path: Path) -> None:
    gone = add_task(tmp_path, "gone")
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(TaskError, match=r"gone cannot be loaded"):
        evaluator(tmp_path, gone)


def test_a_task_listed_twice_is_refused(tmp_path: Path) -> None:
    sums = add_task(tmp_path, "sums")
    with pytest.raises(TaskError, match="sums is listed twice"):
        evaluator(tmp_path, sums, Task(name="sums", weight=0.5))


def test_a_task_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task_search_path.*away"):
        evaluator(tmp_path / "away", Task(name="sums"))


@pytest.mark.parametrize("value", [math.nan, math.inf, "N/A"])
def test_a_metric_that_is_no_number_costs_the_candidate(value: Any) -> None:
    with pytest.raises(CandidateError, match="acc,none of sums"):
        aggregate([Task(name="sums")], {"sums": {"acc,none": value, "acc_stderr,none": 0.1}}, 3)


def test_a_standard_error_that_is_no_number_counts_as_none() -> None:
    score = aggregate([Task(name="sums")], {"sums": {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "sums"}}, 3)
    assert (score.total, score.stderr, score.tasks) == (0.5, 0.0, {"sums": {"acc,none": 0.5}})


def test_a_task_that_reports_nan_costs_the_candidate(tmp_path: Path, lm: HfScorer) -> None:
    (tmp_path / "bad.py").write_text("def results(doc, results):\n    return {'acc': float('nan')}\n")
    bad = add_task(tmp_path, "bad", ROWS[:2])
    text = (tmp_path / "bad.yaml").read_text().removesuffix("}")
    (tmp_path / "bad.yaml").write_text(text + ', "process_results": !function bad.results }')
    with pytest.raises(CandidateError, match="acc,none of bad is nan"):
        evaluator(tmp_path, bad).score(lm)


def test_a_model_that_crashes_costs_the_candidate(tmp_path: Path) -> None:
    class Broken(HfScorer):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            raise RuntimeError(f"shapes do not fit at {len(requests)} requests, {disable_tqdm}")

    scoring = evaluator(tmp_path, add_task(tmp_path, "sums"))
    with pytest.raises(CandidateError, match="RuntimeError: shapes do not fit"):
        scoring.score(Broken(tiny_llama(), tiny_tokenizer()))


def test_scoring_leaves_the_terminal_alone(tmp_path: Path, lm: HfScorer, capfd: pytest.CaptureFixture[str]) -> None:
    evaluator(tmp_path, add_task(tmp_path, "sums")).score(lm)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_task_is_read_from_its_name_alone() -> None:
    task = Task.model_validate("sums")
    assert (task.name, task.weight, task.metric) == ("sums", 1.0, "acc,none")


def test_a_perplexity_has_no_scores_of_questions_that_could_be_averaged(tmp_path: Path, lm: HfScorer) -> None:
    listed = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
    task = add_task(
        tmp_path, "words", output_type="loglikelihood", doc_to_target="x", doc_to_choice=None, metric_list=listed
    ).model_copy(update={"metric": "perplexity,none", "weight": -1.0})
    first, second = evaluator(tmp_path, task, limit=5).score(lm), evaluator(tmp_path, task, limit=5, after=5).score(lm)
    assert first.item_scores == second.item_scores == {}
    assert first.total < -1.0  # a mean of log-likelihoods would be positive with this weight
    both = (first.total + second.total) / 2
    assert pooled([task], [first, second]).total == pytest.approx(both)
    earlier = replace(first, item_scores={"words": [-9.0] * 5})  # a log of before
    assert pooled([task], [earlier, second]).total == pytest.approx(both)


def test_a_question_is_never_among_its_own_solved_examples(tmp_path: Path, lm: HfScorer) -> None:
    """lm-eval leaves it out by the names in the task's file only, and `init` writes files with a test split alone."""
    rows = [{"question": f"number {place} is", "choices": ["odd", "even"], "answer": 0} for place in range(8)]
    own = add_task(tmp_path, "own", rows)
    named = add_task(tmp_path, "named", rows, fewshot_split="test")
    made = evaluator(tmp_path, own, named, num_fewshot=6)
    for _, leaf, requests in made.requests(lm):
        for request in requests:
            shown = leaf.doc_to_text(request.doc)
            assert request.args[0].count(shown) == 1, request.args[0]
    assert made.digest != evaluator(tmp_path, own, named).digest
    with pytest.raises(TaskError, match=r"own has 8 questions, too few for num_fewshot: 8.*`fewshot_split`"):
        evaluator(tmp_path, own, num_fewshot=8)


def test_a_metric_of_some_questions_only_is_named_where_they_are_asked_in_blocks() -> None:
    task, values = Task(name="part", metric="acc,none"), {"part": {"acc,none": 0.5}}
    parts = [Score(0.5, 0.1, values, 2, {"part": [0.0, 1.0]}), Score(0.5, 0.1, values, 2)]
    with pytest.raises(CandidateError, match=r"the task part gives 'acc,none' for some .*`search: \{racing: false\}`"):
        concatenate([task], parts)


def test_a_task_with_fewer_solved_examples_than_it_is_to_show_is_refused_at_once(tmp_path: Path) -> None:
    rows = [{"question": f"number {place} is", "choices": ["odd", "even"], "answer": 0} for place in range(8)]
    samples = [{**row, "question": f"{row['question']} surely"} for row in rows[:2]]
    own = add_task(tmp_path, "own", rows, fewshot_config={"samples": samples})
    assert evaluator(tmp_path, own, num_fewshot=2)
    with pytest.raises(TaskError, match="own has 2 solved examples, fewer than num_fewshot: 3; lower num_fewshot"):
        evaluator(tmp_path, own, num_fewshot=3)


@pytest.mark.parametrize("choices", [None, ["odd", None]])
def test_choices_that_are_null_are_named_with_their_document(tmp_path: Path, choices: Any) -> None:
    rows = [{"question": f"number {place} is", "choices": ["odd", "even"], "answer": 0} for place in range(4)]
    own = add_task(tmp_path, "own", [*rows, {"question": "number 9 is", "choices": choices, "answer": 0}])
    with pytest.raises(TaskError, match=r"^tasks: own: the question of a document.*number 9 is") as raised:
        list(evaluator(tmp_path, own).compared())
    assert str(raised.value).count("tasks: ") == 1
