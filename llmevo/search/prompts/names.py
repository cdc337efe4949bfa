"""The names of models, tasks, parameters, methods and slices in a prompt, or masks in their place.

A search with masks shows what the LLM's knowledge of the names contributes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from llmevo.models.cards import one_line
from llmevo.search.genome import OTHER
from llmevo.search.mixtures import BIAS, TEMPERATURE, TOP_K
from llmevo.search.space import Gene, SearchSpace

TENSOR = re.compile(r"\b\w+(?:\.\w+)*\.(?:weight|bias)\b")
LAYER = re.compile(r"\b(?:layers?|h|blocks)[. ]?\d+(?:-\d+)?(?:\.\w+)*")


class Names:
    """The shown name of everything that has one, of at most `longest` characters."""

    def __init__(
        self,
        space: SearchSpace,
        tasks: Mapping[str, tuple[float, str]],
        masked: bool = False,
        longest: int = 40,
        order: Sequence[str] = (),
    ) -> None:
        """`order` are the models in the order of their masks; by default those that are merged come first."""
        genome = space.genome
        self.masked = masked
        own = space.names
        merged = [own[reference] for reference in space.merged]
        models = [*dict.fromkeys([*(name for name in order if name in own.values()), *merged, *own.values()])]
        parameters = [*dict.fromkeys(name for method in genome.methods for name in genome.declared(method))]
        parameters += [TEMPERATURE, BIAS, TOP_K] if space.routing else []
        filters = [*(genome.filters or ())]
        self.methods = {method.name: method.name for method in genome.methods}
        self.slices = {label: "all layers" if label == "all" else f"layers {label}" for label in space.slices}
        self.models, self.tasks = shortened(models, longest), shortened([*tasks], longest)
        self.parameters = {name: name for name in parameters}
        self.filters = {**shortened(filters, longest), OTHER: OTHER}
        named = (_numbered_apart(each, longest) for each in (models, [*tasks], filters))
        self.earlier = {name: short for each in named for name, short in each.items()}
        """Short names of earlier versions, which the answers in their logs use."""
        if masked:
            self.methods = _numbered("method", self.methods)
            self.slices = _numbered("slice", self.slices)
            self.models = {name: f"model {_letters(place)}" for place, name in enumerate(models)}
            self.tasks = _numbered("task", tasks)
            self.parameters = {name: f"p{place}" for place, name in enumerate(parameters, start=1)}
            self.filters = _numbered("part", self.filters)
            self._masks = self._everything(space, tasks)
            # The longest first, so that no name is replaced inside another.
            names = sorted((name for name in self._masks if name), key=len, reverse=True)
            self._real = re.compile(rf"(?<![a-z0-9])(?:{'|'.join(map(re.escape, names))})(?![a-z0-9])", re.IGNORECASE)

    def _everything(self, space: SearchSpace, tasks: Mapping[str, tuple[float, str]]) -> dict[str, str]:
        """{each form of a real name, in lower case: its mask}."""
        known = {**self.filters, **self.parameters, **self.slices, **self.methods, **self.tasks, **self.models}
        known.pop(OTHER, None)
        known.pop("all", None)
        for reference, name in space.names.items():
            parts = [reference.model.path, *([reference.lora.path] if reference.lora else ())]
            known |= dict.fromkeys((str(reference), *parts), self.models[name])
        for task, (_, metric) in tasks.items():
            known |= {metric: f"the metric of {self.tasks[task]}", metric.partition(",")[0]: "a metric"}
        return {name.lower(): mask for name, mask in known.items()}

    def _mask(self, found: str) -> str:
        """The mask of a real name in any case; letters such as `ſ` have a lower case of their own."""
        mask = self._masks.get(found.lower())
        return mask or next(mask for name, mask in self._masks.items() if re.fullmatch(re.escape(name), found, re.I))

    def column(self, gene: Gene, filters: bool) -> str:
        """Return a gene's name without its slice: `model.parameter`, or `model.filter.parameter` with `filters`."""
        parts = [self.models[gene.model] if gene.model else "all models"]
        parts += [self.filters[gene.filter or OTHER]] if filters else []
        return ".".join([*parts, self.parameters[gene.parameter]])

    def text(self, text: str, longest: int) -> str:
        """Return free text, such as an error, as one shortened printable line; without real names when masked."""
        line = one_line(text[: 20 * longest])
        if self.masked:
            line = LAYER.sub("a layer", TENSOR.sub("a tensor", line))
            line = self._real.sub(lambda found: self._mask(found[0]), line)
        return line if len(line) <= longest else line[: longest - 1] + "…"


def shortened(names: Sequence[str], longest: int) -> dict[str, str]:
    """Return {name: short name}, long ones without their middle, or without what they have in common where they differ
    in the middle; no two become equal.
    """
    long = [name for name in names if len(name) > longest]
    start, end = _in_common(long), _in_common([name[::-1] for name in long])
    for short in (_without_middle, lambda name, most: _around(name, start, end, most)):
        found = {name: short(name, longest) if name in long else name for name in names}
        if len({*found.values()}) == len(found) and max(map(len, found.values()), default=0) <= longest:
            return found
    return _numbered_apart(names, longest)


def _in_common(names: Sequence[str]) -> int:
    """Return the number of letters at their beginning that are the same in all names."""
    return sum(1 for _ in takewhile(lambda letters: len({*letters}) == 1, zip(*names, strict=False)))


def _without_middle(name: str, longest: int) -> str:
    head = longest // 2
    return name if len(name) <= longest else f"{name[:head]}…{name[len(name) - (longest - head - 1) :]}"


def _around(name: str, start: int, end: int, longest: int) -> str:
    """Return a name with what stands between a start and an end that others share, and as much of these as fits."""
    own = name[start : max(len(name) - end, start)]
    room = longest - len(own) - 2
    head, tail = max(room // 2, 0), max(room - room // 2, 0)
    return f"{name[: min(head, start)]}…{own}…{name[len(name) - min(tail, end) :]}"


def _numbered_apart(names: Sequence[str], longest: int) -> dict[str, str]:
    """Return {name: name without its middle}, with a number where two would be equal."""
    found: dict[str, str] = {}
    for name in names:
        short = _without_middle(name, longest)
        found[name] = short if short not in found.values() else f"{short[: longest - 4]}~{len(found)}"
    return found


def _numbered(kind: str, names: Iterable[str]) -> dict[str, str]:
    return {name: f"{kind} {place}" for place, name in enumerate(names, start=1)}


def _letters(place: int) -> str:
    """A to Z, then AA, AB …"""
    return (_letters(place // 26 - 1) if place >= 26 else "") + chr(ord("A") + place % 26)
