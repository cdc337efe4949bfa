"""The space of layer paths: its settings, its edits, and the recipes that paths mean."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmevo.errors import ConfigError, RecipeError
from llmevo.merging.path import LayerPath
from llmevo.search.genome import Genome
from llmevo.search.paths.edits import Edit, edited, edits_of
from llmevo.search.paths.space import MERGE
from llmevo.search.space import SearchSpace
from support.paths import LAYERS, space

BROKEN = [
    ({"deepest": 1}, "deepest", "greater than or equal to 2"),
    ({"deepest": 2.5}, "deepest", "valid integer"),
    ({"first": 0}, "first", "greater than or equal to 1"),
    ({"last": -1}, "last", "greater than or equal to 1"),
    ({"edits": 0}, "edits", "greater than or equal to 1"),
    ({"edits": 17}, "edits", "less than or equal to 16"),
    ({"edits": "few"}, "edits", "valid integer"),
    ({"kinds": []}, "kinds", "at least 1 item"),
    ({"kinds": ["loop"]}, "kinds", "'repeat', 'skip', 'swap', 'temperature' or 'rope'"),
    ({"kinds": ["skip", "skip"]}, "", "kinds: skip is listed twice"),
    ({"longest": 0}, "longest", "greater than or equal to 1"),
    ({"gains": [0, 1]}, "", "gains: give a lower and a higher number over 0"),
    ({"gains": [1.5, 0.5]}, "", "gains: give a lower and a higher number over 0"),
    ({"gains": [0.5]}, "gains", "required"),
    ({"gains": ["low", "high"]}, "gains", "valid number"),
    ({"depth": 30}, "depth", "Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("path", "key", "told"), BROKEN, ids=[told for _, _, told in BROKEN])
def test_settings_that_have_no_meaning_are_refused_by_their_key(path: dict[str, Any], key: str, told: str) -> None:
    genome = {"base_model": "base", "models": ["a", "b"], "merge_method": "task_arithmetic", "path": path}
    with pytest.raises(ValidationError) as caught:
        Genome.model_validate(genome)
    first = caught.value.errors()[0]
    assert ".".join(map(str, first["loc"][:2])) == f"path.{key}".rstrip(".")
    assert told in first["msg"]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ({"first": 10, "last": 10}, "10 first and 10 last layers stay as they are, and the models have 20 layers"),
        ({"first": 4, "last": 4, "deepest": 7}, "genome.path.deepest: 7 is less than the 8 layers"),
    ],
)
def test_settings_that_leave_nothing_to_edit_are_refused(path: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _ = space(**path).paths


@pytest.mark.parametrize(
    ("genome", "told"),
    [
        ({"smooth": True, "layer_granularity": 5}, "smooth has no meaning on some of the layers"),
        ({"tokenizer_source": "union"}, "the models' tokens differ"),
        ({"prepare": ["aim"]}, "genome.prepare: layer paths are of the models as they are"),
    ],
)
def test_a_genome_without_paths_says_why(genome: dict[str, Any], told: str) -> None:
    given = {"base_model": "base", "models": ["a", "b"], "merge_method": "task_arithmetic", **genome}
    with pytest.raises(ConfigError, match=told):
        _ = SearchSpace(Genome.model_validate(given), LAYERS, by_token="tokenizer_source" in genome).paths


REFUSED = [
    ("", "it is empty"),
    ("alpha", "it has no layers; write alpha FIRST-END"),
    ("alpha 0-20 | | beta 3-4", "it is empty; leave out one `|`"),
    ("gamma 0-20", "there is no model 'gamma'"),
    ("alpha 0-21", "alpha has 20 layers, so a range ends at 20, not at 21"),
    ("alpha 0-12 | alpha 12-12 | alpha 12-20", "12-12 has no layer"),
    ("alpha 0-12 | alpha 14-12 | alpha 12-20", "14-12 goes backwards"),
    ("alpha 0-12 | alpha 8-12 gain 0 | alpha 12-20", "gain is 0"),
    ("alpha 0-12 | alpha 8-12 gain -1 | alpha 12-20", "give a number over 0"),
    ("alpha 0-12 | alpha 8-12 gain | alpha 12-20", "gain has no number"),
    ("alpha 0-12 | alpha 8-12 gane 0.5 | alpha 12-20", "'gane' is no gain"),
    ("alpha 0-12 | alpha 8-12 gain 9 | alpha 12-20", "its attention 9 is outside 0.25 to 1.5"),
    ("alpha 0-20 | rope 9", "rope 9 is outside 0.25 to 4"),
    ("alpha 0-18 | alpha 5-20", "it has 33 layers, more than 26"),
    ("alpha 1-20", "its first 2 layers must be 0-2 of one model"),
    ("alpha 0-1 | beta 1-20", "its first 2 layers must be 0-2 of one model"),
    ("alpha 0-4 gain 0.5 | alpha 4-20", "its first 2 layers must be 0-2 of one model, without gains"),
    ("alpha 0-19", "its last 2 layers must be 18-20 of one model"),
    ("alpha 0-19 | beta 19-20", "end with alpha 18-20"),
]


@pytest.mark.parametrize(("text", "told"), REFUSED, ids=[text[:40] or "empty" for text, _ in REFUSED])
def test_a_path_outside_the_bounds_is_refused_in_one_line(text: str, told: str) -> None:
    paths = space().paths
    with pytest.raises(RecipeError) as caught:
        paths.parse(text)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("path: ")


def test_a_path_with_too_many_edits_is_refused() -> None:
    paths, swapped = space().paths, " | ".join(f"beta {i}-{i + 1} | alpha {i + 1}-{i + 2}" for i in range(4, 14, 2))
    path = paths.parse(f"alpha 0-4 | {swapped} | alpha 14-20")
    with pytest.raises(RecipeError, match=r"it has 5 edits .*, more than 4; genome\.path\.edits allows more"):
        paths.check_edits(path)


def test_a_kind_of_edit_that_is_not_allowed_is_refused() -> None:
    paths = space(kinds=["skip"]).paths
    with pytest.raises(RecipeError, match=r"swap 4-6 beta is not among genome.path.kinds \(skip\)"):
        paths.check_edits(paths.parse("alpha 0-4 | beta 4-6 | alpha 6-20"))
    assert {edit.kind for edit in paths.singles(["beta", MERGE])} == {"skip"}


def test_every_single_edit_is_inside_the_bounds_and_is_found_again_in_its_path() -> None:
    paths = space(kinds=["repeat", "skip", "swap", "temperature", "rope"]).paths
    singles = [*paths.singles(["beta", MERGE])]
    assert {edit.kind for edit in singles} == {"repeat", "skip", "swap", "temperature", "rope"}
    assert len({*singles}) == len(singles)
    for edit in singles:
        path = paths.edited("alpha", [edit])
        assert path is not None, edit
        assert paths.edits(path, "alpha") == [edit]
        assert paths.parse(str(path)) == path


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_edits_of_a_path_make_it_again(data: st.DataObject) -> None:
    paths = space().paths
    singles = [*paths.singles(["beta", MERGE])]
    edits = data.draw(st.lists(st.sampled_from(singles), min_size=1, max_size=3))
    path = paths.edited("alpha", edits)
    if path is None:
        return
    found = edits_of("alpha", path)
    again = edited(paths.whole("alpha"), found)
    assert sorted((hop.layer, hop.model, str(hop.gains)) for hop in again.hops) == sorted(
        (hop.layer, hop.model, str(hop.gains)) for hop in path.hops
    )


def test_the_order_of_edits_makes_no_difference() -> None:
    root = LayerPath.parse("alpha 0-20")
    edits = [Edit("repeat", 4, 8, factor=0.5), Edit("swap", 6, 10, "beta"), Edit("skip", 12, 13)]
    assert {str(edited(root, order)) for order in (edits, edits[::-1], [edits[1], edits[2], edits[0]])} == {
        "alpha 0-6 | beta 6-8 | alpha 4-6 gain 0.5 | beta 6-8 gain 0.5 | beta 8-10 | alpha 10-12 | alpha 13-20"
    }


def test_models_whose_names_have_spaces_or_are_called_merge_have_other_names_in_paths() -> None:
    genome = {"models": ["folder/my model", "other/merge"], "merge_method": "linear"}
    paths = SearchSpace(Genome.model_validate(genome), LAYERS).paths
    assert [*paths.models] == ["my_model", "merge-1"]
    assert [str(model) for model in paths.models.values()] == genome["models"]


def test_a_path_over_a_merge_has_its_weights_also_of_several_slices() -> None:
    of = SearchSpace(
        Genome.model_validate(
            {
                "base_model": "base",
                "models": ["alpha", "beta"],
                "merge_method": "task_arithmetic",
                "layer_granularity": 10,
                "dtype": "float32",
            }
        ),
        LAYERS,
    )
    genes = {gene.name: 0.1 + place / 10 for place, gene in enumerate(of.genes)}
    recipe = of.decode(genes, "merge 0-12 | alpha 12-15 gain 0.5 | merge 15-20")
    assert recipe.dtype == "float32"
    found = [(of.merge_method, of.sources[0].layer_range, of.gains and of.gains.mlp) for of in recipe.slices or []]
    assert found == [
        ("task_arithmetic", (0, 10), None),
        ("task_arithmetic", (10, 12), None),
        ("passthrough", (12, 15), 0.5),
        ("task_arithmetic", (15, 20), None),
    ]
    plain = of.decode(genes)
    weights = [[(i.parameters or {}).get("weight") for i in s.sources] for s in plain.slices or []]
    assert [
        [(i.parameters or {}).get("weight") for i in s.sources] for s in recipe.slices or [] if len(s.sources) > 1
    ] == [
        weights[0],
        weights[1],
        weights[1],
    ]
    named = {**of.paths.models, MERGE: plain.model_copy(update={"dtype": None})}
    assert str(LayerPath.of_recipe(recipe, named)) == "merge 0-12 | alpha 12-15 gain 0.5 | merge 15-20"
