"""Linear layers that use oneDNN on a CPU, with bias and activation inside the product.

PyTorch sends float32 products on a CPU to BLAS, copies the bias into the result beforehand and runs the activation
over it afterwards. oneDNN does all three in one pass, and its kernels are as fast as MKL's on Intel and faster on other
processors (docs/benchmarks.md). Everywhere else, and wherever a graph is recorded, `F.linear` does the work.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Activation = Literal["none", "relu", "gelu"]

_MIN_ROWS = 8
"""Below so many rows the call itself is what costs."""


class Linear(nn.Linear):
    """`nn.Linear`: the same parameters, initial values and result."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def relu(self, x: Tensor) -> Tensor:
        """The layer, then ReLU."""
        return linear(x, self.weight, self.bias, "relu")

    def gelu(self, x: Tensor) -> Tensor:
        """The layer, then the exact GELU."""
        return linear(x, self.weight, self.bias, "gelu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """x (..., in) times weight (out, in), plus bias (out,), then the activation: (..., out)."""
    if not _suits_onednn(x, weight):
        return _activate(F.linear(x, weight, bias), activation)
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return _product(x, weight, bias, activation)
    if activation == "gelu":  # its gradient needs what went in
        return F.gelu(_product_with_gradient(x, weight, bias, "none"))
    return _product_with_gradient(x, weight, bias, activation)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can do it, and nothing is being recorded that should hold standard operators."""
    return (
        x.device.type == "cpu"
        and x.dtype is weight.dtype is torch.float32
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        and not torch.is_autocast_enabled("cpu")
        and x.numel() >= _MIN_ROWS * x.shape[-1]
        and _AVAILABLE
    )


def _activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x) if activation == "gelu" else x


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    # The operator that torch.compile itself lowers linear layers to; "none" of GELU's two forms is the exact one.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight, bias, activation, [], "none" if activation == "gelu" else ""
    )
    return result


def _product_with_gradient(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    result: Tensor = _Linear.apply(x, weight, bias, activation)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    """The product with its gradient; `activation` is none or relu."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        result = _product(x, weight, bias, activation)
        ctx.relu = activation == "relu"
        ctx.save_for_backward(x, weight, result if ctx.relu else None)
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, result = ctx.saved_tensors
        if ctx.relu:
            gradient = torch.ops.aten.threshold_backward(gradient, result, 0)
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x = _product(gradient, weight.t(), None, "none") if wants_x else None
        # Here BLAS is as fast: the inner dimension is the rows, many times the sides of the result.
        of_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if wants_weight else None
        return of_x, of_weight, rows.sum(0) if wants_bias else None, None


_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
