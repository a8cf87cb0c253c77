"""The probe within a real memory limit: a cgroup of its own, where the kernel ends who takes more.

Making one needs root and a cgroup file system that can be written; without, the tests are skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rfdetr_core import hardware

ROOT = Path(__file__).parents[2]

PROBE = """
import json, sys
from rfdetr_core import hardware
from rfdetr_core.errors import RFDETRError
from rfdetr_core.training import batch_size
from tests.training import tiny
from tests.training.test_worst_case import facts
hardware.keep_freed_memory()
model, train, given = json.loads(sys.argv[1])
batch_size.CPU_SECONDS = 60.0
try:
    result = batch_size.probe(tiny.model_config(**model), tiny.train_config(**train), facts(**given))
    print("found " + json.dumps(result.to_json()))
except RFDETRError as error:
    print("found " + json.dumps({"error": str(error), "exit_code": error.exit_code}))
"""

STEPS = """
import contextlib, json, sys
from rfdetr_core import hardware
from rfdetr_core.training.device_memory import CpuMemory
from rfdetr_core.training.bench import build_bench
from rfdetr_core.training.worst_case import worst_case
from tests.training import tiny
from tests.training.test_worst_case import facts
hardware.keep_freed_memory()
CpuMemory.guarded = lambda self: contextlib.nullcontext()  # the kernel decides
model, train, given, batch_size, micro_batches, steps = json.loads(sys.argv[1])
model, train = tiny.model_config(**model), tiny.train_config(**train)
worst = worst_case(model, train, facts(**given))
bench = build_bench(model, train, worst)
for step in range(steps):
    bench._step(batch_size, worst.largest, micro_batches)
print("found " + json.dumps({"peak": hardware.peak_rss()}))
"""


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A cgroup below the root one, of version 1 or 2, that may use so many bytes and no swap."""
    name = f"rfdetr-test-{os.getpid()}"
    places = ((hardware.CGROUP / "memory", "memory.limit_in_bytes"), (hardware.CGROUP, "memory.max"))
    for base, file in places:
        folder = base / name
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if not (folder / file).exists():
                continue
            (folder / file).write_text(str(limit))
            yield folder
            return
        finally:
            for _ in range(50):  # the last process takes a moment to leave
                try:
                    folder.rmdir()
                    break
                except OSError:
                    time.sleep(0.1)
    pytest.skip("no memory cgroup can be made here: that needs root, and a writable /sys/fs/cgroup")


def run_within(limit: int, program: str, *argument: Any) -> tuple[int, dict[str, Any]]:
    """Exit code of a program in such a cgroup, and what it found."""
    with memory_cgroup(limit) as folder:
        shell = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        command = ["sh", "-c", shell, str(folder), sys.executable, "-c", program, json.dumps(argument)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    return done.returncode, json.loads(lines[-1].removeprefix("found ")) if lines else {"said": done.stderr[-2000:]}


MIB = 2**20
WIDE: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = (
    {"resolution": 96, "hidden_dim": 64},
    {"batch_size": "auto", "auto_batch_target_effective": 4096, "auto_batch_ema_headroom": 1.0, "multi_scale": "off"},
    {"train_images": 10**6},
)


def test_a_limit_below_one_image_is_an_error_and_no_kill() -> None:
    """The kernel would end a step beyond it with SIGKILL, which an orchestrator retries for ever."""
    code, found = run_within(560 * MIB, PROBE, *WIDE)
    assert code == 0, found
    assert found["exit_code"] == 2
    assert "does not fit on cpu even with batch size 1" in found["error"]


@pytest.mark.memory
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("limit", [1400, 1700, 2000])
def test_the_safe_batch_survives_and_twice_as_much_does_not(limit: int) -> None:
    code, found = run_within(limit * MIB, PROBE, *WIDE)
    assert code == 0, found
    assert found["device"]["memory_bytes"] == limit * MIB
    assert found["stopped_by"] == "memory"
    assert found["peak_bytes"] <= 0.95 * limit * MIB
    safe, steps = found["safe_batch_size"], 50
    code, survived = run_within(limit * MIB, STEPS, *WIDE, safe, 2, steps)
    assert code == 0, survived
    assert survived["peak"] <= limit * MIB
    code, said = run_within(limit * MIB, STEPS, *WIDE, 2 * safe, 2, 3)
    # The kernel counts libraries against whoever read them first, perhaps another cgroup: then it lets more through.
    assert code == -signal.SIGKILL or said["peak"] > limit * MIB, said
