"""The inputs of a model's linear layers on some texts, for preparations that need them (`merging.preparation`).

One forward pass a model; the sums are kept, no activations. They are written to the cache folder, by the content of the
model and the texts.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmevo.engines.hf import HfEngine
from llmevo.engines.loading import Places
from llmevo.errors import SourceError, TaskError
from llmevo.merging.merger import Merger
from llmevo.merging.preparation.measured import Measurement
from llmevo.merging.recipe import Recipe
from llmevo.models.files import partial_folder, rename_once
from llmevo.models.safetensors_writer import header_size, write_file
from llmevo.models.sources import Sources
from llmevo.models.tokenizer import VOCABULARY

LONGEST = 1024
"""Tokens of a text that are read."""

TOGETHER = 16
"""Texts that are read at a time."""

Key = TypeVar("Key")


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
    from llmevo.run.upward import sums_above_merged

    count, made = 0, dict[str, Any]()
    for of in every:
        assert of.upward
        key = repr(of.upward.made_of)
        if key not in made:
            made[key], tokens = sums_above_merged(of.upward, engine, sources)
            count += tokens
        _write(of, made[key][of.model])
    return count


def _write(of: Measurement, sums: "Sums") -> None:
    try:
        of.folder.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(of.folder) as partial:
            room = header_size((name, tuple(total.shape)) for name, total in sums.means())
            write_file(sums.means(), partial / "model.safetensors", room)
            rename_once(partial, of.folder)
    except OSError as error:
        raise SourceError(f"{of.folder}: measurements cannot be written ({error})") from error


def batches(engine: HfEngine, texts: Sequence[str], words: str) -> list[tuple[list[int], Tensor]]:
    """Return texts of the same number of tokens together, with their places, so that none is padded.

    Texts without tokens are left out. Raises TaskError where that is all of them; `words` name the texts.
    """
    by_length: dict[int, list[tuple[int, Tensor]]] = {}
    for place, text in enumerate(texts):
        tokens = engine.lm.tokenizer(text, return_tensors="pt")["input_ids"][:, :LONGEST]
        if tokens.numel():
            by_length.setdefault(tokens.shape[1], []).append((place, tokens))
    if not by_length:
        raise TaskError(f"{words} have no tokens")
    some = [same[start : start + TOGETHER] for same in by_length.values() for start in range(0, len(same), TOGETHER)]
    return [([place for place, _ in each], torch.cat([tokens for _, tokens in each])) for each in some]


@contextmanager
def watched(modules: Mapping[Key, Any], add: Callable[[Key, Tensor], None]) -> Generator[None]:
    """Call `add` with the key of each module and its input, whenever the module runs."""

    def hook(key: Key) -> Callable[[Any, Sequence[Tensor]], None]:
        return lambda _, given: add(key, given[0])

    handles = [module.register_forward_pre_hook(hook(key)) for key, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Sums:
    """The sum over tokens of |x| or xxᵀ of the inputs of the linear layers; those that share an input share the sum."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}
        """{a layer: the first one with the same input}"""
        self._latest: tuple[str, Any] = ("", None)

    def add(self, name: str, given: Tensor) -> None:
        if self._latest[1] is not given:
            self._latest = (name, given)
        first = self._first.setdefault(name, self._latest[0])
        if first != name:
            return
        rows = given.detach().reshape(-1, given.shape[-1]).float()
        added = rows.T @ rows if self.kind == "grams" else rows.abs().sum(0)
        self._sums[name] = self._sums[name].add_(added) if name in self._sums else added
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    def means(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the means, of all layers or of those with these names that have been added."""
        wanted = self._first if names is None else [name for name in names if name in self._first]
        for name in wanted:
            first = self._first[name]
            yield name, (self._sums[first] / self._counts[first]).cpu()


def linear_layers(model: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the linear layers by the names of their weights in the checkpoint."""
    targets = {part.target: name for name, part in Places(model, names).parts.items() if part.converter is None}
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        name = targets.get(f"{path}.weight")
        if name and isinstance(module, torch.nn.Linear) and not VOCABULARY.search(name):
            found[name] = module
    return found
