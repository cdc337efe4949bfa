"""One adapter for a merge of the quickstart's four adapters: energy and score over the rank, beside PEFT's own merges.

    python benchmarks/adapters.py measure benchmarks/results/adapters.jsonl [--limit 32]
    python benchmarks/adapters.py table benchmarks/results/adapters.jsonl

The merge is task arithmetic with coefficient 0.5 for each expert. Its adapter is the sum of the four, compressed to a
rank; `exact` keeps all. PEFT's `add_weighted_adapter` gets the same adapters and weights. Every row is asked the
quickstart's search tasks in bfloat16, and its error is relative to the exact change, in float32.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import measurements
import torch
from measurements import QUICKSTART, SKILLS
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmevo.config import read_config
from llmevo.export.lora import base_of, write_merge
from llmevo.export.low_rank import Rank
from llmevo.merging.recipe import Recipe
from llmevo.models.adapters import LoraModel
from llmevo.models.sources import Sources
from llmevo.run.model_scores import ModelScorer

CONFIGS = measurements.ROOT / "configs"
COEFFICIENT = 0.5
RANKS = (4, 8, 16, 32, "exact")
PEFT: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": 8},
    "ties": {"density": 0.5},
}
"""{`combination_type`: its options}."""

Weights = Callable[[], Iterator[tuple[str, Tensor]]]


def measure(options: argparse.Namespace) -> None:
    """Append a line for each row as soon as it is scored."""
    config = read_config(QUICKSTART)
    config = config.model_copy(update={"limit": options.limit})
    base = str(config.genome.base_model)
    models = [{"model": f"{base}+quickstart/experts/{n}", "parameters": {"weight": COEFFICIENT}} for n in SKILLS]
    recipe = Recipe.model_validate({"merge_method": "task_arithmetic", "base_model": base, "models": models})
    sources = Sources.open(recipe.references, CONFIGS)
    origin, folder = sources[base_of(recipe)], sources.folder(base_of(recipe))
    asked = ModelScorer(config, CONFIGS)
    done = {line["row"] for line in measurements.read(options.out)}
    with TemporaryDirectory() as place:
        exact_report = write_merge(recipe, sources, Path(place) / "exact", None)
        whole = LoraModel(origin, Path(place) / "exact")  # computed in float32, so that nothing is rounded
        exact = {name: whole.tensor(name).float() for name in origin.shapes}
        rows: list[tuple[str, dict[str, Any], Weights]] = [("base", {"error": 1.0, "energy": 0.0}, _all(origin))]
        for rank in RANKS:
            out = Path(place) / str(rank)
            began = time.perf_counter()
            report = exact_report if rank == "exact" else write_merge(recipe, sources, out, Rank.of(rank))
            facts = {"rank": report.rank, "parameters": report.parameters, "energy": report.energy}
            facts |= {"error": report.error, "seconds": time.perf_counter() - began}
            rows.append((f"rank {rank}", facts, _adapted(origin, out)))
        for kind, more in PEFT.items():
            deltas = _by_peft(folder, kind, more)
            error = _error(deltas, exact, origin)
            facts = {"rank": deltas.pop("rank"), "error": error, "energy": None}
            rows.append((f"PEFT {kind}", facts, _added(origin, deltas)))
        for row, facts, weights in rows:
            line = {"row": row, "coefficient": COEFFICIENT, "limit": options.limit, **facts}
            if row in done:
                continue
            if not options.unscored:
                ((_, score),) = asked.of({row: weights()}, folder, "bfloat16", origin.shapes)
                tasks = {task: next(iter(values.values())) for task, values in score.tasks.items()}
                line |= {"score": score.total, "stderr": score.stderr, "items": score.items, "tasks": tasks}
            measurements.append(options.out, {**line, **measurements.environment()})
            print(row, line.get("score"), line["error"], flush=True)


def _adapted(source: Any, adapter: Path) -> Weights:
    """The source's weights with a written adapter in them, in the source's types."""

    def weights() -> Iterator[tuple[str, Tensor]]:
        model = LoraModel(source, adapter)
        for name in source.shapes:
            yield name, model.tensor(name).to(source.dtype(name))

    return weights


def _all(source: Any) -> Weights:
    return lambda: ((name, source.tensor(name)) for name in source.shapes)


def _added(source: Any, deltas: dict[str, Any]) -> Weights:
    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in source.shapes:
            weight = source.tensor(name)
            yield name, (weight.float() + deltas[name]).to(weight.dtype) if name in deltas else weight

    return weights


def _by_peft(folder: Path, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The changes of all weights by PEFT's `add_weighted_adapter`, and the rank of its adapter."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    place = CONFIGS / "quickstart" / "experts"
    model: Any = PeftModel.from_pretrained(plain, place / SKILLS[0], adapter_name=SKILLS[0])
    for name in SKILLS[1:]:
        model.load_adapter(place / name, adapter_name=name)
    model.add_weighted_adapter([*SKILLS], [COEFFICIENT] * 4, "merged", combination_type=kind, **options)
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    deltas: dict[str, Any] = {
        f"{name}.weight": module.get_delta_weight("merged").detach() for name, module in layers.items()
    }
    return {**deltas, "rank": max(module.r["merged"] for module in layers.values())}


def _error(deltas: dict[str, Any], exact: dict[str, Tensor], origin: Any) -> float:
    """The relative error of changes against the exact ones."""
    lost = total = 0.0
    for name, weight in exact.items():
        change = weight - origin.tensor(name).float()
        total += float(change.square().sum())
        lost += float((change - deltas[name]).square().sum()) if name in deltas else float(change.square().sum())
    return math.sqrt(lost / total)


def table(options: argparse.Namespace) -> None:
    """Print the rows in Markdown."""
    lines = measurements.read(options.out)
    print("| adapter | rank | kept energy | error | score |\n|---|---|---|---|---|")
    for line in lines:
        energy = "" if line["energy"] is None else f"{line['energy']:.1%}"
        score = f"{line['score']:.3f} ± {line['stderr']:.3f}" if "score" in line else ""
        print(f"| {line['row']} | {line.get('rank', '')} | {energy} | {line['error']:.3f} | {score} |")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    for function in (measure, table):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("out", type=Path)
        command.set_defaults(run=function)
        if function is measure:
            command.add_argument("--limit", type=int, default=32)
            command.add_argument("--unscored", action="store_true")
    return made


def main() -> None:
    given = parser().parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
