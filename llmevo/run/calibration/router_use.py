"""The measured use of a mixture's experts on some texts: of one that is made dense, kept in the cache folder, and of a
running one.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmevo.engines.hf import HfEngine
from llmevo.errors import SourceError
from llmevo.merging.dense import RouterUse
from llmevo.merging.merger import Merger
from llmevo.merging.mixture.mixture import Mixture
from llmevo.merging.preparation.measured import reading
from llmevo.merging.preparation.texts import Texts
from llmevo.merging.recipe import Recipe
from llmevo.models.architecture import experts_of, routers_of, stack_of, text_config
from llmevo.models.conversion import Places
from llmevo.models.files import cache_folder, write_whole
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.run.calibration.activations import batches, layers_of, watched

RULES = 1
"""Raised by every change of how it is measured."""

TEMPERATURE = 0.1
"""Of the softmax of `RouterUse.median`."""

DEFAULT_TOP = {"mixtral": 2, "qwen3_moe": 8}
"""The experts for a token, by `model_type`, where config.json names no number."""

RENORMALIZED = ("mixtral",)
"""The values of `model_type` whose routers always divide by the sum of the chosen experts' probabilities."""


def router_use(
    mixture: ModelReference,
    root: Path,
    texts: Texts,
    device: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> RouterUse:
    """Return how much a mixture uses its experts on the texts; one forward pass where the cache lacks it.

    `say` is called before. Raises SourceError for a dense model, one that cannot be loaded, and a cache that cannot be
    written; TaskError for texts without tokens.
    """
    sources = Sources(root)
    if not experts_of(sources.config(mixture)):
        raise SourceError(
            f"{mixture}: the model is dense (its config.json names no experts); name a mixture of experts"
        )
    made = [RULES, TEMPERATURE, sources.checksum(mixture), reading(sources, mixture), texts.digest]
    file = cache_folder() / "routing" / f"{hashlib.sha256(json.dumps(made).encode()).hexdigest()[:24]}.json"
    if file.exists():
        return replace(RouterUse(**json.loads(file.read_text())), seconds=0.0)
    say(f"Measuring the use of the experts of {mixture} on {len(texts.all)} texts…")
    found = _measured(mixture, sources, texts, device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(vars(found)).encode())
    except OSError as error:
        raise SourceError(f"{file}: the use of experts cannot be written ({error})") from error
    return found


def _measured(mixture: ModelReference, sources: Sources, texts: Texts, device: str | None) -> RouterUse:
    started = time.monotonic()
    on_gpu = torch.cuda.is_available() and device != "cpu"
    dtype = "bfloat16" if on_gpu else "float32"
    folder = sources.folder(mixture)
    engine = HfEngine(sources.engine_folder(mixture), folder, dtype, device, Merger(sources))
    try:
        engine.swap(Recipe.of_one(mixture, dtype))
        groups = batches(engine, texts.all, "the texts")
        config = sources.config(mixture)
        counted = _Counted(config, sources.depth(mixture))
        routers = _routers(engine.model, sources, mixture)

        def add(layer: int, given: Tensor) -> None:
            rows = given.detach().reshape(-1, given.shape[-1]).float()
            counted.add(layer, rows @ routers[layer].weight.detach().float().T)

        with torch.no_grad(), watched(routers, add):
            for _, tokens in groups:
                counted.shape = (tokens.shape[0], tokens.shape[1])
                engine.lm.read(tokens)
    finally:
        engine.close()
    total = sum(tokens.numel() for _, tokens in groups)
    return counted.use(sum(len(places) for places, _ in groups), total, round(time.monotonic() - started, 2))


class _Counted:
    """Sums over texts and tokens of what the routers say, layer by layer."""

    def __init__(self, config: Mapping[str, Any], layers: int) -> None:
        text = text_config(config)
        kind = str(text.get("model_type"))
        self.experts = experts_of(config)
        self.top = min(int(text.get("num_experts_per_tok") or DEFAULT_TOP.get(kind, 2)), self.experts)
        self.renormalized = kind in RENORMALIZED or bool(text.get("norm_topk_prob"))
        self.shape: tuple[int, int] = (1, 1)
        """The texts of a batch, and the tokens of each."""
        self._medians = torch.zeros(layers, self.experts, dtype=torch.float64)
        self._means = torch.zeros(layers, self.experts, dtype=torch.float64)
        self._seen: set[int] = set()

    def add(self, layer: int, logits: Tensor) -> None:
        """Add the logits (tokens, experts) of a batch of texts of one length."""
        self._seen.add(layer)
        kept = torch.zeros_like(logits).scatter_(1, logits.topk(self.top, dim=1).indices, 1.0)
        sharp = (logits / TEMPERATURE).softmax(dim=1) * kept
        self._medians[layer] += sharp.view(*self.shape, self.experts).quantile(0.5, dim=1).double().sum(0).cpu()
        plain = logits.softmax(dim=1) * kept
        plain = plain / plain.sum(dim=1, keepdim=True) if self.renormalized else plain
        self._means[layer] += plain.double().sum(0).cpu()

    def use(self, texts: int, tokens: int, seconds: float) -> RouterUse:
        """Return the table; the experts of a layer without a router are used alike."""
        alike = [1.0 / self.experts] * self.experts

        def rows(sums: Tensor, count: int) -> list[list[float]]:
            means: list[list[float]] = (sums / count).tolist()
            return [[round(v, 6) for v in row] if n in self._seen else alike for n, row in enumerate(means)]

        return RouterUse(rows(self._medians, texts), rows(self._means, tokens), texts, tokens, seconds)


def _routers(model: Any, sources: Sources, mixture: ModelReference) -> dict[int, Any]:
    """Return the routers of a running mixture by their layers."""
    source, config = sources[mixture], sources.config(mixture)
    filters, stack = routers_of(source.shapes, config), stack_of(config, source.shapes)
    parts = Places(model, source.shapes).parts
    modules = dict(model.named_modules())
    found: dict[int, Any] = {}
    for name, shape in source.shapes.items():
        layer = stack.layer(name)
        if layer is not None and len(shape) == 2 and any(part in name for part in filters):
            found[layer] = modules[parts[name].target.removesuffix(".weight")]
    return found


@torch.no_grad()
def routed_shares(
    engine: HfEngine, mixture: Mixture, tasks: Sequence[str], texts: Sequence[str]
) -> dict[str, list[list[float]]]:
    """Return the share of the routed weight that each expert gets, {task: (layers, experts)}, in a running mixture."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    groups = batches(engine, texts, "mixture: the texts")
    place = [0]
    layers = layers_of(engine.model)
    routers = {number: layer.mlp.gate for number, layer in enumerate(layers) if hasattr(layer.mlp, "gate")}

    def add(layer: int, given: Tensor) -> None:
        own, tokens = groups[place[0]]
        logits = torch.nn.functional.linear(given.reshape(-1, given.shape[-1]), routers[layer].weight).float()
        value, chosen = torch.topk(logits.softmax(-1), mixture.experts_per_token, dim=-1)
        share = torch.zeros_like(logits).scatter_(1, chosen, value / value.sum(-1, keepdim=True))
        for text, each in zip(own, share.reshape(len(own), tokens.shape[1], -1).sum(1).cpu(), strict=True):
            table = totals.setdefault(tasks[text], torch.zeros(len(layers), share.shape[1]))
            table[layer] += each

    with watched(routers, add):
        for place[0], (own, tokens) in enumerate(groups):
            engine.lm.read(tokens)
            for text in own:
                counts[tasks[text]] = counts.get(tasks[text], 0) + tokens.shape[1]
    return {task: (table / counts[task]).tolist() for task, table in totals.items()}
