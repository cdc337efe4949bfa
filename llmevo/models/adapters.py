"""LoRA adapters, kept apart from their models: a task vector is computed from the two small factors."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from llmevo.errors import SourceError
from llmevo.models.checkpoints import Checkpoint, LowRank, Source, Weight, read_object

OTHER_LORA = (
    *("modules_to_save", "layer_replication", "alora_invocation_tokens", "kasa_config", "target_parameters"),
    *("trainable_token_indices", "use_bdlora", "arrow_config"),
)
"""Keys of an adapter's config for more than a plain LoRA."""

PLAIN_LORA: Mapping[str, str | bool | None] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    **dict.fromkeys(OTHER_LORA),
}
"""The values in an adapter's config, where it has the keys, with which the adapter is W₀ + scale · B·A and no more."""

OTHER_ORIGINS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of values of `init_lora_weights` whose adapters are relative to a changed base model."""


class LoraModel(Source):
    """A model with a LoRA adapter, kept apart: a task vector is computed from the two small factors.

    W = W₀ + (alpha / r) · B·A (LoRA, arXiv 2106.09685, eq. 3), in float32 and not rounded. Raises SourceError for an
    adapter that is incomplete, does not fit the model, or is more than a plain LoRA.
    """

    def __init__(self, model: Checkpoint, adapter: Path) -> None:
        self.model = model
        self.shapes, self.derived = model.shapes, model.derived
        self.config = self._read_config(adapter / "adapter_config.json")
        """The adapter's adapter_config.json."""
        self._adapter = Checkpoint(adapter, "adapter_model*.safetensors")
        self._factors = dict(self._pairs())
        if not self._factors:
            raise SourceError(f"{adapter}: its weights hold no LoRA factors (lora_A, lora_B); save the adapter again")

    @staticmethod
    def _read_config(file: Path) -> dict[str, Any]:
        if not file.exists() and (file.parent / "config.json").exists():
            raise SourceError(
                f"{file.parent} is a model and no LoRA adapter (it has a config.json and no {file.name}): name it as a"
                " model of its own; an adapter follows `+`"
            )
        config = read_object(file, "an adapter is a folder that PEFT has saved")
        for key, plain in PLAIN_LORA.items():
            value = config.get(key, plain)
            if value not in (plain, None) and (value or plain):
                raise SourceError(
                    f"{file}: {key} is {value!r}; llmevo merges plain LoRA ({key}: {plain!r}). Merge the adapter into"
                    " its model with PEFT's merge_and_unload, save that, and name the saved model"
                )
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(OTHER_ORIGINS):
            raise SourceError(
                f"{file}: init_lora_weights is {start!r}: such an adapter is relative to a changed base model. Convert"
                " it with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…), or merge it with PEFT"
                " and name the merged model"
            )
        for key in ("r", "lora_alpha"):
            if not _is_number(config.get(key)) or (key == "r" and config[key] < 1):
                least = "a whole number of 1 or more" if key == "r" else "a number"
                raise SourceError(f"{file}: {key} is {config.get(key)!r}; it must be {least}, as PEFT has saved it")
        for key in ("rank_pattern", "alpha_pattern"):
            _check_pattern(file, key, config.get(key))
        return config

    def _pairs(self) -> Iterable[tuple[str, tuple[str, str, float]]]:
        """Yield each adapted weight's name, the names of its two factors, and its scale."""
        adapter, held = self._adapter.folder, self._adapter.shapes
        for name in held:
            if not name.endswith((".lora_A.weight", ".lora_B.weight")):
                raise SourceError(f"{adapter}: {name} is no part of a plain LoRA of linear layers")
            first, second = name.replace(".lora_B.", ".lora_A."), name.replace(".lora_A.", ".lora_B.")
            if other := next((each for each in (first, second) if each not in held), None):
                raise SourceError(f"{adapter}: it has {name}, but {other} is missing; download the adapter again")
            if name == second:
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if f"{module}.weight" not in self.model.shapes:
                raise SourceError(
                    f"{adapter}: adapts {module}, which the model {self.model.folder} lacks; put the adapter on the"
                    f" model it was trained on{self._trained_on()}"
                )
            self._check_shapes(module, held[name], held[second])
            yield f"{module}.weight", (name, second, self._scale(module))

    def _check_shapes(self, module: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
        """Raise SourceError unless the product of A (rank, in) and B (out, rank) has the shape of the weight."""
        adapter, weight = self._adapter.folder, self.model.shapes[f"{module}.weight"]
        if len(first) != 2 or len(second) != 2 or len(weight) != 2:
            raise SourceError(
                f"{adapter}: {module} is no linear layer (lora_A {first}, weight {weight}); llmevo merges LoRA of"
                " linear layers"
            )
        rank = self._by_module("rank", module)
        if first[0] != second[1] or first[0] != rank:
            raise SourceError(
                f"{adapter}: {module} has rank {first[0]} in lora_A, {second[1]} in lora_B and {rank:g} in"
                " adapter_config.json (r, rank_pattern); download the adapter again"
            )
        product = (second[0], first[1])
        if (product[::-1] if self.config.get("fan_in_fan_out") else product) != weight:
            raise SourceError(
                f"{adapter}: {module}: lora_B {second} times lora_A {first} does not fit the weight {weight} of"
                f" {self.model.folder}; put the adapter on the model it was trained on{self._trained_on()}"
            )

    def _trained_on(self) -> str:
        """Return the model that the adapter names as its base, in brackets; empty where it names none."""
        base = self.config.get("base_model_name_or_path")
        return f" (base_model_name_or_path: {base})" if base else ""

    def _by_module(self, key: str, module: str) -> float:
        """Return the module's own `rank` or `alpha` where the adapter's config has one, or that of all modules."""
        pattern: dict[str, float] = self.config.get(f"{key}_pattern") or {}
        default = self.config["r" if key == "rank" else "lora_alpha"]
        # Keys are regular expressions on the end of a module's name, as PEFT reads them.
        return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    def _scale(self, module: str) -> float:
        rank = self._by_module("rank", module)
        return self._by_module("alpha", module) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def tensor(self, name: str) -> Tensor:
        weight = self.weight(name)
        return weight.dense() if isinstance(weight, LowRank) else weight

    def weight(self, name: str) -> Weight:
        origin = self.model.tensor(name)
        if name not in self._factors:
            return origin
        first, second, scale = self._factors[name]
        down, up = self._adapter.tensor(first).float() * scale, self._adapter.tensor(second).float()
        return LowRank(origin, down.T, up.T) if self.config.get("fan_in_fan_out") else LowRank(origin, up, down)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_pattern(file: Path, key: str, pattern: object) -> None:
    """Raise SourceError unless a `rank_pattern` or `alpha_pattern` maps regular expressions to numbers."""
    if pattern is not None and not isinstance(pattern, dict):
        raise SourceError(f"{file}: {key} is {pattern!r}; it must map names of modules to numbers")
    for module, value in cast(dict[str, Any], pattern or {}).items():
        try:
            re.compile(module)
        except re.error as error:
            raise SourceError(f"{file}: {key}: {module!r} is no regular expression ({error})") from error
        if not _is_number(value) or (key == "rank_pattern" and value < 1):
            raise SourceError(f"{file}: {key}: {module} is {value!r}; it must be a number, as PEFT has saved it")
