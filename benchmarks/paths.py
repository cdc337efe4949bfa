"""Layer paths of the quickstart's experts.

    python benchmarks/paths.py search RUNS --out benchmarks/results/paths.jsonl [--arms paths,weights] [--seeds 3]
    python benchmarks/paths.py table benchmarks/results/paths.jsonl

`search` compares searches of weights, of paths and of both at the same number of candidates, on the same questions: the
tasks with choices, the first `--limit` questions of each. Every run has its log in a folder of RUNS and goes on where
an earlier call has stopped; its best candidate is then scored on held-out questions, and a line is appended. `table`
gives the scores and the paired differences from the search of weights on the held-out questions. Their errors are the
larger of those between seeds and of those of the questions.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measurements
import numpy as np
from measurements import QUICKSTART, SKILLS

ARMS: Mapping[str, Mapping[str, Any]] = {
    "weights": {"optimizer": "llm-off"},
    "paths": {"optimizer": "paths"},
    "both": {"optimizer": "llm-off", "spaces": "both"},
    "random edits": {"optimizer": "paths-random"},
    "genetic algorithm": {"optimizer": "paths-ga"},
    "single blocks": {"optimizer": "paths-exhaustive"},
    "indicators": {"optimizer": "paths-cma-es"},
}
NAMES = {
    "base": "base model",
    "parent": "best expert",
    "uniform": "uniform merge",
    "weights": "weights (`llm-off`)",
    "paths": "paths (`paths`)",
    "both": "both (`spaces: both`)",
    "random edits": "random edits (`paths-random`)",
    "genetic algorithm": "genetic algorithm (`paths-ga`)",
    "single blocks": "blocks run twice (`paths-exhaustive`)",
    "indicators": "the paper's indicators (`paths-cma-es`)",
}


def config_of(arm: str, seed: int, budget: int, limit: int) -> Any:
    """The config of one run; racing and questions are those of all others."""
    from llmevo.config import parse_config
    from llmevo.models.yaml import read_yaml

    raw: Any = read_yaml(QUICKSTART.read_text())
    raw["tasks"] = [{"name": f"quickstart_{task}", "weight": 1 / len(SKILLS)} for task in SKILLS]
    raw |= {"heldout": [], "limit": limit}
    raw["search"] = {"budget": budget, "seed": seed, "evaluation_seed": 0, "finalists": 0, **ARMS[arm]}
    raw["engine"] = {"backend": "hf", "workers": 1}
    return parse_config(raw, QUICKSTART.name)


def search(
    runs: Path, out: Path | None, arms: Sequence[str], seeds: int, budget: int, limit: int, heldout: int
) -> None:
    """Make the runs, one seed of all arms after the other, and append a line for each."""
    from llmevo.run.scorer import Scorer

    known = {(line["arm"], line["seed"]) for line in measurements.read(out)} if out else set[Any]()
    scorer = Scorer(config_of("weights", 0, budget, limit), QUICKSTART.parent)
    held: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        for arm in arms:
            if (arm, seed) not in known:
                line = _run(runs / f"{arm.replace(' ', '-')}-{seed}", arm, seed, budget, limit, heldout, scorer, held)
                measurements.append(out, line | measurements.environment())
                print(arm, seed, f"{line['search']:.4f}", line["best"], line["seconds"], flush=True)


def _run(
    folder: Path,
    arm: str,
    seed: int,
    budget: int,
    limit: int,
    heldout: int,
    scorer: Any,
    held: dict[str, dict[str, list[float]]],
) -> dict[str, Any]:
    """One run to its end, and the held-out answers of its best candidate and of the start rows."""
    from llmevo.merging.recipe import Recipe
    from llmevo.run.experiment import Experiment
    from llmevo.run.log.events import RunStarted
    from llmevo.run.log.state import RunState
    from llmevo.run.log.storage import LOG, RunLog, holds_run, read_log
    from llmevo.run.loop import carry_on

    config, started = config_of(arm, seed, budget, limit), time.monotonic()
    scorer.cache.by_run.clear()  # of other runs: scores of equal candidates are known through `by_items`
    with RunLog(folder, resume=(folder / LOG).exists() and holds_run(folder)) as log:
        begun = next((event for event in log.recorded if isinstance(event, RunStarted)), None)
        carry_on(Experiment(config, QUICKSTART.parent, recorded=begun, shared=scorer), log)
    state = RunState.fold(iter(read_log(folder)))
    seconds = time.monotonic() - started
    best, parent = state.best, state.best_parent
    uniform = state.best_of("uniform")
    assert best
    assert best.score
    rows = {"best": best, "parent": parent, "uniform": uniform}
    answers: dict[str, dict[str, list[float]]] = {}
    recipes = {name: state.recipes[trial.candidate.id] for name, trial in rows.items() if trial}
    base = config.genome.base_model
    assert base
    recipes["base"] = Recipe.of_one(base, config.genome.dtype).as_dict()
    for name, recipe in recipes.items():
        key = json.dumps(recipe, sort_keys=True)
        if key not in held:
            held[key] = _held_out(scorer, Recipe.model_validate(recipe), heldout)
        answers[name] = held[key]
    trials = [*state.trials.values()]
    return {
        "benchmark": "paths",
        "part": "search",
        "arm": arm,
        "seed": seed,
        "budget": budget,
        "limit": limit,
        "candidates": len(trials),
        "failed": sum(trial.score is None for trial in trials),
        "asked": sum(trial.score.items for trial in trials if trial.score),
        "search": best.score.total,
        "best": best.candidate.path or best.candidate.origin,
        "layers": len(scorer.space.paths.parse(best.candidate.path)) if best.candidate.path else scorer.layers,
        "seconds": round(seconds, 1),
        "answers": answers,
        "trials": [
            [trial.candidate.origin, trial.candidate.path, trial.score.total if trial.score else None]
            for trial in trials
        ],
    }


def _held_out(scorer: Any, recipe: Any, limit: int) -> dict[str, list[float]]:
    """{task: the score of each held-out question}."""
    from llmevo.evaluation.tasks.task import Task

    if "benchmark_heldout" not in vars(scorer):
        tasks = [
            Task.model_validate({"name": f"quickstart_{task}_heldout", "weight": 1 / len(SKILLS)}) for task in SKILLS
        ]
        config = scorer.config.model_copy(update={"heldout": tasks})
        vars(scorer)["benchmark_heldout"] = measurements.heldout(config, QUICKSTART.parent, limit)
    scorer.engine.swap(recipe, "")
    score = vars(scorer)["benchmark_heldout"].score(scorer.engine.lm)
    return {task: [float(value) for value in own] for task, own in score.item_scores.items()}


def _mean(answers: Mapping[str, Sequence[float]]) -> float:
    return float(np.mean([np.mean(own) for own in answers.values()]))


def _error(answers: Mapping[str, Sequence[float]]) -> float:
    """The standard error of the mean over tasks, of the questions."""
    return float(np.sqrt(sum(np.var(own, ddof=1) / len(own) for own in answers.values())) / len(answers))


def _difference(ones: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The mean paired difference of runs of equal seeds, and the larger of its two errors."""
    pairs = [(one["answers"]["best"], other["answers"]["best"]) for one, other in zip(ones, others, strict=True)]
    each = [{task: np.subtract(one[task], other[task]) for task in one} for one, other in pairs]
    means = [_mean(own) for own in each]
    pooled = {task: np.mean([own[task] for own in each], axis=0) for task in each[0]}
    between = float(np.std(means, ddof=1)) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return float(np.mean(means)), max(between, _error(pooled))


def table(file: Path) -> str:
    """The results as Markdown."""
    lines = [line for line in measurements.read(file) if line.get("part") == "search"]
    by_arm = {arm: {line["seed"]: line for line in lines if line["arm"] == arm} for arm in ARMS}
    by_arm = {arm: own for arm, own in by_arm.items() if own}
    if not by_arm:
        return ""
    some = next(iter(by_arm.values()))
    first = next(iter(some.values()))
    count = sum(map(len, first["answers"]["base"].values()))
    rows = [
        measurements.made_on(lines),
        "",
        "| search | seeds | search score | held out | against weights | layers of the best |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("base", "parent", "uniform"):
        answers = first["answers"][name]
        rows.append(f"| {NAMES[name]} | | | {100 * _mean(answers):.1f} ± {100 * _error(answers):.1f} | | |")
    for arm, own in by_arm.items():
        seeds = sorted({*own} & {*by_arm.get("weights", own)})
        runs = [own[seed] for seed in sorted(own)]
        means = [_mean(run["answers"]["best"]) for run in runs]
        between = float(np.std(means, ddof=1)) / len(means) ** 0.5 if len(means) > 1 else 0.0
        pooled = {
            task: np.mean([run["answers"]["best"][task] for run in runs], axis=0) for task in runs[0]["answers"]["best"]
        }
        error = max(between, _error(pooled))
        against = ""
        if arm != "weights" and "weights" in by_arm and seeds:
            mean, of = _difference([own[s] for s in seeds], [by_arm["weights"][s] for s in seeds])
            against = f"{100 * mean:+.1f} ± {100 * of:.1f}"
        depth = ", ".join(str(run["layers"]) for run in runs)
        searched = 100 * float(np.mean([run["search"] for run in runs]))
        held = f"{100 * np.mean(means):.1f} ± {100 * error:.1f}"
        rows.append(f"| {NAMES[arm]} | {len(runs)} | {searched:.1f} | {held} | {against} | {depth} |")
    budget, limit = first["budget"], first["limit"]
    rows.append("")
    rows.append(
        f"{budget} candidates a run, {len(SKILLS)} tasks of {limit} questions each; accuracy in percent, ± one standard"
        f" error; {count} held-out questions."
    )
    return "\n".join(rows)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = made.add_subparsers(dest="part", required=True)
    searching = parts.add_parser("search")
    searching.add_argument("runs", type=Path)
    searching.add_argument("--out", type=Path)
    searching.add_argument("--arms", default=",".join(ARMS))
    searching.add_argument("--seeds", type=int, default=3)
    searching.add_argument("--budget", type=int, default=24)
    searching.add_argument("--limit", type=int, default=32)
    searching.add_argument("--heldout", type=int, default=128, help="held-out questions of each task")
    printing = parts.add_parser("table")
    printing.add_argument("file", type=Path)
    return made


def main() -> None:
    given = parser().parse_args()
    if given.part == "table":
        print(table(given.file))
    else:
        arms = given.arms.split(",")
        search(given.runs, given.out, arms, given.seeds, given.budget, given.limit, given.heldout)


if __name__ == "__main__":
    main()
