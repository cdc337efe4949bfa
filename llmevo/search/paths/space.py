"""The space of layer paths: the names that a path may use, its bounds, and the edits of a model's own path."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from llmevo.errors import ConfigError, RecipeError, plural
from llmevo.merging.path import Hop, LayerPath, Limits, Segment
from llmevo.models.gains import Gains
from llmevo.models.references import ModelReference
from llmevo.search.paths.edits import Edit, edited, edits_of, rope_edit
from llmevo.search.paths.settings import Paths

MERGE = "merge"
"""The name of the weight merge in a path."""

MANY = 50_000  # paths that are kept in memory
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Layers of a repeat; those up to `longest` count."""
SKIPS = (1, 2)
SHARES = (8, 4, 2)
"""Of a swap: the models' layers, divided by these."""
FACTORS = (1.0, 0.5)
"""Gains of a repeat."""
TEMPERATURES = (0.8, 1.25)
ROPES = (0.5, 2.0)
"""Factors of the base of the rotary embedding."""
ROPE_BOUNDS = (0.25, 4.0)
PLAIN = Gains()


class PathSpace:
    """The paths over some models of equal depth and a weight merge of them."""

    def __init__(self, settings: Paths, layers: int, names: Mapping[ModelReference, str]) -> None:
        """`names` are the models' short names. Raises ConfigError for bounds that leave nothing to edit."""
        self.settings, self.layers = settings, layers
        self.deepest = settings.deepest or round(1.2 * layers)
        tenth = max(1, round(layers / 10))
        self.first, self.last = settings.first or tenth, settings.last or tenth
        if self.first + self.last >= layers:
            raise ConfigError(
                f"genome.path: {self.first} first and {self.last} last layers stay as they are, and the models have"
                f" {plural(layers, 'layer')}, so nothing is left to edit; give smaller numbers for first and last"
            )
        if self.deepest < self.first + self.last:
            raise ConfigError(
                f"genome.path.deepest: {self.deepest} is less than the {self.first + self.last} layers that every path"
                " runs (first and last)"
            )
        self.models: dict[str, ModelReference] = {}
        """The models by their names in paths, which have no spaces."""
        for reference, name in names.items():
            word = re.sub(r"[\s|]+", "_", name)
            taken = word == MERGE or word in self.models
            self.models[f"{word}-{len(self.models)}" if taken else word] = reference
        self.limits = Limits({**dict.fromkeys(self.models, layers), MERGE: layers}, deepest=self.deepest)
        self.parse = lru_cache(4096)(self._parse)
        self._edited = lru_cache(MANY)(self._edit)
        self._edits = lru_cache(MANY)(self._edits_of)

    def narrow(self, deepest: int) -> None:
        """Allow no path with more layers than this."""
        self.deepest = min(self.deepest, deepest)
        self.limits = Limits(self.limits.layers, deepest=self.deepest)

    def name_of(self, reference: ModelReference) -> str:
        """Return a model's name in paths."""
        return next(name for name, model in self.models.items() if model == reference)

    def whole(self, name: str) -> LayerPath:
        """Return the path of all layers of a model, or of the merge."""
        return LayerPath((Segment(name, 0, self.layers),))

    def _parse(self, text: str) -> LayerPath:
        """Read the text form, of any number of edits. Raises RecipeError for a path outside the bounds."""
        path = LayerPath.parse(text, self.limits)
        self.check(path)
        return path

    def has_models_of(self, text: str) -> bool:
        """Return whether a path in its text form is of these models, within the bounds or not."""
        try:
            path = LayerPath.parse(text, self.limits)
        except RecipeError:
            return False
        return all(of.model in (*self.models, MERGE) and of.stop <= self.layers for of in path.segments)

    def check(self, path: LayerPath) -> None:
        """Raise RecipeError, one line, for a path that is too deep, or that changes the first or last layers."""
        path.check(self.limits)
        ends = {"first": (path.hops[: self.first], 0), "last": (path.hops[-self.last :], self.layers - self.last)}
        for word, (hops, start) in ends.items():
            count = self.first if word == "first" else self.last
            wanted = [Hop(hops[0].model, layer) for layer in range(start, start + count)]
            if [*hops] != wanted:
                verb = "begin" if word == "first" else "end"
                raise RecipeError(
                    f"path: its {word} {plural(count, 'layer')} must be {start}-{start + count} of one model, without"
                    f" gains; {verb} with {hops[0].model} {start}-{start + count}"
                )
        low, high = self.settings.gains
        for segment in path.segments:
            for key, value in segment.gains:
                if value != 1.0 and not low <= value <= high:
                    raise RecipeError(
                        f"path: {segment}: its {key} {value:g} is outside {low:g} to {high:g}; genome.path.gains widens"
                        " them"
                    )

        if not ROPE_BOUNDS[0] <= path.rope <= ROPE_BOUNDS[1]:
            raise RecipeError(f"path: rope {path.rope:g} is outside {ROPE_BOUNDS[0]:g} to {ROPE_BOUNDS[1]:g}")

    def check_edits(self, path: LayerPath) -> None:
        """Raise RecipeError for a path with more edits than allowed, or of kinds that are not, from any model."""
        edits = self.edits(path)
        if len(edits) > self.settings.edits:
            said = ", ".join(map(str, edits[:6])) + (" …" if len(edits) > 6 else "")
            raise RecipeError(
                f"path: it has {plural(len(edits), 'edit')} ({said}), more than {self.settings.edits};"
                " genome.path.edits allows more"
            )
        for edit in edits:
            if ("repeat" if edit.kind == "gain" else edit.kind) not in self.settings.kinds:
                raise RecipeError(f"path: {edit} is not among genome.path.kinds ({', '.join(self.settings.kinds)})")

    def edits(self, path: LayerPath, root: str | None = None) -> list[Edit]:
        """Return the edits that make a path of a model's own; by default of the model with the fewest."""
        return [*self._edits(path, root or "")]

    def _edits_of(self, path: LayerPath, root: str) -> tuple[Edit, ...]:
        named = [root] if root else dict.fromkeys(segment.model for segment in path.segments)
        return min((tuple(edits_of(name, path)) for name in named), key=len)

    def edited(self, root: str, edits: Iterable[Edit]) -> LayerPath | None:
        """Return a model's own path with edits; None where it is outside the bounds, or has too many edits as they are
        counted: layers that are swapped in part and then repeated are two.
        """
        return self._edited(root, tuple(sorted(edits)))

    def _edit(self, root: str, edits: tuple[Edit, ...]) -> LayerPath | None:
        try:
            path = edited(self.whole(root), edits)
            self.check(path)
        except (RecipeError, ValueError):
            return None
        return path if len(self.edits(path, root)) <= self.settings.edits else None

    def singles(self, others: Iterable[str]) -> Iterator[Edit]:
        """Yield every single edit of a model's own path; `others` are what layers may be swapped from."""
        kinds, low, high = self.settings.kinds, self.first, self.layers - self.last
        if "repeat" in kinds:
            least, most = self.settings.gains
            factors = [factor for factor in FACTORS if least <= factor <= most or factor == 1.0]
            room = min(self.settings.longest, self.deepest - self.layers)
            for length in (each for each in LENGTHS if each <= room):
                for start in range(low, high - length + 1):
                    yield from (Edit("repeat", start, start + length, factor=factor) for factor in factors)
        if "skip" in kinds:
            for length in SKIPS:
                yield from (Edit("skip", start, start + length) for start in range(low, high - length + 1))
        spans = [*dict.fromkeys(max(1, self.layers // share) for share in SHARES)]
        spans = [span for span in spans if span <= high - low]
        for name in others if "swap" in kinds else ():
            for span in spans:
                yield from (Edit("swap", start, start + span, name) for start in starts(low, high, span))
        yield from (rope_edit(factor) for factor in ROPES if "rope" in kinds)
        if "temperature" in kinds:
            for span in spans:
                begins = starts(low, high, span)
                for factor in TEMPERATURES:
                    yield from (Edit("temperature", start, start + span, factor=factor) for start in begins)


def starts(low: int, high: int, span: int) -> list[int]:
    """Return the first layers of blocks of `span` layers that cover those from `low` to `high` and overlap by half."""
    return [*dict.fromkeys([*range(low, high - span + 1, max(1, span // 2)), high - span])]
