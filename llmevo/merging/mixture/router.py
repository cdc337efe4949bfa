"""The routers of a mixture: a direction for each expert and layer, fitted in closed form, and the rows made of them.

A router's logits are the products of its rows with its input x, the hidden state after the layer's second norm. With
the direction v of an expert, the mean input μ, the temperature T and the bias b of a slice the row is

    r = (v + b · μ / ‖μ‖²) / T,     so that   r · x = (v · x + b · (μ · x) / ‖μ‖²) / T.

The classes of mixtures have no bias of a router; the second term is b on the mean over tokens. The directions are those
of a ridge regression of the experts' scores on x (`fit`).
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from llmevo.errors import UserError
from llmevo.merging.mixture.mixture import Mixture
from llmevo.models.files import kept_file

RIDGE = 0.01
"""The ridge, as a share of the mean square of an input's entries."""


@dataclass(frozen=True)
class Router:
    """The directions of a mixture's routers before temperature and bias.

    Use `rows` for the weight of a layer's router, `to_json` and `read` for the file.
    """

    directions: Tensor
    """(layers, experts, hidden), float32."""
    means: Tensor | None = None
    """(layers, hidden), float32: the mean input of each layer's router; None where no slice may have a bias."""
    shared: Tensor | None = None
    """(layers, hidden), float32: the gate of a shared expert."""

    @classmethod
    def of_copies(cls, layers: int, experts: int, hidden: int) -> Self:
        """Return the routers of a mixture of copies of one model, which give all the same weight."""
        return cls(torch.zeros(layers, experts, hidden))

    @cached_property
    def digest(self) -> str:
        """Equal for routers with equal rows."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:24]

    def rows(self, mixture: Mixture, layer: int) -> Tensor:
        """Return the weight of a layer's router, (experts, hidden), float32."""
        own, rows = mixture.router_slice(layer), self.directions[layer]
        if own is None:
            return rows
        if own.bias is not None and any(own.bias):
            if self.means is None:
                raise UserError("mixture: a slice has a bias, and the router's file has no mean inputs; leave it out")
            mean = self.means[layer].double()
            rows = rows + (torch.tensor(own.bias).double()[:, None] * mean / mean.square().sum()).float()
        return rows / own.temperature

    def shared_row(self, mixture: Mixture, layer: int) -> Tensor:
        """Return the weight of the gate of a layer's shared expert, (1, hidden), float32; zeros without one."""
        if mixture.shared_expert is None or self.shared is None:
            return torch.zeros(1, self.directions.shape[2])
        return self.shared[layer][None]

    def to_json(self) -> str:
        """Return the text of the file: shapes, and float32 numbers in base64."""
        parts = {"directions": self.directions, "means": self.means, "shared": self.shared}
        return json.dumps({name: _packed(part) for name, part in parts.items() if part is not None}) + "\n"

    def keep(self) -> Path:
        """Write it to the cache folder, and return the file. Raises SourceError."""
        return kept_file("routers", f"{self.digest}.json", self.to_json().encode()).absolute()


def _packed(tensor: Tensor) -> dict[str, Any]:
    data = tensor.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()
    return {"shape": [*tensor.shape], "float32": base64.b64encode(data).decode()}


def read(file: Path) -> Router:
    """Read a router's file. Raises UserError where it cannot be read."""
    try:
        return _read(file, file.stat().st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: the router of a mixture cannot be read ({error}); it belongs to the recipe, copy both"
        ) from error


@lru_cache(4)
def _read(file: Path, _: int) -> Router:
    given = json.loads(file.read_text())
    parts: dict[str, Tensor] = {}
    for name in ("directions", "means", "shared"):
        if name in given:
            numbers = torch.frombuffer(bytearray(base64.b64decode(given[name]["float32"])), dtype=torch.float32)
            parts[name] = numbers.reshape(given[name]["shape"])
    return Router(**parts)


@dataclass
class Inputs:
    """Sums over the inputs of one layer's router, for `fit`: they grow with the questions, not with the tokens."""

    gram: Tensor
    """(hidden, hidden): Σ x xᵀ over tokens; float64."""
    sums: Tensor
    """(questions, hidden): Σ x over the tokens of each question; float64."""
    tokens: Tensor
    """(questions,): their numbers of tokens; float64."""


def fit(inputs: list[Inputs], scores: Tensor, ridge: float = RIDGE) -> Router:
    """Return routers that predict which expert answers a question best, from what they see of it.

    `scores` are those of each expert on each question, (questions, experts). Ridge regression (Hoerl & Kennard 1970,
    https://doi.org/10.2307/1267351) of the centred scores Y, the same for all tokens of a question, on the inputs X of
    a layer's router, in closed form: V = (XᵀX/n + λI)⁻¹ XᵀY/n with λ = `ridge` · tr(XᵀX/n)/d. A question's scores are
    centred, so that questions that all experts answer, or none, take no side. V is scaled to logits with a standard
    deviation of 1 over tokens and experts. There is no intercept: inputs after a norm have a mean that serves as one.
    """
    centred = scores.double() - scores.double().mean(1, keepdim=True)
    directions: list[Tensor] = []
    means: list[Tensor] = []
    for of in inputs:
        count = float(of.tokens.sum())
        gram, hidden = of.gram / count, len(of.gram)
        solved = torch.linalg.solve(
            gram + ridge * gram.trace() / hidden * torch.eye(hidden, dtype=gram.dtype), of.sums.T @ centred / count
        )
        spread = (solved.T @ gram @ solved).trace() / scores.shape[1]  # the mean square of a logit
        directions.append((solved / spread.sqrt().clamp(min=1e-12)).T.float())
        means.append((of.sums.sum(0) / count).float())
    return Router(torch.stack(directions), torch.stack(means))
