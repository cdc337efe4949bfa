"""The contract of every optimizer, where a search starts, and the trial that is recommended."""

from dataclasses import replace

import numpy as np
import pytest

from llmevo.evaluation.score import Score
from llmevo.search.optimizers import EARLIER, OPTIMIZERS
from llmevo.search.optimizers.recommendation import recommend
from llmevo.search.prompts.question import Prompt
from llmevo.search.space import Genes
from llmevo.search.trial import Candidate, Trial
from llmevo.testing import OptimizerContract
from llmevo.testing.optimizers import (
    Make,
    ask,
    height,
    run,
    setup,
    silent,
    space,
    start_rows,
    trial,
)

ALL = {**OPTIMIZERS, **{f"earlier {name}": kind for name, kind in EARLIER.items()}}
"""The earlier ones too: a run that began with them is resumed with them."""


class TestEveryOptimizer(OptimizerContract):
    @pytest.fixture(params=ALL.values(), ids=[*ALL])
    def make(self, request: pytest.FixtureRequest) -> Make:
        return request.param


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("llm", "llm-evo-merge", "earlier llm")])
def test_without_an_llm_no_prompt_is_made(kind: str) -> None:
    prompts: list[Prompt] = []
    run(ALL[kind], 3, lambda prompt: (prompts.append(prompt), silent(prompt))[1], height)
    assert not prompts


def test_warnings_of_optuna_are_kept_out_of_the_display(capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    OPTIMIZERS["gp"](setup())
    optuna.logging.get_logger("optuna.study").warning("The 'greenlet' package is unavailable")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("stderr", "lucky"), [(0.0, True), (0.15, False)])
def test_what_is_recommended_is_the_best_score_where_scores_are_exact_and_the_likeliest_where_they_are_noisy(
    stderr: float, lucky: bool
) -> None:
    over, random = space(method="task_arithmetic"), np.random.default_rng(0)
    assert recommend(over, []) is None
    assert recommend(over, [trial(0, over.uniform(), None)]) is None
    points = random.random((60, len(over.genes)))
    heights = 1 - 2 * ((points - 0.4) ** 2).mean(axis=1)
    scores = heights + stderr * random.standard_normal(len(points))
    # Where it is worst, a score that is higher than all others.
    points, scores = np.vstack([points, np.ones(len(over.genes))]), np.append(scores, scores.max() + 0.01)
    trials = [
        Trial(Candidate(i, 0, "random", over.from_unit(point), ""), Score(score, stderr, {}, 10))
        for i, (point, score) in enumerate(zip(points, scores.tolist(), strict=True))
    ]
    failed = Trial(Candidate(99, 0, "random", over.uniform(), ""), None, "it is not finite")
    for rows in (trials, [*trials, failed]):
        found = recommend(over, rows)
        assert found is not None
        assert (found == trials[-1]) is lucky
        assert lucky or heights[found.candidate.id] > np.quantile(heights, 0.9)


def test_of_more_trials_than_the_model_learns_from_a_better_one_than_the_luckiest_is_recommended() -> None:
    over, random = space(models=3, method="task_arithmetic", layer_granularity=2), np.random.default_rng(3)
    points = random.random((450, len(over.genes)))
    heights = 0.6 - ((points - 0.5) ** 2).mean(axis=1)
    scores = heights + 0.05 * random.standard_normal(len(points))
    trials = [
        Trial(Candidate(i, 0, "random", over.from_unit(point), ""), Score(score, 0.05, {}, 10))
        for i, (point, score) in enumerate(zip(points, scores.tolist(), strict=True))
    ]
    for earlier in (False, True):
        found = recommend(over, trials, earlier)
        assert found is not None
        assert heights[found.candidate.id] > heights[int(np.argmax(scores))] + 0.02


@pytest.mark.parametrize("kind", ["cma-es", "sep-cma-es", "spsa", "mergekit-evolve"])
def test_a_search_starts_from_the_best_start_row_and_as_mergekit_evolve_from_the_uniform_merge(kind: str) -> None:
    over = space(method="task_arithmetic", layer_granularity=1)
    scaled = next(iter(over.coefficients().values()))
    for best in (scaled, over.parent(over.merged[1])):
        optimizer = OPTIMIZERS[kind](setup(over))
        rows = start_rows(over)
        optimizer.tell([*rows, trial(len(rows), best, 0.9, "coefficient")])
        points = np.array([over.to_unit(genes) for _ in range(20) for genes in ask(optimizer)[0]])
        starts = {"best": best, "uniform": over.uniform()}
        far = {name: np.abs(points.mean(axis=0) - over.to_unit(genes)).mean() for name, genes in starts.items()}
        assert min(far, key=lambda name: far[name]) == ("uniform" if kind == "mergekit-evolve" else "best")


@pytest.mark.parametrize("kind", ["llm", "llm-off", "tpe", "gp", "nsga2", "cma-es", "sep-cma-es", "random"])
def test_no_worker_is_idle(kind: str) -> None:
    optimizer = OPTIMIZERS[kind](replace(setup(), parallel=8))
    optimizer.tell(start_rows(space()))
    for place in range(4):
        asked = ask(optimizer, silent, 8)[0]
        assert len(asked) == len({tuple(genes.values()) for genes in asked}) == 8
        optimizer.tell([trial(10 + 8 * place + i, genes, 0.1 * i) for i, genes in enumerate(asked)])


@pytest.mark.parametrize("kind", ["cma-es", "sep-cma-es", "spsa"])
def test_a_log_of_before_starts_from_the_uniform_merge(kind: str) -> None:
    over, asked = space(), list[list[Genes]]()
    for best in (0.1, 0.9):  # of another start row
        optimizer = OPTIMIZERS[kind](replace(setup(over), from_uniform=True))
        optimizer.tell([*start_rows(over), trial(9, over.clamp(dict.fromkeys(over.uniform(), 0.8)), best, "user")])
        asked.append(ask(optimizer)[0])
    assert asked[0] == asked[1]
