"""Who answers a prompt. `PROPOSERS` is the registry; the config's `llm.proposer` names one.

To add one: a file with a class that fits `Proposer`, and its line here.
"""

from collections.abc import Callable
from importlib import import_module

from llmevo.llm.client import Client, Connection, Reply


def _opened(name: str) -> Callable[[Connection], Client]:
    """A proposer by its module and class, imported when one is wanted: clients of servers and models take seconds."""
    module, _, kind = name.partition(".")

    def make(connection: Connection) -> Client:
        return getattr(import_module(f"llmevo.proposers.{module}"), kind)(connection)

    return make


CLIENTS: dict[str, Callable[[Connection], Client]] = {
    "openai": _opened("openai.OpenAIProposer"),
    "local": _opened("local.LocalProposer"),
    "recorded": _opened("recorded.RecordedProposer"),
    "simulated": _opened("simulated.SimulatedProposer"),
}
"""Every proposer by the name the config uses."""


__all__ = ["CLIENTS", "Client", "Connection", "Reply"]
