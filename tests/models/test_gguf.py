"""GGUF files of quantized types as sources, against the `gguf` package's own dequantization."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from llmevo.errors import SourceError
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources

HIDDEN, WIDE, TOKENS = 256, 512, 40


def new_gguf(
    file: Path, kind: GGMLQuantizationType, without: Sequence[str] = (), parts: int = 0
) -> dict[str, torch.Tensor]:
    """Write a tiny Llama with MLPs of a type; return these as the package reads them.

    It lacks some tensors, and says that it is one of several parts.
    """
    writer = GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // 4)
    writer.add_vocab_size(TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(
        [chr(97 + place) if place < 26 else "ab" if place == 26 else f"<{place}>" for place in range(TOKENS)]
    )
    writer.add_token_types([1] * TOKENS)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(TOKENS - 2)
    writer.add_eos_token_id(TOKENS - 1)
    random = np.random.default_rng(1)

    if parts:
        writer.add_uint16("split.count", parts)

    def plain(name: str, *shape: int) -> None:
        if name not in without:
            writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))

    plain("token_embd.weight", TOKENS, HIDDEN)
    plain("output.weight", TOKENS, HIDDEN)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        plain(f"{name}.weight", HIDDEN)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        plain(f"blk.0.{name}.weight", HIDDEN, HIDDEN)
    found: dict[str, torch.Tensor] = {}
    entries, size = gguf.GGML_QUANT_SIZES[kind]
    for name, own, rows, columns in (
        ("ffn_gate", "gate_proj", WIDE, HIDDEN),
        ("ffn_up", "up_proj", WIDE, HIDDEN),
        ("ffn_down", "down_proj", HIDDEN, WIDE),
    ):
        # Small bytes: in any of the formats, scales of 16 bits are then finite.
        packed = random.integers(0, 60, (rows, columns // entries * size), dtype=np.uint8)
        writer.add_tensor(f"blk.0.{name}.weight", packed, raw_dtype=kind)
        values = gguf.quants.dequantize(packed, kind)
        found[f"model.layers.0.mlp.{own}.weight"] = torch.from_numpy(values.reshape(rows, columns))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


READ = (
    "Q5_0",
    "Q5_1",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
    "NVFP4",
    "Q8_0",
    "Q4_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_XS",
    "IQ4_NL",
    "IQ3_S",
    "IQ2_XXS",
    "IQ1_M",
)


@pytest.mark.parametrize("kind", READ)
def test_each_type_is_read_as_the_package_reads_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path / "cache"))
    expected = new_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType[kind])
    source: Any = Sources(tmp_path)[ModelReference.parse("tiny.gguf")]
    for name, weight in expected.items():
        assert weight.isfinite().all()
        # It is converted to bfloat16.
        torch.testing.assert_close(
            source.tensor(name).float(), weight, rtol=2**-7, atol=1e-4 * float(weight.abs().max())
        )


def test_a_torn_file_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path / "cache"))
    new_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0)
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match=r"tiny\.gguf: could not be converted to a Hugging Face folder"):
        Sources(tmp_path)[ModelReference.parse("tiny.gguf")]
    assert not [*(tmp_path / "cache" / "gguf").iterdir()]


@pytest.mark.parametrize(
    ("without", "parts", "says"),
    [
        (["blk.0.attn_q.weight"], 0, r"it lacks model\.layers\.0\.self_attn\.q_proj\.weight of the model"),
        (["blk.0.attn_q.weight", "output_norm.weight"], 0, r"it lacks model\.layers\.0.* and 1 more of the model"),
        ([], 2, r"one of 2 parts of a model; join them \(`llama-gguf-split --merge"),
    ],
)
def test_a_file_without_all_weights_is_refused_and_leaves_nothing(
    without: list[str], parts: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path / "cache"))
    new_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0, without, parts)
    with pytest.raises(SourceError, match=says):
        Sources(tmp_path)[ModelReference.parse("tiny.gguf")]
    assert not [*(tmp_path / "cache" / "gguf").iterdir()]


def test_a_file_without_a_head_has_the_embeddings_as_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path / "cache"))
    new_gguf(tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0, ["output.weight"], parts=1)
    reference = ModelReference.parse("tiny.gguf")
    sources = Sources(tmp_path)
    assert "lm_head.weight" not in sources[reference].shapes
    assert sources.config(reference)["tie_word_embeddings"]
