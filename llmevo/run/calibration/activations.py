"""The inputs of a model's layers on some texts: texts in batches, the layers, hooks on them, and sums over tokens.

Only the sums are kept, no activations.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmevo.engines.hf import HfEngine
from llmevo.errors import SourceError, TaskError
from llmevo.models.architecture import TextStack, stack_of
from llmevo.models.conversion import Places
from llmevo.models.tokenizer import VOCABULARY

LONGEST = 1024
"""Tokens of a text that are read."""

TOGETHER = 16
"""Texts that are read at a time."""

Key = TypeVar("Key")


def batches(engine: HfEngine, texts: Sequence[str], words: str) -> list[tuple[list[int], Tensor]]:
    """Return texts of the same number of tokens together, with their places, so that none is padded.

    Texts without tokens are left out. Raises TaskError where that is all of them; `words` name the texts.
    """
    # More than a model has learned positions for cannot be read by one without rotary embeddings.
    config = engine.model.config.get_text_config()
    longest = min(LONGEST, getattr(config, "max_position_embeddings", None) or LONGEST)
    by_length: dict[int, list[tuple[int, Tensor]]] = {}
    for place, text in enumerate(texts):
        tokens = engine.lm.tokenizer(text, return_tensors="pt")["input_ids"][:, :longest]
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

    def __init__(self, kind: str, device: str | None = None) -> None:
        """`device` keeps the sums, by default the one that the layers run on."""
        self.kind, self.device = kind, device
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
        if name not in self._sums:
            shape = rows.shape[1:] * (2 if self.kind == "grams" else 1)
            self._sums[name] = torch.zeros(shape, device=self.device or rows.device)
        _add(rows, self._sums[name])
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each layer's mean."""
        return {name: tuple(self._sums[first].shape) for name, first in self._first.items()}

    def means(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the mean of each layer."""
        for name, first in self._first.items():
            mean = self._sums[first] / self._counts[first]
            yield name, (mean.tril() + mean.tril(-1).T if mean.ndim == 2 else mean).cpu()


def _add(rows: Tensor, total: Tensor) -> None:
    """Add the sum over rows of |x| or xxᵀ to a total."""
    if total.ndim == 1:
        total.add_(rows.abs().sum(0).to(total.device))
    elif rows.device != total.device:
        total.add_((rows.T @ rows).to(total.device))
    else:  # by torch: a BLAS with threads of its own takes the processor from the layers in between
        total.addmm_(rows.T, rows)


def stack_in(model: Any) -> TextStack:
    """Return where the layers of a running model are, by the names of its weights."""
    return stack_of(vars(model.config.get_text_config()), model.state_dict())


def layers_of(model: Any) -> list[Any]:
    """Return the layers of a running model."""
    return [*model.get_submodule(stack_in(model).start.rstrip(".")).children()]


def linear_layers(model: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the linear layers by the names of their weights in the checkpoint. Raises SourceError for a model without
    any: one whose layers are of another class, such as GPT-2's, whose matrices are transposed.
    """
    targets = {part.target: name for name, part in Places(model, names).parts.items() if part.converter is None}
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        name = targets.get(f"{path}.weight")
        if name and isinstance(module, torch.nn.Linear) and not VOCABULARY.search(name):
            found[name] = module
    if not found:
        raise SourceError(
            f"prepare: {type(model).__name__} has no layers of the class torch.nn.Linear, whose inputs this step reads;"
            " give another step"
        )
    return found
