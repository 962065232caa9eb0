"""What every link asks of the tensors that it is given."""

from __future__ import annotations

import torch
from torch import Tensor

SUMMABLE = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
    }
)


def check_contiguous(tensor: Tensor, operation: str) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{operation}: a tensor of strides {tensor.stride()}; allowed: contiguous")


def check_summable(tensor: Tensor, operation: str) -> None:
    """Refuse here what some backend cannot sum, so that all links take the same."""
    check_contiguous(tensor, operation)
    if tensor.dtype not in SUMMABLE:
        allowed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in SUMMABLE))
        raise ValueError(f"{operation}: cannot sum {tensor.dtype}; allowed: {allowed}")


def check_parts(target: Tensor, parts: Tensor, size: int, operation: str) -> None:
    """Refuse what is not one part like the target for each of so many ranks."""
    check_summable(target, operation)
    check_contiguous(parts, operation)
    if parts.dtype != target.dtype or parts.shape != (size, *target.shape):
        raise ValueError(
            f"{operation}: parts of {tuple(parts.shape)} {parts.dtype} for a sum of "
            f"{tuple(target.shape)} {target.dtype}; allowed: ({size}, *{tuple(target.shape)}) of "
            "its type"
        )


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes, so that any type can be moved."""
    return tensor.detach().reshape(-1).view(torch.uint8)
