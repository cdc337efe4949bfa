"""The quickstart's four experts as a mixture, beside the best dense merges of the same experts.

    llmevo run configs/quickstart-moe.yml --out runs/quickstart-moe
    python benchmarks/mixture.py collect runs/quickstart-moe --out benchmarks/results/mixture.jsonl
    python benchmarks/mixture.py table benchmarks/results/mixture.jsonl
    python benchmarks/mixture.py routing benchmarks/results/mixture.jsonl

`collect` reads the run's held-out rows and routing, and measures the seconds of the processor that a question takes,
with the best mixture and with a dense merge: both are asked the search questions in turn. Scores of dense merges are
those of `quickstart.jsonl` (searches) and `methods-quickstart.jsonl` (single merges by the best method).
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import measurements

from llmevo.config import read_config
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import MergedModel
from llmevo.run.experiment import Experiment
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import ROUTING, read_log
from llmevo.run.scorer import Scorer

RESULTS = Path(__file__).parent / "results"
DENSE = Path(__file__).parent.parent / "configs" / "quickstart.yml"
ROUNDS = 3


def collect(options: argparse.Namespace) -> None:
    """Write a line for a finished run."""
    state = RunState.fold(iter(read_log(options.run)))
    assert state.started
    assert state.best
    scorer = Experiment.of_log(state.started, options.run).scorer
    recipe = Recipe.model_validate(state.recipes[state.best.candidate.id])
    routing = options.run / ROUTING
    line = {
        **measurements.environment(),
        "evaluations": len(state.trials),
        "optimizer": state.started.config["search"]["optimizer"],
        "rows": [
            {"name": row.row, "kind": row.kind, "score": [row.score, row.stderr], "tasks": _values(state, row.tasks)}
            for row in state.heldout.values()
        ],
        "best": {
            "genes": state.best.candidate.genes,
            "search": state.best.value,
            "origin": state.best.candidate.origin,
        },
        "parameters": _parameters(recipe, scorer),
        "swap": [trial.seconds["merge"] for trial in state.trials.values() if "merge" in trial.seconds],
        "seconds": _seconds(recipe, scorer),
        "routing": json.loads(routing.read_text()) if routing.exists() else None,
    }
    measurements.append(options.out, line)


def _values(state: RunState, tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    metrics = {task.name: task.metric for task in state.heldout_tasks}
    return {task: values[metrics[task]] for task, values in tasks.items()}


def _parameters(recipe: Recipe, scorer: Scorer) -> dict[str, int]:
    """The numbers of weights: of a dense merge, of the mixture, and of those that a token uses."""
    mixture = recipe.mixture
    assert mixture
    found = {"dense": 0, "mixture": 0, "active": 0}
    dense = recipe.model_copy(update={"mixture": None})
    found["dense"] = sum(map(math.prod, MergedModel(dense, scorer.sources).shapes.values()))
    shapes = MergedModel(scorer.carried(recipe), scorer.sources).shapes
    experts = sum(math.prod(shape) for name, shape in shapes.items() if ".experts." in name)
    found["mixture"] = sum(map(math.prod, shapes.values()))
    found["active"] = found["mixture"] - experts + experts * mixture.experts_per_token // len(mixture.experts)
    return found


def _seconds(recipe: Recipe, scorer: Scorer) -> dict[str, list[float]]:
    """Seconds of the processor a question, round by round."""
    dense = Scorer(read_config(DENSE), DENSE.parent)
    recipes = {"mixture": (scorer, scorer.carried(recipe)), "dense": (dense, dense.space.decode(dense.space.uniform()))}
    found: dict[str, list[float]] = {name: [] for name in recipes}
    for own, given in recipes.values():
        own.engine.swap(given)
    for _ in range(ROUNDS):
        for name, (own, _) in recipes.items():
            started = time.process_time()
            score = own.evaluator.score(own.engine.lm)
            found[name].append((time.process_time() - started) / score.items)
    return found


def table(options: argparse.Namespace) -> None:
    """Print held-out scores, sizes and times."""
    print("\n".join(_table(measurements.read(options.file)[-1])))


def _table(line: Mapping[str, Any]) -> Iterator[str]:
    rows = {row["name"]: row for row in line["rows"]}
    tasks = [*rows["best"]["tasks"]]
    short = [task.removeprefix("quickstart_").removesuffix("_heldout").replace("_", " ") for task in tasks]
    yield f"| model | held out | {' | '.join(short)} | parameters | of them used by a token | seconds a question |"
    yield "|---" * (len(tasks) + 5) + "|"
    size, seconds = line["parameters"], {name: median(values) for name, values in line["seconds"].items()}
    dense = [f"{size['dense'] / 1e6:.0f} M"] * 2
    own = [f"{size['mixture'] / 1e6:.0f} M", f"{size['active'] / 1e6:.0f} M"]
    best = max((row for row in line["rows"] if row["kind"] == "parent"), key=lambda row: row["score"][0])
    times = {name: f"{value:.3f}" for name, value in seconds.items()}
    yield _row(f"best expert ({best['name']})", best["score"], best["tasks"].values(), [*dense, times["dense"]])
    for name, score, values in _dense(tasks):
        yield _row(name, score, values, [*dense, times["dense"]])
    for name, called in (("uniform", "mixture, first candidate"), ("best", "**best mixture**")):
        row = rows[name]
        of = own if name == "best" else [own[0], ""]
        called = f"{called} of {line['evaluations']}" if name == "best" else called
        yield _row(called, row["score"], row["tasks"].values(), [*of, times["mixture"] if name == "best" else ""])


def _row(name: str, score: Sequence[float], values: Any, rest: Sequence[str]) -> str:
    shown = [f"{score[0]:.3f} ± {score[1]:.3f}", *(f"{value:.3f}" for value in values), *rest]
    return f"| {name} | {' | '.join(shown)} |"


def _dense(tasks: Sequence[str]) -> Iterator[tuple[str, tuple[float, float], list[float]]]:
    """Name, score and values by task of the best dense merges."""
    runs = [run for run in measurements.read(RESULTS / "quickstart.jsonl") if run["optimizer"] == "llm"]
    right = [next(row["right"] for row in run["rows"] if row["kind"] == "best") for run in runs]
    values = [[fmean(map(int, each[task])) for task in tasks] for each in right]
    errors = [
        math.sqrt(sum(v * (1 - v) / len(each[task]) for v, task in zip(of, tasks, strict=True))) / len(tasks)
        for of, each in zip(values, right, strict=True)
    ]
    mean = [fmean(of[place] for of in values) for place in range(len(tasks))]
    yield f"best dense merge, mean of {len(runs)} searches", (fmean(mean), fmean(errors)), mean
    lines = [line for line in measurements.read(RESULTS / "methods-quickstart.jsonl") if line.get("heldout")]
    known = [line for line in lines if "regmean" in line["method"]]
    best = max(known, key=lambda line: line["heldout"]["score"][0])
    values_of = best["heldout"]["items"]
    yield (
        f"best dense merge by `{best['method']}`",
        best["heldout"]["score"],
        [fmean(values_of[task]) for task in tasks],
    )


def routing(options: argparse.Namespace) -> None:
    """Print the share of each expert by task, on the mean over layers and in thirds of the layers."""
    given = measurements.read(options.file)[-1]["routing"]
    print(f"| task | {' | '.join(given['experts'])} | first third of the layers | last third |")
    print("|---" * (len(given["experts"]) + 3) + "|")
    for task, layers in given["shares"].items():
        third = len(layers) // 3
        means = [_mean(layers), _mean(layers[:third]), _mean(layers[-third:])]
        parts = [_most(given["experts"], mean) for mean in means[1:]]
        name = task.removeprefix("quickstart_").removesuffix("_heldout").replace("_", " ")
        print(f"| {name} | {' | '.join(f'{share:.2f}' for share in means[0])} | {' | '.join(parts)} |")


def _mean(layers: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(layer[place] for layer in layers) for place in range(len(layers[0]))]


def _most(names: Sequence[str], shares: Sequence[float]) -> str:
    place = max(range(len(names)), key=lambda expert: shares[expert])
    return f"{names[place]} {shares[place]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("run", type=Path)
    collecting.add_argument("--out", type=Path, required=True)
    collecting.set_defaults(command=collect)
    for name, command in (("table", table), ("routing", routing)):
        printing = commands.add_parser(name)
        printing.add_argument("file", type=Path)
        printing.set_defaults(command=command)
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
