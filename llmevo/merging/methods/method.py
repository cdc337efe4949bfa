"""What a merge method is: a pure function on the tensors of one name, and the parameters a recipe may give it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import
    from llmevo.merging.methods.base import Merge


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as it may stand in a recipe.

    A parameter with `low` and `high` is a gene: the search may set it anywhere between them.
    """

    default: float | bool | None
    """Its value when the recipe is silent; None means it has to be given."""
    low: float | None = None
    high: float | None = None
    start: float | None = None
    """For a gene: where the search starts, in the uniform merge; the share 1/n of a weight by default."""

    @property
    def is_gene(self) -> bool:
        return self.low is not None


@dataclass(frozen=True)
class Method:
    """A merge method: its parameters, where they come from, and its arithmetic."""

    name: str
    """As in mergekit's `merge_method`."""
    function: "str | Merge"
    """Its arithmetic: a file of this package and a function in it, `ties.ties`; or a function from elsewhere."""
    paper: str
    each: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    """Parameters every model has its own value of."""
    shared: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    """Parameters of the whole merge."""
    takes_base: bool = False
    """Whether the base model is the origin of task vectors (and so must be given) or a model like the others."""
    may_take_base: bool = False
    """Whether a base model is the origin of task vectors when one is given, and none is needed."""
    pair: bool = False
    """Whether it merges exactly two models, the base and another."""
    models: tuple[int, int | None] = (1, None)
    """How many models it merges, at least and at most, the base not counted where it is the origin."""

    normalize: bool | None = None
    """mergekit-evolve's default of `normalize` for this method; None when it has no such parameter."""
    without_effect: Sequence[str] = ()
    """Parameters that mergekit takes for this method and that change nothing."""

    @cached_property
    def merge(self) -> "Merge":
        """Its arithmetic, imported when it is first wanted: a config is read without torch and Numba."""
        if not isinstance(self.function, str):
            return self.function
        module, _, function = self.function.partition(".")
        return getattr(import_module(f"llmevo.merging.methods.{module}"), function)

    @property
    def starts_from_base(self) -> bool:
        """Whether a base model that is given is where the merge starts from, not one of the models it mixes."""
        return self.takes_base or self.pair or self.may_take_base
