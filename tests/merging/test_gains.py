"""A gain in a recipe gives an ordinary checkpoint that computes what the model with a scaled branch does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from llmevo.errors import RecipeError
from llmevo.export.lora import base_of, sum_of_adapters
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.gains import SKIPPED, Gains
from llmevo.models.sources import Sources
from support.checkpoints import new_adapter, new_checkpoint, quietly
from support.families import FAMILIES, VISION, new_model, randomise

ATTENTION = ("self_attn", "self_attention", "attention", "attn", "linear_attn", "mamba", "conv")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_mlp")
AFTER = (("post_self_attn_layernorm", "post_mlp_layernorm"), ("post_attention_layernorm", "post_feedforward_layernorm"))
INSIDE: Mapping[str, tuple[str, str]] = {
    "BLOOM": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "MPT": ("attn.out_proj", "ffn.down_proj"),
    "OPT": ("self_attn", "fc2"),
}
"""Models whose branches add the residual themselves, or are no module."""

GAINS = Gains(attention=0.625, mlp=1.5, temperature=1.75)
CORE = (
    *("Llama", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3 (text)", "OLMo 2", "GLM-4", "GPT-2", "Phi-3", "Falcon"),
    *("Mixtral", "gpt-oss", "Qwen3-Next", "Granite 4 (hybrid)", "Nemotron-H", "Gemma 3"),
)
"""Families whose layers differ most; the others are slow tests, as there are many."""

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Cohere with QK-norm": ("Cohere", {"use_qk_norm": True}),
    "Phi with QK-norm": ("Phi", {"qk_layernorm": True}),
    "StableLM with QK-norm": ("StableLM", {"qk_layernorm": True}),
    "BLOOM, residual after the norm": ("BLOOM", {"apply_residual_connection_post_layernorm": True}),
    "Falcon, all heads": ("Falcon", {"multi_query": False}),
    "Falcon, new": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Llama 4 without QK-norm": ("Llama 4 (text)", {"use_qk_norm": False}),
}
FOLDED = {**{name: (name, {}) for name in FAMILIES if name != "Zamba2"}, **VARIANTS}
WITHOUT = {
    ("Mamba", "mlp"): "there is no mlp branch in layer 1",
    ("Mamba 2", "mlp"): "there is no mlp branch in layer 1",
    ("Mamba", "temperature"): "there is no softmax attention in layer 1",
    ("Mamba 2", "temperature"): "there is no softmax attention in layer 1",
    ("Llama 4 (text)", "temperature"): "the model normalizes queries without weights",
}
"""Gains that have no weight to go into."""


def saved(folder: Path, name: str, **changes: Any) -> Path:
    made = new_model(name, **changes)
    randomise(made, 0)
    quietly(lambda: made.save_pretrained(folder))
    return folder


def loaded(folder: Path, name: str) -> Any:
    kind = AutoModelForImageTextToText if FAMILIES[name].kind == VISION else AutoModelForCausalLM
    return quietly(
        lambda: kind.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
    ).eval()


def layers_of(model: Any) -> list[Any]:
    stacks = [of for name, of in model.named_modules() if isinstance(of, torch.nn.ModuleList) and "vis" not in name]
    return [*next(of for of in stacks if len(of) == depth_of(model))]


def depth_of(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def scaled(factor: float) -> Callable[..., Any]:
    def hook(_: Any, __: Any, out: Any) -> Any:
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    return hook


def branch_modules(layer: Any, name: str) -> tuple[list[Any], list[Any]]:
    """The modules whose output a layer adds to the residual stream: of attention, and of the MLP."""
    if name in INSIDE:
        return [layer.get_submodule(INSIDE[name][0])], [layer.get_submodule(INSIDE[name][1])]
    if pair := next((pair for pair in AFTER if hasattr(layer, pair[1])), None):
        return [getattr(layer, pair[0])], [getattr(layer, pair[1])]
    if hasattr(layer, "mixer"):
        return ([], [layer.mixer]) if hasattr(layer.mixer, "down_proj") else ([layer.mixer], [])
    first, second = (
        [m for key in keys if isinstance(m := getattr(layer, key, None), torch.nn.Module)] for keys in (ATTENTION, MLP)
    )
    return first, second


def heat(layer: Any, temperature: float) -> None:
    """Multiply the scores of a layer's attention."""
    for module in layer.modules():
        if hasattr(module, "multi_query"):  # Falcon divides by a number of its own
            split = module._split_heads
            module._split_heads = lambda fused, split=split: (split(fused)[0] * temperature, *split(fused)[1:])
        for key in ("scaling", "softmax_scale", "inv_norm_factor", "scale_attn"):
            if isinstance(value := getattr(module, key, None), float | Tensor):
                setattr(module, key, value / temperature if key == "scale_attn" else value * temperature)
                break


def change(model: Any, name: str, layer: int, gains: Gains) -> None:
    attention, mlp = branch_modules(layers_of(model)[layer], name)
    assert attention or mlp
    for factor, modules in ((gains.attention, attention), (gains.mlp, mlp)):
        for module in modules:
            module.register_forward_hook(scaled(factor))
    if gains.temperature != 1.0:
        heat(layers_of(model)[layer], gains.temperature)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return model(input_ids=torch.randint(5, 40, (2, 12), generator=random)).logits


def recipe_of(model: str, depth: int, gains: Mapping[int, Gains]) -> Recipe:
    slices = [
        {
            "sources": [{"model": model, "layer_range": [layer, layer + 1]}],
            "merge_method": "passthrough",
            **({"gains": gains[layer].model_dump()} if layer in gains else {}),
        }
        for layer in range(depth)
    ]
    return Recipe.from_yaml(yaml.safe_dump({"merge_method": "by_slice", "slices": slices}))


def written(root: Path, depth: int, gains: Mapping[int, Gains], out: str = "out") -> Path:
    recipe = recipe_of("model", depth, gains)
    write_model(recipe, Sources.open(recipe.references, root), root / out)
    return root / out


def last_attention(model: Any) -> int:
    """The last layer that has attention with a softmax, or else the last one with two branches."""
    found = [
        place
        for place, layer in enumerate(layers_of(model))
        if any(
            "q_proj" in key or "qkv" in key or "c_attn" in key or "query_key_value" in key
            for key, _ in layer.named_modules()
        )
    ]
    return found[-1] if found else len(layers_of(model)) - 1


PARAMETERS = [
    pytest.param(name, id=name, marks=[] if name in CORE or name in VARIANTS else pytest.mark.slow) for name in FOLDED
]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_folded_gain_is_the_scaled_branch(name: str, tmp_path: Path) -> None:
    family, changes = FOLDED[name]
    saved(tmp_path / "model", family, **changes)
    plain = loaded(tmp_path / "model", family)
    base, depth = logits(plain), depth_of(plain)
    places = {"attention": 0, "mlp": depth - 1, "temperature": last_attention(plain)}
    for kind, layer in places.items():
        gains = Gains(**{kind: getattr(GAINS, kind)})
        if (name, kind) in WITHOUT:
            with pytest.raises(RecipeError, match=WITHOUT[name, kind]):
                written(tmp_path, depth, {layer: gains}, kind)
            continue
        out = written(tmp_path, depth, {layer: gains}, kind)
        hooked = loaded(tmp_path / "model", family)
        change(hooked, family, layer, gains)
        want = logits(hooked)
        size = want.abs().max()
        assert float((base - want).abs().max() / size) > 1e-4
        assert float((logits(loaded(out, family)) - want).abs().max() / size) < 1e-5


def without_epsilon(model: Any) -> Any:
    """A model whose norms divide by their input's size alone."""
    for module in model.modules():
        for key in ("eps", "variance_epsilon"):
            if key in vars(module):
                setattr(module, key, 1e-14)
    return model


BEFORE = (
    *("Llama", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3 (text)", "GLM-4", "GPT-2", "Phi-3", "Falcon", "Granite", "Cohere"),
    *("Mixtral", "gpt-oss"),
)
"""Families with a norm before each branch."""


@pytest.mark.parametrize("name", BEFORE)
def test_scaling_the_residual_stream_is_a_gain_of_all_later_branches(name: str, tmp_path: Path) -> None:
    """Scales s_t before each layer, as the paper has them, are gains of 1 / (s_1 ⋯ s_t), but for the norms' epsilon."""
    scales = (0.5, 1.6)
    saved(tmp_path / "model", name)
    model = without_epsilon(loaded(tmp_path / "model", name))
    base = logits(model)
    out = written(tmp_path, 2, {i: Gains(attention=by, mlp=by) for i, by in enumerate((2.0, 1.25))})
    for layer, scale in zip(layers_of(model), scales, strict=True):

        def scaled_stream(_: Any, given: Any, named: Any, scale: float = scale) -> Any:
            if given:
                return (given[0] * scale, *given[1:]), named
            return given, {**named, "hidden_states": named["hidden_states"] * scale}

        layer.register_forward_pre_hook(scaled_stream, with_kwargs=True)
    want = logits(model)
    size = want.abs().max()
    assert float((base - want).abs().max() / size) > 1e-2
    assert float((logits(without_epsilon(loaded(out, name))) - want).abs().max() / size) < 1e-5


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma 2", "OLMo 2", "GPT-2", "Mixtral"])
def test_a_damped_loop_is_a_layer_that_runs_in_smaller_steps(name: str, tmp_path: Path) -> None:
    """K runs of a layer, each with 1 / K of what its branches add."""
    saved(tmp_path / "model", name)
    model, part = loaded(tmp_path / "model", name), Gains(attention=1 / 3, mlp=1 / 3)
    slices = [
        {"sources": [{"model": "model", "layer_range": [layer, layer + 1]}], "merge_method": "passthrough", **more}
        for layer, more in ((0, {}), *[(1, {"gains": part.model_dump()})] * 3)
    ]
    recipe = Recipe.model_validate({"merge_method": "by_slice", "slices": slices})
    write_model(recipe, Sources.open(recipe.references, tmp_path), tmp_path / "out")
    change(model, name, 1, part)
    stack = next(of for of in model.modules() if isinstance(of, torch.nn.ModuleList) and len(of) == 2)
    stack.extend([stack[1], stack[1]])
    model.config.num_hidden_layers = 4
    if kinds := getattr(model.config, "layer_types", None):
        model.config.layer_types = [*kinds, kinds[1], kinds[1]]
    model.config.use_cache = False
    want = logits(model)
    assert float((logits(loaded(tmp_path / "out", name)) - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize("name", [each for each in PARAMETERS if "residual after" not in str(each.id)])
def test_a_layer_with_gains_of_0_is_the_identity(name: str, tmp_path: Path) -> None:
    """Bit for bit the model whose layer returns its input."""
    family, changes = FOLDED[name]
    saved(tmp_path / "model", family, **changes)
    model = loaded(tmp_path / "model", family)
    depth = depth_of(model)
    out = written(tmp_path, depth, {depth - 1: SKIPPED})
    layers_of(model)[-1].register_forward_hook(
        lambda _, given, named, out: (
            (given[0] if given else named["hidden_states"], *out[1:])
            if isinstance(out, tuple)
            else (given[0] if given else named["hidden_states"])
        ),
        with_kwargs=True,
    )
    assert torch.equal(logits(loaded(out, family)), logits(model))


@pytest.mark.parametrize(
    ("name", "changes", "gains", "reason"),
    [
        ("Zamba2", {}, Gains(mlp=0.5), "does not know how the layers of zamba2"),
        ("OLMo", {"clip_qkv": 8.0}, Gains(temperature=0.5), "the model clips queries at 8.0"),
        ("BLOOM", {"apply_residual_connection_post_layernorm": True}, SKIPPED, "is not the identity"),
        ("OPT", {"do_layer_norm_before": False}, Gains(mlp=0.5), "a norm follows each residual sum"),
    ],
)
def test_a_gain_that_cannot_be_folded_is_refused(
    name: str, changes: Mapping[str, Any], gains: Gains, reason: str, tmp_path: Path
) -> None:
    saved(tmp_path / "model", name, **changes)
    with pytest.raises(RecipeError, match=reason):
        written(tmp_path, FAMILIES[name].changes.get("num_hidden_layers", 2), {0: gains})
    assert not (tmp_path / "out").exists()


def test_a_folded_weight_is_rounded_once(tmp_path: Path) -> None:
    """A merge that its method would round to bfloat16 is folded before that."""
    for seed, model in enumerate(("one", "two")):
        new_checkpoint(tmp_path / model, seed, layers=2, dtype=torch.bfloat16)
    sources = [
        {"model": model, "layer_range": [0, 2], "parameters": {"weight": weight}}
        for model, weight in (("one", 0.3), ("two", 0.6))
    ]
    given: dict[str, Any] = {"sources": sources, "merge_method": "linear", "parameters": {"normalize": False}}

    def made(dtype: str, **more: Any) -> dict[str, Tensor]:
        recipe = Recipe.model_validate({"merge_method": "by_slice", "slices": [{**given, **more}], "dtype": dtype})
        return dict(Merger(Sources.open(recipe.references, tmp_path)).merge(recipe))

    exact, folded, plain = made("float32"), made("bfloat16", gains={"mlp": 0.7}), made("bfloat16")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(folded[name], (exact[name] * 0.7).to(torch.bfloat16))
    assert not torch.equal(folded[name], plain[name] * 0.7)
    others = [key for key in plain if "down_proj" not in key]
    assert all(torch.equal(folded[key], plain[key]) for key in others)


def test_an_engine_loads_only_the_tensors_that_a_gain_changes(tmp_path: Path) -> None:
    saved(tmp_path / "model", "Llama")
    plain, scaled_ = recipe_of("model", 2, {}), recipe_of("model", 2, {1: Gains(attention=0.5)})
    merger = Merger(Sources.open(plain.references, tmp_path))
    held = merger.digests(plain)
    assert [name for name, _ in merger.merge(scaled_, held)] == ["model.layers.1.self_attn.o_proj.weight"]
    assert held == merger.digests(scaled_)
    assert [name for name, _ in merger.merge(plain, held)] == ["model.layers.1.self_attn.o_proj.weight"]
    assert merger.count(scaled_).merged == merger.count(plain).merged


def test_a_merge_with_gains_is_no_sum_of_adapters(tmp_path: Path) -> None:
    new_adapter(tmp_path / "adapter", new_checkpoint(tmp_path / "base", layers=2))
    slice_: dict[str, Any] = {
        "sources": [
            {"model": model, "layer_range": [0, 2], "parameters": {"weight": 0.5}} for model in ("base", "base+adapter")
        ],
        "merge_method": "linear",
    }

    def exact(**more: Any) -> bool:
        recipe = Recipe.model_validate({"merge_method": "by_slice", "slices": [{**slice_, **more}]})
        sources = Sources.open(recipe.references, tmp_path)
        return sum_of_adapters(recipe, sources, base_of(recipe)) is not None

    assert exact()
    assert not exact(gains={"mlp": 0.5})
