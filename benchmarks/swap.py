"""What a new candidate costs an engine: llmevo's swap against writing the merge and starting vLLM on it.

    python benchmarks/swap.py --out benchmarks/results/swap.jsonl [--backend hf,vllm] [--rounds 3]
    python benchmarks/tables.py benchmarks/results/swap.jsonl

The quickstart's models. The second way is what mergekit-evolve is left with since its in-memory path ended: export the
merge, start a fresh engine on the folder. Merge alone and swap alternate in every round, after one that is not kept;
then, as two engines do not fit beside each other, follow as many exports and fresh starts.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import measurements
import tables
from measurements import QUICKSTART

from llmevo.config import Config, read_config
from llmevo.engines.base import Engine
from llmevo.engines.hf import HfEngine
from llmevo.engines.vllm import VllmEngine
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.sources import Sources
from llmevo.search.space import SearchSpace


def start(backend: str, folder: Path, dtype: str, sources: Sources, cache_gb: float) -> Engine:
    if backend == "vllm":
        return VllmEngine(folder, folder, dtype, sources.root, 0, cache_gb)
    return HfEngine(folder, folder, dtype, merger=Merger(sources, 0, cache_gb))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--backend", default="hf,vllm")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--out", type=Path, help="a file to append every round to, as lines of JSON")
    return made


def main() -> None:
    given = parser().parse_args()
    config: Config = read_config(QUICKSTART)
    sources, dtype = Sources(QUICKSTART.parent), config.genome.dtype
    donor = config.genome.references[0]
    space = SearchSpace(config.genome, int(sources.config(donor)["num_hidden_layers"]))

    def candidate(turn: int) -> Recipe:
        return space.decode(space.clamp({name: value + 0.01 * turn for name, value in space.uniform().items()}))

    found: list[dict[str, Any]] = []

    def keep(backend: str, turn: int, seconds: dict[str, float]) -> None:
        line = {"benchmark": "swap", "backend": backend, "round": turn, "seconds": seconds}
        line |= measurements.environment()
        found.append(measurements.append(given.out, line))

    for backend in given.backend.split(","):
        merger = Merger(sources, 0, config.engine.cache_gb)
        engine: Any = start(backend, sources.folder(donor), dtype, sources, config.engine.cache_gb)
        for turn in range(given.rounds + 1):
            recipe = candidate(turn)
            begun = time.perf_counter()
            for _ in merger.merge(recipe):
                pass
            merged = time.perf_counter()
            engine.swap(recipe)
            swapped = time.perf_counter()
            if turn:  # the first turn compiles kernels and maps files
                keep(backend, turn, {"merge": merged - begun, "swap": swapped - merged})
        engine.close()
        for turn in range(1, given.rounds + 1):
            with tempfile.TemporaryDirectory() as folder:
                begun = time.perf_counter()
                write_model(candidate(turn), sources, Path(folder) / "model")
                fresh = start(backend, Path(folder) / "model", dtype, sources, 0.0)
                keep(backend, turn, {"anew": time.perf_counter() - begun})
                fresh.close()
    print(tables.markdown(found))


if __name__ == "__main__":
    main()
