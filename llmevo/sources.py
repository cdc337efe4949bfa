"""The weights of the models that are merged: memory-mapped, one tensor at a time."""

import hashlib
import json
import math
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmevo import checksums
from llmevo.errors import SourceError
from llmevo.methods.base import LowRank, Weight
from llmevo.references import ModelReference, folder_of

LICENCE = re.compile(r"^license:\s*(\S+)", re.MULTILINE)

DERIVED = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry though the config determines them; never merged."""

FLOATS = ("BF16", "F16", "F32", "F64")
"""Types of weights that are merged, as safetensors names them."""

BUFFERS = ("I64", "BOOL")
"""Types of buffers that are copied, such as position ids and masks. Quantised weights are I8, U8, I32 or F8_*."""

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
}
"""What an adapter's config has to say, if it says anything, for W₀ + scale · B·A to be all that the adapter does."""


class Source(Protocol):
    """A model's weights, by their names in the checkpoint."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, in the order of the checkpoint."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One weight: in its stored dtype and mapped where it is stored as such, float32 where it is computed."""
        ...

    def weight(self, name: str) -> Weight:
        """One weight, low-rank over another where it is."""
        ...


class Checkpoint:
    """A folder of safetensors files, one or sharded. Opening reads headers only; tensors are mapped views.

    Raises SourceError when a file is missing or torn, or holds quantised weights.
    """

    def __init__(self, folder: Path, pattern: str = "model*.safetensors") -> None:
        self.folder = folder
        files = sorted(folder.glob(pattern)) or sorted(folder.glob("*.safetensors"))
        if not files:
            raise SourceError(f"{folder}: there is no .safetensors file; save the model with safe_serialization=True")
        self._handles: dict[str, Any] = {}
        self._views: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")  # pyright: ignore[reportNoOverloadImplementation]
                names = [name for name in handle.keys() if not name.endswith(DERIVED)]  # noqa: SIM118
                slices = {name: handle.get_slice(name) for name in names}
                shapes |= {name: tuple(part.get_shape()) for name, part in slices.items()}
                dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
            except (SafetensorError, OSError) as error:
                raise SourceError(f"{file} is torn or no safetensors file ({error}); fetch it again") from error
            for name, dtype in dtypes.items():
                buffer = (dtype in BUFFERS and not name.endswith(".weight")) or name.endswith(MASKS)
                if dtype not in FLOATS and not buffer:
                    raise SourceError(
                        f"{folder}: {name} is stored as {INTEGERS.get(dtype, dtype)}; quantised weights cannot be"
                        " merged, for their numbers mean nothing without their scales: dequantise the model first, or"
                        " take the one that it was quantised from"
                    )
            self._handles |= dict.fromkeys(names, handle)
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self._check_index()

    def _check_index(self) -> None:
        """A sharded checkpoint's index names every tensor; a missing shard is found here, not halfway through."""
        for index in self.folder.glob("*.safetensors.index.json"):
            try:
                listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (OSError, ValueError, KeyError) as error:
                raise SourceError(f"{index} is torn or no index ({error}); fetch it again") from error
            for name, shard in listed.items():
                if name not in self.shapes and not name.endswith(DERIVED):
                    raise SourceError(f"{self.folder}: {index.name} lists {name} in {shard}, which is not there")

    def tensor(self, name: str) -> Tensor:
        # The view is kept: it holds no memory of its own, and making it costs more than merging a small tensor.
        if name not in self._views:
            self._views[name] = self._handles[name].get_tensor(name)
        return self._views[name]

    def weight(self, name: str) -> Weight:
        return self.tensor(name)


class LoraModel:
    """A model with a LoRA adapter on it, kept apart: a task vector is computed from the two small factors.

    W = W₀ + (alpha / r) · B·A (https://arxiv.org/abs/2106.09685), in float32 and not rounded.
    """

    def __init__(self, model: Checkpoint, adapter: Path) -> None:
        self.model = model
        self.shapes = model.shapes
        self._adapter = Checkpoint(adapter, "adapter_model*.safetensors")
        self._config = self._read_config(adapter / "adapter_config.json")
        self._factors = dict(self._pairs())

    @staticmethod
    def _read_config(file: Path) -> dict[str, Any]:
        try:
            config: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise SourceError(
                f"{file}: cannot be read ({error}); an adapter is a folder that PEFT has saved"
            ) from error
        for key, plain in PLAIN_LORA.items():
            if config.get(key, plain) not in (plain, None):
                raise SourceError(f"{file}: {key} is {config[key]!r}; llmevo merges plain LoRA ({key}: {plain!r})")
        return config

    def _pairs(self) -> Iterable[tuple[str, tuple[str, str, float]]]:
        """Each adapted weight's name, the names of its two factors, and its scale."""
        for name in self._adapter.shapes:
            if not name.endswith(".lora_A.weight"):
                if not name.endswith(".lora_B.weight"):
                    raise SourceError(f"{self._adapter.folder}: {name} is no part of a plain LoRA of linear layers")
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if f"{module}.weight" not in self.model.shapes:
                raise SourceError(f"{self._adapter.folder}: adapts {module}, which the model {self.model.folder} lacks")
            yield f"{module}.weight", (name, name.replace(".lora_A.", ".lora_B."), self._scale(module))

    def _scale(self, module: str) -> float:
        def of(key: str, default: float) -> float:
            pattern: dict[str, float] = self._config.get(f"{key}_pattern") or {}
            # Keys are regular expressions on the end of a module's name, as PEFT reads them.
            return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)

        rank = of("rank", self._config["r"])
        return of("alpha", self._config["lora_alpha"]) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def tensor(self, name: str) -> Tensor:
        weight = self.weight(name)
        return weight.dense() if isinstance(weight, LowRank) else weight

    def weight(self, name: str) -> Weight:
        origin = self.model.tensor(name)
        if name not in self._factors:
            return origin
        first, second, scale = self._factors[name]
        down, up = self._adapter.tensor(first).float() * scale, self._adapter.tensor(second).float()
        return LowRank(origin, down.T, up.T) if self._config.get("fan_in_fan_out") else LowRank(origin, up, down)


class Sources:
    """The models a recipe may name, opened once each. A LoRA's model is the same object as that model itself."""

    def __init__(self, root: Path = Path()) -> None:
        self.root = root
        self._checkpoints: dict[Path, Checkpoint] = {}
        self._sources: dict[ModelReference, Source] = {}

    @classmethod
    def open(cls, references: Iterable[ModelReference], root: Path = Path()) -> Self:
        """Open all of them and check that they fit: same names, same shapes. Raises SourceError."""
        sources = cls(root)
        known = [*references]
        for reference in known:
            fit(str(known[0]), sources[known[0]].shapes, str(reference), sources[reference].shapes)
        return sources

    def folder(self, reference: ModelReference) -> Path:
        """The folder with the model's config and tokenizer."""
        return folder_of(reference.model, self.root)

    def __getitem__(self, reference: ModelReference) -> Source:
        if reference not in self._sources:
            folder = self.folder(reference)
            checkpoint = self._checkpoints.get(folder) or Checkpoint(folder)
            self._checkpoints[folder] = checkpoint
            adapter = folder_of(reference.lora, self.root) if reference.lora else None
            self._sources[reference] = LoraModel(checkpoint, adapter) if adapter else checkpoint
        return self._sources[reference]

    def config(self, reference: ModelReference) -> dict[str, Any]:
        """The model's config.json."""
        file = self.folder(reference) / "config.json"
        try:
            config: Any = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise SourceError(f"{reference}: {file} cannot be read ({error})") from error
        if not isinstance(config, dict):
            raise SourceError(f"{reference}: {file} is no config of a model; fetch it again")
        return config

    def licence(self, reference: ModelReference) -> str | None:
        """The licence that the model's card, or the adapter's, declares."""
        folders = [folder_of(reference.lora, self.root)] if reference.lora else []
        for folder in [*folders, self.folder(reference)]:
            card = folder / "README.md"
            found = LICENCE.search(card.read_text(errors="replace")) if card.exists() else None
            if found:
                return found[1]
        return None

    def checksum(self, reference: ModelReference) -> str:
        """A digest of everything in the files that decides the weights: the safetensors files and the adapter's config.

        Reads them, unless that was done before: see `llmevo.checksums`. Raises SourceError.
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


def fit(one: str, first: Mapping[str, tuple[int, ...]], other: str, second: Mapping[str, tuple[int, ...]]) -> None:
    """Raise SourceError unless two models have the same tensors in the same shapes."""
    for name in first.keys() | second.keys():
        if name not in second or name not in first:
            have, lack = (one, other) if name in first else (other, one)
            raise SourceError(f"{have} has the tensor {name}, {lack} has not: they are not of one family")
        if first[name] != second[name]:
            what = "vocabularies" if "embed" in name or "lm_head" in name else "shapes"
            raise SourceError(
                f"{one} and {other} have different {what}: {name} is {first[name]} in the one, {second[name]} in the"
                " other; only models of one architecture and vocabulary can be merged"
            )
