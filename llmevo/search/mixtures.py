"""Mixtures of experts in a search: the settings of a config, and the genes of the routers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llmevo.errors import plural
from llmevo.merging.mixture.mixture import ROUTER
from llmevo.models.references import ModelReference

TEMPERATURE, BIAS, TOP_K = "temperature", "bias", "experts_per_token"
"""The parameters of the genes."""

START = 0.3
"""The temperature of the first candidates; the fitted logits have a standard deviation of 1."""


class Mixtures(BaseModel):
    """The mixtures that a search with `architecture: moe` tries: see `docs/mixture.md`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    experts: list[ModelReference] | None = Field(default=None, min_length=2)
    """The models whose MLPs are the experts; by default `models` without the base."""
    experts_per_token: int | tuple[int, int] = 2
    """How many experts each token is sent to; [lowest, highest] makes it a gene."""
    layers: list[tuple[int, int]] | None = None
    """The ranges of layers that have experts, first included, last not; by default all. The others have the merged
    MLP."""
    temperature: tuple[float, float] = (0.05, 2.0)
    """The bounds of the routers' temperature, a gene of each slice: near 0 one expert gets all the weight."""
    bias: tuple[float, float] = (-1.0, 1.0)
    """The bounds of each expert's bias, a gene of each slice, in standard deviations of a logit."""

    @field_validator("temperature", "bias")
    @classmethod
    def _ordered(cls, given: tuple[float, float]) -> tuple[float, float]:
        if not given[0] < given[1]:
            raise ValueError(f"give a lower and a higher number, not {[*given]}")
        return given

    @model_validator(mode="after")
    def _sound(self) -> Self:
        low, high = self.counts
        if not 1 <= low <= high:
            raise ValueError(
                f"experts_per_token is {[low, high]}; give 1 or more, or the lowest and the highest number"
            )
        if self.temperature[0] <= 0.0:
            raise ValueError(f"temperature: {self.temperature[0]:g} divides the logits; give a number over 0")
        return self

    @property
    def counts(self) -> tuple[int, int]:
        """The least and the most experts of a token."""
        given = self.experts_per_token
        return (given, given) if isinstance(given, int) else given


@dataclass(frozen=True)
class RouterGene:
    """A gene of the routers, before it has the names of a space."""

    model: ModelReference | None
    place: int | None
    """The slice; None for the whole recipe."""
    parameter: str
    low: float
    high: float
    start: float


@dataclass(frozen=True)
class RouterSpace:
    """The genes of the routers over some slices, and the `mixture` of a recipe that their values mean."""

    settings: Mixtures
    experts: Sequence[ModelReference]
    spans: Sequence[tuple[int, int]]

    @property
    def genes(self) -> list[RouterGene]:
        """Top-k, then temperature and biases slice by slice."""
        low, high = self.settings.counts
        found = [RouterGene(None, None, TOP_K, low, high, min(max(2, low), high))] if low < high else []
        coldest, hottest = self.settings.temperature
        least, most = self.settings.bias
        for place in range(len(self.spans)):
            found.append(RouterGene(None, place, TEMPERATURE, coldest, hottest, min(max(START, coldest), hottest)))
            found += [RouterGene(of, place, BIAS, least, most, min(max(0.0, least), most)) for of in self.experts]
        return found

    def mixture(self, values: Mapping[tuple[ModelReference | None, int | None, str], float]) -> dict[str, Any]:
        """Return a recipe's `mixture` for the values of the genes."""
        slices = [
            {
                "layer_range": span,
                "temperature": values[None, place, TEMPERATURE],
                "bias": [values[of, place, BIAS] for of in self.experts],
            }
            for place, span in enumerate(self.spans)
        ]
        count = int(values.get((None, None, TOP_K), self.settings.counts[0]))
        return {**self._frame([*self.experts], count), "router": ROUTER, "router_slices": slices}

    def copies(self, model: ModelReference) -> dict[str, Any]:
        """Return the `mixture` that is one model: as many copies of it, of which each token is sent to one."""
        return self._frame([model] * len(self.experts), 1)

    def _frame(self, experts: list[ModelReference], count: int) -> dict[str, Any]:
        return {"experts": experts, "experts_per_token": count, "layers": self.settings.layers}


def check_experts(
    settings: Mixtures | None, experts: Sequence[ModelReference], known: Sequence[ModelReference]
) -> None:
    """Raise ValueError where the models of a genome are no experts of these mixtures."""
    if len(experts) < 2:
        raise ValueError("architecture: moe needs two experts or more, other models than the base_model")
    for model in experts:
        if model not in known:
            raise ValueError(f"mixture.experts: {model} is none of the models; list it there too")
        if list(experts).count(model) > 1:
            raise ValueError(f"mixture.experts: {model} is listed twice; list every model once")
    if settings and settings.counts[1] > len(experts):
        raise ValueError(
            f"mixture.experts_per_token is {settings.counts[1]}, more than the {plural(len(experts), 'expert')}; give"
            f" at most {len(experts)}"
        )
