"""What the weights themselves say: models that change nothing, or nearly the same, or are of another family."""

from collections.abc import Sequence

from llmevo.merging.merger import Merger
from llmevo.run.preflight.base import Finding, Findings
from llmevo.run.scorer import Scorer
from llmevo.search.prompts.question import SliceGeometry

ALIKE = 0.98
"""A cosine of task vectors from which two models are nearly the same."""


FAR = 0.7
"""A task vector's size, in that of the base, from which the model is hardly a fine-tune of it."""


LOST = 0.5
"""The share of a merge's change from which rounding is worth a word."""


def vectors(scorer: Scorer) -> Findings:
    """From the norms of and cosines between the task vectors; reads the weights."""
    facts = scorer.geometry
    for model in facts[0].norms:
        largest = max(of.norms[model] for of in facts)
        if largest == 0:
            yield Finding(model, "its layers are those of the base: its genes change nothing", "Leave it out")
        elif scorer.config.genome.base_model and largest > FAR:
            yield Finding(
                model,
                f"its task vector is {largest:.0%} the size of the base",
                f"Check that it was tuned from {scorer.config.genome.base_model}, and not from another model",
            )
    for pair in facts[0].cosines:
        least = min(of.cosines[pair] for of in facts)
        if least > ALIKE:
            yield Finding(
                pair.replace("/", " and "),
                f"they are nearly one model (the cosine of their task vectors is {least:.2f} or more in every slice)",
                "One of them is enough: each doubles the genes of the other",
            )


def rounded(lost: float, written: str) -> Findings:
    """What is said when rounding the result loses much of what a merge changes; see `rounding_loss`."""
    if lost > LOST:
        yield Finding(
            "rounding",
            f"writing in {written} loses {lost:.0%} of what the uniform merge changes, so most of what the genes tune"
            " is noise",
            "Set genome.dtype: float32",
        )


def rounding_loss(scorer: Scorer) -> float:
    """The share of what the uniform merge changes that is lost; see `Merger.rounding_loss`."""
    return Merger(scorer.sources).rounding_loss(scorer.space.decode(scorer.space.uniform()))


def alike(facts: Sequence[SliceGeometry]) -> list[str]:
    """The pairs of models, the most alike first."""
    return sorted(facts[0].cosines, key=lambda pair: -max(of.cosines[pair] for of in facts))
