"""Checks of the models before a search is paid for. Each is one function from the scorer to its findings.

To add one: a function with a docstring, and its line in the list.
"""

from collections.abc import Callable, Sequence

from llmevo.errors import LlmevoError
from llmevo.run.preflight.architecture import adapters, dtypes, functions, rope, tied_heads
from llmevo.run.preflight.base import Finding, Findings
from llmevo.run.preflight.licences import licences
from llmevo.run.preflight.memory import memory
from llmevo.run.preflight.questions import directions, finalists, lengths, questions
from llmevo.run.preflight.task_vectors import rounded, vectors
from llmevo.run.preflight.tokenizers import chat_templates, special_tokens, system_messages, vocabularies
from llmevo.run.scorer import Scorer

Check = Callable[[Scorer], Findings]


CHECKS: Sequence[Check] = (
    memory,
    directions,
    questions,
    finalists,
    lengths,
    chat_templates,
    system_messages,
    vocabularies,
    special_tokens,
    adapters,
    rope,
    functions,
    tied_heads,
    dtypes,
    licences,
)
"""They read configs, tokenizers and cards, and are made at the start of every run. `vectors` and `rounded` need
weights: `llmevo inspect` makes them."""


def preflight(scorer: Scorer) -> list[Finding]:
    """What is to be said of the models, the most pressing first. Never raises: what cannot be checked is said."""
    found: list[Finding] = []
    unread: dict[str, list[str]] = {}
    for check in CHECKS:
        try:
            found += check(scorer)
        except (LlmevoError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            unread.setdefault(str(error), []).append(check.__name__.replace("_", " "))
    remedy = "See whether the model's files are complete"
    return [Finding(", ".join(names), f"could not be checked ({why})", remedy) for why, names in unread.items()] + found


def brief(scorer: Scorer, most: int = 4) -> list[str]:
    """The first findings as lines, for the start of a run."""
    found = preflight(scorer)
    more = [f"{len(found) - most} more: see `llmevo inspect`."] if len(found) > most else []
    return [*map(str, found[:most]), *more]


__all__ = ["CHECKS", "Check", "Finding", "brief", "preflight", "rounded", "vectors"]
