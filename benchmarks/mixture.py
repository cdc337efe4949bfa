"""The quickstart's four experts as a mixture, beside the best dense merges of the same experts.

    llmevo run configs/quickstart-moe.yml --out runs/quickstart-moe
    python benchmarks/mixture.py collect runs/quickstart-moe --out benchmarks/results/mixture.jsonl
    python benchmarks/mixture.py table benchmarks/results/mixture.jsonl
    python benchmarks/mixture.py routing benchmarks/results/mixture.jsonl

`collect` asks the best mixture of a run so far, and the first one, the held-out questions, and measures the seconds of
the processor that a question takes, with the best mixture and with a dense merge. The scores of single experts and of
dense merges are those of `quickstart-plain.jsonl` and `quickstart.jsonl`.
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
from llmevo.evaluation.score import Score
from llmevo.merging.mixture.mixture import ROUTER
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import MergedModel
from llmevo.run.experiment import Experiment
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import read_log
from llmevo.run.scorer import Scorer
from llmevo.search.mixtures import START

RESULTS = Path(__file__).parent / "results"
DENSE = Path(__file__).parent.parent / "configs" / "quickstart-plain.yml"


def collect(options: argparse.Namespace) -> None:
    """Write a line for a run."""
    state = RunState.fold(iter(read_log(options.run)))
    assert state.started
    assert state.best
    scorer = Experiment.of_log(state.started, options.run).scorer
    router = str((options.run / ROUTER).absolute())
    first = next(trial for trial in state.trials.values() if trial.candidate.origin == "uniform")
    wanted = {"best": state.best.candidate.id, "first": first.candidate.id}
    recipes = {
        name: Recipe.model_validate(state.recipes[number]).with_router(router) for name, number in wanted.items()
    }
    metrics = {task.name: task.metric for task in state.heldout_tasks}
    dense = Scorer(read_config(DENSE), DENSE.parent)
    dense.engine.swap(dense.space.decode(dense.space.uniform()))
    seconds = {"dense": _timed(dense, "search")[1]}
    del dense
    line: dict[str, Any] = {
        **measurements.environment(),
        "evaluations": len(state.trials),
        "is_finished": state.finished is not None,
        "optimizer": state.started.config["search"]["optimizer"],
        "rows": [],
        "best": {
            "genes": state.best.candidate.genes,
            "search": state.best.value,
            "origin": state.best.candidate.origin,
        },
        "parameters": _parameters(recipes["best"], scorer),
        "swap": [trial.seconds["merge"] for trial in state.trials.values() if "merge" in trial.seconds],
        "seconds": seconds,
    }
    for name, recipe in recipes.items():
        scorer.engine.swap(recipe)
        if name == "best":
            seconds["mixture"] = _timed(scorer, "search")[1]
        score, _ = _timed(scorer, "heldout")
        values = {task: found[metrics[task]] for task, found in score.tasks.items()}
        line["rows"].append({"name": name, "score": [score.total, score.stderr], "tasks": values})
        if name == "best":
            line["routing"] = json.loads(scorer.routing(recipe))
        print(line["rows"][-1], flush=True)
        options.out.write_text(json.dumps(line) + "\n")


def _timed(scorer: Scorer, questions: str) -> tuple[Score, float]:
    """The score of the running model, and the seconds of the processor a question."""
    started = time.process_time()
    score = scorer.evaluators[questions].score(scorer.engine.lm)
    return score, (time.process_time() - started) / score.items


def _parameters(recipe: Recipe, scorer: Scorer) -> dict[str, int]:
    """The numbers of weights: of a dense merge, of the mixture, and of those that a token uses."""
    mixture = recipe.mixture
    assert mixture
    found = {"dense": 0, "mixture": 0, "active": 0}
    dense = recipe.model_copy(update={"mixture": None})
    found["dense"] = sum(map(math.prod, MergedModel(dense, scorer.sources).shapes.values()))
    shapes = MergedModel(recipe, scorer.sources).shapes
    experts = sum(math.prod(shape) for name, shape in shapes.items() if ".experts." in name)
    found["mixture"] = sum(map(math.prod, shapes.values()))
    found["active"] = found["mixture"] - experts + experts * mixture.experts_per_token // len(mixture.experts)
    return found


def table(options: argparse.Namespace) -> None:
    """Print held-out scores, sizes and times."""
    print("\n".join(_table(measurements.read(options.file)[-1])))


def _table(line: Mapping[str, Any]) -> Iterator[str]:
    rows = {row["name"]: row for row in line["rows"]}
    tasks = [*rows["best"]["tasks"]]
    yield f"| model | held out | {' | '.join(map(_short, tasks))} | parameters | used by a token | seconds a question |"
    yield "|---" * (len(tasks) + 5) + "|"
    size, seconds = line["parameters"], line["seconds"]
    dense = [f"{size['dense'] / 1e6:.0f} M"] * 2
    own = [f"{size['mixture'] / 1e6:.0f} M", f"{size['active'] / 1e6:.0f} M"]
    for place, (name, score, values) in enumerate(_dense(tasks)):
        yield _row(name, score, values, [*dense, "" if place else f"{seconds['dense']:.3f}"])
    if "first" in rows:
        called = f"first mixture: the uniform merge's attention, temperature {START:g}"
        yield _row(called, rows["first"]["score"], rows["first"]["tasks"].values(), [*own, ""])
    called = f"**best mixture of {line['evaluations']} candidates**"
    times = f"{seconds['mixture']:.3f}"
    yield _row(called, rows["best"]["score"], rows["best"]["tasks"].values(), [*own, times])
    yield ""
    swaps = sorted(line["swap"])[:-1]  # the longest one fits the routers
    (machine,) = measurements.machines([line])
    yield f"On {machine}: a swap from one mixture to another takes {median(swaps):.1f} s on the median."


def _short(task: str) -> str:
    return task.removeprefix("quickstart_").removesuffix("_heldout").replace("_", " ")


def _row(name: str, score: Sequence[float], values: Any, rest: Sequence[str]) -> str:
    shown = [f"{score[0]:.3f} ± {score[1]:.3f}", *(f"{value:.3f}" for value in values), *rest]
    return f"| {name} | {' | '.join(shown)} |"


def _dense(tasks: Sequence[str]) -> Iterator[tuple[str, tuple[float, float], list[float]]]:
    """Name, score and values by task of the best expert and of dense merges."""
    plain = [run for run in measurements.read(RESULTS / "quickstart-plain.jsonl") if run["optimizer"] == "llm"]
    parents = [row["right"] for row in plain[0]["rows"] if row["kind"] == "parent"]
    yield "best expert", *max((_mean_of([right], tasks) for right in parents), key=lambda found: found[0][0])
    prepared = measurements.read(RESULTS / "quickstart.jsonl")
    for runs, called in ((plain, ""), (prepared, ", of experts prepared by `regmean`")):
        right = [next(row["right"] for row in run["rows"] if row["kind"] == "best") for run in runs]
        times = f"mean of {len(runs)} searches" if len(runs) > 1 else "one search"
        yield f"best dense merge{called}, {times}", *_mean_of(right, tasks)


def _mean_of(runs: Sequence[Mapping[str, str]], tasks: Sequence[str]) -> tuple[tuple[float, float], list[float]]:
    """Score with its error, and values by task, of several runs' answers."""
    values = [[fmean(map(int, each[task])) for task in tasks] for each in runs]
    errors = [_error(of, each, tasks) for of, each in zip(values, runs, strict=True)]
    mean = [fmean(of[place] for of in values) for place in range(len(tasks))]
    return (fmean(mean), fmean(errors)), mean


def _error(values: Sequence[float], right: Mapping[str, str], tasks: Sequence[str]) -> float:
    """The standard error of the mean over tasks, of independent answers."""
    variances = [value * (1 - value) / len(right[task]) for value, task in zip(values, tasks, strict=True)]
    return math.sqrt(sum(variances)) / len(tasks)


def routing(options: argparse.Namespace) -> None:
    """Print the share of each expert by task, on the mean over layers and in thirds of the layers."""
    given = measurements.read(options.file)[-1]["routing"]
    print(f"| task | {' | '.join(given['experts'])} | first third of the layers | last third |")
    print("|---" * (len(given["experts"]) + 3) + "|")
    for task, layers in given["shares"].items():
        third = len(layers) // 3
        means = [_mean(layers), _mean(layers[:third]), _mean(layers[-third:])]
        parts = [_most(given["experts"], mean) for mean in means[1:]]
        print(f"| {_short(task)} | {' | '.join(f'{share:.2f}' for share in means[0])} | {' | '.join(parts)} |")


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
