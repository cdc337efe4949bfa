"""The measurements of a file in `benchmarks/results` as Markdown: how and where they were made, and a table.

    python benchmarks/tables.py benchmarks/results/merge.jsonl

It needs no model and nothing that takes long to import. Timings are medians of the rounds with their least and
greatest in brackets; a machine of its own has a table of its own.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import measurements
import numpy as np

Lines = Sequence[dict[str, Any]]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and in brackets the least and the greatest of several."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def with_error(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """The mean, and its standard error where there are several values; nothing of none."""
    if not len(values):
        return ""
    error = f" ± {float(np.std(values, ddof=1)) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{float(np.mean(values)):{sign}.{digits}f}{error}"


def short(task: str) -> str:
    """The name of a task of the quickstart without what all have in common."""
    return task.removeprefix("quickstart_").removesuffix("_heldout").replace("_", " ")


def rows(heads: Sequence[str], cells: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in cells:
        yield f"| {' | '.join(row)} |"


def groups(lines: Lines, *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The lines by the values of some keys, in the order of the file."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(tuple(line[key] for key in keys), []).append(line)
    return found


def rounds(lines: Lines, *keys: str) -> str:
    """How many rounds there were of everything, in words."""
    counts = sorted({len(own) for own in groups(lines, *keys).values()})
    return "one round" if counts == [1] else f"{' or '.join(map(str, counts))} rounds"


def merge(lines: Lines) -> Iterator[str]:
    yield f"Seconds a candidate, median of {rounds(lines, 'method')} (least to greatest)."
    yield ""
    heads = ["method", "llmevo", "mergekit", "mergekit / llmevo", "llmevo / floor"]
    cells: list[list[str]] = []
    for (method,), own in groups(lines, "method").items():
        mine, floor = ([line["seconds"][name] for line in own] for name in ("llmevo", "floor"))
        # mergekit lacks some methods
        theirs = [line["seconds"]["mergekit"] for line in own if "mergekit" in line["seconds"]]
        beside = [spread(theirs), f"{median(theirs) / median(mine):.1f}"] if theirs else ["–", "–"]
        cells.append([method, spread(mine), *beside, f"{median(mine) / median(floor):.1f}"])
    yield from rows(heads, cells)


def swap(lines: Lines) -> Iterator[str]:
    yield "Seconds a candidate, median (least to greatest)."
    yield ""
    cells: list[list[str]] = []
    for (backend,), own in groups(lines, "backend").items():
        times = {
            way: [line["seconds"][way] for line in own if way in line["seconds"]] for way in ("merge", "swap", "anew")
        }
        ratio = median(times["anew"]) / median(times["swap"])
        cells.append([backend, *(spread(values) for values in times.values()), f"{ratio:.1f}"])
    yield from rows(["engine", "merge alone", "swap", "export and start anew", "anew / swap"], cells)


def evaluation(lines: Lines) -> Iterator[str]:
    timed = [line for line in lines if "round" in line]
    yield f"Whole scorings, median of {rounds(timed, 'suite', 'backend', 'dtype', 'engine')} (least to greatest)."
    yield ""
    cells: list[list[str]] = []
    for (suite, backend, dtype), own in groups(timed, "suite", "backend", "dtype").items():
        engines = {name: [line["seconds"] for line in found] for (name,), found in groups(own, "engine").items()}
        items = own[0]["items"]
        for engine, seconds in engines.items():
            speed = spread([items / one for one in seconds], 1)
            ratio = median(seconds) / median(engines["llmevo"])
            cells.append([suite, f"{backend}, {dtype}", engine, str(items), speed, f"{ratio:.2f}"])
    heads = ["questions", "engine", "asked by", "number", "questions a second", "time / llmevo's"]
    yield from rows(heads, cells)
    compared = [line for line in lines if "from" in line]
    if not compared:
        return
    yield ""
    yield "How far the answers are from another's on the same weights:"
    yield ""
    cells = []
    for line in compared:
        changed = f"{line['greedy'][0]} of {line['greedy'][1]}", f"{line['texts'][0]} of {line['texts'][1]}"
        apart = f"{max(map(abs, line['scores'].values())):.4f}"
        where = [line["suite"], f"{line['backend']}, {line['dtype']}", line["engine"], line["from"]]
        cells.append([*where, f"{line['median']:.4f}", f"{line['greatest']:.4f}", *changed, apart])
    heads = ["questions", "engine", "asked by", "from", "median, nats", "greatest", "greedy differs", "replies differ"]
    yield from rows([*heads, "greatest difference of a score"], cells)


def agreement(lines: Lines) -> Iterator[str]:
    yield "Scores of the same merges in both engines, and the questions on which their answers are not equally right."
    yield ""
    cells: list[list[str]] = []
    for (dtype, candidate), own in groups(lines, "dtype", "candidate").items():
        by = {line["engine"]: line for line in own}
        one, other = by["hf"]["right"], by["vllm"]["right"]
        unlike = {task: sum(a != b for a, b in zip(one[task], other[task], strict=True)) for task in one}
        most = max(unlike, key=lambda task: unlike[task])
        asked = sum(map(len, one.values()))
        scores = (f"{by[engine]['score']:.4f}" for engine in ("hf", "vllm"))
        cells.append(
            [dtype, candidate, *scores, f"{sum(unlike.values())} of {asked}", f"{unlike[most]} of {len(one[most])}"]
        )
    yield from rows(["type", "candidate", "hf", "vllm", "differ", "most in one task"], cells)


def parity(lines: Lines) -> Iterator[str]:
    yield "Largest difference from mergekit's result in float32, as a share of the tensor's largest entry."
    yield ""
    architectures = [name for (name,) in groups(lines, "architecture")]
    cells: list[list[str]] = []
    for (method, note), own in groups(lines, "method", "note").items():
        far = {line["architecture"]: line["difference"] for line in own}
        shown = [f"{far[name]:.0e}" if far.get(name) else "equal" if name in far else "–" for name in architectures]
        cells.append([f"`{method}`{f' ({note})' if note else ''}", *shown])
    yield from rows(["method", *architectures], cells)


def families(lines: Lines) -> Iterator[str]:
    yield "`merge`: the largest difference from the same in float64, as a share of the largest entry. `vLLM`: how far"
    yield "its likelihoods are from transformers', in nats a token; swaps give exactly those of the export."
    yield ""

    def vllm(line: dict[str, Any]) -> str:
        found = [line[name] for name in ("vllm", "vllm, float32") if name in line]
        if not found:
            return "not tried"
        if isinstance(found[-1], float):
            return f"{found[-1]:.2f}{' in float32' if len(found) > 1 else ''}"
        said = found[0].removeprefix("base: vLLM does not start (").replace("|", "/")
        return f"no: {said if len(said) <= 150 else said[:150] + '…'}"

    cells: list[list[str]] = []
    for line in lines:
        far = f"{line['merge']:.0e}" if isinstance(line["merge"], float) else f"no: {line['merge']}"
        wrong = [line[name] for name in ("hf", "hf, bfloat16") if line[name] != "yes"]
        hf = f"no: {wrong[0]}" if wrong else "yes"
        cells.append([line["family"], f"`{line['model_type']}`", line["kind"], far, hf, vllm(line)])
    yield from rows(["family", "`model_type`", "kind", "merge", "hf", "vLLM on a CPU"], cells)


def overhead(lines: Lines) -> Iterator[str]:
    yield "Median (least to greatest) of the rounds."
    yield ""
    cells: list[list[str]] = []
    for (what, size), own in groups(lines, "what", "size").items():
        seconds = [line["seconds"] for line in own]
        if what == "search":
            count = own[0]["evaluations"]
            each = spread([one / count for one in seconds], 3)
            cells.append([f"search, {size} genes, {count} evaluations", f"{each} s a candidate", "–"])
        else:
            kilobytes = own[0]["bytes"] / size / 1000
            cells.append(
                [f"reading the log of {size:,} candidates", f"{spread(seconds)} s", f"{kilobytes:.1f} kB a candidate"]
            )
    yield from rows(["what", "time", "size"], cells)


def racing_rates(lines: Lines) -> Iterator[str]:
    """The default rule on every set of tasks, and the worst set of the other rules."""
    kinds = ("equal", "level", "better")

    def share(line: Any, kind: str) -> float:
        return line[kind][0] / line[kind][1]

    rules = groups(lines, "looks", "stated")
    default = rules[5, 0.05]
    candidates = default[0]["equal"][1]
    yield f"{candidates} candidates of each kind; stopped at an error rate of 5 % and five looks:"
    yield ""
    cells = [
        [line["tasks"], *(f"{share(line, kind):.1%}" for kind in kinds), f"{share(line, 'asked'):.0%}"]
        for line in default
    ]
    for (looks, stated), own in rules.items():
        worst = [f"{max(share(line, kind) for line in own):.1%}" for kind in kinds]
        asked = f"{max(share(line, 'asked') for line in own):.0%}"
        cells.append([f"the worst of all, {stated:.0%} and {looks} looks", *worst, asked])
    yield from rows(["tasks", "the best of equals", "of these, barely ahead", "truly better", "questions asked"], cells)


def racing_simulator(lines: Lines) -> Iterator[str]:
    """Every rule against asking everything, paired by seed and questions."""
    searches = groups(lines, "rule")
    everything = {(line["questions"], line["seed"]): line for line in searches[("everything",)]}
    sizes = sorted({line["questions"] for line in lines})
    yield (
        f"{len(everything)} searches for every rule: {len(everything) // len(sizes)} seeds with"
        f" {' and '.join(map(str, sizes))} questions a task."
    )
    yield ""
    cells: list[list[str]] = []
    for (rule,), own in searches.items():
        pairs = [(line, everything[line["questions"], line["seed"]]) for line in own]
        gaps = [line["truth"] - whole["truth"] for line, whole in pairs]
        asked = sum(line["asked"] for line, _ in pairs) / sum(whole["asked"] for _, whole in pairs)
        gap = "" if rule == "everything" else f"{mean(gaps):+.3f} ± {stdev(gaps) / len(gaps) ** 0.5:.3f}"
        stopped = [
            f"{sum(line[kind] for line in own)} of {len(own)}" for kind in ("handed over stopped", "highest stopped")
        ]
        cells.append([rule, f"{asked:.0%}", f"{mean(line['truth'] for line in own):.3f}", gap, *stopped])
    heads = ["evaluation", "questions", "true score", "against everything"]
    yield from rows([*heads, "the one handed over would be stopped", "the highest was stopped"], cells)


def worker_speed(lines: Lines) -> Iterator[str]:
    """Two workers against one, each on one thread."""
    yield f"A generation of {lines[0]['candidates']} candidates, median of {rounds(lines, 'racing', 'workers')}."
    yield ""
    cells: list[list[str]] = []
    for (racing,), own in groups(lines, "racing").items():
        one = median(line["seconds"] for line in own if line["workers"] == 1)
        for (workers,), fleet in groups(own, "workers").items():
            seconds = [line["seconds"] for line in fleet]
            hourly = [3600 * line["candidates"] / line["seconds"] for line in fleet]
            asked = f"{fleet[0]['questions'] / fleet[0]['of']:.0%}" if racing else "all"
            cells.append([asked, str(workers), spread(seconds, 1), spread(hourly, 0), f"{one / median(seconds):.2f}"])
    yield from rows(["questions", "workers", "seconds", "candidates an hour", "against one"], cells)


LAYOUTS: dict[str, Callable[[Lines], Iterator[str]]] = {
    "merge": merge,
    "swap": swap,
    "evaluation": evaluation,
    "agreement": agreement,
    "parity": parity,
    "families": families,
    "overhead": overhead,
    "worker-speed": worker_speed,
    "racing-rates": racing_rates,
    "racing-simulator": racing_simulator,
}
"""How the lines of every benchmark are shown, by what they say in `benchmark`."""


def markdown(lines: Lines) -> str:
    """All lines of one benchmark, a table for every machine."""
    if not lines:
        raise SystemExit("there are no measurements")
    text: list[str] = []
    if "processor" not in lines[0]:  # simulated: nothing in it is a machine's
        return "\n".join(LAYOUTS[lines[0]["benchmark"]](lines))
    for machine, own in measurements.machines(lines).items():
        text += [f"On {machine}.", *LAYOUTS[own[0]["benchmark"]](own), ""]
    return "\n".join(text).strip()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("file", type=Path)
    return made


def main() -> None:
    print(markdown(measurements.read(parser().parse_args().file)))


if __name__ == "__main__":
    main()
