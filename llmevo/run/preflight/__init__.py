"""Checks of the models and tasks before a run. Each is a function from the scorer to its findings.

To add one: a function with a docstring, and its line in `CHECKS`.
"""

from collections.abc import Callable, Sequence

from llmevo.errors import LlmevoError
from llmevo.run.preflight.base import Finding, Findings
from llmevo.run.preflight.forecast import memory
from llmevo.run.preflight.models import adapters, dtypes, functions, licences, paths, rope, tied_heads
from llmevo.run.preflight.preparation import preparation
from llmevo.run.preflight.quantization import quantized
from llmevo.run.preflight.questions import (
    directions,
    examples,
    finalists,
    heldout,
    lengths,
    nulls,
    questions,
    repetitions,
)
from llmevo.run.preflight.tokenizers import chat_templates, special_tokens, system_messages, vocabularies
from llmevo.run.scorer import Scorer

Check = Callable[[Scorer], Findings]

CHECKS: Sequence[Check] = (
    memory,
    heldout,
    directions,
    questions,
    finalists,
    preparation,
    lengths,
    repetitions,
    examples,
    nulls,
    chat_templates,
    system_messages,
    vocabularies,
    special_tokens,
    adapters,
    rope,
    paths,
    functions,
    tied_heads,
    dtypes,
    quantized,
    licences,
)
"""They read configs, tokenizers and cards, at the start of every run. `llmevo inspect` adds `vectors`, `rounded` and
`noise`, which read the weights."""


def preflight(scorer: Scorer) -> list[Finding]:
    """Return the findings of all checks. Never raises: a check that fails is a finding."""
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
    """Return the first findings as lines, for the start of a run."""
    found = preflight(scorer)
    more = [f"{len(found) - most} more: see `llmevo inspect`."] if len(found) > most else []
    return [*map(str, found[:most]), *more]
