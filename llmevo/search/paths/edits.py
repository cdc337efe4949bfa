"""Edits of a layer path: what sets a path apart from the one that a search starts from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmevo.merging.path import DIGITS, ROPE, Hop, LayerPath
from llmevo.models.gains import Gains


@dataclass(frozen=True, order=True)
class Edit:
    """One change of a path. Places count the hops of the path that is edited, from 0."""

    kind: str
    """`repeat`, `skip`, `swap`, `temperature`, `rope`, or `gain` for layers that run once with another gain."""
    start: int
    stop: int
    """The place after the last hop."""
    model: str = ""
    """The model of swapped layers, and of repeated ones that are not those that ran before."""
    factor: float = 1.0
    """The gain of repeated layers, the temperature, or that of the rotary embedding's base, which has no place."""

    def __str__(self) -> str:
        if self.kind == ROPE:
            return f"{ROPE} {self.factor:g}"
        factor = "" if self.factor == 1.0 else f" gain {self.factor:g}"
        if self.kind == "temperature":
            factor = f" {self.factor:g}"
        return f"{self.kind} {self.start}-{self.stop}{self.model and f' {self.model}'}{factor}"


def scaled(gains: Gains, by: float) -> Gains:
    """Return gains with both branches multiplied."""
    if by == 1.0:
        return gains
    return Gains(
        attention=_short(gains.attention * by), mlp=_short(gains.mlp * by), temperature=_short(gains.temperature)
    )


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def edited(root: LayerPath, edits: Sequence[Edit]) -> LayerPath:
    """Return the path with all edits; their order makes no difference.

    Swaps and temperatures come first, then skips; a repeat runs what is left of its layers. Raises ValueError where
    nothing is left, and for places that the path does not have.
    """
    hops: list[Hop | None] = [*root.hops]
    if any(edit.start < 0 or edit.stop > len(hops) for edit in edits):
        raise ValueError("the path has no such place")
    for edit in sorted(edits):
        for place in range(edit.start, edit.stop):
            hop = hops[place]
            if edit.kind == "swap" and hop:
                hops[place] = Hop(edit.model, hop.layer, hop.gains)
            elif edit.kind == "temperature" and hop:
                at = _short(hop.gains.temperature * edit.factor)
                hops[place] = Hop(hop.model, hop.layer, hop.gains.model_copy(update={"temperature": at}))
            elif edit.kind == "gain" and hop:
                hops[place] = Hop(hop.model, hop.layer, scaled(hop.gains, edit.factor))
    for edit in edits:
        if edit.kind == "skip":
            hops[edit.start : edit.stop] = [None] * (edit.stop - edit.start)
    found: list[Hop] = []
    repeats = sorted(edit for edit in edits if edit.kind == "repeat")
    for place, hop in enumerate(hops):
        found += [hop] if hop else []
        for edit in repeats:
            if edit.stop == place + 1:
                again = [each for each in hops[edit.start : edit.stop] if each]
                found += [Hop(edit.model or each.model, each.layer, scaled(each.gains, edit.factor)) for each in again]
    if not found:
        raise ValueError("no layer is left")
    rope = math.prod(edit.factor for edit in edits if edit.kind == ROPE)
    return LayerPath.of_hops(found, root.rope * rope)


def edits_of(root: str, path: LayerPath) -> list[Edit]:
    """Return the edits that make a path of all layers of the model `root`.

    A layer's first run is its own place; an earlier layer that runs again is a repeat, a later one skips those between.
    """
    found: list[Edit] = []
    ahead = 0  # the first layer that has not run
    for hop in path.hops:
        gain, temperature = hop.gains.attention, hop.gains.temperature
        model = "" if hop.model == root else hop.model
        if hop.layer < ahead:
            _join(found, Edit("repeat", hop.layer, hop.layer + 1, model, gain))
            continue
        if hop.layer > ahead:
            found.append(Edit("skip", ahead, hop.layer))
        ahead = hop.layer + 1
        if model:
            _join(found, Edit("swap", hop.layer, ahead, model))
        if gain != 1.0 or hop.gains.mlp != 1.0:
            _join(found, Edit("gain", hop.layer, ahead, factor=gain))
        if temperature != 1.0:
            _join(found, Edit("temperature", hop.layer, ahead, factor=temperature))
    return [*found, *([rope_edit(path.rope)] if path.rope != 1.0 else [])]


def rope_edit(factor: float) -> Edit:
    """Return the edit that multiplies the base of the rotary embedding."""
    return Edit(ROPE, 0, 1, factor=factor)


def _join(found: list[Edit], edit: Edit) -> None:
    """Append an edit of one layer, or let the latest one of its kind go on if it ends there."""
    place = next((i for i in reversed(range(len(found))) if found[i].kind == edit.kind), None)
    last = found[place] if place is not None else None
    if place is not None and last and (last.model, last.factor, last.stop) == (edit.model, edit.factor, edit.start):
        found[place] = Edit(edit.kind, last.start, edit.stop, edit.model, edit.factor)
    else:
        found.append(edit)
