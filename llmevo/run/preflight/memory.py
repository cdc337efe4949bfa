"""What the weights, the engine and its caches take, against what this machine has free."""

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from llmevo.models.references import folder_of
from llmevo.run.preflight.base import Finding, Findings, folders, names
from llmevo.run.scorer import Scorer

GB = 1e9


@dataclass(frozen=True)
class Memory:
    """In bytes. Activations and the KV cache are not in it: they depend on the questions."""

    weights: int
    """The files that merging reads, mapped: memory that is given back when it is needed elsewhere."""
    engine: int
    """The weights that the engine holds."""
    caches: int
    """What `engine.cache_gb` allows."""
    device: str
    """Where the engine holds them: `cpu` or `cuda`."""
    free: int | None
    """Of main memory; None where the system does not say."""
    device_free: int | None
    """Of the GPU; None without one."""
    disk: int
    """What the self-check writes for a moment; 0 without it."""
    disk_free: int

    @property
    def needed(self) -> int:
        """Of main memory, at least."""
        return self.caches + (self.engine if self.device == "cpu" else 0)


def memory_of(scorer: Scorer) -> Memory:
    """Adds up files and tensors; reads none of them."""
    config = scorer.config
    places = [folder for _, _, folder in folders(scorer)]
    places += [folder_of(reference.lora, scorer.root) for reference in names(scorer) if reference.lora]
    files = {file for place in places for file in place.glob("*.safetensors")}
    shapes = scorer.sources[config.genome.references[0]].shapes
    bytes_each = torch.finfo(getattr(torch, config.genome.dtype)).bits // 8
    size = sum(math.prod(shape) for shape in shapes.values()) * bytes_each
    gpu = torch.cuda.is_available() and config.engine.device != "cpu"
    return Memory(
        weights=sum(file.stat().st_size for file in files),
        engine=size,
        caches=int(config.engine.cache_gb * GB),
        device="cuda" if gpu else "cpu",
        free=_free(),
        device_free=torch.cuda.mem_get_info()[0] if gpu else None,
        disk=size if config.engine.self_check else 0,
        disk_free=shutil.disk_usage(tempfile.gettempdir()).free,
    )


def memory(scorer: Scorer) -> Findings:
    """What will not fit."""
    of = memory_of(scorer)
    if of.free is not None and of.needed > of.free:
        yield Finding(
            "memory",
            f"the engine and its caches need {of.needed / GB:.1f} GB, {of.free / GB:.1f} GB are free",
            f"Lower engine.cache_gb ({scorer.config.engine.cache_gb:g}), choose a smaller genome.dtype, or free some",
        )
    elif of.free is not None and of.needed + of.weights > of.free:
        yield Finding(
            "memory",
            f"the models' {of.weights / GB:.1f} GB are more than the {(of.free - of.needed) / GB:.1f} GB that are left",
            "Every merge will read them from disk again; fewer models at a time are faster",
        )
    if of.device_free is not None and of.engine > of.device_free:
        yield Finding(
            "GPU",
            f"the engine's weights need {of.engine / GB:.1f} GB, {of.device_free / GB:.1f} GB are free",
            "Choose another with engine.device, a smaller genome.dtype, or several with vLLM's tensor_parallel_size",
        )
    if of.disk > of.disk_free:
        yield Finding(
            "disk",
            f"the self-check writes {of.disk / GB:.1f} GB to {tempfile.gettempdir()}, where {of.disk_free / GB:.1f} GB"
            " are free",
            "Set TMPDIR to a larger disk, or engine.self_check: false",
        )


def _free() -> int | None:
    """Bytes of main memory that may still be had: by the machine, and by the container's limit if there is one."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
