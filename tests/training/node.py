"""One machine of a training, for tests: `python -m tests.training.node DATASET FOLDER SETTINGS`, with PET_… set."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import ExitError
from rfdetr_core.training.loop import train
from tests.training import tiny


def main() -> int:
    dataset, folder, settings = sys.argv[1:]
    try:
        result = train(tiny.job(PreparedDataset(Path(dataset)), Path(folder), **json.loads(settings)))
    except ExitError as error:
        print(f"{type(error).__name__}: {error}")
        return error.exit_code
    print(json.dumps(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
