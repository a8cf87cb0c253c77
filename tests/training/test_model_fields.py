"""Fields of the model section that choose how training computes, not what: kernels, compilation, the device."""

from __future__ import annotations

import functools
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rfdetr_core.errors import ConfigError
from rfdetr_core.training import engine as module
from rfdetr_core.training.engine import Engine, build_engine, first_device
from tests.training import tiny

BATCHES = [tiny.batch(0, boxes=(3, 2)), tiny.batch(1, boxes=(0, 1))]


def engine(model: dict[str, Any], **train: Any) -> Engine:
    torch.manual_seed(0)
    return build_engine(tiny.model_config(**model), tiny.train_config(**train))


def stepped(built: Engine) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps, and the weights then."""
    losses = []
    for step in range(3):
        terms = built.optimizer_step(BATCHES, factor=1.0, global_step=step)
        assert terms is not None
        losses.append(float(terms["loss"]))
    return losses, built.raw_model.state_dict()


@pytest.mark.parametrize("fused", [True, False])
def test_the_kernel_of_adamw_is_chosen(fused: bool) -> None:
    built = engine({"fused_optimizer": fused})
    assert {group["fused"] for group in built.optimizer.param_groups} == {fused}


def test_both_kernels_do_the_same() -> None:
    (losses, weights), (others, other_weights) = (
        stepped(engine({"fused_optimizer": fused})) for fused in (True, False)
    )
    assert losses == pytest.approx(others, rel=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], rtol=0, atol=3e-4)  # Adam makes steps of rounding


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compilation is refused where no g++ is installed")
def test_a_compiled_step_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the backend that runs the graph as it is; tests/models/test_compile.py has the generated code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = engine({}, lr=1e-6, lr_encoder=1e-6), engine({"compile": True}, lr=1e-6, lr_encoder=1e-6)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    (losses, weights), (others, other_weights) = stepped(plain), stepped(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert losses == pytest.approx(others, rel=1e-4)
    assert weights.keys() == other_weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], rtol=0, atol=1e-5)
    with torch.no_grad():  # the weights themselves are evaluated as ever
        compiled.raw_model.eval()(torch.zeros(1, 3, 48, 48))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("device", "missing"), [("cpu", r"no g\+\+"), ("meta", "no gcc and no clang")], ids=["CPU", "another"]
)
def test_without_a_compiler_it_is_refused(device: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "shutil", SimpleNamespace(which=lambda name: None))
    with torch.device(device):
        model = module.RFDETR(tiny.model_config())
    with pytest.raises(ConfigError, match=f"^model.compile: true needs a compiler, and this machine has {missing}"):
        module.compiled(model)
    if device == "cpu":
        with pytest.raises(ConfigError, match=r"model\.compile"):
            engine({"compile": True})


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("Python.h: No such file")

    monkeypatch.setattr(module, "shutil", SimpleNamespace(which=lambda name: name))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    torch.compiler.reset()
    with pytest.raises(ConfigError, match=r"^model.compile: true does not work here: .*leave it at false") as caught:
        engine({"compile": True}).optimizer_step(BATCHES[:1], factor=1.0, global_step=0)
    assert "\n" not in str(caught.value)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("accelerator", "devices", "expected"),
    [
        ("auto", 1, "cuda"),
        ("gpu", 4, "cuda"),
        ("cuda", "2,", "cuda:2"),
        ("auto", "3,1", "cuda:3"),
        ("cuda", "7,", "cuda"),  # not on this machine: `chosen_devices` refuses it for training
        ("cpu", "2,", "cpu"),
        ("cpu", 2, "cpu"),
    ],
)
def test_the_first_device(accelerator: str, devices: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert first_device(tiny.train_config(accelerator=accelerator, devices=devices)) == torch.device(expected)


@pytest.mark.parametrize(("devices", "expected"), [(1, 1), ("2,", [2])])
def test_a_single_process_trains_there(devices: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(module.lightning_fabric, "Fabric", lambda **words: asked.append(words))
    module._fabric(tiny.train_config(accelerator="cuda", devices=devices), "32-true", module.ALONE, False)
    assert asked == [{"accelerator": "cuda", "devices": expected, "precision": "32-true"}]
