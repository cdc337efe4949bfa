"""Parameters of a recipe: numbers, gradients over layers, and values by tensor name, as in mergekit."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, StrictBool

from llmevo.errors import RecipeError, nearest
from llmevo.merging.methods.registry import Method, Parameter

WITHOUT_EFFECT = ("int8_mask",)
"""mergekit's parameters that never change a result (they choose the type of a temporary)."""


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Conditional(Strict):
    """A value for the tensors whose name contains `filter` (all of them without one)."""

    value: StrictBool | float | list[float]
    filter: str | None = None

    def holds(self, tensor: str) -> bool:
        return self.filter in (None, "*") or self.filter in tensor


Setting = StrictBool | float | list[float] | list[Conditional] | Conditional
"""A number; a gradient over the layers of a slice; or one of those by tensor name."""

Settings = Mapping[str, Setting]


def check_settings(methods: Sequence[Method], settings: Settings | None, whole: bool) -> None:
    """Raise ValueError for a parameter that none of the methods has at this place, or of the wrong kind.

    `whole`: the place is the recipe or a slice, which may have parameters of the whole merge.
    """
    each = {name: parameter for method in methods for name, parameter in method.each.items()}
    shared = {name: parameter for method in methods for name, parameter in method.shared.items()}
    ignored = {*WITHOUT_EFFECT, *(name for method in methods for name in method.without_effect)}
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
        kind = (each | shared)[name].default
        for number in _numbers(setting):
            if isinstance(kind, bool) and number not in (0, 1):
                raise ValueError(f"{names}: {name} is either true or false, not {number:g}")
            if _is_whole(kind) and number != int(number):
                raise ValueError(f"{names}: {name} is a whole number, not {number:g}")


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
    for scope in scopes:
        if scope and name in scope:
            value = _evaluate(scope[name], tensor, depth, isinstance(parameter.default, bool))
            if value is not None and _is_whole(parameter.default) and value != int(value):
                raise RecipeError(f"the parameter {name!r} is {value:g} for the tensor {tensor}; give whole numbers")
            if value is not None:
                return value
    if parameter.default is None:
        raise RecipeError(f"the parameter {name!r} is missing for the tensor {tensor}; give it a value")
    return float(parameter.default)


def _evaluate(setting: Setting, tensor: str, depth: float, switch: bool) -> float | None:
    """Return a setting's value for one tensor at one depth; None when none of its filters holds.

    A `switch` is true or false: its gradients go in steps.
    """
    if isinstance(setting, bool | int | float):
        return float(setting)
    if isinstance(setting, Conditional):
        return _evaluate(setting.value, tensor, depth, switch) if setting.holds(tensor) else None
    conditionals = [entry for entry in setting if isinstance(entry, Conditional)]
    if conditionals:
        return next((_evaluate(c.value, tensor, depth, switch) for c in conditionals if c.holds(tensor)), None)
    # A gradient: linear interpolation between the values, spread evenly over the depth.
    values = [entry for entry in setting if not isinstance(entry, Conditional)]
    if not values:
        return None
    place = depth * (len(values) - 1)
    below = int(place)
    if switch:
        return values[below]
    above = min(len(values) - 1, below + 1)
    return (1 - (place - below)) * values[below] + (place - below) * values[above]
