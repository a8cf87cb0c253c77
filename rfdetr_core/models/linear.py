"""Linear layers that use oneDNN on a CPU, with bias and activation inside the product.

PyTorch sends float32 products on a CPU to MKL, copies the bias into the result beforehand and runs the activation
over it afterwards. oneDNN does all three in one pass. Where someone vouches for the weights, as evaluation and
prediction do, they are kept in oneDNN's own order, which makes its kernels the faster ones everywhere. In training they
change at every step; then oneDNN is faster on other processors and MKL on Intel's (docs/benchmarks.md), where oneDNN is
left what it can fuse. Wherever a graph is recorded, and on other devices, `F.linear` does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Activation = Literal["none", "relu", "gelu"]

_MIN_ROWS = 8
"""Below so many rows the call itself is what costs."""


class Kept:
    """A tensor derived from parameters, kept while someone vouches that they stay as they are (`constant_weights`)."""

    def __init__(self) -> None:
        self.vouched = 0  # how many do
        self._key: Hashable = None
        self._value: Tensor | None = None

    def usable(self, *used: Tensor | None) -> bool:
        """Whether what is derived from these may be kept: nothing of it is recorded or differentiated either."""
        return self.vouched > 0 and not _recording() and not _differentiated(*used)

    def get(self, parameters: Sequence[Tensor], make: Callable[[], Tensor], *, of: Hashable = None) -> Tensor:
        """`make()`, or what it returned last for the same `of` if no version of the `parameters` has risen since.

        Versions are the second line: loading a state dict raises them; a change through `.data` does not.
        """
        if any(parameter.is_inference() for parameter in parameters):  # these count none
            return make()
        key = (of, *((parameter.data_ptr(), parameter._version) for parameter in parameters))
        if self._value is None or key != self._key:
            self._value, self._key = make().detach(), key
        return self._value

    def forget(self) -> None:
        """Free it."""
        self._key, self._value = None, None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()  # a copied module has parameters of its own, and nobody vouched for them

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


class KeepingModule(nn.Module):
    """A module that keeps something in `kept`, and perhaps in other attributes; moving it frees that."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for kept in _kept_by(self):
            kept.forget()
        applied: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied


def vouch_for(module: nn.Module) -> None:
    """Promise that the parameters of a module stay as they are from now on."""
    for kept in _kept_by(module):
        kept.vouched += 1


@contextmanager
def constant_weights(*modules: nn.Module) -> Iterator[None]:
    """Promise that the parameters of the modules stay as they are inside, so that what is derived from them is kept.

    Without a promise nothing is: a change through `.data`, through numpy or by a fused optimizer leaves no trace, and
    to look for it in all weights would cost more than what keeping saves.
    """
    for module in modules:
        vouch_for(module)
    try:
        yield
    finally:
        for kept in (kept for module in modules for kept in _kept_by(module)):
            kept.vouched -= 1
            if not kept.vouched:
                kept.forget()


def _kept_by(module: nn.Module) -> Iterator[Kept]:
    return (value for part in module.modules() for value in vars(part).values() if isinstance(value, Kept))


class Linear(nn.Linear, KeepingModule):
    """`nn.Linear` and its activation: the same parameters, initial values and results."""

    def __init__(self, width_in: int, width_out: int, *, activation: Activation = "none") -> None:
        super().__init__(width_in, width_out)
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return linear_kept(self.kept, x, [self.weight], self.bias, self.activation)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """x (..., in) times weight (out, in), plus bias (out,), then the activation (GELU: the exact one): (..., out)."""
    if not _suits_onednn(x, weight):
        return _activate(F.linear(x, weight, bias), activation)
    if not _differentiated(x, weight, bias):
        return _product(x, weight, bias, activation)
    if _MKL_IS_FASTER and activation != "relu":
        return _activate(F.linear(x, weight, bias), activation)
    if activation == "gelu":  # its gradient needs what went in
        return F.gelu(_product_with_gradient(x, weight, bias, "none"))
    return _product_with_gradient(x, weight, bias, activation)


def linear_kept(
    kept: Kept, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, activation: Activation = "none"
) -> Tensor:
    """`linear` with the rows of all `weights`, whose packed form is taken from `kept` where that is allowed."""
    if not kept.usable(x, *weights, bias) or not _suits_onednn(x, weights[0]):
        return linear(x, _rows(weights), bias, activation)
    packed = kept.get(weights, lambda: _pack(_rows(weights), x))
    return _product(x, packed, bias, activation)


def _rows(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _recording() -> bool:
    """Whether a graph is made of what is computed, which should hold standard operators on the parameters."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def _differentiated(*used: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in used)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can do it, and nothing is being recorded."""
    return (
        x.device.type == "cpu"
        and x.dtype is weight.dtype is torch.float32
        and not _recording()
        and not torch.is_autocast_enabled("cpu")
        and x.numel() >= _MIN_ROWS * x.shape[-1]
        and _AVAILABLE
    )


def _pack(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the order that is fastest to multiply with as many rows as `x` has; opaque."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), x.numel() // x.shape[-1])
    return packed


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
    result: Tensor = _Linear.apply(x, weight, bias, activation)
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
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, result = ctx.saved_tensors
        if ctx.relu:
            gradient = torch.ops.aten.threshold_backward(gradient, result, 0)
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x = _input_gradient(gradient, weight) if wants_x else None
        of_weight = _weight_gradient(rows, x.reshape(-1, x.shape[-1])) if wants_weight else None
        return of_x, of_weight, rows.sum(0) if wants_bias else None, None


def _input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Gradient (..., out) times weight (out, in)."""
    return gradient @ weight if _MKL_IS_FASTER else _product(gradient, weight.t(), None, "none")


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient (M, out) transposed times x (M, in), where M is many times the sides of the result.

    Where MKL is not at home, oneDNN is a fifth faster if the result is wide, and slower otherwise.
    """
    if gradient.shape[1] < x.shape[1] and not _MKL_IS_FASTER:
        return _product(gradient.t(), x.t(), None, "none")
    return gradient.t() @ x


def _is_intel() -> bool:
    """Whether MKL runs on the processors it is tuned for; a fact of the machine, so that a run repeats bit by bit."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


_MKL_IS_FASTER = torch.backends.mkl.is_available() and _is_intel()  # type: ignore[no-untyped-call]
_AVAILABLE = torch.backends.mkldnn.is_available() and all(  # type: ignore[no-untyped-call]
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)
