"""Steps that need no text: the data-free methods that replace each task vector once (TSV-M, WUDI, STAR).

As steps they can follow another one, and be merged by any method.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llmevo.merging.kernels import spectral
from llmevo.merging.methods import star as _star
from llmevo.merging.methods import tsv as _tsv
from llmevo.merging.methods import wudi as _wudi
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.preparation.weights import changed, replaced
from llmevo.models.checkpoints import Weight


def tsv(inputs: TensorGroup, parameters: Mapping[str, float], _: Any) -> Sequence[Weight]:
    """Return each expert with singular vectors orthogonal to those of the others; see `methods.tsv`."""
    with spectral.one_thread():
        return [replaced(inputs, product) for product in _tsv.orthogonal(inputs, parameters["rank"])]


def wudi(inputs: TensorGroup, parameters: Mapping[str, float], _: Any) -> Sequence[Weight]:
    """Return each expert with the task vector Dᵢ; see `methods.wudi`. Blend 0 leaves them as they are."""
    if parameters["blend"] == 0.0:
        return inputs.models
    with spectral.one_thread():
        changes = _wudi.changes(inputs, parameters["blend"])
        return [changed(inputs, place, product) for place, product in enumerate(changes)]


def star(inputs: TensorGroup, parameters: Mapping[str, float], _: Any) -> Sequence[Weight]:
    """Return each expert without its small singular values; see `methods.star`. Eta 1 leaves them as they are."""
    if parameters["eta"] >= 1.0:
        return inputs.models
    with spectral.one_thread():
        changes = _star.changes(inputs, parameters["eta"])
        return [changed(inputs, place, product) for place, product in enumerate(changes)]
