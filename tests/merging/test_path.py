"""Layer paths: their text form, their recipes, and the checkpoints that come out."""

import re
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from llmevo.errors import RecipeError
from llmevo.merging.merger import branches_of
from llmevo.merging.path import Hop, LayerPath, Limits, Segment, padded
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.gains import Branches, Gains
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from support.checkpoints import new_checkpoint, quietly, weights_of
from support.families import new_model, randomise
from support.parity import LIMIT, distance, ours, theirs

LIMITS = Limits(layers={"A": 8, "B": 8}, ends="A", deepest=12)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("A 0-8", "A 0-8"),
        (" A 0-2|A 2-4 |\n A 4 – 8 ", "A 0-8"),
        ("A 0-4 | A 2-8", "A 0-4 | A 2-8"),
        ("A 0-2 | B 2-4 | A 4-8", "A 0-2 | B 2-4 | A 4-8"),
        ("A 0-4 attention=0.5 mlp=0.50 | A 4-8 gain 1", "A 0-4 gain 0.5 | A 4-8"),
        ("A 0-4 temperature 0.8 mlp 0.7 | A 4-8", "A 0-4 mlp 0.7 temperature 0.8 | A 4-8"),
        ("A 0-4 | A 2-8 | rope=2.0", "A 0-4 | A 2-8 | rope 2"),
        ("A 0-8 | rope 1", "A 0-8"),
        ("A 0-4 gain 0.70710678 | A 4-6 gain 0.70709 | A 6-8", "A 0-6 gain 0.7071 | A 6-8"),
    ],
)
def test_a_path_has_one_text(text: str, canonical: str) -> None:
    path = LayerPath.parse(text, LIMITS)
    assert str(path) == canonical
    assert LayerPath.parse(canonical) == path


@pytest.mark.parametrize("name", ["lr=1e-5", "steps=2-3"])
def test_a_model_may_have_the_signs_of_a_path_in_its_name(name: str) -> None:
    path = LayerPath.parse(f"{name} 0-4 gain=0.5 | {name} 4-8", Limits(layers={name: 8}))
    assert str(path) == f"{name} 0-4 gain 0.5 | {name} 4-8"
    assert LayerPath.parse(str(path)) == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  ", "path: it is empty"),
        ("A 0-4 || A 4-8", "segment 2 (''): it is empty; leave out one `|`"),
        ("A 0-4 | A", "segment 2 ('A'): it has no layers; write A FIRST-END"),
        ("C 0-4", "there is no model 'C'; known: A, B"),
        ("A 0-x", "layers are '0-x'; write the first one and the one after the last"),
        ("A -1-4", "layers are '-1-4'"),
        ("A 4-4", "4-4 has no layer; the second number is the layer after the last, so write 4-5"),
        ("A 5-2", "5-2 goes backwards"),
        ("A 0-9", "A has 8 layers, so a range ends at 8, not at 9"),
        ("A 0-8 gian 0.5", "'gian' is no gain, did you mean 'gain'?"),
        ("A 0-8 gain", "gain has no number; write gain 0.5"),
        ("A 0-8 gain half", "gain is 'half'; give a number over 0"),
        ("A 0-8 mlp 0", "mlp is 0; give a number over 0, or leave the layers out to skip them"),
        ("A 0-8 gain -0.5", "gain is -0.5; give a number over 0"),
        ("A 0-8 temperature inf", "temperature is inf; give a finite number over 0"),
        ("A 0-8 gain 0.5 mlp 0.7", "mlp is given twice (gain is attention and mlp)"),
        ("A 0-8 | rope 0", "rope is 0; give a number over 0"),
        ("A 0-8 | rope twice", "rope is 'twice'; give a number over 0"),
        ("A 0-4 | rope 2 | A 4-8", "there is no model 'rope'"),
        ("rope 2", "there is no model 'rope'"),
        ("B 0-4 | A 4-8", "it begins with B 0; begin with layer 0 of A"),
        ("A 0-4 | A 4-7", "it ends with A 6; end with the last layer of A, 7"),
        ("A 0-8 | A 2-8", "it has 14 layers, more than 12"),
    ],
)
def test_a_bad_path_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as refused:
        LayerPath.parse(text, LIMITS)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 250


SEGMENTS = st.builds(
    lambda model, start, length, values: Segment(model, start, start + length, Gains(**values)),
    st.sampled_from("AB"),
    st.integers(0, 5),
    st.integers(1, 3),
    st.fixed_dictionaries({key: st.sampled_from([1.0, 0.5, 0.123456, 2.0]) for key in Gains.model_fields}),
)
NAMED = {"A": ModelReference.model_validate("a"), "B": ModelReference.model_validate("b")}


@given(st.lists(SEGMENTS, min_size=1, max_size=6), st.sampled_from([1.0, 2.0, 0.33333]))
def test_equal_paths_are_equal_in_every_form(segments: list[Segment], rope: float) -> None:
    path = LayerPath(tuple(segments), rope)
    assert LayerPath.parse(str(path)) == path == LayerPath.of_hops(path.hops, path.rope)
    assert str(LayerPath.of_hops(path.hops, path.rope)) == str(path)
    assert len(path.hops) == len(path) == sum(each.stop - each.start for each in segments)
    recipe = path.recipe(NAMED)
    assert LayerPath.of_recipe(Recipe.from_yaml(recipe.to_yaml()), NAMED) == path


def test_hops_are_single_layers() -> None:
    assert LayerPath.parse("A 0-2 | B 3-4 mlp 0.5").hops == (Hop("A", 0), Hop("A", 1), Hop("B", 3, Gains(mlp=0.5)))


# --- recipes and checkpoints ------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        new_checkpoint(tmp_path / name, seed, layers=4)
    return tmp_path


def branches(root: Path, name: str = "a") -> Branches:
    sources = Sources(root)
    reference = ModelReference.model_validate(name)
    return Branches(sources[reference].shapes, sources.config(reference))


PLAIN = "A 0-3 | B 1-3 attention 0.5 temperature 0.8 | A 2-4 gain 0.7071"


def test_mergekit_reads_a_path_and_makes_the_same_weights(root: Path) -> None:
    path = LayerPath.parse(PLAIN)
    recipe = path.recipe(NAMED, branches(root), dtype="float32")
    assert recipe.merge_method == "passthrough"
    assert recipe.mergekit_clause == "mergekit reads it too"
    mine = ours(recipe.as_dict(), root)
    assert distance(mine, theirs(recipe.as_dict(), root, root / "out")) <= LIMIT
    assert LayerPath.of_recipe(recipe, NAMED, branches(root)) == path
    other = path.recipe(NAMED, dtype="float32")  # in gains: the same weights bit for bit
    assert other.merge_method == "by_slice"
    assert "mergekit cannot" in other.mergekit_clause
    for name in ("org/mixture#expert=3", "org/name/file.gguf", "package:some/file.gguf"):
        alone = Recipe.model_validate({"merge_method": "passthrough", "models": [{"model": name}]})
        assert alone.mergekit_clause == f"mergekit cannot: it knows no reference such as {name}"
    assert "gains" in other.mergekit_clause
    assert all(torch.equal(tensor, mine[name]) for name, tensor in ours(other.as_dict(), root).items())


def test_a_segment_may_be_a_weight_merge(root: Path) -> None:
    merge = Recipe.from_yaml(
        "{merge_method: slerp, base_model: a, models: [{model: b}],"
        " parameters: {t: [{filter: mlp, value: 0.3}, {value: 0.6}]}}"
    )
    named = {**NAMED, "M": merge}
    path = LayerPath.parse("A 0-2 | M 1-3 gain 0.5 | A 2-4")
    recipe = path.recipe(named, branches(root))
    assert LayerPath.of_recipe(Recipe.from_yaml(recipe.to_yaml()), named) == path
    made, whole = ours(recipe.as_dict(), root), ours(merge.as_dict(), root)
    assert torch.equal(made["model.layers.3.mlp.up_proj.weight"], whole["model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(made["model.layers.3.mlp.down_proj.weight"], 0.5 * whole["model.layers.2.mlp.down_proj.weight"])
    with pytest.raises(RecipeError, match="no name stands for"):
        LayerPath.of_recipe(recipe, NAMED)


@pytest.mark.parametrize(
    ("merge", "reason"),
    [
        ("{merge_method: slerp, base_model: a, models: [{model: b}], parameters: {t: [0, 1]}}", "t is a gradient"),
        (
            "{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [1, 5]}]}]}",
            "slices in another",
        ),
        ("{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [0, 2]}]}]}", "M has 2 layers, so"),
        ("{merge_method: linear, models: [{model: a, parameters: {weight: 1}}], dtype: float32}", "has a dtype"),
    ],
)
def test_a_merge_without_a_meaning_on_some_layers_is_refused(merge: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        LayerPath.parse("M 0-4").recipe({"M": Recipe.from_yaml(merge)})


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        ("[{filter: k_proj, value: 0.5}]", "k_proj.weight is scaled by 0.5, which is no gain"),
        ("0.5", "is scaled by 0.5, which is no gain"),
        ("[{filter: lm_head, value: 0.5}]", "lm_head.weight is scaled by 0.5, which is no gain"),
        ("[{filter: down_proj, value: -1}]", "down_proj.weight is scaled by -1, which is no gain"),
    ],
)
def test_a_scale_that_is_no_gain_is_no_path(scale: str, reason: str, root: Path) -> None:
    slices = "[{sources: [{model: a, layer_range: [0, 4]}]}]"
    text = f"{{merge_method: passthrough, slices: {slices}, parameters: {{scale: {scale}}}}}"
    with pytest.raises(RecipeError, match=reason):
        LayerPath.of_recipe(Recipe.from_yaml(text), NAMED, branches(root))


def test_gains_need_a_recipe_that_mergekit_refuses() -> None:
    text = "{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [0, 4]}], gains: {mlp: 0.5}}]}"
    with pytest.raises(RecipeError, match="a slice has gains: write `merge_method: by_slice`"):
        Recipe.from_yaml(text)
    with pytest.raises(RecipeError, match=r"slices.0.gains.attenton: llmevo does not know this key, did you mean"):
        Recipe.from_yaml(text.replace("mlp", "attenton"))


SLICE = "{sources: [{model: a, layer_range: [0, 4]}], merge_method: passthrough}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("passthrough}", "passthrough, gains: 0.5}", "slices.0.gains: '0.5' is no gains; write gains: {attention"),
        ("passthrough}", "passthrough, gains: [0.5]}", "slices.0.gains: '[0.5]' is no gains"),
        ("passthrough}", "passthrough, gains: {mlp: half}}", "gains.mlp: half is no factor; give a number, 0 or more"),
        ("passthrough}", "passthrough, gains: {attention: -1}}", "gains.attention: -1 is no factor"),
        ("passthrough}", "passthrough, gains: {mlp: .inf}}", "gains.mlp: inf is no factor"),
        ("passthrough}", "passthrough, gains: {mlp: .nan}}", "gains.mlp: nan is no factor"),
        ("passthrough}", "passthrough, gains: {mlp: [0, 1]}}", "gains.mlp: [0, 1] is no factor"),
        ("passthrough}", "passthrough, gains: {mlp: true}}", "gains.mlp: True is no factor"),
        (
            "passthrough}",
            "passthrough, gains: {temperature: 0}}",
            "gains.temperature: 0 is no factor; give a number, over",
        ),
        ("passthrough}", "passthrough, gains: {gain: 0.5}}", "gains.gain: llmevo does not know this key"),
        ("passthrough}", "passthrough}], gains: [{mlp: 0.5}", "gains: llmevo does not know this key"),
        ("0, 4]", "0, 4], gains: {mlp: 0.5}", "slices.0.sources.0.gains: llmevo does not know this key"),
        ("passthrough}", "passthrough}], rope: [2.0", "rope: [2.0] is no factor; give a number, over 0"),
        ("passthrough}]", "passthrough}], rope: 0", "rope: 0 is no factor"),
        ("passthrough}]", "passthrough}], rope: -2", "rope: -2 is no factor"),
        ("passthrough}]", "passthrough}], rope: big", "rope: big is no factor"),
        ("passthrough}]", "passthrough}], rope: true", "rope: True is no factor"),
        ("passthrough}]", "passthrough}], ropes: 2", "ropes: llmevo does not know this key, did you mean 'rope'"),
        ("[0, 4]", "[4, 0]", "slices.0: layer_range [4, 0] of a has no layer"),
        ("[0, 4]", "[0]", "slices.0.sources.0.layer_range: give two whole numbers"),
        ("[0, 4]", "0-4", "slices.0.sources.0.layer_range: give two whole numbers"),
        (", layer_range: [0, 4]", "", "slices.0.sources.0.layer_range: this key is missing"),
        ("{model: a, layer_range: [0, 4]}", "", "slices.0: a slice needs at least one source"),
        (", merge_method: passthrough", "", "give `slices`, and each of them a `merge_method`"),
        ("passthrough}", "pass}", "merge_method 'pass' is unknown"),
        ("4]}", "4]}, {model: b, layer_range: [0, 4]}", "passthrough merges exactly 1 model, not 2; to stack layers"),
        (f"slices: [{SLICE}]", "models: [{model: a}]", "give `slices`, and each of them a `merge_method`"),
        (f"slices: [{SLICE}]", "slices: []", "give either `models` or `slices`"),
    ],
)
def test_a_bad_recipe_of_a_path_is_refused_in_one_line(old: str, new: str, message: str) -> None:
    text = f"{{merge_method: by_slice, slices: [{SLICE}]}}"
    assert Recipe.from_yaml(text)
    with pytest.raises(RecipeError, match=re.escape(message)) as refused:
        Recipe.from_yaml(text.replace(old, new))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("span", ["[-1, 4]", "[0, 5]", "[7, 9]"])
def test_layers_that_a_model_does_not_have_are_refused(span: str, root: Path) -> None:
    recipe = Recipe.from_yaml(f"{{merge_method: by_slice, slices: [{SLICE.replace('[0, 4]', span)}]}}")
    with pytest.raises(RecipeError, match=re.escape(f"layer_range {span} of a is outside its 4 layers")):
        write_model(recipe, Sources.open(recipe.references, root), root / "out")
    assert not (root / "out").exists()


def loaded(folder: Path) -> Any:
    return quietly(
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    ).eval()


TOKENS = torch.arange(5, 15).unsqueeze(0)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return loaded(folder)(input_ids=TOKENS).logits


def written(path: str, root: Path, out: str, depth: int = 0) -> Path:
    recipe = LayerPath.parse(path).recipe(NAMED)
    recipe = padded(recipe, depth) if depth else recipe
    write_model(recipe, Sources.open(recipe.references, root), root / out)
    return root / out


def test_a_hop_that_is_skipped_at_constant_depth_changes_nothing(root: Path) -> None:
    short, long = written(PLAIN, root, "short"), written(PLAIN, root, "long", 9)
    assert loaded(long).config.num_hidden_layers == 9
    assert torch.equal(logits(short), logits(long))
    assert not weights_of(long)["model.layers.8.mlp.down_proj.weight"].any()
    with pytest.raises(RecipeError, match="has 7 layers in slices; it cannot be filled up to 6"):
        padded(LayerPath.parse(PLAIN).recipe(NAMED), 6)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3 (text)", "Qwen3-Next"])
@torch.no_grad()
def test_generation_with_a_cache_is_that_without(name: str, tmp_path: Path) -> None:
    for place, model in enumerate("ab"):
        made = new_model(name, num_hidden_layers=4)
        randomise(made, 0, place)
        quietly(lambda made=made, model=model: made.save_pretrained(tmp_path / model))
    text = "A 0-4 | B 0-4 gain 0.5" if name == "Qwen3-Next" else "A 0-3 | A 1-3 gain 0.5 | B 1-4"
    model = loaded(written(text, tmp_path, "out"))
    whole = model(input_ids=TOKENS, use_cache=False).logits
    # Named by the version of transformers.
    argument = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    cache, pieces = None, []
    for token in TOKENS.unbind(1):
        done = model(input_ids=token.unsqueeze(1), **{argument: cache}, use_cache=True)
        cache = done.past_key_values
        pieces.append(done.logits)
    assert torch.allclose(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


def test_recipes_without_gains_need_no_known_architecture(root: Path) -> None:
    assert branches_of(LayerPath.parse("A 0-4").recipe(NAMED), Sources(root)) is None
