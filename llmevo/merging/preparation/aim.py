"""AIM: smaller changes of the weights that the base model's important input channels meet
(https://arxiv.org/abs/2502.02421, section 4 and algorithm 1)."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.preparation.weights import is_adapted, of_factors
from llmevo.models.checkpoints import LowRank, Weight


def aim(inputs: TensorGroup, parameters: Mapping[str, float], measured: Sequence[Tensor]) -> Sequence[Weight]:
    """Return each expert with the task vector δᵢ·diag(1 - (1 - omega)·c).

    c is the mean magnitude of each input channel of the base model (columns), divided by the largest of the layer.
    Omega 1 changes nothing; the parameter `prepare` of a merge, p, gives the same as omega = 1 - p with omega 0 here.
    """
    (magnitudes,) = measured
    largest = float(magnitudes.max())
    channels = magnitudes / largest if largest > 0 else magnitudes
    kept = 1.0 - (1.0 - parameters["omega"]) * channels
    return [
        of_factors(inputs, weight.up, weight.down * kept)
        if isinstance(weight, LowRank) and is_adapted(inputs, place)
        else inputs.origin.float() + inputs.delta(place) * kept
        for place, weight in enumerate(inputs.models)
    ]
