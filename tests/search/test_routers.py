"""The routers of a mixture of experts stay those of the base in a search, unless the user gives them genes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmevo.merging.merger import merge
from llmevo.merging.recipe import Recipe
from llmevo.models.architecture import routers_of
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.search.encode import encode
from llmevo.search.genome import Genome
from llmevo.search.space import SearchSpace
from support.checkpoints import assert_same_bits, mergekit, weights_of
from support.families import new_family

NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("self_attn.q_proj", "mlp.gate", "mlp.experts.0.gate_proj", "mlp.experts.1.gate_proj")
    ),
]
ROUTER = "model.layers.1.mlp.gate.weight"


def space(method: str = "ties", **genome: Any) -> SearchSpace:
    given = {"models": ["one", "two"], "base_model": "base", "merge_method": method, **genome}
    return SearchSpace(Genome.model_validate(given), 2, ["mlp.gate."])


def weights_at(known: SearchSpace, tensor: str, genes: dict[str, float] | None = None) -> list[float]:
    """The models' weights for a tensor, in a recipe that was written and read again."""
    recipe = Recipe.from_yaml(known.decode(genes or known.uniform()).to_yaml())
    return recipe.values(recipe.output_slices(2)[-1], tensor, 1.0)[0]["weight"][:2]


@pytest.mark.parametrize(
    "genome",
    [{}, {"filters": ["self_attn", "mlp"]}, {"layer_granularity": 1}, {"smooth": True, "layer_granularity": 1}],
)
def test_a_recipe_has_the_weight_0_for_the_routers(genome: dict[str, Any]) -> None:
    known = space(**genome)
    assert weights_at(known, ROUTER) == [0, 0]
    assert min(weights_at(known, "model.layers.1.mlp.gate_proj.weight")) > 0
    assert not any("gate" in gene.name for gene in known.genes)


@pytest.mark.parametrize("own", ["mlp.gate.", "mlp.gate", "gate."])
def test_a_filter_of_the_users_gives_the_routers_genes(own: str) -> None:
    known = space(filters=[own])
    assert min(weights_at(known, ROUTER)) > 0
    assert any(gene.filter == own for gene in known.genes)


@pytest.mark.parametrize("method", ["linear", "nuslerp", "slerp", "sce"])
def test_methods_that_do_not_keep_the_base_at_weight_0_merge_the_routers(method: str) -> None:
    known = space(method)
    assert known.decode(known.uniform()) == SearchSpace(known.genome, 2).decode(known.uniform())


def test_a_parent_is_the_model_with_its_own_routers() -> None:
    known = space()
    for name in ("one", "two"):
        recipe = known.decode(known.parent(ModelReference.parse(name)))
        assert [str(model) for model in recipe.references] == [name]


def test_a_recipe_of_a_search_is_read_back_and_one_with_other_routers_is_refused() -> None:
    known = space(layer_granularity=1)
    genes = known.uniform() | {"one/0-0/weight": 0.7, "two/1-1/weight": 0.2}
    assert encode(known, known.decode(genes), NAMES) == genes
    plain = SearchSpace(known.genome, 2)
    with pytest.raises(ValueError, match=r"weight of one is 0.7 for the tensor model\.layers\.0\.mlp\.gate\.weight"):
        encode(known, plain.decode(genes), NAMES)


def test_mergekit_reads_the_filter_and_keeps_the_same_routers(tmp_path: Path) -> None:
    root = new_family(tmp_path / "models", "Mixtral")
    base = ModelReference.parse("base")
    sources = Sources.open([base, *map(ModelReference.parse, ("one", "two"))], root)
    routers = routers_of(sources[base].shapes, sources.config(base))
    genome = {"models": ["one", "two"], "base_model": "base", "merge_method": "task_arithmetic", "dtype": "float32"}
    recipe = SearchSpace(Genome.model_validate(genome), 2, routers).decode(
        {"one/all/weight": 0.4, "two/all/weight": 0.3}
    )
    written = yaml.safe_load(recipe.to_yaml())
    for source in written["slices"][0]["sources"]:
        source["model"] = str(root / source["model"])
    written["base_model"] = str(root / written["base_model"])
    config = mergekit("config").MergeConfiguration.model_validate(written)
    source = config.slices[0].sources[0]
    value = mergekit("config").evaluate_setting
    read = {name: value(name, source.parameters["weight"], validate=float) for name in (*sources[base].shapes,)}
    gates = [name for name in read if "block_sparse_moe.gate." in name]
    assert [name for name, weight in read.items() if weight == 0.0] == gates
    assert {weight for name, weight in read.items() if name not in gates} == {0.4}
    merged, kept = dict(merge(recipe, sources)), weights_of(root / "base")
    assert_same_bits({name: merged[name] for name in gates}, {name: kept[name] for name in gates})
