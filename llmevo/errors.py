"""Failures of the machine, told from failures of a candidate.

A candidate that cannot be merged or scored is a `failed` event and the search goes on. Where memory, a device, a file,
a network or the engine's process is lost, the next candidates would fail the same way: the run stops and can be
resumed.
"""

import errno
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class LlmevoError(Exception):
    """The root of llmevo's own errors.

    >>> import llmevo
    >>> try:
    ...     llmevo.open_run("no-such-run")
    ... except llmevo.LlmevoError as error:
    ...     print(error)
    no-such-run holds no run (there is no events.jsonl)
    """


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


def plural(count: int, noun: str, nouns: str = "") -> str:
    """`1 question`, `2 questions`, `1,200 questions`; `nouns` is the plural where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
"""How torch, numpy and the system say that an allocation failed; torch's error on a CPU is a plain RuntimeError."""


DEVICE = ("cuda error", "cuda driver error", "hip error", "cublas_status", "cudnn_status", "nccl error")
"""The same of a GPU; what follows such an error in the same process fails as well."""


ENGINE = ("enginecore encountered an issue", "executor failed", "call to collective_rpc method failed")
"""The same of vLLM's processes."""


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
"""Kinds by the names of classes: the libraries are slow to import, or not installed."""


LOST = {
    *(errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EREMOTEIO, errno.ENOSPC, errno.EDQUOT),
    *(errno.EMFILE, errno.ENFILE),
}
"""Error numbers of files that no code of a task can be to blame for."""


NETWORK = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT}


ADVICE = {
    "memory": "Free memory, lower engine.cache_gb, choose another engine.device, or give vLLM less"
    " (engine.options: max_model_len, gpu_memory_utilization)",
    "device": "See whether the GPU works (nvidia-smi), or choose another engine.device",
    "engine": "Its own messages above say why, if there are any; often it is memory"
    " (engine.options: gpu_memory_utilization)",
    "network": "See whether the network and the server are there",
    "files": "See whether the disk or network mount with the models and tasks is there and has room",
}


LOSSES = {
    "memory": "the machine is out of memory",
    "device": "the GPU failed",
    "engine": "the engine died",
    "network": "the network is lost",
    "files": "a file cannot be read or written",
}


def machine_error(error: BaseException, in_task: bool = False) -> MachineError | None:
    """The error as one of the machine's, with what to do; None where it may be the candidate's.

    `in_task` is for errors from a task's own code on a candidate's reply: there, memory that runs out, or a file that
    is not there, may come of the reply; a lost network or disk does not.
    """
    for cause in _chain(error):
        kind = _kind(cause)
        if kind and not (in_task and (kind == "memory" or _may_be_missing(cause))):
            reason = " ".join(str(cause).split()) or type(cause).__name__
            return MachineError(f"{LOSSES[kind]} ({type(cause).__name__}: {reason[:400]}). {ADVICE[kind]}", kind)
    return None


@contextmanager
def machine_errors() -> Generator[None]:
    """Raise MachineError instead of what a lost machine makes libraries raise; other errors pass."""
    try:
        yield
    except LlmevoError:
        raise
    except Exception as error:
        if found := machine_error(error):
            raise found from error
        raise


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    seen: list[BaseException] = []
    here: BaseException | None = error
    while here is not None and here not in seen:
        seen.append(here)
        yield here
        here = here.__cause__


def _kind(error: BaseException) -> str:
    names = [cls.__name__ for cls in type(error).__mro__]
    if isinstance(error, MemoryError):
        return "memory"
    if kind := next((TYPES[name] for name in names if name in TYPES), ""):
        return kind
    if isinstance(error, TimeoutError) and error.errno is None:
        return ""  # a limit of time that a task sets itself
    if isinstance(error, OSError):
        if error.errno == errno.ENOMEM:
            return "memory"
        return "network" if error.errno in NETWORK else "files"
    if not isinstance(error, RuntimeError) and type(error) is not Exception:  # vLLM's client raises the latter
        return ""
    text = str(error).lower()
    kinds = (("memory", MEMORY), ("device", DEVICE), ("engine", ENGINE))
    return next((kind for kind, words in kinds if any(word in text for word in words)), "")


def _may_be_missing(error: BaseException) -> bool:
    """Whether it says of a file what may be said of one that never was there."""
    return isinstance(error, OSError) and _kind(error) == "files" and error.errno not in LOST
