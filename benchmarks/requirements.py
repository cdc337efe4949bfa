"""What a run needs, by the size of its models: memory, disk, and the time of 100 candidates.

    python benchmarks/requirements.py measure PID --out benchmarks/results/memory.jsonl   # of a run of the quickstart
    python benchmarks/requirements.py table benchmarks/results/memory.jsonl

The row of the quickstart is measured: the seconds of a run's log, and the most memory of a run's process. The others
are computed, not measured: weights are two bytes a number, and the process takes as much beyond them as it did in the
quickstart; merging takes the measured time of task arithmetic for each number; scoring takes two operations a number
and token, at the share of a GPU's speed that `llmevo inspect` assumes. Generated text takes longer, racing makes a run
shorter.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import measurements

RESULTS = Path(__file__).parent / "results"
LOG = RESULTS / "quickstart-llm" / "seed-0.jsonl"

SIZES = {"1B (Llama 3.2)": 1.236e9, "8B (Llama 3.1)": 8.030e9, "70B (Llama 3.1)": 70.554e9}
"""Numbers in a model, by the card of each."""
FINE_TUNES = 3
CANDIDATES, QUESTIONS, TOKENS = 100, 200, 300
GPUS = {"8 GB": 8, "24 GB": 24, "80 GB": 80, "2 × 80 GB": 160, "4 × 80 GB": 320}
ROOM = 1.2
"""The memory of a GPU over that of the weights: for the cache of keys and values, and for activations."""
CACHE = 0.5
"""Gigabytes: the default of `engine.cache_gb`."""
SPEED = 989e12
"""Operations a second of an H100 in bfloat16, by its data sheet."""
EFFICIENCY = 0.35
"""As in `llmevo.run.preflight.forecast`."""
NUMBERS = 134.5e6
"""Numbers in each of the models that `merge.py` merges: base and two fine-tunes."""
MERGED = 3


def merging() -> float:
    """Seconds a number of a source, on the machine of the merge benchmark."""
    rows = measurements.read(RESULTS / "merge.jsonl")
    seconds = median(row["seconds"]["llmevo"] for row in rows if row["method"] == "task_arithmetic")
    return seconds / (NUMBERS * MERGED)


def measured() -> tuple[int, float]:
    """Candidates and minutes of the quickstart's run, with finalists and held-out rows, without the LLM's answers."""
    lines = [json.loads(line) for line in LOG.read_text().splitlines()]
    seconds = sum(sum(line["seconds"].values()) for line in lines if "item_scores" in line)
    return sum(line["event"] == "evaluated" for line in lines), seconds / 60


def measure(options: argparse.Namespace) -> None:
    """Append the most memory that a running process of llmevo had, in gigabytes, mapped files included."""
    lines = Path(f"/proc/{options.pid}/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    line = {"benchmark": "memory", "peak": peak * 1024 / 1e9, **measurements.environment()}
    measurements.append(options.out, line | {"threads": None})  # the other process has its own number


def table(options: argparse.Namespace) -> None:
    """Markdown: what is assumed, and a row for each size."""
    print("\n".join(_table(max(row["peak"] for row in measurements.read(options.file)))))


def _table(peak: float) -> Iterator[str]:
    yield (
        f"A base and {FINE_TUNES} fine-tunes in bfloat16; {CANDIDATES} candidates of {QUESTIONS} questions of {TOKENS}"
        " tokens without generated text, merged by two CPU threads and scored at the speed of one H100."
    )
    yield ""
    yield "| models | memory of process and engine | GPU | disk | time | memory and time are |"
    yield "|---|---|---|---|---|---|"
    candidates, minutes = measured()
    small = NUMBERS * 2 / 1e9
    took = f"{candidates} candidates of 320 questions in {minutes:.0f} min"
    beyond = peak - small - CACHE
    yield f"| 135M (quickstart-plain) | {peak:.1f} GB | none: 2 CPU cores | {small:.1f} GB | {took} | measured |"
    for name, numbers in SIZES.items():
        weights = numbers * 2 / 1e9
        gpu = next(named for named, room in GPUS.items() if room >= weights * ROOM + CACHE)
        each = merging() * numbers * (FINE_TUNES + 1) + 2 * numbers * QUESTIONS * TOKENS / (SPEED * EFFICIENCY)
        disk, hours = weights * (FINE_TUNES + 1), each * CANDIDATES / 3600
        yield f"| {name} | {weights + CACHE + beyond:.0f} GB | {gpu} | {disk:.0f} GB | {hours:.1f} h | computed |"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="the memory of a running process")
    measuring.add_argument("pid", type=int)
    measuring.add_argument("--out", type=Path)
    measuring.set_defaults(command=measure)
    printing = commands.add_parser("table", help="what a run needs")
    printing.add_argument("file", type=Path)
    printing.set_defaults(command=table)
    return made


def main() -> None:
    options = parser().parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
