"""Candidates of LoRA adapters beside one copy of their base: each row of a batch with the weights of its own candidate.

Such candidates differ in small factors only: W + Σ cᵢ·Bᵢ·Aᵢ. A layer computes W·x for all rows at once and adds
B·(c ∘ (A·x)) with each row's own c (as Punica and S-LoRA serve many adapters at once: https://arxiv.org/abs/2310.18547,
https://arxiv.org/abs/2311.03285; here all candidates share the factors and differ in c alone).
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmevo.engines.scoring.backbone import Backbone, Stem
from llmevo.errors import ConfigError, SourceError
from llmevo.models.checkpoints import Source
from llmevo.models.weights import LowRank

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of a block that read one and the same tensor in most architectures. Where they do not, it costs time only."""


REFUSED = "engine.adapters: 'together' cannot be: "


INSTEAD = "; set `engine: {adapters: merged}`"


Shares = Mapping[str, Tensor]
"""{weight: what each adapter counts in it}."""


class Group:
    """Linear layers that read one tensor, each W·x + B·(c ∘ (A·x)).

    A are all adapters' A's of all these layers, one under the other, so that they are one product. B are all adapters'
    B's of one layer, side by side. Both are shared by all candidates: a candidate is but its c.
    """

    def __init__(self, layers: Mapping[str, Any], factors: Mapping[str, Mapping[int, LowRank]]) -> None:
        """Layers and {adapter: factors} by the weight's name."""
        own = next(iter(layers.values())).weight
        self.layers = layers
        self._columns = {
            name: torch.tensor([adapter for adapter, low in factors[name].items() for _ in low.down]) for name in layers
        }
        """The adapter that each column of a layer belongs to."""
        ends = [0, *accumulate(map(len, self._columns.values()))]
        self._places = {name: slice(*ends[i : i + 2]) for i, name in enumerate(layers)}
        downs = [low.down for name in layers for low in factors[name].values()]
        self._down = torch.cat(downs).to(own.device, own.dtype)
        self._ups = {
            name: torch.cat([low.up for low in factors[name].values()], 1).T.to(own.device, own.dtype).contiguous()
            for name in layers
        }
        self._table = self._of_rows = torch.empty(0)
        self._last: tuple[Tensor, Tensor] | None = None

    def load(self, candidates: Sequence[Shares]) -> None:
        """What each adapter counts, for each candidate and layer; float32."""
        rows = [torch.cat([of[name][columns] for name, columns in self._columns.items()]) for of in candidates]
        self._table = torch.stack(rows).to(self._down.device)

    def give(self, owners: Tensor) -> None:
        """The candidate of each row of the batches that come next; one alone for all rows."""
        self._of_rows, self._last = self._table[owners].unsqueeze(1), None

    def hooks(self) -> Iterator[Any]:
        """Add the adapters to the layers' outputs until what is returned is removed."""
        for name, layer in self.layers.items():
            yield layer.register_forward_hook(partial(self._add, name))

    def forget(self) -> None:
        self._last = None

    def _add(self, name: str, layer: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        x = given[0]
        if self._last is None or self._last[0] is not x:
            count = len(self._of_rows)
            if count > 1 and (x.dim() != 3 or len(x) != count):
                raise ConfigError(
                    f"{REFUSED}{name} of this architecture reads the tokens of a batch without their rows, so that"
                    f" candidates cannot share one{INSTEAD}"
                )
            low = linear(x, self._down)
            self._last = x, (low * self._of_rows).to(low.dtype).view(-1, low.shape[-1])
        out.view(-1, out.shape[-1]).addmm_(self._last[1][:, self._places[name]], self._ups[name])


class Adapters:
    """The adapters' factors beside the weights of their base, which is one for all candidates."""

    def __init__(self, model: Any, adapters: Mapping[str, Source]) -> None:
        """`model` is the live base, `adapters` what adapts it, by what the user calls them. Raises ConfigError for an
        adapter of a weight that candidates cannot have each their own of, SourceError for one that is not finite.
        """
        modules: dict[str, Any] = dict(model.named_modules())
        head = model.get_output_embeddings()
        factors: dict[str, dict[int, LowRank]] = {}
        for place, (reference, source) in enumerate(adapters.items()):
            for name in source.shapes:
                if not isinstance(low := source.weight(name), LowRank):
                    continue
                layer = modules.get(name.removesuffix(".weight"))
                if not isinstance(layer, torch.nn.Linear) or layer is head:
                    raise ConfigError(
                        f"{REFUSED}{reference} adapts {name}, which is no linear layer of a block{INSTEAD}"
                    )
                if not (low.up.isfinite().all() and low.down.isfinite().all()):
                    raise SourceError(f"{reference}: its {name} is not finite (NaN or infinite); get the adapter anew")
                factors.setdefault(name, {})[place] = low
        found: dict[str, dict[str, Any]] = {}
        for name in factors:
            block, _, leaf = name.removesuffix(".weight").rpartition(".")
            alike = next((leaves[0] for leaves in SAME_INPUT if leaf in leaves), leaf)
            found.setdefault(f"{block}.{alike}", {})[name] = modules[name.removesuffix(".weight")]
        self.groups = [Group(layers, factors) for layers in found.values()]
        self._owners: Tensor | None = None

    def load(self, candidates: Sequence[Shares]) -> None:
        """Take the candidates."""
        self._owners = None
        for group in self.groups:
            group.load(candidates)

    def give(self, owners: Tensor) -> None:
        """See `Group.give`."""
        if owners is not self._owners:
            self._owners = owners
            for group in self.groups:
                group.give(owners)

    @contextmanager
    def attached(self) -> Generator[None]:
        """The model is that of the candidates inside, and its base again afterwards."""
        hooks = [hook for group in self.groups for hook in group.hooks()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for group in self.groups:
                group.forget()


class Shared(Backbone):
    """A backbone whose rows belong to several candidates."""

    def __init__(self, model: Any, adapters: Adapters) -> None:
        super().__init__(model)
        self.adapters = adapters
        self._owners = torch.tensor([0], device=model.device)

    def take(self, owners: Sequence[int]) -> None:
        """The candidate of each row that comes next; one alone for all rows, however many."""
        self._owners = torch.tensor(owners, device=self.model.device)
        self.adapters.give(self._owners)

    def stem(self, stems: Sequence[list[int]], padding: int) -> Stem:
        """Those of each candidate that has a row, in the order of the candidates."""
        rows, self._owners = self._owners, self._owners.unique()
        try:
            return super().stem([*stems] * len(self._owners), padding)
        finally:
            self._owners = rows

    def spread(self, stem: Any, rows: int) -> None:
        stem.batch_select_indices(torch.searchsorted(self._owners.unique(), self._owners).expand(rows))

    def keep(self, rows: Tensor) -> None:
        self._owners = self._owners[rows]

    def hidden(self, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: Any = None) -> Tensor:
        self.adapters.give(self._owners)
        return super().hidden(tokens, mask, positions, cache)
