"""Failures of the machine, told from failures of a candidate.

A candidate that cannot be merged or scored is a `failed` event and the search goes on. Where memory, a device, a file,
a network or the engine's process is lost, the next candidates would fail the same way: the run stops and can be
resumed.
"""

import errno
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from llmevo.errors import LlmevoError, MachineError

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
