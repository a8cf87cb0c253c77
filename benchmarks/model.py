"""Ours beside rfdetr 1.11.2, in one run: evaluation and training step, same weights, same inputs, taking turns.

    python -m benchmarks.model                         # CPU: nano, small, medium, 1 and 2 threads
    python -m benchmarks.model --variants nano --tasks eval --threads 2 --repeats 20
    python -m benchmarks.model --device cuda --precision bf16 --compile

Every case runs in two fresh processes, one of each side, which take turns; a ratio compares two neighbouring turns, so
a machine whose speed drifts slows both. `make peer` installs the reference. Its evaluation is timed in both its
forms: the one it evaluates with ("eval"), and the leaner one that it exports ("export").
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from benchmarks.sides import CLASSES
from rfdetr_core.config import ModelConfig
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.linear import linear
from tests.models.golden import fill_w1

REFERENCE_PYTHON = Path(__file__).parents[1] / ".peer" / "bin" / "python"
TURN_SECONDS = 0.5  # a turn is as many calls as fill this
LAST_WORDS = 20  # lines of a process that died
GIB = 2.0**30
GFLOP = {"nano": 29.0, "small": 50.8, "medium": 64.6, "base": 77.9, "large": 94.4, "large-deprecated": 362.7}
"""Of an evaluation of one image (model spec 1.2): the variants that both sides have."""


@dataclass(frozen=True)
class Case:
    """What is timed on both sides."""

    variant: str
    task: str  # eval, export or train
    batch: int
    resolution: int
    weights: str
    threads: int
    device: str
    precision: str
    compiled: bool
    allocator: str

    def title(self) -> str:
        """For the table."""
        place = f"{self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else self.device
        return f"{self.variant} {self.task} batch {self.batch}, {place}, {self.precision}" + (
            ", compiled" * self.compiled
        )


class Child:
    """A process of one side."""

    def __init__(self, side: str, python: Path, case: Case) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads), "MKL_NUM_THREADS": str(case.threads)}
        self.side = side
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("sides.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=environment,
        )
        self.ask(do="prepare", case={"side": side, **asdict(case)})

    def ask(self, **request: Any) -> Any:
        """Send one request, wait for its answer; SystemExit with the child's last words if it died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            self.said.seek(0)
            last = "".join(self.said.readlines()[-LAST_WORDS:])
            self.__exit__()
            raise SystemExit(f"{last}error: the process of {self.side} died with code {code}, saying the above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Leaving closes the pipes, which ends the child; what a dead one did not read is lost.
        with contextlib.suppress(BrokenPipeError), self.said, self.process:
            pass


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per case."""
    arguments = _arguments(argv)
    if not REFERENCE_PYTHON.exists():
        print("error: the reference package is not installed (make peer)", file=sys.stderr)
        return 2
    print(f"{_processor()}, {os.cpu_count()} cores; torch {torch.__version__}, Python {platform.python_version()}")
    if arguments.device == "cpu":
        speeds = {threads: matrix_gflops(threads) for threads in arguments.threads}
        print("float32 products of 2048^3:", *(f"{speed:.0f} GFLOP/s on {n} threads" for n, speed in speeds.items()))
    else:
        speeds = {}
    header = (
        "case",
        "reference s",
        "ours s",
        "ratio min",
        "median",
        "max",
        "peak GiB ref",
        "ours",
        "difference",
        "of limit",
    )
    print(f"{header[0]:<44}" + "".join(f"{name:>14}" for name in header[1:]))
    with tempfile.TemporaryDirectory() as folder:
        for variant in arguments.variants:
            config = ModelConfig(variant=variant, num_classes=CLASSES)
            model, weights = RFDETR(config), Path(folder) / f"{variant}.pth"
            fill_w1(model, keep=False)
            torch.save({"model": model.state_dict()}, weights)
            del model
            for threads in arguments.threads if arguments.device == "cpu" else [1]:
                for task in arguments.tasks:
                    for batch in arguments.train_batches if task == "train" else arguments.batches:
                        case = Case(
                            variant=variant,
                            task=task,
                            batch=batch,
                            resolution=config.resolution,
                            weights=str(weights),
                            threads=threads,
                            device=arguments.device,
                            precision=arguments.precision,
                            compiled=arguments.compile,
                            allocator=arguments.allocator,
                        )
                        _run(case, arguments.repeats, speeds.get(threads))
    return 0


def matrix_gflops(threads: int, side: int = 2048) -> float:
    """What the processor can do: the best of a few matrix products, by the faster of the two libraries."""
    torch.set_num_threads(threads)
    a, b = torch.rand(side, side), torch.rand(side, side)
    best = math.inf
    with torch.inference_mode():
        for product in (lambda: a @ b, lambda: linear(a, b, None)):
            for _ in range(6):
                start = time.perf_counter()
                product()
                best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best / 1e9


def _run(case: Case, repeats: int, gflops: float | None) -> None:
    """Time one case; `gflops` is what the processor can do, for the share of it that our evaluation reaches."""
    with Child("ours", Path(sys.executable), case) as ours, Child("reference", REFERENCE_PYTHON, case) as reference:
        both = (reference, ours)
        pair = [child.ask(do="time", calls=2) for child in both]  # the first calls allocate, and compile
        calls = max(1, round(TURN_SECONDS / pair[0]["seconds"]))
        seconds: list[list[float]] = [[], []]
        for _ in range(repeats):
            pair = [child.ask(do="time", calls=calls) for child in both]
            for times, answer in zip(seconds, pair, strict=True):
                times.append(answer["seconds"])
        difference = _difference(case, ours, reference, pair)
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    medians = [statistics.median(times) for times in seconds]
    cells = [f"{m:.4f}" for m in medians] + [f"{f(ratios):.2f}" for f in (min, statistics.median, max)]
    cells += [f"{answer['peak'] / GIB:.2f}" for answer in pair]
    share = (
        "" if case.task == "train" or not gflops else f"{GFLOP[case.variant] * case.batch / medians[1] / gflops:.0%}"
    )
    print(f"{case.title():<44}" + "".join(f"{cell:>14}" for cell in [*cells, difference, share]), flush=True)


def _difference(case: Case, ours: Child, reference: Child, pair: Sequence[dict[str, float]]) -> str:
    """Between the outputs in evaluation, relative between the losses in training."""
    if case.task == "train":
        return f"{abs(pair[0]['loss'] / pair[1]['loss'] - 1.0):.0e} (loss)"
    a, b = ours.ask(do="outputs"), reference.ask(do="outputs")
    return f"{max(np.abs(np.subtract(a[name], b[name])).max() for name in a):.0e}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.model"
    )
    parser.add_argument("--variants", nargs="+", default=["nano", "small", "medium"], choices=[*GFLOP])
    parser.add_argument("--tasks", nargs="+", default=["eval", "export", "train"], choices=["eval", "export", "train"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="of eval and export")
    parser.add_argument("--train-batches", nargs="+", type=int, default=[2])
    parser.add_argument("--repeats", type=int, default=10, help="turns of each side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument(
        "--allocator",
        default="stage",
        choices=["stage", "system"],
        help="stage: ours keeps freed memory, as the train and evaluate stages do; system: as glibc has it",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
