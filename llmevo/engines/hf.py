"""The transformers engine: one model in this process, its weights overwritten in place."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmevo.engines.requests import RequestScorer
from llmevo.errors import CandidateError, SourceError


class HfEngine:
    """A transformers model and its request scorer.

    Use it anywhere; it is the only engine that needs no vLLM. The model's own folder is read once, for its shape;
    no weight is ever written to disk.
    """

    def __init__(self, folder: Path, tokenizer: Path, dtype: str, device: str | None = None) -> None:
        """`folder` gives the architecture, `tokenizer` the vocabulary and chat template, `dtype` the weights' type.

        `device` is the first GPU by default, or the CPU. Raises SourceError when transformers cannot load them.
        """
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            vocabulary: Any = AutoTokenizer.from_pretrained(tokenizer)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        except (OSError, ValueError, KeyError) as error:
            raise SourceError(f"{folder}: transformers cannot load it ({str(error).splitlines()[0]})") from error
        self.model = model.to(self.device).eval()
        self._weights: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))
        self.lm = RequestScorer(self.model, vocabulary)

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        # By storage: a tied output head is the embeddings under another name, and one of the two names is enough.
        missing = {weight.data_ptr(): name for name, weight in self._weights.items() if weight.requires_grad}
        for name, weight in weights:
            own = self._weights.get(name)
            if own is None:
                raise CandidateError(f"the running model has no weight {name}; this architecture has no in-place load")
            if own.shape != weight.shape:
                raise CandidateError(f"{name} is {tuple(weight.shape)} merged, {tuple(own.shape)} in the running model")
            if missing.pop(own.data_ptr(), None):
                own.copy_(weight)
        if missing:
            raise CandidateError(f"the merge made no weight for {', '.join(sorted(missing.values())[:3])}")
