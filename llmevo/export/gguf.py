"""A merge as a GGUF file for llama.cpp, with metadata and tokenizer of a donor: a GGUF file of the same base.

The tensors' names and layouts are those of llama.cpp's converter (`convert_hf_to_gguf.py`); the rounding is that of
`models/quantize.py`, so a model that was scored quantized is the model of the file.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmevo.errors import UserError
from llmevo.merging.vocabulary import ByToken, plain, tokenizer_folder
from llmevo.merging.writer import MergedModel
from llmevo.models.quantize import ggml_bytes, quantize, quantizer
from llmevo.models.safetensors_writer import returning_memory
from llmevo.models.tokenizer import load_tokenizer, template_of, vocabulary

TYPES = ("q8_0", "q4_0", "f16", "bf16")

ARCHITECTURES: Mapping[str, str] = {
    **dict.fromkeys(("llama", "mistral"), "llama"),
    **{name: name for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3", "starcoder2")},
    "gemma3_text": "gemma3",
}
"""GGUF's architecture by `model_type` of config.json, of the models whose layout in GGUF is known here."""

ROTATED = ("llama",)
"""Architectures whose q and k have the two halves of each head interleaved in GGUF."""

NORMS_FROM_ONE = ("gemma", "gemma2", "gemma3")
"""Architectures whose norm weights are w in transformers and 1 + w in GGUF."""

SCALED = ("linear", "yarn")
"""The scalings of positions that stand in the metadata."""

LLAMA3 = "rope_freqs.weight"
"""The tensor by which Llama 3 scales positions."""

DERIVED = (LLAMA3, "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that GGUF files have and checkpoints do not: they follow from the config, and are the donor's."""

FILE_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
"""llama.cpp's `general.file_type`."""

ROWS_TOGETHER = 1 << 20
"""Numbers that are converted at a time, so that memory stays flat."""

STRING, ARRAY = 8, 9
FIXED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""The types of GGUF's values."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file."""

    shape: tuple[int, ...]
    """In the order of transformers."""
    kind: int
    """ggml's number of its type."""
    offset: int


class Donor:
    """The metadata and the tensors' names of a GGUF file, mapped. Raises UserError for a file that is none.

    The `gguf` package's reader makes several objects for every token, hundreds of megabytes for a large vocabulary.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb") as stream:
                self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            magic, version, tensors, values = struct.unpack_from("<4sIQQ", self._bytes)
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError("it does not begin as a GGUF file of version 2 or 3")
            self.values: dict[str, tuple[int, int, int]] = {}
            """{key: (type, start, end)} of each value."""
            place = 24
            for _ in range(values):
                key, place = self._string(place)
                (kind,) = struct.unpack_from("<I", self._bytes, place)
                end = self._skip(kind, place + 4)
                self.values[key], place = (kind, place + 4, end), end
            self.tensors: dict[str, StoredTensor] = {}
            for _ in range(tensors):
                name, place = self._string(place)
                (count,) = struct.unpack_from("<I", self._bytes, place)
                shape = struct.unpack_from(f"<{count}Q", self._bytes, place + 4)
                kind, offset = struct.unpack_from("<IQ", self._bytes, place + 4 + 8 * count)
                place += 16 + 8 * count
                self.tensors[name] = StoredTensor(shape[::-1], kind, offset)
            self.alignment = int(self.value("general.alignment") or 32)
            self._start = -(-place // self.alignment) * self.alignment
        except (OSError, ValueError, struct.error, KeyError) as error:
            raise UserError(f"--donor {file}: cannot be read as a GGUF file ({error})") from error

    def _string(self, place: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._bytes, place)
        end = place + 8 + length
        return self._bytes[place + 8 : end].decode(), end

    def _skip(self, kind: int, place: int) -> int:
        if kind == STRING:
            return place + 8 + struct.unpack_from("<Q", self._bytes, place)[0]
        if kind != ARRAY:
            return place + struct.calcsize(FIXED[kind])
        inner, count = struct.unpack_from("<IQ", self._bytes, place)
        place += 12
        if inner in FIXED:
            return place + count * struct.calcsize(FIXED[inner])
        for _ in range(count):
            place = self._skip(inner, place)
        return place

    def raw(self, key: str) -> bytes:
        """Return the bytes of a key with its value, as they stand in the file."""
        kind, start, end = self.values[key]
        name = key.encode()
        return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + self._bytes[start:end]

    def value(self, key: str) -> Any:
        """Return a number or a text; None where the file lacks it or has a list there."""
        kind, start, _ = self.values.get(key, (ARRAY, 0, 0))
        if kind == STRING:
            return self._string(start)[0]
        return None if kind == ARRAY else struct.unpack_from(FIXED[kind], self._bytes, start)[0]

    @property
    def architecture(self) -> str:
        return str(self.value("general.architecture") or "")

    def tokens(self) -> Iterator[str]:
        """Yield the tokens of its vocabulary in their order."""
        kind, place, _ = self.values.get("tokenizer.ggml.tokens", (0, 0, 0))
        if kind == ARRAY:
            _, count = struct.unpack_from("<IQ", self._bytes, place)
            place += 12
            for _ in range(count):
                token, place = self._string(place)
                yield token

    def bytes_of(self, name: str) -> "np.ndarray[Any, Any]":
        """Return a float32 tensor of the file."""
        tensor = self.tensors[name]
        size = int(np.prod(tensor.shape))
        found = np.frombuffer(self._bytes, np.float32, size, self._start + tensor.offset)
        return found.reshape(tensor.shape)


def llama3_factors(config: Mapping[str, Any], rope: Mapping[str, Any]) -> "np.ndarray[Any, Any]":
    """Return by what Llama 3 divides each frequency, as llama.cpp's converter writes it into `rope_freqs.weight`."""
    size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    factor, low, high = (
        float(rope.get(key, default))
        for key, default in (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
    )
    turns = float(rope.get("original_max_position_embeddings", 8192)) * base ** -(np.arange(0, size, 2) / size)
    turns /= 2 * np.pi
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


class GgufModel:
    """A merge, checked against its donor, to be written as a GGUF file.

    Raises UserError when the `gguf` package is missing, for an architecture whose layout is not known, and for a donor
    of another model, vocabulary or computation.
    """

    def __init__(self, model: MergedModel, donor: Path, kind: str) -> None:
        """`kind` is one of `TYPES`."""
        self.model, self.kind = model, kind
        config = model.config()
        model_type = str(config.get("model_type"))
        if model_type not in ARCHITECTURES:
            raise UserError(
                f"--as gguf: the layout of model_type {model_type!r} in GGUF is not known here (known:"
                f" {', '.join(ARCHITECTURES)}); export the whole model (without --as) and convert it with llama.cpp's"
                " convert_hf_to_gguf.py"
            )
        self.architecture = ARCHITECTURES[model_type]
        self.donor = Donor(donor)
        self._quantizer = quantizer(kind if kind in ("q8_0", "q4_0") else "q8_0", model.shapes, config)
        self._config = config
        self._check_metadata()
        self.names = self._map_names()
        self._check_tensors()
        self._check_vocabulary()

    @property
    def _label(self) -> str:
        return f"--donor {self.donor.file}"

    def _check_metadata(self) -> None:
        """Raise UserError where the donor's metadata say that it is or computes another model."""
        config, found, arch = self._config, self.donor, self.donor.architecture
        if arch != self.architecture:
            raise UserError(
                f"{self._label}: general.architecture is {arch!r}, and the merge is a"
                f" {config['model_type']} ({self.architecture!r} in GGUF); name a GGUF file of the merge's own base"
            )
        rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        wanted = {
            "block_count": config.get("num_hidden_layers"),
            "embedding_length": config.get("hidden_size"),
            "feed_forward_length": config.get("intermediate_size"),
            "attention.head_count": config.get("num_attention_heads"),
            "attention.head_count_kv": config.get("num_key_value_heads"),
            "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
            "rope.freq_base": rope.get("rope_theta") or config.get("rope_theta"),
            "rope.scaling.factor": rope.get("factor") if kind in SCALED else None,
        }
        if not any(isinstance(value, Mapping) for value in rope.values()):  # each kind of layers has its own
            self._check_scaling(kind, config, rope)
        for key, value in wanted.items():
            other = found.value(f"{arch}.{key}")
            if value is None or other is None:
                continue
            if abs(float(value) - float(other)) > 1e-6 * abs(float(value)):
                raise UserError(
                    f"{self._label}: {arch}.{key} is {other:g}, and {float(value):g} in the merge's config.json;"
                    f" {self._another}"
                )

    @property
    def _another(self) -> str:
        """What helps where the donor's metadata are not those of the merge."""
        if self.model.recipe.rope or any(of.layer_range for s in self.model.recipe.slices or [] for of in s.sources):
            return (
                "the recipe changes layers or positions, which a GGUF file of its base does not describe; export the"
                " whole model (without --as) and convert it with llama.cpp's convert_hf_to_gguf.py"
            )
        return "name a GGUF file of the merge's own base"

    def _check_scaling(self, kind: str, config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
        """Raise UserError unless the donor's positions are scaled as the merge's, by metadata or by a tensor."""
        key = f"{self.donor.architecture}.rope.scaling.type"
        donors = "llama3" if LLAMA3 in self.donor.tensors else self.donor.value(key)
        unscaled = (None, "none", "default")
        mine, other = ("nothing" if of in unscaled else of for of in (kind, donors))
        if mine != other and {mine, other} <= {"nothing", "llama3", *SCALED}:
            raise UserError(
                f"{self._label}: its positions are scaled by {other} ({key}, or the tensor {LLAMA3}), and by {mine} in"
                f" the merge's config.json; {self._another}"
            )
        if kind == "llama3" and LLAMA3 in self.donor.tensors:
            factors, held = llama3_factors(config, rope), self.donor.bytes_of(LLAMA3)
            if held.shape != factors.shape or not np.allclose(held, factors, rtol=1e-3):
                raise UserError(
                    f"{self._label}: its {LLAMA3} are up to {held.max():g}, and {factors.max():g} by the merge's"
                    f" config.json; {self._another}"
                )

    def _map_names(self) -> dict[str, str]:
        """Return the GGUF name of each tensor."""
        try:
            from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
        except ImportError as error:
            raise UserError(f"--as gguf needs `pip install '.[gguf]'` in the clone of llmevo ({error})") from error
        number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        known = get_tensor_name_map(number, int(self._config["num_hidden_layers"]))
        names: dict[str, str] = {}
        for name in self.model.shapes:
            if name == "lm_head.weight" and self._config.get("tie_word_embeddings"):
                continue  # transformers and llama.cpp both use the embeddings
            found = known.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise UserError(
                    f"--as gguf: GGUF has no name for the tensor {name} in the architecture {self.architecture};"
                    " export the whole model (without --as)"
                )
            names[name] = found
        return names

    def _check_tensors(self) -> None:
        """Raise UserError unless the donor has the same tensors in the same shapes."""
        held = self.donor.tensors
        made = {new: tuple(self.model.shapes[old]) for old, new in self.names.items()}
        said = "it is not of the merge's base; name a GGUF file of that"
        for name, shape in made.items():
            if name not in held:
                raise UserError(f"{self._label}: it lacks the tensor {name}, which the merge has: {said}")
            if held[name].shape != shape:
                raise UserError(f"{self._label}: {name} is {held[name].shape}, and {shape} in the merge: {said}")
        is_tied = "output.weight" not in made  # llama.cpp uses the embeddings then
        extra = [name for name in held if name not in made and name not in DERIVED]
        if extra := [name for name in extra if not (is_tied and name == "output.weight")]:
            raise UserError(f"{self._label}: it has the tensor {extra[0]}, which the merge lacks: {said}")
        if wrong := next((name for name in DERIVED if name in held and held[name].kind != 0), None):
            raise UserError(f"{self._label}: {wrong} is not stored as F32; name another GGUF file of the base")

    def _check_vocabulary(self) -> None:
        """Raise UserError unless every token of the merge's tokenizer is the donor's token of that number."""
        recipe: Any = self.model.recipe
        sources = self.model.sources
        numbers = sources.vocabulary.numbers if isinstance(sources, ByToken) else vocabulary(self.folder_of_tokenizer)
        tokens = {number: token for token, number in numbers.items()}
        rows = next(shape[0] for old, shape in self.model.shapes.items() if self.names.get(old) == "token_embd.weight")
        count = 0
        for number, token in enumerate(self.donor.tokens()):
            count += 1
            wanted = tokens.get(number)
            if wanted is not None and token.strip() != wanted.strip():
                raise UserError(
                    f"{self._label}: token {number} is {token!r} there and {wanted!r} in the merge"
                    f" ({recipe.tokenizer_donor}); name a GGUF file with the merge's vocabulary"
                )
        if count != rows:
            raise UserError(
                f"{self._label}: its vocabulary has {count} tokens, and the merge's embeddings {rows} rows; name a GGUF"
                " file with the merge's vocabulary"
            )

    @cached_property
    def folder_of_tokenizer(self) -> Path:
        return tokenizer_folder(self.model.recipe.tokenizer_donor, plain(self.model.sources))

    def _special(self) -> dict[str, int | str]:
        """Return the special tokens and the chat template of the model whose tokenizer the recipe names."""
        recipe, own = self.model.recipe, self.model.chat_template
        model = plain(self.model.sources).without_adapter(recipe.donor)
        if recipe.tokenizer_donor == recipe.donor and self.folder_of_tokenizer == self.model.sources.folder(model):
            return {"tokenizer.chat_template": own} if own else {}
        tokenizer = load_tokenizer(self.folder_of_tokenizer)
        found = {
            "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
            "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
            "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
            "tokenizer.chat_template": own or template_of(self.folder_of_tokenizer),
        }
        return {key: value for key, value in found.items() if value is not None}

    def stored(self, name: str) -> str:
        """Return the type of a tensor in the file: `f32` for norms, biases and whatever is no matrix."""
        found = self._quantizer.stored(name, self.model.shapes[name])
        return "f32" if found is None else found if self.kind in ("q8_0", "q4_0") else self.kind

    def write(self, file: Path) -> None:
        """Write the file, one tensor in memory at a time. Raises CandidateError when a weight is not finite."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValue, GGUFValueType, GGUFWriter

        class Writer(GGUFWriter):
            """A writer of values that are bytes already."""

            def write_kv_data_to_file(self) -> None:
                assert self.fout is not None
                for value in self.kv_data[0].values():
                    self.fout[0].write(value.value)
                self.flush()
                self.state = type(self.state).KV_DATA

        writer = Writer(file, self.architecture)
        writer.data_alignment = self.donor.alignment
        kept = {key: self.donor.raw(key) for key in self.donor.values if not key.startswith(("split.", "quantize."))}
        for key, number in (("general.file_type", FILE_TYPES[self.kind]), ("general.quantization_version", 2)):
            kept[key] = _value(key, number)
        kept |= {key: _value(key, value) for key, value in self._special().items()}
        writer.kv_data[0] = {key: GGUFValue(value, GGUFValueType.STRING) for key, value in kept.items()}
        for old, new in self.names.items():
            kind = GGMLQuantizationType[self.stored(old).upper()]
            (block, size), shape = GGML_QUANT_SIZES[kind], self.model.shapes[old]
            bytes_of = int(np.prod(shape)) // block * size
            writer.add_tensor_info(new, shape, np.dtype(np.float32), bytes_of, raw_dtype=kind)
        copied = [name for name in self.donor.tensors if name in DERIVED]
        for name in copied:
            shape = self.donor.tensors[name].shape
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        writer.open_output_file()
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, weight in returning_memory(self.model.weights()):
                if name in self.names:
                    writer.write_tensor_data(self.encoded(name, weight))
            for name in copied:
                writer.write_tensor_data(self.donor.bytes_of(name))
        finally:
            writer.close()

    def encoded(self, name: str, weight: Tensor) -> "np.ndarray[Any, Any]":
        """Return a weight as bytes of the file."""
        kind = self.stored(name)
        if self.architecture in ROTATED:
            weight = self._rotated(name, weight)
        if self.architecture in NORMS_FROM_ONE and name.endswith("norm.weight"):
            weight = weight.float() + 1
        pieces = weight.split(max(1, ROWS_TOGETHER // max(1, weight[0].numel()))) if weight.dim() > 1 else [weight]
        return np.concatenate([_bytes(name, piece, kind) for piece in pieces])

    def _rotated(self, name: str, weight: Tensor) -> Tensor:
        """Return q and k with the rows of each head in GGUF's order, as the converter's `permute` has it."""
        heads = int(self._config["num_attention_heads"])
        if ".k_proj." in name:
            heads = int(self._config.get("num_key_value_heads") or heads)
        elif ".q_proj." not in name:
            return weight
        return weight.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).reshape(weight.shape)


def _value(key: str, value: int | str) -> bytes:
    """Return the bytes of a key with a number or a text, as they stand in a GGUF file."""
    name = key.encode()
    start = struct.pack("<Q", len(name)) + name
    if isinstance(value, int):
        return start + struct.pack("<II", 4, value)
    return start + struct.pack("<IQ", STRING, len(value.encode())) + value.encode()


def _bytes(name: str, weight: Tensor, kind: str) -> "np.ndarray[Any, Any]":
    if kind in ("q8_0", "q4_0"):
        return ggml_bytes(quantize(weight, kind), kind).reshape(-1).numpy()
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    made = weight.to(dtype).contiguous()
    if kind == "f16" and not made.isfinite().all():
        raise UserError(f"--as gguf: {name} has numbers that float16 cannot hold; use gguf:bf16")
    return made.view(torch.uint8).reshape(-1).numpy()
