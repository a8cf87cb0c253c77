"""Loading processes that die, and signals that are not for them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from rfdetr_core.data.loading import BatchLoader, LoaderSettings, _raising, is_worker_death, worker_errors
from rfdetr_core.errors import DatasetError, TransientError
from tests.processes import output_of


class Fails(Dataset[Any]):
    """Ten items; the sixth is never made."""

    def __init__(self, how: Any) -> None:
        self.how = how

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5:
            self.how()
        return torch.zeros(1000)


def die(signum: int) -> None:
    os.kill(os.getpid(), signum)


def no_room() -> None:
    raise RuntimeError("unable to write to file </torch_17_42_0>: No space left on device (28)")


def absent() -> None:
    raise FileNotFoundError("image.jpg")


def load(how: Any) -> None:
    keywords = {**LoaderSettings(1, None, None, None).keywords(torch.device("cpu")), "collate_fn": list}
    with worker_errors():
        for _ in BatchLoader(Fails(how), **keywords):
            pass


def killed() -> None:
    die(signal.SIGKILL)


DEATH = """
from tests.data.test_workers import killed, load
from rfdetr_core.errors import TransientError
try:
    load(killed)
except TransientError as error:
    print("told:", error, flush=True)
"""


def test_a_killed_worker_is_worth_another_try() -> None:
    """In a process of its own: torch's handler of the death may speak once more, whenever the loader is removed."""
    code, output = output_of([sys.executable, "-c", DEATH], timeout=60)
    assert code == 0, output
    assert re.search(r"^told: a loading process died: .*train\.num_workers", output, re.MULTILINE), output


def test_torch_does_not_speak_once_more_afterwards() -> None:
    """Its handler raises wherever the program is when the death is told, a moment after the connection broke."""

    def speak(signum: int, frame: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    def broken() -> Any:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        raise ConnectionResetError("by peer")
        yield

    before = signal.signal(signal.SIGALRM, speak)
    try:
        with pytest.raises(TransientError, match="a loading process died: by peer"), worker_errors():
            next(_raising(broken(), workers=1))
        time.sleep(0.1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_full_shared_memory_is_told() -> None:
    with pytest.raises(DatasetError, match=r"shared memory .* is full .*larger /dev/shm"):
        load(no_room)


def test_what_a_worker_raises_by_itself_is_passed_on() -> None:
    with pytest.raises(FileNotFoundError, match=r"image\.jpg"):
        load(absent)


def unreadable() -> None:
    raise DatasetError("image.jpg cannot be read")


@pytest.mark.parametrize("how", [absent, unreadable, no_room])
def test_after_an_error_no_process_waits_for_the_garbage_collector(how: Any) -> None:
    """Nor does whoever meets it, for five seconds each: torch cannot tell them the end any more."""
    before = set(multiprocessing.active_children())
    gc.disable()
    try:
        with pytest.raises((FileNotFoundError, DatasetError)):
            load(how)
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


def test_torchs_report_is_recognised() -> None:
    assert is_worker_death(RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. "))
    assert not is_worker_death(RuntimeError("unexpected pos 64 vs 0"))


PROGRAM = """
import signal, time, torch
from tests.data.test_workers import Fails
from rfdetr_core.data.loading import BatchLoader, LoaderSettings
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
keywords = {**LoaderSettings(2, None, None, None).keywords(torch.device("cpu")), "collate_fn": list}
loader = BatchLoader(Fails(lambda: None), **keywords)
print("ready", len(list(loader)), flush=True)
while not stopped:
    time.sleep(0.01)
time.sleep(0.2)
print("after", len(list(loader)), flush=True)
"""


def test_a_signal_to_the_group_leaves_the_workers_alone() -> None:
    """What a launcher sends to end a stage, or a terminal on Ctrl-C."""
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, start_new_session=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready 10\n"
        os.killpg(child.pid, signal.SIGTERM)
        rest, _ = child.communicate(timeout=60)
    assert rest == "after 10\n"
    assert child.returncode == 0
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process of the group was left behind")
