"""Merge recipes: mergekit's YAML as a value, and the parameters of each tensor."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator, model_validator

from llmevo.errors import RecipeError, nearest, shortened
from llmevo.merging.methods.registry import METHODS, WIDEN, Method, Parameter
from llmevo.merging.mixture.mixture import MIXTURE, Mixture, RouterSlice
from llmevo.merging.preparation.registry import PREPARED, STEPS
from llmevo.models.gains import Gains
from llmevo.models.references import ModelReference, path_from, reference_from
from llmevo.models.yaml import read_yaml

DTYPES = ("bfloat16", "float16", "float32")
BY_SLICE = "by_slice"
"""The `merge_method` of a recipe whose slices each name their own.

mergekit knows no method of a slice and would ignore the key; it does not know this name either, and says so.
"""

PREPARE = "prepare"
"""The parameter that says how far a merge goes from the experts as they are, 0, to the prepared ones, 1."""

QUESTIONS = "questions.json"
"""The `text` of a run's recipes where the config names none: its search questions, in a file beside `best.yml`."""

WITHOUT_EFFECT = ("allow_negative_weights",)
"""Keys of a search that LLM-Evo-Merge's published recipe carries: they bound its genes, and no merge."""

WITHOUT_MEANING = {"residual_weight": "mergekit reads this key and does nothing with it; remove it"}
PARAMETERS_WITHOUT_EFFECT = ("int8_mask",)
"""mergekit's parameters that never change a result (they choose the type of a temporary)."""


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Conditional(Strict):
    """A value for the tensors whose name contains `filter` (all of them without one)."""

    value: StrictBool | float | list[float]
    """A number, true or false, or a gradient over the layers."""
    filter: str | None = None
    """A part of the tensors' names."""

    def holds(self, tensor: str) -> bool:
        return self.filter in (None, "*") or self.filter in tensor


Setting = StrictBool | float | list[float] | list[Conditional] | Conditional
"""A number; a gradient over the layers of a slice; or one of those by tensor name."""

Settings = Mapping[str, Setting]


def check_settings(methods: Sequence[Method], settings: Settings | None, whole: bool, prepared: bool = False) -> None:
    """Raise ValueError for a parameter that none of the methods has at this place, or with a value it cannot have.

    `whole`: the place is the recipe or a slice, which may have parameters of the whole merge; `prepared`: the recipe
    has a preparation.
    """
    each = {name: parameter for method in methods for name, parameter in method.each.items()}
    shared = {name: parameter for method in methods for name, parameter in method.shared.items()}
    if prepared:
        shared[PREPARE] = PREPARED
    ignored = {*PARAMETERS_WITHOUT_EFFECT, *(name for method in methods for name in method.without_effect)}
    names = " or ".join(method.name for method in methods)
    for name, setting in (settings or {}).items():
        if name in ignored:
            continue
        if name not in each and name not in shared:
            raise ValueError(f"{names} has no parameter {name!r}{nearest(name, [*each, *shared, *ignored])}")
        if name not in each and not whole:
            raise ValueError(
                f"{names}: {name!r} holds for the whole merge, not for one model; put it under the `parameters` of the"
                " recipe or of a slice"
            )
        parameter = (each | shared)[name]
        kind = parameter.default
        for number in _numbers(setting):
            if isinstance(kind, bool) and number not in (0, 1):
                raise ValueError(f"{names}: {name} is either true or false, not {number:g}")
            if _is_whole(kind) and number != int(number):
                raise ValueError(f"{names}: {name} is a whole number, not {number:g}")
            if parameter.is_share and not 0.0 <= number <= 1.0:
                raise ValueError(f"{names}: {name} is {number:g}; give a number from 0 to 1")


def _is_whole(default: float | bool | None) -> bool:
    """Return whether a parameter with this default is a whole number."""
    return isinstance(default, int) and not isinstance(default, bool)


def plain(name: str, parameter: Parameter, scopes: Iterable[Settings | None]) -> float | None:
    """Return a parameter's number if it is the same everywhere, None if it depends on the tensor or the layer."""
    setting = next((scope[name] for scope in scopes if scope and name in scope), parameter.default)
    return float(setting) if isinstance(setting, bool | int | float) else None


def _numbers(setting: Setting) -> Iterator[float]:
    for part in setting if isinstance(setting, list) else [setting]:
        if isinstance(part, Conditional):
            yield from _numbers(part.value)
        else:
            yield part


def value_of(name: str, parameter: Parameter, scopes: Sequence[Settings | None], tensor: str, depth: float) -> float:
    """Return a parameter's value for one tensor. Raises RecipeError where it has none."""
    value = _at(depth, gradient_of(name, parameter, scopes, tensor), isinstance(parameter.default, bool))
    if _is_whole(parameter.default) and value != int(value):
        raise RecipeError(f"the parameter {name!r} is {value:g} for the tensor {tensor}; give whole numbers")
    return value


def gradient_of(name: str, parameter: Parameter, scopes: Sequence[Settings | None], tensor: str) -> list[float]:
    """Return the values that a parameter has for one tensor, from the first layer to the last; often a single one.

    Raises RecipeError where it has none.
    """
    for scope in scopes:
        if scope and name in scope and (values := _gradient(scope[name], tensor)):
            return values
    if parameter.default is None:
        raise RecipeError(f"the parameter {name!r} is missing for the tensor {tensor}; give it a value")
    return [float(parameter.default)]


def _gradient(setting: Setting, tensor: str) -> list[float]:
    """Return the values of the part of a setting that holds for a tensor; empty when none of its filters holds."""
    parts = setting if isinstance(setting, list) else [setting]
    conditionals = [part for part in parts if isinstance(part, Conditional)]
    if conditionals:
        return next((_gradient(each.value, tensor) for each in conditionals if each.holds(tensor)), [])
    return [float(part) for part in parts if not isinstance(part, Conditional)]


def _at(depth: float, gradient: Sequence[float], switch: bool) -> float:
    """Return the value at a depth: values are spread evenly over it, with straight lines between them.

    A `switch` is true or false: its gradients go in steps.
    """
    place = depth * (len(gradient) - 1)
    below = int(place)
    if switch:
        return gradient[below]
    above = min(len(gradient) - 1, below + 1)
    return (1 - (place - below)) * gradient[below] + (place - below) * gradient[above]


class InputModel(Strict):
    """One model of a merge over whole models."""

    model: ModelReference
    """A folder, a model of the hub or a GGUF file, perhaps with an adapter: `MODEL[@REVISION][+ADAPTER]`."""
    parameters: dict[str, Setting] | None = None
    """This model's own, such as its `weight`; they take precedence over those of a slice and of the recipe."""


class InputSlice(InputModel):
    """Some consecutive layers of one model, first included, last not."""

    layer_range: tuple[int, int]
    """The first layer, from 0, and the one after the last."""


class OutputSlice(Strict):
    """Consecutive layers of the result, merged from as many layers of each source."""

    sources: list[InputSlice]
    """The layers that are merged: as many of each model."""
    base_model: ModelReference | None = None
    """The slice's own base; by default the recipe's."""
    merge_method: str | None = None
    """llmevo's extension: the slice's own method, in a recipe whose `merge_method` is `by_slice`."""
    gains: Gains | None = None
    """llmevo's extension: factors of the branches of the slice's layers, folded into the merged weights."""
    parameters: dict[str, Setting] | None = None
    """The slice's own; they take precedence over the recipe's."""

    @property
    def depth(self) -> int:
        start, stop = self.sources[0].layer_range
        return stop - start

    @model_validator(mode="after")
    def _same_depth(self) -> Self:
        if not self.sources:
            raise ValueError("a slice needs at least one source")
        for source in self.sources:
            start, stop = source.layer_range
            if start >= stop:
                raise ValueError(
                    f"layer_range {[start, stop]} of {source.model} has no layer; give the first layer, from 0, and the"
                    " one after the last"
                )
        depths = {stop - start for start, stop in (source.layer_range for source in self.sources)}
        if len(depths) != 1:
            raise ValueError(
                f"all sources of a slice need the same number of layers in their layer_range; got {sorted(depths)}"
            )
        return self


class TokenSource(Strict):
    """The row of the embeddings that a token gets: zeros, or that of a token of a model."""

    kind: Literal["zero", "model_token"]
    """`zero`, or `model_token`: the row of a token of a model."""
    model: ModelReference | None = None
    """The model of `model_token`."""
    token: str | None = None
    """Its token as a text."""
    token_id: int | None = Field(default=None, ge=0)
    """Or its number."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        named = (self.token is not None) + (self.token_id is not None)
        if self.kind == "zero" and (named or self.model):
            raise ValueError("kind: zero goes with no `model`, `token` or `token_id`")
        if self.kind == "model_token" and (self.model is None or named != 1):
            raise ValueError("kind: model_token needs a `model`, and either a `token` or a `token_id`")
        return self


class TokenRow(Strict):
    """A token's row in the models that lack the token, or with `force` in all of them."""

    source: ModelReference | TokenSource | None = None
    """A model that has the token, or another row."""
    force: bool = False
    """Take that row also where a model has the token."""

    @field_validator("source", mode="before")
    @classmethod
    def _by_kind(cls, given: object) -> object:
        if not isinstance(given, dict) or "kind" not in given:
            return given
        kind = cast(dict[str, Any], given)["kind"]
        if kind not in ("zero", "model_token"):
            raise ValueError(f"kind is {kind!r}; give zero or model_token, or a model instead")
        return TokenSource.model_validate(given)

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if self.force and self.source is None:
            raise ValueError("force needs a `source`")
        return self


class TokenizerSection(Strict):
    """mergekit's `tokenizer` section, where it has more than a `source`."""

    source: Literal["base", "union"] | ModelReference = "union"
    """As `tokenizer_source`."""
    tokens: dict[str, TokenRow] | None = None
    """{token: its row}, of tokens that need one of their own."""
    pad_to_multiple_of: int | None = Field(default=None, ge=1)
    """Add rows to embeddings and head until their number divides by this."""


class Preparation(Strict):
    """Changes of the experts before the merge, which do not depend on its weights: see `docs/preparation.md`.

    In short a list of steps, each a name or {name: {parameter: value}}.
    """

    steps: list[dict[str, dict[str, float]]] = Field(min_length=1)
    """The steps in their order, each with the parameters that are not the default."""
    text: str | None = None
    """The texts on which steps measure the inputs of linear layers: a JSON file {task: [text, …]}, or one with a text a
    line. In a config the search questions, if it names none."""
    tasks: dict[ModelReference, list[str]] | None = None
    """The tasks of `text` that stand for each expert, for `regmean` and the like; by default all for every expert."""

    @model_validator(mode="before")
    @classmethod
    def _in_short(cls, given: object) -> object:
        value = cast(dict[str, Any], given if isinstance(given, dict) else {"steps": given})
        steps = value.get("steps")
        if not isinstance(steps, list):
            return value
        return {**value, "steps": [{step: {}} if isinstance(step, str) else step for step in cast(list[Any], steps)]}

    @model_validator(mode="after")
    def _known(self) -> Self:
        for step in self.steps:
            if len(step) != 1:
                raise ValueError("a step is a name, or {name: {parameter: value}}")
            (name, values), *_ = step.items()
            if name not in STEPS:
                raise ValueError(f"there is no step {name!r}{nearest(name, STEPS)}")
            for key, number in values.items():
                known = STEPS[name].parameters
                if key not in known:
                    raise ValueError(f"{name} has no parameter {key!r}{nearest(key, known)}")
                low, high = known[key].low or 0.0, known[key].high or 1.0
                if not low <= number <= high:
                    raise ValueError(f"{key} of {name} is {number:g}; give a number from {low:g} to {high:g}")
        if repeated := [name for name in self.names if self.names.count(name) > 1]:
            raise ValueError(f"{repeated[0]} is listed twice")
        if any(STEPS[name].permutes for name in self.names[1:]):
            raise ValueError("align is the first step: the others compare models neuron by neuron")
        if self.tasks and not any(STEPS[name].measures == "grams" for name in self.names):
            readers = ", ".join(name for name, step in STEPS.items() if step.measures == "grams")
            steps = " and ".join(self.names)
            raise ValueError(f"tasks: only {readers} use them, and {steps} does not; leave them out")
        if empty := next((of for of, tasks in (self.tasks or {}).items() if not tasks), None):
            raise ValueError(
                f"tasks: the list of {empty} is empty; name its tasks, or leave the model out, to use all tasks for it"
            )
        return self

    @property
    def names(self) -> list[str]:
        return [name for step in self.steps for name in step]

    @property
    def reads_text(self) -> bool:
        """True if a step measures the inputs of layers."""
        return any(STEPS[name].measures for name in self.names)

    @property
    def named_tasks(self) -> list[str]:
        """The tasks of all models, once each."""
        return [*dict.fromkeys(task for tasks in (self.tasks or {}).values() for task in tasks)]

    @property
    def complete(self) -> list[tuple[str, dict[str, float]]]:
        """Every step with all of its parameters."""
        defaults = {
            name: {k: float(p.default or 0.0) for k, p in STEPS[name].parameters.items()} for name in self.names
        }
        return [(name, {**defaults[name], **values}) for step in self.steps for name, values in step.items()]


SECTIONS: Mapping[str | int, type[BaseModel]] = {
    "models": InputModel,
    "prepare": Preparation,
    "slices": OutputSlice,
    "sources": InputSlice,
    "gains": Gains,
    MIXTURE: Mixture,
    "router_slices": RouterSlice,
}
"""The values under a recipe's keys."""


FORMS: Mapping[str | int, str] = {
    "models": "`- model: base`",
    "slices": "`- sources: [{model: base, layer_range: [0, 8]}]`",
    "sources": "`- {model: base, layer_range: [0, 8]}`",
    "parameters": "`parameters: {weight: 0.5}`",
    "steps": "`prepare: [tsv]` or `prepare: [{tsv: {rank: 0.5}}]`",
    "tasks": "`tasks: {models/code: [code_questions]}`",
    "tokens": "`tokens: {'<token>': {source: base}}`",
    MIXTURE: "`mixture: {experts: [one, two], router: router.json}`",
    "experts": "`experts: [one, two]`",
    "layers": "`layers: [[0, 8]]`",
    "router_slices": "`- {layer_range: [0, 8], temperature: 0.5}`",
    "bias": "`bias: [0.5, 0]`, a number for each expert",
    "scales": "`scales: [0.5, 0.5]`, a number for each expert",
}
"""How lists and keys of a recipe are written, for messages."""

TYPES = {"string": "text", "int": "whole number", "float": "number", "bool": "truth value"}
"""Types of values, by the beginnings of pydantic's names of errors."""


class Recipe(Strict):
    """A mergekit configuration with either `models` or `slices`.

    Reads all keys of mergekit 0.1.5 that have the same result here; several `modules` are rejected with an error. Some
    keys are llmevo's own: `prepare`, `mixture`, `rope`, and a slice's `merge_method` and its `gains`, in a recipe whose
    `merge_method` is `by_slice`.

    >>> import llmevo
    >>> text = "merge_method: slerp\\nbase_model: one\\nmodels: [{model: two}]\\nparameters: {t: 0.4}"
    >>> recipe = llmevo.Recipe.from_yaml(text, "recipe.yml")
    >>> [str(model) for model in recipe.references]
    ['one', 'two']
    """

    merge_method: str
    """A merge method, or `by_slice`."""
    base_model: ModelReference | None = None
    """The origin of task vectors, for methods that have one; it gives config and tokenizer."""
    models: list[InputModel] | None = None
    """The models, for a merge with as many layers as they have."""
    slices: list[OutputSlice] | None = None
    """Instead of `models`: the slices of the result, from the first layer to the last."""
    parameters: dict[str, Setting] | None = None
    """Those of the whole merge, and of all models and slices that have none of their own."""
    prepare: Preparation | None = None
    """llmevo's extension: changes of the models other than the base before they are merged."""
    mixture: Mixture | None = None
    """llmevo's extension: the result is a mixture of experts: see `docs/mixture.md`."""
    rope: Annotated[float, Field(gt=0.0)] | None = None
    """llmevo's extension: a factor of the base of the rotary embedding (`rope_theta` of the result's config)."""
    tokenizer_source: Literal["base", "union"] | ModelReference | None = None
    """The tokenizer of the result: the base's, a model's, or the base's with the tokens that others added."""
    tokenizer: TokenizerSection | None = None
    """Only where it says more than `tokenizer_source` can."""
    chat_template: str | None = None
    """The text of a template, or `auto` for the commonest of the models'; by default the tokenizer's own."""
    dtype: str | None = None
    """The type of the written weights, such as `bfloat16`; by default the widest of the models'."""
    out_dtype: str | None = None
    """The same, and it takes precedence over `dtype`."""

    @model_validator(mode="before")
    @classmethod
    def _in_short(cls, value: object) -> object:
        """Replace mergekit's longer forms, `modules` and `tokenizer`, by the short ones; drop keys without effect."""
        if not isinstance(value, dict):
            return value
        given = {key: of for key, of in cast(dict[str, Any], value).items() if key not in WITHOUT_EFFECT}
        return _without_tokenizer(_without_modules(given))

    @field_validator("rope", mode="before")
    @classmethod
    def _no_truth(cls, value: object) -> object:
        return str(value) if isinstance(value, bool) else value  # which is no number

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
        self._check_preparation()
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
        elif any(of.gains for of in slices):
            raise ValueError(
                f"a slice has gains: write `merge_method: {BY_SLICE}` for the whole recipe (so that mergekit, which"
                " would overlook them, refuses it) and give every slice a merge_method"
            )
        elif any(named):
            raise ValueError(
                f"a slice has a merge_method of its own: write `merge_method: {BY_SLICE}` for the whole recipe (so that"
                " mergekit, which would overlook the slice's, refuses it) and give every slice one"
            )
        if WIDEN in named:
            raise ValueError(
                f"merge_method {WIDEN!r} is for a whole recipe: all layers have the same number of neurons"
            )
        for name in named if any(named) else [self.merge_method]:
            if name not in METHODS:
                raise ValueError(f"merge_method {name!r} is unknown{nearest(str(name), METHODS)}")

    def _check_preparation(self) -> None:
        if self.prepare is None:
            return
        if self.merge_method == WIDEN:
            raise ValueError(f"prepare: {WIDEN} takes the models as they are; leave one of them out")
        if self.base_model is None:
            raise ValueError("prepare: it changes what the models add to their base; give the base_model")
        if self.prepare.reads_text and self.prepare.text is None:
            raise ValueError(f"prepare: {self.prepare.names[0]} reads texts; write prepare: {{steps: […], text: FILE}}")
        if self.base_model in (self.prepare.tasks or {}):
            raise ValueError(f"prepare.tasks: {self.base_model} is the base, which has none; leave it out")
        if unknown := next((of for of in self.prepare.tasks or {} if of not in self.merged_references), None):
            hint = nearest(str(unknown), map(str, self.merged_references))
            raise ValueError(f"prepare.tasks: {unknown} is none of the merged models{hint}")

    def _check_parameter_names(self) -> None:
        """Raise ValueError for an unknown parameter; mergekit ignores those."""
        prepared = self.prepare is not None
        slices = self.slices or []
        names = dict.fromkeys(of.merge_method or self.merge_method for of in slices) or [self.merge_method]
        methods = [METHODS[name] for name in names]
        check_settings(methods, self.parameters, True, prepared)
        for model in self.models or []:
            check_settings(methods, model.parameters, False, prepared)
        for of in slices:
            check_settings([self.method_of(of)], of.parameters, True, prepared)
            for source in of.sources:
                check_settings([self.method_of(of)], source.parameters, False, prepared)

    def _check_models(self, of: OutputSlice, where: str) -> None:
        """Raise ValueError unless the slice has as many models as its method merges, and the base that it needs."""
        method, base = self.method_of(of), of.base_model or self.base_model
        if (method.takes_base or method.pair) and not base:
            which = "the model the others were tuned from" if method.takes_base else "the model it starts from"
            raise ValueError(f"{where}merge_method {method.name!r} needs a base_model: {which}")
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
        """Read a recipe in mergekit's YAML. Raises RecipeError that names the key and the way out."""
        try:
            given = read_yaml(text)
            if isinstance(given, dict) and "genome" in given:
                raise RecipeError("genome: this is the config of a search, not a recipe; start it with `llmevo run`")
            recipe = cls.model_validate(given)
            recipe.check_required()
            recipe.check_numbers()
        except ValidationError as error:
            raise RecipeError(f"{origin}: {_explain(error, cls)}") from error
        except (RecipeError, ValueError) as error:
            raise RecipeError(f"{origin}: {error}") from error
        return recipe

    def to_yaml(self) -> str:
        """Return mergekit's YAML, with the references as the user wrote them."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, width=100)

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe in plain values, as the log and mergekit have it."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def of_one(cls, reference: ModelReference, dtype: str | None = None) -> Self:
        """Return the recipe of a single model."""
        return cls(
            merge_method="linear",
            models=[InputModel(model=reference, parameters={"weight": 1.0})],
            base_model=reference,
            dtype=dtype,
        )

    def method_of(self, of: OutputSlice) -> Method:
        """Return the method of one slice: its own, or the recipe's."""
        return METHODS[of.merge_method or self.merge_method]

    def origin_of(self, of: OutputSlice) -> ModelReference | None:
        """Return the base model of one slice if its method starts from it; None where all models are equal."""
        return (of.base_model or self.base_model) if self.method_of(of).starts_from_base else None

    @property
    def references(self) -> list[ModelReference]:
        """Every model named, once, in the order of the recipe; the donor of config and tokenizer is the first."""
        return [*dict.fromkeys([*self.merged_references, *(self.mixture.references if self.mixture else [])])]

    @property
    def merged_references(self) -> list[ModelReference]:
        """The models that are merged, without those that are only experts of the `mixture`."""
        named = [self.base_model, *(model.model for model in self.models or [])]
        named += [r for s in self.slices or [] for r in (s.base_model, *(source.model for source in s.sources))]
        return [*dict.fromkeys(reference for reference in named if reference)]

    @property
    def donor(self) -> ModelReference:
        """The model whose config is the result's: the base, or the first one named."""
        return self.references[0]

    @property
    def vocabulary_source(self) -> Literal["base", "union"] | ModelReference | None:
        """The `tokenizer_source`, or the `source` of the `tokenizer` section; None where tokens are not looked at."""
        return self.tokenizer.source if self.tokenizer else self.tokenizer_source

    @property
    def tokenizer_donor(self) -> ModelReference:
        """The model whose tokenizer the result gets, in a union with the tokens that the others have besides."""
        return self.vocabulary_source if isinstance(self.vocabulary_source, ModelReference) else self.donor

    @property
    def mergekit_clause(self) -> str:
        """A clause for readers that says if mergekit carries the recipe out as well: it lacks some of the methods."""
        slices = self.slices or []
        named = dict.fromkeys([self.merge_method, *(of.merge_method for of in slices if of.merge_method)])
        lacking = [name for name in named if name in METHODS and not METHODS[name].in_mergekit]
        lacking += [key for key in (PREPARE, MIXTURE, "rope") if getattr(self, key)]
        if self.merge_method == BY_SLICE:
            lacking += ["merge_method of a slice", *(["gains"] if any(of.gains for of in slices) else [])]
        if lacking:
            return f"mergekit cannot: it has no {' and no '.join(lacking)}"
        own = [str(of) for of in self.references if not of.is_mergekits]
        return f"mergekit cannot: it knows no reference such as {own[0]}" if own else "mergekit reads it too"

    def output_slices(self, layers: int) -> list[OutputSlice]:
        """Return the slices of the result; `models` are one slice over all `layers`.

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

    def origins(self, layers: int) -> list[int]:
        """Return the donor's layer that each layer of the result corresponds to: that of its slice's first source."""
        return [layer for of in self.output_slices(layers) for layer in range(*of.sources[0].layer_range)]

    def is_path(self, layers: int) -> bool:
        """Return whether the result runs other layers than the models, which have `layers`, or scales a branch."""
        return any(of.gains for of in self.slices or []) or self.origins(layers) != [*range(layers)]

    def values(
        self, of: OutputSlice, tensor: str, depth: float, inputs: Sequence[str] | None = None
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Return the parameters of one tensor: those of each source of the slice, and the shared ones.

        `depth` is the place in the slice, 0 to 1, at which gradients are read. `inputs` are the tensor's names in the
        sources: a filter on a source's own parameter is compared with these. Precedence is mergekit's: source, slice,
        recipe, default. A base that is the origin has no parameters; its values mean nothing. Raises RecipeError for a
        required parameter that is missing.
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

    def with_text(self, name: str) -> Self:
        """Return the recipe with another `text`, where its preparation reads one."""
        if self.prepare is None or not self.prepare.reads_text:
            return self
        return self.model_copy(update={PREPARE: self.prepare.model_copy(update={"text": name})})

    def seen_from(self, folder: Path, root: Path) -> Self:
        """Return the recipe as a file in `folder` has it: with the relative paths of its models and texts, which start
        at `root`, from there.
        """

        def moved(value: Any) -> Any:
            if isinstance(value, ModelReference):
                return reference_from(value, root, folder)
            if isinstance(value, BaseModel):
                return value.model_copy(update={name: moved(part) for name, part in value})
            if isinstance(value, dict):
                return {moved(key): moved(part) for key, part in cast(dict[Any, Any], value).items()}
            return [moved(part) for part in cast(list[Any], value)] if isinstance(value, list) else value

        try:
            recipe = type(self).model_validate(moved(self).as_dict())
        except ValidationError as error:  # one model under two spellings of its path
            raise RecipeError(
                f"{error.errors()[0]['msg'].removeprefix('Value error, ')}, once its path is written in one way; write"
                " each model's path in the same way everywhere"
            ) from error
        text = recipe.prepare.text if recipe.prepare else None
        if text is None or text == QUESTIONS:
            return recipe
        return recipe.with_text(path_from(text, root, folder))

    def with_router(self, file: str) -> Self:
        """Return the recipe with another file of its router, where it has one."""
        if self.mixture is None or self.mixture.router is None:
            return self
        return self.model_copy(update={MIXTURE: self.mixture.model_copy(update={"router": file})})

    def prepared_share(self, of: OutputSlice, tensor: str, depth: float) -> float:
        """Return the parameter `prepare` of one tensor; 0 without a preparation."""
        return value_of(PREPARE, PREPARED, (of.parameters, self.parameters), tensor, depth) if self.prepare else 0.0

    def excludes(self, model: ModelReference, tensor: str) -> bool:
        """Return whether the recipe gives a model the weight 0 for a tensor in every layer and slice of the model."""
        found: list[float] = []
        for of in self.output_slices(1):
            if (weight := self.method_of(of).each.get("weight")) and model != self.origin_of(of):
                scopes = [[source.parameters, of.parameters, self.parameters] for source in of.sources]
                held = zip(of.sources, scopes, strict=True)
                for source, own in held:
                    found += gradient_of("weight", weight, own, tensor) if source.model == model else []
        return bool(found) and not any(found)

    def check_required(self) -> None:
        """Raise RecipeError for a parameter that its method needs and nothing gives, for any tensor."""
        for place, of in enumerate(self.output_slices(1)):
            method, scopes = self.method_of(of), (of.parameters, self.parameters)
            _check_given(method, method.shared, scopes, f"slices.{place}: " if len(self.slices or []) > 1 else "")
            for number, source in enumerate(of.sources):
                if source.model != self.origin_of(of):
                    key = f"slices.{place}.sources.{number}" if self.slices else f"models.{number}"
                    own = (source.parameters, *scopes)
                    _check_given(method, method.each, own, f"{key} ({source.model}): ")

    def check_numbers(self) -> None:
        """Raise RecipeError for plain numbers that fail for every tensor; in a search only the candidate fails."""
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


def _check_given(
    method: Method, parameters: Mapping[str, Parameter], scopes: Sequence[Settings | None], where: str
) -> None:
    """Raise RecipeError for a parameter without a default that none of the scopes gives."""
    for name, parameter in parameters.items():
        if parameter.default is None and not any(scope and name in scope for scope in scopes):
            example = 0.5 if parameter.start is None else parameter.start
            raise RecipeError(
                f"{where}{method.name} needs {name!r}; add `parameters: {{{name}: {example:g}}}`, or another number"
            )


def _without_modules(given: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe without `modules`, where its one module is the whole model."""
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


def _without_tokenizer(given: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with `tokenizer_source` for a `tokenizer` section that has only a `source`."""
    section = given.get("tokenizer")
    rest = {key: value for key, value in given.items() if key != "tokenizer"}
    if section is None:
        return rest
    if given.get("tokenizer_source"):
        raise ValueError("tokenizer: give either `tokenizer` or `tokenizer_source`")
    if isinstance(section, TokenizerSection):
        return given
    if not isinstance(section, dict):
        raise ValueError("tokenizer: give a `source`: `base`, `union` or a model")
    given_keys = cast(dict[str, Any], section)
    said = {key: value for key, value in given_keys.items() if value}
    for key in given_keys:
        if key not in TokenizerSection.model_fields:
            raise ValueError(
                f"tokenizer: llmevo does not know the key {key!r}{nearest(str(key), TokenizerSection.model_fields)}"
            )
    if said.keys() - {"source"}:
        return {**rest, "tokenizer": said}
    return {**rest, "tokenizer_source": said.get("source") or "union"}


def _explain(error: ValidationError, recipe: type[Recipe]) -> str:
    """Return the first error of a recipe: the key and the reason."""
    first = error.errors()[0]
    keys, message = first["loc"], first["msg"].removeprefix("Value error, ")
    if not keys and first["type"] != "value_error":
        return "a recipe has keys, `merge_method` and `models` or `slices` among them"
    if first["type"] == "extra_forbidden":
        holder = next((SECTIONS[key] for key in reversed(keys[:-1]) if key in SECTIONS), recipe)
        unknown = f"llmevo does not know this key{nearest(str(keys[-1]), holder.model_fields)}"
        message = WITHOUT_MEANING.get(str(keys[-1]), unknown)
    elif keys[:2] == ("tokenizer", "tokens") and len(keys) > 2:
        keys, reason = keys[:3], first["type"] == "value_error"
        message = message if reason else "give a `source`: a model, `kind: zero` or `kind: model_token`; and `force`"
    elif "parameters" in keys[:-1]:
        keys = keys[: keys.index("parameters") + 2]
        message = "give a number, a list of numbers (a gradient), or a list of `filter` and `value`"
    elif "layer_range" in keys[:-1] or (keys[-1:] == ("layer_range",) and first["type"] != "missing"):
        keys = keys[: keys.index("layer_range") + 1]
        message = "give two whole numbers: the first layer, from 0, and the one after the last"
    elif first["type"] == "missing":
        message = "this key is missing"
    elif keys[-1:] == ("gains",):
        message = f"{shortened(str(first['input']), 40)!r} is no gains; write gains: {{attention: 0.5, mlp: 0.5}}"
    elif "gains" in keys[:-1] or keys == ("rope",):
        least = "0 or more" if keys[-1:] in (("attention",), ("mlp",)) else "over 0"
        message = f"{shortened(str(first['input']), 40)} is no factor; give a number, {least}, such as 0.5"
    elif first["type"] == "literal_error":
        keys = tuple(key for key in keys if not str(key).startswith("literal["))
        message = f"{shortened(repr(first['input']), 40)} is none of these; write base, union or a model"
    else:
        message = _plain_type(keys, first["type"], first["input"], first.get("ctx") or {}) or message
    return ": ".join(filter(None, (".".join(map(str, keys)), shortened(message))))


def _plain_type(keys: Sequence[str | int], error: str, given: object, bounds: Mapping[str, Any]) -> str:
    """Return what may stand at a key, for a value of the wrong type or outside its bounds; empty for other errors."""
    said = shortened(repr(given), 40)
    if error in ("model_type", "dict_type", "list_type", "tuple_type", "too_short"):
        form = next((FORMS[key] for key in reversed(keys) if key in FORMS), "")
        return f"{said} cannot stand here" + (f"; write {form}" if form else "")
    if error in ("greater_than", "greater_than_equal"):
        least = f"over {bounds['gt']:g}" if "gt" in bounds else f"{bounds['ge']:g} or more"
        return f"{said} is too small; give a number, {least}"
    kind = next((kind for start, kind in TYPES.items() if error.startswith(start)), "")
    return f"{said} is no {kind}; give one" if kind else ""


def _wrong_number(method: Method, origin: bool, count: int) -> str:
    least, most = method.models
    if method.pair:
        return f"{method.name} merges two models, the base and one other, not {count} others"
    wanted = f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
    besides = " besides the base_model" if origin else ""
    hint = "; to stack layers, give every range a slice of its own" if most == 1 and not origin else ""
    return f"{method.name} merges {wanted} {'model' if wanted.endswith(' 1') else 'models'}{besides}, not {count}{hint}"
