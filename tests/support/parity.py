"""Parity with mergekit: the same recipe merged by both, for every method and several architectures.

`make parity` writes `benchmarks/results/parity.jsonl`; `benchmarks/tables.py` prints its table.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmevo.merging.merger import merge
from llmevo.merging.methods.registry import METHODS, Method
from llmevo.merging.recipe import Recipe
from llmevo.models.sources import Sources
from support.checkpoints import mergekit, quietly, weights_of

LIMIT = 1e-5
"""How far a result may be from mergekit's, as a share of the tensor's largest entry."""

MODELS = ("base", "one", "two", "three")
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "Llama": {"model_type": "llama"},
    "Llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "Qwen2": {"model_type": "qwen2", "layer_types": ["full_attention"] * 2},
    "Qwen3, tied": {"model_type": "qwen3", "tie_word_embeddings": True, "layer_types": ["full_attention"] * 2},
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "Gemma, tied": {"model_type": "gemma", "tie_word_embeddings": True},
}
SIZE: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
"""Methods with random masks, each tool's own: equal where nothing is dropped, alike where something is."""

PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "slerp": {"t": 0.4},
    "ties": {"density": 0.4, "lambda": 0.8},
    "breadcrumbs": {"density": 0.6, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.05},
    "sce": {"select_topk": 0.5},
    "nearswap": {"t": 0.1},
    "ramplus_tl": {"epsilon": 0.3},
    "ram": {"epsilon": 0.3},
    "passthrough": {"scale": 0.7},
}
"""What a method is tried with, beside its defaults; a required parameter that is missing here is 0.5."""
WEIGHTS = {"one": 0.3, "two": 0.9, "three": 0.5}


def new_models(folder: Path, architecture: str) -> Path:
    """A base model and three fine-tunes of it with random weights, in float32, each in a folder of its name."""
    options = {**SIZE, **ARCHITECTURES[architecture]}
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
    random = torch.Generator().manual_seed(0)
    weights = dict(made.named_parameters())
    bases = {name: torch.randn(weight.shape, generator=random) * 0.5 for name, weight in weights.items()}
    with torch.no_grad():
        for name in MODELS:
            tuned = 0.0 if name == "base" else 0.3
            for key, weight in weights.items():
                weight.copy_(bases[key] + tuned * torch.randn(weight.shape, generator=random) + ("norm" in key))
            quietly(lambda name=name: made.save_pretrained(folder / name))
    return folder


def recipe_of(method: Method) -> dict[str, Any]:
    """A recipe by one method, over as many of the models as it takes."""
    least, most = method.models
    names = MODELS[1 : 1 + max(least, min(3, most or 3))]
    given = {"density": 1.0} if method.name in RANDOM else PARAMETERS.get(method.name, {})
    required = {name: 0.5 for name, parameter in method.shared.items() if parameter.default is None}
    models = [
        {"model": name, "parameters": {"weight": WEIGHTS[name]}} if "weight" in method.each else {"model": name}
        for name in names
    ]
    base = {"base_model": "base"} if method.takes_base or method.pair else {}
    return {"merge_method": method.name, **base, "models": models, "parameters": {**required, **given}}


def ours(recipe: Mapping[str, Any], root: Path) -> dict[str, Tensor]:
    """The weights llmevo makes of a recipe, its models in `root`."""
    known = Recipe.from_yaml(yaml.safe_dump(recipe))
    return dict(merge(known, Sources.open(known.references, root)))


def theirs(recipe: Mapping[str, Any], root: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    """The weights mergekit writes for a recipe, its models in `root`."""
    run = mergekit("merge")
    config = mergekit("config").MergeConfiguration.model_validate(_placed(recipe, root))
    settings = {
        "copy_tokenizer": any(root.glob("*/tokenizer.json")),
        "write_model_card": False,
        "quiet": True,
        "clone_tensors": True,
        "random_seed": 0,
        **options,
    }
    quietly(lambda: run.run_merge(config, str(out), run.MergeOptions(**settings)))
    return weights_of(out)


def _placed(part: Any, root: Path, key: str = "") -> Any:
    """The recipe with its models' names as absolute paths."""
    if isinstance(part, list):
        return [_placed(entry, root) for entry in part]
    if isinstance(part, dict):
        return {name: _placed(value, root, name) for name, value in part.items()}
    if key in ("model", "base_model") or (key == "tokenizer_source" and part not in ("base", "union")):
        return "+".join(str(root / name) for name in part.split("+"))
    return part


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of two models, as a share of the largest entry of its tensor; inf where shapes differ."""
    shapes, wanted = ({name: tensor.shape for name, tensor in model.items()} for model in (one, other))
    if shapes != wanted:
        return float("inf")
    pairs = [(one[name].double(), tensor.double()) for name, tensor in other.items()]
    return max(float((mine - their).abs().max() / their.abs().max().clamp(min=1e-30)) for mine, their in pairs)


def rows() -> Iterator[dict[str, Any]]:
    """Methods × architectures: how far llmevo's result is from mergekit's."""
    with tempfile.TemporaryDirectory() as temporary:
        roots = {name: new_models(Path(temporary) / str(i), name) for i, name in enumerate(ARCHITECTURES)}
        for method in (each for each in METHODS.values() if each.in_mergekit):
            recipe = {**recipe_of(method), "dtype": "float32"}
            for architecture, root in roots.items():
                far = distance(ours(recipe, root), theirs(recipe, root, root / f"out-{method.name}"))
                note = "density 1" if method.name in RANDOM else ""
                yield {"method": method.name, "note": note, "architecture": architecture, "difference": far}
            print(".", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file to write, as lines of JSON")
    given = parser.parse_args()
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    measurements, tables = map(importlib.import_module, ("measurements", "tables"))
    torch.set_num_threads(1)
    if given.out:
        given.out.write_text("")
    here = measurements.environment()
    found = [measurements.append(given.out, {"benchmark": "parity", **row, **here}) for row in rows()]
    print(tables.markdown(found))


if __name__ == "__main__":
    main()
