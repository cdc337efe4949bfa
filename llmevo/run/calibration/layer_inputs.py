"""The measurements that prepared models need (`merging.preparation`), made where the cache lacks them.

One forward pass a model, for `regmean_plusplus` two or three. The sums are written to the cache folder, by the content
of the model and the texts.
"""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from llmevo.engines.hf import HfEngine
from llmevo.errors import SourceError
from llmevo.merging.merger import Merger
from llmevo.merging.preparation.measured import Measurement
from llmevo.merging.preparation.prepared import Prepared
from llmevo.merging.recipe import Recipe
from llmevo.models.files import partial_folder, rename_once
from llmevo.models.references import ModelReference
from llmevo.models.safetensors_writer import WeightFile, header_size, write_file
from llmevo.models.sources import Sources
from llmevo.run.calibration.activations import Sums, batches, linear_layers, watched
from llmevo.run.calibration.progress import Progress
from llmevo.run.calibration.sequential import SequentialPass

FILE = "model.safetensors"


@dataclass(frozen=True)
class Cost:
    """What measuring took."""

    models: int = 0
    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.models} forward passes over {self.tokens} tokens of {self.texts} texts in {self.seconds:.0f} s"


def make_prepared(
    prepared: Prepared,
    sources: Sources,
    tokenizer: Path,
    device: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Cost, float] | None:
    """Make prepared experts, and forget what they are made of. Return what measuring cost and the seconds of the rest;
    None where another process has made them.

    Of the processes of one machine the first one does so, and the others wait. `say` is told what is measured, and how
    much of it is done. Raises what `measure` and `Prepared.make` raise.
    """
    with prepared.locked():
        made = None
        if not prepared.folder.exists():
            cost = measure(prepared.all_measurements, prepared.base, sources, tokenizer, device, say)
            if cost.models:
                say(f"Measured: {cost}.")
            started = time.monotonic()
            prepared.make()
            made = cost, time.monotonic() - started
        prepared.forget()  # also what an interrupt left
    return made


def measure(
    measurements: Iterable[Measurement],
    base: ModelReference,
    sources: Sources,
    tokenizer: Path,
    device: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Cost:
    """Make the measurements that the cache lacks, each with the base's config, which the merged model has. `say` is
    called before the first one, and told how much is done meanwhile.

    Raises SourceError when a model cannot be loaded or the cache cannot be written, TaskError for texts without tokens.
    """
    missing = [*{of.folder: of for of in measurements if not of.folder.exists()}.values()]
    if not missing:
        return Cost()
    count = sum(len(of.texts.all) for of in missing)
    say(f"Measuring the inputs of the layers: {len(missing)} models, {count} texts…")
    started, progress = time.monotonic(), Progress(len(missing), say)
    on_gpu = torch.cuda.is_available() and device != "cpu"
    dtype = "bfloat16" if on_gpu else "float32"
    engine = HfEngine(sources.engine_folder(base), tokenizer, dtype, device, Merger(sources))
    try:
        tokens = sum(_measure(of, engine, sources, progress) for of in missing if of.sequential is None)
        tokens += _measure_sequentially([of for of in missing if of.sequential], engine, sources, progress)
    finally:
        engine.close()
    return Cost(len(missing), count, tokens, time.monotonic() - started)


def _measure(of: Measurement, engine: HfEngine, sources: Sources, progress: Progress) -> int:
    """Measure one model; return the number of tokens."""
    engine.swap(Recipe.of_one(of.model, str(engine.model.dtype).removeprefix("torch.")))
    groups = batches(engine, of.texts.all, f"prepare: the texts for {of.model}")
    layers = linear_layers(engine.model, sources[of.model].shapes)
    sums = Sums(of.kind, device_for(engine.device, [layer.in_features for layer in layers.values()], of.kind))
    with torch.no_grad(), watched(layers, sums.add):
        for _, tokens in progress.through(groups, sizes := [tokens.numel() for _, tokens in groups]):
            engine.lm.read(tokens)
    _write(of, sums)
    return sum(sizes)


def device_for(device: str, widths: Iterable[int], kind: str) -> str:
    """Return where the sums of layers that read so many numbers are kept: on the device, or on the CPU where a GPU has
    not twice the memory for them.
    """
    if not device.startswith("cuda"):
        return device
    needed = sum(4 * width ** (2 if kind == "grams" else 1) for width in widths)
    return device if torch.cuda.mem_get_info(device)[0] > 2 * needed else "cpu"


@torch.no_grad()
def _measure_sequentially(every: Sequence[Measurement], engine: HfEngine, sources: Sources, progress: Progress) -> int:
    """Measure the experts of each merge together, written block by block; return the number of tokens."""
    count, merges = 0, dict[str, list[Measurement]]()
    for of in every:
        merges.setdefault(repr(of.sequential and of.sequential.made_of), []).append(of)
    for own in merges.values():
        assert own[0].sequential
        blocks = SequentialPass(own[0].sequential, engine, sources)
        room = header_size(blocks.shapes.items())
        with _writing(own) as folders, ExitStack() as stack:
            files = {
                of.model: stack.enter_context(WeightFile(folder / FILE, room))
                for of, folder in zip(own, folders, strict=True)
            }
            for expert, means in progress.through(blocks, [1] * len(blocks), len(own)):
                for name, mean in means.items() if expert in files else ():
                    files[expert].add(name, mean)
        count += blocks.tokens
    return count


@contextmanager
def _writing(every: Sequence[Measurement]) -> Generator[list[Path]]:
    """Yield a folder for each measurement, which becomes its own in the end. Raises SourceError."""
    try:
        with ExitStack() as stack:
            made: list[Path] = []
            for of in every:
                of.folder.parent.mkdir(parents=True, exist_ok=True)
                made.append(stack.enter_context(partial_folder(of.folder)))
            yield made
            for of, partial in zip(every, made, strict=True):
                rename_once(partial, of.folder)
    except OSError as error:
        raise SourceError(f"{every[0].folder}: measurements cannot be written ({error})") from error


def _write(of: Measurement, sums: Sums) -> None:
    with _writing([of]) as (folder,):
        write_file(sums.means(), folder / FILE, header_size(sums.shapes.items()))
