"""A heat: candidates that are asked together, a part of the questions at a time, and raced in step."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from llmevo.engines.lora_batching.scorer import Together
from llmevo.errors import CandidateError
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.score import Score, concatenate
from llmevo.merging.recipe import Recipe


@dataclass
class Runner:
    """A candidate of a heat."""

    parts: list[Score]
    """What each part of the questions says of it, as far as it came."""
    merge: float = 0.0
    """Its share of the seconds that went into preparing the heat."""
    evaluate: float = 0.0
    """Its share of those of every part it was asked."""


def run(
    together: Together,
    evaluator: Evaluator,
    recipes: Sequence[Recipe],
    rivals: Sequence[Score] = (),
    error_rate: float | None = None,
) -> list[tuple[Score | None, dict[str, float]]]:
    """Each candidate's score on all questions, or on those after which it could not get ahead of the best rival any
    more: see `Evaluator.stopped`; without an error rate nobody is stopped. None for one that failed. With the seconds
    of `Scorer.score`: what took time for several is shared out equally.

    Raises CandidateError when they cannot be asked together.
    """
    runners = [Runner([]) for _ in recipes]
    begun = time.monotonic()
    with together.candidates(recipes) as members:
        for runner in runners:
            runner.merge = (time.monotonic() - begun) / len(runners)
        going = [*zip(runners, members, strict=True)]
        for place in range(len(evaluator.blocks)):
            begun, asked, going = time.monotonic(), going, []
            for runner, member in asked:
                try:
                    runner.parts.append(evaluator.score_block(member, place))
                except CandidateError:
                    runner.parts.clear()
                    member.leave()
                    continue
                score = concatenate(evaluator.tasks, runner.parts, evaluator.same)
                if error_rate is not None and evaluator.stopped(score, rivals, error_rate):
                    member.leave()
                else:
                    going.append((runner, member))
            for runner, _ in asked:
                runner.evaluate += (time.monotonic() - begun) / len(asked)
    return [
        (
            concatenate(evaluator.tasks, runner.parts, evaluator.same) if runner.parts else None,
            {"merge": runner.merge, "evaluate": runner.evaluate},
        )
        for runner in runners
    ]
