"""A mixture of experts as a value: the part `mixture` of a recipe."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmevo.errors import plural
from llmevo.models.references import ModelReference

ROUTER = "router.json"
"""The file of a run's router, beside `best.yml`."""

MIXTURE = "mixture"
"""The key of a recipe."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RouterSlice(_Strict):
    """The temperature and the biases of the routers of some layers."""

    layer_range: tuple[int, int]
    """The first layer, from 0, and the one after the last."""
    temperature: float = Field(default=1.0, gt=0.0)
    """The logits are divided by it: near 0 one expert gets all the weight, far above 1 all get the same."""
    bias: list[float] | None = None
    """What is added to the logit of each expert, on the mean over tokens, before the division."""


class Mixture(_Strict):
    """The experts of a mixture and how tokens are sent to them.

    The recipe that has it gives everything else: attention, norms, embeddings, and the MLP of layers without experts.
    """

    experts: list[ModelReference] = Field(min_length=1)
    """The models whose MLPs are the experts, in order; one may be listed several times."""
    experts_per_token: int = Field(default=2, ge=1)
    """How many experts each token is sent to (top-k); their weights add up to 1."""
    router: str | None = None
    """A file with the routers' directions; it may only lack where all experts are one model."""
    router_slices: list[RouterSlice] | None = None
    """Temperature and biases by layers; by default 1 and 0."""
    layers: list[tuple[int, int]] | None = None
    """The ranges of layers that have experts, first included, last not; by default all."""
    scales: list[float] | None = None
    """A factor of each expert's output (mergekit-moe's `residual_scale`)."""
    shared_expert: ModelReference | None = None
    """A model whose MLP every token is sent to as well, in classes that have one; the router file has its gate."""
    shared_scale: float = 1.0
    """The factor of the shared expert's output."""
    architecture: str | None = None
    """The class: `mixtral`, `qwen3_moe` or `qwen2_moe`; by default the one that fits the base."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        count = len(self.experts)
        if self.experts_per_token > count:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, more than the {plural(count, 'expert')}; give at most"
                f" {count}"
            )
        if self.router is None and (len({*self.experts}) > 1 or self.shared_expert):
            raise ValueError(
                "mixture: the router is missing, so nothing says which expert a token is sent to; give its file, or"
                " start from mergekit-moe's YAML with positive_prompts for every expert"
            )
        for of in self.router_slices or []:
            if of.bias is not None and len(of.bias) != count:
                raise ValueError(
                    f"router_slices: {plural(len(of.bias), 'bias', 'biases')} for {plural(count, 'expert')}"
                )
        if self.scales is not None and len(self.scales) != count:
            raise ValueError(f"scales: {len(self.scales)} for {plural(count, 'expert')}; give one for each")
        for start, stop in self.layer_ranges:
            if not 0 <= start < stop:
                raise ValueError(
                    f"mixture: layers {[start, stop]} are none; give the first one, from 0, and the one after the last"
                )
        return self

    @property
    def references(self) -> list[ModelReference]:
        """Every model named, once."""
        return [*dict.fromkeys([*self.experts, *filter(None, [self.shared_expert])])]

    @property
    def layer_ranges(self) -> list[tuple[int, int]]:
        """Every range of layers that is named."""
        return [*(self.layers or []), *(of.layer_range for of in self.router_slices or [])]

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return self.layers is None or any(start <= layer < stop for start, stop in self.layers)

    def router_slice(self, layer: int) -> RouterSlice | None:
        """Return the temperature and biases of a layer; None for the plain directions."""
        return next((of for of in self.router_slices or [] if of.layer_range[0] <= layer < of.layer_range[1]), None)
