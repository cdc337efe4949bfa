"""Before the spend: what the run will take, what may be wrong with the models, and what will be asked."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmevo.errors import plural
from llmevo.merging.merger import Merger, TensorCounts
from llmevo.run.experiment import Experiment
from llmevo.run.preflight import preflight
from llmevo.run.preflight.architecture import stored_dtype
from llmevo.run.preflight.base import Finding, names
from llmevo.run.preflight.forecast import Forecast, first_prompt, forecast, measure, unasked
from llmevo.run.preflight.memory import Memory, memory_of
from llmevo.run.preflight.task_vectors import rounded, rounding_loss, vectors
from llmevo.run.trust import Use, uses
from llmevo.search.prompts.question import SliceGeometry


@dataclass(frozen=True)
class Model:
    """What is known of a model without loading it."""

    name: str
    reference: str
    parameters: int
    dtype: str
    licence: str | None


@dataclass(frozen=True)
class Inspection:
    """All that is shown, and written with --json."""

    budget: str
    forecast: Forecast
    warnings: list[Finding]
    memory: Memory
    uses: list[Use]
    """What code the config runs, what files it opens beside the models, and where texts go."""
    models: list[Model]
    dtype: str
    """Of the merge."""
    rounding_loss: float
    """The share of what the uniform merge changes that rounding to `dtype` loses."""
    tensors: TensorCounts
    """What becomes of the models' tensors in the uniform merge."""
    geometry: list[SliceGeometry]
    based: bool
    """Whether task vectors start at a base model; at the models' mean otherwise."""
    layers: int
    genes: list[dict[str, Any]]
    """Name, low, high or choices, and the value in the uniform merge."""
    proposer: str
    """Who is asked; empty for an optimizer without an LLM, and where the budget leaves nothing to ask for."""
    prompt: Sequence[Mapping[str, str]]
    """The first one, with scores of 0."""

    @property
    def origin(self) -> str:
        """Where task vectors start."""
        return "the base" if self.based else "the models' mean"

    @property
    def extent(self) -> str:
        """The size of the search space: `8 genes over 30 layers`."""
        return f"{plural(len(self.genes), 'gene')} over {plural(self.layers, 'layer')}"

    def json(self) -> str:
        """All of it, for machines."""
        return json.dumps(asdict(self), indent=2)


def gather(experiment: Experiment, measured: bool = False) -> Inspection:
    """Look at everything; with `measured` start the engine and score the uniform merge once. Raises SourceError for a
    model that the engine cannot run.
    """
    scorer, uniform = experiment.scorer, experiment.space.uniform()
    scorer.check_filters()
    scorer.check_model()
    lost, first = rounding_loss(scorer), first_prompt(experiment)
    genes = [{**gene.described(), "uniform": gene.shown(uniform[gene.name])} for gene in experiment.space.genes]
    return Inspection(
        budget=str(experiment.config.search.budget),
        warnings=[
            *unasked(experiment, first),
            *preflight(scorer),
            *rounded(lost, scorer.config.genome.dtype),
            *vectors(scorer),
        ],
        memory=memory_of(scorer),
        uses=uses(experiment.config, experiment.root),
        models=[_model(experiment, reference, name) for reference, name in names(scorer).items()],
        dtype=scorer.config.genome.dtype,
        rounding_loss=lost,
        tensors=Merger(scorer.sources).count(experiment.space.decode(uniform)),
        geometry=scorer.geometry,
        based=scorer.config.genome.base_model is not None,
        layers=experiment.layers,
        genes=genes,
        proposer=f"{experiment.proposer_name} {experiment.proposer.model}" if first else "",
        prompt=first.prompt.messages if first else (),
        forecast=forecast(experiment, first, measure(experiment) if measured else None),
    )


def _model(experiment: Experiment, reference: Any, name: str) -> Model:
    sources = experiment.sources
    size = sum(math.prod(shape) for shape in sources[reference].shapes.values())
    return Model(name, str(reference), size, stored_dtype(experiment.scorer, reference), sources.licence(reference))
