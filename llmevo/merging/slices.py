"""What a recipe is made of: whole models, or slices of the result with the layers that each is merged from."""

from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, model_validator

from llmevo.merging.parameters import Setting, Strict
from llmevo.models.references import ModelReference


class InputModel(Strict):
    """One model of a merge over whole models."""

    model: ModelReference
    parameters: dict[str, Setting] | None = None


class InputSlice(InputModel):
    """Some consecutive layers of one model, first included, last not."""

    layer_range: tuple[int, int]


class OutputSlice(Strict):
    """Consecutive layers of the result, merged from as many layers of each source."""

    sources: list[InputSlice]
    base_model: ModelReference | None = None
    merge_method: str | None = None
    """llmevo's extension: the slice's own method, in a recipe whose `merge_method` is `by_slice`."""
    parameters: dict[str, Setting] | None = None

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


PARTS: Mapping[str | int, type[BaseModel]] = {"models": InputModel, "slices": OutputSlice, "sources": InputSlice}
"""What stands under a key of a recipe."""
