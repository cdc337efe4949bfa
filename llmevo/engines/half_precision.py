"""bfloat16 and float16 on CPUs that have no instructions for them: products of matrices are computed in float32.

Without such instructions (x86 before AVX-512, Apple's processors in PyTorch) a product of half-precision matrices is
several times slower than the same product in float32. Here the operands are converted, multiplied in float32 and the
result is rounded, which is what the instructions do; weights keep their type and their memory.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

FEW_ROWS = 8
"""Up to as many rows, reading the weights takes most of the time: a conversion would not pay."""

PRODUCTS: dict[Any, tuple[int, str]] = {
    functional.linear: (0, "input"),
    functional.scaled_dot_product_attention: (0, "query"),
    **dict.fromkeys((torch.bmm, torch.Tensor.bmm), (0, "input")),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), (0, "input")),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), (1, "mat1")),
    **dict.fromkeys((torch.baddbmm, torch.Tensor.baddbmm), (1, "batch1")),
    getattr(torch, "_grouped_mm", None): (0, "mat_a"),  # of a mixture's experts: functional.grouped_mm calls it
}
"""{a product: the place of its left matrix among the arguments, and its name}"""


class Float32Products(TorchFunctionMode):
    """A context in which products of half-precision matrices on the CPU are computed in float32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in PRODUCTS:
            place, called = PRODUCTS[func]
            left: Any = args[place] if place < len(args) else given.get(called)
            if _is_slow(left):
                wide = func(*map(_widened, args), **{name: _widened(value) for name, value in given.items()})
                return wide.to(left.dtype)
        return func(*args, **given)


def _is_slow(of: Any) -> bool:
    half = isinstance(of, Tensor) and of.device.type == "cpu" and of.dtype in (torch.bfloat16, torch.float16)
    return half and of.numel() > FEW_ROWS * of.shape[-1]


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def has_instructions(dtype: torch.dtype) -> bool:
    """Return whether this machine's CPU has instructions for products of a type that PyTorch uses."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():  # builds without oneDNN, such as those for macOS
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def fastest_products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """The context in which a device computes products of a type fastest: nothing changes but on CPUs without them."""
    return nullcontext() if device.type != "cpu" or has_instructions(dtype) else Float32Products()


def use_fastest_products(model: Any) -> None:
    """Let every forward pass of a transformers model, of its body and of its head run in `fastest_products`."""
    entered: list[AbstractContextManager[Any]] = []

    def enter(*_: Any) -> None:
        entered.append(fastest_products(model.device, model.dtype))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    parts: list[nn.Module | None] = [model, model.base_model, model.get_output_embeddings()]
    for part in {id(part): part for part in parts if part is not None}.values():
        part.register_forward_pre_hook(enter)
        part.register_forward_hook(leave, always_call=True)
