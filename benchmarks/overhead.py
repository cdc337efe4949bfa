"""What a candidate costs besides scoring: choosing it, and reading it back from the log.

    python benchmarks/overhead.py --out benchmarks/results/overhead.jsonl [--rounds 3]
    python benchmarks/tables.py benchmarks/results/overhead.jsonl

Choosing: `llm-off` on 64 and on 128 genes, 200 evaluations of a quadratic that takes no time; everything that is asked
of the optimizer and told to it counts. Reading: a log of 10,000 candidates of the quickstart, each with its recipe and
the answers to 160 questions, is read and folded to the state that every command starts from.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asking
import measurements
import numpy as np
import tables
from measurements import QUICKSTART

from llmevo.config import read_config
from llmevo.evaluation.score import Score
from llmevo.llm.templates import Templates
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, read_log
from llmevo.search.genome import Genome
from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.base import Setup, answered
from llmevo.search.space import SearchSpace
from llmevo.search.trial import Candidate, Suggestion, Trial

LAYERS = 30
POPULATION = 16
ANSWERS = 32
"""Questions of each of the quickstart's five tasks."""


def searched(genes: int, evaluations: int, seed: int) -> float:
    """Seconds that `llm-off` takes by itself for a whole search."""
    models = [f"model-{number}" for number in range(4)]
    genome = {"models": models, "base_model": "base", "merge_method": "task_arithmetic", "layer_granularity": 1}
    space = SearchSpace(Genome.model_validate(genome), genes // len(models))
    optimum = np.random.default_rng(seed).random(genes)
    optimizer = OPTIMIZERS["llm-off"](Setup(space, seed, evaluations, {"task": (1.0, "acc,none")}, "chat", Templates()))
    asked = [Suggestion(space.parent(model), "parent") for model in space.merged]
    asked.append(Suggestion(space.uniform(), "uniform"))
    done, seconds = 0, 0.0
    while True:
        told: list[Trial] = []
        for suggestion in asked:
            value = 1.0 - float(np.mean((space.to_unit(suggestion.genes) - optimum) ** 2))
            score = Score(value, 0.0, {"task": {"acc,none": value}}, 100)
            told.append(Trial(Candidate(done + len(told), 0, suggestion.origin, suggestion.genes, ""), score))
        done += len(told)
        begun = time.perf_counter()
        optimizer.tell(told)
        if done >= evaluations:
            return seconds + time.perf_counter() - begun
        asked = answered(optimizer.ask(min(POPULATION, evaluations - done)), asking.refused)
        seconds += time.perf_counter() - begun


def log(candidates: int) -> Iterator[events.Event]:
    """A run of the quickstart with made-up scores."""
    config = read_config(QUICKSTART)
    space, random = SearchSpace(config.genome, LAYERS), np.random.default_rng(0)
    yield events.RunStarted(
        config=config.model_dump(mode="json"),
        root="",
        prompts={},
        versions={},
        sources=[],
        seed=0,
        genes=[{"name": gene.name, "low": gene.low, "high": gene.high} for gene in space.genes],
        layers=LAYERS,
        items=ANSWERS * len(config.tasks),
        heldout_items=0,
        proposer="",
        style="chat",
    )
    for first in range(0, candidates, POPULATION):
        numbers = range(first, min(first + POPULATION, candidates))
        chosen = [space.from_unit(random.random(len(space.genes))) for _ in numbers]
        rows = [
            {"id": number, "origin": "gaussian", "genes": genes, "recipe": space.decode(genes).as_dict(), "note": ""}
            for number, genes in zip(numbers, chosen, strict=True)
        ]
        yield events.Asked(generation=first // POPULATION, candidates=rows)
        for number in numbers:
            answers = {task.name: [int(one) for one in random.random(ANSWERS) < 0.5] for task in config.tasks}
            yield events.Evaluated(
                candidate=number,
                score=0.5,
                stderr=0.04,
                tasks={task.name: {task.metric: 0.5} for task in config.tasks},
                items=ANSWERS * len(answers),
                item_scores={task: [*map(float, own)] for task, own in answers.items()},
                seconds={"merge": 0.1, "evaluate": 1.0},
            )
        yield events.Told(generation=first // POPULATION, state="0123456789abcdef", sigma=0.2, best=None)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--genes", default="64,128")
    made.add_argument("--evaluations", type=int, default=200)
    made.add_argument("--candidates", type=int, default=10_000, help="in the log")
    made.add_argument("--out", type=Path, help="a file to append every round to, as lines of JSON")
    return made


def main() -> None:
    given = parser().parse_args()
    found: list[dict[str, Any]] = []

    def keep(what: str, size: int, turn: int, **values: Any) -> None:
        line = {"benchmark": "overhead", "what": what, "size": size, "round": turn, **values}
        found.append(measurements.append(given.out, line | measurements.environment()))

    for turn in range(1, given.rounds + 1):
        for genes in map(int, given.genes.split(",")):
            seconds = searched(genes, given.evaluations, turn)
            keep("search", genes, turn, evaluations=given.evaluations, seconds=seconds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / LOG
        file.write_text("".join(event.model_dump_json(by_alias=True) + "\n" for event in log(given.candidates)))
        for turn in range(1, given.rounds + 1):
            begun = time.perf_counter()
            state = RunState.fold(iter(read_log(Path(folder))))
            seconds = time.perf_counter() - begun
            assert len(state.trials) == given.candidates
            keep("log", given.candidates, turn, bytes=file.stat().st_size, seconds=seconds)
    print(tables.markdown(found))


if __name__ == "__main__":
    main()
