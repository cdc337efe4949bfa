"""The measurements that prepared models need (`merging.preparation`), made where the cache lacks them.

One forward pass a model, for some steps three. The sums are written to the cache folder, by the content of the model
and the texts.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmevo.engines.hf import HfEngine
from llmevo.errors import SourceError
from llmevo.merging.merger import Merger
from llmevo.merging.preparation.measured import Measurement
from llmevo.merging.recipe import Recipe
from llmevo.models.files import partial_folder, rename_once
from llmevo.models.safetensors_writer import header_size, write_file
from llmevo.models.sources import Sources
from llmevo.run.activations import Sums, batches, linear_layers, watched
from llmevo.run.upward import sums_above_merged


@dataclass(frozen=True)
class Cost:
    """What measuring took."""

    models: int = 0
    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.models} forward passes over {self.tokens} tokens of {self.texts} texts in {self.seconds:.0f} s"


def measure(
    measurements: Iterable[Measurement],
    sources: Sources,
    tokenizer: Path,
    device: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Cost:
    """Make the measurements that the cache lacks. `say` is called before the first one.

    Raises SourceError when a model cannot be loaded or the cache cannot be written, TaskError for texts without tokens.
    """
    missing = [*{of.folder: of for of in measurements if not of.folder.exists()}.values()]
    if not missing:
        return Cost()
    count = sum(len(of.texts.all) for of in missing)
    say(f"Measuring the inputs of the layers: {len(missing)} models, {count} texts…")
    started = time.monotonic()
    on_gpu = torch.cuda.is_available() and device != "cpu"
    engine = HfEngine(
        sources.engine_folder(missing[0].model), tokenizer, "bfloat16" if on_gpu else "float32", device, Merger(sources)
    )
    try:
        tokens = sum(_measure(of, engine, sources) for of in missing if of.upward is None)
        tokens += _measure_upward([of for of in missing if of.upward], engine, sources)
    finally:
        engine.close()
    return Cost(len(missing), count, tokens, time.monotonic() - started)


def _measure(of: Measurement, engine: HfEngine, sources: Sources) -> int:
    """Measure one model; return the number of tokens."""
    engine.swap(Recipe.of_one(of.model, str(engine.model.dtype).removeprefix("torch.")))
    groups = batches(engine, of.texts.all, "prepare: the texts")
    sums = Sums(of.kind)
    with torch.no_grad(), watched(linear_layers(engine.model, sources[of.model].shapes), sums.add):
        for _, tokens in groups:
            engine.model(input_ids=tokens.to(engine.device), use_cache=False)
    _write(of, sums)
    return sum(tokens.numel() for _, tokens in groups)


@torch.no_grad()
def _measure_upward(every: Sequence[Measurement], engine: HfEngine, sources: Sources) -> int:
    """Measure the experts of each merge together; return the number of tokens."""
    count, made = 0, dict[str, Any]()
    for of in every:
        assert of.upward
        key = repr(of.upward.made_of)
        if key not in made:
            made[key], tokens = sums_above_merged(of.upward, engine, sources)
            count += tokens
        _write(of, made[key][of.model])
    return count


def _write(of: Measurement, sums: Sums) -> None:
    try:
        of.folder.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(of.folder) as partial:
            room = header_size((name, tuple(total.shape)) for name, total in sums.means())
            write_file(sums.means(), partial / "model.safetensors", room)
            rename_once(partial, of.folder)
    except OSError as error:
        raise SourceError(f"{of.folder}: measurements cannot be written ({error})") from error
