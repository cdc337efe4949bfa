"""The way back from a recipe to genes: what decodes to it, or why nothing does."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo.errors import ConfigError
from llmevo.merging.recipe import Recipe
from llmevo.search.encode import encode, read_start
from llmevo.search.genome import Genome
from llmevo.search.space import SearchSpace
from llmevo.search.trial import Suggestion
from support.workspace import Workspace

LAYERS = 4
TENSORS = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")),
    "model.norm.weight",
]


def space(**genome: Any) -> SearchSpace:
    given = {
        "base_model": "base",
        "models": ["a", "b"],
        "merge_method": "task_arithmetic",
        "dtype": "float32",
        **genome,
    }
    return SearchSpace(Genome.model_validate(given), LAYERS)


SPACES = {
    "whole": space(),
    "slices": space(layer_granularity=2),
    "filters": space(merge_method="ties", layer_granularity=2, filters=["self_attn", "mlp"]),
    "smooth": space(merge_method="dare_ties", layer_granularity=1, smooth=True),
    "negative": space(allow_negative_weights=True),
    "della": space(merge_method="della"),
    "linear": space(merge_method="linear", base_model=None, layer_granularity=4),
    "slerp": space(merge_method="slerp", models=["a"], layer_granularity=2),
    "methods": space(merge_method=["ties", "linear"], layer_granularity=2, method_per_slice=True),
}


@pytest.mark.parametrize("kind", SPACES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_was_decoded_is_encoded_again(kind: str, data: st.DataObject) -> None:
    of = SPACES[kind]
    point = data.draw(st.lists(st.floats(0, 1), min_size=len(of.genes), max_size=len(of.genes)))
    genes = of.clamp({g.name: g.from_unit(x) for g, x in zip(of.genes, point, strict=True)})
    recipe = of.decode(genes)
    assert of.decode(encode(of, recipe, TENSORS)) == recipe


def mergekit(text: str, of: SearchSpace) -> dict[str, float]:
    return encode(of, Recipe.from_yaml(text), TENSORS)


WHOLE = """
merge_method: {method}
base_model: base
models: [{{model: a, parameters: {{weight: {weight}}}}}, {{model: b, parameters: {{weight: 0.25}}}}]
"""


def test_a_recipe_over_whole_models_has_the_same_genes_in_every_slice() -> None:
    genes = mergekit(WHOLE.format(method="task_arithmetic", weight=0.5), SPACES["slices"])
    assert genes == {"a/0-1/weight": 0.5, "b/0-1/weight": 0.25, "a/2-3/weight": 0.5, "b/2-3/weight": 0.25}


def test_a_model_that_is_left_out_has_no_weight() -> None:
    text = "{merge_method: task_arithmetic, base_model: base, models: [{model: b, parameters: {weight: 0.7}}]}"
    assert mergekit(text, SPACES["whole"]) == {"a/all/weight": 0.0, "b/all/weight": 0.7}


def test_a_gradient_fits_where_its_knots_are_genes_and_nowhere_else() -> None:
    text = WHOLE.format(method="dare_ties", weight="[0.0, 0.3, 0.6, 0.9]").replace("}}]", ", density: 1.0}}]")
    text = text.replace("weight: 0.25}", "weight: 0.25, density: 0.5}") + "parameters: {normalize: true}\n"
    genes = mergekit(text, SPACES["smooth"])
    assert [genes[f"a/{i}-{i}/weight"] for i in range(4)] == [0.0, 0.3, 0.6, 0.9]
    with pytest.raises(ValueError, match=r"weight of a is .* for the tensor model\.layers"):
        mergekit(WHOLE.format(method="task_arithmetic", weight="[0.0, 0.3, 0.6, 0.9]"), SPACES["slices"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (WHOLE.format(method="linear", weight=0.5), "linear"),
        (
            WHOLE.format(method="task_arithmetic", weight=3),
            r"a/all/weight is 3, its bounds are 0 to 1\.5; genome\.bounds",
        ),
        (WHOLE.format(method="task_arithmetic", weight=0.5).replace("a,", "c,"), "no model c.*base, a, b"),
        (
            WHOLE.format(method="task_arithmetic", weight=0.5) + "parameters: {normalize: true}",
            "normalize is 1.*it is 0",
        ),
        (
            WHOLE.format(method="task_arithmetic", weight="[{filter: mlp, value: 1}, {value: 0}]"),
            "weight of a is 0 for the tensor .* with genes it is 1|weight of a is 1 for the tensor .* it is 0",
        ),
    ],
    ids=["another method", "out of bounds", "another model", "normalized", "filters"],
)
def test_what_no_genes_mean_is_refused_by_the_reason(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        mergekit(text, SPACES["whole"])


def test_other_layers_are_no_point_of_a_search() -> None:
    parts = [
        {
            "sources": [
                {"model": m, "layer_range": r, **w} for m, w in (("a", {"parameters": {"weight": 1.0}}), ("base", {}))
            ]
        }
        for r in ([2, 4], [0, 2])
    ]
    swapped = yaml.safe_dump({"merge_method": "task_arithmetic", "base_model": "base", "slices": parts})
    with pytest.raises(ValueError, match="another layer"):
        mergekit(swapped, SPACES["whole"])
    short = yaml.safe_dump({"merge_method": "task_arithmetic", "base_model": "base", "slices": parts[:1]})
    with pytest.raises(ValueError, match="2 layers, the models have 4"):
        mergekit(short, SPACES["whole"])


def test_genes_by_name_are_checked_too(tmp_path: Path) -> None:
    of = SPACES["whole"]
    genes = {"a/all/weight": 0.5, "b/all/weight": 0.25}
    assert read_start(of, genes, tmp_path, TENSORS) == Suggestion(genes, "user", "genes")
    for wrong, says in (
        ({"a/all/weight": 0.5}, "'b/all/weight' is missing"),
        ({**genes, "b/all/weigth": 0.1}, "did you mean 'b/all/weight'"),
        ({**genes, "a/all/weight": 1.6}, "bounds"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_start(of, wrong, tmp_path, TENSORS)


def test_the_method_of_a_start_row_is_given_by_name_or_place(tmp_path: Path) -> None:
    over = space(merge_method=["task_arithmetic", "ties"])
    for method in ("ties", 1, "1"):
        entry = {gene.name: method if gene.choices else 0.5 for gene in over.genes}
        found = read_start(over, entry, tmp_path, TENSORS)
        assert over.decode(found.genes).merge_method == "ties"


def test_a_search_starts_from_the_users_recipes(workspace: Workspace) -> None:
    mine = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "one", "parameters": {"weight": 0.6}}],
    }
    Path("mine.yml").write_text(yaml.safe_dump(mine))
    genes = {f"{model}/{place}/weight": 0.2 for model in ("one", "two") for place in ("0-0", "1-1")}
    search = {"optimizer": "random", "budget": 6, "start_from": ["mine.yml", genes]}
    config = workspace.config(search=search, heldout=None, engine={"self_check": False})
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    state = workspace.state("run")
    rows = [(c.origin, c.note, c.generation) for c in state.candidates.values()]
    assert rows[4:6] == [("user", "mine", 0), ("user", "genes", 0)]
    assert state.candidates[4].genes == {**dict.fromkeys(genes, 0.0), "one/0-0/weight": 0.6, "one/1-1/weight": 0.6}
    assert "(user, mine)" in printed
    # The run is what it was also when the file is gone.
    Path("mine.yml").unlink()
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0
    assert workspace.llmevo("run", config, "--out", "again")[0] == 2


TIES = "merge_method: ties\nmodels: [{model: one, parameters: {weight: 1.0}}]\nbase_model: base\n"


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (TIES, "mine is no point of this search space"),
        (TIES.replace("ties", "tiess"), "mine.yml: .*'tiess' is unknown, did you mean 'ties'"),
        (TIES.replace("{weight: 1.0}", "{}"), r"mine.yml: .*models\.0 \(one\): ties needs 'weight'"),
        (None, "mine.yml: cannot be read"),
    ],
)
def test_a_recipe_that_cannot_be_started_from_is_a_mistake_of_the_config(
    workspace: Workspace, recipe: str | None, says: str
) -> None:
    if recipe:
        Path("mine.yml").write_text(recipe)
    status, printed = workspace.llmevo("run", workspace.config(search={"start_from": ["mine.yml"]}), "--out", "run")
    assert status == 2
    assert "search.start_from" in printed
    assert re.search(says, printed)
    assert not Path("run").exists()
