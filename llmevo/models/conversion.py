"""The places of a checkpoint's tensors in transformers' models.

transformers holds some tensors under other names than the checkpoint (GPT-NeoX, Granite MoE, vision-language models) or
in another form: the experts of a layer, separate in the checkpoint, are one 3-D weight. Its own table of conversions
(`transformers.conversion_mapping`) says which, so every family that it loads has its places here.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from llmevo.models.architecture import stack_of

DERIVED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"\.masked_bias$")
"""Tensors of old checkpoints that transformers computes from the config, besides those that a model's class names."""


def class_of(config: Any) -> Any:
    """Return the automatic class that makes the language model of a config, with its vision part where it has one."""
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if type(config) in known else AutoModelForImageTextToText


def transformers_config(kind: Any, config: Mapping[str, Any]) -> Any:
    """Return a config of a class as transformers reads it from a file, where infinity is written in a special form."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config))
        return kind.from_json_file(file)


@dataclass
class Part:
    """Tensors of the checkpoint that become weights of the model together; most often one tensor and one weight."""

    target: str
    """The weight, or the first of them, by its name in the model."""
    converter: WeightConverter | None = None
    sources: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """The names in the checkpoint, by the pattern of the converter that they match."""

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def convert(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Return the model's weights of the checkpoint's tensors, which must be all of `names`.

        Raises ValueError when they do not fit each other.
        """
        if self.converter is None:
            return {self.target: tensors[self.names[0]]}
        converter: Any = deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, tensors[name])
        try:
            made: dict[str, Any] = converter.convert(self.target, model=model, config=model.config)
        except RuntimeError as error:  # torch's, of shapes
            raise ValueError(f"{', '.join(self.names[:3])} make no {self.target} ({error})") from error
        return {name: weight[0] if isinstance(weight, list) else weight for name, weight in made.items()}

    def slices(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the slice of the model's weight that each tensor becomes, as views; empty where it is not so simple.

        It is for experts, which the converter stacks, and joins where gate and up projections are one weight.
        """
        operations = [*self.converter.operations] if self.converter else []
        if [type(of) for of in operations] not in ([MergeModulelist], [MergeModulelist, Concatenate]):
            return {}
        assert self.converter is not None
        patterns = [pattern for pattern in self.converter.source_patterns if pattern in self.sources]
        if len({len(self.sources[pattern]) for pattern in patterns}) != 1:
            return {}
        stacks = [weight]
        for operation in cast(list[Any], operations[1:]):
            stacks = weight.chunk(len(patterns), operation.dim)
        dim = cast(Any, operations[0]).dim
        views = [view for stack in stacks for view in stack.unbind(dim)]
        names = [name for pattern in patterns for name in self.sources[pattern]]
        return dict(zip(names, views, strict=True)) if len(names) == len(views) else {}


class Places:
    """The weights of a transformers model, and the tensors of a checkpoint that each is made of.

    Use it to write merged tensors into a running model, or to compare a model with a checkpoint.
    """

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        """`names` are all tensors of the checkpoint; the model may be on the meta device."""
        self.model = model
        self.held: dict[str, Any] = model.state_dict(keep_vars=True)
        """The model's weights and saved buffers, by its own names; a tied weight has several."""
        self.parts: dict[str, Part] = {}
        """By the name in the checkpoint."""
        names = [*names]
        self._stack = stack_of(vars(model.config.get_text_config()), names or self.held)
        self._views: dict[str, dict[str, Tensor]] = {}
        transforms = get_model_conversion_mapping(model)
        renamings = [of for of in transforms if isinstance(of, WeightRenaming)]
        converters = [of for of in transforms if isinstance(of, WeightConverter)]
        by_pattern = {pattern: of for of in converters for pattern in of.source_patterns}
        by_target: dict[str, Part] = {}
        for name in sorted(names, key=dot_natural_key):
            target, pattern = self._renamed(name, renamings, converters)
            if target not in self.held and name in self.held:
                target, pattern = self._renamed(name, [], [])
            if target not in self.held or (pattern is None and target in by_target):
                continue  # transformers has no such weight, or another name of it comes first
            converter = by_pattern[pattern] if pattern else None
            part = by_target.setdefault(target, Part(target, converter))
            part.sources.setdefault(pattern or name, []).append(name)
            self.parts[name] = part
        self.targets = {part.target for part in self.parts.values()}
        """The weights that the tensors make; the further ones of a tensor that becomes several are known after it."""

    def _renamed(self, name: str, renamings: Sequence[Any], converters: Sequence[Any]) -> tuple[str, str | None]:
        return rename_source_key(name, [*renamings], [*converters], self.model.base_model_prefix, self.held)

    def ignored(self, name: str) -> bool:
        """Return whether transformers leaves a tensor of the checkpoint out on purpose: masks, layers that predict
        further tokens, and others that its model does not use.
        """
        patterns = [*(self.model._keys_to_ignore_on_load_unexpected or ()), *DERIVED]
        return self._stack.predicts(name) or any(re.search(pattern, name) for pattern in patterns)

    @property
    def missing(self) -> list[str]:
        """The weights of the model that are not among `targets`. Of a tied weight one name is enough."""
        found = {id(self.held[name]) for name in self.targets}
        return [name for name, weight in self.held.items() if weight.requires_grad and id(weight) not in found]

    def untie(self) -> None:
        """Give tied weights that the checkpoint has under several names a tensor each.

        A merge may make them differ, by random masks of its own for each name; transformers then loads them as two.
        """
        owners: dict[int, str] = {}
        for part in self.parts.values():
            weight = self.held[part.target]
            if owners.setdefault(id(weight), part.target) == part.target or part.converter:
                continue
            path, _, name = part.target.rpartition(".")
            self.held[part.target] = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
            setattr(self.model.get_submodule(path), name, self.held[part.target])

    def together(self) -> list[Part]:
        """Return the parts of several tensors that cannot be written one by one."""
        parts = {part.target: part for part in self.parts.values() if len(part.names) > 1}
        return [part for part in parts.values() if not self._slices(part)]

    def _slices(self, part: Part) -> dict[str, Tensor]:
        if part.target not in self._views:
            self._views[part.target] = part.slices(self.held[part.target].detach())
        return self._views[part.target]

    def pairs(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name, tensor, weight) for tensors of a checkpoint, in their order.

        `weight` is the model's own, or the slice of it that the tensor becomes, and `tensor` has its form: copy the one
        into the other, or compare them. Where several tensors make one weight in another way than by slices, they are
        kept until all are there. Names without a place are left out. Raises ValueError when tensors do not fit each
        other.
        """
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors:
            part = self.parts.get(name)
            if part is None:
                continue
            if part.converter is None:
                yield name, tensor, self.held[part.target]
            elif slices := self._slices(part):
                yield name, tensor, slices[name]
            else:
                known = waiting.setdefault(part.target, {})
                known[name] = tensor
                if known.keys() == {*part.names}:
                    made = part.convert(waiting.pop(part.target), self.model)
                    self.targets |= made.keys()
                    yield from ((name, made[target], self.held[target]) for target in made)
