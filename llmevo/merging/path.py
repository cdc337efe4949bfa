"""Layer paths: the layers that a merged model runs, in order, of one or several models.

This is merging in the data flow space (Akiba et al., https://arxiv.org/abs/2403.13187). A path is written as segments,
`A 0-12 | B 12-18 | A 15-30 gain 0.5`: a name, the first layer, the one after the last, and factors of the branches.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from llmevo.errors import RecipeError, SourceError, nearest, plural, shortened
from llmevo.merging.plan import plan
from llmevo.merging.recipe import BY_SLICE, Conditional, InputSlice, OutputSlice, Recipe, Setting, Settings
from llmevo.models.gains import SKIPPED, Branches, Gains
from llmevo.models.references import ModelReference

KEYS: Mapping[str, tuple[str, ...]] = {
    "gain": ("attention", "mlp"),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "temperature": ("temperature",),
}
"""The words of the text form, and the gains that each sets."""

SPAN = re.compile(r"(\d+)-(\d+)")
ROPE = "rope"
"""The word of the last part of a path that changes the rotary embedding."""

DIGITS = 4
"""Significant digits of a gain."""

PLAIN = Gains()
Named = Mapping[str, ModelReference | Recipe]
"""The models that a path may name, and weight merges: recipes whose slices, if any, keep the layers' order."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a path, for `LayerPath.parse`."""

    layers: Mapping[str, int] | None = None
    """The number of layers of every model that a path may name; None allows every name."""
    ends: str | None = None
    """A model whose first layer begins every path and whose last layer ends it."""
    deepest: int | None = None
    """The most layers that a path may have."""


@dataclass(frozen=True)
class Hop:
    """One layer of the result."""

    model: str
    layer: int
    gains: Gains = PLAIN


@dataclass(frozen=True)
class Segment:
    """Consecutive layers of a model, `start` included, `stop` not."""

    model: str
    start: int
    stop: int
    gains: Gains = PLAIN

    def __str__(self) -> str:
        return f"{self.model} {self.start}-{self.stop}{_written(self.gains)}"


@dataclass(frozen=True)
class LayerPath:
    """A path in its canonical form: adjacent segments are joined and gains rounded, so equal paths are equal values and
    have equal text.

    >>> str(LayerPath.parse("A 0-2 | A 2-4 | B 4-6 attention 0.5 mlp 0.50"))
    'A 0-4 | B 4-6 gain 0.5'
    """

    segments: tuple[Segment, ...]
    rope: float = 1.0
    """A factor of the base of the rotary embedding, of all layers."""

    def __post_init__(self) -> None:
        joined: list[Segment] = []
        for hop in _expanded(self.segments):
            last = joined[-1] if joined else None
            if last and (last.model, last.stop, last.gains) == (hop.model, hop.layer, hop.gains):
                joined[-1] = Segment(hop.model, last.start, hop.layer + 1, hop.gains)
            else:
                joined.append(Segment(hop.model, hop.layer, hop.layer + 1, hop.gains))
        object.__setattr__(self, "segments", tuple(joined))
        object.__setattr__(self, "rope", float(f"{self.rope:.{DIGITS}g}"))

    def __str__(self) -> str:
        return " | ".join([*map(str, self.segments), *([f"{ROPE} {self.rope:g}"] if self.rope != 1.0 else [])])

    def __len__(self) -> int:
        """Return the number of layers of the result."""
        return sum(segment.stop - segment.start for segment in self.segments)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The layers one by one."""
        return tuple(_expanded(self.segments))

    @classmethod
    def of_hops(cls, hops: Iterable[Hop], rope: float = 1.0) -> Self:
        return cls(tuple(Segment(hop.model, hop.layer, hop.layer + 1, hop.gains) for hop in hops), rope)

    @classmethod
    def parse(cls, text: str, limits: Limits | None = None) -> Self:
        """Read the text form. Raises RecipeError, one line that names the segment, for text or bounds not kept."""
        limits = limits or Limits()
        if not text.strip(" |\t\r\n"):
            raise RecipeError("path: it is empty; write segments such as `A 0-12 | B 12-18`")
        segments: list[Segment] = []
        rope = 1.0
        for place, part in enumerate(parts := text.split("|"), 1):
            try:
                words = _words(part)
                if place == len(parts) > 1 and len(words) == 2 and words[0] == ROPE and not SPAN.fullmatch(words[1]):
                    rope = _positive(ROPE, words[1])
                else:
                    segments.append(_segment(part, limits.layers))
            except ValueError as error:
                raise RecipeError(f"path: segment {place} ({shortened(part.strip(), 80)!r}): {error}") from error
        path = cls(tuple(segments), rope)
        path.check(limits)
        return path

    def check(self, limits: Limits) -> None:
        """Raise RecipeError unless the path keeps the bounds."""
        for segment in self.segments:
            if limits.layers is not None:
                try:
                    _check_span(segment.model, segment.start, segment.stop, limits.layers)
                except ValueError as error:
                    raise RecipeError(f"path: {segment}: {error}") from error
        if limits.deepest is not None and len(self) > limits.deepest:
            raise RecipeError(
                f"path: it has {plural(len(self), 'layer')}, more than {limits.deepest}; repeat fewer, or skip some"
            )
        if limits.ends is not None:
            first, last = self.segments[0], self.segments[-1]
            if (first.model, first.start) != (limits.ends, 0):
                raise RecipeError(
                    f"path: it begins with {first.model} {first.start}; begin with layer 0 of {limits.ends}"
                )
            final = (limits.layers or {}).get(limits.ends, last.stop)
            if (last.model, last.stop) != (limits.ends, final):
                raise RecipeError(
                    f"path: it ends with {last.model} {last.stop - 1}; end with the last layer of {limits.ends},"
                    f" {final - 1}"
                )

    def recipe(self, named: Named, branches: Branches | None = None, dtype: str | None = None) -> Recipe:
        """Return the path as a recipe.

        Where all segments are of models and mergekit's `scale` gives their gains exactly (`branches` says so), mergekit
        reads it too: slices of `passthrough`. Otherwise slices have a `merge_method` and `gains` of their own. Tensors
        before the layers come from the first segment, those after them from the last one. Raises RecipeError for an
        unknown name and for a weight merge that has no meaning on some of the layers.
        """
        for segment in self.segments:
            if segment.model not in named:
                raise RecipeError(f"path: {segment.model!r} is unknown{nearest(segment.model, named)}")
        scales = [_scales(segment, branches) for segment in self.segments]
        plain = [*map(_plain, (named[segment.model] for segment in self.segments), self.segments, scales)]
        rope = None if self.rope == 1.0 else self.rope
        if None not in plain:
            return Recipe(merge_method="passthrough", slices=[of for of in plain if of], rope=rope, dtype=dtype)
        slices = [of for segment in self.segments for of in _slices(segment.model, named[segment.model], segment)]
        return Recipe(merge_method=BY_SLICE, slices=slices, rope=rope, dtype=dtype)

    @classmethod
    def of_recipe(cls, recipe: Recipe, named: Named, branches: Branches | None = None) -> Self:
        """Return the path of a recipe with slices.

        `branches` are needed where `passthrough` has a `scale`. Raises RecipeError for a slice that no name stands for,
        and for a scale that is no gain of a branch.
        """
        if not recipe.slices:
            raise RecipeError("path: the recipe has no slices; it is a merge of whole models")
        steps: dict[int, list[tuple[str, float]]] = {}
        if any("scale" in (scope or {}) for scope in _scopes(recipe)):
            if branches is None:
                raise RecipeError(
                    "path: the recipe scales tensors; the models are needed to tell which branches it scales"
                )
            for step in plan(recipe, branches.all_names, branches.depth):
                if recipe.method_of(step.of).name == "passthrough":
                    scale = recipe.values(step.of, step.name, step.depth, step.inputs)[0]["scale"][0]
                    place = -1 if step.layer is None else step.layer
                    steps.setdefault(place, []).append((step.inputs[0], scale))
        _gains_of(steps.pop(-1, []), branches)
        hops: list[Hop] = []
        for of in recipe.slices:
            name = _name_of(recipe, of, named)
            for layer in range(*of.sources[0].layer_range):
                scaled = _gains_of(steps.get(len(hops), []), branches)
                if of.gains and scaled != PLAIN:
                    raise RecipeError(f"path: {name} {layer} has gains and a scale; give the gains only")
                hops.append(Hop(name, layer, of.gains or scaled))
        return cls.of_hops(hops, recipe.rope or 1.0)


def padded(recipe: Recipe, depth: int, layers: int = 0) -> Recipe:
    """Return a recipe of the same function with `depth` layers: layers that change nothing follow the last one.

    For engines whose number of layers is fixed: such a layer's branches add 0, so its output is its input bit for bit.
    `layers` is the models' number, for a recipe without slices. Raises RecipeError where the recipe has more layers.
    """
    slices = recipe.output_slices(layers) if layers else recipe.slices or []
    more = depth - sum(of.depth for of in slices)
    if not slices or more < 0:
        raise RecipeError(
            f"the recipe has {plural(depth - more, 'layer')} in slices; it cannot be filled up to {depth}"
        )
    if not more:
        return recipe
    own = [of.model_copy(update={"merge_method": of.merge_method or recipe.merge_method}) for of in slices]
    last = own[-1]
    sources = [of.model_copy(update={"layer_range": (of.layer_range[1] - 1, of.layer_range[1])}) for of in last.sources]
    # The last slice is of the same method, as what follows the layers is merged by it; the others cost nothing.
    idle = last.model_copy(update={"sources": sources, "gains": SKIPPED})
    copied = InputSlice(model=recipe.donor, layer_range=sources[0].layer_range)
    still = OutputSlice(sources=[copied], merge_method="passthrough", gains=SKIPPED)
    filled = [*own, *([still] * (more - 1)), idle]
    return Recipe.model_validate({**dict(recipe), "merge_method": BY_SLICE, "models": None, "slices": filled})


def _expanded(segments: Iterable[Segment]) -> Iterator[Hop]:
    for segment in segments:
        gains = segment.gains
        if gains is not PLAIN:
            gains = Gains(**{key: float(f"{value:.{DIGITS}g}") for key, value in gains}) if gains != PLAIN else PLAIN
        for layer in range(segment.start, segment.stop):
            yield Hop(segment.model, layer, gains)


def _written(gains: Gains) -> str:
    both = gains.attention == gains.mlp
    values = {
        "gain": gains.attention if both else 1.0,
        "attention": 1.0 if both else gains.attention,
        "mlp": 1.0 if both else gains.mlp,
        "temperature": gains.temperature,
    }
    return "".join(f" {key} {value:.{DIGITS}g}" for key, value in values.items() if value != 1.0)


def _words(text: str) -> list[str]:
    """Return the words of a segment: the model as it is written, a span as one word, keys and values apart."""
    model, _, rest = text.strip().partition(" ")
    if model.partition("=")[0] in (*KEYS, ROPE):
        model, rest = "", text
    return [*model.split(), *re.sub(r"(?<=\d)\s*[-–—]\s*(?=\d)", "-", rest).replace("=", " ").split()]


def _segment(text: str, layers: Mapping[str, int] | None) -> Segment:
    """Read one segment. Raises ValueError with the reason."""
    words = _words(text)
    if not words:
        raise ValueError("it is empty; leave out one `|`")
    if len(words) == 1:
        raise ValueError(f"it has no layers; write {words[0]} FIRST-END, such as {words[0]} 0-12")
    model, span, *rest = words
    if layers is not None and model not in layers:
        raise ValueError(f"there is no model {model!r}{nearest(model, layers)}")
    if not (found := SPAN.fullmatch(span)):
        raise ValueError(f"layers are {span!r}; write the first one and the one after the last, such as 0-12")
    start, stop = int(found[1]), int(found[2])
    _check_span(model, start, stop, layers)
    return Segment(model, start, stop, _gains(rest))


def _check_span(model: str, start: int, stop: int, layers: Mapping[str, int] | None) -> None:
    if start == stop:
        raise ValueError(
            f"{start}-{stop} has no layer; the second number is the layer after the last, so write {start}-{stop + 1}"
        )
    if start > stop:
        raise ValueError(f"{start}-{stop} goes backwards; give the smaller number first")
    if layers is not None and model not in layers:
        raise ValueError(f"there is no model {model!r}{nearest(model, layers)}")
    if layers is not None and stop > layers[model]:
        raise ValueError(
            f"{model} has {plural(layers[model], 'layer')}, so a range ends at {layers[model]}, not at {stop}"
        )


def _gains(words: list[str]) -> Gains:
    given: dict[str, float] = {}
    for place in range(0, len(words), 2):
        key, number = words[place], words[place + 1] if place + 1 < len(words) else None
        if key not in KEYS:
            raise ValueError(f"{key!r} is no gain{nearest(key, KEYS)}")
        if number is None:
            raise ValueError(f"{key} has no number; write {key} 0.5")
        value = _positive(key, number, ", or leave the layers out to skip them")
        if twice := [each for each in KEYS[key] if each in given]:
            raise ValueError(f"{twice[0]} is given twice (gain is attention and mlp); give it once")
        given |= dict.fromkeys(KEYS[key], value)
    return Gains(**given)


def _positive(key: str, number: str, instead: str = "") -> float:
    """Read a number. Raises ValueError for one that is not over 0; `instead` is another way out of 0."""
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"{key} is {number!r}; give a number over 0, such as 0.5") from None
    if not math.isfinite(value):
        raise ValueError(f"{key} is {number}; give a finite number over 0, such as 0.5")
    if value == 0.0:
        raise ValueError(f"{key} is 0; give a number over 0{instead}")
    if value < 0.0:
        raise ValueError(f"{key} is {number}; give a number over 0")
    return value


def _scales(segment: Segment, branches: Branches | None) -> list[tuple[str, float]] | None:
    """Return mergekit's filters for a segment's gains; None where they are not exact, or not known to be."""
    if segment.gains == PLAIN:
        return []
    if branches is None:
        return None
    span = range(segment.start, segment.stop)
    try:
        branches.check(segment.gains, span)
    except SourceError as error:
        raise RecipeError(f"path: {segment}: {error}") from error
    return branches.scales(segment.gains, span)


def _plain(of: ModelReference | Recipe, segment: Segment, scales: list[tuple[str, float]] | None) -> OutputSlice | None:
    """Return a segment as mergekit has it; None where it does not."""
    if scales is None or isinstance(of, Recipe):
        return None
    scale: Setting = [Conditional(filter=filter_, value=value) for filter_, value in scales]
    span = (segment.start, segment.stop)
    return OutputSlice(
        sources=[InputSlice(model=of, layer_range=span, parameters={"scale": scale} if scales else None)]
    )


def _slices(name: str, of: ModelReference | Recipe, segment: Segment) -> list[OutputSlice]:
    """Return a segment as slices with methods of their own, of a sliced merge one for each of its slices. Raises
    RecipeError for a merge that has none on it.
    """
    span, gains = (segment.start, segment.stop), None if segment.gains == PLAIN else segment.gains
    if isinstance(of, ModelReference):
        sources = [InputSlice(model=of, layer_range=span)]
        return [OutputSlice(sources=sources, merge_method="passthrough", gains=gains)]
    keys = ("rope", "tokenizer_source", "tokenizer", "chat_template", "dtype", "out_dtype")
    if given := next((key for key in keys if getattr(of, key) is not None), None):
        raise RecipeError(f"path: {name} has a {given}, which is of a whole result; give it to the path's recipe")
    wholes = of.output_slices(segment.stop)
    scopes = [of.parameters, *(model.parameters for model in of.models or [])]
    scopes += [each.parameters for whole in of.slices or [] for each in (whole, *whole.sources)]
    for scope in scopes:
        if gradient := next((key for key, setting in (scope or {}).items() if _is_gradient(setting)), None):
            raise RecipeError(
                f"path: {name}: {gradient} is a gradient over all layers, which has no meaning on some; give a number"
            )
    found: list[OutputSlice] = []
    place = 0
    for whole in wholes:
        if whole.gains or any(source.layer_range[0] != place for source in whole.sources):
            raise RecipeError(f"path: {name} is a recipe with slices in another order, or with gains; name its models")
        low, high = max(place, segment.start), min(place + whole.depth, segment.stop)
        place += whole.depth
        if low < high:
            shared = {**(of.parameters or {}), **(whole.parameters or {})}
            found.append(
                OutputSlice(
                    sources=[source.model_copy(update={"layer_range": (low, high)}) for source in whole.sources],
                    base_model=whole.base_model or of.base_model,
                    merge_method=whole.merge_method or of.merge_method,
                    gains=gains,
                    parameters=shared or None,
                )
            )
    if place < segment.stop:
        raise RecipeError(f"path: {name} has {plural(place, 'layer')}, so a range ends at {place}, not {segment.stop}")
    return found


def _is_gradient(setting: object) -> bool:
    if isinstance(setting, Conditional):
        return isinstance(setting.value, list)
    return isinstance(setting, list) and any(
        not isinstance(part, Conditional) or _is_gradient(part) for part in setting
    )


def _name_of(recipe: Recipe, of: OutputSlice, named: Named) -> str:
    """Return the name of a slice's model or merge. Raises RecipeError where none stands for it."""
    first = of.sources[0]
    if recipe.method_of(of).name == "passthrough":
        found = [name for name, model in named.items() if model == first.model]
        if found:
            return found[0]
    segment = Segment("", *first.layer_range, of.gains or PLAIN)
    own = of.model_copy(update={"merge_method": of.merge_method or recipe.merge_method})
    own = own.model_copy(update={"gains": None if segment.gains == PLAIN else segment.gains})
    merges = {name: merge for name, merge in named.items() if isinstance(merge, Recipe)}
    if name := next((name for name, merge in merges.items() if _slices(name, merge, segment) == [own]), ""):
        return name
    raise RecipeError(
        f"path: no name stands for the slice {[*first.layer_range]} of {first.model} ({own.merge_method}); known:"
        f" {', '.join(named)}"
    )


def _scopes(recipe: Recipe) -> Iterator[Settings | None]:
    yield recipe.parameters
    for of in recipe.slices or []:
        yield of.parameters
        yield from (source.parameters for source in of.sources)


def _gains_of(scales: list[tuple[str, float]], branches: Branches | None) -> Gains:
    """Return the gains that scaled tensors of one layer make. Raises RecipeError where they make none."""
    found: dict[str, tuple[str, float]] = {}
    for name, scale in scales:
        assert branches is not None
        kind = branches.branch(name)
        if not kind and scale != 1.0:
            raise RecipeError(f"path: {name} is scaled by {scale:g}, which is no gain of a branch")
        other, before = found.setdefault(kind, (name, scale))
        if before != scale:
            raise RecipeError(f"path: {other} is scaled by {before:g} and {name} by {scale:g}; a gain scales both")
        fold = branches.fold(name, Gains(**{kind: scale})) if kind and scale > 0.0 else None
        if (fold and (fold.one_more or fold.part)) or (kind and scale <= 0.0):
            raise RecipeError(f"path: {name} is scaled by {scale:g}, which is no gain of a branch")
    return Gains(**{kind: scale for kind, (_, scale) in found.items() if kind})
