"""The transformers engine: one model in this process whose weights are overwritten in place."""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from llmevo.engines.half_precision import use_fastest_products
from llmevo.engines.layers import Layers
from llmevo.engines.scoring.hf import HfScorer
from llmevo.errors import CandidateError, RecipeError
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import scale_rope_of, with_layers_of
from llmevo.models.checkpoints import Checkpoint
from llmevo.models.conversion import Part, Places, class_of
from llmevo.models.layer_kinds import scale_rope
from llmevo.models.references import load_pretrained
from llmevo.models.tokenizer import load_tokenizer


class HfEngine:
    """A transformers model and its scorer. It runs on any machine; no weight is written to disk."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Path,
        dtype: str,
        device: str | None = None,
        merger: Merger | None = None,
        seed: int = 0,
    ) -> None:
        """`folder` gives the architecture, `tokenizer` the vocabulary, chat template and generation config, `dtype` the
        weights' type.

        `device` is by default the first GPU, or the CPU; `merger` makes the candidates, and without it the engine
        loads ready weights only; `seed` is for tasks that sample. Raises SourceError when transformers cannot load the
        folders.
        """
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        vocabulary = load_tokenizer(tokenizer)
        kind = class_of(load_pretrained(AutoConfig, folder))
        model = load_pretrained(kind, folder, dtype=getattr(torch, dtype))
        self.model: Any = model.to(self.device).eval()
        if tokenizer != folder and (found := _generation_config(tokenizer)):
            self.model.generation_config = found
        use_fastest_products(self.model)
        self.lm = HfScorer(self.model, vocabulary, seed)
        self.merger = merger
        self._places: Places | None = None
        self._layers: Layers | None = None
        self._loaded: dict[str, str] = {}
        self._rope = 1.0
        self._rotary: dict[str, Any] = {}
        """The model's own rotary embeddings by name, once one was replaced."""

    def swap(self, recipe: Recipe, quantize: str = "") -> None:
        try:
            self._swap(recipe, quantize)
        except RecipeError as error:
            is_path = self.merger and (recipe.rope or recipe.is_path(self.merger.sources.depth(recipe.donor)))
            if not is_path:
                raise
            raise CandidateError(str(error)) from error

    def _swap(self, recipe: Recipe, quantize: str) -> None:
        assert self.merger is not None
        if self._places is None:
            self._places = Places(self.model, self.merger.shapes(recipe))
            self._places.untie()
        if recipe.mixture:
            _send_to(self.model, recipe.mixture.experts_per_token)
        if recipe.rope:
            scale_rope_of(recipe, deepcopy(self.merger.sources.config(recipe.donor)))  # raises as the export does
        self._places = self._arranged(recipe, quantize, self.merger, self._places)
        self._turn(recipe.rope or 1.0)
        together = self._places.together()
        made = self.merger.digests(recipe, quantize) if together else {}
        for part in together:
            if any(self._loaded.get(name) != made[name] for name in part.names if name in made):
                self._forget(part)
        try:
            self._copy(self._places, self.merger.merge(recipe, self._loaded, quantize), {*self._loaded})
        except BaseException:
            for part in together:  # tensors of these may have been merged and not written
                self._forget(part)
            if self._layers and self._layers.are_shared:  # names of a weight that was not written may be in it
                self._loaded.clear()
            raise

    def _arranged(self, recipe: Recipe, quantize: str, merger: Merger, places: Places) -> Places:
        """Give the model the layers of a recipe, where it has others. Raises RecipeError if they cannot be exported."""
        if self._layers is None:
            if not recipe.slices:
                return places
            self._layers = Layers(self.model)
        origins = recipe.origins(self._layers.depth)
        if origins == self._layers.origins and not self._layers.are_shared:
            return places
        config = merger.sources.config(recipe.donor)
        configs = config, with_layers_of(recipe, merger.sources, deepcopy(config))
        made = merger.digests(recipe, quantize)
        try:
            return self._layers.arrange(origins, configs, made, places, self._loaded)
        except BaseException:
            self._loaded.clear()
            raise

    def _turn(self, rope: float) -> None:
        """Give the model the rotary embedding of a base that is multiplied by `rope`."""
        if self._rope == rope == 1.0:
            return
        if not self._rotary:
            kind = type(self.model.config.get_text_config())
            for name, module in self.model.named_modules():
                if type(getattr(module, "config", None)) is kind and name.endswith("rotary_emb"):
                    self._rotary[name] = module
        if not self._rotary or any(part.isdigit() for name in self._rotary for part in name.split(".")):
            raise CandidateError(f"{type(self.model).__name__} has no rotary embedding of its own; leave rope out")
        for name, module in self._rotary.items():
            made = module
            if rope != 1.0:
                config = deepcopy(module.config)
                scale_rope(vars(config), rope)
                made = type(module)(config).to(self.device)
            self.model.set_submodule(name, made)
        self._rope = rope

    def _forget(self, part: Part) -> None:
        for name in part.names:
            self._loaded.pop(name, None)

    def load(self, weights: Iterable[tuple[str, Tensor]], names: Iterable[str] | None = None) -> None:
        """Replace all weights by (name, tensor) pairs of a checkpoint. Raises CandidateError when they do not fit.

        `names` are all of their names; without them the tensors are collected first, which takes a model's memory where
        they are made one at a time.
        """
        self._loaded.clear()
        self._turn(1.0)
        if self._layers:
            self._layers.restore()
            self._places = None  # those of a path's layers, which are no longer in the model
        if names is None:
            weights = [*weights]
            names = [name for name, _ in weights]
        places = Places(self.model, names)
        places.untie()
        self._copy(places, weights, set())

    @torch.no_grad()
    def _copy(self, places: Places, weights: Iterable[tuple[str, Tensor]], held: set[str]) -> None:
        """Copy weights into the model; those named in `held` may stay as they are."""
        unseen = places.parts.keys() - held

        def placed() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                if name not in places.parts and not places.ignored(name):
                    raise CandidateError(f"the merge made {name}, and the running model has no such weight")
                unseen.discard(name)
                yield name, weight

        try:
            for name, weight, own in places.pairs(placed()):
                if own.shape != weight.shape:
                    raise CandidateError(
                        f"{name} is {tuple(weight.shape)} merged, {tuple(own.shape)} in the running model"
                    )
                own.copy_(weight)
        except ValueError as error:
            raise CandidateError(str(error)) from error
        if missing := sorted({*places.missing, *unseen}):
            raise CandidateError(f"the merge made no weight for {', '.join(missing[:3])}")

    def differences(self, folder: Path) -> Sequence[str]:
        """The weights that are not bitwise equal to those that transformers would load from an exported model."""
        exported = Checkpoint(folder)
        places = Places(self.model, exported.shapes)
        pairs = places.pairs((name, exported.tensor(name)) for name in exported.shapes)
        wrong = [
            name
            for name, weight, own in pairs
            if own.shape != weight.shape or not torch.equal(own.cpu(), weight.to(own.dtype))
        ]
        return [*wrong, *places.missing]

    def close(self) -> None:
        self.model = self._places = self._layers = None


def _generation_config(folder: Path) -> Any:
    """Return the generation config of a model's folder, as transformers loads it; None for a tokenizer alone."""
    if (folder / "generation_config.json").exists():
        return load_pretrained(GenerationConfig, folder)
    if (folder / "config.json").exists():
        return load_pretrained(GenerationConfig, folder, config_file_name="config.json", _from_model_config=True)
    return None


def _send_to(model: Any, count: int) -> None:
    """Let the routers of a running mixture send each token to so many experts."""
    model.config.num_experts_per_tok = count
    for module in model.modules():
        if "top_k" in vars(module):
            module.top_k = count
