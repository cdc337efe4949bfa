"""A judge: an LLM behind an OpenAI-compatible server that says how good replies are.

What becomes of its faults. What may pass by itself is tried again, an answer that cannot be read is asked for again
with its problem named. A judge that cannot be reached, or that can be read no more, is lost: the run stops and can be
resumed, for no candidate is to blame, and what was judged until then is in the log. A single answer that stays
unreadable comes of a reply that the judge cannot deal with: that reply gets the lowest grade, and is counted
(`unreadable`). To fail the candidate instead would throw away what its other verdicts have cost, and of long tasks fail
most candidates. Which of the two it is, is found out by asking again what the judge could answer before.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice

from llmevo.errors import JudgeError
from llmevo.evaluation.judges.client import Answered, Asking
from llmevo.evaluation.judges.memory import VerdictMemory
from llmevo.evaluation.judges.records import Judgement, Verdict
from llmevo.evaluation.judges.rubric import Inquiry, Rubric

ROW = 10
"""Unreadable answers in a row after which a judge is tried on what it could answer before."""


@dataclass(frozen=True)
class Written:
    """What a candidate wrote."""

    prompt: str
    reply: str
    reference: str = ""
    """A reply to compare it with; empty where there is none."""


class Judging:
    """A judge at work on one task."""

    def __init__(self, task: str, asking: Asking, rubric: Rubric) -> None:
        self.task, self.asking, self.rubric = task, asking, rubric
        self._streak = 0
        self._control: Inquiry | None = None
        """Something that the judge has answered readably."""

    def scores(self, written: Sequence[Written], book: VerdictMemory) -> list[float | None]:
        """Of every reply 0 to 1, None where the judge's answer cannot be read: its grade on the scale, or how it
        compares with its reference (1 better, 0.5 a tie, 0 worse), the mean of both orders: LLMs favour what they read
        first, or last (Zheng et al. 2023, https://arxiv.org/abs/2306.05685). See `values` for what it raises.
        """
        rows = [self._inquiries(one) for one in written]
        said = iter(self.values([inquiry for row in rows for inquiry in row], book))
        return [_score([next(said) for _ in row]) for row in rows]

    def _inquiries(self, one: Written) -> list[Inquiry]:
        """None for a reply that is its own reference: a tie."""
        if not one.reference:
            return [self.rubric.grade(one.prompt, one.reply)]
        if one.reply.strip() == one.reference.strip():
            return []
        orders = (one.reply, one.reference), (one.reference, one.reply)
        return [self.rubric.compare(one.prompt, *order) for order in orders]

    def values(self, inquiries: Sequence[Inquiry], book: VerdictMemory) -> list[float | None]:
        """What the judge says to each, 0 to 1; None for an answer that cannot be read. Only what is not in the book is
        asked, and noted there as it comes in.

        Raises JudgeError when the judge is lost, and ProposerRefused when its server refuses for good.
        """
        missing = {i.key: i for i in inquiries if i.key not in book.verdicts}
        self._control = self._control or next((i for i in inquiries if i.key in book.verdicts), None)
        parallel, left = self.asking.judge.parallel, iter(missing.values())
        with ThreadPoolExecutor(parallel) as pool:
            waiting = {pool.submit(self._ask, inquiry) for inquiry in islice(left, parallel)}
            try:
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    self._note(done, book)
                    waiting |= {pool.submit(self._ask, inquiry) for inquiry in islice(left, len(done))}
            finally:  # what is under way is paid for
                self._note(wait(waiting).done, book, stopping=True)
        if missing and self._control is None:
            raise self._lost("none of its answers could be read")
        return [book.verdicts[i.key].value if i.key in book.verdicts else None for i in inquiries]

    def _ask(self, inquiry: Inquiry) -> Answered:
        answer = self.asking.ask(inquiry)
        if answer.verdict:
            self._control = inquiry
        return answer

    def _note(self, done: Iterable[Future[Answered]], book: VerdictMemory, stopping: bool = False) -> None:
        """Write down what has come in; raise the first failure among it, unless one is on its way already."""
        ended = [*done]
        refused = next((error for future in ended if (error := future.exception())), None)
        answers = [future.result() for future in ended if not future.exception()]
        self._write(answers, [answer.verdict for answer in answers if answer.verdict], book)
        for answer in answers:
            self._streak = 0 if answer.verdict else self._streak + 1
        if stopping:
            return
        if refused:
            raise refused
        if lost := next((answer.lost for answer in answers if answer.lost), ""):
            raise self._lost(f"gives no answer: {lost}")
        if self._streak >= ROW:
            if self._control is None or not self._answers(self._control, book):
                raise self._lost(f"its last {self._streak} answers could not be read ({answers[-1].problems[-1]})")
            self._streak = 0

    def _answers(self, control: Inquiry, book: VerdictMemory) -> bool:
        """Whether the judge can still answer what it has answered before. What it says now changes nothing."""
        answer = self.asking.ask(control)
        self._write([answer], [], book)
        return answer.verdict is not None

    def _write(self, answers: Sequence[Answered], verdicts: list[Verdict], book: VerdictMemory) -> None:
        if not any(answer.calls for answer in answers):
            return
        read, written = (sum(counts) for counts in zip(*(answer.tokens for answer in answers), strict=True))
        book.note(
            Judgement(
                task=self.task,
                model=self.asking.judge.model,
                verdicts=verdicts,
                calls=sum(answer.calls for answer in answers),
                tokens={"prompt": read, "completion": written},
                cost=sum(answer.cost for answer in answers),
                problems=[*dict.fromkeys(problem for answer in answers for problem in answer.problems)],
            )
        )

    def _lost(self, why: str) -> JudgeError:
        return JudgeError(f"tasks: {self.task}: the judge {self.asking.judge.model} is lost: {why.rstrip('.')}")


def _score(values: Sequence[float | None]) -> float | None:
    """Of a grade, or of two comparisons with the reply first and second, or of none."""
    if None in values:
        return None
    first, *second = [value for value in values if value is not None] or [0.5]
    return (first + 1 - second[0]) / 2 if second else first
