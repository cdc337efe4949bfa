"""The optimizers on the 24 functions of BBOB, through COCO (Hansen et al., https://arxiv.org/abs/1603.08785).

    python benchmarks/optimizers.py bbob --out FILE --optimizers cma-es,llm-off,llm:adversary
    python benchmarks/optimizers.py table benchmarks/results/optimizers-bbob.jsonl
    python benchmarks/optimizers.py summary benchmarks/results/optimizers-bbob.jsonl
    python benchmarks/optimizers.py llms benchmarks/results/optimizers-bbob.jsonl
    python benchmarks/optimizers.py changes FILE benchmarks/results/optimizers-bbob.jsonl
    python benchmarks/optimizers.py draw benchmarks/results/optimizers-bbob.jsonl benchmarks/results/optimizers-bbob.png

How a function becomes a search for a merge:

* COCO's box [-5, 5] is the unit cube, each coordinate a weight of a task-arithmetic merge of two models (ten
  dimensions) or four (more), one slice after the other.
* Start rows, told to every optimizer first and counted: each model alone (ones at its weights, zeros elsewhere) and,
  in the place of the uniform merge, a point drawn from [1/4, 3/4] per coordinate: COCO's optima favour the middle of
  the box (f9, f19), so no search starts there. Other weights for all models, start rows of a run, are left out: no
  merge is the diagonal of these boxes.
* The score is an accuracy: 1/4 + 1/2 · 1/(1 + regret/reference), where regret is the distance to the optimum's value
  and the reference the median regret of 100 random points. So chance is 1/4, a random point 1/2 and the optimum 3/4.
  With noise n it is the share of n questions answered right, each with that probability: binomial, ±3 points at 250.
* The figure is the true regret of the trial that is handed over, by one rule for all optimizers
  (`llmevo.search.optimizers.recommend`). `table --of scored` has that of the trial with the best score.
  Regret below a ten-thousandth of the reference counts as that, which no merge's score could tell from the optimum.
  Without this f5, a plane whose optimum is a corner of the box, would decide the geometric mean alone. `table
  --without 5` leaves it out.
* Intervals are of a bootstrap over functions: a function is drawn with all its dimensions and instances, because these
  are alike. With fewer than ten functions there is no interval.
* `table --same-start` compares only the problems whose best start row is the uniform one. There an optimizer that
  starts from the uniform row (`mergekit-evolve`) and one that starts from the best row start at the same point.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import asking
import cocoex
import measurements
import numpy as np
from numpy.typing import NDArray

from llmevo.evaluation.score import Score
from llmevo.llm.client import Connection
from llmevo.llm.templates import Templates
from llmevo.search.genome import Genome
from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.base import Setup, answered
from llmevo.search.optimizers.recommendation import recommend
from llmevo.search.simulated_llm import SimulatedClient
from llmevo.search.space import SearchSpace
from llmevo.search.trial import Candidate, Suggestion, Trial

Point = NDArray[np.float64]

FUNCTIONS = range(1, 25)
BUDGETS = (50, 100, 200)
BASELINES = ("cma-es", "mergekit-evolve")
"""What the others are compared with: the first of these that a file has on all functions."""
TUNED_ON = (1, 3, 7, 9, 13, 15, 19, 21)
"""The functions on whose first instance the constants of `llm-off` were chosen: `--without tuned`."""
TUNED = "tuned"
FEWEST = 10
"""Functions that a bootstrap interval needs."""
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


def start_rows(space: SearchSpace, surface: Surface) -> list[Suggestion]:
    """What every optimizer is told first: each model alone, and the point in the place of the uniform merge."""
    parents = [Suggestion(space.parent(model), "parent") for model in space.merged]
    return [*parents, Suggestion(space.from_unit(surface.start), "uniform")]


def search(problem: Problem, name: str, budget: int) -> list[tuple[float, float]]:
    """The regrets of the recommended and of the best-scored trial after every budget.

    `name` is an optimizer, or `llm:` and a simulated LLM.
    """
    kind, _, model = name.partition(":")
    space, surface = problem.space(), Surface(problem)
    setup = Setup(space, problem.instance, budget, {"bbob": (1.0, "acc,none")}, "chat", Templates())
    optimizer = OPTIMIZERS[kind](setup)
    optimum = space.from_unit(surface.optimum)
    proposer = SimulatedClient(Connection(model), optimum) if model else None
    trials: list[Trial] = []

    def scored(suggestions: Sequence[Suggestion]) -> None:
        told = [
            Trial(Candidate(len(trials) + i, 0, s.origin, s.genes, s.note), surface.score(space.to_unit(s.genes)))
            for i, s in enumerate(suggestions)
        ]
        trials.extend(told)
        optimizer.tell(told)

    scored(start_rows(space, surface))
    population = 4 + int(3 * np.log(problem.dimension))
    found: list[tuple[float, float]] = []
    for spent in (*(least for least in BUDGETS if least < budget), budget):
        while len(trials) < spent:
            size = min(population, spent - len(trials))
            scored(answered(optimizer.ask(size), asking.by(proposer)))
        best = max(trials, key=lambda trial: trial.value)
        recommended, scored_best = (
            space.to_unit(trial.candidate.genes) for trial in (recommend(space, trials) or best, best)
        )
        found.append((surface.regret(recommended), surface.regret(scored_best)))
    return found


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
        **measurements.environment(),
    }


def read(file: str | Path) -> list[dict[str, Any]]:
    found = measurements.read(Path(file))
    if not found:
        raise SystemExit(f"{file}: there is no such file, or it is empty")
    return found


def bbob(options: argparse.Namespace) -> None:
    """Run what is not in the file yet, and append it."""
    names, file = options.optimizers.split(","), Path(options.out)
    if unknown := [name for name in names if name.partition(":")[0] not in OPTIMIZERS]:
        raise SystemExit(f"--optimizers: there is no {', '.join(unknown)}; there are {', '.join(OPTIMIZERS)}")
    done: dict[tuple[str, int, int, int], set[int]] = defaultdict(set)
    for line in measurements.read(file):
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
    with ProcessPoolExecutor(options.jobs) as workers:
        for line in map(work, missing) if options.jobs == 1 else workers.map(work, missing):
            measurements.append(file, line)


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
    low: float | None
    high: float | None
    """95 % interval, from a bootstrap over functions; None where there are too few of them."""
    median: float
    wins: float
    """Share of pairs in which its regret is lower, ties half."""
    pairs: int
    functions: int

    @property
    def interval(self) -> str:
        return "" if self.low is None else f" ({self.low:.2f} to {self.high:.2f})"


def figure(own: Runs, other: Runs, budget: int, dimension: int | None) -> Figure | None:
    """The comparison at a budget, over one dimension or all."""
    place = BUDGETS.index(budget)
    shared = [key for key in own if key in other and dimension in (None, key[1]) and len(own[key]) > place]
    if not shared:
        return None
    logs = np.array([np.log(own[key][place] / other[key][place]) for key in shared])
    groups: dict[int, list[float]] = defaultdict(list)
    for key, value in zip(shared, logs, strict=True):
        groups[key[0]].append(value)
    low = high = None
    if len(groups) >= FEWEST:
        random = np.random.default_rng(0)
        sums = np.array([[sum(values), len(values)] for values in groups.values()])
        drawn = sums[random.integers(0, len(sums), (RESAMPLES, len(sums)))].sum(axis=1)
        low, high = map(float, np.exp(np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])))
    wins = float(np.mean((logs < 0) + 0.5 * (logs == 0)))
    middle = float(np.exp(np.median(logs)))
    return Figure(float(np.exp(logs.mean())), low, high, middle, wins, len(logs), len(groups))


def same_start(noise: int, dimensions: Sequence[int], instances: int) -> set[tuple[int, int, int]]:
    """The problems whose best start row is the uniform one, by the scores that a search sees."""
    found: set[tuple[int, int, int]] = set()
    for key in product(FUNCTIONS, dimensions, range(1, instances + 1)):
        problem = Problem(*key, noise)
        space, surface = problem.space(), Surface(problem)
        *parents, uniform = (surface.score(space.to_unit(row.genes)).total for row in start_rows(space, surface))
        if uniform > max(parents):
            found.add(key)
    return found


def chosen(options: argparse.Namespace) -> dict[int, dict[str, Runs]]:
    """By noise and optimizer, the runs that the options leave."""
    left_out = TUNED_ON if options.without == TUNED else _integers(options.without) if options.without else ()
    lines = [line for line in read(options.file) if line["function"] not in left_out]
    found = {noise: runs(lines, noise, options.of) for noise in sorted({line["noise"] for line in lines})}
    if options.same_start:
        dimensions = sorted({line["dimension"] for line in lines})
        most = max(max(line["instances"]) for line in lines)
        for noise, by_name in found.items():
            kept = same_start(noise, dimensions, most)
            for name, own in by_name.items():
                by_name[name] = {key: regrets for key, regrets in own.items() if key in kept}
    return found


def baseline(found: Mapping[int, Mapping[str, Runs]]) -> str:
    """The first of BASELINES that was run on all functions that the file has."""
    functions = {name: {key[0] for by in found.values() for key in by.get(name, {})} for name in BASELINES}
    return max(BASELINES, key=lambda name: len(functions[name]))


def table(options: argparse.Namespace) -> None:
    """Markdown, relative to one optimizer, a table for every noise."""
    found = chosen(options)
    relative = options.relative or baseline(found)
    names = options.optimizers.split(",") if options.optimizers else None
    noises = _integers(options.noise) if options.noise else [*found]
    print("\n".join(line for noise in noises for line in _table(found[noise], noise, relative, names)))


def _title(noise: int) -> str:
    return f"{noise} scored items" if noise else "no noise"


def _table(found: dict[str, Runs], noise: int, relative: str, names: Sequence[str] | None) -> Iterator[str]:
    title = _title(noise)
    dimensions = sorted({key[1] for own in found.values() for key in own})
    yield f"\n{title[0].upper()}{title[1:]}: final regret relative to `{relative}`.\n"
    heads = [f"{d}-D, {'/'.join(map(str, BUDGETS))}" for d in dimensions]
    yield "| optimizer | " + " | ".join([*heads, *(f"all, {b}" for b in BUDGETS), "pairs"]) + " |"
    yield "|" + " --- |" * (len(heads) + len(BUDGETS) + 2)
    order = sorted(found, key=lambda name: (name != relative, found[name] and _final(found, name, relative)))
    for name in order:
        if names and name not in names:
            continue
        cells = [
            "/".join(f"{f.ratio:.2f}" if (f := figure(found[name], found[relative], b, d)) else "–" for b in BUDGETS)
            for d in dimensions
        ]
        overall = [figure(found[name], found[relative], b, None) for b in BUDGETS]
        cells += [
            f"**{f.ratio:.2f}**{f.interval}, median {f.median:.2f}, wins {f.wins:.0%}" if f else "–" for f in overall
        ]
        last = overall[-1]
        cells.append(f"{last.pairs} of {last.functions} functions" if last else "0")
        yield f"| {name} | " + " | ".join(cells) + " |"


def summary(options: argparse.Namespace) -> None:
    """The table of `llm-off` against the baseline, on all problems and where both start at one point."""
    options.of, options.without = "regrets", ""
    whole: dict[str, dict[int, dict[str, Runs]]] = {}
    for options.same_start in (False, True):
        whole["both from the uniform row" if options.same_start else ""] = chosen(options)
    relative = baseline(whole[""])
    noises = [*whole[""]]
    heads = [head for noise in noises for head in ("with noise" if noise else "without noise", "pairs won")]
    print(f"| `llm-off` against `{relative}` after | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for start, found in whole.items():
        for budget in BUDGETS:
            figures = [figure(by["llm-off"], by[relative], budget, None) for by in found.values()]
            cells = [f"{f.ratio:.2f}{f.interval} | {f.wins:.0%} of {f.pairs}" if f else "– | –" for f in figures]
            print(f"| {budget} evaluations{', ' if start else ''}{start} | {' | '.join(cells)} |")


def llms(options: argparse.Namespace) -> None:
    """The table of simulated LLMs, relative to `llm-off` on the same runs."""
    options.of, options.without, options.same_start = "regrets", "", False
    found = chosen(options)
    names = sorted({name for by in found.values() for name in by if name.startswith("llm:")})
    heads = [f"{'with' if noise else 'without'} noise, {'/'.join(map(str, BUDGETS))} evaluations" for noise in found]
    print(f"| simulated LLM | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for name in sorted(names, key=lambda name: _final(found[0], name, "llm-off")):
        cells: list[str] = []
        for by in found.values():
            figures = [f for budget in BUDGETS if (f := figure(by[name], by["llm-off"], budget, None))]
            ratios = "/".join(f"{f.ratio:.2f}" for f in figures)
            cells.append(f"{ratios}{figures[-1].interval}" if figures else "–")
        print(f"| {name.removeprefix('llm:')} | {' | '.join(cells)} |")


def changes(options: argparse.Namespace) -> None:
    """The table of each optimizer relative to the `llm-off` of an earlier file, on the same runs."""
    lines, earlier = read(options.file), read(options.earlier)
    noises = sorted({line["noise"] for line in lines})
    heads = [f"{_title(noise)}, {budget}" for noise in noises for budget in BUDGETS]
    print(f"| optimizer | {' | '.join(heads)} | pairs |\n|{'---|' * (len(heads) + 2)}")
    for name in sorted({line["optimizer"] for line in lines}, reverse=True):
        found = [
            figure(runs(lines, noise)[name], runs(earlier, noise)["llm-off"], budget, None)
            for noise in noises
            for budget in BUDGETS
        ]
        cells = [f"{f.ratio:.2f}{f.interval}" if f else "–" for f in found]
        print(f"| {name} | {' | '.join(cells)} | {sum(f.pairs for f in found if f) // len(BUDGETS)} |")


def coverage(options: argparse.Namespace) -> None:
    """How many instances of how many functions a file has of every optimizer."""
    done: dict[str, dict[int, set[tuple[int, int, int]]]] = defaultdict(lambda: defaultdict(set))
    lines = read(options.file)
    noises = sorted({line["noise"] for line in lines})
    for line in lines:
        keys = {(line["function"], line["dimension"], instance) for instance in line["instances"]}
        done[line["optimizer"]][line["noise"]] |= keys
    print(f"| optimizer | dimensions | {' | '.join(map(_title, noises))} |\n|{'---|' * (len(noises) + 2)}")
    for name, by in sorted(done.items()):
        dimensions = sorted({key[1] for keys in by.values() for key in keys})
        cells = [
            f"{len({key[2] for key in by[noise]})} × {len({key[0] for key in by[noise]})}" if by[noise] else "–"
            for noise in noises
        ]
        print(f"| {name} | {', '.join(map(str, dimensions))} | {' | '.join(cells)} |")


def _final(found: dict[str, Runs], name: str, relative: str) -> float:
    last = figure(found[name], found[relative], BUDGETS[-1], None)
    return last.ratio if last else float("inf")


def draw(options: argparse.Namespace) -> None:
    """The ratios with their intervals, a panel for every noise."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    options.of, options.without, options.same_start = "regrets", "", False
    found = chosen(options)
    relative = baseline(found)
    names = sorted({name for by in found.values() for name in by})
    colours = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    canvas, panels = plt.subplots(1, len(found), figsize=(6.5 * len(found), 4.8), squeeze=False, sharey=True)
    for panel, (noise, by) in zip(panels[0], found.items(), strict=True):
        functions = {name: len({key[0] for key in own}) for name, own in by.items()}
        for name in sorted(by, key=lambda name: _final(by, name, relative)):
            if functions[name] < len(FUNCTIONS):  # its mean would be over other functions than the rest
                continue
            figures = [figure(by[name], by[relative], budget, None) for budget in BUDGETS]
            shown = [(budget, f) for budget, f in zip(BUDGETS, figures, strict=True) if f]
            budgets, ratios = [b for b, _ in shown], [f.ratio for _, f in shown]
            label = f"{name} ({shown[-1][1].pairs} runs)"
            (line,) = panel.plot(budgets, ratios, marker="o", label=label, color=colours.get(name, "black"))
            bounds = [f.low or f.ratio for _, f in shown], [f.high or f.ratio for _, f in shown]
            panel.fill_between(budgets, *bounds, alpha=0.12, color=line.get_color())
        panel.set(xscale="log", yscale="log", xticks=BUDGETS, xticklabels=BUDGETS, xlabel="evaluations")
        panel.set_title(f"{_title(noise)}, all {len(FUNCTIONS)} functions")
        panel.minorticks_off()
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panels[0][0].set_ylabel(f"final regret relative to {relative}")
    canvas.tight_layout()
    canvas.savefig(options.out, dpi=130)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    running = commands.add_parser("bbob", help="run the searches; what the file has already is not run again")
    running.add_argument("--optimizers", default="cma-es,llm-off")
    running.add_argument("--functions", default="", help="by number; all 24 by default")
    running.add_argument("--dimensions", default="10,20,40")
    running.add_argument("--instances", type=int, default=15, help="how many of each function")
    running.add_argument("--noise", default="0,250", help="scored items; 0 is without noise")
    running.add_argument("--budget", type=int, default=BUDGETS[-1])
    running.add_argument("--jobs", type=int, default=1)
    running.add_argument("--out", required=True, help="one code version a file: rows of two are not comparable")
    running.set_defaults(command=bbob)
    showing = commands.add_parser("table", help="print the results as Markdown")
    showing.add_argument("file")
    showing.add_argument("--relative", default="", help=f"an optimizer; {' or '.join(BASELINES)} by default")
    showing.add_argument("--optimizers", default="", help="to show; all by default")
    showing.add_argument("--noise", default="", help="to show; all by default")
    showing.add_argument("--of", choices=("regrets", "scored"), default="regrets")
    showing.add_argument("--without", default="", help=f"functions to leave out, by number, or `{TUNED}`")
    showing.add_argument("--same-start", action="store_true", help="only where the uniform row is the best start row")
    showing.set_defaults(command=table)
    for name, command in {"summary": summary, "llms": llms, "coverage": coverage}.items():
        short = commands.add_parser(name, help=(command.__doc__ or "").splitlines()[0])
        short.add_argument("file")
        short.set_defaults(command=command)
    against = commands.add_parser("changes", help=(changes.__doc__ or "").splitlines()[0])
    against.add_argument("file")
    against.add_argument("earlier")
    against.set_defaults(command=changes)
    drawing = commands.add_parser("draw", help="draw the results")
    drawing.add_argument("file")
    drawing.add_argument("out")
    drawing.set_defaults(command=draw)
    return made


def main() -> None:
    options = parser().parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
