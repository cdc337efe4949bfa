"""Checks of the questions: held-out ones, overlap, length and the direction of their metrics."""

from collections import defaultdict

from llmevo.evaluation.questions import near_duplicates, repeated, with_choices
from llmevo.models.tokenizer import load_tokenizer
from llmevo.run.preflight.base import Finding, Findings, tokenizer_donor
from llmevo.run.scorer import Scorer

COUNTED = 64
"""Questions of a task whose tokens are counted: the longest."""


def heldout(scorer: Scorer) -> Findings:
    """No held-out questions, so that no score of the result is free of the search's choice."""
    if scorer.heldout is None:
        yield Finding(
            "heldout",
            "no questions are held out, and the search score of the result is the best of many and flatters",
            "List tasks under `heldout:`, or hold out some of `tasks:`, such as split: {search: 0.7, heldout: 0.3}",
        )


def questions(scorer: Scorer) -> Findings:
    """Later questions that are search questions with a few words changed; equal ones are an error elsewhere."""
    for name, evaluator in scorer.evaluators.items():
        if name == "search":
            continue
        found = near_duplicates(evaluator.questions(), scorer.evaluator.questions())
        if found:
            (task, text), (_, other) = found[0]
            yield Finding(
                f"{name} questions",
                f"{len(found)} are nearly search questions, such as {text[:60]!r} of {task} and {other[:60]!r}",
                "Leave them out, or expect a score that flatters",
            )


def repetitions(scorer: Scorer) -> Findings:
    """Questions that are asked more than once, in the sets of a task together."""
    asked: dict[str, list[str]] = defaultdict(list)
    for evaluator in scorer.evaluators.values():
        for task, text, choices in evaluator.compared():
            asked[task].append(with_choices(text, choices))
    for task, texts in asked.items():
        if same := repeated(texts):
            yield Finding(
                task,
                f"{same} of its {len(texts)} questions are repeated",
                "Leave them out: they take time, and make no score more certain",
            )


def examples(scorer: Scorer) -> Findings:
    """Solved examples that hold the question itself, or that a task does not show."""
    for name, evaluator in scorer.evaluators.items():
        for task, count in evaluator.repeated_examples().items():
            yield Finding(
                f"{name}: {task}",
                f"{count} of its questions are also among its solved examples, in another row, and so show the answer",
                "Leave the repetitions out, or name another `fewshot_split` in the task's file",
            )
        if name != "selection" and evaluator.without_examples:
            tasks = ", ".join(evaluator.without_examples)
            yield Finding(
                f"num_fewshot: {evaluator.asking.num_fewshot}",
                f"it is without effect on {tasks}, whose own file says num_fewshot: 0",
                "Take that line out of the file to show solved examples",
            )


def nulls(scorer: Scorer) -> Findings:
    """Questions with a column that has no value, which a template writes as `None`."""
    for name, evaluator in scorer.evaluators.items():
        for task, (column, count) in evaluator.null_columns().items():
            yield Finding(
                f"{name}: {task}",
                f"{count} of its questions have no value of {column!r}, and show it as 'None'",
                "Give the values, or leave these rows out",
            )


def finalists(scorer: Scorer) -> Findings:
    """Finalists without further questions, where the search already asks all questions of a task."""
    if scorer.selection is None and scorer.unselected:
        yield Finding(
            "search.finalists",
            f"no finalists are chosen; the best search score, which flatters, is exported: {scorer.unselected}",
            "Lower `limit`, take the task out of `tasks`, or write `search: {finalists: 0}`",
        )


def directions(scorer: Scorer) -> Findings:
    """Metrics that are better when lower, with a weight above 0: a search would make them worse."""
    for name, evaluator in scorer.evaluators.items():
        if name == "selection":
            continue  # the search's tasks
        for task in evaluator.sign_conflicts:
            key = "heldout" if name == "heldout" and scorer.config.heldout else "tasks"
            yield Finding(
                f"{key}: {task.name}",
                f"its {task.metric} is better when lower, and its weight is {task.weight:g}",
                f"Write `weight: {-task.weight:g}`, unless it is to go up",
            )


def lengths(scorer: Scorer) -> Findings:
    """Questions that do not fit into the model's context: engines cut their beginning off, as lm-eval does."""
    context = scorer.context
    if context is None:
        return
    asked: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for evaluator in scorer.evaluators.values():
        for name, text, written in evaluator.context_needs():
            if len(text.encode()) + written > context:  # a token is a byte at least
                asked[name].append((text, written))
    if not asked:
        return
    tokenizer = load_tokenizer(tokenizer_donor(scorer)[1])
    reader, more = "model holds", ""
    if scorer.backend == "vllm":
        reader, more = "engine reads", "; where the model holds more, raise engine.options.max_model_len"
    for name, texts in asked.items():
        longest = sorted(texts, key=lambda pair: -len(pair[0]))[:COUNTED]
        counts = [len(tokenizer.encode(text)) + written for text, written in longest]
        over = sum(count > context for count in counts)
        if over:
            yield Finding(
                name,
                f"{over}{' or more' if over == COUNTED else ''} of its questions take up to {max(counts)} tokens with"
                f" the reply, and the {reader} {context}: their beginnings will be cut off",
                "Leave the longest out, or ask with fewer solved examples (num_fewshot) or for shorter replies"
                f" (max_gen_toks; reply_tokens where a judge or a person reads them){more}",
            )
