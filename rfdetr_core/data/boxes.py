"""From annotations as written to the table that training reads: boxes clipped, the useless ones dropped, all sorted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.data.findings import Report
from rfdetr_core.data.formats.source import SourceSplit
from rfdetr_core.data.survey import ImageFile

CLIP_TOLERANCE = 2.0  # px a box may leave its image by before it is a warning (training spec 2.5)
ROUNDING = 1e-3  # px that arithmetic may move an edge by


@dataclass(frozen=True)
class ValidSplit:
    """A split fit for training: the table, and its image files in the same order."""

    table: AnnotationTable
    files: tuple[ImageFile, ...]

    def select(self, images: NDArray[np.int64]) -> ValidSplit:
        """Some of the images, in the order given."""
        return ValidSplit(self.table.select(images), tuple(self.files[i] for i in images))


@dataclass(frozen=True)
class _Rows:
    """Annotations in their final order: A of them, `image_of` positions among the images that are kept."""

    source: SourceSplit
    names: Sequence[str]
    which: NDArray[np.int64]  # (A,) positions in the source
    image_of: NDArray[np.int64]  # (A,)
    xywh: NDArray[np.float64]  # (A, 4) pixels

    def describe(self, selected: NDArray[np.bool_]) -> list[str]:
        """A row of the report for each that is selected."""
        return [
            f"{self.source.name}/{self.names[self.image_of[r]]}: "
            f"{self.source.annotation_name(self.which[r], self.names[self.image_of[r]])} {self.xywh[r].tolist()}"
            for r in np.flatnonzero(selected)
        ]


def to_table(source: SourceSplit, class_map: ClassMap, files: Sequence[ImageFile | None], report: Report) -> ValidSplit:
    """Images by source id, boxes by annotation id; images of which `files` holds None are left out with their boxes.

    So are annotations of unknown images and classes: whoever calls has reported both.
    """
    order = np.array([i for i in np.argsort(source.image_ids, kind="stable") if files[i] is not None], dtype=np.int64)
    kept_files = tuple(file for i in order if (file := files[i]) is not None)
    names = [source.file_names[i] for i in order]
    widths = np.array([file.width for file in kept_files], dtype=np.int64)
    heights = np.array([file.height for file in kept_files], dtype=np.int64)
    _check_sizes(source, order, widths, heights, report)

    rows = _in_order(source, class_map, order, names, np.stack([widths, heights], axis=1))
    extent = np.stack([widths, heights, widths, heights], axis=1)[rows.image_of].astype(np.float64)
    boxes, keep = _judged(rows, extent, report)
    labels = _labels(source.annotation_categories[rows.which], class_map)
    _check_repeated(rows, boxes, labels, keep, report)
    _check_tiny(rows, boxes, extent, keep, report)
    boxes = boxes[keep]
    counts = np.bincount(rows.image_of[keep], minlength=len(order))
    table = AnnotationTable(
        file_names=np.array(names, dtype=np.str_),
        widths=widths,
        heights=heights,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes,
        labels=labels[keep],
        areas=_areas(rows, boxes, keep, report),
        crowd=source.crowd[rows.which][keep],
    )
    return ValidSplit(table, kept_files)


def _in_order(
    source: SourceSplit,
    class_map: ClassMap,
    order: NDArray[np.int64],
    names: Sequence[str],
    sizes: NDArray[np.int64],
) -> _Rows:
    ids = source.image_ids[order]  # ascending
    place = np.searchsorted(ids, source.annotation_images)
    found = np.append(ids, -1)[place] == source.annotation_images if len(ids) else np.zeros(len(place), dtype=np.bool_)
    known = found & np.isin(source.annotation_categories, class_map.source_ids)
    which = np.lexsort((source.annotation_ids, place))
    which = which[known[which]]
    image_of = place[which]
    xywh = source.bboxes[which]
    if source.relative:
        xywh = xywh * np.concatenate([sizes, sizes], axis=1)[image_of]
    return _Rows(source, names, which, image_of, xywh)


def _judged(rows: _Rows, extent: NDArray[np.float64], report: Report) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Corners clipped to the image, and which boxes are kept. Each box has one code at most."""
    xywh = rows.xywh
    with np.errstate(over="ignore"):  # a sum beyond float64 is infinite, and refused as such
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    finite = np.isfinite(xyxy).all(axis=1)
    xyxy = np.where(finite[:, None], xyxy, 0.0)
    clipped = np.clip(xyxy, 0.0, extent)
    beyond = np.abs(clipped - xyxy).max(axis=1, initial=0.0)
    negative = finite & (xywh[:, 2:] < 0).any(axis=1)
    empty = finite & ~negative & (xyxy[:, 2:] <= xyxy[:, :2]).any(axis=1)
    outside = finite & ~negative & ~empty & (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)
    keep = finite & ~negative & ~empty & ~outside
    oversized = keep & (xywh[:, 2:] > extent[:, 2:] + CLIP_TOLERANCE).any(axis=1)
    far = keep & ~oversized & (beyond > CLIP_TOLERANCE)
    near = keep & ~oversized & ~far & (beyond > ROUNDING)
    for code, selected in (
        ("box-not-finite", ~finite),
        ("box-negative", negative),
        ("box-empty", empty),
        ("box-outside", outside),
        ("box-oversized", oversized),
        ("box-clipped", far),
        ("box-rounded", near),
    ):
        report.add(code, rows.describe(selected))
    return clipped, keep


def _labels(categories: NDArray[np.int64], class_map: ClassMap) -> NDArray[np.int64]:
    ids = np.array(class_map.source_ids, dtype=np.int64)
    by_id = np.argsort(ids)
    labels: NDArray[np.int64] = by_id[np.searchsorted(ids[by_id], categories)].astype(np.int64)
    return labels


def _check_repeated(
    rows: _Rows, boxes: NDArray[np.float64], labels: NDArray[np.int64], keep: NDArray[np.bool_], report: Report
) -> None:
    kept = np.flatnonzero(keep & ~rows.source.crowd[rows.which])
    whole = np.column_stack([rows.image_of[kept], labels[kept], boxes[kept]])
    _, first = np.unique(whole, axis=0, return_index=True)
    again = np.zeros(len(keep), dtype=np.bool_)
    again[np.delete(kept, first)] = True
    report.add("box-repeated", rows.describe(again))


def _check_tiny(
    rows: _Rows, boxes: NDArray[np.float64], extent: NDArray[np.float64], keep: NDArray[np.bool_], report: Report
) -> None:
    """The model sees the image as a square of its resolution, in patches: how much of one does the box take?"""
    options = report.options
    shares = ((boxes[:, 2:] - boxes[:, :2]) / np.maximum(extent[:, 2:], 1)).min(axis=1, initial=1.0)
    patches = shares * options.resolution / options.patch_size
    report.add("box-tiny", rows.describe(keep & (patches < options.min_box_patches)))


def _areas(rows: _Rows, boxes: NDArray[np.float64], keep: NDArray[np.bool_], report: Report) -> NDArray[np.float64]:
    """As annotated; where that is absent or no positive number, the clipped box's."""
    areas = rows.source.areas[rows.which]
    usable = np.isfinite(areas) & (areas > 0)
    report.add("area-replaced", rows.describe(keep & ~usable & ~np.isnan(areas)))
    box_areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    result: NDArray[np.float64] = np.where(usable[keep], areas[keep], box_areas)
    return result


def _check_sizes(
    source: SourceSplit, order: NDArray[np.int64], widths: NDArray[np.int64], heights: NDArray[np.int64], report: Report
) -> None:
    declared_w, declared_h = source.widths[order], source.heights[order]
    differs = ((declared_w != widths) | (declared_h != heights)) & (declared_w > 0) & (declared_h > 0)
    report.add(
        "size-differs",
        (
            f"{source.name}/{source.file_names[order[i]]}: listed {declared_w[i]}x{declared_h[i]},"
            f" file {widths[i]}x{heights[i]}"
            for i in np.flatnonzero(differs)
        ),
    )
