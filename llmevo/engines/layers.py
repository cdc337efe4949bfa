"""The layers of a running transformers model, arranged anew for recipes that run other ones: see `docs/paths.md`.

A layer of the result is a shallow copy of one of the model's layers: the same modules with a number of their own,
around the weights of the result. Weights that are equal in several layers are in memory once.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llmevo.errors import CandidateError
from llmevo.models.architecture import stack_of
from llmevo.models.conversion import Part, Places, transformers_config

NUMBERS = ("layer_idx", "layer_id", "layer_number")
"""The attributes by which modules know the number of their layer: keys and values are cached by it."""

Key = tuple[str, ...]
"""The name of a weight in its layer, and the digests of the tensors that it is made of: equal keys, equal bits."""

Configs = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The content of config.json with the model's own layers, and with those of a result."""


class Layers:
    """The layers of a running model. Use `arrange` before weights of other layers are written into it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._start = stack_of(vars(model.config.get_text_config()), model.state_dict()).start
        self._running: nn.Module = model.get_submodule(self._start.rstrip("."))
        layers = [*self._running.children()]
        self._own = [_without_weights(layer, {}) for layer in layers]
        weights = [{id(weight) for weight in layer.parameters()} for layer in layers]
        self._tied = sum(map(len, weights)) > len({weight for of in weights for weight in of})
        self._changed: list[tuple[Any, str, Any]] = []
        """(config, key, its own value) of what the running model's configs say otherwise."""
        self.origins = [*range(len(layers))]
        """The model's layer that each running layer is a copy of."""
        self.are_shared = False
        """Whether layers have weights in common."""

    @property
    def depth(self) -> int:
        """The number of the model's own layers."""
        return len(self._own)

    def arrange(
        self,
        origins: Sequence[int],
        configs: Configs,
        made: Mapping[str, str],
        places: Places,
        loaded: dict[str, str],
    ) -> Places:
        """Give the model copies of its own layers `origins`, with those weights of the result that are in memory.

        `made` are the digests of the result's tensors, `places` and `loaded` those of the layers so far. Returns the
        new places; `loaded` has then what need not be loaded again, which includes a shared weight's names after its
        first. Raises CandidateError where layers share weights by themselves.
        """
        if self._tied:
            kind = type(self.model).__name__
            raise CandidateError(f"layers of {kind} have weights in common, so none can be repeated or left out")
        before = [place for of in self._weights(places, loaded) for place in of]
        old = {id(weight): weight for weight in (places.held[name] for name, _, _ in before)}
        known = {key: places.held[name] for name, _, key in before if key}
        for name in [name for _, part, _ in before if part for name in part.names]:
            loaded.pop(name, None)
        self.origins = []  # of none, should memory run out
        copies = {str(place): _numbered(self._own[origin], origin, place) for place, origin in enumerate(origins)}
        vars(self._running)["_modules"] = copies
        self._describe(*configs)
        places = Places(self.model, made)
        after = [*self._weights(places, made)]
        used = {id(known[key]) for of in after for _, _, key in of if key in known}
        free: dict[Any, list[Tensor]] = {}
        for weight in (weight for place, weight in old.items() if place not in used):
            free.setdefault(_form(weight), []).append(weight)
        filled = [self._fill(of, places, made, known, free, loaded) for of in after]
        self.are_shared = sum(map(len, filled)) > len({place for of in filled for place in of})
        self.origins = [*origins]
        return places

    def restore(self) -> None:
        """Give the model its own layers, with weights of no meaning."""
        if self.origins != [*range(self.depth)]:
            self.arrange(range(self.depth), ({}, {}), {}, Places(self.model, ()), {})

    def _weights(
        self, places: Places, digests: Mapping[str, str]
    ) -> Iterator[list[tuple[str, Part | None, Key | None]]]:
        """Yield the weights of each layer, and its buffers that a checkpoint has.

        Each is its name, what it is made of, and its key where it may be shared: where tensors make several weights,
        only their conversion tells which, and the layer is not shared.
        """
        parts = {part.target: part for part in places.parts.values()}
        layers: dict[int, list[tuple[str, Part | None]]] = {}
        for name, weight in places.held.items():
            number, dot, _ = name.removeprefix(self._start).partition(".")
            if not (name.startswith(self._start) and dot and number.isdigit()):
                continue
            if name in parts or isinstance(weight, nn.Parameter):
                layers.setdefault(int(number), []).append((name, parts.get(name)))
        for layer, of in layers.items():
            whole, start = all(part for _, part in of), f"{self._start}{layer}."
            found: list[tuple[str, Part | None, Key | None]] = []
            for name, part in of:
                made = [digests[each] for each in part.names if each in digests] if part else []
                is_known = whole and part and len(made) == len(part.names)
                found.append((name, part, (name.removeprefix(start), *made) if is_known else None))
            yield found

    def _fill(
        self,
        layer: Sequence[tuple[str, Part | None, Key | None]],
        places: Places,
        made: Mapping[str, str],
        known: dict[Key, Tensor],
        free: Mapping[Any, list[Tensor]],
        loaded: dict[str, str],
    ) -> set[int]:
        """Give a layer its weights: equal ones that are in memory, or else free or new memory. Returns their ids."""
        twins: dict[int, Tensor] = {}  # a layer may have a weight under two names
        for name, part, key in layer:
            weight = places.held[name]
            if id(weight) in twins:
                filled = twins[id(weight)]
            elif key in known and part:
                filled = known[key]
                loaded.update({each: made[each] for each in part.names})
            else:
                same = free.get(_form(weight))
                filled = same.pop() if same else _empty(weight, self.model.device)
                if key:
                    known[key] = filled
            twins[id(weight)] = places.held[name] = filled
            module, _, last = name.rpartition(".")
            holder = vars(self.model.get_submodule(module))
            holder["_parameters" if isinstance(filled, nn.Parameter) else "_buffers"][last] = filled
        return {id(weight) for weight in twins.values()}

    def _describe(self, own: Mapping[str, Any], arranged: Mapping[str, Any]) -> None:
        """Let the running model's configs say what config.json says with these layers."""
        for config, key, value in reversed(self._changed):
            vars(config)[key] = value
        self._changed.clear()
        if own == arranged:
            return
        pair = [transformers_config(type(self.model.config), config) for config in (own, arranged)]
        for one, other in (pair, [config.get_text_config() for config in pair]):
            said = {key: value for key, value in vars(other).items() if value != vars(one).get(key)}
            said = {key: value for key, value in said.items() if not isinstance(value, PreTrainedConfig)}
            for config in _configs_in(self.model):
                if type(config) is type(other):
                    self._changed += [(config, key, vars(config).get(key)) for key in said]
                    vars(config).update(deepcopy(said))


def _configs_in(model: Any) -> list[Any]:
    """Return the configs that the modules of a model read; some are copies of parts of others."""
    modules = (getattr(module, "config", None) for module in model.modules())
    found = [config for config in modules if isinstance(config, PreTrainedConfig)]
    nested: list[Any] = [config.get_text_config() for config in found]
    return [*{id(config): config for config in (*found, *nested)}.values()]


def _without_weights(module: Any, twins: dict[int, Any]) -> Any:
    """Return a copy of a module without memory for its weights; buffers are the module's own."""
    made = _copied(module, lambda child: _without_weights(child, twins))
    for name, weight in made._parameters.items():
        if weight is not None:
            empty = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
            made._parameters[name] = twins.setdefault(id(weight), empty)
    return made


def _numbered(module: Any, origin: int, place: int) -> Any:
    """Return a copy of a layer `origin` as the layer `place`, with the same weights and buffers."""
    made = _copied(module, lambda child: _numbered(child, origin, place))
    for key in NUMBERS:
        if vars(made).get(key) == origin and not isinstance(vars(made)[key], bool):
            vars(made)[key] = place
    return made


def _copied(module: Any, copied: Callable[[Any], Any]) -> Any:
    made = copy(module)
    for name in ("_parameters", "_buffers"):
        vars(made)[name] = {**vars(module)[name]}
    vars(made)["_modules"] = {name: child and copied(child) for name, child in module._modules.items()}
    for name, value in vars(module).items():
        if inspect.ismethod(value) and value.__self__ is module:  # hooks replace a module's own methods
            vars(made)[name] = value.__func__.__get__(made)
    return made


def _form(weight: Tensor) -> tuple[Any, ...]:
    return tuple(weight.shape), weight.dtype, isinstance(weight, nn.Parameter)


def _empty(weight: Tensor, device: Any) -> Tensor:
    made = torch.empty_like(weight, device=device)
    return nn.Parameter(made, weight.requires_grad) if isinstance(weight, nn.Parameter) else made
