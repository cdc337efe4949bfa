"""Whether transformers and vLLM give the same candidates the same scores: the quickstart's held-out tasks.

    python benchmarks/agreement.py --out benchmarks/results/agreement.jsonl [--limit 64] [--dtype float32]
    python benchmarks/tables.py benchmarks/results/agreement.jsonl

Three candidates (the uniform merge and two around it) are merged into both engines and scored on the same questions.
"""

import argparse
from pathlib import Path
from typing import Any

import measurements
import tables
from measurements import QUICKSTART

from llmevo.config import read_config
from llmevo.engines.base import Engine
from llmevo.engines.hf import HfEngine
from llmevo.engines.vllm import VllmEngine
from llmevo.merging.merger import Merger
from llmevo.models.sources import Sources
from llmevo.search.space import SearchSpace


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--limit", type=int, default=None, help="questions a task; all by default")
    made.add_argument("--dtype", default=None, help="of the merge and of what the engines compute; the config's")
    made.add_argument("--out", type=Path, help="a file to append every answer to, as lines of JSON")
    return made


def main() -> None:
    given = parser().parse_args()
    config = read_config(QUICKSTART)
    if given.dtype:
        config = config.model_copy(update={"genome": config.genome.model_copy(update={"dtype": given.dtype})})
    sources, dtype = Sources(QUICKSTART.parent), config.genome.dtype
    donor = config.genome.references[0]
    folder = sources.folder(donor)
    space = SearchSpace(config.genome, int(sources.config(donor)["num_hidden_layers"]))
    evaluator = measurements.heldout(config, QUICKSTART.parent, given.limit)
    uniform = space.uniform()
    candidates = {
        f"uniform × {scale:g}": space.clamp({n: v * scale for n, v in uniform.items()}) for scale in (1.0, 0.5, 2.0)
    }
    found: list[dict[str, Any]] = []
    for backend in ("hf", "vllm"):
        engine: Engine = (
            HfEngine(folder, folder, dtype, merger=Merger(sources, 0))
            if backend == "hf"
            else VllmEngine(folder, folder, dtype, sources.root)
        )
        for name, genes in candidates.items():
            engine.swap(space.decode(genes))
            score = evaluator.score(engine.lm)
            right = {task: "".join(str(int(one)) for one in own) for task, own in score.item_scores.items()}
            line = {"benchmark": "agreement", "dtype": dtype, "candidate": name, "engine": backend}
            line |= {"score": score.total, "right": right} | measurements.environment()
            found.append(measurements.append(given.out, line))
        engine.close()
    print(tables.markdown(found))


if __name__ == "__main__":
    main()
