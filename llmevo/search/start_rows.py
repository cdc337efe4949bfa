"""Start rows: those of every search, and those that follow from the models (router use, Model Stock)."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmevo.errors import ConfigError
from llmevo.models.references import ModelReference
from llmevo.search.genome import Genome
from llmevo.search.prompts.question import SliceGeometry
from llmevo.search.space import Gene, Genes, SearchSpace
from llmevo.search.trial import Suggestion

if TYPE_CHECKING:
    from llmevo.merging.dense import RouterUse

MODEL_STOCK = "model_stock"
"""The entry of `search.start_from` that stands for the weights of Model Stock."""

ROUTER_USE = "router use"
"""The name of the start row of experts by their use."""


def usual_rows(space: SearchSpace) -> list[Suggestion]:
    """Return the start rows of every search: the uniform merge, the same with other weights for all models, every model
    alone.
    """
    return [Suggestion(space.uniform(), "uniform"), *coefficient_rows(space), *parent_rows(space)]


def coefficient_rows(space: SearchSpace) -> list[Suggestion]:
    """Return merges with one weight for all models; see `SearchSpace.coefficients`."""
    found = space.coefficients().items()
    return [Suggestion(genes, "coefficient", f"coefficient {value:g}") for value, genes in found]


def parent_rows(space: SearchSpace) -> list[Suggestion]:
    """Return every model alone."""
    return [Suggestion(space.parent(model), "parent", space.names[model]) for model in space.merged]


def mixture_in(genome: Genome) -> ModelReference | None:
    """Return the mixture that two or more of the models are experts of, the first one; None without such."""
    found: list[ModelReference] = []
    for of in genome.models:
        if of.model.expert is not None and of.lora is None:
            whole = ModelReference(model=of.model.model_copy(update={"expert": None}))
            if whole in found:
                return whole
            found.append(whole)
    return None


def by_router_use(space: SearchSpace, mixture: ModelReference, use: "RouterUse") -> list[Suggestion]:
    """Return the average of a mixture's experts by their use, each slice by the mean of its layers; other models have
    the weight 0. Empty where no method has weights.
    """
    names = {name: model for model, name in space.names.items()}

    def weight(gene: Gene) -> float:
        model = names[gene.model or ""].model
        if model.expert is None or model.model_copy(update={"expert": None}) != mixture.model:
            return 0.0
        layers = range(*_span(space, gene))
        return sum(use.weights(layer)[model.expert] for layer in layers) / len(layers)

    return _with_weights(space, ROUTER_USE, weight)


def by_model_stock(
    space: SearchSpace, geometry: Sequence[SliceGeometry], key: str = "search.start_from"
) -> list[Suggestion]:
    """Return the merge with the weights t/n of Model Stock (https://arxiv.org/abs/2403.19522, section 4) in each slice.

    Raises ConfigError, which names the config's `key`, for methods in which these weights are no factors of task
    vectors.
    """
    method = space.genome.methods[0]
    if not space.genome.scales(method):
        raise ConfigError(
            f"{key}: {MODEL_STOCK} gives factors of task vectors, which {method.name} has none of here (it"
            " has no base, or divides by their sum); leave it out, or take merge_method: task_arithmetic"
        )
    ratios = {of.slice: of.model_stock for of in geometry}
    return _with_weights(space, MODEL_STOCK, lambda gene: ratios[gene.slice or ""] / len(space.genome.merged(method)))


def model_stock_weights(space: SearchSpace, geometry: Sequence[SliceGeometry]) -> dict[str, float]:
    """Return the weights of `by_model_stock` by their genes, for `search.prior`; empty where no gene is a weight."""
    rows = by_model_stock(space, geometry, "search.prior")
    return {gene.name: row.genes[gene.name] for row in rows for gene in _weights(space)}


def _weights(space: SearchSpace) -> list[Gene]:
    """Return the genes that are weights of models."""
    return [gene for gene in space.genes if gene.parameter == "weight" and gene.model]


def _with_weights(space: SearchSpace, name: str, weight: Callable[[Gene], float]) -> list[Suggestion]:
    """Return the uniform merge with other weights, moved into the bounds of the genes; empty where none is a weight."""
    genes: Genes = space.uniform()
    weights = _weights(space)
    if not weights:
        return []
    genes |= {gene.name: weight(gene) for gene in weights}
    return [Suggestion(space.clamp(genes), "user", name)]


def _span(space: SearchSpace, gene: Gene) -> tuple[int, int]:
    return space.spans[space.slices.index(gene.slice or "")]
