"""A merge recipe as a value: reads and writes mergekit's YAML, and says what holds for each tensor."""

from collections.abc import Sequence
from typing import Any, Literal, Self, cast

import yaml
from pydantic import ValidationError, field_validator, model_validator

from llmevo.errors import RecipeError, nearest, shortened
from llmevo.merging.methods.method import Method
from llmevo.merging.methods.registry import METHODS
from llmevo.merging.parameters import Setting, Strict, check_settings, plain, value_of
from llmevo.merging.slices import PARTS, InputModel, InputSlice, OutputSlice
from llmevo.models.references import ModelReference
from llmevo.models.yaml import read_yaml


def without_modules(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose one module is the whole model, without `modules`."""
    modules = given.get("modules")
    if modules is None:
        return {key: value for key, value in given.items() if key != "modules"}
    if given.get("models") or given.get("slices"):
        raise ValueError("modules: give either `models`, `slices` or `modules`")
    if not isinstance(modules, dict) or [*modules] != ["default"] or not isinstance(modules["default"], dict):
        raise ValueError(
            "modules: llmevo merges language models, which have the one module `default`; write its `models` or"
            " `slices` at the top"
        )
    module = cast(dict[str, Any], modules["default"])
    known = ("models", "slices", "parameters")
    if unknown := [key for key in module if key not in known]:
        raise ValueError(f"modules.default: llmevo does not know the key {unknown[0]!r}{nearest(unknown[0], known)}")
    rest = {key: value for key, value in given.items() if key not in ("modules", "models", "slices", "parameters")}
    inner, outer = module.get("parameters") or {}, given.get("parameters") or {}
    if shared := [name for name in inner if name in outer]:
        raise ValueError(f"modules: {shared[0]!r} has a value for the module and one for the recipe; leave one")
    return {**rest, **module, "parameters": {**outer, **inner} or None}


def without_tokenizer(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose `tokenizer` section says only where it comes from, as `tokenizer_source`."""
    section = given.get("tokenizer")
    rest = {key: value for key, value in given.items() if key != "tokenizer"}
    if section is None:
        return rest
    if given.get("tokenizer_source"):
        raise ValueError("tokenizer: give either `tokenizer` or `tokenizer_source`")
    known = ("source", "tokens", "pad_to_multiple_of")
    if not isinstance(section, dict):
        raise ValueError("tokenizer: give a `source`: `base`, or a model")
    for key, value in cast(dict[str, Any], section).items():
        if key not in known:
            raise ValueError(f"tokenizer: llmevo does not know the key {key!r}{nearest(str(key), known)}")
        if key != "source" and value:
            raise ValueError(
                f"tokenizer: {key} is not supported, as the models need one vocabulary; leave it out, or change the"
                " models with mergekit first"
            )
    return {**rest, "tokenizer_source": section.get("source") or "union"}


DTYPES = ("bfloat16", "float16", "float32")

BY_SLICE = "by_slice"
"""The `merge_method` of a recipe whose slices each name their own.

mergekit knows no method of a slice and would overlook the key; it does not know this name either, and says so.
"""

WITHOUT_EFFECT = ("allow_negative_weights",)
"""Keys of a search that LLM-Evo-Merge's published recipe carries: they bound its genes, and no merge."""

WITHOUT_MEANING = {"residual_weight": "mergekit reads this key and does nothing with it; remove it"}


class Recipe(Strict):
    """A mergekit configuration with either `models` or `slices`.

    Reads everything mergekit 0.1.5 merges by that has the same result here, and refuses the rest by name: `modules` of
    a model with several, and a `tokenizer` section with `tokens` or `pad_to_multiple_of`. One key is llmevo's own: a
    slice's `merge_method`, in a recipe whose `merge_method` is `by_slice`.

    >>> import llmevo
    >>> text = "merge_method: slerp\\nbase_model: one\\nmodels: [{model: two}]\\nparameters: {t: 0.4}"
    >>> recipe = llmevo.Recipe.from_yaml(text, "recipe.yml")
    >>> [str(model) for model in recipe.references]
    ['one', 'two']
    """

    merge_method: str
    base_model: ModelReference | None = None
    models: list[InputModel] | None = None
    slices: list[OutputSlice] | None = None
    parameters: dict[str, Setting] | None = None
    tokenizer_source: Literal["base", "union"] | ModelReference | None = None
    chat_template: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_short(cls, value: object) -> object:
        """mergekit's longer ways of saying the same, `modules` and `tokenizer`, in the short ones, and nothing of what
        says nothing.
        """
        if not isinstance(value, dict):
            return value
        given = {key: of for key, of in cast(dict[str, Any], value).items() if key not in WITHOUT_EFFECT}
        return without_tokenizer(without_modules(given))

    @field_validator("dtype", "out_dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        dtype = value and value.removeprefix("torch.")
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype {value!r} is unknown{nearest(str(dtype), DTYPES)}")
        return dtype

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if bool(self.models) == bool(self.slices):
            raise ValueError("give either `models` or `slices`, not both and not neither")
        self._check_method_names()
        self._check_parameter_names()
        for place, of in enumerate(self.output_slices(1)):
            where = f"slices.{place}: " if self.slices and len(self.slices) > 1 else ""
            self._check_models(of, where)
        return self

    def _check_method_names(self) -> None:
        slices = self.slices or []
        named = [of.merge_method for of in slices]
        if self.merge_method == BY_SLICE:
            if not slices or None in named:
                raise ValueError(f"merge_method {BY_SLICE!r}: give `slices`, and each of them a `merge_method`")
        elif any(named):
            raise ValueError(
                f"a slice has a merge_method of its own: write `merge_method: {BY_SLICE}` for the whole recipe (so that"
                " mergekit, which would overlook the slice's, refuses it) and give every slice one"
            )
        for name in named if any(named) else [self.merge_method]:
            if name not in METHODS:
                raise ValueError(f"merge_method {name!r} is unknown{nearest(str(name), METHODS)}")

    def _check_parameter_names(self) -> None:
        """Every parameter is known where it stands; mergekit overlooks those that are not."""
        slices = self.slices or []
        methods = [METHODS[name] for name in dict.fromkeys(of.merge_method or self.merge_method for of in slices)]
        methods = methods or [METHODS[self.merge_method]]
        check_settings(methods, self.parameters, whole=True)
        for model in self.models or []:
            check_settings(methods, model.parameters, whole=False)
        for of in slices:
            check_settings([self.method_of(of)], of.parameters, whole=True)
            for source in of.sources:
                check_settings([self.method_of(of)], source.parameters, whole=False)

    def _check_models(self, of: OutputSlice, where: str) -> None:
        """The slice has as many models as its method merges, and its base where that is needed."""
        method, base = self.method_of(of), of.base_model or self.base_model
        if (method.takes_base or method.pair) and not base:
            raise ValueError(
                f"{where}merge_method {method.name!r} needs a base_model: the model the others were tuned from"
                if method.takes_base
                else f"{where}merge_method {method.name!r} needs a base_model: the model it starts from"
            )
        named = [source.model for source in of.sources]
        if repeated := [str(model) for model in named if named.count(model) > 1]:
            raise ValueError(
                f"{where}{repeated[0]} is listed twice; list every model once, with the sum of its weights"
            )
        origin = self.origin_of(of)
        count = len(named) - (origin in named)
        least, most = method.models
        if count < least or (most is not None and count > most):
            raise ValueError(where + _wrong_number(method, origin is not None, count))
        if origin is not None and origin not in named:
            raise ValueError(
                f"{where}the base_model {origin} is not among the slice's sources; list it there, with the layer_range"
                " of the layers the others start from"
            )

    @classmethod
    def from_yaml(cls, text: str, origin: str = "recipe") -> Self:
        """Read a recipe somebody wrote, in mergekit's YAML. Raises RecipeError that names the key and the way out."""
        try:
            given = read_yaml(text)
        except ValueError as error:
            raise RecipeError(f"{origin}: {error}") from error
        try:
            recipe = cls.model_validate(given)
            recipe.check_numbers()
        except ValidationError as error:
            place, message = _explain(error, cls)
            raise RecipeError(f"{origin}: {place}: {message}" if place else f"{origin}: {message}") from error
        except RecipeError as error:
            raise RecipeError(f"{origin}: {error}") from error
        return recipe

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

    def method_of(self, of: OutputSlice) -> Method:
        """The method that merges one slice: the slice's own, or the recipe's."""
        return METHODS[of.merge_method or self.merge_method]

    def origin_of(self, of: OutputSlice) -> ModelReference | None:
        """The base model of one slice where its method starts from it; None where all models are alike."""
        return (of.base_model or self.base_model) if self.method_of(of).starts_from_base else None

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
        """The slices of the result; `models` are one slice over all `layers`.

        A base model that is not among `models` joins them, as in mergekit: as the origin, or, where the method knows no
        origin, as one more model to mix. Without a `weight` for it in the recipe's own parameters mergekit refuses a
        linear merge then; here the base lends its config and tokenizer only.
        """
        if self.slices:
            return self.slices
        models = [*(self.models or [])]
        method, base = METHODS[self.merge_method], self.base_model
        if base and all(model.model != base for model in models):
            required = [name for name, parameter in method.each.items() if parameter.default is None]
            if method.starts_from_base or all(name in (self.parameters or {}) for name in required):
                models.append(InputModel(model=base))
        return [OutputSlice(sources=[InputSlice(**dict(model), layer_range=(0, layers)) for model in models])]

    def values(
        self, of: OutputSlice, tensor: str, depth: float, inputs: Sequence[str] | None = None
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """The parameters of one tensor: those of each source of the slice, and the shared ones.

        `depth` is the place in the slice, 0 to 1, at which gradients are read. `inputs` is what the tensor is called
        in each source, which is what a filter on a source's own parameter sees. Precedence is mergekit's: source,
        slice, recipe, default. A base that is the origin has no parameters; its values mean nothing. Raises RecipeError
        for one that is required and missing.
        """
        method, origin = self.method_of(of), self.origin_of(of)
        scopes = (of.parameters, self.parameters)
        each = {
            name: [
                0.0
                if source.model == origin
                else value_of(name, parameter, (source.parameters, *scopes), called, depth)
                for source, called in zip(of.sources, inputs or [tensor] * len(of.sources), strict=True)
            ]
            for name, parameter in method.each.items()
        }
        shared = {name: value_of(name, parameter, scopes, tensor, depth) for name, parameter in method.shared.items()}
        return each, shared

    def check_numbers(self) -> None:
        """Raise RecipeError for plain numbers that no tensor could be merged by.

        A search finds out candidate by candidate; call this for a recipe that somebody wrote.
        """
        for of in self.output_slices(1):
            method, origin = self.method_of(of), self.origin_of(of)
            if not {"density", "epsilon"} <= method.each.keys():
                continue
            for source in of.sources:
                scopes = (source.parameters, of.parameters, self.parameters)
                density, epsilon = (plain(name, method.each[name], scopes) for name in ("density", "epsilon"))
                if source.model == origin or density is None or epsilon is None or not 0.0 < density < 1.0:
                    continue
                if not (density - epsilon > 0.0 and density + epsilon < 1.0):
                    raise RecipeError(
                        f"{source.model}: density {density:g} with epsilon {epsilon:g}: {method.name} needs density - "
                        "epsilon over 0 and density + epsilon under 1; give an epsilon under "
                        f"{min(density, 1.0 - density):.4g}"
                    )


def _explain(error: ValidationError, recipe: type[Recipe]) -> tuple[str, str]:
    """The first fault of a recipe: the key, and what is wrong with it."""
    first = error.errors()[0]
    keys, message = first["loc"], first["msg"].removeprefix("Value error, ")
    if not keys and first["type"] != "value_error":
        return "", "a recipe has keys, `merge_method` and `models` or `slices` among them"
    if first["type"] == "extra_forbidden":
        holder = next((PARTS[key] for key in reversed(keys[:-1]) if key in PARTS), recipe)
        unknown = f"llmevo does not know this key{nearest(str(keys[-1]), holder.model_fields)}"
        message = WITHOUT_MEANING.get(str(keys[-1]), unknown)
    elif "parameters" in keys[:-1]:
        keys = keys[: keys.index("parameters") + 2]
        message = "give a number, a list of numbers (a gradient), or a list of `filter` and `value`"
    elif "layer_range" in keys[:-1] or (keys[-1:] == ("layer_range",) and first["type"] != "missing"):
        keys = keys[: keys.index("layer_range") + 1]
        message = "give two whole numbers: the first layer, from 0, and the one after the last"
    elif first["type"] == "missing":
        message = "this key is missing"
    return ".".join(map(str, keys)), shortened(message)


def _wrong_number(method: Method, origin: bool, count: int) -> str:
    least, most = method.models
    if method.pair:
        return f"{method.name} merges two models, the base and one other, not {count} others"
    wanted = f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
    beside = " beside the base_model" if origin else ""
    hint = "; to stack layers, give every range a slice of its own" if most == 1 and not origin else ""
    return f"{method.name} merges {wanted} {'model' if wanted.endswith(' 1') else 'models'}{beside}, not {count}{hint}"
