"""Passthrough: one model as it is, the method of layer stacks (https://github.com/arcee-ai/mergekit#passthrough)."""

from torch import Tensor

from llmevo.merging.methods.base import TensorGroup


def passthrough(inputs: TensorGroup) -> Tensor:
    """Return the model's weight times `scale`; bit for bit at 1, which is mergekit's "no scale"."""
    (model,), (scale,) = inputs.models, inputs.each["scale"]
    if scale == 1.0 and isinstance(model, Tensor):
        return model
    return inputs.weight(0) * scale
