"""The transformers engine: one model in this process whose weights are overwritten in place."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmevo.engines.scoring.hf import HfScorer
from llmevo.errors import CandidateError
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.models.checkpoints import Checkpoint
from llmevo.models.references import load_pretrained
from llmevo.models.tokenizer import load_tokenizer


class HfEngine:
    """A transformers model and its scorer. It runs on any machine; no weight is written to disk."""

    def __init__(
        self, folder: Path, tokenizer: Path, dtype: str, device: str | None = None, merger: Merger | None = None
    ) -> None:
        """`folder` gives the architecture, `tokenizer` the vocabulary and chat template, `dtype` the weights' type.

        `device` is by default the first GPU, or the CPU; `merger` makes the candidates, and without it the engine
        loads ready weights only. Raises SourceError when transformers cannot load the folders.
        """
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        vocabulary = load_tokenizer(tokenizer)
        model = load_pretrained(AutoModelForCausalLM, folder, dtype=getattr(torch, dtype))
        self.model: Any = model.to(self.device).eval()
        self._weights: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))
        self._first_names = {weight.data_ptr(): name for name, weight in reversed(self._weights.items())}
        self.lm = HfScorer(self.model, vocabulary)
        self.merger = merger
        self._loaded: dict[str, str] = {}

    def swap(self, recipe: Recipe, quantize: str = "") -> None:
        assert self.merger is not None
        held = {*self._loaded}
        self._copy(self.merger.merge(recipe, self._loaded, quantize), held)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights by (name, tensor) pairs of a checkpoint. Raises CandidateError when they do not fit."""
        self._loaded.clear()
        self._copy(weights, set())

    @torch.no_grad()
    def _copy(self, weights: Iterable[tuple[str, Tensor]], held: set[str]) -> None:
        """Copy weights into the model; those named in `held` may stay as they are."""
        # By storage: a tied output head is the embeddings under another name, and one of the two names is enough.
        missing = {weight.data_ptr(): name for name, weight in self._weights.items() if weight.requires_grad}
        for name in held & self._weights.keys():
            missing.pop(self._weights[name].data_ptr(), None)
        seen = {*held}
        for name, weight in weights:
            own = self._weights.get(name)
            if own is None:
                raise CandidateError(f"the running model has no weight {name}; this architecture has no in-place load")
            if own.shape != weight.shape:
                raise CandidateError(f"{name} is {tuple(weight.shape)} merged, {tuple(own.shape)} in the running model")
            seen.add(name)
            # Of two names of one weight the model's first one counts, in whatever order they come.
            if (first := self._first_names[own.data_ptr()]) == name or first not in seen:
                own.copy_(weight)
            missing.pop(own.data_ptr(), None)
        if missing:
            raise CandidateError(f"the merge made no weight for {', '.join(sorted(missing.values())[:3])}")

    def differences(self, folder: Path) -> Sequence[str]:
        """The weights that are not bitwise equal to those of an exported model."""
        exported = Checkpoint(folder)
        own = {name: self._weights[name] for name in exported.shapes if name in self._weights}
        return [name for name, weight in own.items() if not torch.equal(weight.cpu(), exported.tensor(name))]

    def close(self) -> None:
        self.model = None
        self._weights.clear()
