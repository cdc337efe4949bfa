"""A merge in FP8 for vLLM and transformers: compressed-tensors' `float-quantized`, its scheme FP8_DYNAMIC.

Matrices of linear layers are e4m3 with a scale for each output channel; activations are rounded by the server, with a
scale for each token. The rounding is that of `models/quantize.py`, so a model that was scored in FP8 is this model.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmevo.errors import UserError
from llmevo.export.modules import LINEAR, Modules
from llmevo.merging.writer import MergedModel
from llmevo.models.quantize import quantize, quantizer

ROWS_TOGETHER = 1 << 20
"""Numbers that are rounded at a time, so that memory stays flat."""

SCHEME: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
        "observer": "minmax",
    },
    "input_activations": {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
        "observer": None,
    },
    "output_activations": None,
}
"""compressed-tensors' scheme: e4m3 weights by channel, activations by token while the model runs."""


class Fp8Model:
    """A merge whose linear layers are rounded to FP8 as they are written.

    Raises UserError where not every matrix to be rounded is an `nn.Linear`, as in mixtures of experts and GPT-2.
    """

    def __init__(self, model: MergedModel) -> None:
        self.model = model
        config = model.config()
        modules = Modules(model.sources.layout(model.recipe.donor), model.shapes, config)
        if modules.is_multimodal:
            raise UserError(
                f"--as fp8: {model.recipe.donor} is a multimodal model, which llmevo does not write in FP8; export the"
                " whole model (without --as) and quantize it with llm-compressor"
            )
        rounding = quantizer("fp8", model.shapes, config)
        self.rounded = [name for name, shape in model.shapes.items() if rounding.stored(name, shape) == "fp8"]
        """The tensors that become FP8."""
        held = {name: modules.module_of(name) for name in model.shapes}
        for name in self.rounded:
            if (module := held[name]) is None or modules.kinds[module] != LINEAR:
                raise UserError(
                    f"--as fp8: {name} is a matrix, but of no linear layer in transformers (as those of experts and"
                    " GPT-2 are); export the whole model (without --as) and quantize it with llm-compressor"
                )
        if not self.rounded:
            raise UserError("--as fp8: the model has no linear layers; export the whole model (without --as)")
        kept = {module for name, module in held.items() if name not in self.rounded}
        linear = [name for name, kind in modules.kinds.items() if kind == LINEAR]
        whole = {held[name] for name in self.rounded}
        self.ignored = [name for name in linear if name in kept - whole]
        self.ignored += [name for name in modules.tied.values() if name not in self.ignored]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors of the file."""
        scales = {_scale(name): (self.model.shapes[name][0], 1) for name in self.rounded}
        return {**self.model.shapes, **scales}

    @property
    def config(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": {"group_0": SCHEME},
            "ignore": self.ignored,
        }

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the file: a matrix as FP8, then its scales."""
        for name, weight in self.model.weights():
            if name not in self.rounded:
                yield name, weight
                continue
            codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
            scales = torch.empty(len(weight), 1, dtype=weight.dtype)
            rows = max(1, ROWS_TOGETHER // weight.shape[1])
            for start in range(0, len(weight), rows):
                part = quantize(weight[start : start + rows], "fp8")
                assert part.scales is not None
                codes[start : start + rows], scales[start : start + rows] = part.codes, part.scales
            yield name, codes
            yield _scale(name), scales


def _scale(name: str) -> str:
    return f"{name}_scale"
