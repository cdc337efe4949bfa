"""What the parameters of a search do, in a line each: the methods' own words, with the names of the models."""

from collections.abc import Mapping

from llmevo.merging.methods.registry import WIDEN, Method
from llmevo.merging.recipe import PREPARE
from llmevo.search.genome import Genome, walks
from llmevo.search.mixtures import BIAS, TEMPERATURE
from llmevo.search.prompts.names import Names
from llmevo.search.space import SearchSpace

ROUTERS = {
    TEMPERATURE: "every candidate is a mixture of experts, whose routers divide their logits by it: low sends a token"
    " to one expert, high to all alike",
    BIAS: "added to the logit of the model as an expert: more tokens go to it",
}


def meanings(space: SearchSpace, names: Names) -> dict[str, str]:
    """Return {parameter: what it does}, method by method where they differ; empty where the names are masked."""
    if names.masked:
        return {}
    found: dict[str, dict[str, list[str]]] = {}
    for method in space.genome.methods:
        for parameter in space.parameters_of(method):
            by_text = found.setdefault(parameter, {})
            by_text.setdefault(_meaning(space, names, method, parameter), []).append(method.name)
    return {
        parameter: "; ".join(f"in {', '.join(of)} {text}" if len(texts) > 1 else text for text, of in texts.items())
        for parameter, texts in found.items()
    }


def _meaning(space: SearchSpace, names: Names, method: Method, parameter: str) -> str:
    genome = space.genome
    if parameter in ROUTERS:
        return ROUTERS[parameter]
    text = genome.declared(method)[parameter].meaning
    if parameter == PREPARE and genome.prepare:
        return f"{text} ({', then '.join(genome.prepare.names)})"
    if not method.pair:
        return text
    models = [names.models[space.names[model]] for model in genome.merged(method)]
    if len(models) > 2:
        return "each model's share: the two models with the highest are merged, in the ratio of their shares"
    return f"0 is {models[0]}, 1 is {models[1]}" if walks(method) else f"{text} ({models[0]} towards {models[1]})"


def sums(space: SearchSpace, names: Names) -> Mapping[str, list[str]]:
    """Return the methods with weights: `divided` by the sum of a row's weights, `added` task vectors whose weights may
    have any sum, and `whole` models whose weights should have the sum 1.
    """
    found: dict[str, list[str]] = {"divided": [], "added": [], "whole": []}
    for method in space.genome.methods:
        if "weight" in method.each and method.models != (2, 2):  # of two models the parameter's meaning says it
            kind = (
                "divided" if _divides(space.genome, method) else "added" if space.genome.has_origin(method) else "whole"
            )
            found[kind].append(names.methods[method.name])
    return found


def _divides(genome: Genome, method: Method) -> bool:
    if "normalize" in method.shared:
        return genome.normalizes(method)
    own = method.shared.get("normalize_weights")
    return method.name == WIDEN or bool(own and genome.parameters.get("normalize_weights", own.default))
