"""The one way into a source dataset, whatever its layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rfdetr_core.data.formats.coco import (
    find_roboflow_coco,
    find_standard_coco,
    read_coco_folder,
    read_standard_coco_folder,
)
from rfdetr_core.data.formats.source import MAX_ANNOTATION_MB, SourceSplit
from rfdetr_core.data.formats.voc import find_voc, read_voc_folder
from rfdetr_core.data.formats.yolo import read_yolo_folder
from rfdetr_core.data.formats.yolo_data_file import find_data_file
from rfdetr_core.errors import ConfigError, DatasetError

LAYOUTS = ("auto", "roboflow", "coco", "yolo", "voc")
KNOWN = (
    "train/_annotations.coco.json (COCO as Roboflow exports it), annotations/instances_train*.json (COCO), "
    "data.yaml or data.yml (YOLO), Annotations/*.xml (Pascal VOC)"
)
_WRAPPER_DEPTH = 2  # VOCdevkit/VOC2012/ in an archive
_CLUTTER = ("__MACOSX", "lost+found")

Reader = Callable[[Path], dict[str, SourceSplit]]


def read_folder(folder: Path, layout: str = "auto", *, max_mb: float = MAX_ANNOTATION_MB) -> dict[str, SourceSplit]:
    """All splits found in `folder`, or in the only folder in it, keyed by train, valid, test (training spec 2.1).

    Args:
        layout: "coco" (of Roboflow or standard), "yolo" or "voc"; "auto", or "roboflow" as train.dataset_file calls
            it, finds out by itself, and takes the first of them where several are there.
        max_mb: most megabytes of a file of annotations.

    Raises:
        ConfigError: another layout.
        DatasetError: no such folder, none of the layouts in it, or files that cannot be understood.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"{layout!r} is not a layout that is read", hint=f"use one of {', '.join(LAYOUTS)}")
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder", hint="give the folder that holds the dataset")
    inner: Path | None = folder
    for _ in range(1 + _WRAPPER_DEPTH):
        if inner is None:
            break
        reader = _reader(inner, layout, max_mb)
        if reader is not None:
            return reader(inner)
        inner = _only_folder(inner)
    if layout == "yolo":
        return read_yolo_folder(folder)  # which says what it looked for
    if layout == "voc":
        return read_voc_folder(folder)
    if layout == "coco":
        raise DatasetError(
            f"{folder}: no COCO dataset in it",
            hint="looked for train/_annotations.coco.json and annotations/instances_train*.json",
        )
    raise DatasetError(f"{folder}: no dataset of a known layout in it", hint=f"looked for {KNOWN}")


def _reader(folder: Path, layout: str, max_mb: float) -> Reader | None:
    coco, yolo, voc = (layout in ("auto", "roboflow", kind) for kind in ("coco", "yolo", "voc"))
    if coco and find_roboflow_coco(folder):
        return lambda place: read_coco_folder(place, max_mb)
    if coco and find_standard_coco(folder):
        return lambda place: read_standard_coco_folder(place, max_mb)
    if yolo and find_data_file(folder):
        return read_yolo_folder
    return read_voc_folder if voc and find_voc(folder) else None


def _only_folder(folder: Path) -> Path | None:
    """The folder that an archive wraps around a dataset: the only one there, files beside it do not matter."""
    try:
        inside = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in _CLUTTER]
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be read: {error.strerror}") from error
    return inside[0] if len(inside) == 1 and not inside[0].is_symlink() else None
