"""The inputs of layers above merged ones, for RegMean++ (https://arxiv.org/abs/2508.03121, algorithm 1).

Block by block from below: each expert's block reads what the merged blocks below it make of the expert's texts, and the
inputs of its linear layers are summed; then the block is merged by the step with weights 1, and makes the input of the
next one. The sums of all experts are in memory at a time, and hidden states of all texts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from llmevo.engines.hf import HfEngine
from llmevo.engines.loading import Places
from llmevo.errors import RecipeError
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.preparation.measured import Upward
from llmevo.merging.preparation.registry import STEPS
from llmevo.merging.recipe import Recipe
from llmevo.models.checkpoints import LowRank, Weight, same
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.run.activations import Sums, batches, linear_layers, watched

BLOCK = re.compile(r"^(?:.+\.)?layers?\.(\d+)(?=\.)|^(?:.+\.)?(?:h|blocks)\.(\d+)(?=\.)")
"""The beginning of the name of a weight in a block."""


def sums_above_merged(of: Upward, engine: HfEngine, sources: Sources) -> tuple[dict[ModelReference, Sums], int]:
    """Return the sums of each expert, and the number of tokens that were read.

    Raises RecipeError for a model whose blocks are not found by the names of its weights, TaskError for texts without
    tokens.
    """
    return _Climb(of, engine, sources).climbed()


class _Climb:
    """The experts of a merge, and what their layers have read so far."""

    def __init__(self, of: Upward, engine: HfEngine, sources: Sources) -> None:
        self.of, self.engine, self.sources, self.model = of, engine, sources, engine.model
        engine.swap(Recipe.of_one(of.base, str(self.model.dtype).removeprefix("torch.")))
        self.places = Places(self.model, sources[of.base].shapes)
        self.layers = linear_layers(self.model, sources[of.base].shapes)
        self.sums = {expert: Sums("grams") for expert in of.read_by}
        self.names: dict[str, list[str]] = {}
        """{a block, or an empty text: its tensors in the checkpoint}"""
        for name, part in self.places.parts.items():
            found = BLOCK.match(part.target)
            self.names.setdefault(found[0] if found else "", []).append(name)

    def climbed(self) -> tuple[dict[ModelReference, Sums], int]:
        blocks = sorted((name for name in self.names if name), key=lambda name: int(re.findall(r"\d+", name)[-1]))
        if not blocks or len({re.sub(r"\d+$", "", name) for name in blocks}) > 1:
            raise RecipeError(
                f"prepare: {self.of.step} finds no single stack of layers in {type(self.model).__name__}; use regmean"
            )
        self._put("", dict(self._merged("")))
        read = {expert: self._beginning(expert, blocks) for expert in self.of.read_by}
        for block in blocks:
            module = self.model.get_submodule(block)
            inside = {name: layer for name, layer in self.layers.items() if name in self.names[block]}
            for expert, sums in self.sums.items():
                source = self.sources[expert]
                self._put(block, {name: _dense(source.weight(name)) for name in self.names[block]})
                with watched(inside, sums.add):
                    for hidden, given in read[expert]:
                        module(hidden, **given[block])
            self._put(block, dict(self._merged(block)))
            for batch in (batch for of_expert in read.values() for batch in of_expert):
                made = module(batch[0], **batch[1][block])
                batch[0] = made if isinstance(made, Tensor) else made[0]
        return self.sums, sum(batch[0].shape[:2].numel() for each in read.values() for batch in each)

    def _beginning(self, expert: ModelReference, blocks: Sequence[str]) -> list[list[Any]]:
        """Return [what the first block reads, {block: its other inputs}] of each batch of an expert's texts."""
        found: list[list[Any]] = []
        modules = {self.model.get_submodule(block): block for block in blocks}

        def keep(module: Any, given: Sequence[Tensor], named: dict[str, Any]) -> None:
            named = dict(named)
            hidden = given[0] if given else named.pop("hidden_states")
            if modules[module] == blocks[0]:
                found.append([hidden, {}])
            found[-1][1][modules[module]] = named

        handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
        try:
            for _, tokens in batches(self.engine, self.of.read_by[expert].all, "prepare: the texts"):
                self.model(input_ids=tokens.to(self.engine.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _merged(self, block: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a block after the step, with weights 1."""
        step, experts = STEPS[self.of.step], self.of.read_by
        grams: Mapping[ModelReference, Mapping[str, Tensor]] = {
            expert: dict(sums.means(self.names[block])) for expert, sums in self.sums.items()
        }
        for name in self.names[block]:
            base, models = self.sources[self.of.base].tensor(name), [self.sources[of].weight(name) for of in experts]
            changed = not all(isinstance(of, Tensor) and same(of, base) for of in models)
            if changed and base.is_floating_point():
                group = TensorGroup(
                    base, models, {"weight": [1.0] * len(models)}, {"normalize": 0.0, "lambda": 1.0}, [0] * len(models)
                )
                measured = [own[name] for own in grams.values() if name in own]
                weights = step.prepare(group, self.of.parameters, measured) if measured else models
                origin = base.float()
                yield name, origin + sum(_dense(weight).float() - origin for weight in weights)
            else:
                yield name, base

    def _put(self, block: str, tensors: Mapping[str, Tensor]) -> None:
        for _, tensor, own in self.places.pairs((name, tensors[name]) for name in self.names[block]):
            own.copy_(tensor)


def _dense(weight: Weight) -> Tensor:
    return weight.dense() if isinstance(weight, LowRank) else weight
