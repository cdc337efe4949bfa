"""Language models: a request in, a reply out. `CLIENTS` is the registry; the config's `llm.proposer` names one.

To add one: a file with a class that fits `Client`, and its line here.
"""

from collections.abc import Callable
from importlib import import_module

from llmevo.llm.client import Client, Connection, Reply


def _opened(name: str) -> Callable[[Connection], Client]:
    """Return a client's factory that imports its module at the first call, which takes seconds."""
    module, _, kind = name.partition(".")

    def make(connection: Connection) -> Client:
        return getattr(import_module(f"llmevo.llm.{module}"), kind)(connection)

    return make


CLIENTS: dict[str, Callable[[Connection], Client]] = {
    "openai": _opened("openai.OpenAIClient"),
    "local": _opened("local.LocalClient"),
    "recorded": _opened("recorded.RecordedClient"),
}
"""Every client by its name in the config. The simulated LLMs, which use the search, are in `llmevo.search`."""

__all__ = ["CLIENTS", "Client", "Connection", "Reply"]
