"""Checkpoints that run their stored layers by a list, as Sakana AI's EvoLLM-JP-v1-10B does, read as ordinary models.

Such a checkpoint has `input_layers`, the stored layer of each hop, and `input_scales`. Hop t multiplies what the MLP of
hop t - 1 has added to the residual stream (the embeddings at t = 0), which is a factor of that MLP's last linear map:
https://huggingface.co/SakanaAI/EvoLLM-JP-v1-10B
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmevo.errors import SourceError
from llmevo.models.architecture import EMBEDDINGS, HEAD, text_stack
from llmevo.models.checkpoints import Source, TensorCache

LAYERS, SCALES = "input_layers", "input_scales"
HOPS = "num_hops"
"""The key of the config that such checkpoints have."""


class Unrolled(Source):
    """The model with a layer for every hop, and the scales in its weights."""

    def __init__(self, stored: Source, config: Mapping[str, Any], folder: str) -> None:
        """Raises SourceError where the lists do not fit the layers."""
        self._stored, self._kept = stored, TensorCache()
        found = {end: name for end in (LAYERS, SCALES) for name in stored.shapes if name.endswith(end)}
        if lacking := next((end for end in (LAYERS, SCALES) if end not in found), None):
            raise SourceError(f"{folder}: config.json has {HOPS}, and no weight is called {lacking}; download it again")
        layers = [int(layer) for layer in stored.tensor(found[LAYERS]).tolist()]
        scales = [float(scale) for scale in stored.tensor(found[SCALES]).tolist()]
        depth = int(config["num_hidden_layers"])
        if len(layers) != len(scales) or not layers or not all(0 <= layer < depth for layer in layers):
            raise SourceError(
                f"{folder}: {LAYERS} and {SCALES} need one entry for each hop, and layers from 0 to {depth - 1}; got"
                f" {len(layers)} and {len(scales)} entries, layers from {min(layers, default=0)} to"
                f" {max(layers, default=0)}"
            )
        tied = not any(name.endswith(HEAD) for name in stored.shapes)
        if tied and scales[0] != 1.0:
            raise SourceError(
                f"{folder}: {SCALES} begins with {scales[0]:g}, and the embeddings it scales are the head as well; save"
                " the model with a head of its own (tie_word_embeddings: false)"
            )
        stack = text_stack([name for name in stored.shapes if name not in found.values()], depth)
        by_layer: dict[int, list[tuple[str, str]]] = {}
        for name in stored.shapes:
            if (numbered := stack.numbered(name)) is not None:
                by_layer.setdefault(numbered[0], []).append((numbered[1], name))
        self._origins: dict[str, tuple[str, float]] = {}
        outside = [name for name in stored.shapes if stack.layer(name) is None and name not in found.values()]
        for name in outside:
            self._origins[name] = name, scales[0] if EMBEDDINGS.search(name) else 1.0
        for hop, layer in enumerate(layers):
            after = scales[hop + 1] if hop + 1 < len(scales) else 1.0
            for rest, name in by_layer.get(layer, []):
                self._origins[f"{stack.start}{hop}.{rest}"] = name, after if ".down_proj." in rest else 1.0
        self.shapes = {name: stored.shapes[origin] for name, (origin, _) in self._origins.items()}
        self.quantized = {name for name, (origin, _) in self._origins.items() if origin in stored.quantized}
        unused = "no hop runs its layer"
        used = {origin for origin, _ in self._origins.values()}
        self.derived = {
            **stored.derived,
            **dict.fromkeys(found.values(), "its numbers are in the weights"),
            **{name: unused for name in stored.shapes if name not in used and name not in found.values()},
        }

    def tensor(self, name: str) -> Tensor:
        origin, scale = self._origins[name]
        if scale == 1.0:
            return self._stored.tensor(origin)
        return self._kept.get(name, lambda: self._stored.tensor(origin).float() * scale)

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(self._origins[name][0])

    def rounding_error(self, name: str) -> float:
        origin, scale = self._origins[name]
        return self._stored.rounding_error(origin) * scale**2


def is_rolled(config: Mapping[str, Any]) -> bool:
    """Return whether a config is of a checkpoint that runs its layers by a list."""
    return HOPS in config


def unrolled_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the ordinary model: Mistral's for `evomistral`."""
    plain = {key: value for key, value in config.items() if key not in (HOPS, "auto_map")}
    plain["num_hidden_layers"] = config[HOPS]
    plain["model_type"] = str(config.get("model_type")).removeprefix("evo")
    if "architectures" in config:
        plain["architectures"] = [str(name).removeprefix("Evo") for name in config["architectures"]]
    return plain
