"""How much memory a device has, and what a step took of it."""

from __future__ import annotations

import gc
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rfdetr_core import hardware


@dataclass(frozen=True)
class Device:
    """What a probe or a training ran on."""

    kind: str  # cuda, mps or cpu
    name: str
    memory_bytes: int  # what the device or the cgroup has
    driver: str  # of the device; "" on a CPU


def describe(device: torch.device) -> Device:
    """The device of this process."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Device("cuda", properties.name, int(properties.total_memory), _driver())
    if device.type == "mps":
        return Device("mps", "mps", int(torch.mps.recommended_max_memory()), platform.mac_ver()[0])
    return Device("cpu", "cpu", hardware.memory_limit(), "")


def _driver() -> str:
    """Version of the kernel's driver, with the CUDA version that torch was built for."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
        driver = next((word for word in words if word[:1].isdigit()), "unknown")
    except OSError:
        driver = "unknown"
    return f"{driver}, CUDA {torch.version.cuda}"


class DeviceMemory(ABC):
    """Measures the peak of what runs between `begin` and `peak`."""

    @abstractmethod
    def available(self) -> int:
        """Bytes that this process may hold on the device, those included that it holds."""

    @abstractmethod
    def begin(self) -> None:
        """Give back what is cached, and let the peak begin anew."""

    @abstractmethod
    def peak(self) -> int:
        """Most bytes held since `begin`."""

    def kept(self) -> int:
        """Bytes held right after `begin`, where every shape that was computed adds to them; 0 where none does."""
        return 0

    @abstractmethod
    def left(self) -> int:
        """Bytes that are held and of no use, after all was freed: what fragmentation leaves behind."""

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Inside, running out of memory is an exception."""
        yield


class CudaMemory(DeviceMemory):
    """The caching allocator's view: what it has reserved no one else can have.

    The context and the libraries' own memory are not free to begin with, and so not available.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def available(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free) + torch.cuda.memory_reserved(self._device)

    def begin(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device)

    def left(self) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)


class MpsMemory(DeviceMemory):
    """There is no record of the peak: what the driver holds after a step, as the allocator keeps what it had."""

    def available(self) -> int:
        return int(torch.mps.recommended_max_memory())

    def begin(self) -> None:
        gc.collect()
        torch.mps.empty_cache()

    def peak(self) -> int:
        torch.mps.synchronize()
        return int(torch.mps.driver_allocated_memory())

    def left(self) -> int:
        self.begin()
        return int(torch.mps.driver_allocated_memory() - torch.mps.current_allocated_memory())


class CpuMemory(DeviceMemory):
    """The resident size of this process, within what its cgroup and the machine leave to it."""

    def available(self) -> int:
        return hardware.available_memory()

    def begin(self) -> None:
        gc.collect()
        hardware.return_freed_memory()
        hardware.forget_peak()

    def peak(self) -> int:
        return hardware.peak_rss()

    def kept(self) -> int:
        return hardware.resident_bytes()  # oneDNN keeps the kernels that it made for a shape

    def left(self) -> int:
        before = hardware.resident_bytes()
        gc.collect()
        hardware.return_freed_memory()
        return max(0, before - hardware.resident_bytes())

    @contextmanager
    def guarded(self) -> Iterator[None]:
        torch.ones(2**20).add_(1)  # starts OpenMP's threads; without room for their stacks it ends the process
        with hardware.memory_guard(self.available()):
            yield


def memory_of(device: torch.device) -> DeviceMemory:
    """The measure that goes with a device."""
    if device.type == "cuda":
        return CudaMemory(device)
    return MpsMemory() if device.type == "mps" else CpuMemory()
