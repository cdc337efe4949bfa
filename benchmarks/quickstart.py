"""The quickstart's result, from the logs of its runs.

    make quickstart                                                        # or llmevo compare configs/quickstart.yml
    python benchmarks/quickstart.py collect runs/quickstart [RUN...] --out benchmarks/results/quickstart.jsonl
    python benchmarks/quickstart.py table benchmarks/results/quickstart.jsonl
    python benchmarks/quickstart.py short benchmarks/results/quickstart.jsonl     # the README's rows

`collect` keeps of every finished run which held-out questions each row of its held-out table got right: base, experts,
uniform merge, the best coefficient for all weights alike, and the best merge found. A folder of runs is all runs in it.
Collect on the machine and with the code that made the runs: the file has the processor and the commit of that moment,
and no number of threads.

Means and errors are computed from those answers. Tasks that ask the same questions, one as a multiple choice and one as
free text, share their clusters: a question's answers in all tasks are one observation. With several seeds there are two
errors: between seeds (other searches on the same questions) and within (other questions).
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import measurements
import numpy as np
import tables

from llmevo.run.log.state import RunState
from llmevo.run.log.storage import read_log, runs_in

Right = Mapping[str, str]
"""For every task a `1` for each question that was answered right, and a `0` for each other."""

NAMES = {
    "base": "base model",
    "parent": "expert: ",
    "uniform": "uniform merge (weights 1/n)",
    "coefficient": "best coefficient (all weights alike)",
    "best": "**best merge found**",
}
RIVALS = {"coefficient": "the best coefficient", "uniform": "the uniform merge", "parent": "the best expert"}


def collect(options: argparse.Namespace) -> None:
    """Write a line for every finished run."""
    lines = [json.dumps(_collected(state)) for folder in runs_in(options.runs) if (state := _state(folder))]
    options.out.write_text("".join(f"{line}\n" for line in lines))


def _state(folder: Path) -> RunState | None:
    state = RunState.fold(iter(read_log(folder)))
    return state if state.finished and state.heldout else None


def _collected(state: RunState) -> dict[str, Any]:
    started, finished = state.started, state.finished
    assert started
    assert finished
    texts = started.texts["heldout"]
    trials = [*state.trials.values()]
    asked = [trial.score.items for trial in trials if trial.score]
    return {
        **measurements.environment(),
        "threads": None,  # the log does not say how many threads its run had
        "optimizer": started.config["search"]["optimizer"],
        "seed": started.seed,
        "run_versions": started.versions,
        "started": started.time[:10],
        "candidates": len(trials),
        "proposed": sum(trial.candidate.origin == "llm" for trial in trials),
        "asked": sum(asked),
        "everything": started.items * len(asked),
        "weights": {task.name: task.weight for task in state.heldout_tasks},
        "questions": {task: [_digest(question) for question, _ in own] for task, own in texts.items()},
        "rows": [
            {
                "name": row.row,
                "kind": row.kind,
                "candidate": row.candidate,
                "search": trial.score.total if (trial := state.trials.get(_number(row))) and trial.score else None,
                "right": {task: "".join(str(int(one)) for one in own) for task, own in row.item_scores.items()},
            }
            for row in state.heldout.values()
        ],
    }


def _number(row: Any) -> int:
    return -1 if row.candidate is None else row.candidate


def _digest(question: str) -> str:
    return hashlib.sha256(question.strip().encode()).hexdigest()[:8]


def estimate(run: Mapping[str, Any], values: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """The weighted mean of answers and its standard error, questions being the clusters.

    The clusters are stratified by the tasks that ask them, as questions of a task are a sample of that kind.
    """
    total = sum(run["weights"].values())
    parts: dict[str, dict[str, float]] = {}
    where: dict[str, set[str]] = {}
    for task, own in values.items():
        for question, value in zip(run["questions"][task], own, strict=True):
            share = run["weights"][task] / total / len(own)
            parts.setdefault(question, {})[task] = share * float(value)
            where.setdefault(question, set()).add(task)
    strata: dict[frozenset[str], list[float]] = {}
    for question, by_task in parts.items():
        strata.setdefault(frozenset(where[question]), []).append(sum(by_task.values()))
    mean = sum(sum(own) for own in strata.values())
    variance = sum(len(own) * float(np.var(own, ddof=1)) for own in strata.values() if len(own) > 1)
    return mean, variance**0.5


def answers(right: Right) -> dict[str, np.ndarray]:
    return {task: np.array([*own], dtype=float) for task, own in right.items()}


def score(run: Mapping[str, Any], right: Right) -> tuple[float, float]:
    return estimate(run, answers(right))


def gain(run: Mapping[str, Any], right: Right, other: Right) -> tuple[float, float]:
    """The paired difference of two rows on the same questions."""
    ours, theirs = answers(right), answers(other)
    return estimate(run, {task: ours[task] - theirs[task] for task in ours})


def rivals(run: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What the best merge has to beat: by the words for each, the one of its kind with the best held-out score."""
    found: dict[str, Mapping[str, Any]] = {}
    for kind, words in RIVALS.items():
        if rows := [row for row in run["rows"] if row["kind"] == kind]:
            found[words] = max(rows, key=lambda row: score(run, row["right"])[0])
    return found


def of_llmevo(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """llmevo's own searches: those with an LLM or, where there are none, those without."""
    with_llm = [run for run in runs if run["optimizer"] == "llm"]
    return with_llm or [run for run in runs if run["optimizer"] == "llm-off"]


def best_merge(run: Mapping[str, Any]) -> Right:
    """The answers of the best merge that a run found."""
    return next(row["right"] for row in run["rows"] if row["kind"] == "best")


def table(options: argparse.Namespace) -> None:
    """Markdown: the held-out table of the first of llmevo's own runs, and the gains of all runs of each optimizer."""
    runs = measurements.read(options.file)
    if not runs:
        raise SystemExit(f"{options.file}: there is no such file, or it is empty")
    print("\n".join(_table(runs)))


def _table(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    first = (of_llmevo(runs) or runs)[0]
    where = [*measurements.machines(runs)]
    distinct = {question for own in first["questions"].values() for question in own}
    count = sum(map(len, first["questions"].values()))
    yield f"On {' and on '.join(where)}: {len(runs)} runs of {first['candidates']} candidates."
    yield f"Held out are {count} answers to {len(distinct)} questions; ± is one standard error."
    yield ""
    yield from _scores(first)
    yield ""
    yield from _gains(runs)


def _scores(run: Mapping[str, Any]) -> Iterator[str]:
    tasks = [*run["weights"]]
    heads = [*map(tables.short, tasks)]
    yield f"| {run['optimizer']}, seed {run['seed']} | mean | {' | '.join(heads)} |"
    yield "|" + "---|" * (2 + len(tasks))
    for row in run["rows"]:
        name = NAMES.get(row["kind"], row["name"]) + (row["name"] if row["kind"] == "parent" else "")
        mean, error = score(run, row["right"])
        cells = [f"{row['right'][task].count('1') / len(row['right'][task]):.3f}" for task in tasks]
        yield f"| {name} | {mean:.3f} ± {error:.3f} | {' | '.join(cells)} |"


def _gains(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    words = [*rivals(runs[0])]
    heads = [f"over {word}" for word in words]
    yield f"| search | runs | held out | {' | '.join(heads)} | LLM's proposals | questions asked |"
    yield "|" + "---|" * (5 + len(words))
    for name in dict.fromkeys(run["optimizer"] for run in runs):
        own = [run for run in runs if run["optimizer"] == name]
        cells = [_over_seeds([score(run, best_merge(run)) for run in own], "")]
        cells += [_over_seeds([_gain_over(word, run) for run in own], "+") for word in words]
        proposed = sum(run["proposed"] for run in own) / sum(run["candidates"] for run in own)
        asked = sum(run["asked"] for run in own) / sum(run["everything"] for run in own)
        yield f"| `{name}` | {len(own)} | {' | '.join(cells)} | {proposed:.0%} | {asked:.0%} |"
    if len(runs) > len({run["optimizer"] for run in runs}):
        yield ""
        yield "The first ± is between seeds, the one in brackets between questions."
        yield from _apart(runs)


def _apart(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """By how much llmevo's searches are ahead of others with the same seeds, whose start rows are the same."""
    own = of_llmevo(runs)
    for rival in dict.fromkeys(run["optimizer"] for run in runs if run not in own):
        others = {run["seed"]: run for run in runs if run["optimizer"] == rival}
        pairs = [(run, others[run["seed"]]) for run in own if run["seed"] in others]
        if len(pairs) > 1:
            gains = [[_gain_over(RIVALS["coefficient"], run)[0] for run in pair] for pair in pairs]
            found = [ours - theirs for ours, theirs in gains]
            mean, error = np.mean(found), np.std(found, ddof=1) / len(found) ** 0.5
            yield f"`{own[0]['optimizer']}` is ahead of `{rival}` by {mean:+.3f} ± {error:.3f}, on {len(found)} seeds."


def _gain_over(rival: str, run: Mapping[str, Any]) -> tuple[float, float]:
    """The gain of the best merge over a rival of the same run, both scored on the same machine."""
    return gain(run, best_merge(run), rivals(run)[rival]["right"])


def short(options: argparse.Namespace) -> None:
    """Markdown: experts, the best coefficient, and the best merges of each search, held out."""
    print("\n".join(_short(measurements.read(options.file))))


SEARCHES = {
    "cma-es": "CMA-ES",
    "gp": "Optuna's Gaussian process",
    "llm-off": "**llmevo without an LLM**",
    "llm": "**llmevo, led by an LLM**",
}


def _short(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    own = {name: some for name in SEARCHES if (some := [run for run in runs if run["optimizer"] == name])}
    counts = {len(runs) for runs in own.values()}
    candidates = {run["candidates"] for runs in own.values() for run in runs}
    seeds = " or ".join(map(str, sorted(counts))) + (" seed" if counts == {1} else " seeds")
    yield (
        f"{' or '.join(map(str, sorted(candidates)))} candidates each, {seeds};"
        f" held out are {sum(map(len, runs[0]['questions'].values()))} answers. ± is the standard error between"
        f" {'seeds, in brackets that between questions' if max(counts) > 1 else 'questions'}."
    )
    yield ""
    yield "| | held out | over the best coefficient |"
    yield "|---|---|---|"
    first = next(iter(own.values()))[0]
    fixed = rivals(first)
    for label, right in (
        ("best expert", fixed["the best expert"]["right"]),
        ("the best expert of each task (four models, not one)", specialists(first)),
        ("best coefficient (one weight for all)", fixed["the best coefficient"]["right"]),
    ):
        mean, error = score(first, right)
        within = f"± {error:.3f}"
        yield f"| {label} | {mean:.3f} {within if max(counts) == 1 else f'({within})'} | |"
    for name, some in own.items():
        found = [score(run, best_merge(run)) for run in some]
        gained = [_gain_over(RIVALS["coefficient"], run) for run in some]
        yield f"| {SEARCHES[name]} | {_over_seeds(found, '')} | {_over_seeds(gained, '+')} |"
    if ahead := [*_apart(runs)]:
        yield ""
        yield from ahead


def specialists(run: Mapping[str, Any]) -> Right:
    """The answers to each task of the parent that is best at it."""
    parents = [row["right"] for row in run["rows"] if row["kind"] == "parent"]
    return {task: max((right[task] for right in parents), key=lambda text: text.count("1")) for task in run["weights"]}


def _over_seeds(found: Sequence[tuple[float, float]], sign: str) -> str:
    """Mean over seeds; its error between seeds, where there are several, and in brackets that of the questions."""
    means = np.array([mean for mean, _ in found])
    within = float(np.mean([error for _, error in found]))
    if len(found) == 1:
        return f"{means[0]:{sign}.3f} ± {within:.3f}"
    return f"{means.mean():{sign}.3f} ± {means.std(ddof=1) / len(means) ** 0.5:.3f} (± {within:.3f})"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    collecting = commands.add_parser("collect", help="read finished runs")
    collecting.add_argument("runs", type=Path, nargs="+")
    collecting.add_argument("--out", type=Path, required=True)
    collecting.set_defaults(command=collect)
    for name, command, about in (
        ("table", table, "print what was collected"),
        ("short", short, "print four rows of it"),
    ):
        printing = commands.add_parser(name, help=about)
        printing.add_argument("file", type=Path)
        printing.set_defaults(command=command)
    return made


def main() -> None:
    options = parser().parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
