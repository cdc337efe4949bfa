"""An earlier run's replies by generation: the same config and seed then make the same candidates.

A generation may have several replies, such as an unreadable one and its correction: each answers the same messages, or
else they come in their order.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from llmevo.errors import ConfigError, ProposerError
from llmevo.llm.client import Connection, Reply, Request


@dataclass(frozen=True)
class _Recorded:
    """A prompt of the log, and its reply."""

    messages: Any
    reply: Reply | None
    """None where there was none."""
    problems: Sequence[str]

    @classmethod
    def of(cls, event: Any) -> Self:
        """Read an event. Raises KeyError and TypeError."""
        messages, problems = event.get("messages"), event["problems"]
        if event["reply"] is None:
            return cls(messages, None, problems)
        tokens = event["tokens"]
        reply = Reply(event["reply"], event["model"], tokens["prompt"], tokens["completion"], event["cost"])
        return cls(messages, reply, problems)


class RecordedClient:
    """Answers from a log instead of a model, to repeat a run without its server."""

    def __init__(self, connection: Connection) -> None:
        """Raises ConfigError when the transcript is missing or is no log."""
        if connection.transcript is None:
            raise ConfigError("llm.transcript: the recorded proposer needs a run's folder or its events.jsonl")
        path = connection.root / connection.transcript
        file = path / "events.jsonl" if path.is_dir() else path
        try:
            # Lines of bytes: lines of a text would also end at the Unicode line ends that a reply may hold.
            # A last line without a newline is torn by a crash.
            whole = file.read_bytes().rpartition(b"\n")[0]
            events: list[Any] = [json.loads(line) for line in whole.splitlines()]
            prompted = [event for event in events if event["event"] == "prompted"]
            self._recorded: dict[int, list[_Recorded]] = {}
            for event in prompted:
                self._recorded.setdefault(event["generation"], []).append(_Recorded.of(event))
            self.style, self.model = next(((str(of["style"]), str(of["model"])) for of in prompted), ("", ""))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"llm.transcript: {file} cannot be read as a log ({error})") from error
        if not prompted:
            raise ConfigError(f"llm.transcript: {file} records no reply of an LLM")
        self._turns: Counter[int] = Counter()

    def check(self) -> None:
        """Do nothing: the transcript is read already."""

    def answer(self, request: Request) -> Reply:
        said = self._recorded.get(request.generation)
        if said is None:
            raise ProposerError(f"the transcript has no reply for generation {request.generation}")
        turn = min(self._turns[request.generation], len(said) - 1)
        self._turns[request.generation] += 1
        # A run that is resumed in the middle of a generation requests its second answer first.
        found = next((of for of in said if of.messages == [*request.messages]), said[turn])
        if found.reply is None:
            raise ProposerError("; ".join(found.problems))
        return found.reply
