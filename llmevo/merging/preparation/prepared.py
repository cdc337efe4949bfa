"""Prepared models: the experts of a recipe after the steps of its `prepare`, made once and kept in the cache folder.

The name of their file tells the content of the base, the experts, the steps and the texts, so they are made again when
one of these changes.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from llmevo.errors import RecipeError, SourceError, plural
from llmevo.merging.kernels.task_vectors import is_finite_weight, weighted_sum
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.preparation.align import MLP, of_matrix, order_of
from llmevo.merging.preparation.measured import Measurement, Sequential, of_weight, open_all, reading
from llmevo.merging.preparation.registry import STEPS, Measured
from llmevo.merging.preparation.texts import Texts, called, read_texts
from llmevo.merging.recipe import Recipe
from llmevo.models.architecture import POSITIONS
from llmevo.models.checkpoints import Checkpoint, LowRank, Weight, same, stored
from llmevo.models.files import cache_folder, locked, partial_folder, rename_once
from llmevo.models.references import ModelReference
from llmevo.models.safetensors_writer import header_size, write_file
from llmevo.models.sources import Sources
from llmevo.models.tokenizer import VOCABULARY

RULES = 2
"""Raised by every change of the arithmetic."""

UP, DOWN = "/up", "/down"
"""The ends of the names of the two factors of a low-rank change; without the first one it is that of the expert."""


class Prepared:
    """The prepared experts of all recipes that have the same base, merged models and `prepare`.

    A matrix of an adapter stays low-rank over the base, in float32; another one is rounded to the type that the expert
    stores it in. Embeddings, heads and tensors that are no matrices are those of the expert.
    """

    def __init__(self, recipe: Recipe, sources: Sources) -> None:
        """A relative `text` is in the sources' folder. Raises RecipeError when it cannot be used."""
        assert recipe.prepare is not None
        assert recipe.base_model is not None
        self.sources, self.base, self.preparation = sources, recipe.base_model, recipe.prepare
        found = [(sources.checksum(of), str(of), of) for of in recipe.merged_references if of != self.base]
        self.experts = [reference for *_, reference in sorted(found, key=lambda each: each[:2])]
        """In an order that is the same for all recipes."""
        self._tokenizer = recipe.tokenizer_donor
        self.left_alone: dict[str, int] = {}
        """{step: the matrices whose inputs were not measured}, once they are made."""
        self._texts = read_texts(self.preparation.text, sources.root) if self.preparation.text else None
        self._known_orders: dict[str, list[Tensor]] = {}
        self._making = threading.Lock()  # tensors are merged side by side

    @cached_property
    def measurements(self) -> Mapping[str, Sequence[Measurement]]:
        """{step: what it needs to know of the base, or of every expert}; raises RecipeError for an unknown task."""
        found: dict[str, Sequence[Measurement]] = {}
        for name, parameters in self.preparation.complete:
            if (kind := STEPS[name].measures) and self._texts:
                read = self._read_by() if kind == "grams" else {self.base: self._texts}
                sequential = None
                if STEPS[name].sequential:
                    checksums = [self.sources.checksum(of) for of in (self.base, *read)]
                    known = reading(self.sources, self.base, *read, self._tokenizer)
                    sequential = Sequential(name, parameters, self.base, read, checksums, known)
                found[name] = [self._measurement(kind, of, texts, sequential) for of, texts in read.items()]
        return found

    def _measurement(
        self, kind: Measured, of: ModelReference, texts: Texts, sequential: Sequential | None
    ) -> Measurement:
        known = reading(self.sources, self.base, of, self._tokenizer)
        return Measurement(kind, of, self.sources.checksum(of), known, texts, sequential)

    @property
    def all_measurements(self) -> list[Measurement]:
        """Those of all steps."""
        return [of for every in self.measurements.values() for of in every]

    def _read_by(self) -> Mapping[ModelReference, Texts]:
        """Return the texts of each expert."""
        assert self._texts
        self._texts.check(self.preparation.named_tasks, called(self.preparation.text or ""))
        tasks = self.preparation.tasks or {}
        return {of: self._texts.of(tasks[of]) if of in tasks else self._texts for of in self.experts}

    @cached_property
    def digest(self) -> str:
        """A digest of all that decides the prepared weights."""
        models = [self.sources.checksum(of) for of in (self.base, *self.experts)]
        inputs = [of.folder.name for of in self.all_measurements]
        made = json.dumps([RULES, models, self.preparation.complete, inputs])
        return hashlib.sha256(made.encode()).hexdigest()[:24]

    @property
    def folder(self) -> Path:
        return cache_folder() / "prepared" / self.digest

    @cached_property
    def _file(self) -> Checkpoint:
        with self._making:
            self.make()
        return Checkpoint(self.folder)

    def weight(self, model: ModelReference, name: str, share: float = 1.0) -> Weight:
        """Return a model's weight, `share` of the way from the expert as it is to the prepared one."""
        return _sum_of(self.terms(model, name, share))

    def terms(self, model: ModelReference, name: str, share: float) -> Sequence[tuple[Weight, float]]:
        """Return such a weight as a sum: one weight, or the expert's and the prepared one, and the factor of each."""
        plain = self.sources[model].weight(name)
        if share == 0.0 or model not in self.experts:
            return [(plain, 1.0)]
        key, file = f"{self.experts.index(model)}/{name}", self._file
        if key in file.shapes:
            return _between(plain, file.tensor(key), share)
        if key + DOWN not in file.shapes:
            return [(plain, 1.0)]
        down = file.tensor(key + DOWN)
        if key + UP in file.shapes:
            prepared = LowRank(self.sources[self.base].tensor(name), file.tensor(key + UP), down)
            return _between(plain, prepared, share)
        assert isinstance(plain, LowRank)
        return [(LowRank(plain.origin, plain.up, torch.lerp(plain.down, down, share) if share < 1.0 else down), 1.0)]

    @contextmanager
    def locked(self) -> Generator[None]:
        """Let one process of the machine prepare at a time; the others wait. Raises SourceError."""
        try:
            with locked(self.folder.parent):
                yield
        except OSError as error:
            raise SourceError(f"{self.folder}: the prepared models cannot be written ({error})") from error

    def make(self) -> None:
        """Write the prepared experts where the cache lacks them.

        Raises RecipeError where the inputs are not measured or a step fits no matrix, SourceError when the cache cannot
        be written.
        """
        folder = self.folder
        if folder.exists():
            return
        permutes = any(STEPS[step].permutes for step, _ in self.preparation.complete)
        if permutes and not any(map(MLP.search, self._matrices())):
            raise RecipeError(
                f"prepare: align orders the neurons of gate_proj, up_proj and down_proj; {self.base} has none of these"
                " outside mixtures of experts; leave the step out"
            )
        measured = open_all(self.measurements)
        shapes = {f"{place}/{n}{UP}": s for place in range(2 * len(self.experts)) for n, s in self._matrices().items()}
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with partial_folder(folder) as partial:
                write_file(self._changed(measured), partial / "model.safetensors", header_size(shapes.items()))
                rename_once(partial, folder)
        except OSError as error:
            raise SourceError(f"{folder}: the prepared models cannot be written ({error})") from error

    @property
    def is_done(self) -> bool:
        """Whether the prepared experts are in the cache, and what they were made of is forgotten."""
        return self.folder.exists() and not any(of.folder.exists() for of in self._forgotten)

    @property
    def _forgotten(self) -> list[Measurement]:
        return [of for of in self.all_measurements if of.kind == "grams"]

    def forget(self) -> None:
        """Remove the products of inputs from the cache once the prepared experts are in it; only while it is `locked`.

        They are many times larger than those, and only needed again for other parameters: they are then measured again.
        """
        if self.folder.exists():
            for of in self._forgotten:
                shutil.rmtree(of.folder, ignore_errors=True)

    @property
    def without(self) -> str:
        """What the steps left as it is, once they are made: the end of a sentence, or an empty text."""
        found = [f"{step} left {plural(count, 'matrix', 'matrices')}" for step, count in self.left_alone.items()]
        return f" ({', '.join(found)} as before: no single linear layer has them)" if found else ""

    def _matrices(self) -> dict[str, tuple[int, ...]]:
        shapes = self.sources[self.base].shapes
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
        return {name: of for name, of in matrices.items() if not (VOCABULARY.search(name) or POSITIONS.search(name))}

    def _changed(self, measured: Mapping[str, Sequence[Checkpoint]]) -> Iterator[tuple[str, Tensor]]:
        """Yield what the steps change, matrix by matrix."""
        for name in self._matrices():
            base, models = self.sources[self.base].tensor(name), [self.sources[of].weight(name) for of in self.experts]
            if not base.is_floating_point() or all(isinstance(of, Tensor) and same(of, base) for of in models):
                continue
            self._check_finite(name, [base, *models])
            for place, (before, weight) in enumerate(
                zip(models, self._stepped(name, base, models, measured), strict=True)
            ):
                if weight is before:
                    continue
                if isinstance(weight, LowRank):
                    if not (isinstance(before, LowRank) and weight.up is before.up):
                        yield f"{place}/{name}{UP}", weight.up
                    yield f"{place}/{name}{DOWN}", weight.down
                else:
                    yield f"{place}/{name}", weight.to(stored(before).dtype)

    def _stepped(
        self, name: str, base: Tensor, models: Sequence[Weight], measured: Mapping[str, Sequence[Checkpoint]]
    ) -> Sequence[Weight]:
        for step, parameters in self.preparation.complete:
            inputs = self._orders(name) if STEPS[step].permutes else of_weight(name, measured.get(step, ()))
            if inputs is None or (STEPS[step].measures and not inputs):
                if STEPS[step].measures:
                    self.left_alone[step] = self.left_alone.get(step, 0) + 1
                continue
            shared = {"normalize": 0.0, "lambda": 1.0}
            group = TensorGroup(base, models, {"weight": [1.0] * len(models)}, shared, [0] * len(models))
            made = STEPS[step].prepare(group, parameters, inputs)
            # The base's own tensor stays as it is, so that no adapter grows to a whole model.
            own = [isinstance(of, Tensor) and same(of, base) and not STEPS[step].permutes for of in models]
            models = [before if kept else after for before, after, kept in zip(models, made, own, strict=True)]
        return models

    def _check_finite(self, name: str, weights: Sequence[Weight]) -> None:
        """Raise SourceError for a weight of the base or an expert that is not finite."""
        for model, weight in zip((self.base, *self.experts), weights, strict=True):
            if not is_finite_weight(weight):
                raise SourceError(
                    f"prepare: {name} of {model} is not finite (NaN or infinite); download the model again, or leave it"
                    " out"
                )

    def _orders(self, name: str) -> Sequence[Tensor] | None:
        """Return the order of each expert's neurons, for a matrix of an MLP; None for another one.

        Raises RecipeError for an MLP with biases, or a norm of its neurons, which no step changes.
        """
        found = MLP.search(name)
        if found is None:
            return None
        start, shapes = name[: found.start(1)], self.sources[self.base].shapes
        if other := next((of for of in shapes if of.startswith(start) and not MLP.search(of)), None):
            raise RecipeError(f"prepare: align cannot order the neurons of {other}; leave the step out")
        if start not in self._known_orders:

            def read(of: ModelReference) -> Callable[[str], Tensor]:
                return lambda projection: _dense(self.sources[of].weight(f"{start}{projection}.weight"))

            own = [matrix[1] for of in shapes if of.startswith(start) and (matrix := MLP.search(of))]
            base = read(self.base)
            self._known_orders = {start: [order_of(base, read(of), own) for of in self.experts]}
        return [of_matrix(found[1], order) for order in self._known_orders[start]]


def _dense(weight: Weight) -> Tensor:
    return weight.dense() if isinstance(weight, LowRank) else weight.float()


def _between(plain: Weight, prepared: Weight, share: float) -> Sequence[tuple[Weight, float]]:
    return [(prepared, 1.0)] if share == 1.0 else [(plain, 1.0 - share), (prepared, share)]


def _sum_of(terms: Sequence[tuple[Weight, float]]) -> Weight:
    """Return the sum, of weights whose factors add up to 1; low-rank if all are, over the same tensor."""
    weights, factors = zip(*terms, strict=True)
    first = weights[0]
    if len(weights) == 1:
        return first
    if not all(isinstance(of, LowRank) and same(of.origin, stored(first)) for of in weights):
        return weighted_sum(weights, factors, None, torch.float32)
    ups = torch.cat([of.up * factor for of, factor in terms if isinstance(of, LowRank)], dim=1)
    return LowRank(stored(first), ups, torch.cat([of.down for of in weights if isinstance(of, LowRank)]))
