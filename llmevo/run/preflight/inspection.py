"""An inspection before a run: its forecast, warnings, models, search space and first prompt."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmevo.errors import plural
from llmevo.merging.merger import Merger, TensorCounts
from llmevo.run.experiment import Experiment
from llmevo.run.preflight import preflight
from llmevo.run.preflight.base import Finding, names
from llmevo.run.preflight.forecast import Forecast, Memory, first_prompt, forecast, measure, memory_of, unasked
from llmevo.run.preflight.models import rounded, rounding_loss, routed, stored_dtype, vectors
from llmevo.run.preflight.quantization import noise
from llmevo.run.scorer import Scorer
from llmevo.run.trust import Use, uses
from llmevo.search import geometry
from llmevo.search.prompts.question import SliceGeometry
from llmevo.search.space import SearchSpace


@dataclass(frozen=True)
class Model:
    """A model of the search, described without loading it."""

    name: str
    reference: str
    parameters: int
    dtype: str
    licence: str | None


@dataclass(frozen=True)
class Inspection:
    """Everything that `llmevo inspect` shows and writes with --json."""

    budget: str
    forecast: Forecast
    warnings: list[Finding]
    memory: Memory
    uses: list[Use]
    """Code that the config runs, files that it opens apart from the models, and servers that it contacts."""
    models: list[Model]
    dtype: str
    """Of the merge."""
    rounding_loss: float
    """The share of what the uniform merge changes that rounding to `dtype` loses."""
    tensors: TensorCounts
    """Tensors that the uniform merge merges, copies and leaves out."""
    routers: str
    """How the routers of a mixture of experts are merged; empty for a dense model."""
    geometry: list[SliceGeometry]
    model_stock: list[float]
    """The share of the models' mean in Model Stock of every layer, the rest being the base; empty without a base."""
    based: bool
    """Whether task vectors are relative to a base model; to the models' mean otherwise."""
    layers: int
    deepest: int
    """The most layers of a candidate where there are layer paths, else 0."""
    genes: list[dict[str, Any]]
    """Name, low, high or choices, and the value in the uniform merge."""
    proposer: str
    """The LLM; empty for an optimizer without one, and where the budget leaves no prompt for it."""
    prompt: Sequence[Mapping[str, str]]
    """The first prompt, with scores of 0."""

    @property
    def origin(self) -> str:
        """The origin of task vectors, in words."""
        return "the base" if self.based else "the models' mean"

    @property
    def extent(self) -> str:
        """The size of the search space: `8 genes over 30 layers`, and the depth of layer paths where it has any."""
        paths = f", and paths of up to {plural(self.deepest, 'layer')}" if self.deepest else ""
        return f"{plural(len(self.genes), 'gene')} over {plural(self.layers, 'layer')}{paths}"

    def json(self) -> str:
        """Everything as JSON."""
        return json.dumps(asdict(self), indent=2)


def by_layer(scorer: Scorer) -> list[SliceGeometry]:
    """Return the norms of and cosines between task vectors layer by layer, whatever the slices of the search are."""
    if len(scorer.space.slices) == scorer.layers:
        return scorer.geometry
    genome = scorer.config.genome.model_copy(update={"layer_granularity": 1})
    return geometry.measure(SearchSpace(genome, scorer.layers, scorer.routers, bool(scorer.vocabulary)), scorer.sources)


def gather(experiment: Experiment, measured: bool = False) -> Inspection:
    """Return the inspection of an experiment; with `measured`, the engine scores the uniform merge once. Raises
    what `Experiment.check_config` raises.
    """
    experiment.check_config()
    scorer, uniform = experiment.scorer, experiment.space.uniform()
    lost, first = rounding_loss(scorer), first_prompt(experiment)
    genes = [{**gene.described(), "uniform": gene.shown(uniform[gene.name])} for gene in experiment.space.genes]
    return Inspection(
        budget=str(experiment.config.search.budget),
        warnings=[
            *unasked(experiment, first),
            *preflight(scorer),
            *rounded(lost, scorer.config.genome.dtype),
            *vectors(scorer),
            *noise(scorer),
        ],
        memory=memory_of(scorer),
        uses=uses(experiment.resolved, experiment.root, "--api-key" if experiment.given_key else ""),
        models=[
            Model(
                name,
                str(reference),
                sum(math.prod(shape) for shape in scorer.sources.own(reference).shapes.values()),
                stored_dtype(scorer, reference),
                scorer.sources.licence(reference),
            )
            for reference, name in names(scorer).items()
        ],
        dtype=scorer.config.genome.dtype,
        rounding_loss=lost,
        tensors=Merger(scorer.sources).count(experiment.space.decode(uniform)),
        routers=routed(scorer),
        geometry=scorer.geometry,
        model_stock=[round(of.model_stock, 4) for of in by_layer(scorer)] if scorer.config.genome.base_model else [],
        based=scorer.config.genome.base_model is not None,
        layers=experiment.layers,
        deepest=scorer.deepest or 0,
        genes=genes,
        proposer=f"{experiment.proposer_name} {experiment.proposer.model}" if first else "",
        prompt=first.prompt.messages if first else (),
        forecast=forecast(experiment, first, measure(experiment) if measured else None),
    )
