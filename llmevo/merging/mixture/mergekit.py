"""mergekit-moe's YAML, read unchanged."""

from collections.abc import Mapping
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmevo.errors import RecipeError, nearest, shortened
from llmevo.merging.mixture.mixture import MIXTURE, Mixture
from llmevo.merging.recipe import DTYPES, Recipe
from llmevo.models.references import ModelReference
from llmevo.models.yaml import read_yaml

GateMode = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random", "inputs"]


class Expert(BaseModel):
    """An expert and the prompts that are to be sent to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    source_model: ModelReference
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    noise_scale: float | None = None
    residual_scale: float | None = None

    @property
    def positive(self) -> list[str]:
        return self.positive_prompts or []

    @property
    def negative(self) -> list[str]:
        return self.negative_prompts or []


class MixtureRecipe(BaseModel):
    """A config of mergekit-moe. llmevo's own are the `gate_mode` `inputs`, and adapters as experts."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    base_model: ModelReference
    """It gives everything but the experts, and the tokenizer."""
    experts: list[Expert] = Field(min_length=1)
    gate_mode: GateMode = "hidden"
    """What a router's rows are made of: see `run.calibration.routers`."""
    dtype: str | None = None
    experts_per_token: int = 2
    shared_experts: list[Expert] | None = None
    architecture: str | None = None

    @model_validator(mode="after")
    def _sound(self) -> Self:
        count = len(self.experts)
        by_default = "" if "experts_per_token" in self.model_fields_set else " by default"
        if not 1 <= self.experts_per_token <= count:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}{by_default}; give a number from 1 to"
                f" {count}, the number of experts"
            )
        if self.dtype is not None and self.dtype.removeprefix("torch.") not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown{nearest(self.dtype, DTYPES)}")
        if len(self.shared_experts or []) > 1:
            raise ValueError("shared_experts: give one, no class has several")
        for place, expert in enumerate(self.all_experts):
            who = f"experts.{place}" if place < count else "shared_experts.0"
            if expert.noise_scale:
                raise ValueError(f"{who}: noise_scale adds random noise, for a training afterwards; leave it out")
            if self.gate_mode not in ("random", "uniform_random") and not expert.positive:
                raise ValueError(
                    f"{who}: it has no positive_prompts, so the router cannot know what to send to"
                    f" {expert.source_model}; give some, or gate_mode: random"
                )
        models = {expert.source_model for expert in self.experts}
        prompts = {(*expert.positive, "\0", *expert.negative) for expert in self.experts}
        if len(prompts) == 1 and len(models) > 1 and self.gate_mode not in ("random", "uniform_random"):
            raise ValueError("experts: all have the same prompts, so the router cannot tell them apart")
        return self

    @classmethod
    def holds(cls, text: str) -> bool:
        """Return whether a YAML file is a config of mergekit-moe: it has `experts` and no `merge_method`."""
        try:
            given = read_yaml(text)
        except ValueError:  # said where it is read
            return False
        return isinstance(given, dict) and "experts" in given and "merge_method" not in given

    @classmethod
    def from_yaml(cls, text: str, origin: str = "recipe") -> Self:
        """Read the YAML. Raises RecipeError, one line with the key and the way out."""
        try:
            return cls.model_validate(read_yaml(text))
        except ValidationError as error:
            raise RecipeError(f"{origin}: {_explain(error.errors()[0])}") from error
        except ValueError as error:
            raise RecipeError(f"{origin}: {error}") from error

    @property
    def all_experts(self) -> list[Expert]:
        """The experts, and after them the shared one."""
        return self.experts + (self.shared_experts or [])

    def recipe(self, router: str, dtype: str | None = None) -> Recipe:
        """Return it as a recipe of llmevo's; `router` is the file of its router, `dtype` the type if it names none."""
        shared = (self.shared_experts or [None])[0]
        scales = [1.0 if of.residual_scale is None else of.residual_scale for of in self.experts]
        given = Mixture(
            experts=[expert.source_model for expert in self.experts],
            experts_per_token=self.experts_per_token,
            router=router,
            scales=scales if any(scale != 1.0 for scale in scales) else None,
            shared_expert=shared.source_model if shared else None,
            shared_scale=1.0 if shared is None or shared.residual_scale is None else shared.residual_scale,
            architecture=self.architecture,
        )
        whole = Recipe.of_one(self.base_model, self.dtype or dtype)
        return Recipe.model_validate({**dict(whole), MIXTURE: given})


def _explain(error: Mapping[str, Any]) -> str:
    keys, message = cast(tuple[Any, ...], error["loc"]), str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        holder = Expert if {"experts", "shared_experts"} & {*keys[:-1]} else MixtureRecipe
        message = f"llmevo does not know this key{nearest(str(keys[-1]), holder.model_fields)}"
    elif error["type"] == "missing":
        message = "this key is missing"
    return ": ".join(filter(None, (".".join(map(str, keys)), shortened(message))))
