"""Merge methods with one weight for all models, on the search and the held-out questions of a config.

    python benchmarks/methods.py collect NAME --out FILE    # continues where it stopped; NAME: quickstart or overlap
    python benchmarks/methods.py table FILE
    python benchmarks/methods.py search NAME --out FILE --runs FOLDER --budgets 35 60    # continues as well
    python benchmarks/methods.py picks FILE

NAME is the config of `configs/quickstart-plain.yml`, four experts of separate skills, or of `benchmarks/overlap.yml`,
four experts that share skills, with the same questions. Every line of the file has the right answers of one setting.
The held-out questions are asked of each method at the setting that its search questions prefer only, so that no setting
is chosen by them. A method after a plus sign merges models that are prepared by the steps before it.

`search` compares searches that choose the method (`genome.merge_method` a list) with those that have the config's own
method (`--only own` runs just these), both with the optimizer that the config has without an LLM. Its NAME may also be
`regmean` or `regmean_plusplus`, the config of `configs/quickstart.yml` with this preparation, or `overlap-regmean`: how
much of the preparation is used is a gene of all their searches. Each run goes on from one budget to the next, and a
line is written at each. `picks` shows what was chosen, and the held-out scores.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import measurements
import tables
import yaml
from measurements import QUICKSTART, SKILLS

from llmevo.config import Config, parse_config, read_config
from llmevo.errors import CandidateError
from llmevo.evaluation.racing import difference
from llmevo.export.runs import Run, open_run
from llmevo.merging.preparation.registry import STEPS
from llmevo.merging.recipe import QUESTIONS, Recipe
from llmevo.run.experiment import Experiment
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import RunLog, holds_run, read_log
from llmevo.run.loop import carry_on
from llmevo.run.resume import prepare
from llmevo.run.scorer import Scorer
from llmevo.run.start import new_log

HERE = Path(__file__).parent
CONFIGS = {
    "quickstart": QUICKSTART,
    "overlap": HERE / "overlap.yml",
}
WEIGHTS: Mapping[str, tuple[float, ...]] = {
    "task_arithmetic": (0.4, 0.55, 0.7, 0.85),
    "tsv": (0.4, 0.55, 0.7, 0.85),
    "regmean + task_arithmetic": (0.4, 0.6, 0.8, 1.0, 1.2, 1.4),
    "regmean + tsv": (1.0, 1.2, 1.4),
    "regmean + isotropic": (1.0, 1.2, 1.4),
    "svd_llm + regmean + task_arithmetic": (1.0, 1.2, 1.4),
    "regmean_plusplus + task_arithmetic": (1.0, 1.2, 1.4, 1.6),
}
"""The weights of a method, by default those of `OTHERS`."""

OTHERS = (0.4, 0.6, 0.8)
SETTINGS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "task_arithmetic": {},
    "regmean + task_arithmetic": {"prepare": (1.0,)},
    "regmean_plusplus + task_arithmetic": {"prepare": (1.0,)},
    "tsv": {"rank": (0.5, 1.0)},
    "isotropic": {"gamma": (0.0, 0.5)},
    "subspace_boosting": {"beta": (0.5,)},
    "aim + task_arithmetic": {"prepare": (0.6,)},
    "knots": {"density": (0.3,)},
    "wudi": {"blend": (0.5, 0.9)},
    "ties": {"density": (0.3,)},
    "consensus": {"threshold": (0.4,)},
    "star": {"eta": (0.4, 0.7)},
    "svd_llm + task_arithmetic": {"prepare": (1.0,)},
    "svd_llm + regmean + task_arithmetic": {"prepare": (1.0,)},
    "regmean + tsv": {"prepare": (1.0,), "rank": (1.0,)},
    "regmean + isotropic": {"prepare": (1.0,), "gamma": (0.5,)},
}
"""The values of each method's own parameters."""

Setting = tuple[str, dict[str, float]]
"""A method, and the values of its parameters."""


def settings() -> Iterator[Setting]:
    """Every setting."""
    for method, own in SETTINGS.items():
        for values in itertools.product(*own.values()):
            for weight in WEIGHTS.get(method, OTHERS):
                yield method, {"weight": weight, **dict(zip(own, values, strict=True))}


def collect(options: argparse.Namespace) -> None:
    """Ask the search questions of the settings that the file lacks, then the held-out ones of each method's best."""
    file = CONFIGS[options.name]
    scorer = Scorer(read_config(file), file.parent)
    for method, own in itertools.groupby(settings(), key=lambda setting: setting[0]):
        for setting in own:
            _ask(scorer, setting, "search", options.out)
        lines = [line for line in measurements.read(options.out) if line["method"] == method and "search" in line]
        if lines:
            best = max(lines, key=lambda line: line["search"]["score"])
            _ask(scorer, (method, best["parameters"]), "heldout", options.out)


def _ask(scorer: Scorer, setting: Setting, kind: str, out: Path) -> None:
    """Score a setting, unless the file has it."""
    method, parameters = setting
    made = {"method": method, "parameters": parameters}
    known = [line for line in measurements.read(out) if {**line, **made} == line]
    if any(kind in line or "failed" in line for line in known):
        return
    line: dict[str, Any] = {**measurements.environment(), **made}
    try:
        scorer.merge(_recipe(scorer, setting))
    except CandidateError as error:
        line["failed"] = str(error)
    else:
        evaluator = scorer.evaluators[kind]
        score = evaluator.score(scorer.engine.lm)
        line[kind] = {
            "score": [score.total, score.stderr],
            "items": score.item_scores,
            "weights": {task.name: task.weight for task in evaluator.tasks},
            "same": evaluator.clusters,
        }
    measurements.append(out, line)
    print(method, parameters, kind, line[kind]["score"] if kind in line else line["failed"], flush=True)


def _recipe(scorer: Scorer, setting: Setting) -> Recipe:
    """The recipe of a setting."""
    genome, (name, parameters) = scorer.config.genome, setting
    *steps, method = name.split(" + ")
    prepare: dict[str, Any] | None = None
    if steps:
        own = {"aim": {"aim": {"omega": 0.0}}}
        prepare = {"steps": [own.get(step, step) for step in steps], "text": QUESTIONS}
        if any(STEPS[step].measures == "grams" for step in steps):
            prepare["tasks"] = _own_tasks(scorer.config)
    models = [{"model": str(model)} for model in genome.models if model != genome.base_model]
    return Recipe.model_validate(
        {
            "merge_method": method,
            "base_model": str(genome.base_model),
            "models": models,
            "parameters": {**parameters, "normalize": False},
            "prepare": prepare,
            "dtype": genome.dtype,
        }
    )


def _own_tasks(config: Config) -> dict[str, list[str]]:
    """Return the tasks of each expert's own skills, by which RegMean and SVD-LLM measure it."""
    return {
        str(model): [
            task.name for task in config.tasks if any(skill in task.name and skill in model.name for skill in SKILLS)
        ]
        for model in config.genome.models
        if model != config.genome.base_model
    }


def table(options: argparse.Namespace) -> None:
    """Print each method at the setting with the best score on the search questions."""
    lines = measurements.read(options.file)
    print("\n".join([measurements.made_on(lines), "", *rows(lines)]))


def rows(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table's lines."""
    searched = [line for line in lines if "search" in line]
    best = {
        method: max((line for line in searched if line["method"] == method), key=lambda line: line["search"]["score"])
        for method in dict.fromkeys(line["method"] for line in searched)
    }
    asked = {
        line["method"]: line
        for line in lines
        if "heldout" in line and line["parameters"] == best[line["method"]]["parameters"]
    }
    plain = asked["task_arithmetic"]["heldout"] if "task_arithmetic" in asked else None
    found = ["| method | setting | search | held out | more than task arithmetic |", "|---|---|---|---|---|"]
    for method, line in best.items():
        setting = ", ".join(f"{name} {value:g}" for name, value in line["parameters"].items())
        held = asked[method]["heldout"] if method in asked else None
        gain = ""
        if held and plain and method != "task_arithmetic":
            mean = difference(held["items"], plain["items"], plain["weights"], plain["same"])
            gain = f"{mean.mean:+.3f} ± {mean.error:.3f}"
        found.append(f"| {method} | {setting} | {_shown(line['search'])} | {_shown(held) if held else ''} | {gain} |")
    return found


def _shown(asked: Mapping[str, Any]) -> str:
    return "{:.3f} ± {:.3f}".format(*asked["score"])


REGMEAN = HERE.parent / "configs" / "quickstart.yml"
PREPARED = {
    "regmean": (REGMEAN, "regmean"),
    "regmean_plusplus": (REGMEAN, "regmean_plusplus"),
    "overlap-regmean": (CONFIGS["overlap"], "regmean"),
}
"""The configs of searches over prepared models, and the step of the preparation."""

SEARCHED = {**CONFIGS, **{name: file for name, (file, _) in PREPARED.items()}}
"""The configs of all searches."""

CHOICES = {
    **{name: ["task_arithmetic", "tsv", "wudi", "isotropic", "subspace_boosting", "ties"] for name in CONFIGS},
    **{name: ["task_arithmetic", "tsv", "isotropic", "ties"] for name in PREPARED},
}
"""The methods of a search that may choose; the first one is the config's own."""


def _searched(name: str) -> Config:
    """The config of a search."""
    file = SEARCHED[name]
    config = read_config(file)
    if name not in PREPARED:
        return config
    given, usual = config.model_dump(mode="json", exclude_unset=True), read_config(REGMEAN).genome
    given["genome"] |= {"prepare": {"steps": [PREPARED[name][1]], "tasks": _own_tasks(config)}, "bounds": usual.bounds}
    return parse_config(given, str(file))


def search(options: argparse.Namespace) -> None:
    """Run the searches that the file lacks: with the choice, and with the config's method only."""
    file, config = SEARCHED[options.name], _searched(options.name)
    done = {(line["config"], line["methods"], line["seed"], line["budget"]) for line in measurements.read(options.out)}
    several = CHOICES[options.name]
    searched = {"own": [several[0]], "choice": [several], "both": [several[0], several]}[options.only]
    for seed, methods in itertools.product(options.seeds, searched):
        named = " ".join(methods) if isinstance(methods, list) else methods
        folder = options.runs / f"{options.name}-{'choice' if methods is several else methods}-{seed}"
        for budget in sorted(options.budgets):
            if (options.name, named, seed, budget) in done:
                continue
            given = config.model_dump(mode="json", exclude_unset=True)
            given["genome"]["merge_method"] = methods
            given["search"] |= {"seed": seed, "budget": budget}
            if seed != config.evaluation_seed:  # as in `llmevo compare`, so that other runs' baselines are known
                given["search"] |= {"evaluation_seed": config.evaluation_seed}
            run = _carried_on(parse_config(given, str(file)), file.parent, folder)
            best = run.best
            assert best
            line: dict[str, Any] = {**measurements.environment(), "config": options.name, "methods": named}
            line |= {"seed": seed, "budget": budget, "method": best.recipe.merge_method, "genes": dict(best.genes)}
            line |= {"search": [best.score, best.stderr]}
            line |= {"heldout": {name: [row.score, row.stderr] for name, row in run.heldout.items()}}
            measurements.append(options.out, line)
            print(named, seed, budget, line["method"], line["search"], line["heldout"].get("best"), flush=True)


def _carried_on(config: Config, root: Path, folder: Path) -> Run:
    """Carry on a run, which takes over what other runs beside it know: the scores of start rows and baselines are the
    same in all, and a run is what it would be alone.
    """
    others = sorted(other for other in folder.parent.glob("*") if other != folder and holds_run(other))
    begun = holds_run(folder)
    alone, text = Experiment(config, root), yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True))
    with RunLog(folder, resume=True) if begun else new_log(alone, folder, text) as log:
        experiment = prepare(log, config, root) if begun else alone
        for other in others:
            experiment.scorer.remember(RunState.fold(iter(read_log(other))))
        carry_on(experiment, log)
    return open_run(folder)


def picks(options: argparse.Namespace) -> None:
    """Print what the searches chose."""
    lines = measurements.read(options.file)
    print("\n".join([measurements.made_on(lines), "", *picked(lines)]))


def picked(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table's lines. A weight is at its bound where it is the highest that the config allows."""
    yield (
        "| config | search over | evaluations | seeds | chosen | share of the preparation | weights at the bound"
        " | search | held out | over the best coefficient |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for group in sorted({(line["config"], line["methods"], line["budget"]) for line in lines}):
        config, methods, budget = group
        mine = [line for line in lines if (line["config"], line["methods"], line["budget"]) == group]
        chosen = Counter(line["method"] for line in mine)
        named = ", ".join(f"{name} {count}" for name, count in chosen.most_common())
        shares = [value for line in mine for name, value in line["genes"].items() if name.endswith("/prepare")]
        highest = _searched(config).genome.bounds["weight"][1]
        weights = [value for line in mine for name, value in line["genes"].items() if name.endswith("/weight")]
        bound = sum(value >= highest - 1e-6 for value in weights)
        scores = [tables.with_error([line["search"][0] for line in mine])]
        asked = [line["heldout"] for line in mine if "best" in line["heldout"]]
        scores += [tables.with_error([rows["best"][0] for rows in asked])]
        scores += [tables.with_error([rows["best"][0] - _coefficient(rows) for rows in asked], "+")]
        cells = [f"{fmean(shares):.2f}" if shares else "", f"{bound} of {len(weights)}", *scores]
        yield f"| {config} | {methods.replace(' ', ', ')} | {budget} | {len(mine)} | {named} | {' | '.join(cells)} |"


def _coefficient(rows: Mapping[str, Sequence[float]]) -> float:
    """The held-out score of the best coefficient, whose row is named by its weight."""
    return next(score for name, (score, _) in rows.items() if name.startswith("coefficient"))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    command = commands.add_parser("collect")
    command.add_argument("name", choices=CONFIGS)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run=collect)
    command = commands.add_parser("table")
    command.add_argument("file", type=Path)
    command.set_defaults(run=table)
    command = commands.add_parser("search")
    command.add_argument("name", choices=SEARCHED)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--runs", type=Path, required=True, help="a folder for the runs")
    command.add_argument("--budgets", type=int, nargs="+", default=[35, 60])
    command.add_argument("--seeds", type=int, nargs="+", default=[*range(5)], help="0 1 2 3 4 by default")
    command.add_argument("--only", choices=("own", "choice", "both"), default="both", help="which of the two searches")
    command.set_defaults(run=search)
    command = commands.add_parser("picks")
    command.add_argument("file", type=Path)
    command.set_defaults(run=picks)
    return made


def main() -> None:
    options = parser().parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
