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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.special import log_ndtr, ndtr
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

    def _split(self, parameters: Array) -> list[tuple[float, Array]]:
        parts = np.split(parameters, np.cumsum([1 + size for size in self._sizes])[:-1])
        return [(float(np.exp(part[0])), np.exp(part[1:])) for part in parts]

    def fit(self, points: Array, values: Array, noise: Array, steps: int = 40) -> "Process":
        """`values` and `noise` (variances), one for each point. `steps` is 0 to keep the kernel as it is."""
        self.points, self._inputs = points, [points @ matrix.T for matrix in self.groups]
        if steps:
            bounds = [(c - 5.0, c + 5.0) for c in self._centre]
            found = minimize(
                self._objective,
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
        for place, (variance, lengths) in enumerate(self._split(parameters)):
            other = inputs[place] if others is None else others[place]
            far = ROOT5 * cdist(inputs[place] / lengths, other / lengths)
            total = total + variance * (1 + far + far**2 / 3) * np.exp(-far)
        return total

    def _objective(self, parameters: Array, values: Array, noise: Array) -> tuple[float, Array]:
        """The negative logarithm of the posterior of the kernel's parameters, and its gradient."""
        parts, slopes = list[Array](), list[Array]()
        kernel = CONSTANT + np.diag(noise + 1e-9)
        for inputs, (variance, lengths) in zip(self._inputs, self._split(parameters), strict=True):
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
        for inputs, part, slope, (_, lengths) in zip(self._inputs, parts, slopes, self._split(parameters), strict=True):
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
    return CONFIGS / f"{name}.yml"


def scorer_of(name: str) -> Scorer:
    return Scorer(read_config(config_of(name)), CONFIGS)


def lines_of(name: str) -> list[dict[str, Any]]:
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    collecting = commands.add_parser("collect", help="score real recipes; continues where it stopped")
    collecting.add_argument("name", choices=[*RECIPES])
    collecting.add_argument("--recipes", type=int, help=f"by default {RECIPES}")
    collecting.set_defaults(command=collect)
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
