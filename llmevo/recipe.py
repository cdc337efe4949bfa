"""A merge recipe as a value: reads and writes mergekit's YAML, and says what holds for each tensor."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from llmevo.errors import RecipeError, nearest
from llmevo.methods import METHODS, Method
from llmevo.references import ModelReference

DTYPES = ("bfloat16", "float16", "float32")
WITHOUT_EFFECT = ("int8_mask",)
"""Parameters that mergekit knows and that never change a result (they choose the type of a temporary)."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Conditional(_Strict):
    """A value for the tensors whose name contains `filter` (all of them without one)."""

    value: float | list[float]
    filter: str | None = None

    def holds(self, tensor: str) -> bool:
        return self.filter in (None, "*") or self.filter in tensor


Setting = bool | float | list[float] | list[Conditional] | Conditional
"""A number; a gradient over the layers of a slice; or one of those by tensor name."""


class InputModel(_Strict):
    """One model of a merge over whole models."""

    model: ModelReference
    parameters: dict[str, Setting] | None = None


class InputSlice(InputModel):
    """Some consecutive layers of one model, first included, last not."""

    layer_range: tuple[int, int]


class OutputSlice(_Strict):
    """Consecutive layers of the result, merged from as many layers of each source."""

    sources: list[InputSlice]
    base_model: ModelReference | None = None
    parameters: dict[str, Setting] | None = None

    @property
    def depth(self) -> int:
        start, stop = self.sources[0].layer_range
        return stop - start

    @model_validator(mode="after")
    def _same_depth(self) -> Self:
        if not self.sources:
            raise ValueError("a slice needs at least one source")
        depths = {stop - start for start, stop in (source.layer_range for source in self.sources)}
        if len(depths) != 1 or min(depths) < 1:
            raise ValueError(
                f"all sources of a slice need the same number of layers, at least one; got {sorted(depths)}"
            )
        return self


PARTS: Mapping[str | int, type[BaseModel]] = {"models": InputModel, "slices": OutputSlice, "sources": InputSlice}
"""What stands under a key of a recipe."""


class Recipe(_Strict):
    """A mergekit configuration with either `models` or `slices`."""

    merge_method: str
    base_model: ModelReference | None = None
    models: list[InputModel] | None = None
    slices: list[OutputSlice] | None = None
    parameters: dict[str, Setting] | None = None
    tokenizer_source: Literal["base"] | ModelReference | None = None
    dtype: str | None = None
    out_dtype: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.merge_method not in METHODS:
            raise ValueError(f"merge_method {self.merge_method!r} is unknown{nearest(self.merge_method, METHODS)}")
        if str(self.tokenizer_source) == "union":
            raise ValueError("tokenizer_source 'union' is not supported: the models need one vocabulary; use 'base'")
        if bool(self.models) == bool(self.slices):
            raise ValueError("give either `models` or `slices`, not both and not neither")
        needs_base = self.method.takes_base or self.method.pair
        for of in self.output_slices(1):
            base = of.base_model or self.base_model
            if needs_base and not base:
                raise ValueError(f"merge_method {self.merge_method!r} needs a base_model")
            others = sum(source.model != base for source in of.sources)
            if self.method.pair and others != 1:
                raise ValueError(f"{self.merge_method} merges two models, the base and one other, not {others} others")
        for key, dtype in (("dtype", self.dtype), ("out_dtype", self.out_dtype)):
            if dtype not in (None, *DTYPES):
                raise ValueError(f"{key} {dtype!r} is unknown{nearest(str(dtype), DTYPES)}")
        known = [*self.method.each, *self.method.shared, *WITHOUT_EFFECT]
        for name in self._parameter_names():
            if name not in known:
                raise ValueError(f"{self.merge_method} has no parameter {name!r}{nearest(name, known)}")
        return self

    def _parameter_names(self) -> Iterator[str]:
        slices = self.slices or []
        holders = [self, *(self.models or []), *slices, *(source for s in slices for source in s.sources)]
        for holder in holders:
            yield from holder.parameters or ()

    @classmethod
    def from_yaml(cls, text: str, origin: str = "recipe") -> Self:
        """Read mergekit's YAML. Raises RecipeError that names the key and the way out."""
        try:
            return cls.model_validate(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise RecipeError(f"{origin} is not YAML: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                holder = next((PARTS[key] for key in reversed(first["loc"][:-1]) if key in PARTS), cls)
                message = f"llmevo does not know this key{nearest(str(first['loc'][-1]), holder.model_fields)}"
            elif "parameters" in first["loc"][:-1]:
                place = ".".join(map(str, first["loc"][: first["loc"].index("parameters") + 2]))
                message = "give a number, a list of numbers (a gradient), or a list of `filter` and `value`"
            raise RecipeError(f"{origin}: {place}: {message}" if place else f"{origin}: {message}") from error

    def to_yaml(self) -> str:
        """mergekit's YAML, with the references as the user wrote them."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, width=100)

    def as_dict(self) -> dict[str, Any]:
        """The recipe in plain values, as the log and mergekit have it."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def of_one(cls, reference: ModelReference, dtype: str | None = None) -> Self:
        """The recipe of a model alone: merged with nothing."""
        return cls(
            merge_method="linear",
            models=[InputModel(model=reference, parameters={"weight": 1.0})],
            base_model=reference,
            dtype=dtype,
        )

    @property
    def method(self) -> Method:
        return METHODS[self.merge_method]

    @property
    def references(self) -> list[ModelReference]:
        """Every model named, once, in the order of the recipe; the donor of config and tokenizer is the first."""
        slices = self.slices or []
        named = [self.base_model, *(model.model for model in self.models or [])]
        named += [r for s in slices for r in (s.base_model, *(source.model for source in s.sources))]
        return [*dict.fromkeys(reference for reference in named if reference)]

    @property
    def donor(self) -> ModelReference:
        """The model whose config is the result's: the base, or the first one named."""
        return self.references[0]

    @property
    def tokenizer_donor(self) -> ModelReference:
        """The model whose tokenizer the result gets."""
        return self.tokenizer_source if isinstance(self.tokenizer_source, ModelReference) else self.donor

    def output_slices(self, layers: int) -> list[OutputSlice]:
        """The slices of the result; `models` are one slice over all `layers`."""
        if self.slices:
            return self.slices
        models = self.models or []
        span = (0, layers)
        return [OutputSlice(sources=[InputSlice(**dict(m), layer_range=span) for m in models])]

    def values(
        self, of: OutputSlice, tensor: str, depth: float, inputs: Sequence[str] | None = None
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """The parameters of one tensor: those of each source of the slice, and the shared ones.

        `depth` is the place in the slice, 0 to 1, at which gradients are read. `inputs` is what the tensor is called
        in each source, which is what a filter on a source's own parameter sees. Precedence is mergekit's: source,
        slice, recipe, default. Raises RecipeError for one that is required and missing.
        """
        base = of.base_model or self.base_model
        scopes = (of.parameters, self.parameters)
        each = {
            name: [
                # A base that is listed among the models needs no parameters of its own.
                _value(name, (source.parameters, *scopes), called, depth, 0.0 if source.model == base else p.default)
                for source, called in zip(of.sources, inputs or [tensor] * len(of.sources), strict=True)
            ]
            for name, p in self.method.each.items()
        }
        shared = {name: _value(name, scopes, tensor, depth, p.default) for name, p in self.method.shared.items()}
        return each, shared


def _value(
    name: str, scopes: tuple[Mapping[str, Setting] | None, ...], tensor: str, depth: float, default: float | None
) -> float:
    for scope in scopes:
        if scope and name in scope:
            value = _evaluate(scope[name], tensor, depth)
            if value is not None:
                return value
    if default is None:
        raise RecipeError(f"the parameter {name!r} is missing for the tensor {tensor}; give it a value")
    return float(default)


def _evaluate(setting: Setting, tensor: str, depth: float) -> float | None:
    """A setting's value for one tensor at one depth; None when none of its filters holds."""
    if isinstance(setting, bool | int | float):
        return float(setting)
    if isinstance(setting, Conditional):
        return _evaluate(setting.value, tensor, depth) if setting.holds(tensor) else None
    conditionals = [entry for entry in setting if isinstance(entry, Conditional)]
    if conditionals:
        return next((_evaluate(c.value, tensor, depth) for c in conditionals if c.holds(tensor)), None)
    # A gradient: linear interpolation between the values, spread evenly over the depth.
    values = [entry for entry in setting if not isinstance(entry, Conditional)]
    if not values:
        return None
    place = depth * (len(values) - 1)
    below = int(place)
    above = min(len(values) - 1, below + 1)
    return (1 - (place - below)) * values[below] + (place - below) * values[above]
