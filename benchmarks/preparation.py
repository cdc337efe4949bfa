"""What preparing models costs, and what a candidate costs afterwards.

    python benchmarks/preparation.py collect --out FILE    # on the quickstart's experts, adapters and whole models
    python benchmarks/preparation.py table FILE
    python benchmarks/preparation.py large                 # what formulas say of 8B
    python benchmarks/preparation.py steps                 # the steps, from the package

Each preparation is measured in a process of its own, with an empty cache, in seconds of the processor, which other
processes disturb little. Those of candidates are medians of rounds in which task arithmetic, the same on prepared
models, and half-way between, take turns. What `large` prints is computed, not measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import measurements
from measurements import QUICKSTART

from llmevo.config import read_config
from llmevo.merging.merger import Merger
from llmevo.merging.preparation.registry import STEPS
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.sources import Sources
from llmevo.run.calibration.layer_inputs import measure
from llmevo.run.scorer import Scorer

ROUNDS = 7
SHARES = {"plain": 0.0, "prepared": 1.0, "half-way": 0.5}

SMALL = (30, 576, 192, 1536, 8)
LARGE = (32, 4096, 1024, 14336, 8)
"""Layers, width, width of keys and values, inner width, and the adapters' rank, of SmolLM2-135M and Llama-3-8B."""


def collect(options: argparse.Namespace) -> None:
    """Measure what the file lacks."""
    done = {(line["kind"], line["step"]) for line in measurements.read(options.out)}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("adapters", "whole"):
            for step in STEPS:
                if (kind, step) not in done:
                    for made in ("prepared", "activations"):
                        shutil.rmtree(Path(folder) / made, ignore_errors=True)
                    call = [sys.executable, __file__, "one", kind, step, "--folder", folder]
                    env = {**os.environ, "LLMEVO_HOME": folder}
                    printed = subprocess.run(call, env=env, check=True, capture_output=True, text=True).stdout
                    line = json.loads(printed.splitlines()[-1])
                    measurements.append(options.out, line)
                    print(line, flush=True)


def one(options: argparse.Namespace) -> None:
    """Measure one preparation and print it."""
    config = read_config(QUICKSTART)
    scorer = Scorer(config, QUICKSTART.parent)
    genome, sources = config.genome, scorer.sources
    experts, base = [str(model) for model in genome.models if model != genome.base_model], str(genome.base_model)
    if options.kind == "whole":
        experts, sources = _whole(scorer, experts, options.folder)
    given = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": expert, "parameters": {"weight": 0.5}} for expert in experts],
        "prepare": {"steps": [options.step], "text": scorer.texts.keep() if STEPS[options.step].measures else None},
        "dtype": "bfloat16",
    }
    recipe = Recipe.model_validate(given)
    for model in recipe.references:
        sources.checksum(model)
    merger = Merger(sources, cache_gb=2.0)
    prepared = merger.prepared(recipe)
    assert prepared
    wanted = [of for every in prepared.measurements.values() for of in every]
    started = time.process_time()
    cost = measure(wanted, prepared.base, sources, scorer.tokenizer_folder, "cpu")
    measuring, before = time.process_time() - started, measurements.peak()
    started = time.process_time()
    prepared.make()
    seconds = time.process_time() - started
    after = measurements.peak()
    print(
        json.dumps(
            {
                **measurements.environment(),
                "kind": options.kind,
                "step": options.step,
                "experts": len(experts),
                "tokens": cost.tokens,
                "measuring": measuring,
                "preparing": seconds,
                "peak": {"measuring": before, "preparing": after},
                "bytes": sum(file.stat().st_size for file in prepared.folder.iterdir()),
                "measured_bytes": sum(file.stat().st_size for of in wanted for file in of.folder.iterdir()),
                "candidates": _candidates(merger, given),
            }
        )
    )


def _candidates(merger: Merger, given: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds a candidate, round by round."""
    found: dict[str, list[float]] = {name: [] for name in SHARES}
    for place in range(ROUNDS + 1):
        for name, share in SHARES.items():
            weights = [{**model, "parameters": {"weight": 0.3 + 0.05 * place}} for model in given["models"]]
            recipe = Recipe.model_validate({**given, "models": weights, "parameters": {"prepare": share}})
            started = time.process_time()
            for _ in merger.merge(recipe):
                pass
            if place:  # the first one opens files
                found[name].append(time.process_time() - started)
    return found


def _whole(scorer: Scorer, experts: Sequence[str], folder: Path) -> tuple[list[str], Sources]:
    """The experts as whole models in bfloat16."""
    names: list[str] = []
    for model in scorer.config.genome.models:
        if str(model) in experts:
            names.append(str(folder / model.name))
            if not (folder / model.name).exists():
                write_model(scorer.space.alone(model), scorer.sources, folder / model.name, trim=False)
    sources = Sources(scorer.root)
    sources.base = scorer.sources.base
    return names, sources


def table(options: argparse.Namespace) -> None:
    """Print the measured costs, and those computed for 8B."""
    print("\n".join(rows(measurements.read(options.file))))


def rows(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table's lines."""
    yield (
        "| experts | step | forward passes | preparing | peak memory | on disk | candidate, of task arithmetic's"
        " | half-way |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for line in lines:
        kind, step = line["kind"], line["step"]
        plain, prepared, half = (median(line["candidates"][name]) for name in SHARES)
        passes = f"{line['measuring']:.0f} s" if line["tokens"] else ""
        yield (
            f"| {kind} | {step} | {passes} | {line['preparing']:.1f} s | {max(line['peak'].values()) / 1e9:.1f} GB"
            f" | {line['bytes'] / 1e9:.2f} GB | {prepared / plain:.2f} | {half / plain:.2f} |"
        )


READS = {"": "nothing", "magnitudes": "texts, in the base", "grams": "texts, in every expert"}
ABOVE = ", above merged layers"


def steps(_: argparse.Namespace) -> None:
    """Print the steps with their parameters."""
    print("| step | gives each expert | reads | parameters | paper |\n|---|---|---|---|---|")
    for name, step in STEPS.items():
        said = (step.prepare.__doc__ or "").split(".\n", 1)[0].split(". ", 1)[0].split(";")[0]
        gives = " ".join(said.removeprefix("Return each expert ").split()).rstrip(".")
        own = [
            f"`{key}` {of.default:g}, from {of.low:g} to {of.high:g}"
            + (f"; {of.neutral:g} changes nothing" if of.neutral is not None else "")
            for key, of in step.parameters.items()
        ]
        reads = READS[step.measures] + (ABOVE if step.sequential else "")
        print(f"| `{name}` | {gives} | {reads} | {'<br>'.join(own)} | <{step.paper}> |")


Size = tuple[int, int, int, int, int]


def matrices(size: Size) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices of a layer."""
    _, width, narrow, inner, _ = size
    return [(width, width), (narrow, width), (narrow, width), (width, width), *[(inner, width)] * 2, (width, inner)]


def large(_: argparse.Namespace) -> None:
    """Print the cost at the size of Llama-3-8B, with four experts, and how many times that of SmolLM2-135M it is."""
    print("\n".join(large_rows()))


COUNT = 4
"""Experts of `large`."""

TOKENS = 10_000
"""Tokens of all texts in `large`: about those of the quickstart. RegMean reads them in `COUNT` models at most."""


def large_rows() -> Iterator[str]:
    """The lines of the table."""
    yield (
        f"| experts | step | forward passes, {TOKENS:,} tokens | preparing | of that at 135M"
        " | prepared experts, on disk | products of inputs, an expert |"
    )
    yield "|---|---|---|---|---|---|---|"
    parameters = LARGE[0] * sum(rows_ * columns for rows_, columns in matrices(LARGE))
    for kind in ("adapters", "whole"):
        for step, of in STEPS.items():
            work, small = (operations(step, kind, COUNT, size) for size in (LARGE, SMALL))
            products = f"{4 * grams(LARGE) / 1e9:.0f} GB" if of.measures == "grams" else ""
            reading = 2.0 * parameters * TOKENS * {"": 0, "magnitudes": 1, "grams": COUNT}[of.measures]
            if of.sequential:
                reading *= 2  # in the expert's layers, and in the merged ones
            yield (
                f"| {kind} | {step} | {f'{reading:.1e}' if reading else ''} | {2 * work:.1e} | × {work / small:,.0f}"
                f" | {COUNT * stored(step, kind, LARGE) / 1e9:.1f} GB | {products} |"
            )


def operations(step: str, kind: str, experts: int, size: Size) -> float:
    """Multiplications of a preparation, in the leading order; forward passes are not among them."""
    layers, width, _, inner, rank = size
    if step == "align":  # the similarities of the neurons of three matrices, and their assignment
        return layers * experts * (3.0 * inner**2 * width + inner**3)
    total = 0.0
    for rows_, columns in matrices(size):
        own = rank if kind == "adapters" else rows_
        if step == "aim":
            total += experts * own * columns
        elif step in ("regmean", "regmean_plusplus"):
            total += columns**3 / 3 + 2 * experts * columns**2 * own
        elif (
            step == "svd_llm"
        ):  # eigenvectors, of G and, for whole models, of a randomized decomposition of half the rank
            total += experts * (9.0 * columns**3 + columns**2 * own)
            total += 0.0 if kind == "adapters" else experts * 6 * rows_ * columns * min(rows_, columns) / 2
        elif kind == "adapters":
            total += (rows_ + columns) * (experts * rank) ** 2
        else:  # a randomized decomposition: six products with a matrix of `found` columns, then the joint basis
            found = min(rows_, columns) // experts
            total += experts * 6 * rows_ * columns * found + (rows_ + columns) * (experts * found) ** 2
    return layers * total


def stored(step: str, kind: str, size: Size) -> float:
    """Bytes of one prepared expert: float32 factors, or whole matrices of 16 bits."""
    layers, width, _, inner, rank = size
    if step == "align":
        return layers * 3 * 2.0 * width * inner
    total = 0.0
    for rows_, columns in matrices(size):
        if kind == "adapters":
            total += (
                4
                * rank
                * (columns if step in ("aim", "regmean", "regmean_plusplus", "wudi", "star") else rows_ + columns)
            )
        elif step == "tsv":
            total += 4 * (rows_ + columns) * (min(rows_, columns) // COUNT)
        else:
            total += 2 * rows_ * columns
    return layers * total


def grams(size: Size) -> float:
    """Numbers of the products of inputs that are kept of one expert while it is prepared."""
    return size[0] * sum(float(columns) ** 2 for _, columns in matrices(size))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    command = commands.add_parser("collect")
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run=collect)
    command = commands.add_parser("one")
    command.add_argument("kind", choices=("adapters", "whole"))
    command.add_argument("step", choices=STEPS)
    command.add_argument("--folder", type=Path, required=True)
    command.set_defaults(run=one)
    command = commands.add_parser("table")
    command.add_argument("file", type=Path)
    command.set_defaults(run=table)
    command = commands.add_parser("large")
    command.set_defaults(run=large)
    command = commands.add_parser("steps")
    command.set_defaults(run=steps)
    return made


def main() -> None:
    options = parser().parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
