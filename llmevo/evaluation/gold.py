"""The probability of right answers, which tells close candidates apart with few questions.

Accuracy on 32 questions moves in steps of 3 points; the probability of each right answer moves with every weight.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from llmevo.errors import TaskError
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.standard_errors import ItemScores
from llmevo.evaluation.tasks.lm_eval import JudgedTask


@dataclass(frozen=True)
class Gold:
    """How probable one model finds the right answers."""

    logprobs: ItemScores
    """{task: of each question}, in nats: among the question's choices where it has some, else per token."""
    right: ItemScores
    """{task: 1 where the right choice is the likeliest, else 0}, of tasks with choices."""

    metrics: ItemScores = field(default_factory=dict[str, Sequence[float]])
    """{task: the counted metric of each question}, of tasks without known answers; higher is better."""

    @property
    def values(self) -> ItemScores:
        """{task: of each question}: the probability of the right answer, from 0 to 1, or the task's metric.

        A choice that a model is sure of and wrong about weighs no more than a wrong answer does; its logarithm can
        outweigh all other questions.
        """
        return {task: [math.exp(value) for value in of] for task, of in self.logprobs.items()} | {**self.metrics}


@dataclass(frozen=True)
class _Question:
    """The requests of one question, by their places among all."""

    task: str
    places: range
    answers: Sequence[int] = ()
    """The right ones of the choices; empty where the one request is of the right answer."""
    tokens: int = 1


@dataclass
class GoldAnswers:
    """The right answers to an evaluator's questions; make one for a scan, and measure models in turn."""

    questions: list[_Question] = field(default_factory=list[_Question])
    pairs: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """(context, answer) of each request; texts that are predicted as a whole have an empty context."""
    counted: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """The places of the questions of tasks that name no right answer: their own metric is counted."""
    without: list[str] = field(default_factory=list[str])
    """Tasks that are left out: judges and people are not asked for every edit."""
    evaluator: Evaluator | None = None

    @classmethod
    def of(cls, evaluator: Evaluator, lm: LM, limit: int | None = None) -> "GoldAnswers":
        """Return the right answers to at most `limit` questions of each task, taken from all over it.

        `lm` gives the chat template and counts tokens. Raises TaskError where no task can be measured.
        """
        found = cls(evaluator=evaluator)
        for name, leaf, instances in evaluator.requests(lm):
            if isinstance(leaf, JudgedTask):
                found.without.append(name)
                continue
            by_document: dict[Any, list[Any]] = {}
            for instance in instances:
                by_document.setdefault(instance.doc_id, []).append(instance)
            asked = [*by_document.values()]
            count, before = min(limit or len(asked), len(asked)), (len(found.questions), len(found.pairs))
            for place in range(count):
                requests = asked[place * len(asked) // count]
                if not found._add(name, leaf, requests, evaluator.asking.apply_chat_template, lm):
                    places = [place for block in evaluator.blocks for place in block.get(name, ())]
                    found.counted[name] = places[:count]
                    del found.questions[before[0] :], found.pairs[before[1] :]
                    break
        if not found.questions and not found.counted:
            raise TaskError(
                f"tasks: {', '.join(found.without)}: a judge or a person scores the replies and is not asked for every"
                " edit, so a scan has nothing to measure; add a task with right answers"
            )
        return found

    def _add(self, task: str, leaf: Any, requests: Sequence[Any], chat: bool, lm: Any) -> bool:
        """Add one question; return False where its right answer is not known."""
        document, start = requests[0].doc, len(self.pairs)
        if leaf.OUTPUT_TYPE == "multiple_choice":
            choices = leaf.doc_to_choice(document)
            target = leaf.doc_to_text(document) if getattr(leaf, "multiple_input", False) else None
            given = target if isinstance(target, int) else leaf.doc_to_target(document)
            wanted = given if isinstance(given, list) else [given]
            answers = [choices.index(each) if each in choices else each for each in wanted]
            count = len(requests) if isinstance(target, int) else len(choices)  # further ones are without a context
            answers = [each for each in answers if isinstance(each, int) and 0 <= each < count]
            self.pairs += [(request.args[0], request.args[1]) for request in requests[:count]]
            self.questions.append(_Question(task, range(start, start + count), answers))
            return bool(answers)
        if leaf.OUTPUT_TYPE == "generate_until":
            given = leaf.doc_to_target(document) if leaf.config.doc_to_target is not None else None
            given = given[0] if isinstance(given, list) and given else given
            if given is None or given == [] or not str(given).strip():
                return False
            delimiter = "" if chat else leaf.config.target_delimiter
            pair = requests[0].args[0], f"{delimiter}{given}"
        else:
            pair = ("", requests[0].args[0]) if leaf.OUTPUT_TYPE == "loglikelihood_rolling" else requests[0].args
        self.pairs.append((pair[0], pair[1]))
        tokens = max(1, len(lm.tok_encode(pair[1], add_special_tokens=False)))
        self.questions.append(_Question(task, range(start, start + 1), (), tokens))
        return True

    @property
    def counts(self) -> Mapping[str, int]:
        """{task: its questions}."""
        return Counter(of.task for of in self.questions) | {task: len(places) for task, places in self.counted.items()}

    def measure(self, lm: LM) -> Gold:
        """Return what the running model gives the right answers."""
        asked = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(self.pairs)]
        found = [score for score, _ in lm.loglikelihood(asked)]
        logprobs: dict[str, list[float]] = {}
        right: dict[str, list[float]] = {}
        for question in self.questions:
            scores = [found[place] for place in question.places]
            if question.answers:
                total = _log_sum(scores)
                value = _log_sum([scores[place] for place in question.answers]) - total
                best = max(range(len(scores)), key=lambda place: scores[place])
                right.setdefault(question.task, []).append(float(best in question.answers))
            else:
                value = scores[0] / question.tokens
            logprobs.setdefault(question.task, []).append(value)
        return Gold(logprobs, right, self._metrics(lm))

    def _metrics(self, lm: LM) -> ItemScores:
        if not self.counted or not self.evaluator:
            return {}
        found = self.evaluator.score_questions(lm, self.counted).item_scores
        signs = {task: math.copysign(1.0, self.evaluator.weights.get(task, 1.0)) for task in found}
        return {task: [signs[task] * value for value in of] for task, of in found.items()}


def _log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values)) if math.isfinite(top) else top
