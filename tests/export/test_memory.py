"""Exports need the memory of a few weights, whatever the format and the size of the model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.gguf_donor import LLAMA, new_donor, shapes_of
from support.memory import printed_by
from support.tiny_model import tiny_tokenizer

MEASURE = """
import ctypes, sys
import torch
torch.set_num_threads(1)
from llmevo.export import low_rank
from llmevo.export.extract import extract
from llmevo.export.formats import Format
from llmevo.export.merge import merge_as
from support.memory import peak_of

low_rank.SMALL, low_rank.LARGEST = 256, 16  # a decomposition in full takes its time
def write(name, size, out):
    if name == "extract":
        return extract(f"{size}-two", f"{size}-one", out, rank=4)
    options = {"rank": 4} if name == "lora" else {"donor": f"{size}.gguf"} if name.startswith("gguf") else {}
    return merge_as(f"{size}.yml", out, Format.of(name, **options))

for name in sys.argv[1:]:
    write(name, "small", f"small {name}")  # what is loaded and compiled the first time is no part of it
for name in sys.argv[1:]:
    ctypes.CDLL(None).malloc_trim(0)  # so that no format uses what another one has left
    print(name, peak_of(lambda: write(name, "large", f"large {name}")))
"""


def checkpoint(folder: Path, layers: int, size: int, seed: int) -> None:
    """A Llama whose matrices are the same noise in other rows; those with other seeds differ from the first in `up`."""
    heads = {"q": size, "k": size // 8, "v": size // 8, "o": size}
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, generator=random).bfloat16() / 50
    weights = {"model.embed_tokens.weight": noise[:128].clone(), "model.norm.weight": torch.ones(size).bfloat16()}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for place, part in enumerate(("mlp.gate", "mlp.up", "mlp.down")):
            weights[f"{at}.{part}_proj.weight"] = noise.roll(3 * layer + place, 0)
        if layer % 3 == 0:  # few, as a decomposition takes its time
            weights[f"{at}.mlp.up_proj.weight"] *= 1 + 0.25 * seed * torch.rand(size, size, generator=random).bfloat16()
        for part, rows in heads.items():
            weights[f"{at}.self_attn.{part}_proj.weight"] = noise.roll(layer, 1)[:rows].clone()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{norm}.weight"] = torch.ones(size).bfloat16()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": size,
        "intermediate_size": size,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "vocab_size": 128,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    if seed == 0:
        new_donor(folder.parent / f"{folder.name[:5]}.gguf", folder, "llama", shapes_of(weights, LLAMA))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_every_format_needs_the_memory_of_a_few_weights(tmp_path: Path) -> None:
    for kind, layers, size in (("small", 1, 128), ("large", 18, 1024)):
        for seed, name in enumerate(("one", "two")):
            checkpoint(tmp_path / f"{kind}-{name}", layers, size, seed)
        models = [{"model": f"{kind}-two", "parameters": {"weight": 0.5}}]
        recipe = {"merge_method": "task_arithmetic", "base_model": f"{kind}-one", "models": models}
        (tmp_path / f"{kind}.yml").write_text(json.dumps(recipe))
    whole = (tmp_path / "large-one/model.safetensors").stat().st_size / 1e6
    assert whole > 150
    formats = ["lora", "extract", "fp8", "gguf:q8_0", "gguf:q4_0", "gguf:bf16"]
    used = dict(line.rsplit(" ", 1) for line in printed_by(MEASURE, tmp_path, *formats).splitlines())
    assert [*used] == formats
    assert max(map(float, used.values())) < 120, used  # glibc keeps more or less of what is freed
