"""Memory of a device: what is read of CUDA, which is not here, by stand-ins; and of this process."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from rfdetr_core import hardware
from rfdetr_core.training.device_memory import CpuMemory, CudaMemory, MpsMemory, describe, memory_of

DEVICE = torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU of 80 bytes, 50 of them free and 20 reserved by this process."""
    state: dict[str, Any] = {"reserved": 20, "allocated": 12, "most": 30, "calls": []}

    def call(name: str, value: Any = None) -> Any:
        def record(*given: Any) -> Any:
            state["calls"].append((name, *given))
            return value() if callable(value) else value

        return record

    for name, value in {
        "mem_get_info": (50, 80),
        "memory_reserved": lambda: state["reserved"],
        "memory_allocated": lambda: state["allocated"],
        "max_memory_reserved": lambda: state["most"],
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "synchronize": None,
        "get_device_properties": types.SimpleNamespace(name="A GPU", total_memory=80),
    }.items():
        monkeypatch.setattr(torch.cuda, name, call(name, value))
    return state


def test_what_a_process_holds_on_a_gpu_is_available_to_it(cuda: dict[str, Any]) -> None:
    assert CudaMemory(DEVICE).available() == 70
    assert ("mem_get_info", DEVICE) in cuda["calls"]


def test_the_peak_is_what_was_reserved_since_the_caches_were_emptied(cuda: dict[str, Any]) -> None:
    memory = memory_of(DEVICE)
    memory.begin()
    assert [name for name, *_ in cuda["calls"]] == ["empty_cache", "reset_peak_memory_stats"]
    assert memory.peak() == 30
    assert cuda["calls"][-2:] == [("synchronize", DEVICE), ("max_memory_reserved", DEVICE)]


def test_what_is_reserved_and_not_used_is_left_by_fragmentation(cuda: dict[str, Any]) -> None:
    assert CudaMemory(DEVICE).left() == 8


def test_a_gpu_is_described(cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    device = describe(DEVICE)
    assert (device.kind, device.name, device.memory_bytes) == ("cuda", "A GPU", 80)
    assert device.driver.endswith(", CUDA 13.2")


def test_each_device_has_its_measure() -> None:
    assert isinstance(memory_of(torch.device("mps")), MpsMemory)
    assert isinstance(memory_of(torch.device("cpu")), CpuMemory)
    assert describe(torch.device("cpu")).memory_bytes == hardware.memory_limit()


def test_the_peak_of_a_cpu_begins_anew() -> None:
    memory = CpuMemory()
    memory.begin()
    before = memory.peak()
    held = torch.ones(50_000_000)
    assert memory.peak() - before > 150_000_000
    del held
    memory.begin()
    assert memory.peak() - before < 50_000_000
