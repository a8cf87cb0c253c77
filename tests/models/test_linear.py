"""The linear layers: equal to PyTorch's own in value and gradient, and what is kept is never out of date."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose
from torch import Tensor, nn

from rfdetr_core.models import linear as module
from rfdetr_core.models.linear import Activation, Linear, constant_weights, linear, vouch_for
from rfdetr_core.training.ema import ModelEMA
from tests.models import golden

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


def reference(layer: nn.Linear, x: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("width_in", "width_out"), [(24, 96), (96, 24), (32, 32)])
@pytest.mark.parametrize("shape", [(40,), (3, 20), (2, 2, 10), (3,)])  # the last has too few rows for oneDNN
@pytest.mark.parametrize("mkl", [True, False])
def test_values_and_gradients(
    activation: Activation,
    width_in: int,
    width_out: int,
    shape: tuple[int, ...],
    mkl: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MKL_IS_FASTER", mkl)
    torch.manual_seed(0)
    layer = Linear(width_in, width_out, activation=activation)
    x = torch.randn(*shape, width_in, requires_grad=True)
    cotangent = torch.randn(*shape, width_out)
    found = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], cotangent)
    expected = torch.autograd.grad(reference(layer, x, activation), [x, layer.weight, layer.bias], cotangent)
    assert_allclose(layer(x).detach(), reference(layer, x, activation).detach(), rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert_allclose(layer(x), reference(layer, x, activation), rtol=1e-5, atol=1e-6)


def test_inputs_that_do_not_lie_in_rows() -> None:
    torch.manual_seed(0)
    layer, x = Linear(12, 16), torch.randn(12, 5, 8).permute(1, 2, 0).requires_grad_()
    found = torch.autograd.grad(layer(x).sum(), [x, layer.weight])
    expected = torch.autograd.grad(reference(layer, x, "none").sum(), [x, layer.weight])
    for a, b in zip(found, expected, strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_only_what_is_wanted_gets_a_gradient() -> None:
    layer = Linear(16, 24).requires_grad_(False)
    layer.bias.requires_grad_(True)
    x = torch.randn(20, 16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.bias.grad is not None and layer.weight.grad is None
    fixed = torch.randn(20, 16)
    layer.weight.requires_grad_(True)
    layer(fixed).sum().backward()
    assert fixed.grad is None and layer.weight.grad is not None


def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    product = module._product
    monkeypatch.setattr(module, "_product", lambda *arguments: calls.append(arguments) or product(*arguments))
    return calls


@pytest.mark.parametrize(("mkl", "activation", "products"), [(False, "none", 2), (True, "none", 0), (True, "relu", 1)])
def test_onednn_does_it_where_it_is_fastest(
    monkeypatch: pytest.MonkeyPatch, mkl: bool, activation: Activation, products: int
) -> None:
    monkeypatch.setattr(module, "_MKL_IS_FASTER", mkl)
    calls, x = called(monkeypatch), torch.randn(20, 16)
    layer = Linear(16, 16, activation=activation)
    layer(x.requires_grad_()).sum().backward()
    assert len(calls) == products  # forward, and the gradient of x
    with torch.no_grad():
        layer(x)
    assert len(calls) == products + 1


def test_others_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, layer, x = called(monkeypatch), Linear(16, 16, activation="relu"), torch.randn(20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    assert linear(x.bfloat16(), torch.randn(8, 16).bfloat16(), None).dtype == torch.bfloat16
    layer.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another exporter; the old one is what ONNX export uses
        traced = torch.jit.trace(layer, x, check_trace=False)
    assert "mkldnn" not in str(traced.graph)
    monkeypatch.setattr(module, "_AVAILABLE", False)
    assert_allclose(layer(x).detach(), reference(layer, x, "relu").detach(), rtol=1e-5, atol=1e-6)
    assert not calls


def change_through_data(layer: Linear) -> None:
    layer.weight.data.copy_(torch.randn(24, 16))


def change_through_numpy(layer: Linear) -> None:
    layer.weight.detach().numpy()[...] += 1.0


def change_by_fused_optimizer(layer: Linear) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer.weight.grad, layer.bias.grad = torch.ones(24, 16), torch.ones(24)
    optimizer.step()


def change_in_place(layer: Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2.0)


def change_by_loading(layer: Linear) -> None:
    layer.load_state_dict({name: value * 3.0 for name, value in layer.state_dict().items()})


def change_by_assignment(layer: Linear) -> None:
    layer.weight = nn.Parameter(torch.randn(24, 16))


def change_type_and_back(layer: Linear) -> None:
    layer.half().float().weight.data.add_(0.5)  # through .data: no version is counted, but moving forgets


LEAVE_A_TRACE = [change_in_place, change_by_loading, change_by_assignment, change_type_and_back]
LEAVE_NONE = [change_through_data, change_through_numpy, change_by_fused_optimizer]


@pytest.mark.parametrize("change", LEAVE_A_TRACE + LEAVE_NONE)
@torch.no_grad()
def test_no_change_of_the_weights_is_missed(change: Any) -> None:
    torch.manual_seed(0)
    layer, x = Linear(16, 24).eval(), torch.randn(20, 16)
    before = layer(x)
    with constant_weights(layer):
        assert_allclose(layer(x), before, rtol=1e-5, atol=1e-6)
        assert layer.kept._value is not None
    change(layer)
    assert not torch.allclose(layer(x), before)
    assert_allclose(layer(x), reference(layer, x, "none"), rtol=1e-5, atol=1e-6)
    assert layer.kept._value is None


@pytest.mark.parametrize("change", LEAVE_A_TRACE)
@torch.no_grad()
def test_a_broken_promise_is_noticed_where_it_leaves_a_trace(change: Any) -> None:
    torch.manual_seed(0)
    layer, x = Linear(16, 24).eval(), torch.randn(20, 16)
    vouch_for(layer)
    before = layer(x)
    change(layer)
    assert not torch.allclose(layer(x), before)
    assert_allclose(layer(x), reference(layer, x, "none"), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_detector_sees_every_change_of_its_weights() -> None:
    """Of each parameter that an evaluation depends on, there and back, without train() in between."""
    torch.manual_seed(0)
    model = golden.build(variant="pico", **{**golden.TINY, "resolution": 64, "dec_layers": 2}).eval()
    images = golden.gauss(1, (1, 3, 48, 80))  # the positional table is another size's

    def same_as_ever() -> bool:
        return all(torch.equal(found, value) for found, value in zip(model(images).values(), ever, strict=True))

    ever = [value.clone() for value in model(images).values()]
    for name, parameter in model.named_parameters():
        saved = parameter.clone()
        parameter.data.copy_(saved + 0.3 * torch.randn_like(saved))
        unused = "mask_token" in name or re.search(r"\.enc_\w+\.[12]\.", name)  # groups of training alone
        assert same_as_ever() is bool(unused), name
        parameter.data.copy_(saved)
        assert same_as_ever(), name


@torch.no_grad()
def test_what_is_kept_follows_an_average() -> None:
    torch.manual_seed(0)
    layer, x = nn.Sequential(Linear(16, 24)), torch.randn(20, 16)
    ema = ModelEMA(layer, decay=0.5, tau=0)
    for _ in range(3):
        with constant_weights(ema.module):
            assert_allclose(ema.module(x), reference(ema.module[0], x, "none"), rtol=1e-5, atol=1e-5)
        layer[0].weight.add_(1.0)
        ema.update()


@torch.no_grad()
def test_keeping_is_once_and_as_long_as_someone_vouches() -> None:
    layer, x = Linear(16, 24), torch.randn(20, 16)
    with constant_weights(layer):
        layer(x)
        first = layer.kept._value
        assert first is not None
        with constant_weights(layer):
            layer(x)
        layer(x)
        assert layer.kept._value is first
        assert copy.deepcopy(layer).kept.vouched == 0
    assert layer.kept._value is None
    with pytest.raises(ZeroDivisionError), constant_weights(layer):
        layer(x)
        _ = 1 / 0
    assert layer.kept._value is None and layer.kept.vouched == 0


def test_what_is_differentiated_is_not_kept() -> None:
    layer, x = Linear(16, 24), torch.randn(20, 16)
    with constant_weights(layer):
        for learned in (layer.weight, layer.bias):
            layer.requires_grad_(False)
            learned.requires_grad_(True)
            layer(x).sum().backward()
            assert learned.grad is not None and layer.kept._value is None
        layer.requires_grad_(False)
        assert_allclose(layer(x), reference(layer, x, "none"), rtol=1e-5, atol=1e-6)  # a frozen layer in training
        assert layer.kept._value is not None


def test_weights_made_for_inference() -> None:
    with torch.inference_mode():
        layer = Linear(16, 24).eval()
        x = torch.randn(20, 16)
        with constant_weights(layer):
            layer(x)
            layer.weight.mul_(2.0)
            assert_allclose(layer(x), reference(layer, x, "none"), rtol=1e-5, atol=1e-6)
