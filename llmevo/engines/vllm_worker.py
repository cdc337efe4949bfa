"""The vLLM engine's half inside vLLM's workers: it merges there, so that only recipes cross a process boundary.

vLLM's layer-wise reload has rules of its own, all of them kept here:

- A layer that gets no weight keeps the old one, but a layer that gets a part (the queries of a fused query-key-value
  projection) is filled up with garbage. So tensors are loaded again by whole parts of a layer.
- An iterator that raises leaves layers half open, and the next load counts on from there. So ours never raises: it
  remembers why it stopped and ends, vLLM closes the layers, and everything is loaded anew the next time.
- With tied embeddings the output head shares the embeddings' weight but, on CPU, multiplies with a packed copy of
  its own, which reloading leaves as it was. So tied heads are packed again after every load.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmevo.errors import CandidateError, LlmevoError, machine_error
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.models.architecture import LAYER
from llmevo.models.checkpoints import Checkpoint, Sources

REPORTS = "vllm.model_executor.model_loader.reload"
"""The logger that warns of every layer a load leaves as it is, which most loads mean to."""


class MergeWorker:
    """What `worker_extension_cls` adds to a vLLM worker: methods for `LLM.collective_rpc`.

    With tensor parallelism every worker merges all weights and keeps its shard of each.
    """

    model_runner: Any
    _merging: "Merging"

    def open_sources(self, donor: str, root: str, seed: int, cache_gb: float) -> None:
        """Make ready: the running model is that of the folder `donor`, references start at `root`."""
        self._merging = Merging(self.model_runner, Path(donor), Merger(Sources(Path(root)), seed, cache_gb))

    def swap_recipe(self, recipe: Mapping[str, Any], with_digest: bool) -> dict[str, Any]:
        """Merge and load. Never raises, as that could end the worker: see the key `error`."""
        return self._merging.swap(Recipe.model_validate(recipe), with_digest)


class Merging:
    """A running model, and what its weights were made of."""

    def __init__(self, runner: Any, donor: Path, merger: Merger) -> None:
        self.runner, self.merger = runner, merger
        self.shapes = Checkpoint(donor).shapes
        self.loaded: dict[str, str] = {}
        """What each weight was made of; empty when that is not known, as at the start and after a failure."""
        second = _second_names(runner.get_model())
        self._copies = {name for name, first in second.items() if first in self.shapes}
        self._failure: Exception | None = None

    def swap(self, recipe: Recipe, with_digest: bool = False) -> dict[str, Any]:
        """Merge the recipe into the model, part by part.

        Tells `seconds`, how many `tensors` were merged, their `digest` (BLAKE2b of names and bytes, if asked for)
        and, when it failed, the `error` and its `kind`, the name of its class.
        """
        started, self._failure = time.monotonic(), None
        digest = hashlib.blake2b() if with_digest else None
        seen: list[str] = []
        logging.getLogger(REPORTS).setLevel(logging.ERROR)
        try:
            self.runner.reload_weights(weights_iterator=self._weights(recipe, seen, digest))
        except Exception as error:
            self._failure = self._failure or error
            self.runner.reload_weights(weights_iterator=iter(()))  # closes what the failed load left open
        _pack_tied_heads(self.runner.get_model())
        if self._failure:
            self.loaded.clear()
            self._failure = machine_error(self._failure) or self._failure
        return {
            "seconds": time.monotonic() - started,
            "tensors": len(seen),
            "digest": digest.hexdigest() if digest else None,
            "kind": type(self._failure).__name__,
            "error": None if self._failure is None else self._reason(self._failure),
        }

    @staticmethod
    def _reason(failure: Exception) -> str:
        """An error's message; with its kind if it is none of llmevo's, which name their subject themselves."""
        return str(failure) if isinstance(failure, LlmevoError) else f"{type(failure).__name__}: {failure}"

    def _weights(self, recipe: Recipe, seen: list[str], digest: Any) -> Iterator[tuple[str, Tensor]]:
        """What has to be loaded. Ends early, and does not raise, when the merge fails."""
        try:
            self._forget_touched_parts(recipe)
            for name, weight in self.merger.merge(recipe, self.loaded):
                if self.shapes.get(name) != tuple(weight.shape):
                    have = self.shapes.get(name, "no such weight")
                    raise CandidateError(f"{name} is {tuple(weight.shape)} merged, {have} in the running model")
                seen.append(name)
                if digest:
                    digest.update(name.encode() + weight.contiguous().flatten().view(torch.uint8).numpy().tobytes())
                if name not in self._copies:
                    yield name, weight
            if missing := self.shapes.keys() - self.loaded.keys():
                raise CandidateError(f"the merge made no weight for {', '.join(sorted(missing)[:3])}")
        except Exception as error:
            self._failure = error

    def _forget_touched_parts(self, recipe: Recipe) -> None:
        """Let a part of a layer be loaded as a whole if anything in it changes: vLLM may have fused it."""
        made = self.merger.digests(recipe)
        touched = {part_of(name) for name, digest in made.items() if self.loaded.get(name) != digest}
        self.loaded = {name: digest for name, digest in self.loaded.items() if part_of(name) not in touched}


def part_of(name: str) -> str:
    """The largest unit that an engine may fuse a tensor into: the attention of a layer, its MLP with all experts."""
    if match := LAYER.match(name):
        return f"{match[1]}{match[2]}.{match[3].split('.')[1]}"
    return name.rpartition(".")[0]


def _second_names(model: Any) -> dict[str, str]:
    """The further names of weights that have several, and the first name of each, which is the one that counts."""
    first: dict[int, str] = {}
    pairs = model.named_parameters(remove_duplicate=False)
    return {name: owner for name, weight in pairs if (owner := first.setdefault(id(weight), name)) != name}


def _pack_tied_heads(model: Any) -> None:
    """Let layers that share another one's weight process it again, as vLLM has it done when a model starts."""
    owners: set[int] = set()
    for layer in model.modules():
        weight = getattr(layer, "_parameters", {}).get("weight")
        if weight is None:
            continue
        if id(weight) in owners and hasattr(layer, "quant_method"):
            layer.quant_method.process_weights_after_loading(layer)
        owners.add(id(weight))
