"""An earlier run's replies by generation: the same config and seed then make the same candidates.

A generation may have several replies, such as an unreadable one and its correction: each answers the same messages, or
else they come in their order.
"""

import json
from collections import Counter
from typing import Any

from llmevo.errors import ConfigError, ProposerError
from llmevo.llm.client import Connection, Reply, Request


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
            self._replies: dict[int, list[Any]] = {}
            for event in prompted:
                _ = event["model"], event["reply"] is None or (event["tokens"]["prompt"], event["tokens"]["completion"])
                self._replies.setdefault(event["generation"], []).append(event)
            self.style: str = prompted[0]["style"] if prompted else ""
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"llm.transcript: {file} cannot be read as a log ({error})") from error
        if not prompted:
            raise ConfigError(f"llm.transcript: {file} records no reply of an LLM")
        self._turns: Counter[int] = Counter()
        self.model: str = prompted[0]["model"]

    def check(self) -> None:
        """Do nothing: the transcript is read already."""

    def answer(self, request: Request) -> Reply:
        said = self._replies.get(request.generation)
        if said is None:
            raise ProposerError(f"the transcript has no reply for generation {request.generation}")
        turn = min(self._turns[request.generation], len(said) - 1)
        self._turns[request.generation] += 1
        # A run that is resumed in the middle of a generation requests its second answer first.
        event = next((event for event in said if event.get("messages") == [*request.messages]), said[turn])
        if event["reply"] is None:
            raise ProposerError("; ".join(event["problems"]))
        tokens = event["tokens"]
        return Reply(event["reply"], event["model"], tokens["prompt"], tokens["completion"], event["cost"])
