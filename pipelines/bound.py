"""Programs that must not outlive the process that started them, however it ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

# The kernel stops the program with the thread that started it. Set by a program that then becomes the other one: doing
# it between fork and exec inside this process can deadlock a threaded parent.
_EXEC = f"""
import ctypes, os, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, {int(signal.SIGTERM)})
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def bound_to_parent(command: Sequence[str]) -> list[str]:
    """The command of the same program that ends with the calling thread (on Linux; elsewhere as it is)."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-c", _EXEC, str(os.getpid()), *command]
