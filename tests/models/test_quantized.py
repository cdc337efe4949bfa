"""Quantized checkpoints as sources: each format equals what the library that writes it reads, and errors are named."""

from pathlib import Path

import pytest
import torch

from llmevo.models.quantized_checkpoint import QuantizedCheckpoint, quantization_of
from support.checkpoints import new_checkpoint, weights_of
from support.quantized import KINDS, quantized_checkpoint

UP = "model.layers.1.mlp.up_proj"


def opened(folder: Path) -> QuantizedCheckpoint:
    given = quantization_of(folder)
    assert given
    return QuantizedCheckpoint(folder, given)


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_is_read_as_its_library_reads_it(kind: str, tmp_path: Path) -> None:
    expected = quantized_checkpoint(tmp_path / "model", kind)
    source = opened(tmp_path / "model")
    assert {name: tuple(weight.shape) for name, weight in expected.items()} == dict(source.shapes)
    for name, weight in expected.items():
        torch.testing.assert_close(source.tensor(name).float(), weight.float(), rtol=1e-6, atol=1e-8)
    exact = weights_of(new_checkpoint(tmp_path / "exact", 1, hidden=64, layers=2))
    differing = (source.tensor(f"{UP}.weight").float() - exact[f"{UP}.weight"]).norm() / exact[f"{UP}.weight"].norm()
    assert 1e-4 < differing < 0.35
