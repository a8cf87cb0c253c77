"""train, on one of several nodes: the program of a TrainJob's pods (see `nodes`).

The same as the stage, with a status and a log of its own, `train-node-<rank>`; the first node publishes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from components.runtime import run_stage
from components.train.stage import STAGE, train_here


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    rank = os.environ.get("PET_NODE_RANK", "0")
    return run_stage(replace(STAGE, name=f"train-node-{rank}"), train_here, argv)


if __name__ == "__main__":
    sys.exit(main())
