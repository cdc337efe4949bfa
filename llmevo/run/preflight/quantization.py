"""Checks of quantized models: what a merge leaves out of them, and whether rounding errors hide a task vector."""

import math
from collections.abc import Iterable

from llmevo.errors import plural
from llmevo.models.architecture import LAYER
from llmevo.models.checkpoints import LowRank, Source, same
from llmevo.models.quantized_checkpoint import QuantizedCheckpoint
from llmevo.run.preflight.base import Finding, Findings, folders, names
from llmevo.run.scorer import Scorer

TENSORS = 12
"""Tensors of the layers that are read, evenly spread."""

NOISY = 0.5
"""The size of the rounding errors, relative to the task vector, from which there is a warning."""


def quantized(scorer: Scorer) -> Findings:
    """Quantized models with scales of activations, which no merge has."""
    for name, reference, _ in folders(scorer):
        source = scorer.sources.model(reference)
        if isinstance(source, QuantizedCheckpoint) and source.activations:
            yield Finding(
                name,
                f"{plural(len(source.activations), 'scale')} of activations or of the key-value cache, such as"
                f" {source.activations[0]}, {'is' if len(source.activations) == 1 else 'are'} left out: merges are not"
                " quantized",
                "Quantize the result if it is to be served so",
            )


def noise(scorer: Scorer) -> Findings:
    """Task vectors that are hardly larger than the rounding errors of the models' quantization; reads weights."""
    base = scorer.config.genome.base_model
    if base is None:
        return
    origin = scorer.sources[base]
    for reference, name in names(scorer).items():
        if reference == base:
            continue
        model = scorer.sources[reference]
        kinds = [bool(origin.quantized), bool(model.quantized)]
        vector, error = compared(model, origin) if any(kinds) else (0.0, 0.0)
        if error > NOISY * vector:
            of = {(True, True): "both are", (True, False): "the base is"}.get((kinds[0], kinds[1]), "it is")
            yield Finding(
                name,
                f"{of} quantized, and the expected rounding error is {error / vector:.0%} the size of its task vector"
                if vector
                else f"{of} quantized, and rounding has left no task vector",
                "Use the models that they were quantized from, if you can get them",
            )


def compared(model: Source, base: Source) -> tuple[float, float]:
    """Return the norm of a task vector, and the expected norm of the rounding errors in it, of some tensors.

    The errors of two models are taken as independent; an adapter on the base itself has none.
    """
    vector = error = 0.0
    shared = [name for name in base.shapes if LAYER.match(name) and len(base.shapes[name]) > 1 and name in model.shapes]
    for name in _spread(name for name in shared if name in model.quantized or name in base.quantized):
        weight, origin = model.weight(name), base.tensor(name)
        if isinstance(weight, LowRank) and same(weight.origin, origin):
            vector += float((weight.up @ weight.down).double().square().sum())
            continue
        dense = weight.dense() if isinstance(weight, LowRank) else weight.float()
        vector += float((dense - origin.float()).double().square().sum())
        error += model.rounding_error(name) + base.rounding_error(name)
    return math.sqrt(vector), math.sqrt(error)


def _spread(given: Iterable[str]) -> list[str]:
    every = [*given]
    return every[:: max(1, len(every) // TENSORS)]
