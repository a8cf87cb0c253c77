"""Several processes that train one model: who this one is, and what all of them agree on (DESIGN section 6).

Everything here works for a training of one process as well, where it costs nothing. A method of `World` whose
docstring says "together" is called by all ranks at the same point, or they wait for each other for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler

from rfdetr_core.data.loading import Draw, EpochSampler
from rfdetr_core.errors import ConfigError
from rfdetr_core.evaluation.detections import Detections

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others. One that is dead is noticed at once by who started it (see `launch`)."""

FILE_PART = 64 * 2**20
"""Bytes of a file that travel at once."""


@dataclass(frozen=True)
class World:
    """This process among those that train together; by default, alone."""

    rank: int = 0
    size: int = 1
    nodes: int = 1
    receives: bool = False  # files for its node: the first rank of each but the main one's

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, tells people, and decides."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Together: whether one of the ranks says yes."""
        return flag if self.size == 1 else bool(self._numbers([int(flag)]).any())

    def from_main(self, value: Any) -> Any:
        """Together: what the main rank has; plain JSON."""
        if self.size == 1:
            return value
        text = list(json.dumps(value).encode()) if self.is_main else []
        length = torch.tensor([len(text)], dtype=torch.int64)
        dist.broadcast(length, src=0)
        content = torch.tensor(text or [0] * int(length), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        return json.loads(bytes(content.tolist()))

    def file_from_main(self, path: Path) -> None:
        """Together: where the nodes have disks of their own, the main rank's file is on all of them; if it has one.

        Between machines only, and through host memory, in parts.
        """
        if self.nodes == 1:
            return
        size = self.from_main(path.stat().st_size if self.is_main and path.exists() else None)
        if size is None:
            return
        part = path.with_name(f".{path.name}.rank-{self.rank}")
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(path.open("rb")) if self.is_main else None
            target = stack.enter_context(part.open("wb")) if self.receives else None
            for begin in range(0, size, FILE_PART):
                length = min(FILE_PART, size - begin)
                content = source.read(length) if source is not None else bytes(length)
                block = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                dist.broadcast(block, src=0)
                if target is not None:
                    target.write(block.numpy().tobytes())
        if self.receives:
            part.replace(path)
        self.any(False)  # nobody reads it before all have it

    def mean(self, values: Tensor) -> Tensor:
        """Together: the mean over the ranks, element by element; on the device of `values`."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def share_buffers(self, module: nn.Module) -> None:
        """Together: give all ranks the main one's running statistics, which each has of its own images."""
        if self.size > 1:
            for buffer in module.buffers():
                if buffer.numel():
                    dist.broadcast(buffer, src=0)

    def own_stream(self, seed: int, step: int) -> None:
        """Give this rank torch's random numbers of its own for an optimizer step.

        The main rank goes on with its stream, which checkpoints hold; the others' depend on (seed, rank, step), so that
        they need not be stored.
        """
        if not self.is_main:
            torch.manual_seed(int(np.random.SeedSequence([seed, self.rank, step]).generate_state(1)[0]))

    def union(self, numbers: Iterable[int]) -> list[int]:
        """Together: the numbers that any rank has, each once, in order."""
        own = sorted(set(numbers))
        if self.size == 1:
            return own
        lengths = self._numbers([len(own)])  # (size, 1)
        longest = int(lengths.max())
        if longest == 0:
            return []
        rows = self._numbers(own + [0] * (longest - len(own)))  # (size, longest)
        return sorted({int(n) for row, length in zip(rows, lengths, strict=True) for n in row[: int(length)]})

    def texts(self, text: str) -> list[str]:
        """Together: what every rank says, in their order."""
        if self.size == 1:
            return [text]
        own = list(text.encode())
        lengths = self._numbers([len(own)])
        rows = self._numbers(own + [0] * (int(lengths.max()) - len(own)))
        return [bytes(row[: int(n)].tolist()).decode() for row, n in zip(rows, lengths, strict=True)]

    def gather(self, own: Detections) -> Detections:
        """Together: the detections of all ranks on the main one, in the order of the images; none on the others.

        Exact: a rank may have any number of them, none is padded, and none is counted twice.
        """
        if self.size == 1:
            return own
        packed = np.column_stack([own.images, own.labels, own.scores, own.boxes]).astype(np.float64)  # (D, 7)
        counts = self._numbers([len(packed)])[:, 0]
        # Ranks have unequal numbers, a collective has equal ones: the rest of each part is cut off again.
        part = torch.zeros((int(counts.max()), 7), dtype=torch.float64)
        part[: len(packed)] = torch.from_numpy(packed)
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.is_main else None
        dist.gather(part, parts, dst=0)
        if parts is None:
            return Detections.concatenate([])
        rows = torch.cat([piece[: int(count)] for piece, count in zip(parts, counts, strict=True)]).numpy()
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        return Detections(rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64), rows[:, 2], rows[:, 3:])

    def _numbers(self, own: list[int]) -> Tensor:
        """Together: (size, len(own)) int64, a row of each rank; all bring equally many."""
        mine = torch.tensor(own, dtype=torch.int64)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows)


ALONE = World()


_PLACE = (("GROUP_WORLD_SIZE", "1"), ("GROUP_RANK", "0"), ("LOCAL_RANK", "0"))
"""How torchrun tells a rank the number of nodes, which one it is on, and its number there."""


@contextmanager
def joined() -> Iterator[World]:
    """Meet the other ranks, as whoever started this process tells in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Tensors in host memory travel by gloo, those of a GPU by NCCL.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    nodes, node, local = (int(os.environ.get(name, default)) for name, default in _PLACE)
    yield World(dist.get_rank(), dist.get_world_size(), nodes, receives=node > 0 and local == 0)
    dist.destroy_process_group()  # not after an error: it would wait for ranks that never come


class ShareOfEpoch(EpochSampler):
    """This rank's part of every batch of the epoch that all ranks go through together.

    The ranks see, in the same optimizer step, the images that one process sees whose batches are as large as theirs
    together. Arguments as in `EpochSampler`, of one rank.
    """

    def __init__(self, images: int, world: World, *, batch_size: int, **settings: Any) -> None:
        super().__init__(images, batch_size=world.size * batch_size, **settings)
        self._part = slice(world.rank * batch_size, (world.rank + 1) * batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        return (batch[self._part] for batch in super().__iter__())


class ShareOfBatches(Sampler[list[int]]):
    """Every `size`-th batch of the images in their order: all ranks together see each image once.

    The batches are those of a single process, so that a loss that depends on who is together in a batch is the same.
    """

    def __init__(self, images: int, batch_size: int, world: World) -> None:
        starts = range(world.rank * batch_size, images, world.size * batch_size)
        self._batches = [list(range(start, min(start + batch_size, images))) for start in starts]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def chosen_devices(devices: int | str, accelerator: str) -> list[int]:
    """The device number of every rank; one number means that this process trains by itself.

    Args:
        devices: `train.devices`.
        accelerator: Fabric's name of it: "cuda", "mps" or "cpu". On a CPU the devices are processes.

    Raises:
        ConfigError: devices that are not there.
    """
    there = torch.cuda.device_count() if accelerator == "cuda" else 1
    if isinstance(devices, str) and "," in devices:
        listed = [int(part) for part in devices.removesuffix(",").split(",")]
        if accelerator != "cuda":
            raise _impossible(devices, f"names GPUs, and training is on {accelerator}", "give a count")
        if len(set(listed)) < len(listed) or max(listed) >= there:
            raise _impossible(devices, f"must name distinct GPUs of 0..{there - 1}", 'give a count, or "auto"')
        return listed
    count = there if devices == "auto" else int(devices)
    if count < 1 or (count > there and accelerator != "cpu"):
        raise _impossible(devices, f"this machine has {there} for {accelerator}", 'give fewer, or "auto"')
    return list(range(count))


def _impossible(devices: int | str, why: str, hint: str) -> ConfigError:
    return ConfigError(f"train.devices: {devices!r}: {why}", hint=hint)


def threads_per_rank(ranks: int, cores: int) -> int:
    """Threads of each rank's numeric libraries: a fair share of what one process would use, at least 1."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(given) if given.isdecimal() and int(given) > 0 else cores) // ranks)
