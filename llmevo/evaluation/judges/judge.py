"""A judge: an LLM behind an OpenAI-compatible server that grades replies, or compares them with a reference.

Faults of a judge. Requests that fail for a time are repeated, and an unreadable answer is requested again with its
problem named. A judge that cannot be reached, or can be read no more, is lost: the run stops and can be resumed, for no
candidate is to blame, and the verdicts until then are in the log. A single answer that stays unreadable is caused by a
reply that the judge cannot deal with: that reply gets the lowest grade, and is counted (`unreadable`). To fail the
candidate instead would throw away the cost of its other verdicts, and of long tasks fail most candidates. The two cases
are told apart by repeating an inquiry that the judge has answered before.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from llmevo.errors import JudgeError, ProposerError, TaskError, UserError
from llmevo.evaluation.judges.verdicts import Judgement, Verdict, VerdictMemory
from llmevo.evaluation.tasks.task import Judge
from llmevo.llm import CLIENTS
from llmevo.llm.client import Client, Connection, Request, read_key
from llmevo.llm.json import numeral, objects, without_surrogates, without_thoughts
from llmevo.llm.templates import Templates

REASON, JUDGED = 200, 300
"""Letters that a log keeps of a judge's reason, and of a reply."""

QUOTED, REPEATED = 60, 2000
"""Letters of an unreadable answer that a message quotes, and that the judge is shown again."""

ROW = 10
"""Unreadable answers in a row after which a judge gets an inquiry that it has answered before."""

CHOICES = {"A": 1.0, "B": 0.0, "TIE": 0.5}
"""The share of the first reply by a judge's answer."""


@dataclass(frozen=True)
class Written:
    """A candidate's reply to a prompt."""

    prompt: str
    reply: str
    reference: str = ""
    """A reply to compare it with; empty where there is none."""


@dataclass(frozen=True)
class Inquiry:
    """One request for a verdict."""

    messages: tuple[dict[str, str], ...]
    schema: dict[str, Any]
    read: Callable[[str], tuple[float, str]]
    """The value (0 to 1; of two replies, the share that is the first one's) and the reason in an answer.
    Raises ValueError that names the answer's fault."""
    key: str
    """A digest of the judge's model, the messages, and the server where one is given."""
    older: str
    """The same without the server, as in older logs."""
    replies: Sequence[str]


class Rubric:
    """The texts that a judge works by, and the inquiries made of them."""

    def __init__(self, task: str, judge: Judge, root: Path) -> None:
        """Raises TaskError for a rubric that cannot be read or is empty. Relative paths start at `root`."""
        key = f"tasks.{task}.judge.rubric"
        self._judge, self._templates, own = judge, Templates(), judge.rubric
        try:
            text = (root / own).read_text("utf-8-sig") if own else self._templates.render("judge_rubric.j2")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"{key}: {own} cannot be read ({error})") from error
        self.text = text.strip()
        if not self.text:
            raise TaskError(f"{key}: {own} is empty; write into it what a good reply is")

    @property
    def texts(self) -> dict[str, str]:
        """All texts but for prompts and replies: for the log, and for digests."""
        files = ("judge_system.j2", "judge_user.j2", "repair.j2")
        return {**self._templates.texts(files), "rubric": self.text}

    def grade(self, prompt: str, reply: str) -> Inquiry:
        """Ask for a grade on the scale."""
        low, high = self._judge.scale

        def read(grade: Any) -> float:
            number = numeral(grade)
            if not low <= number <= high:
                raise ValueError(f"the grade {number:g} lies outside {low:g} to {high:g}")
            return (number - low) / (high - low)

        return self._inquiry(prompt, [reply], "grade", {"type": "number", "minimum": low, "maximum": high}, read)

    def compare(self, prompt: str, first: str, second: str) -> Inquiry:
        """Ask for the better of two replies."""

        def read(better: Any) -> float:
            choice = str(better).strip().upper()
            if choice not in CHOICES:
                raise ValueError(f"{str(better)[:20]!r} is none of A, B and tie")
            return CHOICES[choice]

        schema = {"type": "string", "enum": ["A", "B", "tie"]}
        return self._inquiry(prompt, [first, second], "better", schema, read)

    def repair(self, problem: str) -> str:
        """The message after an answer with this problem."""
        return self._templates.render("repair.j2", problems=problem)

    def _inquiry(
        self, prompt: str, replies: Sequence[str], name: str, schema: Mapping[str, Any], value: Callable[[Any], float]
    ) -> Inquiry:
        """`name` is the key of the answer that `value` reads."""

        def read(text: str) -> tuple[float, str]:
            text = without_thoughts(text)  # a draft in them is no verdict
            answers = [found for found in objects(text) if name in found]
            if not answers:
                said = f", but {' '.join(text.split())[:QUOTED]!r}" if text.strip() else ": it is empty"
                raise ValueError(f"the answer holds no JSON object with {name!r}{said}")
            return value(answers[-1][name]), str(answers[-1].get("reason", ""))[:REASON]

        low, high = (f"{end:g}" for end in self._judge.scale)
        fence = hashlib.sha256(json.dumps([prompt, *replies]).encode()).hexdigest()[:8]  # no reply can end it early
        shown = {"rubric": self.text, "prompt": prompt, "replies": [*zip("AB", replies, strict=False)]}
        shown |= {"low": low, "high": high, "fence": fence}
        messages = tuple(
            {"role": role, "content": self._templates.render(f"judge_{role}.j2", **shown).strip()}
            for role in ("system", "user")
        )
        form = {
            "type": "object",
            "properties": {"reason": {"type": "string"}, name: schema},
            "required": ["reason", name],
            "additionalProperties": False,
        }
        asked = [self._judge.model, messages]
        keys = [
            hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16] for of in ([*asked, self._judge.base_url], asked)
        ]
        return Inquiry(messages, form, read, keys[0] if self._judge.base_url else keys[1], keys[1], replies)


class LlmJudge:
    """The judge of one task. Each inquiry runs in a thread of its own."""

    def __init__(self, task: str, judge: Judge, root: Path, rubric: Rubric) -> None:
        """Raises ProposerRefused without a key for OpenAI's own server."""
        self.task, self.judge, self.rubric, self._root = task, judge, rubric, root
        self._free: SimpleQueue[Client] = SimpleQueue()
        self._free.put(self._client())
        self._streak = 0
        self._control: Inquiry | None = None
        """An inquiry that the judge has answered readably."""

    def check(self) -> None:
        """Raise ProposerRefused where the judge's server does not answer, or refuses the key."""
        client = self._free.get()
        client.check()
        self._free.put(client)

    def scores(self, written: Sequence[Written], memory: VerdictMemory) -> list[float | None]:
        """The score of every reply, 0 to 1, None where the judge's answer cannot be read: its grade on the scale, or
        its comparison with the reference (1 better, 0.5 a tie, 0 worse), the mean of both orders: LLMs favour the reply
        that they read first, or last (Zheng et al. 2023, https://arxiv.org/abs/2306.05685).

        Only inquiries without a verdict in memory are made, and each verdict is noted there as it arrives. Raises
        JudgeError when the judge is lost, and ProposerRefused when its server refuses for good.
        """
        rows = [self._inquiries(one) for one in written]
        self._ask_missing([inquiry for row in rows for inquiry in row], memory)
        return [_score([self._known(inquiry, memory) for inquiry in row]) for row in rows]

    def _known(self, inquiry: Inquiry, memory: VerdictMemory) -> Verdict | None:
        return memory.verdicts.get(inquiry.key) or memory.by_task.get((self.task, inquiry.older))

    def _inquiries(self, one: Written) -> list[Inquiry]:
        """Return the requests for one reply; an empty list where it equals its reference, which counts as a tie."""
        if not one.reference:
            return [self.rubric.grade(one.prompt, one.reply)]
        if one.reply.strip() == one.reference.strip():
            return []
        orders = (one.reply, one.reference), (one.reference, one.reply)
        return [self.rubric.compare(one.prompt, *order) for order in orders]

    def _ask_missing(self, inquiries: Sequence[Inquiry], memory: VerdictMemory) -> None:
        missing = {i.key: i for i in inquiries if not self._known(i, memory)}
        self._control = self._control or next((i for i in inquiries if self._known(i, memory)), None)
        left = iter(missing.values())
        with ThreadPoolExecutor(self.judge.parallel) as pool:
            waiting = {pool.submit(self._ask, inquiry) for inquiry in islice(left, self.judge.parallel)}
            try:
                while waiting:
                    with memory.waiting():
                        future = next(as_completed(waiting))
                    waiting.remove(future)
                    judgement, lost = future.result()
                    self._note(judgement, memory)
                    if lost:
                        raise self._lost(f"gives no answer: {lost}")
                    self._check_readable(judgement, memory)
                    waiting |= {pool.submit(self._ask, inquiry) for inquiry in islice(left, 1)}
            finally:  # requests under way are paid for
                for future in wait(waiting).done:
                    if not future.exception():
                        self._note(future.result()[0], memory)
        if missing and self._control is None:
            raise self._lost("none of its answers could be read")

    def _note(self, judgement: Judgement, memory: VerdictMemory) -> None:
        if judgement.calls:
            memory.note(judgement)

    def _check_readable(self, judgement: Judgement, memory: VerdictMemory) -> None:
        """Raise JudgeError where too many answers in a row are unreadable, and one that was readable is so now."""
        self._streak = 0 if judgement.verdicts else self._streak + 1
        if self._streak >= ROW:
            again = self._ask(self._control)[0] if self._control else None
            if again:
                self._note(again.model_copy(update={"verdicts": []}), memory)  # the first verdict stays
            if not again or not again.verdicts:
                raise self._lost(f"its last {self._streak} answers could not be read ({judgement.problems[-1]})")
            self._streak = 0

    def _ask(self, inquiry: Inquiry) -> tuple[Judgement, str]:
        """The judgement of one inquiry, without a verdict where no answer can be read, and why there is no answer at
        all, if so. Raises ProposerRefused when the server refuses for good.
        """
        try:
            client = self._free.get_nowait()  # each remembers whether its last answer was lost
        except Empty:
            client = self._client()
        messages, calls, read, written, cost, lost = inquiry.messages, 0, 0, 0, 0.0, ""
        problems, verdicts = list[str](), list[Verdict]()
        try:
            while not verdicts and calls <= self.judge.repairs:
                reply = client.answer(Request(messages, schema=inquiry.schema))
                calls, cost = calls + 1, cost + reply.cost
                read, written = read + reply.prompt_tokens, written + reply.completion_tokens
                problems += reply.problems
                try:
                    value, reason = inquiry.read(reply.text)
                except ValueError as error:
                    problems.append(without_surrogates(str(error)))
                    said = {"role": "assistant", "content": reply.text[:REPEATED] or "(nothing)"}
                    again = {"role": "user", "content": self.rubric.repair(problems[-1])}
                    messages = (*inquiry.messages, said, again)
                else:
                    replies = [without_surrogates(text[:JUDGED]) for text in inquiry.replies]
                    verdict = Verdict(
                        key=inquiry.key, value=round(value, 4), reason=without_surrogates(reason), replies=replies
                    )
                    verdicts.append(verdict)
                    self._control = inquiry
        except ProposerError as error:
            lost = str(error)
        finally:
            self._free.put(client)
        judgement = Judgement(
            task=self.task,
            model=self.judge.model,
            verdicts=verdicts,
            calls=calls,
            tokens={"prompt": read, "completion": written},
            cost=cost,
            problems=[*dict.fromkeys(problems)],
        )
        return judgement, lost

    def _client(self) -> Client:
        judge = self.judge
        connection = Connection(
            model=judge.model,
            api_key=self._key,
            base_url=judge.base_url,
            temperature=0.0,
            max_tokens=judge.max_tokens,
            timeout=judge.timeout,
            retries=judge.retries,
            price=(judge.price.prompt, judge.price.completion),
            section=f"tasks.{self.task}.judge",
        )
        return CLIENTS["openai"](connection)

    @cached_property
    def _key(self) -> str | None:
        try:
            judge, place = self.judge, f"tasks.{self.task}.judge"
            return read_key(judge.api_key_file, self._root, place, judge.api_key_env, judge.base_url)
        except UserError as error:
            raise TaskError(str(error)) from error

    def _lost(self, why: str) -> JudgeError:
        return JudgeError(f"tasks: {self.task}: the judge {self.judge.model} is lost: {why.rstrip('.')}")


def _score(verdicts: Sequence[Verdict | None]) -> float | None:
    """The score by a grade, by two comparisons with the reply first and second, or 0.5 without any (a tie)."""
    if None in verdicts:
        return None
    first, *second = [verdict.value for verdict in verdicts if verdict] or [0.5]
    return (first + 1 - second[0]) / 2 if second else first
