"""What importing the package means."""

from __future__ import annotations

import subprocess
import sys

from rfdetr_core import config


def test_exported_names_are_sorted_and_complete() -> None:
    constants = [name for name in config.__all__ if name.isupper()]
    classes = [name for name in config.__all__ if name[0].isupper() and not name.isupper()]
    functions = [name for name in config.__all__ if name.islower()]
    assert config.__all__ == [*sorted(constants), *sorted(classes), *sorted(functions)]
    public = {name for name, value in vars(config).items() if name[0] != "_" and callable(value)}
    assert public <= set(config.__all__)


def test_importing_is_cheap() -> None:
    code = (
        "import sys, time; start = time.process_time(); import rfdetr_core.config; "
        "print(time.process_time() - start, *sys.modules)"
    )
    seconds = []
    for _ in range(3):
        output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        spent, *modules = output.split()
        seconds.append(float(spent))
        assert {"torch", "boto3", "botocore", "numpy", "PIL"}.isdisjoint(modules)
    assert min(seconds) < 0.6  # 0.2 on an idle core; the bound leaves room for a busy machine
