"""Two workers against one: candidates an hour of one generation of the quickstart, on one thread each.

    python benchmarks/worker_speed.py --out benchmarks/results/worker-speed.jsonl [--rounds 2] [--limit 40]
    python benchmarks/tables.py benchmarks/results/worker-speed.jsonl

One process and two processes score the same eight candidates, part by part, in alternation (A B A B), first with all
questions, then raced against the start rows with one weight for all models, which both score before in full. Engines
are loaded and have answered before the clock starts. On a quiet machine with two cores it takes about seven minutes.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measurements
import numpy as np
import tables
from measurements import QUICKSTART

from llmevo.config import read_config
from llmevo.evaluation.score import Score
from llmevo.merging.recipe import Recipe
from llmevo.run.score_cache import ScoreCache
from llmevo.run.scorer import Scorer, open_scorer
from llmevo.search.space import SearchSpace
from llmevo.workers.pool import Pool
from llmevo.workers.processes import Processes
from llmevo.workers.protocol import Request

FLEETS = (1, 2)
THREADS = 1
"""Of each worker."""
SPREAD = 0.1
"""The standard deviation of the candidates around the uniform merge, in shares of a gene's range."""


class Fleet:
    """Some worker processes of one thread each."""

    def __init__(self, count: int, limit: int) -> None:
        config = read_config(QUICKSTART).model_copy(update={"limit": limit})
        self.scorer = Scorer(config, QUICKSTART.parent)
        host = Processes(partial(open_scorer, config, QUICKSTART.parent), count, threads=THREADS)
        self.count, self._pool = count, Pool(host, self.scorer, self.scorer.facts())

    def scored(self, recipes: Sequence[Recipe], rivals: Sequence[Score] = ()) -> tuple[float, list[Score]]:
        """Return the seconds and the scores of some recipes."""
        self.scorer.cache = ScoreCache()
        begun = time.perf_counter()
        for number, recipe in enumerate(recipes):
            self._pool.submit(Request(number, recipe, rivals=rivals))
        found: dict[int | str, Score] = {}
        for _ in recipes:
            result = self._pool.result()
            assert result.score, result.reason
            found[result.id] = result.score
        return time.perf_counter() - begun, [found[number] for number in range(len(recipes))]

    def close(self) -> None:
        self._pool.close()


def generation(space: SearchSpace, count: int) -> list[Recipe]:
    """Recipes around the uniform merge."""
    random, middle = np.random.default_rng(0), space.to_unit(space.uniform())
    steps = SPREAD * random.standard_normal((count, len(middle)))
    return [space.decode(space.from_unit(np.clip(middle + step, 0.0, 1.0))) for step in steps]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--candidates", type=int, default=8)
    made.add_argument("--limit", type=int, default=40, help="questions of each task")
    made.add_argument("--out", type=Path, help="a file to append every round to, as lines of JSON")
    return made


def main(words: Sequence[str] | None = None) -> None:
    given = parser().parse_args(words)
    fleets = [Fleet(count, given.limit) for count in FLEETS]
    space = fleets[0].scorer.space
    recipes = generation(space, given.candidates)
    alike = [space.decode(genes) for genes in space.coefficients().values()]
    found: list[dict[str, Any]] = []
    known: dict[tuple[bool, int], float] = {}
    try:
        for fleet in fleets:  # the workers start, and every one of them answers
            _, rows = fleet.scored(alike)
        rivals = sorted(rows, key=lambda score: -score.total)
        for racing in (False, True):
            for turn in range(1, given.rounds + 1):
                for fleet in fleets:
                    seconds, scores = fleet.scored(recipes, rivals if racing else ())
                    for number, score in enumerate(scores):  # the workers decide no score
                        assert known.setdefault((racing, number), score.total) == score.total
                    line = {
                        "benchmark": "worker-speed",
                        "workers": fleet.count,
                        "racing": racing,
                        "round": turn,
                        "candidates": len(recipes),
                        "questions": sum(score.items for score in scores),
                        "of": len(recipes) * fleet.scorer.evaluator.items,
                        "seconds": seconds,
                        **measurements.environment(),
                        "threads": THREADS,
                    }
                    found.append(measurements.append(given.out, line))
                    print(f"{fleet.count} workers, racing {racing}, round {turn}: {seconds:.1f} s", flush=True)
    finally:
        for fleet in fleets:
            fleet.close()
    print(tables.markdown(found))


if __name__ == "__main__":
    main()
