"""The quickstart's four experts as a mixture, beside the best dense merges of the same experts.

    llmevo run configs/quickstart-moe.yml --out runs/quickstart-moe
    python benchmarks/mixture.py collect runs/quickstart-moe --out benchmarks/results/mixture.jsonl
    python benchmarks/mixture.py table benchmarks/results/mixture.jsonl
    python benchmarks/mixture.py routing benchmarks/results/mixture.jsonl

`collect` appends a line for a run: it asks the best mixture so far the held-out questions, and measures the seconds of
the processor that a question takes, and those of a search question, of the same kinds, with a dense merge. A run of the
same config without `prepare` has a row of its own in `table`. The scores of single experts and of dense merges are
those of `quickstart-plain.jsonl` and `quickstart.jsonl`. `routing` is of the last line.
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
import quickstart
import tables
import torch
from measurements import QUICKSTART

from llmevo.config import read_config
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.score import Score
from llmevo.merging.mixture.mixture import ROUTER
from llmevo.merging.recipe import QUESTIONS, Recipe
from llmevo.merging.writer import MergedModel
from llmevo.run.experiment import Experiment
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import read_log
from llmevo.run.scorer import Scorer

RESULTS = Path(__file__).parent / "results"


def collect(options: argparse.Namespace) -> None:
    """Append a line for a run."""
    torch.set_num_threads(1)
    state = RunState.fold(iter(read_log(options.run)))
    assert state.started
    assert state.best
    scorer = Experiment.of_log(state.started, options.run).scorer
    router = str((options.run / ROUTER).absolute())
    recipe = Recipe.model_validate(state.recipes[state.best.candidate.id]).with_router(router)
    if recipe.prepare and recipe.prepare.text == QUESTIONS:
        recipe = recipe.with_text(str((options.run / QUESTIONS).absolute()))
    metrics = {task.name: task.metric for task in state.heldout_tasks}
    genome = scorer.config.genome
    config = read_config(QUICKSTART)
    config = config.model_copy(update={"genome": config.genome.model_copy(update={"dtype": genome.dtype})})
    dense = Scorer(config, QUICKSTART.parent)
    dense.engine.swap(dense.space.decode(dense.space.uniform()))
    seconds = {"dense": _timed(dense, dense.evaluator)[1]}
    del dense
    scorer.engine.swap(recipe)
    heldout = measurements.heldout(scorer.config, scorer.root, options.limit)
    score, seconds["mixture"] = _timed(scorer, heldout)
    line: dict[str, Any] = {
        **measurements.environment(),
        "evaluations": len(state.trials),
        "selected": len(state.selected),
        "seed": state.started.seed,
        "dtype": genome.dtype,
        "prepare": genome.prepare.names if genome.prepare else [],
        "optimizer": state.started.config["search"]["optimizer"],
        "score": [score.total, score.stderr],
        "tasks": {task: found[metrics[task]] for task, found in score.tasks.items()},
        "questions": score.items,
        "best": {
            "genes": state.best.candidate.genes,
            "search": state.best.value,
            "origin": state.best.candidate.origin,
        },
        "parameters": _parameters(recipe, scorer),
        "swap": [trial.seconds["merge"] for trial in state.trials.values() if "merge" in trial.seconds],
        "seconds": seconds,
        "routing": json.loads(scorer.routing(recipe)),
    }
    print({key: line[key] for key in ("score", "tasks", "seconds")}, flush=True)
    measurements.append(options.out, line)


def _timed(scorer: Scorer, evaluator: Evaluator) -> tuple[Score, float]:
    """The score of the running model, and the seconds of the processor a question."""
    started = time.process_time()
    score = evaluator.score(scorer.engine.lm)
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
    print("\n".join(_table(measurements.read(options.file))))


def _table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    tasks = [*lines[0]["tasks"]]
    plain, prepared = _dense_runs()
    yield measurements.made_on([*lines, *plain, *prepared])
    yield ""
    yield (
        f"| model | questions | held out | {' | '.join(map(tables.short, tasks))} | parameters | used by a token"
        " | seconds a question, of the dense merge's |"
    )
    yield "|---" * (len(tasks) + 6) + "|"
    size = lines[0]["parameters"]
    dense = [f"{size['dense'] / 1e6:.0f} M"] * 2
    for questions in sorted({line["questions"] for line in lines}, reverse=True):
        for place, (name, score, values) in enumerate(_dense(tasks, questions // len(tasks))):
            yield _row(name, questions, score, values, [*dense, "" if place else "1"])
        kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for line in lines:
            if line["questions"] == questions:
                kinds.setdefault(tuple(line["prepare"]), []).append(line)
        for prepared, own in kinds.items():
            counts = " and ".join(str(line["evaluations"]) for line in own)
            called = f"best mixture of {counts} candidates" + (f", mean of {len(own)} searches" if len(own) > 1 else "")
            called += f", its attention of experts prepared by `{', '.join(prepared)}`" if prepared else ""
            active = sorted({f"{line['parameters']['active'] / 1e6:.0f} M" for line in own})
            sizes = [f"{size['mixture'] / 1e6:.0f} M", " or ".join(active)]
            score = [fmean(line["score"][part] for line in own) for part in range(2)]
            values = [fmean(line["tasks"][task] for line in own) for task in tasks]
            times = fmean(line["seconds"]["mixture"] / line["seconds"]["dense"] for line in own)
            yield _row(f"**{called}**", questions, score, values, [*sizes, f"{times:.1f}"])
    for machine, own in measurements.machines(lines).items():
        swaps = [seconds for line in own for seconds in sorted(line["swap"])[:-1]]  # the longest one fits the routers
        line = own[-1]
        yield ""
        yield (
            f"On {machine}, in {line['dtype']}: a swap from one mixture to another takes {median(swaps):.1f} s on the"
            f" median, a question {line['seconds']['mixture']:.3f} s, and {line['seconds']['dense']:.3f} s with a dense"
            " merge."
        )


def _row(name: str, questions: int, score: Sequence[float], values: Any, rest: Sequence[str]) -> str:
    shown = [str(questions), f"{score[0]:.3f} ± {score[1]:.3f}", *(f"{value:.3f}" for value in values), *rest]
    return f"| {name} | {' | '.join(shown)} |"


def _dense_runs() -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """llmevo's own searches on the quickstart with experts as they are, and with prepared ones."""
    files = (RESULTS / "quickstart-plain.jsonl", RESULTS / "quickstart.jsonl")
    plain, prepared = (quickstart.of_llmevo(measurements.read(file)) for file in files)
    return plain, prepared


def _dense(tasks: Sequence[str], count: int) -> Iterator[tuple[str, tuple[float, float], list[float]]]:
    """Name, score and values by task of the best expert and of dense merges, on the first questions of each task."""
    plain, prepared = _dense_runs()
    parents = [row["right"] for row in plain[0]["rows"] if row["kind"] == "parent"]
    yield "best expert", *max((_mean_of([right], tasks, count) for right in parents), key=lambda found: found[0][0])
    for runs, called in ((plain, ""), (prepared, ", of experts prepared by `regmean`")):
        right = [*map(quickstart.best_merge, runs)]
        times = f"mean of {len(runs)} searches" if len(runs) > 1 else "one search"
        yield f"best dense merge{called}, {times}", *_mean_of(right, tasks, count)


def _mean_of(
    runs: Sequence[Mapping[str, str]], tasks: Sequence[str], count: int
) -> tuple[tuple[float, float], list[float]]:
    """Score with its error, and values by task, of several runs' answers to the first questions of each task."""
    runs = [{task: right[:count] for task, right in run.items()} for run in runs]
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
        print(f"| {tables.short(task)} | {' | '.join(f'{share:.2f}' for share in means[0])} | {' | '.join(parts)} |")


def _mean(layers: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(layer[place] for layer in layers) for place in range(len(layers[0]))]


def _most(names: Sequence[str], shares: Sequence[float]) -> str:
    place = max(range(len(names)), key=lambda expert: shares[expert])
    return f"{names[place]} {shares[place]:.2f}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("run", type=Path)
    collecting.add_argument("--out", type=Path, required=True)
    collecting.add_argument("--limit", type=int, help="held-out questions a task; all by default")
    collecting.set_defaults(command=collect)
    for name, command in (("table", table), ("routing", routing)):
        printing = commands.add_parser(name)
        printing.add_argument("file", type=Path)
        printing.set_defaults(command=command)
    return made


def main() -> None:
    options = parser().parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
