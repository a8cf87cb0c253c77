"""Processes that train together, one job after another: to start new ones for each would take ten times as long.

    python -m tests.training.ranks MEETING          with RANK and WORLD_SIZE

They do what `rfdetr_core.training.rank` does between its start and its end; that, and how `launch` deals with them,
is seen where a test trains with `devices` alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from rfdetr_core.errors import ExitError
from rfdetr_core.training import launch
from rfdetr_core.training.distributed import World
from rfdetr_core.training.loop import TrainingJob, TrainingResult, train
from rfdetr_core.training.nodes import Nodes


class Ranks:
    """So many processes that wait for jobs; `folder` is where they meet and leave what they say."""

    def __init__(self, count: int, folder: Path) -> None:
        self._folder = folder
        command = [sys.executable, "-m", "tests.training.ranks"]
        self._processes = []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            torchrun = {**{name: str(value) for name, value in place.items()}, "TORCHELASTIC_RUN_ID": "tests"}
            with self._log(rank).open("wb") as said:
                process = subprocess.Popen(
                    [*command, str(folder / "meeting")],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                    cwd=Path(__file__).parents[2],
                    env={
                        **launch._environment(count, Nodes()),
                        **torchrun,
                    },  # by which Fabric sees that it is not alone
                )
            self._processes.append(process)

    def train(self, job: TrainingJob) -> TrainingResult:
        """What `loop.train` does with this job on as many devices; its errors are those of the main rank."""
        folder = job.checkpoints / launch.FOLDER
        folder.mkdir(parents=True)
        launch._describe(job, folder)
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
        answers = [self._answer(rank) for rank in range(len(self._processes))]
        if "error" in answers[0]:
            kind, message = answers[0]["error"]
            raise launch._OURS[kind](message)
        return TrainingResult(**answers[0]["result"])

    def _answer(self, rank: int) -> dict[str, list[str] | dict[str, object]]:
        stdout = self._processes[rank].stdout
        assert stdout is not None
        line = stdout.readline()
        assert line, f"rank {rank} ended: {self._log(rank).read_text()}"
        return json.loads(line)

    def _log(self, rank: int) -> Path:
        return self._folder / f"log-{rank}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:  # they have nothing to lose
            with process:
                process.kill()


def main() -> None:
    rank, count, (_, meeting) = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    for line in sys.stdin:  # also ends with who started it
        folder = Path(line.strip())
        try:
            result = train(
                launch.read_job(folder),
                stop_requested=(folder / launch.STOP).exists,
                world=World(rank, count),
            )
            answer: dict[str, object] = {"result": asdict(result)}
        except ExitError as error:
            answer = {"error": [type(error).__name__, error.message]}
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
