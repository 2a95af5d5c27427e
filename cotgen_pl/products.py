"""Float32 products with weights on a CPU, by oneDNN in place of the library behind `F.linear`.

torch's builds for x86 call MKL there, which leaves half of an AMD processor's width unused; oneDNN,
which torch calls for convolutions, asks no processor for its maker. Same operations, same type,
other order of sums. Everywhere else, and where it would not pay, `F.linear` itself is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# A weight is brought into oneDNN's order at each call, which fewer rows do not pay back. Forward
# and backward with [384, 128] (a layer of the Shapes model) on one core: 64 rows 1.1 times as fast,
# 128 rows 1.4, 1,024 rows 2.0.
ROWS_THAT_PAY = 128


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` without gradient, for weights that may be packed.

    Args:
        hidden: [..., inputs].
        weight: [outputs, inputs], as it is or as `pack` gives it.
        bias: [outputs].

    Returns:
        [..., outputs].
    """
    if weight.is_mkldnn:
        return _by_onednn(hidden, weight, None if bias is None else bias.contiguous())
    return F.linear(hidden, weight, bias)


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight [outputs, inputs] in oneDNN's order where it has one, else itself.

    For large ones: a thin one, such as an adapter's, takes longer so. Read by `product` alone.
    However few the rows, nothing is brought into order at each call: 2
    rows with [2816, 512] take half the time (one core of an AMD EPYC), 256 rows 0.43 of it.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight) if _has_order(weight) else weight


def products_on(device: torch.device, *, made_once: bool) -> AbstractContextManager[Any]:
    """Inside of it, `F.linear` of code that is not ours is oneDNN's where that pays.

    Gradients are of first order, and by `backward` or `torch.autograd.grad` alone.

    Args:
        device: Elsewhere than on a CPU nothing changes.
        made_once: Neither compiled nor made again in the backward pass (checkpointing), where
            layers would be made without it. Else nothing changes.
    """
    return _OneDNNProducts() if made_once and device.type == "cpu" else nullcontext()


class _OneDNNProducts(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace one function, hand on all others."""
        kwargs = kwargs or {}
        if func is F.linear and not kwargs and _pays(*args):
            return _Product.apply(*args)
        return func(*args, **kwargs)


def _pays(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    if not _has_order(weight) or hidden.dtype != torch.float32:
        return False
    if bias is not None and not (bias.shape == weight.shape[:1] and _is_plain(bias)):
        return False
    return hidden.numel() >= ROWS_THAT_PAY * weight.shape[1]


def _is_plain(bias: Tensor) -> bool:
    """Whether oneDNN, which reads one number behind the other, reads it right."""
    return bias.dtype == torch.float32 and bias.is_contiguous()


def _has_order(weight: Tensor) -> bool:
    """Whether oneDNN takes it: a plain tensor, of two dimensions, not empty, not under autocast."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2 and weight.numel() > 0
    if not plain or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    is_there = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return is_there and not torch.is_autocast_enabled("cpu")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for_hidden, for_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(hidden if for_weight else None, weight if for_hidden else None)
        return _by_onednn(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        for_hidden, for_weight, *for_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            _by_onednn(grad, weight.t()) if for_hidden else None,
            _by_onednn(rows.t(), hidden.flatten(0, -2).t()) if for_weight else None,
            *(rows.sum(0) if wanted else None for wanted in for_bias),
        )


def _by_onednn(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return found
