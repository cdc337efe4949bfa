"""What racing saves on the quickstart itself: whole searches with it and without it, on the same seeds.

    python benchmarks/racing.py run OUT [--rule 20%] [--seeds 10]    # ten minutes a search; goes on where it stopped
    python benchmarks/racing.py collect OUT...                       # what came out: results/quickstart-racing.jsonl
    python benchmarks/racing.py table                                # of that file, what the README says

`run` makes a folder of runs for each rule: the quickstart with `llm-off` and its budget of 35, finalists and held-out
questions included. Searches with racing go another way than those without, as scores differ; so held-out scores are
compared seed by seed. `table` says besides, of the searches that asked everything, what each rule would have saved of
those same candidates in their order, and whether it would have stopped the one that was handed over, or the one with
the highest search score.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from simulator import Rules, raced

from llmevo.config import read_config
from llmevo.runlog import LOG, read_log
from llmevo.schema import Racing
from llmevo.state import RunState
from llmevo.tournament import Tournament
from llmevo.trial import Score

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yml"
RESULTS = Path(__file__).parent / "results" / "quickstart-racing.jsonl"

RULES: dict[str, Racing | None] = {
    "everything": None,
    "5%": Racing(),
    "10%": Racing(error_rate=0.1),
    "20%": Racing(error_rate=0.2),
    "5%, 10 looks": Racing(looks=10),
    "20%, 10 looks": Racing(error_rate=0.2, looks=10),
}


def run(options: argparse.Namespace) -> None:
    config = read_config(QUICKSTART)
    search = config.search.model_copy(update={"racing": RULES[options.rule]})
    config = config.model_copy(update={"search": search})
    text = QUICKSTART.read_text()
    tournament = Tournament(config, text, QUICKSTART.parent, options.out, ["llm-off"], options.seeds)
    tournament.check()
    for entry in tournament.play(lambda entry, event, _: print(entry.name, event.event, flush=True)):
        print(f"{entry.name} is at its end", flush=True)


def collect(options: argparse.Namespace) -> None:
    lines: list[str] = []
    for folder in options.out:
        for log in sorted(folder.glob(f"*/{LOG}")):
            state = RunState.fold(iter(read_log(log)))
            if state.started and state.finished:
                lines.append(json.dumps(_collected(state), separators=(",", ":")))
    RESULTS.write_text("".join(f"{line}\n" for line in lines))


def _collected(state: RunState) -> dict[str, Any]:
    assert state.started
    assert state.finished
    racing = state.started.config["search"].get("racing", {})
    rule = "everything" if racing is False or racing is None else f"{Racing(**racing).error_rate:.0%}"
    best = state.heldout["best"]
    return {
        "rule": rule,
        "seed": state.started.seed,
        "heldout": best.score,
        "stderr": best.stderr,
        "best": state.finished.best,
        "candidates": [
            {"id": number, "origin": trial.candidate.origin, "right": _written(trial.score.item_scores)}
            for number, trial in state.trials.items()
            if trial.score
        ],
    }


def _written(scores: Mapping[str, Sequence[float]]) -> dict[str, str]:
    return {task: "".join(str(int(right)) for right in own) for task, own in scores.items()}


def _read(right: Mapping[str, str]) -> dict[str, list[float]]:
    return {task: [float(c) for c in own] for task, own in right.items()}


def table(options: argparse.Namespace) -> None:
    runs = [json.loads(line) for line in options.file.read_text().splitlines()]
    by_rule = {rule: {run["seed"]: run for run in runs if run["rule"] == rule} for rule in RULES}
    whole = by_rule["everything"]
    print("| rule | searches | held out | against everything | search questions |\n|---|---|---|---|---|")
    for rule, own in by_rule.items():
        seeds = sorted({*own} & {*whole})
        if seeds:
            scores = np.array([own[seed]["heldout"] for seed in seeds])
            gaps = scores - np.array([whole[seed]["heldout"] for seed in seeds])
            error = gaps.std(ddof=1) / np.sqrt(len(gaps)) if len(gaps) > 1 else np.nan
            share = sum(_asked(own[seed]) for seed in seeds) / sum(_asked(whole[seed]) for seed in seeds)
            print(f"| {rule} | {len(seeds)} | {scores.mean():.3f} | {gaps.mean():+.3f} ± {error:.3f} | {share:.0%} |")
    print("\n| rule | of everything | handed over, and stopped | highest score, and stopped |\n|---|---|---|---|")
    for rule, racing in RULES.items():
        if racing:
            found = [_replayed(one["candidates"], racing) for one in whole.values()]
            share = sum(asked for asked, _ in found) / sum(map(_asked, whole.values()))
            lost = sum(one["best"] in stopped for one, (_, stopped) in zip(whole.values(), found, strict=True))
            first = sum(_first(one) in stopped for one, (_, stopped) in zip(whole.values(), found, strict=True))
            print(f"| {rule} | {share:.0%} | {lost} of {len(found)} | {first} of {len(found)} |")


def _asked(one: Mapping[str, Any]) -> int:
    return sum(len(own) for candidate in one["candidates"] for own in candidate["right"].values())


def _first(one: Mapping[str, Any]) -> int:
    """The candidate with the highest score of a search that asked everything."""
    return max(one["candidates"], key=lambda candidate: _score(_read(candidate["right"])))["id"]


def _score(answers: Mapping[str, Sequence[float]]) -> float:
    return float(np.mean([np.mean(own) for own in answers.values()]))  # the quickstart's tasks count alike


def _replayed(candidates: Sequence[Mapping[str, Any]], racing: Racing) -> tuple[int, set[int]]:
    """Questions asked, and who is stopped, of candidates that were asked everything, the uniform merge being first."""
    rules = Rules(racing.looks, racing.error_rate)
    scores: list[Score] = []
    stopped = set[int]()
    for candidate in sorted(candidates, key=lambda one: one["origin"] != "uniform"):
        answers = {task: np.array(own) for task, own in _read(candidate["right"]).items()}
        scores.append(raced(answers, scores, {task: 1 / len(answers) for task in answers}, rules))
        if scores[-1].items < sum(map(len, answers.values())):
            stopped.add(candidate["id"])
    return sum(score.items for score in scores), stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="search; goes on where it stopped")
    running.add_argument("out", type=Path)
    running.add_argument("--rule", choices=RULES, default="everything")
    running.add_argument("--seeds", type=int, default=10)
    running.set_defaults(command=run)
    collecting = commands.add_parser("collect", help="read finished runs below these folders")
    collecting.add_argument("out", type=Path, nargs="+")
    collecting.set_defaults(command=collect)
    printing = commands.add_parser("table", help="print what was collected")
    printing.add_argument("--file", type=Path, default=RESULTS)
    printing.set_defaults(command=table)
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
