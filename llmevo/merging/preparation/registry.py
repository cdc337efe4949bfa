"""The steps of a preparation by name: their parameters, what they measure of the models, and their papers.

Only these are needed to read a config or a recipe; the arithmetic is imported where models are prepared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from llmevo.merging.methods.registry import BLEND, METHODS, Parameter

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

    from llmevo.merging.methods.base import TensorGroup
    from llmevo.models.checkpoints import Weight

    Prepare = Callable[[TensorGroup, Mapping[str, float], Sequence[Tensor]], Sequence[Weight]]
    """The base and the experts of one matrix, the step's parameters, and what it measured: the experts' new weights."""

Measured = Literal["", "magnitudes", "grams"]
"""What a step needs to know of the inputs of each linear layer on some texts: nothing; the mean magnitude of each
channel in the base model; or E[xxᵀ] in every expert on texts of its own."""


@dataclass(frozen=True)
class PreparationStep:
    """A step of a preparation."""

    name: str
    """Also the name of its function."""
    paper: str
    file: str
    """The file here with its function."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    measures: Measured = ""
    sequential: bool = False
    """Whether the inputs of a layer are measured above layers that are merged by this step already."""
    permutes: bool = False
    """Whether it changes the order of neurons, and so reads all matrices of an MLP."""
    sums_to_merge: bool = False
    """Whether the prepared task vectors add up to the paper's merge: a search then tries common weights around 1."""

    @cached_property
    def prepare(self) -> "Prepare":
        """Its arithmetic, imported at the first use."""
        return getattr(import_module(f"llmevo.merging.preparation.{self.file}"), self.name)


PREPARED = replace(BLEND, meaning="the way from the task vectors as they are, 0, to the prepared ones, 1")
"""The recipe's parameter `prepare`: the way from the experts as they are, 0, to the prepared ones, 1."""

REGMEAN_BLEND = Parameter(
    default=0.99, low=0.0, high=1.0, neutral=0.0, meaning="the way from the task vectors as they are, 0, to RegMean, 1"
)
SHRINKING = Parameter(
    default=0.9, low=0.0, high=1.0, meaning="the factor of the inputs' products of different channels"
)

_STEPS = (
    PreparationStep("align", "https://arxiv.org/abs/2209.04836", "align", permutes=True),
    PreparationStep(
        "aim",
        "https://arxiv.org/abs/2502.02421",
        "aim",
        {
            "omega": Parameter(
                default=0.4,
                low=0.0,
                high=1.0,
                neutral=1.0,
                meaning="what is left of the change of the channel with the largest inputs",
            )
        },
        measures="magnitudes",
    ),
    PreparationStep(
        "regmean",
        "https://arxiv.org/abs/2212.09849",
        "regmean",
        {"blend": REGMEAN_BLEND, "alpha": SHRINKING},
        measures="grams",
        sums_to_merge=True,
    ),
    PreparationStep(
        "regmean_plusplus",
        "https://arxiv.org/abs/2508.03121",
        "regmean",
        {"blend": REGMEAN_BLEND, "alpha": SHRINKING},
        measures="grams",
        sequential=True,
        sums_to_merge=True,
    ),
    PreparationStep(
        "svd_llm",
        "https://arxiv.org/abs/2403.07378",
        "svd_llm",
        {"rank": replace(METHODS["tsv"].shared["rank"], default=0.5, neutral=1.0)},
        measures="grams",
    ),
    PreparationStep(
        "tsv",
        "https://arxiv.org/abs/2412.00081",
        "separated",
        {"rank": METHODS["tsv"].shared["rank"]},
    ),
    PreparationStep(
        "wudi",
        "https://arxiv.org/abs/2503.08099",
        "separated",
        {"blend": METHODS["wudi"].shared["blend"]},
    ),
    PreparationStep(
        "star",
        "https://arxiv.org/abs/2502.10339",
        "separated",
        {"eta": METHODS["star"].shared["eta"]},
    ),
)
STEPS: dict[str, PreparationStep] = {step.name: step for step in _STEPS}
"""Every step by its name in `prepare`."""
