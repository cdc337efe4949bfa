"""The genome: the models, the merge methods and the granularity of a search."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from llmevo.errors import nearest, plural
from llmevo.merging.methods.registry import METHODS, WIDEN, Method, Parameter
from llmevo.merging.preparation.registry import PREPARED, STEPS
from llmevo.merging.recipe import DTYPES, PREPARE, Preparation
from llmevo.models.references import ModelReference, short_names
from llmevo.search.mixtures import Mixtures, check_experts
from llmevo.search.paths.settings import Paths

OTHER = "other"  # the name of the catch-all filter: the tensors that no other filter matches


def _pair(given: Any) -> Any:
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise ValueError("give [low, high], such as [0, 1]")
    return given


Bounds = Annotated[tuple[float, float], BeforeValidator(_pair)]
"""The least and the largest value of a gene."""


class Genome(BaseModel):
    """The `genome:` of a config; every key of mergekit-evolve and LLM-Evo-Merge means the same here."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    models: list[ModelReference] = Field(min_length=1)
    """The models to merge."""
    merge_method: str | list[str]
    """One of llmevo's merge methods, or a list of methods among which the search chooses. `slerp` merges two models: of
    more, each has a share `t` as its gene, and every slice merges the two with the highest, in the ratio of these."""
    method_per_slice: bool = False
    """With several methods: choose one for every slice instead of one for the whole recipe."""
    base_model: ModelReference | None = None
    """The model that they were fine-tuned from; required by methods on task vectors."""
    tokenizer_source: ModelReference | str | None = None
    """The tokenizer of the result: `base` (the default), a model, or `union`, which is the base's with the tokens that
    were added to other models. With the last two, embeddings are merged by token where the models' tokens differ."""
    layer_granularity: int = Field(default=0, ge=0)
    """Layers a slice; each slice has its own genes. 0: one slice for all layers. Must divide the layer count."""
    normalize: bool | None = None
    """Divide by the sum of the weights. Default: mergekit-evolve's of each method (yes for linear, ties, dare_ties and
    della, no for the others)."""
    allow_negative_weights: bool = False
    """Let weights go as far below 0 as above. `normalize` does not divide by a sum of weights that is less than a
    thousandth of their magnitudes, which would only amplify noise."""
    filters: list[str] | None = None
    """Parts of tensor names (`self_attn`, `mlp`), each with its own genes; all other tensors share one set."""
    smooth: bool = False
    """Interpolate between the slices' values over the layers instead of a constant for each slice."""
    split: bool | tuple[list[ModelReference], list[ModelReference]] = False
    """Search the layer from which two groups of models change roles, as one gene (the split point of M2N2,
    https://arxiv.org/abs/2508.16204): from there on every model takes the values of its partner in the other group, and
    slerp's t becomes 1 - t. `true`: the first half of the models and the second; or two lists of models, partners in
    the same order. The uniform merge, the parents and the first candidates have no such layer."""
    path: Paths | None = None
    """The layer paths that the optimizers `paths…` and `search.spaces: both` may try: `{deepest: 36, edits: 2}`."""
    bounds: dict[str, Bounds] = Field(default_factory=dict[str, Bounds])
    """{parameter: [lowest, highest value of its genes]}; by default the methods' own, the widest of several."""
    parameters: dict[str, float | bool] = Field(default_factory=dict[str, float | bool])
    """Fixed values for the methods' other parameters, such as `lambda` or `rescale`."""
    prepare: Preparation | None = None
    """Changes of the models before they are merged, such as `[aim, wudi]`, made once: see `docs/preparation.md`. The
    gene `prepare` says how far each slice goes from the models as they are, 0, to the prepared ones, 1. Steps that
    measure the inputs of layers do so on the search questions, or on `text`."""
    architecture: Literal["dense", "moe"] = "dense"
    """`moe`: every candidate is a mixture of experts. Attention and the rest are merged by the `merge_method`, the MLPs
    of the models are the experts, and temperature and biases of the routers are genes: see `docs/mixture.md`."""
    mixture: Mixtures | None = None
    """With `architecture: moe`, the mixtures that the search tries."""
    dtype: str = "bfloat16"
    """The type of the merged weights."""

    @field_validator("merge_method", mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        names: list[Any] = given if isinstance(given, list) else [given]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("give the name of a method, or a list of names")
        for name in names:
            if name not in METHODS:
                raise ValueError(f"merge_method {name!r} is unknown{nearest(name, METHODS)}")
        if WIDEN in names:
            raise ValueError(
                f"{WIDEN} has a result with more neurons than the models, which a search cannot load; write a recipe"
                " and merge it with `llmevo merge`, or widen a mixture with `llmevo dense MIXTURE OUT --by widen`"
            )
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{repeated[0]} is listed twice; list every method once")
        return given

    @field_validator("tokenizer_source")
    @classmethod
    def _known_source(cls, given: ModelReference | str | None) -> ModelReference | str | None:
        try:
            _ = isinstance(given, str) and ModelReference.parse(given)
        except ValueError:
            raise ValueError(f"{given!r} is not a model reference; write base, union or a model") from None
        return given

    @field_validator("prepare")
    @classmethod
    def _by_model(cls, given: Preparation | None, info: ValidationInfo) -> Preparation | None:
        """Read the models of `prepare.tasks`, which may be given by their short names."""
        if not (given and given.tasks) or "models" not in info.data:
            return given
        names = {short: model for model, short in short_names(info.data["models"]).items()}
        models = {of: names.get(str(of), of) for of in given.tasks}
        if unknown := next((of for of in models.values() if of not in names.values()), None):
            raise ValueError(f"tasks: {unknown} is none of the models{nearest(str(unknown), [*names])}")
        return given.model_copy(update={"tasks": {models[of]: tasks for of, tasks in given.tasks.items()}})

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if repeated := [str(model) for model in self.models if self.models.count(model) > 1]:
            raise ValueError(f"models: {repeated[0]} is listed twice; list every model once")
        if len({*(self.filters or []), OTHER}) <= len(self.filters or []):
            raise ValueError(f"filters: every one once, and none called {OTHER!r}; got {self.filters}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown{nearest(self.dtype, DTYPES)}")
        if self.prepare and self.base_model is None:
            raise ValueError("prepare: it changes what the models add to their base; give the base_model")
        if self.mixture and self.architecture != "moe":
            raise ValueError("mixture: it goes with `architecture: moe`; add that, or leave it out")
        if self.architecture == "moe":
            if self.path:
                raise ValueError("path and architecture: moe do not go together; leave one out")
            check_experts(self.mixture, self.experts, self.references)
        for method in self.methods:
            self._check_models(method)
        if self.method_per_slice and len(self.methods) < 2:
            raise ValueError("method_per_slice needs several methods to choose from: merge_method: [ties, linear]")
        if self.method_per_slice and self.smooth:
            raise ValueError("smooth and method_per_slice do not go together: nothing lies between two methods")
        self._check_parameters()
        self._check_split()
        return self

    def _check_split(self) -> None:
        """Raise ValueError for groups of `split` that have no partners."""
        if not self.split:
            return
        if self.smooth:
            raise ValueError("smooth and split do not go together: a split is a step between two layers")
        for method in self.methods:
            if len(self.merged(method)) < 2:
                raise ValueError(f"split needs two models or more to change roles, {method.name} merges one here")
            if method.pair and not walks(method):
                raise ValueError(f"split has no meaning for {method.name}, whose two models have no equal roles")
        groups = self.groups
        named = [*groups[0], *groups[1]]
        for model in named:
            if not all(model in self.merged(method) for method in self.methods):
                merged = self.merged(self.methods[0])
                raise ValueError(f"split: {model} is none of the merged models{nearest(str(model), map(str, merged))}")
            if named.count(model) > 1:
                raise ValueError(f"split: {model} is listed twice; list every model in one of the groups")
        if not groups[0] or len(groups[0]) != len(groups[1]):
            raise ValueError(
                f"split: the groups have {len(groups[0])} and {plural(len(groups[1]), 'model')}; give as many models in"
                " both, the first of one changes roles with the first of the other"
            )

    @property
    def groups(self) -> tuple[list[ModelReference], list[ModelReference]]:
        """The two groups of `split`."""
        if not isinstance(self.split, bool):
            return self.split
        every = [self.merged(method) for method in self.methods]
        shared = [model for model in every[0] if all(model in of for of in every)]
        half = len(shared) // 2
        return shared[:half], shared[half:]

    def _check_models(self, method: Method) -> None:
        """Raise ValueError where a method cannot merge these models."""
        name, count = method.name, len(self.merged(method))
        if method.takes_base and self.base_model is None:
            raise ValueError(f"base_model is missing: {name} merges what the models add to their base")
        if method.takes_base and self.models == [self.base_model]:
            raise ValueError("models: there is none to merge beside the base_model")
        if method.pair:
            if count < 2:
                raise ValueError(f"{name} needs at least two models")
            if count > 2 and not walks(method):
                raise ValueError(f"{name} merges two models, not {count}")
            if count > 2 and (self.filters or self.smooth):
                raise ValueError(f"filters and smooth do not go with {name} of more than two models; leave them out")
            return
        least, most = method.models
        if count < least or (most is not None and count > most):
            bound = "exactly" if least == most else "at least" if most is None else "at most"
            wanted = f"{bound} {plural(most if most is not None else least, 'model')}"
            beside = " beside the base_model" if self.has_origin(method) else ""
            raise ValueError(f"{name} merges {wanted}{beside}, not {count}")

    def _check_parameters(self) -> None:
        """Raise ValueError where `bounds` or `parameters` name an unknown parameter, or there are no genes."""
        declared = [(name, parameter) for method in self.methods for name, parameter in self.declared(method).items()]
        genes = [*dict.fromkeys(name for name, parameter in declared if parameter.is_gene)]
        fixed = [*dict.fromkeys(name for name, parameter in declared if not parameter.is_gene)]
        who = " and ".join(method.name for method in self.methods)
        have = "has" if len(self.methods) == 1 else "have"
        if not genes and len(self.methods) == 1:
            raise ValueError(
                f"{who} has nothing to search; merge it with `llmevo merge`, or give several methods:"
                f" merge_method: [{who}, ties]"
            )
        for name, (low, high) in self.bounds.items():
            if name not in genes:
                raise ValueError(f"bounds: {who} {have} no gene {name!r}{nearest(name, genes)}")
            if not low < high:
                raise ValueError(f"bounds: {name} needs a lower and a higher number, got [{low}, {high}]")
            is_share = any(of.is_share for called, of in declared if called == name)
            if is_share and (low < 0.0 or high > 1.0):
                raise ValueError(f"bounds: {name} is from 0 to 1, got [{low:g}, {high:g}]")
        for name in self.parameters:
            if name not in fixed:
                raise ValueError(f"parameters: {who} {have} no {name!r} to fix{nearest(name, fixed)}")

    def declared(self, method: Method) -> Mapping[str, Parameter]:
        """Return every parameter of a method's merges: its own, and `prepare` where models are prepared."""
        return {**declared_by(method), **({PREPARE: PREPARED} if self.is_prepared(method) else {})}

    def is_prepared(self, method: Method) -> bool:
        """Return whether a method merges prepared models: one on task vectors, in a genome with a preparation."""
        return self.prepare is not None and self.has_origin(method) and not method.pair

    def sums_to_merge(self, method: Method) -> bool:
        """Return whether the sum of the prepared task vectors is a merge of its own (`STEPS`)."""
        steps = self.prepare.names if self.prepare and self.is_prepared(method) else []
        return any(STEPS[name].sums_to_merge for name in steps)

    @property
    def methods(self) -> list[Method]:
        """The methods to choose from, usually one."""
        names = [self.merge_method] if isinstance(self.merge_method, str) else self.merge_method
        return [METHODS[name] for name in names]

    def normalizes(self, method: Method) -> bool:
        """Return whether a method divides by the sum of the weights, where it has a `normalize`."""
        return bool(method.normalize) if self.normalize is None else self.normalize

    def scales(self, method: Method) -> bool:
        """Return whether a method adds weighted task vectors to the base without dividing by the sum of the weights, so
        that an equal weight of all models is a coefficient of their sum.
        """
        weighted = method.takes_base and "weight" in method.each and "normalize" in method.shared
        return weighted and not self.normalizes(method)

    def has_origin(self, method: Method) -> bool:
        """Return whether the base model is the origin of this method's task vectors."""
        return method.takes_base or (method.may_take_base and self.base_model is not None)

    def merged(self, method: Method) -> list[ModelReference]:
        """Return the models that a method mixes, without a base that is their origin.

        The first model of a pair is the start of the merge: the base_model, or, where t = 1 is the other model, the
        first one listed.
        """
        base = self.base_model
        if not method.pair:
            return [model for model in self.models if not (self.has_origin(method) and model == base)]
        if base is None or (walks(method) and base in self.models):
            return self.models
        if base in self.models or len(self.models) == 1:
            return [base, *(model for model in self.models if model != base)]
        return self.models

    @property
    def experts(self) -> list[ModelReference]:
        """The models whose MLPs are the experts of a mixture."""
        given = self.mixture and self.mixture.experts
        return [*given] if given else [model for model in self.models if model != self.base_model]

    @property
    def references(self) -> list[ModelReference]:
        """Every model of the search, once, the donor of config and tokenizer first."""
        return [*dict.fromkeys([*([self.base_model] if self.base_model else []), *self.models])]


def declared_by(method: Method) -> Mapping[str, Parameter]:
    """Return every parameter of a method."""
    return {**method.each, **method.shared}


def walks(method: Method) -> bool:
    """Return whether a method on two models goes from one (t = 0) to the other (t = 1), as slerp does."""
    t = method.shared.get("t")
    return method.pair and t is not None and (t.low, t.high) == (0.0, 1.0)
