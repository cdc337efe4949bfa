"""Adapters that PEFT saves, kept apart from their models: a model with an adapter is a source like any other.

A weight under a plain LoRA stays low-rank: a task vector is then computed from the two small factors. All others are
computed when they are read, in float32. What cannot be merged exactly is refused.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from llmevo.errors import SourceError
from llmevo.models.architecture import HEAD, HEADS, TextStack, stack_of
from llmevo.models.checkpoints import Checkpoint, LowRank, Source, TensorCache, Weight, read_object
from llmevo.models.placement import places
from llmevo.models.tokenizer import VOCABULARY

PREFIX = "base_model.model."
"""What the names of modules begin with in PEFT's files."""

MERGE_FIRST = "Merge the adapter into its model with PEFT's merge_and_unload, save that, and name the saved model"

REFUSED: Mapping[str, str] = {
    "layer_replication": "it repeats layers of the model",
    "alora_invocation_tokens": "it acts only after these tokens",
    "arrow_config": "it chooses between adapters by the input",
    "kasa_config": "it takes singular values away from the model",
    "monteclora_config": "its weights are random",
    "use_bdlora": "its factors are stored as blocks",
    "use_qalora": "its inputs are averaged in groups",
}
"""Keys of a LoRA's config with which it is no function of the model's weights that is exact and short."""

OTHER_ORIGINS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of values of `init_lora_weights` whose adapters are relative to a changed base model."""

RANKS: Mapping[str, tuple[str, str]] = {
    "LORA": ("r", "lora_alpha"),
    "ADALORA": ("init_r", "lora_alpha"),
    "LOHA": ("r", "alpha"),
    "LOKR": ("r", "alpha"),
}
"""The keys of the rank and of alpha, by the kind of adapter."""

ENDS: Mapping[str, Sequence[str]] = {
    "LORA": ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "magnitude"),
    "ADALORA": ("lora_A", "lora_B", "lora_E"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "IA3": ("ia3_l",),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "LN_TUNING": (),
    "TRAINABLE_TOKENS": ("trainable_tokens_delta",),
}
"""The kinds of adapters that can be merged, and the ends of the names of their tensors."""

EVERYWHERE = ("trainable_tokens_delta",)
"""Ends of names that any kind of adapter may have besides its own."""

OTHER_NAMES = {
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "trainable_tokens_delta",
}
"""Ends of names that stand for another one."""

FUSED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""The names of an expert's own weights on disk, whose rows follow each other in what transformers makes of them."""

MIXTURE = ".block_sparse_moe."
"""What `.mlp.` is called on disk in Mixtral and its kin."""

Factors = Callable[[], tuple[Tensor, Tensor]]
"""The factors (rows, rank) and (rank, columns) of a change, float32, with the scale in one of them."""

Change = Callable[[Tensor], Tensor]
"""The weight that an adapter makes of the model's, float32."""


class LoraModel(Source):
    """A model with an adapter on it, a LoRA or another kind, as PEFT's merge_and_unload makes it in float32.

    | kind | the weight |
    |---|---|
    | LoRA (arXiv 2106.09685), rsLoRA, AdaLoRA, VeRA | W₀ + s·B·A |
    | DoRA (arXiv 2402.09353) | m · (W₀ + s·B·A) / ‖W₀ + s·B·A‖, by output |
    | LoHa, LoKr | W₀ + s·(B₁·A₁ ⊙ B₂·A₂), W₀ + s·(C ⊗ B·A) |
    | (IA)³ | l ⊙ W₀ |
    | biases, norms, whole modules and rows of embeddings that were trained | the trained one |

    Raises SourceError for an adapter that is incomplete, does not fit the model, or cannot be merged exactly.
    """

    def __init__(self, model: Source, adapter: Path, name: str = "") -> None:
        """`name` is the model's, for messages."""
        self.model, self.derived = model, model.derived
        self._name = name or str(getattr(model, "folder", "it is put on"))
        self.config = _read_config(adapter / "adapter_config.json")
        """The adapter's adapter_config.json."""
        self.kind = str(self.config.get("peft_type") or "LORA").upper()
        self._adapter = Checkpoint(adapter, "adapter_model*.safetensors")
        self._trained: dict[str, str] = {}
        """The adapter's tensors that take the place of a weight, by the weight's name."""
        self._head: str | None = None
        """The adapter's tensor for the head of a model that has none of its own."""
        self._low_rank: dict[str, Factors] = {}
        self._changes: dict[str, Change] = {}
        self._by_row: set[str] = set()
        """Weights of which single rows were trained."""
        self._unchanged: dict[str, bool] = {}
        self._named: dict[str, str] = {}
        """{a module of the model, as its checkpoint names it: its name in the adapter}, where the two differ."""
        self._kept = TensorCache()
        modules = self._modules()
        for module, parts in modules.items():
            if not self._repeats_rows(module[0], parts, modules):
                self._read(module, parts)
        self._check_saved()
        self._check_tied()
        if not self._low_rank and not self._changes and not self._trained:
            raise SourceError(f"{adapter}: its weights hold no LoRA factors (lora_A, lora_B); save the adapter again")
        trained = {name: self._adapter.shapes[tensor] for name, tensor in self._trained.items()}
        self.shapes = {name: trained.get(name, shape) for name, shape in model.shapes.items()}
        self.quantized = {name for name in model.quantized if name not in self._trained}

    # Names

    def _modules(self) -> dict[tuple[str, int], dict[str, str]]:
        """Return the names of the adapter's tensors by their part, by module and how often it is wrapped.

        Tensors that take the place of a weight are put aside.
        """
        found: dict[tuple[str, int], dict[str, str]] = {}
        ends = {each: each for each in (*ENDS[self.kind], *EVERYWHERE)} | OTHER_NAMES
        for name in self._adapter.shapes:
            plain = name.removeprefix(PREFIX)
            if self.kind == "VERA" and plain in ("base_model.vera_A", "base_model.vera_B"):
                continue
            end = max((end for end in ends if plain.endswith(f".{end}")), key=len, default="")
            if end and ends[end] in (*ENDS[self.kind], *EVERYWHERE):
                module = plain.removesuffix(f".{end}")
                key = self._place(module.replace(".base_layer", "")), module.count(".base_layer")
                found.setdefault(key, {})[ends[end]] = name
            else:
                self._put_aside(name, plain)
        return found

    @cached_property
    def _held(self) -> set[str]:
        """The modules of the model."""
        return {name[: dot.start()] for name in self.model.shapes for dot in re.finditer(r"\.", name)}

    @cached_property
    def _stacks(self) -> tuple[TextStack, TextStack] | None:
        """The layers of the model, and the same layers as the adapter names them; None where it names none."""
        names = [name.removeprefix(PREFIX) for name in self._adapter.shapes]
        try:
            return stack_of({}, self.model.shapes), stack_of({}, names)
        except SourceError:
            return None

    def _place(self, module: str) -> str:
        """Return the module that an adapter names, as the model's checkpoint has it.

        PEFT names modules as transformers does, which gives those of some older checkpoints and of multimodal models
        other names.
        """
        if module in self._held:
            return module
        named = [*places(f"{module}.weight", *self._stacks)] if self._stacks else []
        if f"{module}.weight" == HEAD and self._own_head:
            named.append(self._own_head)
        moved = [name.removesuffix(".weight") for name in named]
        moved += [name.replace(".mlp.", MIXTURE) for name in (module, *moved)]
        found = next((name for name in moved if name in self._held), module)
        if found != module:
            self._named[found] = module
        return found

    def _put_aside(self, name: str, plain: str) -> None:
        """Note a tensor that takes the place of a weight: a bias, a norm, or one of `modules_to_save`."""
        stem = re.sub(r"\.(base_layer|ln_tuning_layers|modules_to_save|token_adapter)\b", "", plain)
        is_copy = plain != stem and f"{name.removesuffix(plain)}{stem}" in self._adapter.shapes
        if is_copy or ".original_module." in plain:  # with a new vocabulary PEFT saves the weight before training too
            return
        module, _, end = stem.rpartition(".")
        weight = f"{self._place(module)}.{end}"
        shape, own = self._adapter.shapes[name], self.model.shapes.get(weight)
        if weight == HEAD and own is None and self._tied_embeddings():
            self._head = name
            return
        if own is None and ("lora_" in name or not name.endswith((".weight", ".bias"))):
            raise SourceError(
                f"{self._adapter.folder}: {name} is no part of an adapter of kind {self.kind} that llmevo can merge."
                f" {MERGE_FIRST}"
            )
        if own is None:
            raise self._lacks(weight)
        if shape != own and not (VOCABULARY.search(weight) and shape[1:] == own[1:]):
            raise SourceError(
                f"{self._adapter.folder}: {name} {shape} does not fit {weight} {own} of {self._name};"
                f" put the adapter on the model it was trained on{self._trained_on()}"
            )
        self._trained[weight] = name

    @cached_property
    def _own_head(self) -> str | None:
        """The model's output head, which is called so in most models; None where it is tied to the embeddings."""
        heads = (name for name in self.model.shapes if HEADS.search(name))
        return next((name for name in heads if name.endswith(".weight")), None)

    def _tied_embeddings(self) -> str | None:
        """Return the name of the embeddings if the model has no head of its own."""
        names = self.model.shapes
        return None if self._own_head else next((name for name in names if VOCABULARY.search(name)), None)

    def _repeats_rows(self, module: str, parts: Mapping[str, str], modules: Mapping[Any, Mapping[str, str]]) -> bool:
        """Return whether a module is the head and has the trained rows of the embeddings, which are the same weight."""
        tied = self._tied_embeddings()
        if f"{module}.weight" != HEAD or tied is None or [*parts] != ["trainable_tokens_delta"]:
            return False
        other = modules.get((tied.removesuffix(".weight"), 0), {})
        return [*other] == [*parts] and torch.equal(*(self._tensor(*each.values()) for each in (parts, other)))

    def _is_tied(self, name: str) -> SourceError:
        return SourceError(
            f"{self._adapter.folder}: {name} changes the embeddings or the head alone, and {self._name} has one weight"
            " for both (tie_word_embeddings): give the model a head of its own first, and put the adapter on that. Or:"
            f" {MERGE_FIRST}"
        )

    def _lacks(self, module: str) -> SourceError:
        return SourceError(
            f"{self._adapter.folder}: adapts {module}, which the model {self._name} lacks; put the adapter on the"
            f" model it was trained on{self._trained_on()}"
        )

    def _trained_on(self) -> str:
        """Return the model that the adapter names as its base, in brackets; empty where it names none."""
        base = self.config.get("base_model_name_or_path")
        return f" (base_model_name_or_path: {base})" if base else ""

    def _check_saved(self) -> None:
        """Raise SourceError for a module of `modules_to_save` without weights, if the model has one of the name."""
        held = {part for name in (*self.model.shapes, HEAD) for part in name.split(".")}
        saved = self.config.get("modules_to_save") or []
        if not isinstance(saved, list):
            raise SourceError(
                f"{self._adapter.folder}: modules_to_save is {saved!r} and no list; correct its adapter_config.json"
            )
        for module in cast(list[Any], saved):
            if str(module).rpartition(".")[2] not in held:  # PEFT names `score` and `classifier` of its own accord
                continue
            inside = [f"{self._called(name.rpartition('.')[0])}." for name in self._trained]
            inside += [HEAD] if self._head else []
            if not any(re.search(rf"(^|\.){re.escape(str(module))}\.", name) for name in inside):
                raise SourceError(
                    f"{self._adapter.folder}: modules_to_save names {module!r}, and its weights are missing; download"
                    " the adapter again"
                )

        if self.config.get("trainable_token_indices") and not self._by_row:
            raise SourceError(
                f"{self._adapter.folder}: trainable_token_indices names tokens, and their rows"
                " (trainable_tokens_delta) are missing; download the adapter again"
            )

    def _check_tied(self) -> None:
        """Raise SourceError where the embeddings change and the head, which is the same weight, does not."""
        tied = self._tied_embeddings()
        if tied is None:
            return
        trained = self._adapter.tensor(self._trained[tied]) if tied in self._trained else None
        own = self.model.tensor(tied)
        if self._head:
            other, head = own if trained is None else trained, self._adapter.tensor(self._head)
            if other.shape != head.shape or not bool((other == head).all()):
                raise self._is_tied(self._head)
        if self.config.get("ensure_weight_tying"):
            return
        if tied in self._low_rank or (tied in self._changes and tied not in self._by_row):
            raise self._is_tied(tied)
        if trained is not None and not self._head and not (own.shape == trained.shape and bool((own == trained).all())):
            raise self._is_tied(tied)

    # Parts of a module

    def _read(self, module: tuple[str, int], parts: Mapping[str, str]) -> None:
        """Note how the parts of one module change its weights."""
        name = module[0]
        if "trainable_tokens_delta" in parts:
            self._read_rows(name, parts["trainable_tokens_delta"])
        if rest := {part: tensor for part, tensor in parts.items() if part != "trainable_tokens_delta"}:
            readers: Mapping[str, Callable[[str, Mapping[str, str]], None]] = {
                "LORA": self._read_lora,
                "ADALORA": self._read_adalora,
                "LOHA": self._read_loha,
                "LOKR": self._read_lokr,
                "IA3": self._read_ia3,
                "VERA": self._read_vera,
            }
            readers[self.kind](name, rest)

    def _need(self, parts: Mapping[str, str], *wanted: str) -> None:
        """Raise SourceError unless a module has all of some parts."""
        for part in wanted:
            if part not in parts:
                have = next(iter(parts.values()))
                end = next(end for end in (*parts, *OTHER_NAMES) if have.endswith(end))
                missing = have.removesuffix(end) + part
                raise SourceError(
                    f"{self._adapter.folder}: it has {have}, but {missing} is missing; download the adapter again"
                )

    def _weight_of(self, module: str) -> str:
        weight = f"{module}.weight"
        if weight == HEAD and self._tied_embeddings():
            raise self._is_tied(module)
        if weight not in self.model.shapes:
            raise self._lacks(module)
        return weight

    def _tensor(self, name: str) -> Tensor:
        return self._adapter.tensor(name).float()

    def _read_lora(self, module: str, parts: Mapping[str, str]) -> None:
        if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
            self._read_embedding(module, parts)
            return
        self._need(parts, "lora_A.weight", "lora_B.weight", *(["lora_B.bias"] if self.config.get("lora_bias") else []))
        if f"{module}.weight" not in self.model.shapes and self.config.get("target_parameters"):
            self._read_parameter(module, parts)
            return
        weight = self._weight_of(module)
        exchanged = self._check_shapes(module, parts["lora_A.weight"], parts["lora_B.weight"])
        scale = self._scale(module)

        def factors() -> tuple[Tensor, Tensor]:
            down, up = self._tensor(parts["lora_A.weight"]) * scale, self._tensor(parts["lora_B.weight"])
            return (down.T, up.T) if exchanged else (up, down)

        self._add_low_rank(weight, factors, parts.get("magnitude"), 1 if exchanged else 0)
        if "lora_B.bias" in parts:
            bias, more = f"{module}.bias", parts["lora_B.bias"]
            if bias not in self.model.shapes:
                raise SourceError(
                    f"{self._adapter.folder}: {more} (lora_bias) needs {bias}, which {self._name} lacks; no merged"
                    " model of this architecture has such a bias: leave the adapter out"
                )
            self._check_size(more, self.model.shapes[bias])
            self._add(bias, lambda origin: origin.float() + self._tensor(more) * scale)

    def _add(self, weight: str, change: Change) -> None:
        if weight in self._changes or weight in self._low_rank:
            raise SourceError(f"{self._adapter.folder}: it changes {weight} in two ways. {MERGE_FIRST}")
        self._changes[weight] = change

    def _add_low_rank(self, weight: str, factors: Factors, magnitude: str | None = None, axis: int = 0) -> None:
        """Note a low-rank change of a weight, with DoRA's magnitudes of the entries of an axis."""
        if self.config.get("use_dora") and magnitude is None:
            raise SourceError(
                f"{self._adapter.folder}: use_dora is True, and the magnitudes (lora_magnitude_vector) of {weight} are"
                " missing; download the adapter again"
            )
        if magnitude is None:
            self._low_rank[weight] = factors
            return
        self._check_size(magnitude, (self.model.shapes[weight][axis],))

        def with_magnitude(origin: Tensor) -> Tensor:
            changed = LowRank(origin, *factors()).dense()
            ratio = self._tensor(magnitude).flatten() / torch.linalg.vector_norm(changed, dim=1 - axis)
            return changed.mul_(ratio.unsqueeze(1 - axis))

        self._add(weight, with_magnitude)

    def _read_embedding(self, module: str, parts: Mapping[str, str]) -> None:
        """LoRA of embeddings: A (rank, tokens), B (dimensions, rank)."""
        self._need(parts, "lora_embedding_A", "lora_embedding_B")
        weight = self._weight_of(module)
        tokens, size = self._shape_of(weight)
        scale, rank = self._scale(module), int(self._by_module("rank", module))
        self._check_size(parts["lora_embedding_A"], (rank, tokens), f" ({module} has rank {rank})")
        self._check_size(parts["lora_embedding_B"], (size, rank), f" ({module} has rank {rank})")

        def factors() -> tuple[Tensor, Tensor]:
            first, second = parts["lora_embedding_A"], parts["lora_embedding_B"]
            return self._tensor(first).T.contiguous(), self._tensor(second).T * scale

        self._add_low_rank(weight, factors, parts.get("magnitude"), 1)

    def _is_turned(self, module: str) -> bool:
        """Return whether a module's weight has rows and columns exchanged, as GPT-2's layers have (`Conv1D`).

        PEFT goes by the module's class; `fan_in_fan_out` in the adapter's config is of the last module only.
        """
        shape, bias = self.model.shapes[f"{module}.weight"], self.model.shapes.get(f"{module}.bias")
        if bias is None or len(shape) != 2:
            return False
        return bias == shape[1:] if shape[0] != shape[1] else self._has_turned

    @cached_property
    def _has_turned(self) -> bool:
        """Whether a bias of the model has an entry for each column of its matrix."""
        matrices = [name for name, shape in self.model.shapes.items() if len(shape) == 2 and shape[0] != shape[1]]
        return any(self._is_turned(name.removesuffix(".weight")) for name in matrices if name.endswith(".weight"))

    def _shape_of(self, weight: str) -> tuple[int, ...]:
        """Return the shape of a weight, of the trained one where there is."""
        return self._adapter.shapes[self._trained[weight]] if weight in self._trained else self.model.shapes[weight]

    def _read_parameter(self, module: str, parts: Mapping[str, str]) -> None:
        """LoRA of a parameter (experts, …) of a mixture of experts: A (rank · experts, in), B (out, rank · experts)."""
        first, second = (self._adapter.shapes[parts[f"lora_{each}.weight"]] for each in "AB")
        names = {str(each).rpartition(".")[2] for each in self.config["target_parameters"]}
        shapes = {name: shape for name in sorted(names) if (shape := self._experts_shape(module, name))}
        fitting = [
            (name, exchanged)
            for name, (experts, *sizes) in shapes.items()
            for exchanged in (False, True)
            if len(first) == len(second) == 2
            and first[0] == second[1] == self._by_module("rank", f"{module}.{name}") * experts
            and [second[0], first[1]] == (sizes[::-1] if exchanged else sizes)
        ]
        if not fitting:
            raise SourceError(
                f"{self._adapter.folder}: {module}: lora_B {second} times lora_A {first} fits no parameter of"
                f" {self._name} that target_parameters names; put the adapter on the model it was trained on"
                f"{self._trained_on()}"
            )
        if len(fitting) > 1:
            raise SourceError(
                f"{self._adapter.folder}: {parts['lora_A.weight']} could be of"
                f" {' or '.join(sorted({each for each, _ in fitting}))} and have rows and columns exchanged: the shapes"
                f" do not tell. {MERGE_FIRST}"
            )
        self._add_experts(module, *fitting[0], parts)

    def _experts_shape(self, module: str, parameter: str) -> tuple[int, ...] | None:
        """Return (experts, rows, columns) of a parameter, which the checkpoint may hold expert by expert."""
        whole = self.model.shapes.get(f"{module}.{parameter}")
        if whole is not None:
            return whole if len(whole) == 3 else (1, *whole)
        own = self._expert_names(module, parameter, 0)
        shapes = [self.model.shapes[name] for name in own]
        if not shapes:
            return None
        number = re.compile(rf"{re.escape(module)}\.(\d+)\.")
        count = len({found[1] for name in self.model.shapes if (found := number.match(name))})
        return count, sum(shape[0] for shape in shapes), shapes[0][1]

    def _expert_names(self, module: str, parameter: str, expert: int) -> list[str]:
        """Return the weights on disk whose rows are one expert's part of a parameter."""
        for names in FUSED.get(parameter, ()):
            own = [f"{module}.{expert}.{name}.weight" for name in names]
            if all(name in self.model.shapes for name in own):
                return own
        return []

    def _add_experts(self, module: str, parameter: str, exchanged: bool, parts: Mapping[str, str]) -> None:
        shape = self._experts_shape(module, parameter)
        assert shape
        experts, scale = shape[0], self._scale(f"{module}.{parameter}")

        def factors(expert: int) -> tuple[Tensor, Tensor]:
            first, second = self._tensor(parts["lora_A.weight"]), self._tensor(parts["lora_B.weight"])
            down = first.view(experts, -1, first.shape[1])[expert] * scale
            up = second.view(second.shape[0], -1, experts)[:, :, expert]
            return (down.T, up.T) if exchanged else (up, down)

        def all_experts(origin: Tensor) -> Tensor:
            changed = origin.float().clone().view(shape)
            for expert, of in enumerate(changed):
                of.addmm_(*factors(expert))
            return changed.view(origin.shape)

        if (whole := f"{module}.{parameter}") in self.model.shapes:
            self._add(whole, all_experts)
            return
        for expert in range(experts):
            start = 0
            for name in self._expert_names(module, parameter, expert):
                stop = start + self.model.shapes[name][0]

                def one(expert: int = expert, rows: slice = slice(start, stop)) -> tuple[Tensor, Tensor]:
                    up, down = factors(expert)
                    return up[rows], down

                self._add_low_rank(name, one)
                start = stop

    def _read_adalora(self, module: str, parts: Mapping[str, str]) -> None:
        """AdaLoRA (arXiv 2303.10512): A and B, with a diagonal between them."""
        self._need(parts, *ENDS["ADALORA"])
        weight = self._weight_of(module)
        rank = self._adapter.shapes[parts["lora_A"]][0]
        rows, columns = self._matrix(weight)
        exchanged = self._is_turned(module)
        self._check_size(parts["lora_A"], (rank, rows if exchanged else columns))
        self._check_size(parts["lora_B"], (columns if exchanged else rows, rank))
        self._check_size(parts["lora_E"], (rank, 1))
        alpha, first = float(self.config["lora_alpha"]), float(self.config["init_r"])
        scale = (alpha if alpha > 0 else first) / (first + 1e-5)

        def factors() -> tuple[Tensor, Tensor]:
            up, down = self._tensor(parts["lora_B"]), self._tensor(parts["lora_A"]) * self._tensor(parts["lora_E"])
            return (down.T, up.T * scale) if exchanged else (up, down * scale)

        self._add_low_rank(weight, factors)

    def _read_loha(self, module: str, parts: Mapping[str, str]) -> None:
        """LoHa (arXiv 2108.06098): the product, entry by entry, of two low-rank matrices."""
        self._need(parts, *ENDS["LOHA"])
        weight = self._weight_of(module)
        (rows, columns), rank, scale = self._matrix(weight), int(self._by_module("rank", module)), self._scale(module)
        for part, shape in zip(ENDS["LOHA"], [(rows, rank), (rank, columns)] * 2, strict=True):
            self._check_size(parts[part], shape)

        def change(origin: Tensor) -> Tensor:
            one, two, three, four = (self._tensor(parts[part]) for part in ENDS["LOHA"])
            return torch.add(origin.float(), (one @ two).mul_(three @ four), alpha=scale)

        self._add(weight, change)

    def _read_lokr(self, module: str, parts: Mapping[str, str]) -> None:
        """LoKr (arXiv 2309.14859): the Kronecker product of a small matrix and another one, which may be low-rank."""
        weight, scale = self._weight_of(module), self._scale(module)
        shapes: list[tuple[int, ...]] = []
        for side in ("lokr_w1", "lokr_w2"):
            if side in parts:
                shapes.append(self._adapter.shapes[parts[side]])
                continue
            self._need(parts, f"{side}_a", f"{side}_b")
            first, second = (self._adapter.shapes[parts[f"{side}_{each}"]] for each in "ab")
            self._check_size(parts[f"{side}_b"], (first[1], *second[1:]))
            shapes.append((first[0], second[1]))
        product = tuple(one * two for one, two in zip(*shapes, strict=True))
        if product != self._matrix(weight):
            raise SourceError(
                f"{self._adapter.folder}: {module}: its Kronecker product is {product}, which does not fit the weight"
                f" {self.model.shapes[weight]} of {self._name}; put the adapter on the model it was trained on"
                f"{self._trained_on()}"
            )

        def of(side: str) -> Tensor:
            if side in parts:
                return self._tensor(parts[side])
            return self._tensor(parts[f"{side}_a"]) @ self._tensor(parts[f"{side}_b"])

        def change(origin: Tensor) -> Tensor:
            return torch.add(origin.float(), torch.kron(of("lokr_w1"), of("lokr_w2").contiguous()), alpha=scale)

        self._add(weight, change)

    def _read_ia3(self, module: str, parts: Mapping[str, str]) -> None:
        """(IA)³ (arXiv 2205.05638): factors of the outputs, or of the inputs of feed-forward layers."""
        weight, (name,) = self._weight_of(module), parts.values()
        rows, columns = self._matrix(weight)
        turned = self._is_turned(module)
        outputs, inputs = (columns, rows) if turned else (rows, columns)
        shape = self._adapter.shapes[name]
        if shape not in ((outputs, 1), (1, inputs)):
            raise self._misfit(name, (outputs, 1))

        def change(origin: Tensor) -> Tensor:
            factors = self._tensor(name)
            return origin.float() * (factors.T if turned else factors)

        self._add(weight, change)
        of_outputs = shape == (outputs, 1) and not _is_of(self.config.get("feedforward_modules"), self._called(module))
        if of_outputs and (bias := f"{module}.bias") in self.model.shapes:
            self._add(bias, lambda origin: origin.float() * self._tensor(name).flatten())

    def _read_vera(self, module: str, parts: Mapping[str, str]) -> None:
        """VeRA (arXiv 2310.11454): factors of two random matrices that all modules share."""
        self._need(parts, *ENDS["VERA"])
        weight = self._weight_of(module)
        shared = [f"base_model.vera_{each}" for each in "AB"]
        shared = [name if name in self._adapter.shapes else f"{PREFIX}{name}" for name in shared]
        if lost := next((name for name in shared if name not in self._adapter.shapes), None):
            raise SourceError(
                f"{self._adapter.folder}: {lost.removeprefix(PREFIX)} is missing (save_projection: false):"
                f" the adapter's random matrices are made anew by PEFT. {MERGE_FIRST}"
            )
        rows, columns = self._matrix(weight)
        exchanged = self._is_turned(module)
        outputs, inputs = (columns, rows) if exchanged else (rows, columns)
        rank = self._adapter.shapes[shared[0]][0]
        self._check_size(parts["vera_lambda_b"], (outputs,))
        self._check_size(parts["vera_lambda_d"], (rank,))
        if self._adapter.shapes[shared[0]][1] < inputs or self._adapter.shapes[shared[1]][0] < outputs:
            raise self._misfit(shared[0], (rank, inputs))

        def factors() -> tuple[Tensor, Tensor]:
            down = self._tensor(shared[0])[:, :inputs] * self._tensor(parts["vera_lambda_d"])[:, None]
            up = self._tensor(shared[1])[:outputs] * self._tensor(parts["vera_lambda_b"])[:, None]
            return (down.T, up.T) if exchanged else (up, down)

        self._add_low_rank(weight, factors)

    def _read_rows(self, module: str, name: str) -> None:
        """Rows of the embeddings that were trained, by the indices of their tokens."""
        weight = self._weight_of(module)
        given = self.config.get("token_indices" if self.kind == "TRAINABLE_TOKENS" else "trainable_token_indices")
        if isinstance(given, dict):
            given = next((rows for key, rows in given.items() if _is_of([key], self._called(module))), None)
        rows, shape = self._shape_of(weight)[0], self._adapter.shapes[name]
        is_rows = isinstance(given, list) and all(isinstance(row, int) and 0 <= row < rows for row in given)
        if not is_rows or shape != (len(cast(list[int], given)), *self.model.shapes[weight][1:]):
            raise SourceError(
                f"{self._adapter.folder}: {name} {shape} are not the rows {given!r} of {weight}"
                f" {self.model.shapes[weight]}, as trainable_token_indices says; download the adapter again"
            )
        places = torch.tensor(given, dtype=torch.long)

        def change(origin: Tensor) -> Tensor:
            return origin.float().index_copy(0, places, self._tensor(name))

        self._add(weight, change)
        self._by_row.add(weight)

    # Shapes and numbers

    def _matrix(self, weight: str) -> tuple[int, int]:
        shape = self.model.shapes[weight]
        if len(shape) != 2:
            raise SourceError(f"{self._adapter.folder}: {weight} {shape} is no linear layer. {MERGE_FIRST}")
        return shape[0], shape[1]

    def _misfit(self, name: str, wanted: Sequence[int], more: str = "") -> SourceError:
        return SourceError(
            f"{self._adapter.folder}: {name} is {self._adapter.shapes[name]}; it must be {tuple(wanted)} to fit"
            f" {self._name}{more}; put the adapter on the model it was trained on{self._trained_on()}"
        )

    def _check_size(self, name: str, wanted: Sequence[int], more: str = "") -> None:
        if self._adapter.shapes[name] != tuple(wanted):
            raise self._misfit(name, wanted, more)

    def _check_shapes(self, module: str, one: str, other: str) -> bool:
        """Return whether the product of A (rank, in) and B (out, rank) is the weight with rows and columns exchanged.

        Raises SourceError unless it has the shape of the weight.
        """
        first, second = self._adapter.shapes[one], self._adapter.shapes[other]
        adapter, weight = self._adapter.folder, self._shape_of(f"{module}.weight")
        if len(first) != 2 or len(second) != 2 or len(weight) != 2:
            raise SourceError(
                f"{adapter}: {module} is no linear layer (lora_A {first}, weight {weight}); llmevo merges LoRA of"
                " linear layers, embeddings and experts"
            )
        rank = self._by_module("rank", module)
        if first[0] != second[1] or first[0] != rank:
            raise SourceError(
                f"{adapter}: {module} has rank {first[0]} in lora_A, {second[1]} in lora_B and {rank:g} in"
                " adapter_config.json (r, rank_pattern); download the adapter again"
            )
        product, exchanged = (second[0], first[1]), self._is_turned(module)
        if (product[::-1] if exchanged else product) != weight:
            raise SourceError(
                f"{adapter}: {module}: lora_B {second} times lora_A {first} does not fit the weight {weight} of"
                f" {self._name}; put the adapter on the model it was trained on{self._trained_on()}"
            )
        return exchanged

    def _called(self, module: str) -> str:
        """Return the adapter's name of a module, or of a parameter of a module."""
        head, _, last = module.rpartition(".")
        return self._named.get(module) or (f"{self._named[head]}.{last}" if head in self._named else module)

    def _by_module(self, key: str, module: str) -> float:
        """Return the module's own `rank` or `alpha` where the adapter's config has one, or that of all modules."""
        module = self._called(module)
        pattern: dict[str, float] = self.config.get(f"{key}_pattern") or {}
        default = self.config[RANKS[self.kind][0 if key == "rank" else 1]]
        # Keys are regular expressions on the end of a module's name, as PEFT reads them.
        return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    def _scale(self, module: str) -> float:
        rank = self._by_module("rank", module)
        return self._by_module("alpha", module) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    # Weights

    def tensor(self, name: str) -> Tensor:
        weight = self.weight(name)
        return weight.dense() if isinstance(weight, LowRank) else weight

    def weight(self, name: str) -> Weight:
        if name in self._low_rank:
            return LowRank(self._origin(name), *self._low_rank[name]())
        if name in self._changes:
            return self._kept.get(name, lambda: self._changes[name](self._origin(name)))
        return self._origin(name)

    def _origin(self, name: str) -> Tensor:
        """Return the weight that is changed, or the trained one."""
        if name not in self._trained:
            return self.model.tensor(name)
        trained = self._adapter.tensor(self._trained[name])
        if name in self._low_rank:  # saved in case that the vocabulary has changed; it may be the model's own
            own = self.model.tensor(name)
            if name not in self._unchanged:
                self._unchanged[name] = own.shape == trained.shape and bool((own == trained).all())
            return own if self._unchanged[name] else trained
        return trained

    def dtype(self, name: str) -> torch.dtype:
        return self.model.dtype(name)

    def rounding_error(self, name: str) -> float:
        return self.model.rounding_error(name) if name in self.quantized else 0.0


def _read_config(file: Path) -> dict[str, Any]:
    """Return an adapter's config. Raises SourceError for one that cannot be merged exactly, or makes no sense."""
    if not file.exists() and (file.parent / "config.json").exists():
        raise SourceError(
            f"{file.parent} is a model and no LoRA adapter (it has a config.json and no {file.name}): name it as a"
            " model of its own; an adapter follows `+`"
        )
    config = read_object(file, "an adapter is a folder that PEFT has saved")
    kind = str(config.get("peft_type") or "LORA").upper()
    if kind not in ENDS:
        known = ", ".join(ENDS)
        raise SourceError(f"{file}: peft_type is {kind!r}; llmevo merges {known}. {MERGE_FIRST}")
    for key, reason in REFUSED.items() if kind == "LORA" else ():
        if config.get(key):
            raise SourceError(f"{file}: {key} is {config[key]!r}: {reason}. {MERGE_FIRST}, if PEFT can")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(OTHER_ORIGINS):
        raise SourceError(
            f"{file}: init_lora_weights is {start!r}: such an adapter is relative to a changed base model. Convert"
            " it with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…), or merge it with PEFT"
            " and name the merged model"
        )
    rank, alpha = RANKS.get(kind, ("", ""))
    for key in filter(None, (rank, alpha)):
        if not _is_number(config.get(key)) or (key == rank and config[key] < 1):
            least = "a whole number of 1 or more" if key == rank else "a number"
            raise SourceError(f"{file}: {key} is {config.get(key)!r}; it must be {least}, as PEFT has saved it")
    for key in ("rank_pattern", "alpha_pattern") if kind != "ADALORA" else ():  # there it is of another kind
        _check_pattern(file, key, config.get(key))
    return config


def _is_of(names: object, module: str) -> bool:
    """Return whether a list of names, or a regular expression, names a module, as PEFT reads them."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    each = cast(list[object], names) if isinstance(names, list) else []
    return any(module == name or module.endswith(f".{name}") for name in each)


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
