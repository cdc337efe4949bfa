"""Landscapes of real merges: recipes that answered questions of a large pool, and a model of what any recipe answers.

    python benchmarks/landscapes.py collect NAME [--recipes N]   # scores what is missing; continues where it stopped
    python benchmarks/landscapes.py check NAME                   # the model against recipes that it was not fitted to

NAME is a config in `benchmarks/landscapes/`: quickstart, many, trimming or overlap. A line of
`benchmarks/results/landscapes/NAME.jsonl` is a recipe and its right answers. Each recipe is asked 40 of the 200
questions of a task, drawn from its number; the recipes of `check` are asked all questions.

`load(NAME)` returns a `Landscape`, on which a search of many evaluations takes seconds. It is an item response model:
question i of a task is answered right when

    ability(recipe) + field_i(recipe) > difficulty_i

`ability` is a Gaussian process over the genes, one for each task, fitted to the answers by penalized quasi-likelihood
(Breslow and Clayton 1993, https://doi.org/10.1080/01621459.1993.10594284) together with the difficulties. `field_i`,
standard normal, is a random field over the genes of each question's own: similar recipes answer the same questions. Its
length scale is the most probable one for pairs of recipes that were asked the same question. A recipe's true score is
its mean accuracy on endlessly many questions with these difficulties.
"""

import argparse
import hashlib
import json
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import measurements
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.special import ndtr
from scipy.stats import norm, qmc, spearmanr

from llmevo.config import read_config
from llmevo.errors import CandidateError
from llmevo.run.scorer import Scorer
from llmevo.search.space import SearchSpace

HERE = Path(__file__).parent
CONFIGS, RESULTS = HERE / "landscapes", HERE / "results" / "landscapes"
RECIPES = {"quickstart": 300, "many": 600, "trimming": 300, "overlap": 300}
"""The landscapes, and how many recipes each is fitted to."""

POOL = 200
"""Questions of a task in the pool."""
ASKED = 40
"""Questions of a task that a recipe is asked."""
CHECKS, EVERY = 24, 12
"""Recipes that are asked the whole pool, and after how many others each of them comes."""
REFIT = 25
"""Recipes after which the model of the total is fitted anew."""

Array = NDArray[np.float64]


# The Gaussian process


def feature_groups(space: SearchSpace) -> list[Array]:
    """Return matrices (features, genes) that map a point to its features: the mean of each parameter's genes, their
    means by model, by model and slice, by model and filter, and the genes themselves.

    Merges depend mostly on the common scale, then on the scale of each model. A kernel that is a sum over these groups
    learns that from few recipes even where there are many genes.
    """
    keys: list[list[Any]] = [
        [gene.parameter for gene in space.genes],
        [(gene.model, gene.parameter) for gene in space.genes],
        [(gene.model, gene.slice, gene.parameter) for gene in space.genes],
        [(gene.model, gene.filter, gene.parameter) for gene in space.genes],
        [gene.name for gene in space.genes],
    ]
    found: list[Array] = []
    for key in keys:
        names = [*dict.fromkeys(key)]
        matrix = np.array([[float(own == name) for own in key] for name in names])
        matrix /= matrix.sum(axis=1, keepdims=True)
        if not any(matrix.shape == other.shape and np.allclose(matrix, other) for other in found):
            found.append(matrix)
    return found


ROOT5 = np.sqrt(5.0)
MOST_SCALES = 20
"""Features of a group with a length scale for each; larger groups have one for all."""
CONSTANT = 4.0
"""The prior variance of the mean."""


class Process:
    """A Gaussian process with a sum of Matérn 5/2 kernels, one for each group of features, and known noise.

    The kernel's parameters maximize the marginal likelihood under log-normal priors.
    """

    def __init__(self, groups: Sequence[Array]) -> None:
        self.groups = groups
        self._sizes = [len(matrix) if len(matrix) <= MOST_SCALES else 1 for matrix in groups]
        self._centre = np.concatenate(
            [
                [-2.0, *[np.log(0.5 * np.sqrt(len(matrix)) * self._spread(matrix))] * size]
                for matrix, size in zip(groups, self._sizes, strict=True)
            ]
        )
        self.parameters = self._centre.copy()
        """For each group the logarithms of its variance and its length scales."""

    @staticmethod
    def _spread(matrix: Array) -> float:
        """The range of a feature against a gene's: means of many genes vary less."""
        return float(np.sqrt((matrix**2).sum(axis=1).mean())) ** 0.5

    def split(self, parameters: Array) -> list[tuple[float, Array]]:
        parts = np.split(parameters, np.cumsum([1 + size for size in self._sizes])[:-1])
        return [(float(np.exp(part[0])), np.exp(part[1:])) for part in parts]

    def fit(self, points: Array, values: Array, noise: Array, steps: int = 40) -> "Process":
        """`values` and `noise` (variances), one for each point. `steps` is 0 to keep the kernel as it is."""
        self.points, self._inputs = points, [points @ matrix.T for matrix in self.groups]
        if steps:
            bounds = [(c - 5.0, c + 5.0) for c in self._centre]
            found = minimize(
                self.objective,
                self.parameters,
                (values, noise),
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                options={"maxiter": steps},
            )
            self.parameters = np.asarray(found.x)
        kernel = self._kernel(self._inputs, self.parameters) + np.diag(noise)
        self._factor = cho_factor(kernel, lower=True)
        self.weights = np.asarray(cho_solve(self._factor, values))
        return self

    def _kernel(self, inputs: Sequence[Array], parameters: Array, others: Sequence[Array] | None = None) -> Array:
        total = np.array(CONSTANT)
        for place, (variance, lengths) in enumerate(self.split(parameters)):
            other = inputs[place] if others is None else others[place]
            far = ROOT5 * cdist(inputs[place] / lengths, other / lengths)
            total = total + variance * (1 + far + far**2 / 3) * np.exp(-far)
        return total

    def objective(self, parameters: Array, values: Array, noise: Array) -> tuple[float, Array]:
        """The negative logarithm of the posterior of the kernel's parameters, and its gradient."""
        parts, slopes = list[Array](), list[Array]()
        kernel = CONSTANT + np.diag(noise + 1e-9)
        for inputs, (variance, lengths) in zip(self._inputs, self.split(parameters), strict=True):
            scaled = inputs / lengths
            far = ROOT5 * cdist(scaled, scaled)
            fall = variance * np.exp(-far)
            parts.append((1 + far + far**2 / 3) * fall)
            slopes.append((1 + far) * fall)
            kernel = kernel + parts[-1]
        factor = cho_factor(kernel, lower=True)
        weights = cho_solve(factor, values)
        inner = cho_solve(factor, np.eye(len(values))) - np.outer(weights, weights)
        gradient: list[float] = []
        for inputs, part, slope, (_, lengths) in zip(self._inputs, parts, slopes, self.split(parameters), strict=True):
            gradient.append(0.5 * float((inner * part).sum()))
            pull = inner * slope * (5 / 6)
            rows = pull.sum(axis=1)
            # Σ pull (x - x')² without a matrix of differences for each feature
            by_feature = 2 * ((rows[:, None] * inputs**2).sum(axis=0) - (inputs * (pull @ inputs)).sum(axis=0))
            along = by_feature / lengths**2
            gradient += [*along] if len(lengths) > 1 or len(along) == 1 else [float(along.sum())]
        off = parameters - self._centre
        value = 0.5 * float(values @ weights) + float(np.log(np.diag(factor[0])).sum()) + 0.5 * float(off @ off)
        return value, np.array(gradient) + off

    def mean(self, points: Array) -> Array:
        return self._kernel([points @ matrix.T for matrix in self.groups], self.parameters, self._inputs) @ self.weights

    def posterior(self, points: Array) -> tuple[Array, Array]:
        """Mean and covariance."""
        inputs = [points @ matrix.T for matrix in self.groups]
        across = self._kernel(inputs, self.parameters, self._inputs)
        half = np.asarray(solve_triangular(self._factor[0], across.T, lower=True))
        return across @ self.weights, self._kernel(inputs, self.parameters) - half.T @ half


# Collection


def drawn(number: int, task: int) -> list[int]:
    """The places of the questions of a task that recipe `number` is asked."""
    return sorted(np.random.default_rng([7, number, task]).choice(POOL, ASKED, replace=False).tolist())


@dataclass(frozen=True)
class Table:
    """The recipes of a landscape and their answers."""

    points: Array
    """(recipes, genes), in unit coordinates."""
    right: Mapping[str, Array]
    """{task: (recipes, pool)}: 1 for a right answer, 0 for a wrong one, NaN where the question was not asked."""

    @property
    def totals(self) -> Array:
        return np.mean([np.nanmean(right, axis=1) for right in self.right.values()], axis=0)

    @property
    def noise(self) -> Array:
        """The variances of the totals."""
        variances: list[Array] = []
        for right in self.right.values():
            count = np.isfinite(right).sum(axis=1)
            share = (np.nansum(right, axis=1) + 0.5) / (count + 1)
            variances.append(share * (1 - share) / count)
        return np.sum(variances, axis=0) / len(variances) ** 2


def config_of(name: str) -> Path:
    return CONFIGS / f"{name.partition('@')[0]}.yml"


def scorer_of(name: str) -> Scorer:
    return Scorer(read_config(config_of(name)), CONFIGS)


def lines_of(name: str) -> list[dict[str, Any]]:
    return measurements.read(RESULTS / f"{name}.jsonl")


def table_of(lines: Sequence[Mapping[str, Any]], space: SearchSpace) -> Table:
    lines = [line for line in lines if "right" in line]
    names = [gene.name for gene in space.genes]
    points = [space.to_unit(dict(zip(names, line["genes"], strict=True))) for line in lines]
    right = {task: np.full((len(lines), POOL), np.nan) for task in (lines[0]["right"] if lines else ())}
    for row, line in enumerate(lines):
        for place, (task, answers) in enumerate(line["right"].items()):
            asked = range(POOL) if len(answers) == POOL else drawn(line["number"], place)
            right[task][row, asked] = [int(answer) for answer in answers]
    return Table(np.array(points).reshape(len(lines), len(names)), right)


class Proposer:
    """The recipes to score: a third anywhere in the box, the others where searches go.

    Half of the points in the box have one scale for all weights, times noise of each gene. Points of searches are, in
    turn, the best one of a sample of the posterior of the totals (Thompson sampling), the one with the highest upper
    confidence bound, and steps from the expected best point or the expected best common weight. What is proposed
    depends on the recipes of complete batches of `REFIT` alone, so a collection that was interrupted goes on as if it
    had not been.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.weight = np.array([gene.parameter == "weight" for gene in space.genes])
        self._box = qmc.Sobol(len(space.genes) + 1, seed=0).random(1 << 10)
        self._uniform = space.to_unit(space.uniform())
        self._process = Process(feature_groups(space))
        self._fitted = 0

    def common(self, values: Array) -> Array:
        """The points with these unit coordinates for all weights; all else is as in the uniform merge."""
        return np.where(self.weight, values[:, None], self._uniform)

    def point(self, number: int, known: Table, check: int | None = None) -> tuple[str, Array]:
        """The kind and the point of recipe `number`, or of a recipe of `check` that follows it."""
        turn = number if check is None else check
        rng = np.random.default_rng([number, int(check is not None)])
        size = len(self.weight)
        if turn % 3 == 0:
            row = self._box[turn // 3 + (0 if check is None else 512)]
            if turn % 6 == 0:
                return "anywhere", row[:size]
            noisy = row[size] * (1 + 0.4 * rng.standard_normal(size))
            return "scale", np.clip(np.where(self.weight, noisy, row[:size]), 0, 1)
        usable = number // REFIT * REFIT
        if not usable:
            return "start", np.clip(self._uniform + 0.25 * rng.standard_normal(size), 0, 1)
        if usable != self._fitted:
            self._fit(Table(known.points[:usable], {t: right[:usable] for t, right in known.right.items()}))
            self._fitted = usable
        kind = ("thompson", "step", "confidence", "coefficient")[rng.integers(4)]
        step = (0.1, 0.25)[rng.integers(2)]
        if kind in ("step", "coefficient"):
            centre = self._best if kind == "step" else self._coefficient
            return kind, np.clip(centre + step * rng.standard_normal(size), 0, 1)
        pool = self._candidates(rng)
        mean, covariance = self._process.posterior(pool)
        if kind == "confidence":
            return kind, pool[np.argmax(mean + rng.uniform(0.0, 2.0) * np.sqrt(np.maximum(np.diag(covariance), 0)))]
        values, vectors = np.linalg.eigh(covariance)
        sample = mean + vectors @ (np.sqrt(np.maximum(values, 0)) * rng.standard_normal(len(pool)))
        return kind, pool[np.argmax(sample)]

    def _fit(self, known: Table) -> None:
        totals = known.totals
        scale = totals.std() + 1e-9
        self._process = Process(self._process.groups)
        process = self._process.fit(known.points, (totals - totals.mean()) / scale, known.noise / scale**2)
        grid = self.common(np.linspace(0, 1, 101))
        self._coefficient = grid[np.argmax(process.mean(grid))]
        order = np.argsort(-process.mean(known.points))
        self._known = known.points[order[:10]]
        self._best = self._known[0]
        for spread in (0.2, 0.1, 0.05):  # uphill from the best known
            around = self._around(np.random.default_rng(self._fitted), spread, 400)
            pool = np.vstack([self._best[None], around])
            self._best = pool[np.argmax(process.mean(pool))]
            self._known = np.vstack([self._best[None], self._known])

    def _around(self, rng: np.random.Generator, spread: float, count: int) -> Array:
        """Points around good ones: all genes or a few moved."""
        size = len(self.weight)
        centres = self._known[rng.integers(len(self._known), size=count)]
        moved = rng.random((count, size)) < rng.choice([1.0, 0.3], size=(count, 1))
        return np.clip(centres + spread * moved * rng.standard_normal((count, size)), 0, 1)

    def _candidates(self, rng: np.random.Generator) -> Array:
        size = len(self.weight)
        scales = rng.random((100, 1)) * (1 + 0.4 * rng.standard_normal((100, size)))
        scaled = np.clip(np.where(self.weight, scales, rng.random((100, size))), 0, 1)
        near = np.clip(self._coefficient + 0.2 * rng.standard_normal((100, size)), 0, 1)
        return np.vstack([scaled, near, self._around(rng, 0.1, 150), self._around(rng, 0.25, 150)])


def collect(options: argparse.Namespace) -> None:
    """Score the recipes that the file lacks."""
    import torch

    torch.set_num_threads(1)
    name: str = options.name
    count = options.recipes or RECIPES[name]
    scorer = scorer_of(name)
    space, evaluator = scorer.space, scorer.evaluator
    tasks = [task.name for task in evaluator.tasks]
    lines = lines_of(name)
    proposer = Proposer(space)
    file = RESULTS / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)

    def scored(number: int, check: int | None = None) -> None:
        is_check = check is not None
        known = table_of([line for line in lines if "number" in line], space)
        kind, point = proposer.point(number, known, check)
        genes = {gene: round(value, 4) for gene, value in space.from_unit(point).items()}
        line: dict[str, Any] = {"check" if is_check else "number": number, "kind": kind, "genes": [*genes.values()]}
        evaluator.blocks = [
            {task: [*range(POOL)] if is_check else drawn(number, place) for place, task in enumerate(tasks)}
        ]
        vars(evaluator).pop("same", None)  # of the questions of the recipe before
        try:
            scorer.engine.swap(space.decode(genes))
            score = evaluator.score(scorer.engine.lm)
        except CandidateError as error:
            line["failed"] = str(error)
        else:
            line["right"] = {task: "".join(str(int(v)) for v in score.item_scores[task]) for task in tasks}
            print(f"{name} {'check ' * is_check}{number}/{count} {kind}: {score.total:.3f}", flush=True)
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        lines.append(line)

    done = {("check" in line, line["check" if "check" in line else "number"]) for line in lines}
    for number in range(count):
        if (False, number) not in done:
            scored(number)
        check = (number + 1) // EVERY - 2
        if (number + 1) % EVERY == 0 and 0 <= check < CHECKS and (True, number) not in done:
            scored(number, check)


# The landscape


class Place(NamedTuple):
    """A point in unit coordinates and its true score."""

    point: Array
    truth: float


class Coefficient(NamedTuple):
    """A weight that all models have in common and its true score; all other genes are as in the uniform merge."""

    weight: float
    truth: float


GRID = np.linspace(-8.0, 8.0, 6401)
"""Abilities at which the mean accuracy is tabulated."""
FEATURES = 1024
"""Random Fourier features of the questions' fields (Rahimi and Recht 2007)."""
SCALES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 1.6, 2.4, 3.2, np.inf)
"""Length scales of the questions' fields to choose from."""
SMOOTHNESS = (0.5, 1.5, np.inf)
"""Their Matérn kernels' parameters to choose from."""
PAIRED = 40_000
"""Pairs of answers that these are estimated from."""
NEIGHBOURS = 10
"""Of a recipe, that half of these pairs are with."""
KEPT_FIELDS = 64
"""Fields of (task, seed) that stay in memory."""


@dataclass(frozen=True)
class FieldKernel:
    """The correlation of a question's field at two points: Matérn in √(|Δ genes|² / genes² + |Δ means|² / means²),
    where the means are those of each model's weights.
    """

    genes: float
    means: float
    smoothness: float

    def correlations(self, gene_distances: Array, mean_distances: Array) -> Array:
        """From squared distances."""
        far = np.sqrt(gene_distances / self.genes**2 + mean_distances / self.means**2)
        if self.smoothness == 0.5:
            return np.exp(-far)
        if self.smoothness == 1.5:
            return (1 + np.sqrt(3) * far) * np.exp(-np.sqrt(3) * far)
        return np.exp(-(far**2) / 2)

    def waves(self, rng: np.random.Generator, genes: int, means: Array) -> Array:
        """Draw frequencies (genes, FEATURES) from the kernel's spectral density."""
        found = rng.standard_normal((genes, FEATURES)) / self.genes
        found += means.T @ rng.standard_normal((len(means), FEATURES)) / self.means
        if np.isfinite(self.smoothness):  # multivariate t with 2ν degrees of freedom
            found /= np.sqrt(rng.chisquare(2 * self.smoothness, FEATURES) / (2 * self.smoothness))
        return found


class Landscape:
    """Answers questions as the merges of one search space do. Points are in unit coordinates, one row each."""

    def __init__(self, space: SearchSpace, table: Table, cache: Path | None = None) -> None:
        """Fit the model to the recipes of `table`, or read the fit from the file `cache`, which is written if it is not
        there.
        """
        self.space, self.tasks, self._points = space, [*table.right], table.points
        self._groups = feature_groups(space)
        self._means = self._groups[1]
        self._fields: OrderedDict[tuple[str, int], tuple[Array, Array, np.random.Generator, Array]] = OrderedDict()
        self._seen: tuple[bytes, Array] = b"", np.empty(0)
        fit = dict(np.load(cache)) if cache and cache.exists() else self._fit(table)
        self.difficulties: dict[str, Array] = dict(zip(self.tasks, fit["difficulties"], strict=True))
        """{task: difficulties of the questions of the pool}."""
        self.field = FieldKernel(*fit["field"].tolist())
        self._prepare(fit["parameters"], fit["weights"])
        if "optimum" not in fit:
            best = self._maximize(table)
            fit |= {"optimum": best.point, "highest": np.array(best.truth)}
        self.optimum = Place(fit["optimum"], float(fit["highest"]))
        """The highest true score: of many starts of a local search on `truth`."""
        if cache and not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            np.savez(cache, **fit)  # type: ignore[arg-type]

    # What it is asked

    def truth(self, points: Array) -> Array:
        """The mean accuracy on endlessly many questions."""
        abilities = self._abilities(points)
        return np.mean([np.interp(a, GRID, c) for a, c in zip(abilities.T, self._curves, strict=True)], axis=0)

    def accuracy(self, task: str, points: Array) -> Array:
        """The accuracy on endlessly many questions of a task."""
        return np.interp(self.ability(task, points), GRID, self._curves[self.tasks.index(task)])

    def ability(self, task: str, points: Array) -> Array:
        """The difficulty of a question that is answered right in half of the cases."""
        return self._abilities(points)[:, self.tasks.index(task)]

    def answers(self, task: str, points: Array, difficulties: Array, seed: int) -> Array:
        """Return which point gets which question right (points, questions), as 0 and 1; another `seed` makes other
        questions of the same difficulties.
        """
        field = self._field(task, points, len(difficulties), seed)
        return (self.ability(task, points)[:, None] + field > difficulties).astype(float)

    def common(self, weights: Array) -> Array:
        """Return the points with these weights for all models; all other genes are as in the uniform merge."""
        uniform = self.space.to_unit(self.space.uniform())
        rows = np.tile(uniform, (len(weights), 1))
        for place, gene in enumerate(self.space.genes):
            if gene.parameter == "weight":
                rows[:, place] = (weights - gene.low) / (gene.high - gene.low)
        return rows

    @cached_property
    def coefficient(self) -> Coefficient:
        """The best weight that all models have in common, of a thousand."""
        gene = next(gene for gene in self.space.genes if gene.parameter == "weight")
        weights = np.linspace(gene.low, gene.high, 1201)
        truths = self.truth(self.common(weights))
        return Coefficient(float(weights[np.argmax(truths)]), float(truths.max()))

    # How it answers

    def _prepare(self, parameters: Array, weights: Array) -> None:
        """The kernels of all tasks, task by task in the last axis."""
        self._weights = weights.T  # (recipes, tasks)
        inputs = [self._points @ matrix.T for matrix in self._groups]
        self._kernels: list[tuple[Array, Array, Array, Array]] = []
        splits = [Process(self._groups).split(own) for own in parameters]
        for place, (matrix, known) in enumerate(zip(self._groups, inputs, strict=True)):
            variances = np.array([split[place][0] for split in splits])
            inverse = np.array([5 / split[place][1] ** 2 for split in splits]).T  # (features or 1, tasks)
            self._kernels.append((matrix, known, variances, inverse))
        self._curves = [ndtr(GRID[:, None] - self.difficulties[task]).mean(axis=1) for task in self.tasks]

    def _abilities(self, points: Array) -> Array:
        """(points, tasks)"""
        points = np.ascontiguousarray(points, dtype=np.float64)
        key = points.tobytes()
        if self._seen[0] != key:
            parts = [self._some_abilities(points[at : at + 64]) for at in range(0, len(points), 64)]
            self._seen = key, np.concatenate(parts)
        return self._seen[1]

    def _some_abilities(self, points: Array) -> Array:
        total = np.full((len(points), *self._weights.shape), CONSTANT)
        for matrix, known, variances, inverse in self._kernels:
            own = points @ matrix.T
            if len(inverse) == 1:
                squares = cdist(own, known, "sqeuclidean")[:, :, None] * inverse
            else:
                squares = (own[:, None] - known[None]) ** 2 @ inverse
            far = np.sqrt(squares)
            total += variances * (1 + far + squares / 3) * np.exp(-far)
        return (total * self._weights).sum(axis=1)

    def _field(self, task: str, points: Array, count: int, seed: int) -> Array:
        """The fields of `count` questions (points, questions)."""
        key = task, seed
        if key not in self._fields:
            rng = np.random.default_rng([*task.encode(), seed])
            waves = self.field.waves(rng, len(self.space.genes), self._means)
            phases = rng.uniform(0, 2 * np.pi, FEATURES)
            self._fields[key] = waves, phases, rng, np.empty((0, FEATURES))
            if len(self._fields) > KEPT_FIELDS:
                self._fields.popitem(last=False)
        waves, phases, rng, weights = self._fields[key]
        if len(weights) < count:  # the first questions stay the same
            weights = np.vstack([weights, rng.standard_normal((count - len(weights), FEATURES))])
            self._fields[key] = waves, phases, rng, weights
        return np.sqrt(2 / FEATURES) * np.cos(points @ waves + phases) @ weights[:count].T

    # The fit

    def _fit(self, table: Table) -> dict[str, Array]:
        fits = [item_response(self._groups, table.points, right) for right in table.right.values()]
        abilities = np.array([process.mean(table.points) for process, _ in fits])
        difficulties = np.array([found for _, found in fits])
        field = self._fit_field(table, abilities, difficulties)
        return {
            "difficulties": difficulties,
            "parameters": np.array([process.parameters for process, _ in fits]),
            "weights": np.array([process.weights for process, _ in fits]),
            "field": np.array([field.genes, field.means, field.smoothness]),
        }

    def _fit_field(self, table: Table, abilities: Array, difficulties: Array) -> FieldKernel:
        """The most probable kernel for pairs of answers to a question: half of them of neighbours."""
        rng, size = np.random.default_rng(0), len(table.points)
        means = table.points @ self._means.T
        near = np.argsort(cdist(table.points, table.points), axis=1)[:, 1 : NEIGHBOURS + 1]
        ones = rng.integers(size, size=20_000)
        others = np.where(
            np.arange(20_000) % 2, near[ones, rng.integers(near.shape[1], size=20_000)], rng.integers(size, size=20_000)
        )
        ones, others = ones[ones != others], others[ones != others]
        gathered: list[Array] = []
        for task, right in enumerate(table.right.values()):
            rows, questions = np.nonzero(np.isfinite(right[ones]) & np.isfinite(right[others]))
            kept = rng.choice(len(rows), min(len(rows), PAIRED // len(self.tasks)), replace=False)
            one, other, question = ones[rows[kept]], others[rows[kept]], questions[kept]
            gathered.append(
                np.array(
                    [
                        abilities[task, one] - difficulties[task, question],
                        abilities[task, other] - difficulties[task, question],
                        right[one, question] == right[other, question],
                        ((table.points[one] - table.points[other]) ** 2).sum(axis=1),
                        ((means[one] - means[other]) ** 2).sum(axis=1),
                    ]
                )
            )
        first, second, same, gene_distances, mean_distances = np.concatenate(gathered, axis=1)

        def likelihood(kernel: FieldKernel) -> float:
            both = both_right(first, second, np.minimum(kernel.correlations(gene_distances, mean_distances), 0.9999))
            agree = np.clip(1 - ndtr(first) - ndtr(second) + 2 * both, 1e-4, 1 - 1e-4)
            return float(np.log(np.where(same > 0, agree, 1 - agree)).sum())

        kernels = [FieldKernel(g, m, s) for s in SMOOTHNESS for g in SCALES for m in SCALES if np.isfinite(min(g, m))]
        return max(kernels, key=likelihood)

    def _maximize(self, table: Table, starts: int = 12) -> Place:
        """Local searches from good recipes, from the best common weights and from the best of many random points."""
        rng, size = np.random.default_rng(0), len(self.space.genes)
        gene = next(gene for gene in self.space.genes if gene.parameter == "weight")
        alike = self.common(np.linspace(gene.low, gene.high, 61))
        scattered = np.clip(alike[rng.integers(61, size=2000)] + 0.2 * rng.standard_normal((2000, size)), 0, 1)
        pools = [table.points, alike, np.vstack([scattered, rng.random((2000, size))])]
        best = [pool[np.argsort(-self.truth(pool))[: starts // 3]] for pool in pools]
        step = 1e-4

        def objective(point: Array) -> tuple[float, Array]:
            inward = np.where(point > 0.5, -step, step)
            values = self.truth(np.vstack([point, point + np.diag(inward)]))
            return -float(values[0]), -(values[1:] - values[0]) / inward

        bounds = [(0.0, 1.0)] * size
        found = [
            minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 100})
            for start in np.vstack(best)
        ]
        highest = min(found, key=lambda result: result.fun)
        return Place(np.asarray(highest.x), -float(highest.fun))


def both_right(first: Array, second: Array, correlation: Array) -> Array:
    """The bivariate normal distribution function (Drezner and Wesolowsky 1990), correlations from 0 to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    widest = np.arcsin(correlation)
    total = np.zeros(len(first))
    for node, weight in zip(nodes, weights, strict=True):
        angle = widest * (node + 1) / 2
        sine = np.sin(angle)
        total += weight * np.exp(-(first**2 - 2 * first * second * sine + second**2) / (2 * (1 - sine**2)))
    return ndtr(first) * ndtr(second) + total * widest / (4 * np.pi)


TURNS = 6
"""Alternations between abilities and difficulties."""


def item_response(groups: Sequence[Array], points: Array, right: Array) -> tuple[Process, Array]:
    """Fit P(right) = Φ(ability(point) - difficulty) to answers (points, questions) with NaN for what was not asked.

    Returns the process of the ability and the difficulties, whose mean is 0.
    """
    asked = np.isfinite(right)
    answers = np.nan_to_num(right)
    ability = norm.ppf((answers.sum(axis=1) + 0.5) / (asked.sum(axis=1) + 1))
    difficulty = -norm.ppf((answers.sum(axis=0) + 0.5) / (asked.sum(axis=0) + 1))
    difficulty -= difficulty.mean()
    variance = float(difficulty.var())
    process = Process(groups)

    def derivatives() -> tuple[Array, Array]:
        """Of the log-likelihood by the gap of ability and difficulty, and its information, answer by answer."""
        gap = np.clip(ability[:, None] - difficulty, -5, 5)
        chance, density = ndtr(gap), norm.pdf(gap)
        spread = chance * (1 - chance)
        return asked * density * (answers - chance) / spread, asked * density**2 / spread

    certainty = np.ones_like(difficulty)
    for turn in range(TURNS):
        for _ in range(4):
            slopes, informations = derivatives()
            certainty = informations.sum(axis=0) + 1 / variance
            difficulty = difficulty - np.clip((slopes.sum(axis=0) + difficulty / variance) / certainty, -1, 1)
        variance = float((difficulty**2 + 1 / certainty).mean())
        shift = difficulty.mean()
        difficulty, ability = difficulty - shift, ability - shift
        for step in range(5):
            slopes, informations = derivatives()
            slope, information = slopes.sum(axis=1), informations.sum(axis=1) + 1e-3
            working = ability + np.clip(slope / information, -2, 2)  # the answers as values with normal noise
            process.fit(points, working, 1 / information, steps=40 if step == 4 and turn % 2 == 0 else 0)
            ability = process.mean(points)
    # Estimates of difficulties vary less than the difficulties.
    return process, difficulty * np.sqrt(variance) / difficulty.std()


def load(name: str) -> Landscape:
    """The landscape of a name in `RECIPES`, fitted to the recipes that are there, or with `NAME@N` to the first N of
    them, as it was before the others came; the fit is kept in the folder of temporary files. Raises ValueError without
    recipes.
    """
    name, _, first = name.partition("@")
    lines = [line for line in lines_of(name) if "number" in line][: int(first) if first else None]
    if not lines:
        raise ValueError(f"{name} has no recipes; run: python benchmarks/landscapes.py collect {name}")
    space = scorer_of(name).space
    text = json.dumps(lines) + config_of(name).read_text() + Path(__file__).read_text()
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / "llmevo-landscapes" / f"{name}-{digest}.npz"
    return Landscape(space, table_of(lines, space), cache)


EARLIER = HERE / "results" / "quickstart-recipes.jsonl"
"""Recipes of the quickstart, all asked the same questions: the quickstart's own."""

REAL_GAP = 0.731, 0.639
"""Search and held-out score of the best of 60 candidates of cma-es in the quickstart, on 160 search questions."""


def check(options: argparse.Namespace) -> None:
    """Predicted true scores of the recipes of `check` against their scores on the whole pool; simulated searches."""
    name: str = options.name
    landscape = load(name)
    space = landscape.space
    known, checks = (table_of([line for line in lines_of(name) if kind in line], space) for kind in ("number", "check"))
    print(f"{name}: {len(known.points)} recipes, {len(space.genes)} genes, {len(checks.points)} recipes of check")
    lowest, highest, noise = known.totals.min(), known.totals.max(), np.sqrt(known.noise).mean()
    print(f"scores of these recipes {lowest:.3f} to {highest:.3f}, their error {noise:.3f}")
    predicted, real = landscape.truth(checks.points), checks.totals
    print(f"rank correlation {_interval(predicted, real)}")
    for task in landscape.tasks:
        share = checks.right[task].mean(axis=1)
        found = _interval(landscape.accuracy(task, checks.points), share)
        print(f"  {task}: {found}, scores {share.min():.2f} to {share.max():.2f}")
    noise = np.sqrt(checks.noise.mean())
    error = np.sqrt(((predicted - real) ** 2).mean())
    print(f"whole-pool scores {real.min():.3f} to {real.max():.3f}, their own error {noise:.3f}")
    print(f"error of the prediction {error:.3f}, mean {np.mean(predicted - real):+.3f}")
    rng = np.random.default_rng(0)
    noisy = [spearmanr(real, real + np.sqrt(checks.noise) * rng.standard_normal(len(real)))[0] for _ in range(500)]
    print(f"rank correlation of these scores with a repetition on other questions, about {np.mean(noisy):.3f}")
    gene, (point, highest) = landscape.coefficient, landscape.optimum
    print(f"field {landscape.field}")
    print(f"optimum {highest:.3f} at {np.round(point, 2).tolist()}")
    print(f"best common weight {gene.weight:.3f}: {gene.truth:.3f}")
    if name == "quickstart":
        _check_other_questions(landscape)
    if options.seeds:
        from simulator import Rules, simulated  # its search driver

        found = [simulated(landscape, space, "cma-es", Rules(), 60, seed, 32) for seed in range(options.seeds)]  # type: ignore[arg-type]
        searched = [max(np.mean([a.mean() for a in one.values()]) for one in each.answers) for each in found]
        truths = [each.curve[-1] for each in found]
        gaps = np.subtract(searched, truths)
        print(
            f"best of 60 of cma-es on 160 questions: {np.mean(searched):.3f} searched, {np.mean(truths):.3f} true,"
            f" gap {gaps.mean():.3f} ± {gaps.std(ddof=1):.3f} (standard deviation of {len(gaps)} seeds);"
            f" in the real quickstart {REAL_GAP[0]:.3f}, {REAL_GAP[1]:.3f} and {REAL_GAP[0] - REAL_GAP[1]:.3f}"
        )


def _check_other_questions(landscape: Landscape) -> None:
    """Recipes that were scored on the quickstart's own search questions."""
    rows = [row for row in measurements.read(EARLIER) if "right" in row]
    names = [gene.name for gene in landscape.space.genes]
    points = np.array([landscape.space.to_unit(dict(zip(names, row["genes"], strict=True))) for row in rows])
    answers = [[[int(c) for c in text] for text in row["right"].values()] for row in rows]
    real, predicted = np.mean(answers, axis=(1, 2)), landscape.truth(points)
    more, top = real - predicted, np.argsort(-real)[:10]
    print(f"{len(rows)} other recipes on the quickstart's 160 search questions: {_interval(predicted, real)};")
    print(f"  real minus predicted {more.mean():+.3f}, of the ten with the highest scores {more[top].mean():+.3f}")


def _interval(one: Array, other: Array) -> str:
    """The rank correlation with a bootstrap interval of 95 %."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(len(one), size=len(one)) for _ in range(2000)]
    low, high = np.nanquantile([spearmanr(one[rows], other[rows])[0] for rows in drawn], (0.025, 0.975))
    return f"{spearmanr(one, other)[0]:.3f} ({low:.3f} to {high:.3f})"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    collecting = commands.add_parser("collect", help="score real recipes; continues where it stopped")
    collecting.add_argument("name", choices=[*RECIPES])
    collecting.add_argument("--recipes", type=int, help=f"by default {RECIPES}")
    collecting.set_defaults(command=collect)
    checking = commands.add_parser("check", help="the model against recipes that it was not fitted to")
    checking.add_argument("name", choices=[*RECIPES])
    checking.add_argument("--seeds", type=int, default=10, help="simulated searches; 0 for none")
    checking.set_defaults(command=check)
    return made


def main() -> None:
    options = parser().parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
