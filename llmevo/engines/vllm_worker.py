"""The part of the vLLM engine inside vLLM's workers. It merges there, so only recipes cross a process boundary.

vLLM's layer-wise reload has rules of its own, which this module follows:

- A layer that gets no weight keeps the old one, but a layer that gets a part (the queries of a fused query-key-value
  projection) is filled up with garbage. So tensors are loaded again by whole parts of a layer.
- An iterator that raises leaves layers half open, and the next load continues from there. So this one never raises: it
  records the failure and ends, vLLM closes the layers, and the next load replaces everything.
- With tied embeddings the output head shares the embeddings' weight but, on CPU, multiplies with a packed copy of
  its own, which reloading does not update. So tied heads are packed again after every load.
- It counts what a layer's own loader copies. Where a model copies into a weight itself, as that of gpt-oss does with
  its experts, the copy is lost and the old weights stay. So such a write is an error.
- On CPU the weights of experts are packed when the model starts, and reloading copies later ones over them as they
  are, unpacked. So experts that are loaded again are set up as at the start.
- On CPU in bfloat16 the short convolutions of state-space layers are packed apart from the view of them that the layer
  computes with, which keeps the first weights. So they are copied into that view after every load.
"""

import hashlib
import logging
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch as dispatch

from llmevo.errors import CandidateError, LlmevoError, SourceError, machine_error
from llmevo.merging.merger import Merger
from llmevo.merging.path import padded
from llmevo.merging.recipe import Recipe
from llmevo.merging.vocabulary import open_models
from llmevo.merging.writer import with_layers_of
from llmevo.models.architecture import LAYER, LAYER_LISTS, text_config
from llmevo.models.checkpoints import Checkpoint, read_object
from llmevo.models.layer_kinds import MORE_LISTS, NUMBERS, PATTERN
from llmevo.models.sources import Sources

KINDS = (*LAYER_LISTS, *MORE_LISTS, PATTERN, *NUMBERS)
"""The keys of a config that say the kinds of layers; a running model's cannot change."""

KERNEL = "moe_kernel"
"""What vLLM's methods for experts compute with, made when the weights are loaded first."""


class MergeWorker:
    """The `worker_extension_cls` of a vLLM worker: methods for `LLM.collective_rpc`.

    With tensor parallelism every worker merges all weights and keeps its shard of each.
    """

    model_runner: Any
    _merging: "Merging"

    def open_sources(
        self,
        donor: str,
        root: str,
        seed: int,
        cache_gb: float,
        base: str,
        by_token: Mapping[str, Any] | None = None,
        deepest: int | None = None,
    ) -> None:
        """Prepare for merges. `donor` is the folder of the running model, `base` that of the model whose tensors
        results have; references start at `root`. `by_token` is a recipe of all models whose tokens differ. `deepest` is
        the number of the running model's layers, where that is not the models' own.
        """
        models = Recipe.model_validate(by_token) if by_token else None
        sources = open_models(models, Path(root)) if models else Sources(Path(root), Path(base))
        self._merging = Merging(self.model_runner, Path(donor), Merger(sources, seed, cache_gb), deepest)

    def swap_recipe(self, recipe: Mapping[str, Any], quantize: str, with_digest: bool) -> dict[str, Any]:
        """Merge and load. Never raises, as that could end the worker: see the key `error`."""
        return self._merging.swap(Recipe.model_validate(recipe), quantize, with_digest)


class Merging:
    """A running model, and the origin of its weights."""

    def __init__(self, runner: Any, donor: Path, merger: Merger, deepest: int | None = None) -> None:
        self.runner, self.merger, self.deepest = runner, merger, deepest
        self._config = read_object(donor / "config.json")
        self.shapes = Checkpoint(donor).shapes
        self.loaded: dict[str, str] = {}
        """The digest of each weight's origin; empty at the start and after a failure, when it is unknown."""
        first: dict[int, str] = {}
        pairs = runner.get_model().named_parameters(remove_duplicate=False)
        owners = {name: first.setdefault(id(weight), name) for name, weight in pairs}
        # Further names of a weight: the first name is the one that is loaded.
        self._copies = {name for name, owner in owners.items() if owner != name and owner in self.shapes}
        self._failure: Exception | None = None

    def swap(self, recipe: Recipe, quantize: str = "", with_digest: bool = False) -> dict[str, Any]:
        """Merge the recipe into the model, part by part; `quantize`: see `Engine.swap`.

        Returns `seconds`, the number of `tensors` merged, their `digest` (BLAKE2b of names and bytes, if requested)
        and, after a failure, the `error`, its `kind`, the name of its class, and whether the recipe is a `path`.
        """
        started, self._failure = time.monotonic(), None
        digest = hashlib.blake2b() if with_digest else None
        depth = self.merger.sources.depth(recipe.donor)
        is_path = recipe.is_path(depth)
        seen: list[str] = []
        # vLLM warns of every layer that a load leaves as it is, which most loads do on purpose.
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)
        try:
            recipe = self._filled(recipe, depth)
            with _experts_set_up_again(self.runner.get_model()), _LostWrites() as lost:
                self.runner.reload_weights(weights_iterator=self._weights(recipe, quantize, seen, digest, lost))
        except Exception as error:
            self._failure = self._failure or error
            try:
                self.runner.reload_weights(
                    weights_iterator=iter(())
                )  # closes the layers that the failed load left open
            except Exception as again:  # not the weights' fault
                kind = type(self.runner.get_model()).__name__
                self._failure = SourceError(
                    f"vLLM's {kind} cannot replace its weights while it runs here ({again}); set engine.backend: hf"
                )
        _pack_tied_heads(self.runner.get_model())
        _show_convolutions(self.runner.get_model())
        failure, reason = self._failure, None
        if failure:
            self.loaded.clear()
            failure = machine_error(failure) or failure
            reason = str(failure) if isinstance(failure, LlmevoError) else f"{type(failure).__name__}: {failure}"
        return {
            "seconds": time.monotonic() - started,
            "tensors": len(seen),
            "digest": digest.hexdigest() if digest else None,
            "kind": type(failure).__name__,
            "error": reason,
            "path": is_path,
        }

    def _filled(self, recipe: Recipe, depth: int) -> Recipe:
        """Return the recipe with as many layers as the running model. Raises CandidateError where that cannot run it,
        and RecipeError where it cannot be exported.
        """
        sources, donor = self.merger.sources, recipe.donor
        if self.deepest is None and recipe.origins(depth) == [*range(depth)]:
            return recipe
        with_layers_of(recipe, sources, sources.config(donor))  # raises for what no export can say
        if self.deepest is None:
            raise CandidateError(
                f"vLLM runs a model of {depth} layers, and this path has others; start it for paths (genome.path), or"
                " set engine.backend: hf"
            )
        recipe = padded(recipe, self.deepest, depth)
        found = with_layers_of(recipe, sources, sources.config(donor))
        if key := next((key for key in KINDS if _kinds(found, key) != _kinds(self._config, key)), ""):
            raise CandidateError(
                f"vLLM runs layers of other kinds than this path's, in another order (config.json: {key}); set"
                " engine.backend: hf"
            )
        return recipe

    def _weights(
        self, recipe: Recipe, quantize: str, seen: list[str], digest: Any, lost: "_LostWrites"
    ) -> Iterator[tuple[str, Tensor]]:
        """The weights to load. Ends early, and does not raise, when the merge fails."""
        try:
            self._forget_touched_parts(recipe, quantize)
            for name, weight in self.merger.merge(recipe, self.loaded, quantize):
                if self.shapes.get(name) != tuple(weight.shape):
                    have = self.shapes.get(name, "no such weight")
                    raise CandidateError(f"{name} is {tuple(weight.shape)} merged, {have} in the running model")
                seen.append(name)
                if digest:
                    digest.update(name.encode() + weight.contiguous().flatten().view(torch.uint8).numpy().tobytes())
                if name not in self._copies:
                    yield name, weight
                if lost.count:
                    kind = type(self.runner.get_model()).__name__
                    raise SourceError(
                        f"vLLM's {kind} cannot replace {name} while it runs: it writes that weight past vLLM's own"
                        " reload; set engine.backend: hf"
                    )
            if missing := self.shapes.keys() - self.loaded.keys():
                raise CandidateError(f"the merge made no weight for {', '.join(sorted(missing)[:3])}")
        except Exception as error:
            self._failure = error

    def _forget_touched_parts(self, recipe: Recipe, quantize: str) -> None:
        """Load a part of a layer as a whole if anything in it changes: vLLM may have fused it."""
        made = self.merger.digests(recipe, quantize)
        touched = {part_of(name) for name, digest in made.items() if self.loaded.get(name) != digest}
        self.loaded = {name: digest for name, digest in self.loaded.items() if part_of(name) not in touched}


def _kinds(config: Mapping[str, Any], key: str) -> Any:
    return text_config(config).get(key)


def part_of(name: str) -> str:
    """The largest unit that an engine may fuse a tensor into: the attention of a layer, its MLP with all experts."""
    module = name.rpartition(".")[0]
    if (match := LAYER.match(name)) and module != f"{match[1]}{match[2]}":
        return f"{match[1]}{match[2]}.{match[3].split('.')[1]}"
    return module


class _LostWrites(TorchFunctionMode):
    """Counts copies into weights that do not exist yet, outside of the loaders that vLLM's reload counts and repeats.

    While it runs, the layers that are not loaded completely are on the meta device.
    """

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and args[0].is_meta:
            counted = any(
                type(mode).__name__ == "CopyCounter" for mode in cast(Any, dispatch)._get_current_dispatch_mode_stack()
            )
            self.count += not counted
        return func(*args, **(kwargs or {}))


@contextmanager
def _experts_set_up_again(model: Any) -> Generator[None]:
    """Let vLLM take each load of experts for the first one, which packs them; experts not loaded stay as they are.

    On a GPU their weights keep the form in which they are loaded, and CUDA graphs hold on to the kernels.
    """
    methods = [method for layer in model.modules() if hasattr(method := getattr(layer, "quant_method", None), KERNEL)]
    on_cpu = all(weight.device.type == "cpu" for weight in model.parameters())
    kernels = [(method, getattr(method, KERNEL)) for method in methods if on_cpu]
    for method, _ in kernels:
        setattr(method, KERNEL, None)
    try:
        yield
    finally:
        for method, kernel in kernels:
            if getattr(method, KERNEL) is None:
                setattr(method, KERNEL, kernel)


def _pack_tied_heads(model: Any) -> None:
    """Let layers that share another layer's weight process it again, as vLLM does when a model starts."""
    owners: set[int] = set()
    for layer in model.modules():
        weight = getattr(layer, "_parameters", {}).get("weight")
        if weight is None:
            continue
        if id(weight) in owners and hasattr(layer, "quant_method"):
            layer.quant_method.process_weights_after_loading(layer)
        owners.add(id(weight))


@torch.no_grad()
def _show_convolutions(model: Any) -> None:
    """Copy the weights of convolutions that were packed into the views that their layers hold of the first ones."""
    for layer in model.modules():
        held = getattr(layer, "conv_weights", None)
        loaded = getattr(getattr(layer, "conv1d", None), "_cpu_unpacked_conv_weight", None)
        if held is not None and loaded is not None:
            held.copy_(loaded.view(held.shape))
