"""Memory of results that serves again."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmevo.merging.kernels.blocks import SMALLEST, Buffers

SHAPE = (256, SMALLEST // 256)


def test_the_memory_of_a_tensor_that_is_gone_serves_again() -> None:
    buffers = Buffers()
    first = buffers.empty(SHAPE, torch.float32)
    address = first.data_ptr()
    del first
    gc.collect()
    assert buffers.idle == 4 * SMALLEST
    again = buffers.empty(SHAPE[::-1], torch.float32)
    assert again.data_ptr() == address
    assert buffers.idle == 0


VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda tensor: tensor.view(-1),
    "slice": lambda tensor: tensor[3:5, 1:],
    "numpy": lambda tensor: tensor.numpy(),
    "transposed": lambda tensor: tensor.T,
    "parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("view", VIEWS)
def test_as_long_as_anybody_sees_a_tensor_its_memory_is_its_own(view: str) -> None:
    buffers = Buffers()
    tensor = buffers.empty(SHAPE, torch.float32).fill_(7.0)
    seen = VIEWS[view](tensor)
    del tensor
    gc.collect()
    assert buffers.idle == 0
    buffers.empty(SHAPE, torch.float32).fill_(8.0)
    assert (seen == 7.0).all()


def test_no_more_is_kept_than_allowed_and_small_tensors_not_at_all() -> None:
    buffers = Buffers(most=5 * SMALLEST)
    tensors = [buffers.empty(SHAPE, torch.bfloat16) for _ in range(4)]
    assert all(tensor.dtype == torch.bfloat16 and tensor.shape == SHAPE for tensor in tensors)
    del tensors
    buffers.empty((3, 4), torch.float32)
    buffers.empty((0, 4), torch.float32)
    gc.collect()
    assert buffers.idle == 4 * SMALLEST
