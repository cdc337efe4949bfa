"""Asking a judge: one inquiry at a time, each in a thread of its own, until its answer can be read."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue

from llmevo.errors import ProposerError, TaskError, UserError
from llmevo.evaluation.judges.records import Verdict
from llmevo.evaluation.judges.rubric import Inquiry
from llmevo.evaluation.judges.settings import Judge
from llmevo.llm import CLIENTS
from llmevo.llm.client import Client, Connection, Request, read_key
from llmevo.llm.json import writable

JUDGED = 300
"""Letters of a reply that are kept in the log beside what is said of it."""


QUOTED = 2000
"""Letters of an unreadable answer that are shown to the judge again."""


@dataclass(frozen=True)
class Answered:
    """What came of one inquiry."""

    verdict: Verdict | None
    """None for an answer that could not be read."""
    calls: int
    tokens: tuple[int, int]
    """Read and written."""
    cost: float
    problems: list[str]
    lost: str = ""
    """Why there was no answer at all."""


class Asking:
    """The connections to a judge's server, which are the proposers' own: retries, keys and refusals are as there."""

    def __init__(self, task: str, judge: Judge, root: Path) -> None:
        """`root`: where relative paths start. Raises ProposerRefused without a key for OpenAI's own server."""
        self.task, self.judge, self._root = task, judge, root
        self._free: SimpleQueue[Client] = SimpleQueue()
        self._free.put(self._client())

    def check(self) -> None:
        """Find out whether there is anybody to ask. Raises ProposerRefused if not."""
        client = self._free.get()
        client.check()
        self._free.put(client)

    def ask(self, inquiry: Inquiry) -> Answered:
        """Raises ProposerRefused when the server refuses for good."""
        try:
            client = self._free.get_nowait()  # each remembers whether its last answer was lost
        except Empty:
            client = self._client()
        try:
            return self._asked(client, inquiry)
        finally:
            self._free.put(client)

    def _asked(self, client: Client, inquiry: Inquiry) -> Answered:
        messages, problems = inquiry.messages, list[str]()
        calls, tokens, cost = 0, (0, 0), 0.0
        for _ in range(self.judge.repairs + 1):
            try:
                reply = client.answer(Request(messages, schema={**inquiry.schema}))
            except ProposerError as error:
                return Answered(None, calls, tokens, cost, problems, lost=str(error))
            calls, cost = calls + 1, cost + reply.cost
            tokens = tokens[0] + reply.prompt_tokens, tokens[1] + reply.completion_tokens
            problems += reply.problems
            try:
                value, reason = inquiry.read(reply.text)
            except ValueError as error:
                problems.append(writable(str(error)))
            else:
                judged = [writable(text[:JUDGED]) for text in inquiry.replies]
                verdict = Verdict(key=inquiry.key, value=round(value, 4), reason=writable(reason), replies=judged)
                return Answered(verdict, calls, tokens, cost, problems)
            said = {"role": "assistant", "content": reply.text[:QUOTED] or "(nothing)"}
            asked = {"role": "user", "content": inquiry.again(problems[-1])}
            messages = (*inquiry.messages, said, asked)
        return Answered(None, calls, tokens, cost, problems)

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
