"""The experts of a mixture of experts, each read as a dense model: `MODEL#expert=3`.

Expert j of every layer takes the place of the layer's MLP; attention, norms and embeddings are those of the mixture.
The weights are mapped parts of the mixture's files: no model is written.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmevo.errors import SourceError
from llmevo.models.architecture import EXPERT_LAYOUTS, PROJECTIONS, ExpertLayout, experts_of
from llmevo.models.checkpoints import Source, read_object
from llmevo.models.files import cache_folder, partial_folder, rename_once
from llmevo.models.tokenizer import tokenizer_files

MARK = "llmevo_expert.json"
"""The file that says which expert of which mixture a folder stands for."""

MIXTURE = "mixture"
"""The link to the mixture's folder next to it."""

FUSED = "gate_up_proj"
"""A tensor of gate and up projections of all experts, the gates' rows first."""

FILES = ("generation_config.json", "README.md", "LICENSE*")
"""The files of the mixture that its experts have as well, besides the tokenizer's."""


@dataclass(frozen=True)
class DenseClass:
    """A class of mixtures whose experts, with the rest of the model, are models of a dense class."""

    layout: ExpertLayout
    size: str
    """The key of the config for an expert's number of neurons."""
    own_keys: tuple[str, ...]
    """Keys of the config that only the mixture has."""
    defaults: Mapping[str, Any]
    """Values of keys that its config may leave out, where the dense class has others."""


MIXTURE_KEYS = (
    *("num_local_experts", "num_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size"),
    "auto_map",
)
SAME = {"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "hidden_size": 4096}
CLASSES: Mapping[str, DenseClass] = {
    "mixtral": DenseClass(
        EXPERT_LAYOUTS["mixtral"],
        "intermediate_size",
        MIXTURE_KEYS,
        {
            **SAME,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_moe": DenseClass(
        EXPERT_LAYOUTS["qwen3_moe"],
        "moe_intermediate_size",
        MIXTURE_KEYS,
        {
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "head_dim": None,
        },
    ),
}
"""{`model_type` of a mixture: its experts as dense models}."""

ROUTER = "the router of a mixture, which one expert does not need"


class Expert(Source):
    """One expert of every layer of a mixture, under the names of the dense class."""

    def __init__(self, stored: Source, config: Mapping[str, Any], expert: int, called: str) -> None:
        """`config` is the mixture's, `called` the model's name in messages.

        Raises SourceError for a tensor that has no place in the dense class.
        """
        self._stored, self._expert = stored, expert
        of = CLASSES[str(config["model_type"])]
        pattern = re.compile(rf"^((?:.+\.)?layers\.\d+\.)(?:{of.layout.module}|mlp)\.(?:gate\.|experts\.)")
        count, size = experts_of(config), int({**of.defaults, **config}[of.size])
        self._parts: dict[str, tuple[str, int | None, slice | None]] = {}
        derived = dict(stored.derived)
        for name, shape in stored.shapes.items():
            found = pattern.match(name)
            if found is None:
                if any(f".{part}." in name for part in ("shared_expert", "shared_expert_gate", "shared_experts")):
                    raise SourceError(f"{called}: {name} belongs to no single expert, and the dense class has no place")
                self._parts[name] = name, None, None
                continue
            place = f"{found[1]}mlp."
            *_, kind, rest = name.removeprefix(found[1]).split(".", 2)
            if kind == "gate":
                derived[name] = ROUTER
                continue
            number, _, matrix = rest.removesuffix(".weight").partition(".")
            if number.isdigit():
                if matrix not in of.layout.matrices:
                    raise SourceError(f"{called}: {name} has no place in a dense model")
                if int(number) == expert:
                    called_dense = PROJECTIONS[of.layout.matrices.index(matrix)]
                    self._parts[f"{place}{called_dense}.weight"] = name, None, None
                continue
            rows = {FUSED: (2 * size, shape[-1]), "down_proj": (shape[1], size)}.get(number)
            if rows is None or matrix or tuple(shape) != (count, *rows):
                raise SourceError(f"{called}: {name} has the shape {shape}, in which no expert is found")
            if number == FUSED:
                self._parts[f"{place}gate_proj.weight"] = name, expert, slice(0, size)
                self._parts[f"{place}up_proj.weight"] = name, expert, slice(size, 2 * size)
            else:
                self._parts[f"{place}down_proj.weight"] = name, expert, slice(None)
        self.shapes = {name: self._shape(*part) for name, part in self._parts.items()}
        self.derived = derived
        rounded = stored.quantized
        self.quantized = frozenset(name for name, (origin, *_) in self._parts.items() if origin in rounded)

    def _shape(self, origin: str, expert: int | None, rows: slice | None) -> tuple[int, ...]:
        shape = self._stored.shapes[origin]
        if expert is None or rows is None:
            return tuple(shape)
        return len(range(*rows.indices(shape[1]))), *shape[2:]

    def tensor(self, name: str) -> Tensor:
        origin, expert, rows = self._parts[name]
        whole = self._stored.tensor(origin)
        return whole if expert is None else whole[expert, rows]

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(self._parts[name][0])

    def rounding_error(self, name: str) -> float:
        origin, expert, _ = self._parts[name]
        share = 1.0 if expert is None else self.tensor(name).numel() / self._stored.tensor(origin).numel()
        return self._stored.rounding_error(origin) * share


def dense_config(config: Mapping[str, Any], called: str, like: str = "") -> dict[str, Any]:
    """Return the config.json of an expert as a dense model.

    `called` is the model's name in messages, `like` the `model_type` of the model that it is merged with, for mixtures
    of which several dense classes are right. Raises SourceError where no dense class fits.
    """
    kind = str(config.get("model_type"))
    if not experts_of(config):
        raise SourceError(f"{called}: the model is dense (its config.json names no experts); leave out #expert=")
    if kind not in CLASSES:
        why = (
            "each of its layers has a shared expert behind a gate of its own, and no dense class has that gate"
            if "shared_expert_intermediate_size" in config or config.get("n_shared_experts")
            else "no dense class has its attention and norms"
        )
        raise SourceError(
            f"{called}: an expert of {kind!r} is no dense model: {why}; llmevo reads experts of {' and '.join(CLASSES)}"
        )
    of = CLASSES[kind]
    given = {**of.defaults, **config}
    if given.get("mlp_only_layers") or int(given.get("decoder_sparse_step") or 1) > 1:
        size, other = given[of.size], given["intermediate_size"]
        if size != other:
            raise SourceError(
                f"{called}: its layers without experts have {other} neurons, an expert {size}; a dense model has one"
                " intermediate_size"
            )
    if not given.get("head_dim"):
        given["head_dim"] = given["hidden_size"] // given["num_attention_heads"]
    dense = {key: value for key, value in given.items() if key not in of.own_keys}
    if "rope_parameters" in config:
        dense.pop("rope_theta", None)
    dense["intermediate_size"] = given[of.size]
    # A Mixtral without a sliding window is a Llama as much as a Mistral.
    fitting = like in of.layout.dense and (like != "llama" or not dense.get("sliding_window"))
    dense["model_type"] = like if fitting else next(iter(of.layout.dense))
    if dense["model_type"] == "llama":
        dense.pop("sliding_window", None)
    return {**dense, "architectures": [of.layout.dense[dense["model_type"]]]}


def expert_folder(mixture: Path, expert: int, called: str, like: str = "") -> Path:
    """Return a folder that stands for one expert: a dense model's config and the mixture's tokenizer, without weights.

    It is in the cache; made the first time. Raises SourceError for an expert that the mixture does not have, and what
    `dense_config` raises.
    """
    config = read_object(mixture / "config.json", f"{called} must be a folder that transformers has saved")
    dense = dense_config(config, called, like)
    count = experts_of(config)
    if not 0 <= expert < count:
        raise SourceError(f"{called}: the mixture has {count} experts, #expert=0 to #expert={count - 1}")
    text = json.dumps(dense, indent=2) + "\n"
    beside = {file for pattern in FILES for file in mixture.glob(pattern) if file.is_file()}
    found = sorted({*tokenizer_files(mixture), *beside})
    made = json.dumps([str(mixture.absolute()), expert, text, [file.name for file in found]])
    out = cache_folder() / "experts" / hashlib.sha256(made.encode()).hexdigest()[:24]
    if out.exists():
        return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(out) as partial:
            (partial / "config.json").write_text(text)
            (partial / MARK).write_text(json.dumps({"expert": expert}) + "\n")
            (partial / MIXTURE).symlink_to(mixture.absolute())
            for file in found:
                (partial / file.name).symlink_to(file.absolute())
            rename_once(partial, out)
    except OSError as error:
        raise SourceError(f"{called}: its folder {out} cannot be written ({error})") from error
    return out


def mixture_of(folder: Path) -> tuple[Path, int] | None:
    """Return the mixture's folder and the expert that a folder stands for; None for other folders."""
    if not (folder / MARK).exists():
        return None
    return folder / MIXTURE, int(read_object(folder / MARK)["expert"])
