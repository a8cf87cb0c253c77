"""What the configuration tests share."""

from __future__ import annotations

from typing import Any

import pytest

from rfdetr_core.config import RunConfig
from rfdetr_core.errors import ConfigError

MINIMAL: dict[str, Any] = {"name": "cells", "dataset": {"uri": "s3://data/cells"}}


def run_config(**sections: Any) -> RunConfig:
    return RunConfig.parse({**MINIMAL, **sections}, source="config.yaml")


def error_of(**sections: Any) -> str:
    """The one line that refuses these sections, without the name of the file."""
    with pytest.raises(ConfigError) as caught:
        run_config(**sections)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("config.yaml: ")
    return message.removeprefix("config.yaml: ")
