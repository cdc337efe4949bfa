"""Models whose tensors are not all those of the base: the text tower of a vision-language model, tied heads, layers for
multi-token prediction.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmevo.models.architecture import (
    EMBEDDINGS,
    HEAD,
    QUANTIZED_NAMES,
    Shapes,
    TextStack,
    is_multimodal,
    stack_of,
    text_config,
)
from llmevo.models.checkpoints import Source, Weight, stored

WRAPPED = "base_model."
"""The beginning of names as PEFT's wrapper has them; such a checkpoint is no model that can be loaded."""


class PlacedModel(Source):
    """A model under the names of another one, the base, with the base's own tensors where it has none.

    The tensors of the base are the same memory, so that a merge copies them.
    """

    def __init__(self, own: Source, base: Source, fit: "Placement") -> None:
        self.own, self._base, self.fit = own, base, fit
        self.derived = own.derived
        held = {place: own.shapes[name] for place, name in fit.names.items()}
        shapes = {
            name: held.get(name, shape) for name, shape in base.shapes.items() if name in held or name in fit.lent
        }
        self.shapes = shapes | {name: own.shapes[name] for name in fit.extra}
        origins = {name: self._origin(name) for name in self.shapes}
        self.quantized = {name for name, (source, origin) in origins.items() if origin in source.quantized}

    def _origin(self, name: str) -> tuple[Source, str]:
        """Return the model that a tensor is of, and its name there."""
        return (self._base, name) if name in self.fit.lent else (self.own, self.fit.names.get(name, name))

    def tensor(self, name: str) -> Tensor:
        source, origin = self._origin(name)
        return source.tensor(origin)

    def dtype(self, name: str) -> torch.dtype:
        source, origin = self._origin(name)
        return source.dtype(origin)

    def weight(self, name: str) -> Weight:
        source, origin = self._origin(name)
        return source.weight(origin)

    def rounding_error(self, name: str) -> float:
        source, origin = self._origin(name)
        return source.rounding_error(origin)


@dataclass(frozen=True)
class Placement:
    """The tensors of a model in the places of those of the base."""

    names: Mapping[str, str]
    """{the base's name: the model's}."""
    lent: Mapping[str, str]
    """{a tensor that only the base has: the part it belongs to}, such as `visual` or `mtp`."""
    left_out: Mapping[str, str]
    """{a tensor that only the model has: why no result has it}."""
    extra: Sequence[str]
    """All other tensors that only the model has: it cannot be merged."""
    predicts: bool
    """Whether some of those are for multi-token prediction."""


def fit(
    base: tuple[str, Source, Mapping[str, Any]],
    other: tuple[str, Source, Mapping[str, Any]],
    is_excluded: Callable[[str], bool] = lambda _: False,
) -> Placement | None:
    """Return how a model's tensors take the places of the base's. Each is (name in messages, weights, config.json).

    Names are compared from the language model's layers on: `model.layers.` takes the place of
    `model.language_model.layers.`. A whole part that only the base has (a vision tower, multi-token prediction) is
    lent. A part that only the model has is left out if the base is a text model and the part is none, or if all of it
    is excluded by the user; `is_excluded` is asked with a tensor's name. Return None for models of different kinds.
    """
    (one, first, config), (named, second, own_config) = base, other
    is_tower = bool(own_config) and is_multimodal(config) != is_multimodal(own_config)
    kinds = {each.get("model_type") for each in (config, own_config)} - {None}
    if len(kinds) > 1 and not is_tower:
        return None
    stacks = stack_of(config, first.shapes), stack_of(own_config or config, second.shapes)
    names: dict[str, str] = {}
    extra: list[str] = []
    for name in second.shapes:
        place = next((place for place in places(name, *stacks) if place in first.shapes), None)
        if place is None or place in names:
            extra.append(name)
        else:
            names[place] = name
    _tie_head(names, first.shapes, second.shapes, stacks[1], own_config)
    lent = {
        name: part
        for part, of in _parts(first.shapes, stacks[0]).items()
        if not any(name in names for name in of) and _is_separate(part, of, stacks[0])
        for name in of
    }
    left_out = {name: f"only in {named}, where its weight is 0" for name in extra if is_excluded(name)}
    left_out |= _copied_head(extra, named, one, second, stacks[1])
    for part, of in _parts(second.shapes, stacks[1]).items() if is_tower and is_multimodal(own_config) else ():
        if {*of} <= {*extra} and _is_separate(part, of, stacks[1]) and not any(map(stacks[1].predicts, of)):
            left_out |= dict.fromkeys(of, f"only in {named}, and {one} is a text model")
    rest = [name for name in extra if name not in left_out]
    return Placement(names, lent, left_out, rest, any(map(stacks[1].predicts, rest)))


def places(name: str, base: TextStack, own: TextStack) -> Sequence[str]:
    """Return the names that a model's tensor may have in the base, the likeliest first."""
    if base.start == own.start or base.start.startswith(WRAPPED) or own.start.startswith(WRAPPED):
        return [name]
    shared = 0
    here, there = base.start.split("."), own.start.split(".")
    while shared < min(len(here), len(there)) and here[-1 - shared] == there[-1 - shared]:
        shared += 1
    roots = (
        (_joined(here[: len(here) - shared]), _joined(there[: len(there) - shared])),
        (base.parent, own.parent),
    )
    if number := own.numbered(name):
        return [f"{base.start}{number[0]}.{number[1]}"]
    moved = [mine + name.removeprefix(theirs) for mine, theirs in roots if name.startswith(theirs)]
    # A vision tower may have moved on its own: `visual.` is `model.visual.` elsewhere.
    tops = [[_joined(words[:count]) for count in range(len(words) - 1)] for words in (here, there)]
    moved.append(name)
    return moved + [a + name.removeprefix(b) for b in tops[1] for a in tops[0] if name.startswith(b)]


def _joined(parts: Sequence[str]) -> str:
    return "".join(f"{part}." for part in parts)


def _parts(names: Shapes, stack: TextStack) -> Mapping[str, Sequence[str]]:
    """Return the tensors of every part of a model: of each layer, and of each module next to the layers or above."""
    parts: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        count = next(n for n in range(1, len(words) + 1) if not stack.start.startswith(_joined(words[:n])))
        parts.setdefault(".".join(words[:count]), []).append(name)
    return parts


def _is_separate(part: str, names: Sequence[str], stack: TextStack) -> bool:
    """Return whether a part may be in one model only: a tower or prediction, not a layer, an embedding, a norm."""
    if any(stack.layer(name) is not None or ".lora_" in name or name.endswith(QUANTIZED_NAMES) for name in names):
        return False
    return not {*names} <= {f"{part}.weight", f"{part}.bias"}


def _embeddings(names: Shapes, stack: TextStack) -> str | None:
    """Return the name of the token embeddings."""
    found = ((name, EMBEDDINGS.search(name)) for name in names)
    return next((name for name, match in found if match and name[: match.start()] == stack.parent), None)


def _tie_head(names: dict[str, str], base: Shapes, own: Shapes, stack: TextStack, config: Mapping[str, Any]) -> None:
    """Let the embeddings of a model with a tied head stand for its head, which they are."""
    head = next((name for name in base if name.endswith(HEAD)), None)
    embeddings = _embeddings(own, stack)
    tied = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings", True))
    if head and head not in names and embeddings and tied and base[head] == own[embeddings]:
        names[head] = embeddings


def _copied_head(extra: Sequence[str], named: str, one: str, own: Source, stack: TextStack) -> dict[str, str]:
    """Return a head that only the model has, if it is a copy of its embeddings, with the reason to leave it out."""
    head, embeddings = next((name for name in extra if name.endswith(HEAD)), None), _embeddings(own.shapes, stack)
    if not head or not embeddings or own.shapes[head] != own.shapes[embeddings]:
        return {}
    if not torch.equal(stored(own.weight(head)), stored(own.weight(embeddings))):
        return {}
    return {head: f"in {named} a copy of the embeddings, which are the head of {one}"}
