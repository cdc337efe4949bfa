"""A LoRA adapter in PEFT's format, of a merge or of any fine-tune.

Matrices of linear layers become two factors; biases of these layers and modules of other kinds (embeddings, norms)
are saved whole where they changed, as PEFT's `bias` and `modules_to_save` have it. Nothing is dropped.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmevo.errors import UserError, plural
from llmevo.export.low_rank import Factors, Rank, change_of, decompose, rank_of, share_parameters, summed
from llmevo.export.modules import CONV1D, OTHER, Modules
from llmevo.merging.merger import Merger, Seed
from llmevo.merging.methods.base import coefficients
from llmevo.merging.plan import plan
from llmevo.merging.recipe import Recipe
from llmevo.merging.vocabulary import ByToken, plain, tokenizer_folder
from llmevo.merging.writer import MergedModel, whole_folder, write_texts
from llmevo.models.adapters import PREFIX
from llmevo.models.architecture import TOKEN_IDS, text_config
from llmevo.models.checkpoints import LowRank, Source, Weight, same
from llmevo.models.references import ModelPath, ModelReference, on_this_machine
from llmevo.models.safetensors_writer import header_size, returning_memory, write_file
from llmevo.models.sources import Sources
from llmevo.models.tokenizer import load_tokenizer, vocabulary

REPORT = "lora_report.json"
"""The file with the kept energy and the error of every matrix, beside the adapter."""

LARGEST_RANK = 512
"""The largest rank that vLLM serves."""

LINEAR_METHODS = ("linear", "task_arithmetic")
"""Methods whose result is a weighted sum of the models."""

Changes = Callable[[], Iterator[tuple[str, Weight]]]
"""The tensors of the adapted model by name, as often as they are needed, one in memory at a time."""


@dataclass(frozen=True)
class MatrixReport:
    """One matrix of the adapter."""

    shape: tuple[int, ...]
    rank: int
    energy: float
    """The share of Σσ² that is kept, 0 to 1."""
    error: float
    """‖change - B·A‖ / ‖change‖ in the Frobenius norm."""
    change: float
    """‖change‖ / ‖base‖."""


@dataclass
class LoraReport:
    """What an adapter holds, and how near it is to the model that it stands for."""

    base_model: str
    exact: bool
    """Whether the model is a sum of adapters, and every singular value is kept."""
    matrices: dict[str, MatrixReport] = field(default_factory=dict[str, MatrixReport])
    """By module."""
    saved_whole: list[str] = field(default_factory=list[str])
    """Tensors that are no matrices of linear layers and changed: in the adapter at full size."""
    parameters: int = 0
    """Numbers in the factors."""
    parameters_whole: int = 0
    """Numbers in the tensors that are saved whole."""
    _squares: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, module: str, shape: tuple[int, ...], factors: Factors, rank: int, base: float) -> None:
        """Note one matrix; `base` is the norm of the base's weight."""
        total, kept = factors.energy(), factors.energy(rank)
        lost = factors.rest + float(factors.values[rank:].double().square().sum())
        self._squares[0] += total
        self._squares[1] += lost
        self.parameters += rank * sum(shape)
        error = math.sqrt(lost / total) if total else 0.0
        change = math.sqrt(total) / base if base else 0.0
        self.matrices[module] = MatrixReport(shape, rank, kept / total if total else 1.0, error, change)

    @property
    def energy(self) -> float:
        """The share of Σσ² over all matrices that is kept."""
        total, lost = self._squares
        return 1.0 - lost / total if total else 1.0

    @property
    def error(self) -> float:
        """The Frobenius norm of all that is lost, relative to the change of all matrices."""
        total, lost = self._squares
        return math.sqrt(lost / total) if total else 0.0

    @property
    def rank(self) -> int:
        """The largest rank of a matrix."""
        return max((of.rank for of in self.matrices.values()), default=0)

    @property
    def size(self) -> str:
        """The numbers of parameters, in words."""
        matrices = plural(sum(of.rank > 0 for of in self.matrices.values()), "matrix", "matrices")
        whole = plural(len(self.saved_whole), "tensor")
        factors = f"{self.parameters:,} parameters in the factors of {matrices}, rank {self.rank} at most"
        return factors + (f"; {self.parameters_whole:,} more in {whole} saved whole" if self.saved_whole else "")

    @property
    def servers(self) -> str:
        """What loads the adapter; see `limits`."""
        return "PEFT" if self.saved_whole or self.rank > LARGEST_RANK else "PEFT and vLLM"

    @property
    def worst(self) -> list[tuple[str, MatrixReport]]:
        """The matrices with their modules, the largest relative error first."""
        return sorted(self.matrices.items(), key=lambda item: -item[1].error)

    @property
    def limits(self) -> list[str]:
        """What restricts where the adapter can be served."""
        said: list[str] = []
        if self.saved_whole:
            are = "is" if len(self.saved_whole) == 1 else "are"
            said.append(
                f"{plural(len(self.saved_whole), 'tensor')} changed that no low-rank factors can hold, and {are} saved"
                f" whole ({', '.join(self.saved_whole[:3])}{' …' if len(self.saved_whole) > 3 else ''}): PEFT loads"
                " the adapter, vLLM does not (it refuses modules_to_save and bias)"
            )
        elif self.rank > LARGEST_RANK:
            said.append(f"Its largest rank is {self.rank}, and vLLM serves {LARGEST_RANK} at most; give --rank")
        elif self.rank > 16:
            said.append(f"Its largest rank is {self.rank}; vLLM needs --max-lora-rank of that or more (16 by default)")
        return said

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain values."""
        facts = asdict(self)
        del facts["_squares"]
        return {**facts, "energy": self.energy, "error": self.error, "rank": self.rank}


def base_of(recipe: Recipe) -> ModelReference:
    """Return the model under the adapter: the recipe's base, or its first model, without an adapter."""
    return ModelReference(model=recipe.donor.model)


def sum_of_adapters(recipe: Recipe, sources: Sources, base: ModelReference) -> Changes | None:
    """Return the merge as low-rank weights over the base, where it is exactly that; None where it is not.

    It is where the method is a weighted sum, every model is an adapter on the base (or the base itself), and the
    weights add up to 1 with that of the base.
    """
    if {recipe.merge_method, *(of.merge_method for of in recipe.slices or [])} - {None, "by_slice", *LINEAR_METHODS}:
        return None
    if any(of.gains for of in recipe.slices or []):  # their factors are of the whole weight, the base's part as well
        return None
    origin, prepared = plain(sources)[base], Merger(sources).prepared(recipe)
    steps = plan(recipe, [*origin.shapes], sources.depth(recipe.donor))
    if [step.name for step in steps] != [*dict.fromkeys(step.name for step in steps)]:
        return None

    def weights() -> Iterator[tuple[str, Weight | None]]:
        for step in steps:
            each, shared = recipe.values(step.of, step.name, step.depth, step.inputs)
            start = recipe.origin_of(step.of)
            named = [(of.model, name) for of, name in zip(step.of.sources, step.inputs, strict=True)]
            factors = coefficients(each, shared)
            if start is not None:  # start + Σ wᵢ(xᵢ - start): what is left of 1 is the start's
                others = sum(w for w, (model, _) in zip(factors, named, strict=True) if model != start)
                factors = [1.0 - others if model == start else w for w, (model, _) in zip(factors, named, strict=True)]
            below = origin.tensor(step.name) if step.name in origin.shapes else None
            parts: list[tuple[float, LowRank]] = []
            is_sum = below is not None and abs(sum(factors) - 1.0) < 1e-6
            share = recipe.prepared_share(step.of, step.name, step.depth)
            for factor, (model, name) in zip(factors, named, strict=True):
                weight = prepared.weight(model, name, share) if prepared else sources[model].weight(name)
                if below is None or not same(weight.origin if isinstance(weight, LowRank) else weight, below):
                    is_sum = False
                elif isinstance(weight, LowRank) and factor != 0.0:
                    parts.append((factor, weight))
            yield step.name, (summed(parts, below) if parts else below) if is_sum and below is not None else None

    if any(weight is None for _, weight in weights()):
        return None
    return lambda: ((name, weight) for name, weight in weights() if weight is not None)


Texts = Callable[[LoraReport], Mapping[str, str]]
"""The text files to write beside an adapter, made of its report."""


def write_merge(
    recipe: Recipe,
    sources: Sources,
    out: Path,
    rank: Rank | None,
    seed: Seed = 0,
    texts: Texts | None = None,
    base_model: ModelPath | None = None,
) -> LoraReport:
    """Write a merge as one adapter on its base. `base_model` is what the files call the base, by default by its place
    on this machine.

    A weighted sum of adapters is exact, [B₁ … Bₙ]·diag(w)·[A₁; …; Aₙ], and by default (`rank` None) all of it is
    kept. For other merges the difference to the base, in float32, is truncated by an SVD, by default to the energy of
    `auto`. Raises UserError when an adapter cannot hold a change, and what `Merger.merge` raises.
    """
    base = sources.without_adapter(recipe.donor)
    if reason := obstacle(recipe, sources, base):
        raise UserError(f"--as lora: {reason}; export the whole model")
    changes = sum_of_adapters(recipe, sources, base)
    is_exact = changes is not None
    if changes is None:
        whole = recipe.model_copy(update={"out_dtype": "float32"})  # rounding has full rank
        changes = lambda: Merger(sources, seed).merge(whole)  # noqa: E731
    choice = (Rank() if is_exact else Rank.of("auto")) if rank is None else rank
    stored = plain(sources)[base]
    modules = Modules(sources.folder(base), stored.shapes)
    base_model = base_model or on_this_machine(base, sources.root).model
    return write_adapter(changes, stored, modules, base_model, out, choice, is_exact, texts)


def obstacle(recipe: Recipe, sources: Sources, base: ModelReference) -> str:
    """Return why no adapter on the stored base has the function of a merge; empty where only weights differ."""
    merged, known = MergedModel(recipe, sources, trim=False), plain(sources)
    depth = known.depth(base)
    if (layers := len(recipe.origins(depth))) != depth:
        return f"the merge has {layers} layers and {base} has {depth}; an adapter cannot add or remove layers"
    folder = tokenizer_folder(base, known)
    numbers = merged.sources.vocabulary.numbers if isinstance(merged.sources, ByToken) else None
    if numbers and vocabulary(folder) and numbers != dict(load_tokenizer(folder).get_vocab()):
        return f"the tokens of the merge are not those of {base}; an adapter has no tokenizer"
    shapes = known[base].shapes
    if name := next((name for name, shape in merged.shapes.items() if shapes.get(name) != shape), None):
        return (
            f"{name} is {merged.shapes[name]} in the merge and {shapes.get(name, 'missing')} in {base}; an adapter"
            " cannot change shapes"
        )
    config, own = merged.config(), known.config(base)
    for one, other in ((text_config(config), text_config(own)), (config, own)):
        if key := next(
            (key for key in {**one, **other} if one.get(key) != other.get(key) and key not in TOKEN_IDS), ""
        ):
            return f"the merge has another {key} in its config.json than {base}; an adapter changes weights only"
    return ""


def write_adapter(
    changes: Changes,
    base: Source,
    modules: Modules,
    base_model: ModelPath,
    out: Path,
    choice: Rank,
    is_sum: bool = False,
    texts: Texts | None = None,
) -> LoraReport:
    """Write the difference between a model's tensors and the base's as a LoRA adapter into `out`, a new folder.

    Factors are float32. `is_sum`: the model is a sum of adapters. Raises UserError when a changed tensor has no place
    in an adapter, when the rank is larger than every matrix, and when nothing changed.
    """
    matrices = {
        name: shape for name, shape in base.shapes.items() if _is_matrix(name, shape, modules.kinds, modules.module_of)
    }
    choice.check_fits(matrices)
    report = LoraReport(str(base_model), is_sum and choice == Rank())
    made = _Adapter(base, modules, matrices, choice, report, base_model)
    if choice.parameters is not None:
        made.share(changes())
    with whole_folder(out) as folder:
        room: dict[str, tuple[int, ...]] = {f"{PREFIX}{name}.base_layer": shape for name, shape in base.shapes.items()}
        room |= {f"{PREFIX}{name}.weight": (10**9, 10**9) for name in modules.tied.values()}
        room |= {f"{PREFIX}{name}.lora_{side}": shape for name, shape in matrices.items() for side in "AB"}
        write_file(made.tensors(changes()), folder / "adapter_model.safetensors", header_size(room.items()))
        if not made.report.matrices and not made.report.saved_whole:
            raise UserError(f"{out}: the model does not differ from {base_model}, so there is nothing to adapt")
        (folder / "adapter_config.json").write_text(json.dumps(made.config(), indent=2) + "\n")
        (folder / REPORT).write_text(json.dumps(made.report.as_dict(), indent=2) + "\n")
        write_texts(folder, texts(made.report) if texts else None)
    return made.report


def _is_matrix(
    name: str, shape: tuple[int, ...], kinds: Mapping[str, str], module_of: Callable[[str], str | None]
) -> bool:
    module = module_of(name)
    return bool(name.endswith(".weight") and len(shape) == 2 and module and kinds[module] != OTHER)


class _Adapter:
    """One adapter while it is written."""

    def __init__(
        self,
        base: Source,
        modules: Modules,
        matrices: Mapping[str, tuple[int, ...]],
        choice: Rank,
        report: LoraReport,
        base_model: ModelPath,
    ) -> None:
        self._base_model = base_model
        self._base, self._modules, self._matrices, self._choice = base, modules, matrices, choice
        self.report = report
        self.ranks: dict[str, int] = {}
        """By module."""
        self.whole: dict[str, None] = {}
        """The modules that are saved whole."""
        self.has_biases = False
        self._budget: dict[str, int] | None = None

    def _module(self, name: str) -> str:
        module = self._modules.module_of(name)
        if module is None:
            raise UserError(
                f"{name} changed, and it is no parameter of a module by that name in transformers, so PEFT"
                " cannot load it from an adapter; export the whole model"
            )
        return module

    def _factors(self, name: str, change: Weight) -> Factors:
        if self._modules.kinds[self._module(name)] == CONV1D:  # (inputs, outputs)
            change = LowRank(change.origin.T, change.down.T, change.up.T) if isinstance(change, LowRank) else change.T
        return decompose(change, self._choice.fixed)

    def _changed(self, weights: Iterator[tuple[str, Weight]]) -> Iterator[tuple[str, Weight, Weight]]:
        """Yield (name, weight, change) of the tensors that changed."""
        for name, weight in returning_memory(weights):
            shape = tuple((weight.origin if isinstance(weight, LowRank) else weight).shape)
            if self._base.shapes.get(name) != shape:
                raise UserError(
                    f"{name} is {shape} in the model and {self._base.shapes.get(name, 'missing')} in"
                    f" the base {self.report.base_model}; an adapter cannot change shapes; export the whole model"
                )
            if (change := change_of(weight, self._base.tensor(name))) is not None:
                parts = [change.up, change.down] if isinstance(change, LowRank) else [change]
                if not all(part.isfinite().all() for part in parts):
                    raise UserError(f"{name} has numbers that are not finite (NaN or infinite)")
                yield name, weight, change

    def share(self, weights: Iterator[tuple[str, Weight]]) -> None:
        """Share the parameters of the budget among all matrices."""
        values = {
            name: self._factors(name, change).values
            for name, _, change in self._changed(weights)
            if name in self._matrices
        }
        assert self._choice.parameters is not None
        self._budget = share_parameters(self._choice.parameters, values, self._matrices)

    def tensors(self, weights: Iterator[tuple[str, Weight]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the adapter's tensors by PEFT's names."""
        biases: dict[str, Tensor] = {}
        written: set[str] = set()
        for name, weight, change in self._changed(weights):
            module = self._module(name)
            if name in self._matrices:
                yield from self._pair(name, module, change)
            elif self._modules.kinds[module] != OTHER:  # a bias: its name depends on whether the matrix is adapted
                biases[name] = _dense(weight, self._base.tensor(name))
            else:
                if inside := self._modules.inside(module):
                    raise UserError(
                        f"{name} changed, and PEFT saves {module} only whole, with {inside[0]} and all else"
                        " in it; export the whole model"
                    )
                self.report.saved_whole.append(name)
                written.add(name)
                # A tied head is no tensor of the checkpoint, and PEFT does not change it with the embeddings.
                for place in filter(None, (module, self._modules.tied.get(module))):
                    self.whole.setdefault(place)
                    yield self._saved(place, name, _dense(weight, self._base.tensor(name)))
        for name, bias in biases.items():
            module = self._module(name)
            is_adapted = self.ranks.get(module, 0) > 0
            self.has_biases = True
            self.report.saved_whole.append(name)
            yield self._saved(f"{module}{'.base_layer' if is_adapted else ''}", name, bias)
        for name in self._base.shapes:  # the other tensors of modules that are saved whole
            if name not in written and (module := self._modules.module_of(name)) in self.whole:
                yield self._saved(module, name, self._base.tensor(name))

    def _saved(self, place: str, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """Return a tensor that is saved whole, with PEFT's name, and count its numbers."""
        self.report.parameters_whole += tensor.numel()
        return f"{PREFIX}{place}{name[name.rindex('.') :]}", tensor

    def _pair(self, name: str, module: str, change: Weight) -> Iterator[tuple[str, Tensor]]:
        """Yield A and B of one matrix, unless its rank is 0."""
        factors = self._factors(name, change)
        if self._budget is not None:
            rank = min(self._budget.get(name, 0), len(factors.values))
        else:
            rank = rank_of(self._choice, factors)
        norm = float(torch.linalg.vector_norm(self._base.tensor(name), dtype=torch.float64))
        self.report.add(module, self._matrices[name], factors, rank, norm)
        self.ranks[module] = rank
        if rank:
            for side, factor in zip("AB", factors.balanced(rank), strict=True):
                yield f"{PREFIX}{module}.lora_{side}.weight", factor

    def config(self) -> dict[str, Any]:
        """Return PEFT's adapter_config.json. alpha is the rank everywhere: the factors hold the whole scale.

        `r` is the largest rank: servers reserve memory by it.
        """
        ranks = {module: rank for module, rank in self.ranks.items() if rank}
        largest = max(ranks.values(), default=1)
        pattern = {module: rank for module, rank in ranks.items() if rank != largest}
        names = self._modules.names
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self._base_model.model_copy(update={"revision": None})),
            "revision": self._base_model.revision,
            "inference_mode": True,
            "r": largest,
            "lora_alpha": largest,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": _short(list(ranks), names, ".") or "dummy-target-modules",  # PEFT's word for none
            "modules_to_save": _short(list(self.whole), names, "") or None,  # found without a dot before it
            "ensure_weight_tying": any(module in self.whole for module in self._modules.tied),
            "bias": "all" if self.has_biases else "none",
            "fan_in_fan_out": CONV1D in {self._modules.kinds[module] for module in ranks},
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
        }


def _short(modules: list[str], known: list[str], before: str) -> list[str]:
    """Return the last parts of modules' names where they stand for these modules and no other; else whole names.

    PEFT takes every module whose name ends with the part, with `before` in front of it.
    """
    wanted = {*modules}
    named = {module: module.rpartition(".")[2] for module in modules}
    clear = {
        last: all(name in wanted for name in known if name == last or name.endswith(f"{before}{last}"))
        for last in {*named.values()}
    }
    return [*dict.fromkeys(last if clear[last] else module for module, last in named.items())]


def _dense(weight: Weight, base: Tensor) -> Tensor:
    """Return a weight to be saved whole, in the type of the base's."""
    return (weight.dense() if isinstance(weight, LowRank) else weight).to(base.dtype)
