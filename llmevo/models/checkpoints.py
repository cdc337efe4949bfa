"""The weights of the models that are merged: memory-mapped, one tensor at a time."""

import hashlib
import json
import math
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmevo.errors import SourceError
from llmevo.models import checksums
from llmevo.models.layers import check_layers, depth_of, layers_in
from llmevo.models.references import ModelReference, folder_of
from llmevo.models.weights import LowRank, Weight

LICENCE = re.compile(r"^license:\s*(\S+)", re.MULTILINE)

DERIVED = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry though the config determines them; never merged."""

FLOATS = ("BF16", "F16", "F32", "F64")
"""Types of weights that are merged, as safetensors names them."""

BUFFERS = ("I64", "BOOL")
"""Types of buffers that are copied, such as position ids and masks. Quantized weights are I8, U8, I32 or F8_*."""

MASKS = (".attn.bias", ".attention.bias")
"""Causal masks that old checkpoints of GPT-2 and GPT-NeoX carry, also as U8."""

INTEGERS = {
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "BOOL": "bool",
}
"""What others call these types."""

PLAIN_LORA: Mapping[str, str | bool | None] = {
    "peft_type": "LORA",
    "use_dora": False,
    "use_qalora": False,
    "bias": "none",
    "modules_to_save": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "kasa_config": None,
    "lora_bias": False,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "arrow_config": None,
}
"""What an adapter's config has to say, if it says anything, for W₀ + scale · B·A to be all that the adapter does."""

OTHER_ORIGINS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of values of `init_lora_weights` whose adapters lie on a changed base, not on the base itself."""

SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
"""The end of a shard's name: its number, and how many there are."""

QUANTIZED_NAMES = (".SCB", ".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".weight_scale", ".weight_scale_inv")
"""Ends of the names of tensors that only quantized checkpoints have."""

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
"""Keys of a config that decide the shapes of tensors."""

PARTS = (
    "attention_bias",
    "mlp_bias",
    "qkv_bias",
    "use_qk_norm",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
"""Keys of a config that decide which tensors there are."""

HEAD = "lm_head.weight"


class Source(Protocol):
    """A model's weights, by their names in the checkpoint."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, in the order of the checkpoint."""
        ...

    @property
    def derived(self) -> Sequence[str]:
        """Tensors of the checkpoint that are left out: its config determines them."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One weight: in its stored dtype and mapped where it is stored as such, float32 where it is computed."""
        ...

    def weight(self, name: str) -> Weight:
        """One weight, low-rank over another where it is."""
        ...


class Checkpoint:
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
                names = [name for name in held if not name.endswith(DERIVED)]
                derived += [name for name in held if name.endswith(DERIVED)]
                headers = {name: handle.get_slice(name) for name in names}
                shapes |= {name: tuple(header.get_shape()) for name, header in headers.items()}
            except (SafetensorError, OSError) as error:
                what = _what_else(file) or f"is incomplete or not a safetensors file ({error})"
                raise SourceError(f"{file} {what}; download it again") from error
            for name, header in headers.items():
                _check_type(folder, name, shapes[name], str(header.get_dtype()))
            self._handles |= dict.fromkeys(names, handle)
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self.derived: Sequence[str] = derived
        self._check_whole(files)

    def _check_whole(self, files: Sequence[Path]) -> None:
        """A missing shard is found by the index, or without one by the shards' numbers, before anything is merged."""
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

    def weight(self, name: str) -> Weight:
        return self.tensor(name)


class LoraModel:
    """A model with a LoRA adapter on it, kept apart: a task vector is computed from the two small factors.

    W = W₀ + (alpha / r) · B·A (https://arxiv.org/abs/2106.09685), in float32 and not rounded. Raises SourceError for
    an adapter that is incomplete, does not fit the model, or is more than a plain LoRA.
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
                " model of its own; after `+` stands an adapter"
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
                f"{file}: init_lora_weights is {start!r}: such an adapter lies on a changed base model. Convert it with"
                " PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…), or merge it with PEFT and name"
                " the merged model"
            )
        for key in ("r", "lora_alpha"):
            if not _is_number(config.get(key)) or (key == "r" and config[key] < 1):
                least = "a whole number of 1 or more" if key == "r" else "a number"
                raise SourceError(f"{file}: {key} is {config.get(key)!r}; it must be {least}, as PEFT has saved it")
        for key in ("rank_pattern", "alpha_pattern"):
            _check_pattern(file, key, config.get(key))
        return config

    def _pairs(self) -> Iterable[tuple[str, tuple[str, str, float]]]:
        """Each adapted weight's name, the names of its two factors, and its scale."""
        adapter, held = self._adapter.folder, self._adapter.shapes
        for name in held:
            if not name.endswith((".lora_A.weight", ".lora_B.weight")):
                raise SourceError(f"{adapter}: {name} is no part of a plain LoRA of linear layers")
            other = name.replace(".lora_A.", ".lora_B.") if "lora_A" in name else name.replace(".lora_B.", ".lora_A.")
            if other not in held:
                raise SourceError(f"{adapter}: it has {name}, but {other} is missing; download the adapter again")
        for name in held:
            if not name.endswith(".lora_A.weight"):
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if f"{module}.weight" not in self.model.shapes:
                raise SourceError(
                    f"{adapter}: adapts {module}, which the model {self.model.folder} lacks; put the adapter on the"
                    f" model it was trained on{self._trained_on()}"
                )
            second = name.replace(".lora_A.", ".lora_B.")
            self._check_shapes(module, held[name], held[second])
            yield f"{module}.weight", (name, second, self._scale(module))

    def _check_shapes(self, module: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
        """Whether the product of two factors, A (rank, in) and B (out, rank), has the shape of the weight."""
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
        """What the adapter says its model is, in brackets; empty where it says nothing."""
        base = self.config.get("base_model_name_or_path")
        return f" (base_model_name_or_path: {base})" if base else ""

    def _by_module(self, key: str, module: str) -> float:
        """The module's own `rank` or `alpha` where the adapter's config has one, or that of all modules."""
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
    """The models a recipe may name, opened once each. A LoRA's model is the same object as that model itself."""

    def __init__(self, root: Path = Path()) -> None:
        self.root = root
        self._checkpoints: dict[Path, Checkpoint] = {}
        self._sources: dict[ModelReference, Source] = {}
        self._depths: dict[ModelReference, int] = {}

    @classmethod
    def open(cls, references: Iterable[ModelReference], root: Path = Path()) -> Self:
        """Open all of them and check that they fit: same names, same shapes. Raises SourceError."""
        sources = cls(root)
        known = [*references]
        for place, other in enumerate(known):
            one, shapes = known[0], sources[other].shapes
            if place == 0 or sources._known_config(other):  # only the donor's config is needed for merging
                sources.depth(other)
            configs = sources._known_config(one), sources._known_config(other)
            fit(str(one), sources[one].shapes, str(other), shapes, configs)
        return sources

    def _known_config(self, reference: ModelReference) -> dict[str, Any]:
        """The model's config, or nothing where it cannot be read."""
        try:
            return self.config(reference)
        except SourceError:
            return {}

    def folder(self, reference: ModelReference) -> Path:
        """The folder with the model's config and tokenizer."""
        return folder_of(reference.model, self.root)

    def __getitem__(self, reference: ModelReference) -> Source:
        if reference not in self._sources:
            folder = self.folder(reference)
            _check_no_adapter(reference, folder)
            checkpoint = self._checkpoints.get(folder) or Checkpoint(folder)
            self._checkpoints[folder] = checkpoint
            adapter = folder_of(reference.lora, self.root) if reference.lora else None
            self._sources[reference] = LoraModel(checkpoint, adapter) if adapter else checkpoint
        return self._sources[reference]

    def config(self, reference: ModelReference) -> dict[str, Any]:
        """The model's config.json. Raises SourceError when it cannot be read."""
        file = self.folder(reference) / "config.json"
        return read_object(file, f"{reference} must be a folder that transformers has saved")

    def depth(self, reference: ModelReference) -> int:
        """The number of layers. Raises SourceError where config.json names none, or the weights hold others."""
        if reference not in self._depths:
            config, shapes = self.config(reference), self[reference].shapes
            try:
                depth = depth_of(config)
                check_layers(config, shapes)
            except SourceError as error:
                raise SourceError(f"{reference}: {error}") from error
            self._depths[reference] = depth
        return self._depths[reference]

    def licence(self, reference: ModelReference) -> str | None:
        """The licence that the model's card, or the adapter's, declares."""
        folders = [folder_of(reference.lora, self.root)] if reference.lora else []
        for folder in [*folders, self.folder(reference)]:
            card = folder / "README.md"
            found = LICENCE.search(card.read_text(errors="replace")) if card.is_file() else None
            if found:
                return found[1]
        return None

    def checksum(self, reference: ModelReference) -> str:
        """A digest of everything in the files that decides the weights: the safetensors files and the adapter's config.

        Reads them, unless that was done before: see `llmevo.models.checksums`. Raises SourceError.
        """
        with _readable(reference):
            digests = checksums.of_contents(self.files(reference))
            parts = [f"{file.name} {digests[file]}" for file in self.files(reference)]
        return checksums.WHOLE + hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def checksum_as(self, reference: ModelReference, recorded: str) -> str:
        """The checksum by the rule that a recorded one was made by. Raises SourceError."""
        if recorded.startswith(checksums.WHOLE):
            return self.checksum(reference)
        with _readable(reference):
            weights = [file for file in self.files(reference) if file.suffix == ".safetensors"]
            return hashlib.sha256("".join(map(checksums.of_ends, weights)).encode()).hexdigest()

    def files(self, reference: ModelReference) -> list[Path]:
        """The files that the model's weights follow from."""
        files = sorted(self.folder(reference).glob("*.safetensors"))
        if reference.lora:
            adapter = folder_of(reference.lora, self.root)
            files += [*sorted(adapter.glob("*.safetensors")), *adapter.glob("adapter_config.json")]
        return files


@contextmanager
def _readable(reference: ModelReference) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(f"{reference}: cannot be read ({error})") from error


def read_object(file: Path, hint: str = "download it again") -> dict[str, Any]:
    """A JSON file that holds an object. Raises SourceError that says what else the file is, and ends with the hint."""
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
    """What a file is that is not what its name says, where its beginning tells."""
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
    """The shard of every tensor, as the index of a sharded checkpoint has it."""
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not all(
        isinstance(shard, str) for shard in cast(dict[str, Any], listed).values()
    ):
        raise SourceError(
            f"{index} is no index of a checkpoint (weight_map is {type(listed).__name__}); download it again"
        )
    return cast(dict[str, str], listed)


def _no_weights(folder: Path, indices: Sequence[Path]) -> str:
    """What is said of a folder without safetensors."""
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
    """Raise SourceError for weights that are no real numbers by themselves. Buffers of integers are copied."""
    if stored in FLOATS or name.endswith(MASKS):
        return
    if stored in INTEGERS and not name.endswith((".weight", ".bias")) and (stored in BUFFERS or len(shape) < 2):
        return
    if stored.startswith("C"):
        raise SourceError(f"{folder}: {name} holds complex numbers ({stored}); llmevo merges real ones")
    raise SourceError(
        f"{folder}: {name} is stored as {INTEGERS.get(stored, stored)}; quantized weights cannot be merged, for their"
        " numbers mean nothing without their scales: dequantize the model first, or name the model that it was"
        " quantized from (in bfloat16, float16 or float32)"
    )


def _check_no_adapter(reference: ModelReference, folder: Path) -> None:
    """Raise SourceError for an adapter where a model should be."""
    config = folder / "adapter_config.json"
    if config.exists() and not (folder / "config.json").exists():
        base = read_object(config).get("base_model_name_or_path") or "MODEL"
        raise SourceError(
            f"{reference} is a LoRA adapter, not a model (it has {config.name} and no config.json); write the model it"
            f" was trained on before it: {base}+{reference}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_pattern(file: Path, key: str, pattern: object) -> None:
    """Whether a `rank_pattern` or `alpha_pattern` gives regular expressions numbers."""
    if pattern is not None and not isinstance(pattern, dict):
        raise SourceError(f"{file}: {key} is {pattern!r}; it must map names of modules to numbers")
    for module, value in cast(dict[str, Any], pattern or {}).items():
        try:
            re.compile(module)
        except re.error as error:
            raise SourceError(f"{file}: {key}: {module!r} is no regular expression ({error})") from error
        if not _is_number(value) or (key == "rank_pattern" and value < 1):
            raise SourceError(f"{file}: {key}: {module} is {value!r}; it must be a number, as PEFT has saved it")


Shapes = Mapping[str, tuple[int, ...]]

Configs = tuple[Mapping[str, Any], Mapping[str, Any]]


def fit(one: str, first: Shapes, other: str, second: Shapes, configs: Configs = ({}, {})) -> None:
    """Raise SourceError unless two models have the same tensors in the same shapes, and say how they differ.

    `configs` are the two models' config.json, which explain the difference in the user's terms.
    """
    if first != second:
        raise SourceError(
            _unlike_architectures(one, first, other, second, configs)
            or _unlike_depths(one, first, other, second)
            or _unlike_shapes(one, first, other, second, configs)
            or _unlike_heads(one, first, other, second)
            or _unlike_names(one, first, other, second, configs)
        )


def _unlike_architectures(one: str, first: Shapes, other: str, second: Shapes, configs: Configs) -> str:
    kinds = [config.get("model_type") for config in configs]
    shared = first.keys() & second.keys()
    if None not in kinds and kinds[0] != kinds[1]:
        said = f"model_type is {kinds[0]!r} in {one}, {kinds[1]!r} in {other}"
    elif not shared and first and second:
        said = f"no tensor of the one is in the other ({next(iter(first))} in {one}, {next(iter(second))} in {other})"
        for name, shapes, longer in ((one, second, first), (other, first, second)):
            start = next((n.removesuffix(s) for n in longer for s in shapes if n.endswith(f".{s}")), "")
            if start and {n.removeprefix(start) for n in longer} == {*shapes}:
                return (
                    f"{name}: the name of every tensor begins with {start!r}, as a wrapper has saved it; save the"
                    " model itself (after PEFT's merge_and_unload, if it was trained with PEFT)"
                )
    else:
        return ""
    return f"{one} and {other} are of different architectures: {said}; only models of one architecture can be merged"


def _unlike_depths(one: str, first: Shapes, other: str, second: Shapes) -> str:
    here, there = layers_in(first), layers_in(second)
    if here == there:
        return ""
    return (
        f"{one} has {here} layers, {other} {there} (num_hidden_layers): only models of one depth can be merged; leave"
        " out the model that was not tuned from the same base"
    )


def _unlike_shapes(one: str, first: Shapes, other: str, second: Shapes, configs: Configs) -> str:
    name = next((name for name in first if name in second and first[name] != second[name]), None)
    if name is None:
        return ""
    shapes = f"{name} is {first[name]} in {one}, {second[name]} in {other}"
    values = _unlike_values(SIZES, one, other, configs)
    if ("embed" in name or "lm_head" in name) and first[name][1:] == second[name][1:]:
        return (
            f"{one} and {other} have different vocabularies: {shapes}{values}; resize the embeddings of the one to the"
            " other's (transformers' resize_token_embeddings) where the tokens are the same, or align the models with"
            " mergekit's tokenizer_source: union first"
        )
    return f"{one} and {other} have different shapes: {shapes}{values}; only models of one size can be merged"


def _unlike_heads(one: str, first: Shapes, other: str, second: Shapes) -> str:
    if {*first} ^ {*second} != {HEAD}:
        return ""
    have, lack = (one, other) if HEAD in first else (other, one)
    return (
        f"{have} has an output head of its own ({HEAD}), {lack} uses its embeddings as the head (tie_word_embeddings):"
        f" {lack} has no {HEAD} to merge. Give {lack} a head: load it with transformers, copy its embeddings to its"
        f" lm_head, set tie_word_embeddings: false and save it; or, if {HEAD} of {have} is a copy of its embeddings,"
        f" set tie_word_embeddings: true for {have} and save it again"
    )


def _unlike_names(one: str, first: Shapes, other: str, second: Shapes, configs: Configs) -> str:
    """The tensors that only one of the models has, and which of the two is probably at fault."""
    extra, missing = [n for n in first if n not in second], [n for n in second if n not in first]
    for model, names in ((one, extra), (other, missing)):
        if odd := next((name for name in names if name.endswith(QUANTIZED_NAMES)), None):
            return f"{model} is quantized (it has the tensor {odd}); name the model in bfloat16, float16 or float32"
        if odd := next((name for name in names if ".lora_" in name), None):
            return f"{model} has a LoRA adapter in its weights ({odd}); save it after PEFT's merge_and_unload"
    said: list[str] = []
    incomplete = False
    for have, lack, names, rest in ((one, other, extra, second), (other, one, missing, first)):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            said.append(f"{have} has the tensor {names[0]}{others}, {lack} does not")
            if _has_in_other_layers(names[0], rest):
                incomplete = True
                said.append(
                    f"{lack} has it in other layers, so its checkpoint is probably incomplete: download it again"
                )
    values = _unlike_values(PARTS, one, other, configs)
    rule = "" if incomplete else ". A tensor is merged only if all models have it: leave out the model that differs"
    return f"{'; '.join(said)}{values}{rule}"


def _has_in_other_layers(name: str, shapes: Shapes) -> bool:
    end = re.sub(r"^.*?\.\d+\.", "", name)
    return end != name and any(re.search(rf"\.\d+\.{re.escape(end)}$", other) for other in shapes)


def _unlike_values(keys: Sequence[str], one: str, other: str, configs: Configs) -> str:
    """The keys of the configs that differ, with both values, in brackets."""
    here, there = configs
    unlike = [key for key in keys if here and there and here.get(key) != there.get(key)]
    return f" ({', '.join(f'{key}: {here.get(key)} in {one}, {there.get(key)} in {other}' for key in unlike)})" * bool(
        unlike
    )
