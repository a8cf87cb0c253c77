"""torch.compile of the whole model: one graph without a break, at fixed and at changing sizes, equal to eager."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

from rfdetr_core.config import ModelConfig
from rfdetr_core.models.detector import RFDETR
from tests.models import golden

# Half the blocks of nano: it compiles in half the time.
PICO: dict[str, Any] = {
    **golden.TINY,
    "variant": "pico",
    "resolution": 64,
    "dec_layers": 2,
}
SIZES = [64, 48, 80, 96]  # the positional table is 64's
COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler: none is installed")


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pico() -> RFDETR:
    model = RFDETR(ModelConfig(**PICO))
    golden.fill_w1(model)
    return model


def assert_equal_to_eager(model: RFDETR, backend: str, sizes: list[int], *, dynamic: bool) -> None:
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for size in sizes:
        images = golden.gauss(size, (2, 3, size, size))
        with torch.no_grad():
            found, expected = compiled(images), model(images)
        assert_allclose(found["pred_boxes"], expected["pred_boxes"], rtol=0, atol=2e-5)
        assert_allclose(found["pred_logits"], expected["pred_logits"], rtol=0, atol=1e-4)


def test_one_size() -> None:
    assert_equal_to_eager(pico().eval(), "aot_eager", SIZES[:1], dynamic=False)


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [False, True], ids=["a graph per size", "sizes left open"])
def test_every_size_of_multi_scale(dynamic: bool) -> None:
    assert_equal_to_eager(pico().eval(), "aot_eager", SIZES, dynamic=dynamic)


def assert_equal_gradients(model: RFDETR, compiled: Any, size: int) -> None:
    """Of a model in float64: in float32 rounding turns single units of a ReLU on or off."""
    images, gradients = golden.gauss(size, (2, 3, size, size)).double(), []
    for call in (model, compiled):
        model.zero_grad()
        outputs = call(images)
        layers = [outputs, outputs["enc_outputs"], *outputs["aux_outputs"]]
        sum(layer["pred_logits"].sum() + layer["pred_boxes"].sum() for layer in layers).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        assert_allclose(gradients[1][name], gradient, rtol=0, atol=1e-9 * scale + 1e-12, err_msg=name)


@pytest.mark.long
def test_training_with_gradients() -> None:
    model = pico().double().train()
    assert_equal_gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), 64)


@pytest.mark.long
def test_training_at_every_size_of_multi_scale() -> None:
    """The second size leaves them open, and no other one is compiled again."""
    model, graphs = pico().double().train(), [0]

    def counting(graph: Any, inputs: Any) -> Any:
        graphs[0] += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for size in SIZES:
        assert_equal_gradients(model, compiled, size)
    assert graphs == [2]


@COMPILER
@pytest.mark.long
def test_inductor() -> None:
    assert_equal_to_eager(pico().eval(), "inductor", SIZES[:1], dynamic=False)
