"""The check of the texts on which a preparation measures the experts."""

from llmevo.merging.preparation.registry import STEPS
from llmevo.run.preflight.base import Finding, Findings
from llmevo.run.scorer import Scorer


def preparation(scorer: Scorer) -> Findings:
    """Experts that are all measured on the same texts, or one on the texts of all tasks and another on its own."""
    genome, prepare = scorer.config.genome, scorer.config.genome.prepare
    experts = [model for model in genome.models if model != genome.base_model]
    if prepare is None or len(experts) < 2 or not any(STEPS[name].measures == "grams" for name in prepare.names):
        return
    tasks = {scorer.space.names[model]: (prepare.tasks or {}).get(model) for model in experts}
    without = [name for name, own in tasks.items() if own is None]
    merging = [name for name in prepare.names if STEPS[name].sums_to_merge]
    if merging and len({None if own is None else frozenset(own) for own in tasks.values()}) == 1:
        yield Finding(
            "genome.prepare",
            f"{' and '.join(merging)} measures all models on the same texts, so the merge is near their mean",
            "Name the tasks of each model, `prepare: {steps: …, tasks: {MODEL: [TASK]}}`",
        )
    elif prepare.tasks and without:
        yield Finding(
            "genome.prepare.tasks",
            f"{', '.join(without)} {'is' if len(without) == 1 else 'are'} not listed, and so measured on the texts of"
            " all tasks, those of the other models too",
            "Name the tasks of every model, unless that is meant",
        )
