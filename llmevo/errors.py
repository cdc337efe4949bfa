"""Every error llmevo raises on purpose.

    LlmevoError
    ├── UserError             the user can mend it: exit status 2, one message, no traceback
    │   ├── ConfigError       a key of the config is wrong
    │   ├── RecipeError       a mergekit recipe is wrong, or needs what llmevo does not do
    │   ├── SourceError       a model cannot be found, read, or merged with the others
    │   ├── TaskError         a task or metric does not exist, or has no items
    │   ├── ProposerRefused   the LLM's server refuses for good: a bad key, an unknown model
    │   └── RunError          a run folder is taken, torn, or of a newer llmevo
    ├── EngineError           the engine does not hold what it should: the run stops, exit status 1
    ├── LogError              the disk is full or fails: the run stops, resumably, exit status 1
    ├── MachineError          memory, a device, files, the network or the engine is lost: the same, exit status 1
    ├── JudgeError            the judge is lost: the run stops, resumably, exit status 1
    ├── CandidateError        one candidate failed; the run goes on without it
    └── ProposerError         the LLM gave no answer after its retries; the run goes on without it

Messages name the thing, its value and the way out.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class LlmevoError(Exception):
    """The root of llmevo's own errors."""


class UserError(LlmevoError):
    """Something the user gave is wrong. Shown without a traceback; exit status 2."""


class ConfigError(UserError):
    """A key of the config has a value that cannot be used."""


class RecipeError(UserError):
    """A mergekit recipe cannot be read or carried out."""


class SourceError(UserError):
    """A model cannot be found or read, or does not fit the others."""


class TaskError(UserError):
    """A task or a metric cannot be used for scoring."""


class ProposerRefused(UserError):
    """The LLM's server refuses, and would refuse again: retrying or going on makes no sense."""


class RunError(UserError):
    """A run folder cannot be used as asked."""


class EngineError(LlmevoError):
    """The engine's weights are not those that were merged into it; its scores would mean nothing."""


class LogError(LlmevoError):
    """The run's folder cannot be written. What it holds already is whole."""


class MachineError(LlmevoError):
    """Memory, a device, files, the network or the engine's process is lost. No candidate is to blame: the run stops and
    `llmevo resume` goes on with the same candidate.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        """`kind` is `memory`, `device`, `engine`, `network` or `files`; empty where it is not known."""
        super().__init__(message)
        self.kind = kind


class JudgeError(LlmevoError):
    """The LLM that judges replies gives no verdicts. No candidate is to blame; what was judged is in the log."""


class CandidateError(LlmevoError):
    """One candidate could not be merged or scored. It ranks last; its reason is logged."""


class ProposerError(LlmevoError):
    """The LLM did not answer. The generation goes on with numeric candidates."""


NEAR = 0.7
"""The similarity, as `difflib` has it, from which on a word may be another one misspelt: two letters that changed
places in a word of six leave 0.83, and words that only share some letters have up to 0.65 (popsize and optimizer)."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: `, did you mean 'weight'?`, or the known ones when none is near."""
    choices = [*known]
    near = get_close_matches(word, choices, n=1, cutoff=NEAR)
    return f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(map(str, choices))}"


def shortened(text: str, length: int = 600) -> str:
    """A text of a few lines at most, for messages that quote what a user gave."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"
