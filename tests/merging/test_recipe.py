"""mergekit's YAML as a value: what it means for each tensor, and what is said when it means nothing."""

import re
from typing import Any

import pytest
import yaml

from llmevo.errors import RecipeError
from llmevo.merging.methods.registry import METHODS
from llmevo.merging.plan import plan
from llmevo.merging.recipe import Recipe
from llmevo.models.references import ModelReference
from support.checkpoints import mergekit
from support.recipes import parameters_of

EVERYTHING = """
merge_method: ties
base_model: org/base@v1
slices:
  - sources:
      - model: org/one
        layer_range: [0, 2]
        parameters:
          weight: [0.1, 0.9]
          density: 0.5
      - model: org/two+me/lora@v2
        layer_range: [0, 2]
        parameters:
          weight:
            - filter: self_attn
              value: [0.2, 0.4]
            - value: 0.3
      - model: org/base@v1
        layer_range: [0, 2]
    parameters:
      density: 0.7
  - sources:
      - model: org/one
        layer_range: [2, 4]
        parameters: {weight: 1}
      - model: org/base@v1
        layer_range: [2, 4]
    base_model: org/base@v1
parameters:
  normalize: true
  lambda: 0.9
  weight: 0.25
tokenizer_source: base
dtype: bfloat16
out_dtype: float32
"""

MODELS = """
merge_method: linear
models:
  - model: org/one
    parameters: {weight: 0.3}
  - model: org/two
    parameters:
      weight:
        filter: mlp
        value: 0.8
parameters: {weight: 0.5, normalize: false, int8_mask: true}
"""

SLERP = """
merge_method: slerp
base_model: org/one
slices:
  - sources:
      - {model: org/one, layer_range: [0, 4]}
      - {model: org/two, layer_range: [0, 4]}
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
dtype: float32
"""

LLM_EVO_MERGE = """
base_model: meta-llama/Llama-3.1-8B
dtype: bfloat16
merge_method: task_arithmetic
allow_negative_weights: true
parameters:
  int8_mask: 1.0
  normalize: 1.0
slices:
- sources:
  - layer_range: [0, 2]
    model: NCSOFT/Llama-VARCO-8B-Instruct
    parameters:
      weight: 1
  - layer_range: [0, 2]
    model: akjindal53244/Llama-3.1-Storm-8B
    parameters:
      weight: 0.3475802891062396
  - layer_range: [0, 2]
    model: meta-llama/Llama-3.1-8B

- sources:
  - layer_range: [2, 4]
    model: NCSOFT/Llama-VARCO-8B-Instruct
    parameters:
      weight: 0.8971381657317269
  - layer_range: [2, 4]
    model: akjindal53244/Llama-3.1-Storm-8B
    parameters:
      weight: 0.45369921781118544
  - layer_range: [2, 4]
    model: meta-llama/Llama-3.1-8B
"""
"""The beginning of the recipe in LLM-Evo-Merge's README."""

NAMED = {"ties": EVERYTHING, "linear": MODELS, "slerp": SLERP, "llm-evo-merge": LLM_EVO_MERGE}
RECIPES = [pytest.param(text, id=name) for name, text in NAMED.items()]


REGMEAN = "{steps: [regmean], text: t.json, tasks: "
TSV = "merge_method: task_arithmetic\nbase_model: c/d\nmodels: [{model: a/b, parameters: {weight: 1}}]\nprepare: [tsv]"


def of(parameters: dict[str, Any], /, method: str = "linear", **keys: Any) -> Recipe:
    return Recipe.model_validate(
        {"merge_method": method, "models": [{"model": "org/one", "parameters": parameters}], **keys}
    )


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text, "my.yml")
    message = str(caught.value)
    assert message.startswith("my.yml")
    return message


@pytest.mark.parametrize("text", RECIPES)
def test_a_recipe_that_is_written_and_read_again_is_the_same(text: str) -> None:
    recipe = Recipe.from_yaml(text)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.model_validate(recipe.as_dict()) == recipe


@pytest.mark.parametrize("text", RECIPES)
def test_what_is_written_means_the_same_to_mergekit(text: str) -> None:
    config = mergekit("config").MergeConfiguration
    ours, theirs = (config.model_validate(yaml.safe_load(t)) for t in (Recipe.from_yaml(text).to_yaml(), text))
    assert ours == theirs


def test_references_are_written_as_the_user_wrote_them() -> None:
    written = yaml.safe_load(Recipe.from_yaml(EVERYTHING).to_yaml())
    assert written["base_model"] == "org/base@v1"
    assert written["slices"][0]["sources"][1]["model"] == "org/two+me/lora@v2"
    assert written["slices"][0]["sources"][1]["layer_range"] == [0, 2]


def test_a_parameter_of_a_source_goes_before_the_slices_and_that_before_the_recipes() -> None:
    values = parameters_of(Recipe.from_yaml(EVERYTHING))
    # The base is where the merge starts from: its values are never looked at.
    assert values["density"] == [0.5, 0.7, 0.0]
    assert values["weight"] == [0.1, 0.3, 0.0]
    assert values["lambda"] == 0.9
    assert values["normalize"] == 1.0
    assert parameters_of(Recipe.from_yaml(EVERYTHING), place=1)["density"] == [1.0, 0.0]


def test_a_source_whose_filter_does_not_hold_falls_back_to_the_recipe() -> None:
    recipe = Recipe.from_yaml(MODELS)
    assert parameters_of(recipe, "model.layers.0.mlp.up_proj.weight")["weight"] == [0.3, 0.8]
    assert parameters_of(recipe, "model.layers.0.self_attn.q_proj.weight")["weight"] == [0.3, 0.5]


def test_the_first_filter_that_holds_decides() -> None:
    recipe = of({"weight": [{"filter": "q_proj", "value": 1}, {"filter": "self_attn", "value": 2}, {"value": 3}]})
    for tensor, weight in (("self_attn.q_proj", 1), ("self_attn.k_proj", 2), ("mlp.up_proj", 3)):
        assert parameters_of(recipe, f"model.layers.0.{tensor}.weight")["weight"] == [weight]
    assert parameters_of(of({"weight": [{"filter": "*", "value": 4}]}))["weight"] == [4]


@pytest.mark.parametrize(("depth", "t"), [(0.0, 0.0), (0.125, 0.25), (0.25, 0.5), (0.5, 0.3), (0.9, 0.88), (1.0, 1.0)])
def test_a_gradient_is_interpolated_over_the_depth(depth: float, t: float) -> None:
    attention = parameters_of(Recipe.from_yaml(SLERP), "model.layers.0.self_attn.q_proj.weight", depth)
    assert attention["t"] == pytest.approx(t)
    assert parameters_of(Recipe.from_yaml(SLERP), "model.norm.weight", depth)["t"] == 0.5


@pytest.mark.parametrize("text", [EVERYTHING, SLERP])
@pytest.mark.parametrize("tensor", ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("depth", [0.0, 1 / 3, 0.5, 1.0])
def test_every_value_equals_mergekits(text: str, tensor: str, depth: float) -> None:
    recipe, config = Recipe.from_yaml(text), mergekit("config")
    theirs = config.MergeConfiguration.model_validate(yaml.safe_load(text))
    spec = mergekit("merge_methods.registry").get(recipe.merge_method).spec
    reader = config.ConfigReader(config=theirs, t=depth, slice_out=theirs.slices[0])
    shared, each = mergekit("parameter_resolver").resolve_parameters(
        spec,
        tensor_name=tensor,
        inputs={source.model: tensor for source in theirs.slices[0].sources},
        sources=reader.parameter_sources,
        base_model=theirs.base_model,
        t=depth,
    )
    ours = parameters_of(recipe, tensor, depth)
    method = recipe.method_of(recipe.output_slices(4)[0])
    for name in shared.keys() & method.shared.keys():
        assert ours[name] == pytest.approx(float(shared[name])), name
    for name in method.each:
        mine = [v for v, s in zip(ours[name], recipe.output_slices(4)[0].sources, strict=True) if "base" not in str(s)]
        assert mine == pytest.approx([values[name] for values in each.values() if values]), name


@pytest.mark.parametrize(
    ("weight", "excluded"),
    [(0, True), ([0, 0], True), ([1.0, 0.0], False), ([{"filter": "bias", "value": 0}, {"value": 0.5}], True)],
)
def test_a_model_is_left_out_of_a_tensor_only_where_its_weight_is_0_in_every_layer(weight: Any, excluded: bool) -> None:
    recipe = of({"weight": weight}, "task_arithmetic", base_model="org/base")
    assert recipe.excludes(ModelReference.parse("org/one"), "model.layers.0.self_attn.q_proj.bias") is excluded


@pytest.mark.parametrize(("name", "place"), [("embed_out.weight", 1), ("gpt_neox.embed_in.weight", 0)])
def test_a_head_is_that_of_the_last_slice_and_embeddings_those_of_the_first(name: str, place: int) -> None:
    source = {"sources": [{"model": "one", "layer_range": [0, 1]}]}
    recipe = Recipe.model_validate({"merge_method": "passthrough", "slices": [source, source]})
    outside = next(step for step in plan(recipe, [name, "gpt_neox.layers.0.mlp.weight"], 1) if step.layer is None)
    assert outside.of is (recipe.slices or [])[place]


def test_a_filter_on_a_source_sees_the_name_the_tensor_has_in_that_source() -> None:
    recipe = of({"weight": [{"filter": "layers.3.", "value": 1}, {"value": 0}]})
    (whole,) = recipe.output_slices(4)
    name, origin = "model.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"
    assert recipe.values(whole, name, 0.0, [origin])[0]["weight"] == [1]
    assert recipe.values(whole, name, 0.0, [name])[0]["weight"] == [0]


def test_a_parameter_that_nobody_gives_has_the_methods_default() -> None:
    values = parameters_of(of({"weight": 1}, "dare_ties", base_model="org/base"))
    expected = {"weight": [1, 0], "density": [1, 0], "normalize": 0, "rescale": 1, "lambda": 1}
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize("parameters", [{}, {"weight": [{"filter": "mlp", "value": 1}]}, {"weight": []}])
def test_a_required_parameter_that_is_missing_is_named_with_its_tensor(parameters: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"the parameter 'weight' is missing for the tensor model\.norm\.weight"):
        parameters_of(of(parameters))


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("merge_method: linear\nmodel: [{model: a/b}]", "model", "models"),
        ("merge_method: linear\nmodels: [{model: a/b, parametrs: {weight: 1}}]", "models.0.parametrs", "parameters"),
        (
            "merge_method: linear\nslices: [{sources: [{model: a/b, layer_range: [0, 1], layers_range: 2}]}]",
            "slices.0.sources.0.layers_range",
            "layer_range",
        ),
        (
            "merge_method: linear\nslices: [{source: 1, sources: [{model: a/b, layer_range: [0, 1]}]}]",
            "slices.0.source",
            "sources",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_that_may_stand_there(text: str, place: str, hint: str) -> None:
    assert f"my.yml: {place}: llmevo does not know this key, did you mean {hint!r}?" in refusal(text)


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    assert "merge_method 'task_aritmetic' is unknown, did you mean 'task_arithmetic'?" in refusal(
        "merge_method: task_aritmetic\nmodels: [{model: a/b}]"
    )
    assert f"known: {', '.join(METHODS)}" in refusal("merge_method: frankenstein\nmodels: [{model: a/b}]")


@pytest.mark.parametrize(
    "text",
    [
        "models: [{model: a/b, parameters: {wieght: 1}}]",
        "models: [{model: a/b}]\nparameters: {wieght: 1}",
        "slices: [{sources: [{model: a/b, layer_range: [0, 1], parameters: {wieght: 1}}]}]",
        "slices: [{sources: [{model: a/b, layer_range: [0, 1]}], parameters: {wieght: 1}}]",
    ],
)
def test_an_unknown_parameter_is_named_with_the_nearest_wherever_it_stands(text: str) -> None:
    message = refusal(f"merge_method: ties\nbase_model: c/d\n{text}")
    assert "ties has no parameter 'wieght', did you mean 'weight'?" in message


def test_an_unknown_dtype_is_named_with_the_nearest() -> None:
    message = refusal("merge_method: linear\nmodels: [{model: a/b}]\ndtype: bfloat")
    assert "dtype 'bfloat' is unknown, did you mean 'bfloat16'?" in message


@pytest.mark.parametrize("value", ["abc", "[1, x]", "{filter: mlp}", "null", "[{filer: mlp, value: 1}]"])
def test_a_value_that_is_no_setting_is_refused_with_what_may_stand_there(value: str) -> None:
    message = refusal(f"merge_method: linear\nmodels: [{{model: a/b, parameters: {{weight: {value}}}}}]")
    assert "my.yml: models.0.parameters.weight: give a number, a list of numbers" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("merge_method: [", "is not YAML"),
        ("", "a recipe has keys, `merge_method` and `models` or `slices` among them"),
        ("- merge_method: linear", "a recipe has keys"),
        ("genome: {models: [a/b]}", "genome: this is the config of a search, not a recipe; start it with `llmevo run`"),
        ("models: [{model: a/b}]", "merge_method: this key is missing"),
        ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]", "models.0.model: this key is missing"),
        (
            "merge_method: linear\nmodels: [{model: a/b}]\n---\nmerge_method: ties",
            "several documents, separated by ---",
        ),
        ("merge_method: linear", "give either `models` or `slices`"),
        (
            "merge_method: linear\nmodels: [{model: a/b}]\nslices: [{sources: [{model: a/b, layer_range: [0, 1]}]}]",
            "give either `models` or `slices`, not both",
        ),
        ("merge_method: ties\nmodels: [{model: a/b}]", "merge_method 'ties' needs a base_model"),
        (
            "merge_method: ties\nslices: [{sources: [{model: a/b, layer_range: [0, 1]}]}]",
            "merge_method 'ties' needs a base_model",
        ),
        (
            "merge_method: slerp\nmodels: [{model: a/b}, {model: c/d}]\nparameters: {t: 0.5}",
            "merge_method 'slerp' needs a base_model",
        ),
        (
            "merge_method: slerp\nbase_model: a/b\nmodels: [{model: c/d}, {model: e/f}]\nparameters: {t: 0.5}",
            "slerp merges two models, the base and one other, not 2 others",
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a/b, layer_range: [0, 2]}, "
            "{model: c/d, layer_range: [0, 3]}]}]",
            "all sources of a slice need the same number of layers in their layer_range; got [2, 3]",
        ),
        ("merge_method: linear\nslices: [{sources: []}]", "a slice needs at least one source"),
        (
            "merge_method: linear\nslices: [{sources: [{model: a/b, layer_range: [2, 2]}]}]",
            "slices.0: layer_range [2, 2] of a/b has no layer",
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a/b, layer_range: [2]}]}]",
            "slices.0.sources.0.layer_range: give two whole numbers",
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a/b, layer_range: 0-4}]}]",
            "slices.0.sources.0.layer_range: give two whole numbers",
        ),
        (
            "merge_method: linear\nslices: [{residual_weight: 0.5, sources: [{model: a/b, layer_range: [0, 1]}]}]",
            "slices.0.residual_weight: mergekit reads this key and does nothing with it; remove it",
        ),
        (
            "merge_method: ties\nbase_model: c/d\nslices: [{sources: [{model: a/b, layer_range: [0, 1]}]}]",
            "the base_model c/d is not among the slice's sources; list it there",
        ),
        (
            "merge_method: linear\nmodels: [{model: a/b, parameters: {weight: 1}}, {model: a/b}]",
            "a/b is listed twice; list every model once",
        ),
        (
            "merge_method: passthrough\nmodels: [{model: a/b}, {model: c/d}]",
            "passthrough merges exactly 1 model, not 2; to stack layers, give every range a slice of its own",
        ),
        (
            "merge_method: nuslerp\nmodels: [{model: a/b}, {model: c/d}, {model: e/f}]\nparameters: {weight: 1}",
            "nuslerp merges exactly 2 models, not 3",
        ),
        (
            "merge_method: model_stock\nbase_model: c/d\nmodels: [{model: a/b}, {model: c/d}]",
            "model_stock merges at least 2 models besides the base_model, not 1",
        ),
        (
            "merge_method: linear\nmodels: [{model: a/b, parameters: {weight: 1, normalize: false}}]",
            "linear: 'normalize' holds for the whole merge, not for one model",
        ),
        (
            "merge_method: linear\nmodels: [{model: a/b}]\nparameters: {normalize: 0.5}",
            "linear: normalize is either true or false, not 0.5",
        ),
        (
            "merge_method: linear\nmodels: [{model: a/b, parameters: {weight: .nan}}]",
            "models.0.parameters.weight: give a number",
        ),
        (
            "merge_method: della\nbase_model: c/d\nmodels: [{model: a/b, parameters: {weight: 1, density: 0.9}}]",
            "a/b: density 0.9 with epsilon 0.15: della needs density - epsilon over 0 and density + epsilon under 1; "
            "give an epsilon under 0.1",
        ),
        ("merge_method: linear\nmodels: [a/b]", "models.0: 'a/b' cannot stand here; write `- model: base`"),
        (
            "merge_method: linear\nmodels: [{model: a/b, parameters: {weight: 1}}, {model: c/d}]",
            "models.1 (c/d): linear needs 'weight'; add `parameters: {weight: 0.5}`",
        ),
        (
            "merge_method: ties\nbase_model: a/b\nslices: [{sources: [{model: a/b, layer_range: [0, 1]}, "
            "{model: c/d, layer_range: [0, 1]}]}]",
            "slices.0.sources.1 (c/d): ties needs 'weight'; add `parameters: {weight: 0.5}`",
        ),
        (
            "merge_method: slerp\nbase_model: a/b\nmodels: [{model: a/b}, {model: c/d}]",
            "slerp needs 't'; add `parameters: {t: 0.5}`",
        ),
        ("merge_method: linear\nmodels: [{model: a/b}]\ndtype: 3", "dtype: 3 is no text"),
        (TSV.replace("[tsv]", "[]"), "prepare.steps: [] cannot stand here; write `prepare: [tsv]`"),
        (f"{TSV}\nparameters: {{prepare: 1.7}}", "task_arithmetic: prepare is 1.7; give a number from 0 to 1"),
        (TSV.replace("1}", "1, prepare: 1}"), "task_arithmetic: 'prepare' holds for the whole merge"),
        (TSV.replace("[tsv]", f"{REGMEAN}{{a: [t]}}}}"), "prepare.tasks: a is none of the merged models"),
        (TSV.replace("[tsv]", f"{REGMEAN}{{a/b: []}}}}"), "tasks: the list of a/b is empty; name its tasks"),
        (
            "merge_method: ties\nbase_model: c/d\nmodels: [{model: a/b, parameters: {weight: 1, density: [1, -0.1]}}]",
            "ties: density is -0.1; give a number from 0 to 1",
        ),
        (
            "merge_method: ties\nbase_model: c/d\nmodels: [{model: a/b, parameters: {weight: 1}}]\n"
            "parameters: {density: [{filter: mlp, value: 30}, {value: 1}]}",
            "ties: density is 30; give a number from 0 to 1",
        ),
        ("merge_method: linear\nmodels: [{model: a/b}]\nmodules: {default: {}}", "`slices` or `modules`"),
        (
            "merge_method: linear\nmodules: {text: {models: []}, vision: {models: []}}",
            "modules: llmevo merges language models, which have the one module `default`",
        ),
        (
            "merge_method: linear\nmodules: {default: {models: [{model: a/b}], merge_method: ties}}",
            "modules.default: llmevo does not know the key 'merge_method'",
        ),
        (
            "merge_method: linear\nmodels: [{model: a/b}]\ntokenizer: {pad_to_multiple_of: -1}",
            "tokenizer.pad_to_multiple_of: ",
        ),
        (
            "merge_method: linear\nmodels: [{model: a/b}]\ntokenizer: {sorce: base}",
            "tokenizer: llmevo does not know the key 'sorce', did you mean",
        ),
        (
            "merge_method: linear\nmodels: [{model: a/b}]\ntokenizer: {tokens: {x: {force: true}}}",
            "tokenizer.tokens.x: force needs a `source`",
        ),
        (
            "merge_method: linear\nmodels: [{model: a/b}]\ntokenizer: {tokens: {x: {source: {kind: mean}}}}",
            "tokenizer.tokens.x: kind is 'mean'; give zero or model_token, or a model instead",
        ),
        (
            "merge_method: linear\nmodels: [{model: a/b}]\ntokenizer:"
            " {tokens: {x: {source: {kind: model_token, model: a/b}}}}",
            "tokenizer.tokens.x: kind: model_token needs a `model`, and either a `token` or a `token_id`",
        ),
        (
            "merge_method: linear\nmodels: [{model: a/b}]\ntokenizer: {tokens: {x: 3}}",
            "tokenizer.tokens.x: give a `source`",
        ),
        (
            "merge_method: linear\nmodels: [{model: a/b}]\ntokenizer: {source: base}\ntokenizer_source: base",
            "tokenizer: give either `tokenizer` or `tokenizer_source`",
        ),
        ("merge_method: linear\nmodels: [{model: a+b+c}]", "write MODEL or MODEL+ADAPTER"),
    ],
)
def test_a_recipe_that_cannot_be_carried_out_is_refused_with_the_reason(text: str, reason: str) -> None:
    assert re.sub(r"\s+", " ", reason) in re.sub(r"\s+", " ", refusal(text))


@pytest.mark.parametrize(("density", "epsilon"), [(0.0, 0.15), (1.0, 0.15), (0.5, 0.2), ([0.5, 0.9], 0.2)])
def test_a_density_with_its_epsilon_is_judged_only_where_it_is_the_same_everywhere(density: Any, epsilon: Any) -> None:
    recipe = of({"weight": 1, "density": density, "epsilon": epsilon}, "della", base_model="org/base")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_search_may_hold_a_recipe_that_no_tensor_can_be_merged_by() -> None:
    """It fails as a candidate, not as a faulty recipe."""
    recipe = of({"weight": 1, "density": 0.9}, "della", base_model="org/base")
    with pytest.raises(RecipeError, match=r"give an epsilon under 0\.1"):
        recipe.check_numbers()


# --- a method for each slice ------------------------------------------------------------------------------------

BY_SLICE = """
merge_method: by_slice
base_model: org/base
slices:
  - merge_method: ties
    sources:
      - {model: org/one, layer_range: [0, 2], parameters: {density: 0.3}}
      - {model: org/two, layer_range: [0, 2]}
      - {model: org/base, layer_range: [0, 2]}
    parameters: {lambda: 0.5}
  - merge_method: slerp
    sources:
      - {model: org/one, layer_range: [2, 4]}
      - {model: org/two, layer_range: [2, 4]}
    base_model: org/one
    parameters: {t: 0.2}
parameters: {weight: 0.7}
"""


def test_every_slice_may_have_a_method_of_its_own() -> None:
    recipe = Recipe.from_yaml(BY_SLICE)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert [recipe.method_of(s).name for s in recipe.output_slices(4)] == ["ties", "slerp"]
    assert [str(recipe.origin_of(s)) for s in recipe.output_slices(4)] == ["org/base", "org/one"]
    ties, slerp = parameters_of(recipe), parameters_of(recipe, place=1)
    assert (ties["weight"], ties["density"], ties["lambda"]) == ([0.7, 0.7, 0.0], [0.3, 1.0, 0.0], 0.5)
    assert slerp == {"t": 0.2}


def test_mergekit_refuses_such_a_recipe_instead_of_overlooking_the_methods() -> None:
    config = mergekit("config").MergeConfiguration.model_validate(yaml.safe_load(BY_SLICE))
    with pytest.raises(RuntimeError, match="Unimplemented merge method by_slice"):
        mergekit("merge_methods").get(config.merge_method)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("merge_method: by_slice", "merge_method: ties", "write `merge_method: by_slice` for the whole recipe"),
        ("merge_method: slerp", "parameters: {}", "give `slices`, and each of them a `merge_method`"),
        ("merge_method: slerp", "merge_method: slurp", "merge_method 'slurp' is unknown, did you mean 'slerp'?"),
        ("{t: 0.2}", "{t: 0.2, lambda: 1}", "slerp has no parameter 'lambda'"),
        ("{weight: 0.7}", "{weight: 0.7, gamma: 1}", "ties or slerp has no parameter 'gamma'"),
        ("base_model: org/one", "base_model: org/three", "slices.1: slerp merges two models, the base and one other"),
    ],
)
def test_methods_of_slices_that_do_not_fit_are_refused_by_name(old: str, new: str, reason: str) -> None:
    assert old in BY_SLICE
    text = BY_SLICE.replace(old, new) if old != "merge_method: slerp" or "slurp" in new else _without(BY_SLICE, old)
    assert reason in refusal(text)


def _without(text: str, key: str) -> str:
    return text.replace(f"  - {key}\n    sources:", "  - sources:")


def test_by_slice_needs_slices() -> None:
    assert "give `slices`" in refusal("merge_method: by_slice\nmodels: [{model: a/b}]")


# --- mergekit's other ways of saying the same -------------------------------------------------------------------


def test_a_tokenizer_section_that_names_a_source_is_a_tokenizer_source() -> None:
    def source(text: str) -> object:
        recipe = Recipe.from_yaml(f"merge_method: linear\nmodels: [{{model: a/b, parameters: {{weight: 1}}}}]\n{text}")
        return recipe.tokenizer_source and str(recipe.tokenizer_source)

    assert source("") is None
    assert source("tokenizer: {source: base, tokens: {}}") == source("tokenizer_source: base") == "base"
    assert source("tokenizer: {source: c/d@v1}") == source("tokenizer_source: c/d@v1") == "c/d@v1"
    assert source("tokenizer: {}") == source("tokenizer_source: union") == "union"


def test_one_module_is_the_model() -> None:
    inner = yaml.safe_load(MODELS)
    module = {"default": {"models": inner.pop("models"), "parameters": {"weight": inner["parameters"].pop("weight")}}}
    assert Recipe.from_yaml(yaml.safe_dump({**inner, "modules": module})) == Recipe.from_yaml(MODELS)


def test_a_type_may_be_written_as_torch_writes_it() -> None:
    assert of({"weight": 1}, dtype="torch.bfloat16").dtype == "bfloat16"


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    recipe = Recipe.from_yaml("merge_method: linear\nmodels: [{model: a/b, parameters: {weight: 1e-3}}]")
    assert parameters_of(recipe)["weight"] == [0.001]


@pytest.mark.parametrize(("depth", "value"), [(0.0, 1.0), (0.4, 1.0), (0.5, 0.0), (1.0, 1.0)])
def test_a_gradient_of_truths_goes_in_steps(depth: float, value: float) -> None:
    recipe = of({"weight": 1}, parameters={"normalize": [True, False, True]})
    assert parameters_of(recipe, depth=depth)["normalize"] == value


@pytest.mark.parametrize(
    ("method", "parameters", "joins"),
    [("linear", {"weight": 0.5}, True), ("linear", {}, False), ("karcher", {}, True), ("ties", {}, True)],
)
def test_a_base_that_is_not_listed_joins_the_models_as_in_mergekit(
    method: str, parameters: dict[str, Any], joins: bool
) -> None:
    own = {} if method == "karcher" else {"weight": 1}
    (whole,) = of(own, method, base_model="org/base", parameters=parameters).output_slices(4)
    assert [str(source.model) for source in whole.sources] == ["org/one", *(["org/base"] if joins else [])]


def test_slerp_takes_the_base_of_each_slice() -> None:
    source = {"layer_range": [0, 2]}
    pair = [{"model": "org/one", **source}, {"model": "org/two", **source}]
    recipe = Recipe.model_validate(
        {
            "merge_method": "slerp",
            "slices": [
                {"sources": pair, "base_model": name, "parameters": {"t": 0.5}} for name in ("org/one", "org/two")
            ],
        }
    )
    assert [str(s.base_model) for s in recipe.output_slices(4)] == ["org/one", "org/two"]


def test_every_model_is_named_once_and_the_base_is_the_donor() -> None:
    recipe = Recipe.from_yaml(EVERYTHING)
    assert [*map(str, recipe.references)] == ["org/base@v1", "org/one", "org/two+me/lora@v2"]
    assert str(recipe.donor) == str(recipe.tokenizer_donor) == "org/base@v1"
    assert str(of({"weight": 1}, tokenizer_source="org/two").tokenizer_donor) == "org/two"


def test_the_recipe_of_one_model_names_that_model_alone() -> None:
    recipe = Recipe.of_one(ModelReference.parse("org/one+me/lora"), "bfloat16")
    assert [*map(str, recipe.references)] == ["org/one+me/lora"]
    assert parameters_of(recipe)["weight"] == [1.0]
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
