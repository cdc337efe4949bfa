"""Sequential calibration: the inputs of layers above merged ones, for RegMean++ (https://arxiv.org/abs/2508.03121,
algorithm 1).

Block by block from below: each expert's block reads what the merged blocks below it make of the expert's texts, and the
inputs of its linear layers are summed; then the block is merged by the step with weights 1, and makes the input of the
next one. In memory are the sums of one block, of all experts, and a hidden state of every token.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmevo.engines.hf import HfEngine
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.preparation.measured import Sequential
from llmevo.merging.preparation.registry import STEPS
from llmevo.merging.recipe import Recipe
from llmevo.models.checkpoints import LowRank, Weight, same
from llmevo.models.conversion import Places
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.run.calibration.activations import Sums, batches, layers_of, linear_layers, stack_in, watched

Means = Mapping[str, Tensor]
"""{a weight: the mean over tokens of xxᵀ, x being its input}"""


class Arguments(NamedTuple):
    """What a block is given beside the hidden state."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def run(self, block: Any, hidden: Tensor) -> Any:
        return block(hidden, *self.positional, **self.named)


class SequentialPass:
    """The experts of a merge, and what their layers read above merged ones, from the lowest block to the highest."""

    def __init__(self, of: Sequential, engine: HfEngine, sources: Sources) -> None:
        """Load the base. Raises SourceError for a model without numbered blocks."""
        self.of, self.engine, self.sources, self.model = of, engine, sources, engine.model
        engine.swap(Recipe.of_one(of.base, str(self.model.dtype).removeprefix("torch.")))
        self.places = Places(self.model, sources[of.base].shapes)
        self.layers = linear_layers(self.model, sources[of.base].shapes)
        self.blocks, stack = layers_of(self.model), stack_in(self.model)
        self.names: dict[int | None, list[str]] = {place: [] for place in (None, *range(len(self.blocks)))}
        """{a block, or None: its tensors in the checkpoint}"""
        for name, part in self.places.parts.items():
            self.names[stack.layer(part.target)].append(name)
        self.tokens = 0
        """How many were read, once the pass has begun."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of all means, or more: not every layer reads something."""
        return {name: (layer.in_features,) * 2 for name, layer in self.layers.items()}

    def __len__(self) -> int:
        return len(self.blocks) * len(self.of.read_by)

    def __iter__(self) -> Iterator[tuple[ModelReference, Means]]:
        """Yield the means of each expert in each block. Raises TaskError for texts without tokens."""
        self._put(None, dict(self._merged(None, {})))
        groups = {
            expert: [tokens for _, tokens in batches(self.engine, texts.all, f"prepare: the texts for {expert}")]
            for expert, texts in self.of.read_by.items()
        }
        self.tokens = sum(tokens.numel() for of_expert in groups.values() for tokens in of_expert)
        first, *_ = next(iter(groups.values()))
        with _skipped(self.blocks if self._same_if_skipped(first) else []):
            read = {expert: [self._arguments(each) for each in of_expert] for expert, of_expert in groups.items()}
        for place, module in enumerate(self.blocks):
            inside = {name: layer for name, layer in self.layers.items() if name in self.names[place]}
            means: dict[ModelReference, Means] = {}
            for expert, batches_of in read.items():
                source, sums = self.sources[expert], Sums("grams")
                self._put(place, {name: _dense(source.weight(name)) for name in self.names[place]})
                with watched(inside, sums.add):
                    for hidden, given in batches_of:
                        given[place].run(module, hidden)
                means[expert] = dict(sums.means())
            yield from means.items()
            self._put(place, dict(self._merged(place, means)))
            for batch in (batch for of_expert in read.values() for batch in of_expert):
                made = batch[1][place].run(module, batch[0])
                batch[0] = made if isinstance(made, Tensor) else made[0]

    def _arguments(self, tokens: Tensor) -> list[Any]:
        """Return [what the first block reads, {block: its other arguments}] of a batch."""
        found: list[Any] = [None, {}]
        places = {module: place for place, module in enumerate(self.blocks)}

        def keep(module: Any, given: Sequence[Any], named: dict[str, Any]) -> None:
            if places[module] == 0:
                found[0] = given[0] if given else named["hidden_states"]
            named = {name: value for name, value in named.items() if name != "hidden_states"}
            found[1][places[module]] = Arguments(tuple(given[1:]), named)

        with ExitStack() as stack:
            for module in self.blocks:
                stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
            self.engine.lm.read(tokens)
        return found

    def _same_if_skipped(self, tokens: Tensor) -> bool:
        """Return whether the arguments of all blocks are the same where the blocks are not run, which saves a pass.

        In some families they depend on what the blocks below make.
        """
        made: list[Any] = []
        with ExitStack() as stack:
            for module in self.blocks:
                stack.callback(module.register_forward_hook(lambda _, __, output: made.append(output)).remove)
            run = self._arguments(tokens)
        if not all(isinstance(output, Tensor) for output in made):
            return False
        with _skipped(self.blocks):
            return _alike(self._arguments(tokens), run)

    def _merged(self, block: int | None, means: Mapping[ModelReference, Means]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a block after the step, with weights 1."""
        step, experts = STEPS[self.of.step], self.of.read_by
        for name in self.names[block]:
            base, models = self.sources[self.of.base].tensor(name), [self.sources[of].weight(name) for of in experts]
            changed = not all(isinstance(of, Tensor) and same(of, base) for of in models)
            if changed and base.is_floating_point():
                group = TensorGroup(
                    base, models, {"weight": [1.0] * len(models)}, {"normalize": 0.0, "lambda": 1.0}, [0] * len(models)
                )
                measured = [own[name] for own in means.values() if name in own]
                weights = step.prepare(group, self.of.parameters, measured) if measured else models
                origin = base.float()
                yield name, origin + sum(_dense(weight).float() - origin for weight in weights)
            else:
                yield name, base

    def _put(self, block: int | None, tensors: Mapping[str, Tensor]) -> None:
        for _, tensor, own in self.places.pairs((name, tensors[name]) for name in self.names[block]):
            own.copy_(tensor)


@contextmanager
def _skipped(blocks: Sequence[Any]) -> Generator[None]:
    """Let blocks return the hidden state that they are given."""

    def same(*given: Tensor, hidden_states: Tensor | None = None, **_: Any) -> Tensor | None:
        return given[0] if given else hidden_states

    own = [vars(module).get("forward") for module in blocks]
    try:
        for module in blocks:
            module.forward = same
        yield
    finally:
        for module, forward in zip(blocks, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _alike(one: Any, other: Any) -> bool:
    """Return whether two arguments, or lists and tables of them, are the same to the last bit."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple):
        of: Sequence[Any] = one
        return type(other) is type(one) and len(of) == len(other) and all(map(_alike, of, other))
    if isinstance(one, dict):
        table: dict[Any, Any] = one
        return type(other) is dict and table.keys() == other.keys() and all(_alike(table[k], other[k]) for k in table)
    return bool(one == other)


def _dense(weight: Weight) -> Tensor:
    return weight.dense() if isinstance(weight, LowRank) else weight
