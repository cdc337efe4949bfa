"""Who answers a prompt. `PROPOSERS` is the registry; the config's `llm.proposer` names one.

To add one: a file with a class that fits `Proposer`, and its line here.
"""

from collections.abc import Callable

from llmevo.proposers.base import Connection, Proposer, Reply
from llmevo.proposers.local import LocalProposer
from llmevo.proposers.openai import OpenAIProposer
from llmevo.proposers.recorded import RecordedProposer
from llmevo.proposers.simulated import SimulatedProposer

PROPOSERS: dict[str, Callable[[Connection], Proposer]] = {
    "openai": OpenAIProposer,
    "local": LocalProposer,
    "recorded": RecordedProposer,
    "simulated": SimulatedProposer,
}
"""Every proposer by the name the config uses."""

__all__ = ["PROPOSERS", "Connection", "Proposer", "Reply"]
