"""How often racing stops wrongly, and what it saves on the quickstart: whole searches with and without it.

    python benchmarks/racing.py rates [--count 2000] [--out FILE]    # minutes; simulated tasks that differ
    python benchmarks/racing.py run OUT [--rule 20%] [--seeds 10]    # ten minutes a search; goes on where it stopped
    python benchmarks/racing.py collect OUT...                       # what came out: results/quickstart-racing.jsonl
    python benchmarks/racing.py table                                # of that file

`run` makes a folder of runs for each rule: the quickstart with `llm-off` and its budget of 35, finalists and held-out
questions included. Searches with racing go another way than those without, as scores differ; so held-out scores are
compared seed by seed. `table` says besides, of the searches that asked everything, what each rule would have saved of
those same candidates in their order, and whether it would have stopped the one that was handed over, or the one with
the highest search score.

`rates` simulates candidates of which one ends ahead of the best rival by an answer or more, on tasks that differ in
size, weight, spread and unit, and counts how often it is stopped before. Three kinds are counted apart: the best of
seven equally good ones against the other six; those of them that end a quarter of a standard error ahead at most, for
which a stop is easiest; and one that is better than the other six. The last column is the share of the questions that
an equally good candidate is asked, wherever it ends. Its lines are results/racing-rates.jsonl.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measurements
import numpy as np
from measurements import QUICKSTART
from numpy.typing import NDArray
from simulator import Rules, raced

from llmevo.config import Racing, read_config
from llmevo.evaluation.questions import blocks
from llmevo.evaluation.racing import difference, is_beaten
from llmevo.evaluation.score import Score
from llmevo.evaluation.standard_errors import Clusters, ItemScores, unit
from llmevo.run.comparison import ComparisonRuns
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, read_log

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
    runs = ComparisonRuns(config, text, QUICKSTART.parent, options.out, ["llm-off"], options.seeds)
    runs.check()
    for entry in runs.play(lambda entry, event, _: print(entry.name, event.event, flush=True)):
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
    runs = measurements.read(options.file)
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


Array = NDArray[np.float64]

RIVALS = 6
RATED = ((5, 0.05), (10, 0.05), (5, 0.2))
"""Looks and stated rates."""

NEAR = 0.25
"""Standard errors ahead, at most, of a candidate that ends level with the best."""

BETTER = 0.15
"""How much better than its rivals one is that is better, in standard deviations of the questions' difficulties."""


@dataclass(frozen=True)
class Simulated:
    """A task whose questions differ, and whose candidates answer them alike but for a noise of each one's own."""

    size: int
    weight: float
    kind: str = "share"
    noise: float = 0.7
    """As a share of how much the questions differ."""
    repeats: str = ""
    """The task whose questions it asks again: candidates answer three quarters of them alike in both."""


CASES: dict[str, dict[str, Simulated]] = {
    "five tasks of 32": {f"t{i}": Simulated(32, 0.2) for i in range(5)},
    "five tasks of 32, unlike spreads": {f"t{i}": Simulated(32, 0.2, noise=0.1 * 2**i) for i in range(5)},
    "50 and 1,000, equal weights": {"a": Simulated(50, 0.5), "b": Simulated(1000, 0.5)},
    "50 that vary and 1,000 that hardly do": {"a": Simulated(50, 0.5, noise=1.5), "b": Simulated(1000, 0.5, noise=0.2)},
    "50 that hardly vary and 1,000 that do": {"a": Simulated(50, 0.5, noise=0.2), "b": Simulated(1000, 0.5, noise=1.5)},
    "100 and 400, weights 1 and 0.1": {"a": Simulated(100, 1.0), "b": Simulated(400, 0.1)},
    "the same, 100 that vary": {"a": Simulated(100, 1.0, noise=1.5), "b": Simulated(400, 0.1, noise=0.2)},
    "1 and 200": {"a": Simulated(1, 0.2), "b": Simulated(200, 0.8)},
    "3 and 200": {"a": Simulated(3, 0.2), "b": Simulated(200, 0.8)},
    "8 and 200, equal weights": {"a": Simulated(8, 0.5, noise=1.5), "b": Simulated(200, 0.5, noise=0.2)},
    "80 twice and 40": {"a": Simulated(80, 1.0), "b": Simulated(80, 1.0, repeats="a"), "c": Simulated(40, 1.0)},
    "accuracy, less another": {"a": Simulated(100, 1.0), "b": Simulated(100, -0.5)},
    "grades 1 to 10": {"a": Simulated(80, 1.0, "grade", 0.5), "b": Simulated(80, 1.0, "grade", 0.25)},
    "bits per byte, lower is better": {"a": Simulated(200, -1.0, "bits", 0.05), "b": Simulated(60, -1.0, "bits", 0.1)},
    "perplexity, lower is better": {"a": Simulated(200, -1.0, "perplexity", 0.05)},
    "accuracy, bits per byte and grades": {
        "a": Simulated(64, 1.0),
        "b": Simulated(50, -3.0, "bits", 0.05),
        "c": Simulated(40, 0.1, "grade", 0.5),
    },
}

KINDS: dict[str, Callable[[Array], Array]] = {
    "share": lambda ease: (ease > -0.3).astype(float),
    "grade": lambda ease: np.clip(np.round(6 + 2 * ease), 1, 10),
    "bits": lambda ease: 1.5 - 0.4 * ease,
    "perplexity": lambda ease: np.exp(3 - 0.8 * ease),
}
"""What an answer counts by how easy the question is."""

ENDS = np.array([-2.0, 2.0])


def rates(options: argparse.Namespace) -> None:
    lines: list[dict[str, Any]] = []
    print("| tasks | looks | stated | best of equals | of them level | better | asked |\n|---|---|---|---|---|---|---|")
    for name in options.cases or CASES:
        for looks, rate in options.rules:
            found = _rates(CASES[name], looks, rate, options.count)
            lines.append({"benchmark": "racing-rates", "tasks": name, "looks": looks, "stated": rate, **found})
            shares = [f"{found[kind][0] / found[kind][1]:.1%}" for kind in ("equal", "level", "better")]
            asked = found["asked"][0] / found["asked"][1]
            print(f"| {name} | {looks} | {rate:.0%} | {' | '.join(shares)} | {asked:.0%} |", flush=True)
    if options.out:
        options.out.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def _rates(tasks: Mapping[str, Simulated], looks: int, rate: float, count: int) -> dict[str, tuple[int, int]]:
    """Of each kind: how many were stopped, and of how many; and questions asked, and of how many."""
    weights = {name: task.weight for name, task in tasks.items()}
    parts = blocks({name: range(task.size) for name, task in tasks.items()}, looks)
    same = {name: [*range(1000 * place, 1000 * place + task.size)] for place, (name, task) in enumerate(tasks.items())}
    same = {name: same[tasks[name].repeats or name] for name in tasks}
    same = {name: [numbers[p] for part in parts for p in part.get(name, ())] for name, numbers in same.items()}
    whole = sum(task.size for task in tasks.values())
    found = {"equal": [0, 0], "level": [0, 0], "better": [0, 0], "asked": [0, 0]}

    def asked(own: ItemScores, rivals: Sequence[ItemScores]) -> int:
        field = sorted(rivals, key=lambda one: -_sum(one, weights))
        return _asked_of(own, field, weights, parts, rate, same)

    random = np.random.default_rng(0)
    while found["level"][1] < count:
        own, *others = sorted(_drawn(random, tasks, parts), key=lambda one: -_sum(one, weights))
        ahead = _sum(own, weights) - _sum(others[0], weights)
        if ahead < _answer(own, others, weights):
            continue
        near = ahead <= max(NEAR * difference(own, others[0], weights).error, 1.5 * _answer(own, others, weights))
        if found["equal"][1] < count or near:
            stopped = asked(own, others) < whole
            for kind in ["equal"] * (found["equal"][1] < count) + ["level"] * near:
                found[kind][0] += stopped
                found[kind][1] += 1
    while found["better"][1] < count:
        own, *others = _drawn(random, tasks, parts, BETTER)
        if _sum(own, weights) - max(_sum(other, weights) for other in others) >= _answer(own, others, weights):
            found["better"][0] += asked(own, others) < whole
            found["better"][1] += 1
    for _ in range(count):
        own, *others = _drawn(random, tasks, parts)
        found["asked"][0] += asked(own, others)
        found["asked"][1] += whole
    return {kind: (stopped, of) for kind, (stopped, of) in found.items()}


def _drawn(
    random: np.random.Generator,
    tasks: Mapping[str, Simulated],
    parts: Sequence[Mapping[str, Sequence[int]]],
    gain: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """The answers of a candidate, better than the others by `gain`, and its rivals, in the order of asking."""
    latent: dict[str, Array] = {}
    rows: dict[str, Array] = {}
    for name, task in tasks.items():
        own = random.standard_normal(task.size) + task.noise * random.standard_t(6, (1 + RIVALS, task.size))
        if task.repeats:
            own = np.where(random.random(own.shape) < 0.75, latent[task.repeats], own)
        latent[name] = own.copy()
        own[0] += gain * np.sign(task.weight) * np.sign(KINDS[task.kind](ENDS) @ [-1, 1])
        order = [place for part in parts for place in part.get(name, ())]
        rows[name] = KINDS[task.kind](own)[:, order]
    yield from ({name: own[place] for name, own in rows.items()} for place in range(1 + RIVALS))


def _asked_of(
    own: ItemScores,
    field: Sequence[ItemScores],
    weights: Mapping[str, float],
    parts: Sequence[Mapping[str, Sequence[int]]],
    rate: float,
    same: Clusters,
) -> int:
    """How many questions a candidate is asked until it is stopped."""
    counts = dict.fromkeys(weights, 0)
    for look, part in enumerate(parts, start=1):
        counts = {task: count + len(part.get(task, ())) for task, count in counts.items()}
        seen = {task: own[task][:count] for task, count in counts.items()}
        if is_beaten(seen, field, weights, look, len(parts), rate, same):
            break
    return sum(counts.values())


def _sum(answers: ItemScores, weights: Mapping[str, float]) -> float:
    return sum(weight * float(np.mean(answers[task])) for task, weight in weights.items())


def _answer(own: ItemScores, others: Sequence[ItemScores], weights: Mapping[str, float]) -> float:
    """What one answer counts, of the task where that is least."""
    return min(abs(w) * unit([others[0][t], own[t]]) / len(own[t]) for t, w in weights.items()) * (1 - 1e-9)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    rating = commands.add_parser("rates", help="how often candidates that end ahead are stopped")
    rating.add_argument("--count", type=int, default=2000, help="candidates of each kind")
    rating.add_argument("--cases", nargs="*", choices=CASES, metavar="TASKS")
    rating.add_argument("--out", type=Path)
    rating.set_defaults(command=rates, rules=RATED)
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
    return made


def main() -> None:
    options = parser().parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
