"""Merges of models that have more than a language model, and of mixtures of experts: no tensor is lost unsaid."""

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import llmevo
from llmevo.errors import RecipeError, SourceError
from llmevo.merging.merger import Merger, merge
from llmevo.merging.methods.registry import METHODS
from llmevo.merging.plan import plan
from llmevo.merging.recipe import Recipe
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from support.checkpoints import assert_near, assert_same_bits, bits, mergekit, quietly, weights_of
from support.families import FAMILIES, VISION, new_family

TEXT = {"Qwen2.5-VL": "Qwen2", "Qwen3-VL": "Qwen3", "Gemma 3": "Gemma 3 (text)", "LLaVA": "Llama"}
"""Vision-language families and those of their language models: three ways to name both."""

SIZES: Mapping[str, Mapping[str, Any]] = {
    "Qwen2": {"hidden_size": 128, "head_dim": None},
    "Qwen3": {"tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with the base and two fine-tunes of a family, made once."""

    @cache
    def family(name: str) -> Path:
        return new_family(tmp_path_factory.mktemp("family"), name, seed=len(name), **SIZES.get(name, {}))

    return family


@pytest.fixture
def both(families: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """`vision`, a vision-language model, and `text` and `other`, language models of its shapes."""
    shutil.copytree(families(request.param) / "base", tmp_path / "vision")
    for name, model in (("text", "base"), ("other", "one")):
        shutil.copytree(families(TEXT[request.param]) / model, tmp_path / name)
    return tmp_path


def recipe(base: str, model: str, weight: Any = 0.5, **keys: Any) -> Recipe:
    models = [{"model": model, "parameters": {"weight": weight}}]
    return Recipe.model_validate(
        {"merge_method": "task_arithmetic", "base_model": base, "models": models, "dtype": "float32"} | keys
    )


def weights(of: Recipe, root: Path) -> dict[str, Tensor]:
    return dict(merge(of, Sources.open(of.references, root, of.excludes)))


def text_names(vision: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> dict[str, str]:
    """The name in the vision-language model of each of the language model's tensors, and the latter's."""
    ways = ("{}", "language_model.{}", "model.language_model.{}")
    places = {name: [way.format(name) for way in ways[:2]] for name in text}
    places |= {name: [*known, ways[2].format(name.removeprefix("model."))] for name, known in places.items()}
    return {next(place for place in known if place in vision): name for name, known in places.items()}


@pytest.mark.parametrize("both", [*TEXT], indirect=True)
def test_a_language_model_is_merged_into_the_text_tower_of_a_vision_language_model(both: Path, tmp_path: Path) -> None:
    (both / "vision" / "preprocessor_config.json").write_text("{}")
    (both / "vision" / "chat_template.jinja").write_text("{{ messages }}")
    said: list[str] = []
    llmevo.merge(recipe("vision", "text"), tmp_path / "out", root=both, say=said.append)
    vision, text, merged = (weights_of(place) for place in (both / "vision", both / "text", tmp_path / "out"))
    names = text_names(vision, text)
    assert len(names) == len(text)
    expected = {name: vision[name] if name not in names else (vision[name] + text[names[name]]) / 2 for name in vision}
    assert_near(merged, expected, rtol=1e-4, atol=1e-6)
    rest = [name for name in vision if name not in names]
    assert_same_bits({name: merged[name] for name in rest}, {name: vision[name] for name in rest})
    assert f"Tensors: {len(names)} merged, {len(rest)} copied (" in said[0]
    assert "only in vision: " in said[0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["num_hidden_layers"] == 2
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    loaded: Any = quietly(lambda: AutoModelForImageTextToText.from_pretrained(tmp_path / "out"))
    assert loaded is not None


@pytest.mark.parametrize("both", [*TEXT], indirect=True)
def test_the_text_tower_of_a_vision_language_model_is_merged_into_a_language_model(both: Path, tmp_path: Path) -> None:
    said: list[str] = []
    llmevo.merge(recipe("text", "vision"), tmp_path / "out", root=both, say=said.append)
    vision, text, merged = (weights_of(place) for place in (both / "vision", both / "text", tmp_path / "out"))
    names = {own: name for name, own in text_names(vision, text).items()}
    assert_near(merged, {name: (text[name] + vision[names[name]]) / 2 for name in text}, rtol=1e-4, atol=1e-6)
    lost = len(vision) - len(names)
    assert said == [
        f"Tensors: {len(text)} merged, 0 copied, {lost} left out (only in vision, and text is a text model)."
    ]
    quietly(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("both", ["Qwen2.5-VL"], indirect=True)
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_what_only_the_base_has_is_copied_whatever_the_weights_add_up_to(method: str, both: Path) -> None:
    one, two = ({"model": name, "parameters": {"weight": 0.3}} for name in ("vision", "text"))
    keys: dict[str, Any] = {"merge_method": method, "base_model": "vision", "models": [one, two]}
    if method == "linear":
        keys["parameters"] = {"normalize": False}
    else:
        keys |= {"models": [{"model": "text"}], "parameters": {"t": 0.5}}
    merged, vision = weights(Recipe.model_validate(keys), both), weights_of(both / "vision")
    rest = [name for name in vision if name.startswith("visual.")]
    assert rest
    assert_same_bits({name: merged[name] for name in rest}, {name: vision[name] for name in rest})


@pytest.mark.parametrize("both", ["Qwen2.5-VL"], indirect=True)
def test_slices_and_gradients_are_of_text_layers(both: Path, tmp_path: Path) -> None:
    spans = [(0, 2), (1, 2)]
    slices = [{"sources": [{"model": "vision", "layer_range": span}]} for span in spans]
    stacked = Recipe.model_validate({"merge_method": "passthrough", "slices": slices})
    llmevo.merge(stacked, tmp_path / "out", root=both)
    vision, merged = weights_of(both / "vision"), weights_of(tmp_path / "out")
    visual = {name: of for name, of in vision.items() if name.startswith("visual.")}
    assert_same_bits({name: of for name, of in merged.items() if name.startswith("visual.")}, visual)
    again = {name: of for name, of in vision.items() if name.startswith("model.layers.1.")}
    assert_same_bits({name.replace(".1.", ".2.", 1): of for name, of in again.items()} | merged, merged)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == len(config["text_config"]["layer_types"]) == 3
    assert config["vision_config"]["depth"] == 2
    gradient = weights(recipe("vision", "text", [0.0, 1.0]), both)
    assert torch.equal(gradient["model.layers.0.mlp.up_proj.weight"], vision["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("both", ["Qwen2.5-VL", "Gemma 3", "LLaVA"], indirect=True)
def test_a_vision_tower_is_whole_and_of_one_slice(both: Path) -> None:
    weights = weights_of(both / "vision")
    (both / "second").mkdir()
    shutil.copytree(both / "vision", both / "second", dirs_exist_ok=True)
    changed = {name: of + 1 if of.is_floating_point() else of for name, of in weights.items()}
    save_file(changed, both / "second" / "model.safetensors", {"format": "pt"})
    slices = [{"sources": [{"model": of, "layer_range": [0, 2]}]} for of in ("vision", "second")]
    stacked = Recipe.model_validate({"merge_method": "passthrough", "slices": slices})
    merged = dict(merge(stacked, Sources.open(stacked.references, both)))
    tower = [name for name in weights if "vision" in name or "visual" in name or "projector" in name]
    assert len({*(torch.equal(merged[name], weights[name]) for name in tower)}) == 1
    (embeddings,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    assert torch.equal(merged[embeddings], weights[embeddings])


@pytest.mark.parametrize("both", ["Qwen2.5-VL"], indirect=True)
def test_embeddings_with_other_rows_are_refused_as_a_vocabulary(both: Path) -> None:
    held = weights_of(both / "text")
    cut = {name: of[:-1].contiguous() if name in (EMBEDDINGS, "lm_head.weight") else of for name, of in held.items()}
    save_file(cut, both / "text" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"vision and text have different vocabularies: \S+ is \(100, 128\)"):
        weights(recipe("vision", "text"), both)


EMBEDDINGS = "model.embed_tokens.weight"


@pytest.mark.parametrize("both", ["Qwen2.5-VL"], indirect=True)
def test_a_vision_language_model_that_lacks_a_part_of_its_tower_is_incomplete(both: Path) -> None:
    shutil.copytree(both / "vision", both / "cut")
    held = weights_of(both / "cut")
    lost = next(name for name in held if name.startswith("visual.blocks.1."))
    save_file({name: of for name, of in held.items() if name != lost}, both / "cut" / "model.safetensors")
    with pytest.raises(SourceError, match=rf"vision has the tensor {lost}.* incomplete"):
        weights(recipe("vision", "cut"), both)
    with pytest.raises(SourceError, match=rf"cut has|vision has the tensor {lost}"):
        weights(recipe("cut", "vision"), both)


def test_integers_that_differ_are_refused_unless_they_are_left_out_on_purpose(families: Any, tmp_path: Path) -> None:
    for place, name in enumerate(("base", "one")):
        shutil.copytree(families("Llama") / name, tmp_path / name)
        held = weights_of(tmp_path / name) | {"model.table": torch.arange(4) + place}
        save_file(held, tmp_path / name / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"one: model\.table holds integers.* other ones than in base"):
        llmevo.merge(recipe("base", "one"), tmp_path / "out", root=tmp_path)
    with pytest.raises(SourceError, match=r"one: model\.table holds integers"):
        Merger(Sources.open(map(ModelReference.parse, ("base", "one")), tmp_path)).check(recipe("base", "one"))
    kept = recipe("base", "one", [{"filter": "table", "value": 0.0}, {"value": 0.5}])
    said: list[str] = []
    llmevo.merge(kept, tmp_path / "out", root=tmp_path, say=said.append)
    assert "1 copied (integers)" in said[0]
    assert torch.equal(weights_of(tmp_path / "out")["model.table"], torch.arange(4))


def test_layers_for_prediction_are_merged_and_follow_the_last_layer(families: Any, tmp_path: Path) -> None:
    for name in ("base", "one"):
        shutil.copytree(families("GLM-4.5 (MoE)") / name, tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_nextn_predict_layers": 1}))
        held = weights_of(tmp_path / name)
        extra = {name.replace(".1.", ".2.", 1): of.clone() for name, of in held.items() if ".layers.1." in name}
        save_file(held | extra, tmp_path / name / "model.safetensors", {"format": "pt"})
    base, one = (weights_of(tmp_path / name) for name in ("base", "one"))
    name = "model.layers.2.mlp.gate.weight"
    torch.testing.assert_close(weights(recipe("base", "one"), tmp_path)[name], (base[name] + one[name]) / 2)
    slices = [{"sources": [{"model": "one", "layer_range": span}]} for span in ((0, 2), (1, 2))]
    stacked = weights(Recipe.model_validate({"merge_method": "passthrough", "slices": slices}), tmp_path)
    assert torch.equal(stacked[name.replace(".2.", ".3.")], one[name])
    assert torch.equal(stacked[name], one[name.replace(".2.", ".1.")])


# --- mixtures of experts ------------------------------------------------------------------------------------------

DETERMINISTIC = [name for name in METHODS if not name.startswith(("dare", "della"))]
FUSED = "model.layers.0.mlp.experts.{}"


def apart(folder: Path, target: Path) -> None:
    """Save gpt-oss with a tensor for each expert, as other mixtures have it."""
    shutil.copytree(folder, target)
    held: dict[str, Tensor] = {}
    for name, of in weights_of(folder).items():
        before, _, after = name.partition(".experts.")
        experts = {f"{before}.experts.{n}.{after}": each.clone() for n, each in enumerate(of)} if after else {name: of}
        held |= experts
    save_file(held, target / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_experts_in_one_tensor_are_merged_as_experts_apart(method: str, families: Any, tmp_path: Path) -> None:
    root = families("gpt-oss")
    for name in ("base", "one", "two"):
        apart(root / name, tmp_path / name)
    known = METHODS[method]
    each = {name: {"weight": 0.6, "density": 0.4, "gamma": 0.1, "scale": 0.5}[name] for name in known.each}
    shared = {"t": 0.3} if "t" in known.shared else {"select_topk": 0.4} if "select_topk" in known.shared else {}
    count = known.models[1] or 2
    models = [{"model": name, "parameters": each or None} for name in ("one", "two")[:count]]
    keys = {"merge_method": method, "models": models, "parameters": shared or None, "dtype": "float32"}
    if known.takes_base or known.pair:
        keys["base_model"] = "base"
    both = Recipe.model_validate(keys)
    fused, single = weights(both, root), weights(both, tmp_path)
    for name, of in fused.items():
        before, _, after = name.partition(".experts.")
        again = torch.stack([single[f"{before}.experts.{n}.{after}"] for n in range(4)]) if after else single[name]
        assert torch.equal(bits(of), bits(again)), name


def test_each_expert_has_a_random_mask_of_its_own_and_always_the_same(families: Any) -> None:
    root = families("gpt-oss")
    models = [{"model": "one", "parameters": {"weight": 1.0, "density": 0.5}}]
    dare = Recipe.model_validate(
        {"merge_method": "dare_linear", "base_model": "base", "models": models, "dtype": "float32"}
    )
    name = FUSED.format("gate_up_proj")
    changed = weights(dare, root)[name] != weights_of(root / "base")[name]
    assert 0.3 < changed.float().mean() < 0.7
    assert not any(torch.equal(changed[0], other) for other in changed[1:])
    assert torch.equal(weights(dare, root)[name] != weights_of(root / "base")[name], changed)


def test_a_slice_of_two_kinds_of_layers_is_refused_whichever_has_more() -> None:
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.a.weight",
        "model.layers.1.a.weight",
        "model.layers.1.b.weight",
    ]
    for spans in (((0, 1), (1, 2)), ((1, 2), (0, 1))):
        sources = [
            {"model": name, "layer_range": span, "parameters": {"weight": 0.5}}
            for name, span in zip("xy", spans, strict=True)
        ]
        mixed = Recipe.model_validate({"merge_method": "linear", "slices": [{"sources": sources}]})
        with pytest.raises(
            RecipeError, match=r"layers\.1\.b\.weight cannot be merged with model\.layers\.0\.b\.weight"
        ):
            plan(mixed, names, 2)


def test_counts_name_the_routers_that_stay_those_of_the_base(families: Any) -> None:
    filters = [{"filter": "mlp.gate.", "value": 0.0}, {"value": 0.5}]
    kept = recipe("base", "one", filters)
    sources = Sources.open(kept.references, families("Qwen3-MoE"))
    copied = Merger(sources).count(kept).copied
    assert [*copied] == ["the weight of every model is 0"]
    assert copied["the weight of every model is 0"] == [f"model.layers.{n}.mlp.gate.weight" for n in (0, 1)]


# --- mergekit 0.1.5 on the same checkpoints -----------------------------------------------------------------------

LOSES: Mapping[str, str] = {
    "DeepSeek-V3": "experts",
    "Jamba": "experts",
    "Ernie 4.5 MoE": "experts",
    "Nemotron-H": "mixer",
    "LLaVA": "language_model",
}
"""Families whose merge by mergekit lacks tensors, and a part of the names of some; transformers makes them anew."""

RAISES: Mapping[str, str] = {"Qwen3-VL": "visual", "Gemma 3": "vision_tower"}
"""Families that mergekit does not merge, and a part of the tensor that it misses in the checkpoint."""

MERGES = ("Qwen3-Next", "Qwen3.5 (text)", "Granite 4 (hybrid)", "Qwen2.5-VL")


def by_mergekit(of: Recipe, root: Path, out: Path) -> None:
    run = quietly(lambda: mergekit("merge"))
    given = of.as_dict()
    for model in given["models"]:
        model["model"] = str(root / model["model"])
    config = mergekit("config").MergeConfiguration.model_validate(given | {"base_model": str(root / "base")})
    options = run.MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    quietly(lambda: run.run_merge(config, str(out), options=options))


def loaded(folder: Path, name: str) -> tuple[dict[str, Tensor], set[str]]:
    """The weights as transformers loads them, and the names of those that the checkpoint lacks."""
    kind: Any = AutoModelForImageTextToText if FAMILIES[name].kind == VISION else AutoModelForCausalLM
    model, info = quietly(lambda: kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32))
    return dict(model.state_dict()), {*info["missing_keys"]}


@pytest.mark.parametrize("name", [*LOSES, *RAISES, *MERGES])
def test_mergekit_loses_tensors_or_fails_where_all_are_merged_here(name: str, families: Any, tmp_path: Path) -> None:
    root, both = families(name), recipe("base", "one")
    llmevo.merge(both, tmp_path / "ours", root=root)
    merged, missing = loaded(tmp_path / "ours", name)
    assert not missing
    if name in RAISES:
        with pytest.raises(RuntimeError, match=f"{RAISES[name]}.* required but not present"):
            by_mergekit(both, root, tmp_path / "theirs")
        return
    by_mergekit(both, root, tmp_path / "theirs")
    others, lost = loaded(tmp_path / "theirs", name)
    assert bool(lost) == (name in LOSES)
    assert not lost or any(LOSES[name] in each for each in lost)
    rest = [each for each in merged if each not in lost]
    assert_near({each: others[each] for each in rest}, {each: merged[each] for each in rest}, rtol=1e-4, atol=1e-6)


def test_special_tokens_of_another_models_tokenizer_are_those_of_the_text_tower_too(
    families: Any, tmp_path: Path
) -> None:
    folder = families("Gemma 3")
    chat = tmp_path / "chat"
    shutil.copytree(folder / "one", chat)
    config = json.loads((chat / "config.json").read_text())
    config["eos_token_id"] = config["text_config"]["eos_token_id"] = 7
    (chat / "config.json").write_text(json.dumps(config))
    models = [{"model": str(chat), "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": models}
    llmevo.merge(Recipe.model_validate({**recipe, "tokenizer_source": str(chat)}), tmp_path / "out")
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (merged["eos_token_id"], merged["text_config"]["eos_token_id"]) == (7, 7)
    assert "pipeline_tag: image-text-to-text" in (tmp_path / "out" / "README.md").read_text()
