"""Every error that llmevo raises, and which failures are the machine's rather than a candidate's.

    LlmevoError          exit status 1
    ├── UserError        a mistake in the user's input: one message without a traceback, exit status 2
    │   └── ConfigError, RecipeError, SourceError, TaskError, ProposerRefused, RunError
    └── EngineError, LogError, MachineError, JudgeError, CandidateError, ProposerError

A candidate that cannot be merged or scored is a `failed` event and the search goes on. When the machine fails, the next
candidates would fail the same way: the run stops and can be resumed with the same candidate.
"""

import errno
import re
import shlex
from collections.abc import Iterable
from difflib import get_close_matches


class LlmevoError(Exception):
    """The root of llmevo's errors.

    >>> import llmevo
    >>> try:
    ...     llmevo.open_run("no-such-run")
    ... except llmevo.LlmevoError as error:
    ...     print(error)
    no-such-run holds no run (there is no events.jsonl)
    """


class UserError(LlmevoError):
    """A mistake in the user's input."""


class ConfigError(UserError):
    """A value of the config cannot be used."""


class RecipeError(UserError):
    """A mergekit recipe cannot be read or merged."""


class SourceError(UserError):
    """A model cannot be found or read, or does not fit the others."""


class TaskError(UserError):
    """A task or a metric cannot be used for scoring."""


class ProposerRefused(UserError):
    """The LLM's server refuses, and retrying does not help."""


class RequestRefused(ProposerRefused):
    """The LLM's server refuses a request, which may lie in that request alone: moderation, or a gateway's state."""


class RunError(UserError):
    """A run folder cannot be used as requested."""


class EngineError(LlmevoError):
    """The engine's weights are not those that were merged into it, so its scores are meaningless."""


class LogError(LlmevoError):
    """The run's folder cannot be written; its content is complete."""


class MachineError(LlmevoError):
    """Memory, a device, files, the network or the engine's process is lost; no candidate is at fault."""

    def __init__(self, message: str, kind: str = "") -> None:
        """`kind` is `memory`, `device`, `engine`, `network` or `files`; empty if unknown."""
        super().__init__(message)
        self.kind = kind


class JudgeError(LlmevoError):
    """The LLM judge gives no verdicts; no candidate is at fault, and earlier verdicts are in the log."""


class CandidateError(LlmevoError):
    """One candidate cannot be merged or scored; it ranks last, and its reason is logged."""

    seconds: float | None = None
    """Those of merging and scoring until then, without loading the engine; None where they were not taken."""

    def took(self, elapsed: float) -> dict[str, float]:
        """Return the seconds for the log: its own or, where it has none, the `elapsed` ones."""
        return {"evaluate": elapsed if self.seconds is None else self.seconds}


class ProposerError(LlmevoError):
    """The LLM did not answer; the generation uses numeric candidates."""


FEW = 4
"""Words that a hint for a misspelt word names, at most."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: `, did you mean 'weight'?`; for the beginning of a few words all of these; and the
    known words where none is near.
    """
    choices = [*known]
    # Two swapped letters in a word of six leave a similarity of 0.83; unrelated words have up to 0.65.
    near = get_close_matches(word, choices, n=1, cutoff=0.7)
    if not near and len(word) > 2:
        begun = [choice for choice in choices if choice.startswith(word)]
        near = begun if len(begun) <= FEW else []
    return f", did you mean {' or '.join(map(repr, near))}?" if near else f"; known: {', '.join(map(str, choices))}"


def shortened(text: str, length: int = 600) -> str:
    """A text cut to `length` characters, for messages that quote user input."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


def plural(count: int, noun: str, nouns: str = "") -> str:
    """`1 question`, `2 questions`, `1,200 questions`; `nouns` is an irregular plural."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def quoted(place: object) -> str:
    """Return a file or folder as a word of a shell's command."""
    return shlex.quote(str(place))


def without_passwords(text: str) -> str:
    """Return a text without the users and passwords of addresses in it."""
    return re.sub(r"""://[^/\s"'<>]+@""", "://", text)  # up to the last @: a password may hold one


MESSAGES = {
    # torch's error on a CPU is a plain RuntimeError.
    "memory": ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory"),
    "device": ("cuda error", "cuda driver error", "hip error", "cublas_status", "cudnn_status", "nccl error"),
    "engine": ("enginecore encountered an issue", "executor failed", "call to collective_rpc method failed"),
}
"""Texts in the messages of errors without a class of their own, by kind."""

TYPES = {
    "OutOfMemoryError": "memory",  # torch's
    "AcceleratorError": "device",
    "EngineDeadError": "engine",  # vLLM's
    "TransportError": "network",  # httpx's and its copies'
    "APIConnectionError": "network",  # openai's
    "ClientConnectionError": "network",  # aiohttp's
    "HfHubHTTPError": "network",
    "LocalEntryNotFoundError": "network",
    "OfflineModeIsEnabled": "network",
    "ConnectionError": "network",  # also that of requests
    "SafetensorError": "files",
}
"""Kinds by class name: the libraries are slow to import, or not installed."""

LOST_FILES = {
    *(errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EREMOTEIO, errno.ENOSPC, errno.EDQUOT),
    *(errno.EMFILE, errno.ENFILE),
}
"""Error numbers of files that a task's code cannot cause."""

LOST_NETWORK = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT}

LOSSES = {
    "memory": (
        "the machine is out of memory",
        "Free memory, lower engine.cache_gb, choose another engine.device, or give vLLM less (engine.options:"
        " max_model_len, gpu_memory_utilization)",
    ),
    "device": ("the GPU failed", "Check the GPU (nvidia-smi), or choose another engine.device"),
    "engine": (
        "the engine died",
        "Its own messages above may give the reason; often it is memory (engine.options: gpu_memory_utilization)",
    ),
    "network": ("the network is lost", "Check the network and the server"),
    "files": (
        "a file cannot be read or written",
        "Check that the disk or network mount with the models and tasks is available and has free space",
    ),
}
"""The message and the advice for each kind."""


def machine_error(error: BaseException, in_task: bool = False) -> MachineError | None:
    """The error as a MachineError with advice; None if the candidate may be at fault.

    `in_task` is for errors of a task's own code on a candidate's reply: there the reply may cause a lack of memory or
    a missing file, but not a lost network or disk.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        kind = _kind(cause)
        missing_file = isinstance(cause, OSError) and kind == "files" and cause.errno not in LOST_FILES
        if kind and not (in_task and (kind == "memory" or missing_file)):
            reason = " ".join(str(cause).split()) or type(cause).__name__
            loss, advice = LOSSES[kind]
            return MachineError(f"{loss} ({type(cause).__name__}: {reason[:400]}). {advice}", kind)
        seen.append(cause)
        cause = cause.__cause__
    return None


def _kind(error: BaseException) -> str:
    """The kind of a machine's failure; empty for other errors."""
    if isinstance(error, MemoryError):
        return "memory"
    if kind := next((TYPES[cls.__name__] for cls in type(error).__mro__ if cls.__name__ in TYPES), ""):
        return kind
    if isinstance(error, OSError):
        if isinstance(error, TimeoutError) and error.errno is None:
            return ""  # a time limit that a task sets itself
        if error.errno == errno.ENOMEM:
            return "memory"
        return "network" if error.errno in LOST_NETWORK else "files"
    if not isinstance(error, RuntimeError) and type(error) is not Exception:  # vLLM's client raises the latter
        return ""
    text = str(error).lower()
    return next((kind for kind, words in MESSAGES.items() if any(word in text for word in words)), "")
