"""Merge methods with one weight for all models, on the search and the held-out questions of a config.

    python benchmarks/methods.py collect NAME --out FILE    # continues where it stopped; NAME: quickstart or overlap
    python benchmarks/methods.py table FILE

NAME is the config of `configs/quickstart.yml`, four experts of separate skills, or of
`benchmarks/landscapes/overlap.yml`, four experts that share skills; the latter has one set of questions. Every line of
the file has the right answers of one setting. The table shows each method at the setting that its search questions
prefer, so that the held-out score is not of a setting that was chosen by it.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import measurements

from llmevo.config import read_config
from llmevo.errors import CandidateError
from llmevo.evaluation.racing import difference
from llmevo.evaluation.standard_errors import clusters
from llmevo.merging.recipe import InputModel, Recipe
from llmevo.run.scorer import Scorer

HERE = Path(__file__).parent
CONFIGS = {
    "quickstart": HERE.parent / "configs" / "quickstart.yml",
    "overlap": HERE / "landscapes" / "overlap.yml",
}
WEIGHTS: Mapping[str, tuple[float, ...]] = {"task_arithmetic": (0.4, 0.55, 0.7, 0.85), "tsv": (0.4, 0.55, 0.7, 0.85)}
"""The weights of a method, by default those of `OTHERS`."""

OTHERS = (0.4, 0.6, 0.8)
SETTINGS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "task_arithmetic": {},
    "tsv": {"rank": (0.5, 1.0)},
    "wudi": {"blend": (0.5, 0.9)},
    "isotropic": {"gamma": (0.0, 0.5)},
    "subspace_boosting": {"beta": (0.5,)},
    "star": {"eta": (0.4, 0.7)},
    "knots": {"density": (0.3,)},
    "consensus": {"threshold": (0.4,)},
    "ties": {"density": (0.3,)},
}
"""The values of each method's own parameters."""


def settings() -> Iterator[tuple[str, dict[str, float]]]:
    """Every setting: the method, and the values of its parameters."""
    for method, own in SETTINGS.items():
        for values in itertools.product(*own.values()):
            for weight in WEIGHTS.get(method, OTHERS):
                yield method, {"weight": weight, **dict(zip(own, values, strict=True))}


def collect(options: argparse.Namespace) -> None:
    """Score the settings that the file lacks."""
    file = CONFIGS[options.name]
    scorer = Scorer(read_config(file), file.parent)
    genome = scorer.config.genome
    done = {(line["method"], json.dumps(line["parameters"])) for line in measurements.read(options.out)}
    for method, parameters in settings():
        if (method, json.dumps(parameters)) in done:
            continue
        recipe = Recipe(
            merge_method=method,
            base_model=genome.base_model,
            models=[InputModel(model=model) for model in genome.models],
            parameters={**parameters, "normalize": False},
            dtype=genome.dtype,
        )
        line: dict[str, Any] = {**measurements.environment(), "method": method, "parameters": parameters}
        try:
            scorer.engine.swap(recipe)
        except CandidateError as error:
            line["failed"] = str(error)
        else:
            found = {"search": scorer.evaluator, "heldout": scorer.heldout}
            for kind, evaluator in found.items():
                if evaluator:
                    score = evaluator.score(scorer.engine.lm)
                    line[kind] = {
                        "score": [score.total, score.stderr],
                        "items": score.item_scores,
                        "weights": {task.name: task.weight for task in evaluator.tasks},
                        "same": clusters(evaluator.texts()),
                    }
        measurements.append(options.out, line)
        print(method, parameters, {kind: line[kind]["score"] for kind in ("search", "heldout") if kind in line})


def table(options: argparse.Namespace) -> None:
    """Print each method at the setting with the best score on the search questions."""
    lines = [line for line in measurements.read(options.file) if "failed" not in line]
    best = {
        method: max((line for line in lines if line["method"] == method), key=lambda line: line["search"]["score"])
        for method in dict.fromkeys(line["method"] for line in lines)
    }
    plain = best["task_arithmetic"]
    kind = "heldout" if "heldout" in plain else "search"
    print("| method | setting | search | held out | more than task arithmetic |\n|---|---|---|---|---|")
    for method, line in best.items():
        setting = ", ".join(f"{name} {value:g}" for name, value in line["parameters"].items())
        cells = ["{:.3f} ± {:.3f}".format(*line[part]["score"]) for part in ("search", kind)]
        ours, theirs = line[kind], plain[kind]
        gain = difference(ours["items"], theirs["items"], ours["weights"], ours["same"])
        more = "" if line is plain else f"{gain.mean:+.3f} ± {gain.error:.3f}"
        print(f"| {method} | {setting} | {' | '.join(cells)} | {more} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("collect")
    command.add_argument("name", choices=CONFIGS)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run=collect)
    command = commands.add_parser("table")
    command.add_argument("file", type=Path)
    command.set_defaults(run=table)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
