"""The one way into a source dataset, whatever its layout."""

from __future__ import annotations

from pathlib import Path

from rfdetr_core.data.formats.coco import (
    find_roboflow_coco,
    find_standard_coco,
    read_coco_folder,
    read_standard_coco_folder,
)
from rfdetr_core.data.formats.source import SourceSplit
from rfdetr_core.data.formats.yolo import read_yolo_folder
from rfdetr_core.data.formats.yolo_data_file import find_data_file
from rfdetr_core.errors import ConfigError, DatasetError

LAYOUTS = ("auto", "roboflow", "coco", "yolo")
KNOWN = (
    "train/_annotations.coco.json (COCO as Roboflow exports it), annotations/instances_train*.json (COCO), "
    "data.yaml or data.yml (YOLO)"
)


def read_folder(folder: Path, layout: str = "auto") -> dict[str, SourceSplit]:
    """All splits found in `folder`, keyed by train, valid, test (training spec 2.1).

    Args:
        layout: "coco" (of Roboflow or standard) or "yolo"; "auto", or "roboflow" as train.dataset_file calls it,
            finds out by itself, and takes COCO where both are there.

    Raises:
        ConfigError: another layout.
        DatasetError: no such folder, none of the layouts in it, or files that cannot be understood.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"{layout!r} is not a layout that is read", hint=f"use one of {', '.join(LAYOUTS)}")
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder", hint="give the folder that holds the dataset")
    if layout == "yolo":
        return read_yolo_folder(folder)
    if find_roboflow_coco(folder):
        return read_coco_folder(folder)
    if find_standard_coco(folder):
        return read_standard_coco_folder(folder)
    if layout == "coco":
        raise DatasetError(
            f"{folder}: no COCO dataset in it",
            hint="looked for train/_annotations.coco.json and annotations/instances_train*.json",
        )
    if find_data_file(folder):
        return read_yolo_folder(folder)
    raise DatasetError(f"{folder}: no dataset of a known layout in it", hint=f"looked for {KNOWN}")
