"""An earlier run's replies, generation by generation: the same config and seed then make the same candidates.

A generation may have two: an answer that could not be read, and the one after its problems were named.
"""

import json
from typing import Any

from llmevo.errors import ConfigError, ProposerError
from llmevo.prompting import Prompt
from llmevo.proposers.base import Connection, Reply


class RecordedProposer:
    """Answers from a log instead of a model; use it to repeat a run without its server."""

    def __init__(self, connection: Connection) -> None:
        """Raises ConfigError when the transcript is missing or is no log."""
        if connection.transcript is None:
            raise ConfigError("llm.transcript: the recorded proposer needs a run's folder or its events.jsonl")
        path = connection.root / connection.transcript
        file = path / "events.jsonl" if path.is_dir() else path
        try:
            # Of bytes: the lines of a text would also end at the Unicode line ends that a reply may hold.
            # A last line that a crash has torn ends without a newline; it is no reply.
            whole = file.read_bytes().rpartition(b"\n")[0]
            events: list[Any] = [json.loads(line) for line in whole.splitlines()]
            prompted = [event for event in events if event["event"] == "prompted"]
            self._replies: dict[tuple[int, bool], Any] = {
                (event["generation"], event.get("repair", False)): event for event in prompted
            }
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"llm.transcript: {file} cannot be read as a log ({error})") from error
        if not prompted:
            raise ConfigError(f"llm.transcript: {file} records no reply of an LLM")
        self.style: str = prompted[0]["style"]
        self.model: str = prompted[0]["model"]

    def check(self) -> None:
        """The transcript was read when this was made."""

    def answer(self, prompt: Prompt) -> Reply:
        repair = any(message["role"] == "assistant" for message in prompt.messages)
        event = self._replies.get((prompt.generation, repair))
        if event is None:
            raise ProposerError(f"the transcript has no reply for generation {prompt.generation}")
        if event["reply"] is None:
            raise ProposerError("; ".join(event["problems"]))
        tokens = event["tokens"]
        return Reply(event["reply"], event["model"], tokens["prompt"], tokens["completion"], event["cost"])
