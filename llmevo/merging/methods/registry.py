"""The merge methods by name: their parameters with bounds and defaults, and their papers.

Only these are needed to read a config, a recipe or a log; the arithmetic, a file a method, is imported for merging.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import
    from llmevo.merging.methods.base import Merge


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method in a recipe. One with `low` and `high` is a gene: the search sets it between them."""

    default: float | bool | None
    """Its value when the recipe has none; None for a required one."""
    low: float | None = None
    high: float | None = None
    start: float | None = None
    """For a gene: its value in the uniform merge, where the search starts; by default 1/n, the share of a weight."""
    neutral: float | None = None
    """The value with which the method is task arithmetic, bit for bit; None where there is none."""
    meaning: str = ""
    """What it does, in a line for tables and for the LLM's prompt."""
    is_share: bool = False
    """True if it is a share, which no recipe may give below 0 or above 1."""

    @property
    def is_gene(self) -> bool:
        return self.low is not None


@dataclass(frozen=True)
class Method:
    """A merge method: its parameters, its paper, and its arithmetic."""

    name: str
    """As in mergekit's `merge_method`; also the name of its function."""
    paper: str
    each: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    """Parameters that have a value for every model."""
    shared: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    """Parameters of the whole merge."""
    function: "str | Merge" = ""
    """Its arithmetic: a function, or the file here of the function `name`, by default the file of that name."""
    takes_base: bool = False
    """True if the base model is the origin of task vectors (and required); otherwise it is a model like the others."""
    may_take_base: bool = False
    """True if a base model is optional, and the origin of task vectors if it is given."""
    pair: bool = False
    """True if it merges exactly two models, the base and another."""
    models: tuple[int, int | None] = (1, None)
    """The least and the largest number of models, without a base that is the origin."""
    normalize: bool | None = None
    """mergekit-evolve's default of `normalize` for this method; None when it has no such parameter."""
    without_effect: Sequence[str] = ()
    """Parameters that mergekit accepts for this method and that change nothing."""
    in_mergekit: bool = True
    """False if mergekit has no such method, so that it refuses a recipe that names it."""
    random: bool = False
    """True if it has random masks, which depend on the tensor's name and the models' references."""
    by_entry: bool = False
    """True if an entry of the result depends on the same entry of the models only, and on no norm, rank or angle of the
    tensor; the experts in one tensor need not be merged one by one then."""
    is_linear: bool = False
    """True if the result is a sum of the models, each times a factor made of the weights: a model may be given as
    several, among which its weight is divided."""

    @property
    def keeps_base(self) -> bool:
        """True if the result is the base where every model's `weight` is 0."""
        return self.takes_base and "weight" in self.each

    @cached_property
    def merge(self) -> "Merge":
        """Its arithmetic, imported at the first use: a config is read without torch and Numba."""
        if not isinstance(self.function, str):
            return self.function
        return getattr(import_module(f"llmevo.merging.methods.{self.function or self.name}"), self.name)

    @property
    def starts_from_base(self) -> bool:
        """True if the merge starts from the base model, which then is not one of the mixed models."""
        return self.takes_base or self.pair or self.may_take_base


SHARE = Parameter(default=None, low=0.0, high=1.0, meaning="the model's weight in the mean")
"""A weight in a mean."""

WEIGHT = Parameter(
    default=None, low=0.0, high=1.5, meaning="the factor of all that the model adds to the base (its task vector)"
)
"""The factor of a task vector."""

DENSITY = Parameter(
    default=1.0,
    low=0.01,
    high=1.0,
    start=1.0,
    is_share=True,
    meaning="the share of the task vector's entries that is kept, the largest ones",
)
"""The share of the entries that is kept."""

DROPPED = replace(DENSITY, meaning="the share of the task vector's entries that is kept, at random")
"""DARE's density."""

DROPPED_BY_RANK = replace(
    DENSITY, meaning="the share of the task vector's entries that is kept, at random, large ones more often"
)
"""DELLA's density."""

MIDDLE = replace(
    DENSITY, meaning="the share of the task vector's entries that is kept, neither the largest (gamma) nor the smallest"
)
"""The density of Breadcrumbs."""

GAMMA = Parameter(
    default=0.01,
    low=0.0,
    high=0.2,
    start=0.01,
    is_share=True,
    meaning="the share of the task vector's entries that is left out as the largest",
)
"""Breadcrumbs: the share of the entries, the largest, that is left out."""

EPSILON = Parameter(
    default=0.15,
    low=0.0,
    high=0.3,
    start=0.15,
    meaning="a row's largest entry is kept with the chance density + epsilon, its smallest with density - epsilon",
)
"""DELLA: half the distance between the keeping probabilities of the smallest and the largest entry of a row."""

CHANGED = Parameter(default=1e-5, meaning="an entry of a task vector above it, in magnitude, counts as changed")
"""RAM's epsilon: an entry of a task vector counts as changed above this magnitude."""

NORMALIZE = "whether the sum is divided by the sum of the weights"
LAMBDA = Parameter(default=1.0, meaning="the factor of the merged task vector")


def _sparse(
    name: str,
    paper: str,
    normalize: bool,
    rescale: bool,
    evolve_normalize: bool,
    function: str = "",
    density: Parameter = DENSITY,
    random: bool = False,
    **more: Parameter,
) -> Method:
    """Return a method of the family of TIES, DARE, Breadcrumbs and DELLA, with its own defaults.

    `rescale` scales the kept entries of a task vector to the L1 norm it had, as mergekit does; `inverse_density`
    divides each kept entry by its keeping probability instead, as the papers of DARE and DELLA do.
    """
    return Method(
        name,
        paper,
        each={"weight": WEIGHT, "density": density, **more},
        shared={
            "normalize": Parameter(default=normalize, meaning=NORMALIZE),
            "rescale": Parameter(
                default=rescale, meaning="whether what is kept of a task vector is scaled to the L1 norm it had"
            ),
            "inverse_density": Parameter(
                default=False, meaning="whether `rescale` divides each entry by its chance to be kept instead"
            ),
            "lambda": LAMBDA,
        },
        function=function,
        takes_base=True,
        normalize=evolve_normalize,
        random=random,
    )


BLEND = Parameter(
    default=1.0,
    low=0.0,
    high=1.0,
    start=1.0,
    neutral=0.0,
    is_share=True,
    meaning="the way from plain task vectors, 0, to separated ones, 1",
)
"""The way from task arithmetic, 0, to the method, 1."""


def _separating(name: str, paper: str, function: str = "", by_entry: bool = False, **more: Parameter) -> Method:
    """Return a method that separates task vectors before it adds them; at one value of its own gene it does nothing."""
    return Method(
        name,
        paper,
        each={"weight": WEIGHT},
        shared={"normalize": Parameter(default=False, meaning=NORMALIZE), "lambda": LAMBDA, **more},
        function=function,
        takes_base=True,
        normalize=False,
        in_mergekit=False,
        by_entry=by_entry,
    )


TIES = "https://arxiv.org/abs/2306.01708"
DARE = "https://arxiv.org/abs/2311.03099"
BREADCRUMBS = "https://arxiv.org/abs/2312.06795"
DELLA = "https://arxiv.org/abs/2406.11617"
RAM = "https://arxiv.org/abs/2601.13572"
_METHODS = (
    Method(
        "linear",
        "https://arxiv.org/abs/2203.05482",
        each={"weight": SHARE},
        shared={"normalize": Parameter(default=True, meaning=NORMALIZE)},
        normalize=True,
        by_entry=True,
        is_linear=True,
    ),
    Method(
        "slerp",
        "https://en.wikipedia.org/wiki/Slerp",
        shared={"t": replace(SHARE, meaning="the way from the first model, 0, to the second, 1")},
        pair=True,
        models=(1, 1),
    ),
    Method(
        "task_arithmetic",
        "https://arxiv.org/abs/2212.04089",
        each={"weight": WEIGHT},
        shared={"normalize": Parameter(default=False, meaning=NORMALIZE), "lambda": LAMBDA},
        takes_base=True,
        normalize=False,
        without_effect=("density", "rescale"),
        by_entry=True,
        is_linear=True,
    ),
    _sparse("ties", TIES, normalize=True, rescale=False, evolve_normalize=True),
    _sparse(
        "dare_linear",
        DARE,
        normalize=False,
        rescale=True,
        evolve_normalize=False,
        function="dare",
        random=True,
        density=DROPPED,
    ),
    _sparse(
        "dare_ties",
        DARE,
        normalize=False,
        rescale=True,
        evolve_normalize=True,
        function="dare",
        random=True,
        density=DROPPED,
    ),
    _sparse(
        "breadcrumbs", BREADCRUMBS, normalize=False, rescale=False, evolve_normalize=False, density=MIDDLE, gamma=GAMMA
    ),
    _sparse(
        "breadcrumbs_ties",
        BREADCRUMBS,
        normalize=False,
        rescale=False,
        evolve_normalize=False,
        function="breadcrumbs",
        density=MIDDLE,
        gamma=GAMMA,
    ),
    _sparse(
        "della",
        DELLA,
        normalize=True,
        rescale=True,
        evolve_normalize=True,
        random=True,
        density=DROPPED_BY_RANK,
        epsilon=EPSILON,
    ),
    _sparse(
        "della_linear",
        DELLA,
        normalize=False,
        rescale=True,
        evolve_normalize=False,
        function="della",
        random=True,
        density=DROPPED_BY_RANK,
        epsilon=EPSILON,
    ),
    Method(
        "nuslerp",
        "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
        each={"weight": replace(SHARE, meaning="the second model's share of both weights is the way to it on the arc")},
        shared={
            "nuslerp_row_wise": Parameter(default=False, meaning="whether columns are the vectors, instead of rows"),
            "nuslerp_flatten": Parameter(default=True, meaning="whether a whole tensor is one vector"),
        },
        may_take_base=True,
        models=(2, 2),
    ),
    Method(
        "multislerp",
        "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        each={"weight": replace(SHARE, meaning="the model's weight in the mean on the sphere")},
        shared={
            "normalize_weights": Parameter(default=True, meaning=NORMALIZE),
            "eps": Parameter(default=1e-8, meaning="what is added to each length, and the least length of a mean"),
        },
        may_take_base=True,
    ),
    Method(
        "karcher",
        "https://arxiv.org/abs/2603.04972",
        shared={
            "max_iter": Parameter(default=10.0, meaning="the steps towards the mean, at most"),
            "tol": Parameter(default=1e-5, meaning="the step at which it ends, and the least length of a model"),
        },
    ),
    Method(
        "model_stock",
        "https://arxiv.org/abs/2403.19522",
        shared={"filter_wise": Parameter(default=False, meaning="whether each row has a ratio of its own")},
        takes_base=True,
        models=(2, None),
    ),
    Method(
        "sce",
        "https://arxiv.org/abs/2408.07990",
        shared={
            "select_topk": Parameter(
                default=1.0,
                low=0.01,
                high=1.0,
                start=1.0,
                is_share=True,
                meaning="the share of the entries that is merged, those that differ most between the models",
            )
        },
        takes_base=True,
    ),
    Method("ram", RAM, shared={"epsilon": CHANGED}, takes_base=True),
    Method(
        "ramplus_tl",
        RAM,
        shared={
            "r": Parameter(
                default=0.1,
                low=0.0,
                high=1.0,
                start=0.1,
                meaning="what one model alone changed is multiplied by 1 + r times its overlap with the others",
            ),
            "alpha": Parameter(
                default=0.2, low=0.0, high=1.0, start=0.2, meaning="the largest overlap that counts for r"
            ),
            "epsilon": CHANGED,
        },
        function="ram",
        takes_base=True,
    ),
    Method("arcee_fusion", "https://arcee.ai", pair=True, models=(1, 1)),
    # Fine-tunes of one base are rarely further apart than 0.01: beyond it the other model is all there is.
    Method(
        "nearswap",
        "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        shared={
            "t": Parameter(
                default=None,
                low=0.0,
                high=0.01,
                start=0.001,
                meaning="how far every entry of the base moves towards the other model's, and not beyond it",
            )
        },
        pair=True,
        models=(1, 1),
        by_entry=True,
    ),
    Method(
        "passthrough",
        "https://github.com/arcee-ai/mergekit",
        each={
            "scale": Parameter(default=1.0, low=0.0, high=2.0, start=1.0, meaning="the factor of the model's tensors")
        },
        models=(1, 1),
        by_entry=True,
    ),
    _separating(
        "tsv",
        "https://arxiv.org/abs/2412.00081",
        blend=BLEND,
        rank=Parameter(
            default=1.0,
            low=0.05,
            high=1.0,
            start=0.5,
            is_share=True,
            meaning="the share of each task vector's rank that is kept",
        ),
    ),
    _separating("wudi", "https://arxiv.org/abs/2503.08099", blend=replace(BLEND, default=0.5, start=0.5)),
    _separating(
        "star",
        "https://arxiv.org/abs/2502.10339",
        eta=Parameter(
            default=0.4,
            low=0.05,
            high=1.0,
            start=0.4,
            neutral=1.0,
            is_share=True,
            meaning="the share of the sum of each task vector's singular values that is kept, the largest ones",
        ),
    ),
    _separating(
        "knots",
        "https://arxiv.org/abs/2410.19735",
        blend=BLEND,
        density=replace(
            DENSITY, start=0.5, meaning="the share of each aligned task vector's entries that is kept, the largest ones"
        ),
    ),
    _separating(
        "isotropic",
        "https://arxiv.org/abs/2502.04959",
        function="spectrum",
        gamma=Parameter(
            default=0.0,
            low=0.0,
            high=1.0,
            start=0.5,
            neutral=1.0,
            is_share=True,
            meaning="0 makes all directions of the merged task vector equally strong, 1 leaves them as they are",
        ),
    ),
    _separating(
        "subspace_boosting",
        "https://arxiv.org/abs/2506.16506",
        function="spectrum",
        beta=Parameter(
            default=0.5,
            low=0.0,
            high=1.0,
            start=0.5,
            neutral=1.0,
            is_share=True,
            meaning="the share of the sum of singular values after which the smaller ones are raised; 1 raises none",
        ),
    ),
    _separating(
        "consensus",
        "https://arxiv.org/abs/2405.07813",
        by_entry=True,
        threshold=Parameter(
            default=0.4,
            low=0.0,
            high=1.0,
            start=0.4,
            neutral=0.0,
            meaning="how large a model's change of an entry must be, beside the others' sum, to be a vote for it",
        ),
        agree=Parameter(default=2.0, meaning="the votes without which an entry stays the base's"),
    ),
    Method(
        "widen",
        "https://arxiv.org/abs/1701.06538",
        each={"weight": SHARE},
        shared={"scale": Parameter(default=1.0, meaning="the factor of the MLPs' output")},
        in_mergekit=False,
    ),
)
WIDEN = "widen"
"""The method whose result has more neurons than its models."""

METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
"""Every merge method by its name in mergekit's YAML."""
