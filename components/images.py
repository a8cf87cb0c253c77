"""Which container image each stage runs in."""

from __future__ import annotations

from rfdetr_core import __version__


def image(stage: str) -> str:
    """The image of a stage, such as rfdetr-pipeline/train:0.1.0."""
    return f"rfdetr-pipeline/{stage.replace('_', '-')}:{__version__}"
