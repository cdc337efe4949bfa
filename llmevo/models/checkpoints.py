"""The weights of the models that are merged: memory-mapped, one tensor at a time."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmevo.errors import SourceError
from llmevo.models.architecture import check_compatible, check_layers
from llmevo.models.cards import excerpt
from llmevo.models.files import WHOLE, content_checksums, ends_checksum
from llmevo.models.references import ModelReference, folder_of

LICENCE = re.compile(r"^license:\s*(\S+)", re.MULTILINE)
DERIVED = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry though the config determines them; never merged."""

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Types of weights that are merged, as safetensors and PyTorch name them."""

INTEGERS = {
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
"""Types of buffers and of quantized weights."""

BUFFERS = ("I64", "BOOL")
"""Types of buffers that are copied, such as position ids and masks. Quantized weights are I8, U8, I32 or F8_*."""

MASKS = (".attn.bias", ".attention.bias")
"""Causal masks that old checkpoints of GPT-2 and GPT-NeoX carry, also as U8."""

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

SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
"""The end of a shard's name: its number, and the number of shards."""


@dataclass(frozen=True)
class LowRank:
    """A weight that is another one plus the product of two small factors, as a LoRA adapter makes it."""

    origin: Tensor
    """The weight under the adapter, as it is stored."""
    up: Tensor
    """(rows, rank), float32."""
    down: Tensor
    """(rank, columns), float32, with the adapter's scale in it."""

    def dense(self) -> Tensor:
        """Return the weight itself, float32."""
        return torch.addmm(self.origin.float(), self.up, self.down)


Weight = Tensor | LowRank
"""One model's weight: as it is stored, or low-rank over another one."""


def stored(weight: Weight) -> Tensor:
    """Return the weight's tensor, or the one under the adapter."""
    return weight.origin if isinstance(weight, LowRank) else weight


def same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are the same memory, as a base is that two models share."""
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape


class Source:
    """A model's weights, by their names in the checkpoint."""

    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor's shape, in the order of the checkpoint."""
    derived: Sequence[str]
    """Tensors of the checkpoint that are left out: its config determines them."""

    def tensor(self, name: str) -> Tensor:
        """Return one weight: a mapped view in its stored type; float32 where it is computed."""
        raise NotImplementedError

    def weight(self, name: str) -> Weight:
        """Return one weight, low-rank over another where it is."""
        return self.tensor(name)


class Checkpoint(Source):
    """A folder of safetensors files, one or sharded. Opening reads headers only; tensors are mapped views.

    Raises SourceError for files that are missing or incomplete, and for quantized weights.
    """

    def __init__(self, folder: Path, pattern: str = "model*.safetensors") -> None:
        self.folder = folder
        pattern = pattern if any(folder.glob(pattern)) else "*.safetensors"
        files = sorted(folder.glob(pattern))
        self._indices = sorted(folder.glob(f"{pattern}.index.json"))
        if not files:
            raise SourceError(_no_weights(folder, [*self._indices]))
        self._handles: dict[str, Any] = {}
        self._views: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        derived: list[str] = []
        for file in files:
            try:
                handle = safe_open(file, framework="pt")  # pyright: ignore[reportNoOverloadImplementation]
                held = [*handle.keys()]
                derived += [name for name in held if name.endswith(DERIVED)]
                names = [name for name in held if not name.endswith(DERIVED)]
                headers = {name: handle.get_slice(name) for name in names}
                shapes |= {name: tuple(header.get_shape()) for name, header in headers.items()}
            except (SafetensorError, OSError) as error:
                what = _what_else(file) or f"is incomplete or not a safetensors file ({error})"
                raise SourceError(f"{file} {what}; download it again") from error
            for name, header in headers.items():
                _check_type(folder, name, shapes[name], str(header.get_dtype()))
            self._handles |= dict.fromkeys(names, handle)
        self.shapes, self.derived = shapes, derived
        self._check_complete(files)

    def _check_complete(self, files: Sequence[Path]) -> None:
        """Raise SourceError for a missing shard, by the index or without one by the shards' numbers."""
        for index in self._indices:
            for name, shard in _weight_map(index).items():
                if name not in self.shapes and not name.endswith(DERIVED):
                    lacks = "which lacks it" if (self.folder / shard).exists() else "which is missing"
                    raise SourceError(
                        f"{self.folder}: {index.name} lists {name} in {shard}, {lacks}; download it again"
                    )
        numbered = [SHARD.search(file.name) for file in files] if not self._indices else []
        if numbered and all(numbered):
            shards = {int(found[1]): found[2] for found in numbered if found}
            of = max(shards.values(), key=int)
            if lost := {*range(1, int(of) + 1)} - {*shards}:
                raise SourceError(f"{self.folder}: shard {min(lost)} of {int(of)} is missing; download it")

    def tensor(self, name: str) -> Tensor:
        # The view is kept: it holds no memory of its own, and making it costs more than merging a small tensor.
        if name not in self._views:
            self._views[name] = self._handles[name].get_tensor(name)
        return self._views[name]


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


class Sources:
    """The models that a recipe may name, opened once each. Adapters on one model share its checkpoint."""

    def __init__(self, root: Path = Path()) -> None:
        self.root = root
        self._checkpoints: dict[Path, Checkpoint] = {}
        self._sources: dict[ModelReference, Source] = {}
        self._depths: dict[ModelReference, int] = {}

    @classmethod
    def open(cls, references: Iterable[ModelReference], root: Path = Path()) -> Self:
        """Open all of them. Raises SourceError unless they have the same tensors in the same shapes."""
        sources = cls(root)
        known = [*references]
        for place, other in enumerate(known):
            one, shapes = known[0], sources[other].shapes
            if place == 0 or sources._known_config(other):  # only the donor's config is needed for merging
                sources.depth(other)
            configs = sources._known_config(one), sources._known_config(other)
            check_compatible(str(one), sources[one].shapes, str(other), shapes, configs)
        return sources

    def _known_config(self, reference: ModelReference) -> dict[str, Any]:
        """Return the model's config, or an empty one where it cannot be read."""
        try:
            return self.config(reference)
        except SourceError:
            return {}

    def folder(self, reference: ModelReference) -> Path:
        """Return the folder with the model's config and tokenizer."""
        return folder_of(reference.model, self.root)

    def __getitem__(self, reference: ModelReference) -> Source:
        if reference not in self._sources:
            folder = self.folder(reference)
            if (config := folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
                base = read_object(config).get("base_model_name_or_path") or "MODEL"
                raise SourceError(
                    f"{reference} is a LoRA adapter, not a model (it has {config.name} and no config.json); write the"
                    f" model it was trained on before it: {base}+{reference}"
                )
            checkpoint = self._checkpoints.get(folder) or Checkpoint(folder)
            self._checkpoints[folder] = checkpoint
            adapter = folder_of(reference.lora, self.root) if reference.lora else None
            self._sources[reference] = LoraModel(checkpoint, adapter) if adapter else checkpoint
        return self._sources[reference]

    def config(self, reference: ModelReference) -> dict[str, Any]:
        """Return the model's config.json. Raises SourceError when it cannot be read."""
        file = self.folder(reference) / "config.json"
        return read_object(file, f"{reference} must be a folder that transformers has saved")

    def depth(self, reference: ModelReference) -> int:
        """Return the number of layers. Raises SourceError where config.json has none, or the weights differ."""
        if reference not in self._depths:
            config, shapes = self.config(reference), self[reference].shapes
            try:
                self._depths[reference] = check_layers(config, shapes)
            except SourceError as error:
                raise SourceError(f"{reference}: {error}") from error
        return self._depths[reference]

    def licence(self, reference: ModelReference) -> str | None:
        """Return the licence that the adapter's card, or the model's, declares."""
        folders = [folder_of(reference.lora, self.root)] if reference.lora else []
        for folder in [*folders, self.folder(reference)]:
            card = folder / "README.md"
            found = LICENCE.search(card.read_text(errors="replace")) if card.is_file() else None
            if found:
                return found[1]
        return None

    def card(self, reference: ModelReference) -> str:
        """Return an excerpt of the adapter's card, or else of the model's; empty without one."""
        folders = [folder_of(reference.lora, self.root)] if reference.lora else []
        return next(filter(None, map(excerpt, [*folders, self.folder(reference)])), "")

    def checksum(self, reference: ModelReference, recorded: str = WHOLE) -> str:
        """Return a digest of all files that determine the weights, by the rule of a recorded one (of 0.1, or today's).

        Reads the files, unless `content_checksums` remembers their checksums. Raises SourceError.
        """
        try:
            files = self.files(reference)
            if not recorded.startswith(WHOLE):
                weights = [file for file in files if file.suffix == ".safetensors"]
                return hashlib.sha256("".join(map(ends_checksum, weights)).encode()).hexdigest()
            digests = content_checksums(files)
        except OSError as error:
            raise SourceError(f"{reference}: cannot be read ({error})") from error
        parts = [f"{file.name} {digests[file]}" for file in files]
        return WHOLE + hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def files(self, reference: ModelReference) -> list[Path]:
        """Return the files that determine the model's weights."""
        files = sorted(self.folder(reference).glob("*.safetensors"))
        if reference.lora:
            adapter = folder_of(reference.lora, self.root)
            files += [*sorted(adapter.glob("*.safetensors")), *adapter.glob("adapter_config.json")]
        return files


def read_object(file: Path, hint: str = "download it again") -> dict[str, Any]:
    """Return the object in a JSON file. Raises SourceError that says what else the file is, and ends with the hint."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{file} is missing; {hint}") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} {_what_else(file) or f'is not valid JSON ({error})'}; {hint}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file} holds a JSON {type(content).__name__}, not an object ({{…}}); {hint}")
    return cast(dict[str, Any], content)


def _what_else(file: Path) -> str:
    """Return what a file is instead of what its name says, where its first bytes show it."""
    try:
        with file.open("rb") as content:
            head = content.read(256).lstrip().lower()
    except OSError as error:
        return f"cannot be read ({error})"
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself (`git lfs pull` in its repository gets that)"
    if head.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file itself"
    return ""


def _weight_map(index: Path) -> dict[str, str]:
    """Return the shard of every tensor, from the index of a sharded checkpoint."""
    listed: Any = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        kind = type(listed).__name__
        raise SourceError(f"{index} is no index of a checkpoint (weight_map is {kind}); download it again")
    return cast(dict[str, str], listed)


def _no_weights(folder: Path, indices: Sequence[Path]) -> str:
    """Return the message for a folder without safetensors files."""
    if indices:
        shards = sorted({*_weight_map(indices[0]).values()})
        return f"{folder}: {indices[0].name} lists {len(shards)} shards, and all are missing; download {shards[0]} …"
    other = next((file.name for file in sorted(folder.glob("*.bin"))), None)
    if other and "adapter" in other:
        return f"{folder}: there is no .safetensors file, only {other}; save the adapter again with a current PEFT"
    found = f", only {other}" if other else ""
    return (
        f"{folder}: there is no .safetensors file{found}; save the model with transformers'"
        " AutoModelForCausalLM.from_pretrained(…).save_pretrained(…), or check that its download is complete"
    )


def _check_type(folder: Path, name: str, shape: Sequence[int], stored: str) -> None:
    """Raise SourceError for quantized and complex weights. Buffers of integers are copied."""
    if stored in FLOATS or name.endswith(MASKS):
        return
    if stored in INTEGERS and not name.endswith((".weight", ".bias")) and (stored in BUFFERS or len(shape) < 2):
        return
    if stored.startswith("C"):
        raise SourceError(f"{folder}: {name} holds complex numbers ({stored}); llmevo merges real ones")
    raise SourceError(
        f"{folder}: {name} is stored as {INTEGERS.get(stored, stored)}; quantized weights cannot be merged: their"
        " numbers mean nothing without their scales: dequantize the model first, or name the model that it was"
        " quantized from (in bfloat16, float16 or float32)"
    )


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
