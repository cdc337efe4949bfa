"""A space of layer paths, and a score of paths that follows from a script."""

from collections.abc import Callable, Sequence
from typing import Any

from llmevo.evaluation.score import Score
from llmevo.llm.templates import Templates
from llmevo.merging.path import LayerPath
from llmevo.search.genome import Genome
from llmevo.search.optimizers.base import Optimizer, Setup, answered
from llmevo.search.prompts.question import Prompt, Reading
from llmevo.search.space import SearchSpace
from llmevo.search.trial import Candidate, Suggestion, Trial

LAYERS = 20
WHOLE = {"alpha": 0.5, "beta": 0.45, "merge": 0.48}
"""The scores of the models alone, and of the uniform merge."""
TASKS = {"sums": (1.0, "acc,none")}


def space(layers: int = LAYERS, **path: Any) -> SearchSpace:
    genome = {
        "base_model": "base",
        "models": ["alpha", "beta"],
        "merge_method": "task_arithmetic",
        "path": {"deepest": 26, **path},
    }
    return SearchSpace(Genome.model_validate(genome), layers)


def setup(over: SearchSpace | None = None, seed: int = 0, budget: int = 60, style: str = "", **keys: Any) -> Setup:
    return Setup(over or space(), seed, budget, TASKS, style, Templates(), **keys)


def height(path: LayerPath) -> float:
    """The score of a path: of layers 8 to 11 run twice with half the gain it gains, of layers 12 to 15 taken from beta
    too; every layer that is left out before 15 costs.
    """
    total = 0.5
    seen: dict[int, int] = {}
    for hop in path.hops:
        seen[hop.layer] = seen.get(hop.layer, 0) + 1
        if seen[hop.layer] > 1:
            good = 8 <= hop.layer < 12 and seen[hop.layer] == 2
            total += (0.03 if good else -0.02) - 0.02 * abs(hop.gains.attention - 0.5)
        elif 12 <= hop.layer < 16:
            total += 0.02 * (hop.model == "beta")
        else:
            total -= 0.02 * (hop.model != "alpha")
    return total - sum(0.03 * (layer < 15) for layer in range(LAYERS) if layer not in seen)


def scored(candidate: Candidate, objective: Callable[[LayerPath], float] = height) -> Trial:
    """The trial of a candidate: a path, a model alone or a merge."""
    if candidate.path:
        value = objective(LayerPath.parse(candidate.path))
    elif candidate.origin == "parent":
        value = WHOLE[candidate.note]
    else:
        value = WHOLE["merge"] - sum((of - 0.5) ** 2 for of in candidate.genes.values()) / 10
    return Trial(candidate, Score(value, 0.01, {"sums": {"acc,none": value}}, 10))


def start_rows(over: SearchSpace) -> list[Trial]:
    rows = [Suggestion(over.uniform(), "uniform")]
    rows += [Suggestion(over.parent(model), "parent", over.names[model]) for model in over.merged]
    return [scored(Candidate(i, 0, row.origin, row.genes, row.note)) for i, row in enumerate(rows)]


def asked(optimizer: Optimizer, size: int, answer: Callable[[Prompt], Reading] | None = None) -> Sequence[Suggestion]:
    """The next candidates; every prompt is answered by `answer`."""
    return answered(optimizer.ask(size), answer or (lambda _: Reading(problems=["no answer"], lost=True)))


def searched(
    optimizer: Optimizer,
    over: SearchSpace,
    evaluations: int,
    size: int = 4,
    answer: Callable[[Prompt], Reading] | None = None,
    objective: Callable[[LayerPath], float] = height,
) -> list[Trial]:
    """All trials of a search with that many evaluations, the start rows included."""
    trials = told = start_rows(over)
    for generation in range(1, evaluations):
        optimizer.tell(told)
        if len(trials) >= evaluations:
            break
        suggestions = asked(optimizer, min(size, evaluations - len(trials)), answer)
        told = [
            scored(Candidate(len(trials) + i, generation, s.origin, s.genes, s.note, path=s.path), objective)
            for i, s in enumerate(suggestions)
        ]
        trials = [*trials, *told]
    return trials
