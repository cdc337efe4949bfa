"""The `genome.path` of a config: the paths that a search may try."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["repeat", "skip", "swap", "temperature", "rope"]


class Paths(BaseModel):
    """The bounds of layer paths; see `docs/paths.md`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    deepest: int | None = Field(default=None, ge=2)
    """The most layers of a candidate; default 1.2 times the models', rounded."""
    first: int | None = Field(default=None, ge=1)
    """Layers at the beginning that every path runs once, in order, without gains; default a tenth of the models'."""
    last: int | None = Field(default=None, ge=1)
    """The same at the end."""
    edits: int = Field(default=4, ge=1, le=16)
    """The most edits that set a path apart from the one that the search starts from."""
    kinds: list[Kind] = Field(default=["repeat", "skip", "swap"], min_length=1)
    """Edits to try. `repeat`: run layers again. `skip`: leave them out. `swap`: take them from another model, or from
    the best weight merge. `temperature`: multiply the attention's scores. `rope`: half or double the base of
    the rotary embedding, of all layers; not with vLLM."""
    longest: int = Field(default=8, ge=1)
    """The most layers that one edit repeats at first; later edits may make a repeat longer."""
    gains: tuple[float, float] = (0.25, 1.5)
    """The lowest and highest gain of repeated layers, and of a temperature."""

    scan: Path | None = None
    """The folder of an `llmevo scan` of the same models, or its scan.jsonl: single edits are tried in its order, and
    its effects are a feature of the surrogate."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        low, high = self.gains
        if not 0 < low <= high:
            raise ValueError(
                f"gains: give a lower and a higher number over 0, such as [0.25, 1.5], not [{low}, {high}]"
            )
        if twice := [kind for kind in self.kinds if self.kinds.count(kind) > 1]:
            raise ValueError(f"kinds: {twice[0]} is listed twice; list every kind once")
        return self
