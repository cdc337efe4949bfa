"""The optimizers on the 24 functions of BBOB, through COCO (Hansen et al., https://arxiv.org/abs/1603.08785).

    python benchmarks/optimizers.py bbob --dimensions 10,20,40 --instances 15 --optimizers cma-es,llm-off,llm:adversary
    python benchmarks/optimizers.py table benchmarks/results/optimizers-bbob.jsonl
    python benchmarks/optimizers.py draw benchmarks/results/optimizers-bbob.jsonl benchmarks/results/optimizers-bbob.png

How a function becomes a search for a merge:

* COCO's box [-5, 5] is the unit cube, each coordinate a weight of a task-arithmetic merge of two models (ten
  dimensions) or four (more), one slice after the other.
* Start rows, told to every optimizer first and counted: each model alone (ones at its weights, zeros elsewhere) and,
  in the place of the uniform merge, a point drawn from [1/4, 3/4] per coordinate: COCO's optima favour the middle of
  the box (f9, f19), so nobody starts there. Other weights for all models, start rows of a run, are left out: no merge
  is the diagonal of these boxes.
* The score is an accuracy: 1/4 + 1/2 · 1/(1 + regret/reference), where regret is the distance to the optimum's value
  and the reference the median regret of 100 random points. So chance is 1/4, a random point 1/2 and the optimum 3/4.
  With noise n it is the share of n questions answered right, each with that probability: binomial, ±3 points at 250.
* The figure is the true regret of the trial that is handed over, by one rule for all optimizers
  (`llmevo.optimizers.recommend`). `table --of scored` has that of the trial with the best score.
  Regret below a ten-thousandth of the reference counts as that, which no merge's score could tell from the optimum.
  Without this f5, a plane whose optimum is a corner of the box, would decide the geometric mean alone. `table
  --without 5` leaves it out.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cocoex
import numpy as np
from numpy.typing import NDArray

from llmevo.genome import Genome
from llmevo.optimizers import OPTIMIZERS, Setup, recommend
from llmevo.optimizers.base import Asking
from llmevo.prompting import Reading, Templates
from llmevo.proposers import Connection
from llmevo.proposers.simulated import SimulatedProposer
from llmevo.space import SearchSpace
from llmevo.trial import Candidate, Score, Suggestion, Trial

Point = NDArray[np.float64]

FUNCTIONS = range(1, 25)
BUDGETS = (50, 100, 200)
BASELINE = "cma-es"
FLOOR = 1e-4
"""Regrets below this share of the reference are alike."""

RESAMPLES = 2000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Problem:
    """One instance of one function, with noise of so many questions or none."""

    function: int
    dimension: int
    instance: int
    noise: int

    def space(self) -> SearchSpace:
        models = ["a", "b"] if self.dimension < 20 else ["a", "b", "c", "d"]
        layers = self.dimension // len(models)
        genome = {
            "models": models,
            "base_model": "base",
            "merge_method": "task_arithmetic",
            "layer_granularity": 1,
            "bounds": {"weight": [0.0, 1.0]},
        }
        return SearchSpace(Genome.model_validate(genome), layers)


class Surface:
    """What a point's true regret is, and what is scored of it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._function: Any = cocoex.BareProblem("bbob", problem.function, problem.dimension, problem.instance)
        random = np.random.default_rng([problem.function, problem.dimension, problem.instance])
        self.start: Point = random.uniform(0.25, 0.75, problem.dimension)
        self._floor = 0.0
        self._reference = float(np.median([self.regret(x) for x in random.random((100, problem.dimension))]))
        self._floor = FLOOR * self._reference
        self._noise = np.random.default_rng([problem.function, problem.dimension, problem.instance, problem.noise])

    @property
    def optimum(self) -> Point:
        return (np.asarray(self._function.best_parameter()) + 5) / 10

    def regret(self, point: Point) -> float:
        """How far the value is from the optimum's."""
        return max(float(self._function(10 * point - 5)) - float(self._function.best_value()), self._floor)

    def score(self, point: Point) -> Score:
        accuracy = 0.25 + 0.5 / (1 + self.regret(point) / self._reference)
        error, items = 0.0, self.problem.noise
        if items:
            accuracy = float(self._noise.binomial(items, accuracy)) / items
            error = float(np.sqrt(max(accuracy * (1 - accuracy), 1e-3) / items))
        return Score(accuracy, error, {"bbob": {"acc,none": accuracy, "acc_stderr,none": error}}, items)


def search(problem: Problem, name: str, budget: int) -> list[tuple[float, float]]:
    """The regrets of the recommended and of the best-scored trial after every budget.

    `name` is an optimizer, or `llm:` and a simulated LLM.
    """
    kind, _, model = name.partition(":")
    space, surface = problem.space(), Surface(problem)
    setup = Setup(space, problem.instance, budget, {"bbob": (1.0, "acc,none")}, "chat", Templates())
    optimizer = OPTIMIZERS[kind](setup)
    optimum = space.from_unit(surface.optimum)
    proposer = SimulatedProposer(Connection(model), optimum) if model else None
    trials: list[Trial] = []

    def scored(suggestions: Sequence[Suggestion]) -> None:
        told = [
            Trial(Candidate(len(trials) + i, 0, s.origin, s.genes, s.note), surface.score(space.to_unit(s.genes)))
            for i, s in enumerate(suggestions)
        ]
        trials.extend(told)
        optimizer.tell(told)

    parents = [Suggestion(space.parent(model), "parent") for model in space.merged]
    scored([*parents, Suggestion(space.from_unit(surface.start), "uniform")])
    population = 4 + int(3 * np.log(problem.dimension))
    found: list[tuple[float, float]] = []
    for spent in (*(least for least in BUDGETS if least < budget), budget):
        while len(trials) < spent:
            scored(_answered(optimizer.ask(min(population, spent - len(trials))), proposer))
        best = max(trials, key=lambda trial: trial.value)
        recommended, scored_best = (
            space.to_unit(trial.candidate.genes) for trial in (recommend(space, trials) or best, best)
        )
        found.append((surface.regret(recommended), surface.regret(scored_best)))
    return found


def _answered(asking: Asking, proposer: SimulatedProposer | None) -> list[Suggestion]:
    """What an optimizer asks for, its prompts answered on the way."""
    try:
        prompt = next(asking)
        while True:
            prompt = asking.send(prompt.read(proposer.answer(prompt).text) if proposer else Reading())
    except StopIteration as done:
        return done.value


def row(instances: Sequence[int], key: tuple[str, int, int, int], budget: int) -> dict[str, Any]:
    """The searches of one optimizer on some instances of a function: a line of the results."""
    name, function, dimension, noise = key
    started = time.process_time()
    regrets = [search(Problem(function, dimension, instance, noise), name, budget) for instance in instances]
    return {
        "optimizer": name,
        "function": function,
        "dimension": dimension,
        "noise": noise,
        "instances": [*instances],
        "regrets": [[float(f"{recommended:.4g}") for recommended, _ in found] for found in regrets],
        "scored": [[float(f"{scored:.4g}") for _, scored in found] for found in regrets],
        "seconds": round((time.process_time() - started) / len(instances), 2),
    }


def read(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def bbob(options: argparse.Namespace) -> None:
    """Run what is not in the file yet, and append it."""
    names, file = options.optimizers.split(","), Path(options.out)
    done: dict[tuple[str, int, int, int], set[int]] = defaultdict(set)
    for line in read(file):
        done[line["optimizer"], line["function"], line["dimension"], line["noise"]] |= {*line["instances"]}
    functions = _integers(options.functions) if options.functions else [*FUNCTIONS]
    keys = [
        (name, function, dimension, noise)
        for noise in _integers(options.noise)
        for function in functions
        for dimension in _integers(options.dimensions)
        for name in names
    ]
    wanted = set(range(1, options.instances + 1))
    missing = [(sorted(wanted - done[key]), key) for key in keys if wanted - done[key]]
    work = partial(_work, budget=options.budget)
    with file.open("a") as out, ProcessPoolExecutor(options.jobs) as workers:
        for line in map(work, missing) if options.jobs == 1 else workers.map(work, missing):
            out.write(json.dumps(line) + "\n")
            out.flush()


def _work(task: tuple[Sequence[int], tuple[str, int, int, int]], budget: int) -> dict[str, Any]:
    return row(task[0], task[1], budget)


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


Runs = dict[tuple[int, int, int], list[float]]
"""By function, dimension and instance: the regret after every budget."""


def runs(lines: Sequence[dict[str, Any]], noise: int, of: str = "regrets") -> dict[str, Runs]:
    """Every optimizer's runs: the regrets of what it recommends, or those of the best `scored`."""
    found: dict[str, Runs] = defaultdict(dict)
    for line in lines:
        if line["noise"] == noise:
            for instance, regrets in zip(line["instances"], line[of], strict=True):
                found[line["optimizer"]][line["function"], line["dimension"], instance] = regrets
    return found


@dataclass(frozen=True)
class Figure:
    """How an optimizer compares with another on the runs that both have done."""

    ratio: float
    """Geometric mean of its regret over the other's; below 1 is better."""
    low: float
    high: float
    """95 % interval, from a bootstrap over functions and instances."""
    median: float
    wins: float
    """Share of pairs in which its regret is lower, ties half."""
    pairs: int


def figure(own: Runs, other: Runs, budget: int, dimension: int | None) -> Figure | None:
    """The comparison at a budget, over one dimension or all."""
    place = BUDGETS.index(budget)
    shared = [key for key in own if key in other and dimension in (None, key[1]) and len(own[key]) > place]
    if not shared:
        return None
    logs = np.array([np.log(own[key][place] / other[key][place]) for key in shared])
    groups = defaultdict(list)
    for key, value in zip(shared, logs, strict=True):
        groups[key[0], key[1]].append(value)
    random = np.random.default_rng(0)
    # Functions differ far more than instances, so they are drawn anew with their instances.
    sums = np.array([[sum(values), len(values)] for values in groups.values()])
    drawn = sums[random.integers(0, len(sums), (RESAMPLES, len(sums)))].sum(axis=1)
    low, high = np.exp(np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5]))
    wins = float(np.mean((logs < 0) + 0.5 * (logs == 0)))
    return Figure(float(np.exp(logs.mean())), float(low), float(high), float(np.exp(np.median(logs))), wins, len(logs))


def table(options: argparse.Namespace) -> None:
    """Markdown, relative to one optimizer, a table for every noise."""
    left_out = _integers(options.without) if options.without else []
    lines = [line for line in read(Path(options.file)) if line["function"] not in left_out]
    print("\n".join(_table(lines, options.relative, options.of)))


def _table(lines: Sequence[dict[str, Any]], relative: str, of: str) -> Iterator[str]:
    for noise in sorted({line["noise"] for line in lines}):
        found = runs(lines, noise, of)
        dimensions = sorted({line["dimension"] for line in lines})
        yield f"\n{f'{noise} scored items' if noise else 'No noise'}: final regret relative to `{relative}`.\n"
        heads = [f"{d}-D, {'/'.join(map(str, BUDGETS))}" for d in dimensions]
        yield "| optimizer | " + " | ".join([*heads, *(f"all, {b}" for b in BUDGETS), "pairs"]) + " |"
        yield "|" + " --- |" * (len(heads) + len(BUDGETS) + 2)
        order = sorted(found, key=lambda name: (name != relative, found[name] and _final(found, name, relative)))
        for name in order:
            cells = [
                "/".join(
                    f"{f.ratio:.2f}" if (f := figure(found[name], found[relative], b, d)) else "–" for b in BUDGETS
                )
                for d in dimensions
            ]
            overall = [figure(found[name], found[relative], b, None) for b in BUDGETS]
            cells += [
                f"**{f.ratio:.2f}** [{f.low:.2f}, {f.high:.2f}], median {f.median:.2f}, wins {f.wins:.0%}" if f else "–"
                for f in overall
            ]
            yield f"| {name} | " + " | ".join([*cells, str(overall[-1].pairs if overall[-1] else 0)]) + " |"


def _final(found: dict[str, Runs], name: str, relative: str) -> float:
    last = figure(found[name], found[relative], BUDGETS[-1], None)
    return last.ratio if last else float("inf")


def draw(options: argparse.Namespace) -> None:
    """The ratios with their intervals, a panel for every noise."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = read(Path(options.file))
    noises = sorted({line["noise"] for line in lines})
    names = sorted({line["optimizer"] for line in lines})
    colours = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    canvas, panels = plt.subplots(1, len(noises), figsize=(6.5 * len(noises), 4.8), squeeze=False, sharey=True)
    for panel, noise in zip(panels[0], noises, strict=True):
        found = runs(lines, noise)
        for name in sorted(found, key=lambda name: _final(found, name, BASELINE)):
            figures = [figure(found[name], found[BASELINE], budget, None) for budget in BUDGETS]
            shown = [(budget, f) for budget, f in zip(BUDGETS, figures, strict=True) if f]
            budgets, ratios = [b for b, _ in shown], [f.ratio for _, f in shown]
            (line,) = panel.plot(budgets, ratios, marker="o", label=name, color=colours.get(name, "black"))
            bounds = [f.low for _, f in shown], [f.high for _, f in shown]
            panel.fill_between(budgets, *bounds, alpha=0.12, color=line.get_color())
        panel.set(xscale="log", yscale="log", xticks=BUDGETS, xticklabels=BUDGETS, xlabel="evaluations")
        panel.set_title(f"{noise} scored items" if noise else "no noise")
        panel.minorticks_off()
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panels[0][0].set_ylabel(f"final regret relative to {BASELINE}")
    canvas.tight_layout()
    canvas.savefig(options.out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("bbob", help="run the searches; what the file has already is not run again")
    running.add_argument("--optimizers", default="cma-es,llm-off")
    running.add_argument("--functions", default="", help="by number; all 24 by default")
    running.add_argument("--dimensions", default="10,20,40")
    running.add_argument("--instances", type=int, default=15, help="how many of each function")
    running.add_argument("--noise", default="0,250", help="scored items; 0 is without noise")
    running.add_argument("--budget", type=int, default=BUDGETS[-1])
    running.add_argument("--jobs", type=int, default=1)
    running.add_argument("--out", default="benchmarks/results/optimizers-bbob.jsonl")
    running.set_defaults(command=bbob)
    showing = commands.add_parser("table", help="print the results as Markdown")
    showing.add_argument("file")
    showing.add_argument("--relative", default=BASELINE)
    showing.add_argument("--of", choices=("regrets", "scored"), default="regrets")
    showing.add_argument("--without", default="", help="functions to leave out, by number")
    showing.set_defaults(command=table)
    drawing = commands.add_parser("draw", help="draw the results")
    drawing.add_argument("file")
    drawing.add_argument("out")
    drawing.set_defaults(command=draw)
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
