"""Judges a source dataset: what stops it, what is dropped or repaired, what is worth knowing.

Every finding has a stable code and a severity: an *error* stops the stage, a *warning* names rows that were
dropped or repaired, a *note* changes nothing. Nothing is dropped silently.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rfdetr_core.data.annotations import SPLITS, AnnotationTable, ClassMap
from rfdetr_core.data.formats.source import IMAGE_SUFFIXES, UNPRINTABLE, Severity, SourceCategory, SourceSplit
from rfdetr_core.data.images import SWAPS_AXES, orientation_of, to_rgb
from rfdetr_core.errors import DatasetError

CLIP_TOLERANCE = 2.0  # px a box may leave its image by before it is worth a word (training spec 2.5)


@dataclass
class Finding:
    """One kind of thing found: how often, where (every row), and what was done about it."""

    code: str
    severity: Severity
    message: str
    rows: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many rows."""
        return len(self.rows)


@dataclass
class Report:
    """Findings in order of first appearance."""

    findings: dict[str, Finding] = field(default_factory=dict)

    def add(self, code: str, severity: Severity, message: str, rows: Iterable[str]) -> None:
        """Record rows under a code; no rows, no finding."""
        rows = [_printable(row) for row in rows]
        if rows:
            self.findings.setdefault(code, Finding(code, severity, message)).rows.extend(rows)

    @property
    def errors(self) -> list[Finding]:
        """The findings that stop the stage."""
        return [finding for finding in self.findings.values() if finding.severity == "error"]

    def to_json(self) -> list[dict[str, Any]]:
        """Findings with all their rows."""
        return [
            {"code": f.code, "severity": f.severity, "message": f.message, "count": f.count, "rows": f.rows}
            for f in self.findings.values()
        ]

    def tell(self, log: logging.Logger) -> None:
        """A line of log per finding: what it is, how often, and the first one."""
        for f in self.findings.values():
            level = logging.INFO if f.severity == "note" else logging.WARNING
            log.log(level, "%s: %s (%d, first: %s)", f.severity, f.message, f.count, f.rows[0])

    def raise_errors(self, where: str) -> None:
        """Raise one DatasetError that sums up all errors, if there are any."""
        if not self.errors:
            return
        parts = [f"{f.message}: {f.rows[0]}{f' and {f.count - 1} more' if f.count > 1 else ''}" for f in self.errors]
        shown = "; ".join(parts[:3]) + (f"; and {len(parts) - 3} more kinds" if len(parts) > 3 else "")
        raise DatasetError(f"{where}: {shown}", hint="report.html lists every row; mend the dataset and run again")


@dataclass(frozen=True)
class ImageFile:
    """What decoding an image showed: its size as displayed, in pixels, and the digest of its bytes."""

    path: Path
    width: int
    height: int
    orientation: int  # the EXIF orientation to apply on decoding; 1 = as stored
    sha256: str
    bytes: int
    exif_orientation: int = 1  # what the file asks for; another one than `orientation` if the boxes contradict it


@dataclass(frozen=True)
class ValidSplit:
    """A split fit for training: the table, and its image files in the same order."""

    table: AnnotationTable
    files: tuple[ImageFile, ...]

    def select(self, images: NDArray[np.int64]) -> ValidSplit:
        """Some of the images, in the order given."""
        return ValidSplit(self.table.select(images), tuple(self.files[i] for i in images))


def build_class_map(train: SourceSplit) -> ClassMap:
    """Labels from the train split (training spec 2.3).

    Categories sorted by id; a category goes when another names it as its supercategory and no annotation
    uses it (the parents that Roboflow adds; in a project of one class, parent and class may share their name).
    If all would go, all stay.

    Raises:
        DatasetError: no categories, an id that occurs twice, or a name that two of the remaining share.
    """
    categories = sorted(train.categories, key=lambda category: category.id)
    if not categories:
        raise DatasetError(f"{train.path}: no categories", hint="export the dataset with its class list")
    _refuse_repeated(train, "id", [c.id for c in categories])
    used = set(np.unique(train.annotation_categories).tolist())
    kept = [c for c in categories if c.id in used or not _is_parent(c, categories)] or categories
    _refuse_repeated(train, "name", [c.name for c in kept])
    return ClassMap(tuple(c.id for c in kept), tuple(c.name for c in kept))


def _is_parent(category: SourceCategory, categories: list[SourceCategory]) -> bool:
    """Whether another category names it as its supercategory; some exporters write "none" or "null" for no parent."""
    if category.name in ("none", "null"):
        return False
    return any(c.supercategory == category.name and c.id != category.id for c in categories)


def _refuse_repeated(train: SourceSplit, what: str, values: list[Any]) -> None:
    for value, n in Counter(values).items():
        if n > 1:
            raise DatasetError(f"{train.path}: category {what} {value!r} occurs twice", hint="make it unique")


def validate(
    splits: dict[str, SourceSplit], report: Report, *, progress: Callable[[int], None] | None = None
) -> tuple[ClassMap, dict[str, ValidSplit]]:
    """Check every split against the class map of train, and decode every image once.

    Args:
        progress: called with the number of images just decoded.

    Raises:
        DatasetError: with all errors in one line; `report` then holds every row.
    """
    class_map = _class_map(splits["train"], report)
    valid: dict[str, ValidSplit] = {}
    for name in SPLITS:
        if name not in splits:
            continue
        source = splits[name]
        for remark in source.remarks:
            report.add(*remark)
        _check_ids(source, report)
        _check_classes(source, class_map, splits["train"].categories, report)
        files = _decode_images(source, report, progress)
        _check_orientations(source, files, report)
        _check_unlisted(source, splits, report)
        if not report.errors:
            valid[name] = _to_table(source, class_map, files, report)
    report.raise_errors(str(splits["train"].root))
    _check_leakage(valid, report)
    _check_content(valid, class_map, report)
    report.raise_errors(str(splits["train"].root))
    return class_map, valid


def _class_map(train: SourceSplit, report: Report) -> ClassMap:
    try:
        class_map = build_class_map(train)
    except DatasetError as error:
        report.add("bad-categories", "error", "the list of classes cannot be used", [error.message])
        raise
    dropped = [c for c in train.categories if c.id not in class_map.source_ids]
    report.add(
        "category-dropped",
        "note",
        "category that only groups others and has no annotation: not a class",
        (f"{train.name}: id {c.id} {c.name!r}" for c in dropped),
    )
    return class_map


def _check_ids(source: SourceSplit, report: Report) -> None:
    for code, what, values in (
        ("duplicate-image-id", "image id used twice", source.image_ids.tolist()),
        ("duplicate-annotation-id", "annotation id used twice", source.annotation_ids.tolist()),
        ("duplicate-file-name", "file name listed twice", list(source.file_names)),
    ):
        repeated = [value for value, n in Counter(values).items() if n > 1]
        report.add(code, "error", what, (f"{source.name}: {value}" for value in repeated))
    known = np.isin(source.annotation_images, source.image_ids)
    report.add(
        "unknown-image",
        "error",
        "annotation of an image that is not listed",
        (
            f"{source.name}: annotation {a} names image {i}"
            for a, i in zip(source.annotation_ids[~known], source.annotation_images[~known], strict=True)
        ),
    )


def _check_classes(source: SourceSplit, class_map: ClassMap, train: tuple[SourceCategory, ...], report: Report) -> None:
    known = np.isin(source.annotation_categories, class_map.source_ids)
    own = {category.id: f" {category.name!r}" for category in source.categories}
    report.add(
        "unknown-category",
        "error",
        "annotation of a category that train does not have",
        (
            f"{source.name}: annotation {a} names category {c}{own.get(c, '')}"
            for a, c in zip(source.annotation_ids[~known], source.annotation_categories[~known], strict=True)
        ),
    )
    names = {category.id: category.name for category in train}
    report.add(
        "category-renamed",
        "error",
        "category id with another name than in train",
        (
            f"{source.name}: id {c.id} is {c.name!r}, in train {names[c.id]!r}"
            for c in source.categories
            if c.id in names and c.name != names[c.id]
        ),
    )


def _decode_images(
    source: SourceSplit, report: Report, progress: Callable[[int], None] | None
) -> list[ImageFile | None]:
    """Decode every listed image; None where it cannot be. Pillow releases the GIL, so threads help."""
    paths = [source.image_folder / name for name in source.file_names]
    files: list[ImageFile | None] = []
    with ThreadPoolExecutor() as pool:
        declared = zip(source.widths.tolist(), source.heights.tolist(), strict=True)
        for name, outcome in zip(source.file_names, pool.map(_decode, paths, declared), strict=True):
            if isinstance(outcome, str):
                report.add("unreadable-image", "error", "image cannot be read", [f"{source.name}/{name}: {outcome}"])
            files.append(None if isinstance(outcome, str) else outcome)
            if progress is not None:
                progress(1)
    return files


def _decode(path: Path, declared: tuple[int, int]) -> ImageFile | str:
    """The image's facts, or why it cannot be used."""
    data = b""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            stored = image.size
            # A scaled decode still walks through every byte, so truncation shows at a fraction of the cost.
            image.draft("RGB", (max(1, stored[0] // 8), max(1, stored[1] // 8)))
            image.load()
            exif = orientation_of(image)
            to_rgb(image)
    except FileNotFoundError:
        return "no such file"
    except Image.DecompressionBombError:
        return "too many pixels (a decompression bomb?)"
    except UnidentifiedImageError:
        return "no image format that Pillow knows" if data else "empty file"
    except Exception as error:  # Pillow's decoders let a broken file raise whatever it leads them to
        return str(error) or type(error).__name__
    orientation, displayed = exif, (stored[1], stored[0]) if exif in SWAPS_AXES else stored
    if exif in SWAPS_AXES and declared == stored != displayed:
        # The boxes were drawn on the stored frame: show it to the model as stored.
        orientation, displayed = 1, stored
    return ImageFile(path, *displayed, orientation, hashlib.sha256(data).hexdigest(), len(data), exif)


def _check_orientations(source: SourceSplit, files: list[ImageFile | None], report: Report) -> None:
    turned = [(name, f) for name, f in zip(source.file_names, files, strict=True) if f and f.exif_orientation != 1]
    report.add(
        "exif-orientation",
        "note",
        "image is stored turned or mirrored: shown upright, as its EXIF orientation says",
        (f"{source.name}/{name}: {f.exif_orientation}" for name, f in turned if f.orientation == f.exif_orientation),
    )
    report.add(
        "exif-ignored",
        "warning",
        "listed size is that of the image as stored: its EXIF orientation is ignored, so that its boxes fit",
        (f"{source.name}/{name}: {f.exif_orientation}" for name, f in turned if f.orientation != f.exif_orientation),
    )


def _check_unlisted(source: SourceSplit, splits: dict[str, SourceSplit], report: Report) -> None:
    # Splits may share a folder, or one's may lie within another's.
    listed = {str(split.image_folder / name) for split in splits.values() for name in split.file_names}
    on_disk = (p for p in source.image_folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    report.add(
        "unlisted-image",
        "warning",
        "image lies in the folder but is not listed: not used",
        sorted(
            f"{source.name}/{p.relative_to(source.image_folder).as_posix()}" for p in on_disk if str(p) not in listed
        ),
    )


def _to_table(source: SourceSplit, class_map: ClassMap, files: list[ImageFile | None], report: Report) -> ValidSplit:
    """Clip the boxes, drop the empty ones, and sort: images by source id, boxes by annotation id."""
    order = np.argsort(source.image_ids, kind="stable")
    sorted_files = [file for i in order if (file := files[i]) is not None]  # errors stopped us before, else
    names = [source.file_names[i] for i in order]
    widths = np.array([file.width for file in sorted_files], dtype=np.int64)
    heights = np.array([file.height for file in sorted_files], dtype=np.int64)
    _check_sizes(source, order, widths, heights, report)

    rows = np.lexsort((source.annotation_ids, np.searchsorted(source.image_ids[order], source.annotation_images)))
    image_of = np.searchsorted(source.image_ids[order], source.annotation_images[rows])
    extent = np.stack([widths, heights, widths, heights], axis=1)[image_of].astype(np.float64)
    xywh = source.bboxes[rows] * extent if source.relative else source.bboxes[rows]
    with np.errstate(over="ignore"):  # a sum beyond float64 is infinite, and refused as such
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)

    finite = np.isfinite(xyxy).all(axis=1)
    clipped = np.clip(np.where(finite[:, None], xyxy, 0.0), 0.0, extent)
    beyond = np.abs(clipped - xyxy).max(axis=1, initial=0.0)
    empty = (clipped[:, 2] <= clipped[:, 0]) | (clipped[:, 3] <= clipped[:, 1])

    def describe(selected: NDArray[np.bool_]) -> list[str]:
        return [
            f"{source.name}/{names[image_of[r]]}: {source.annotation_name(rows[r], names[image_of[r]])}"
            f" {xywh[r].tolist()}"
            for r in np.flatnonzero(selected)
        ]

    report.add("box-not-finite", "error", "box holds NaN or infinity", describe(~finite))
    report.add("box-empty", "warning", "box without area inside its image: dropped", describe(finite & empty))
    left = finite & ~empty & (beyond > CLIP_TOLERANCE)
    report.add("box-clipped", "warning", f"box leaves its image by over {CLIP_TOLERANCE:g} px: clipped", describe(left))

    keep = finite & ~empty
    boxes = clipped[keep]
    areas, usable = source.areas[rows], np.isfinite(source.areas[rows]) & (source.areas[rows] > 0)
    wrong = keep & ~usable & ~np.isnan(areas)
    report.add("area-replaced", "warning", "area is not a positive number: that of the box is used", describe(wrong))
    box_areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    counts = np.bincount(image_of[keep], minlength=len(order))
    label_of = {source_id: label for label, source_id in enumerate(class_map.source_ids)}
    table = AnnotationTable(
        file_names=np.array(names, dtype=np.str_),
        widths=widths,
        heights=heights,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes,
        labels=np.array([label_of[c] for c in source.annotation_categories[rows][keep].tolist()], dtype=np.int64),
        areas=np.where(usable[keep], areas[keep], box_areas),
        crowd=source.crowd[rows][keep],
    )
    return ValidSplit(table, tuple(sorted_files))


def _check_sizes(
    source: SourceSplit, order: NDArray[np.int64], widths: NDArray[np.int64], heights: NDArray[np.int64], report: Report
) -> None:
    declared_w, declared_h = source.widths[order], source.heights[order]
    differs = ((declared_w != widths) | (declared_h != heights)) & (declared_w > 0) & (declared_h > 0)
    report.add(
        "size-differs",
        "warning",
        "listed size differs from the file's: the file's is used, boxes stay in pixels",
        (
            f"{source.name}/{source.file_names[order[i]]}: listed {declared_w[i]}x{declared_h[i]},"
            f" file {widths[i]}x{heights[i]}"
            for i in np.flatnonzero(differs)
        ),
    )


def _check_leakage(splits: dict[str, ValidSplit], report: Report) -> None:
    seen: dict[str, str] = {}
    for name, split in splits.items():
        for file_name, file in zip(split.table.file_names, split.files, strict=True):
            here = f"{name}/{file_name}"
            first = seen.setdefault(file.sha256, here)
            if first != here:
                same_split = first.split("/", 1)[0] == name
                code = "image-repeated" if same_split else "image-in-two-splits"
                what = "same image twice in a split" if same_split else "same image in two splits: metrics will flatter"
                report.add(code, "warning", what, [f"{here} = {first}"])


def _check_content(splits: dict[str, ValidSplit], class_map: ClassMap, report: Report) -> None:
    train = splits["train"].table
    if not len(train.boxes[~train.crowd]):
        report.add("no-boxes", "error", "train has no usable box", ["train"])
    trained = set(train.labels[~train.crowd].tolist())
    for name, split in splits.items():
        table = split.table
        if not len(table):
            report.add("empty-split", "error", "split has no images", [name])
        present = set(table.labels[~table.crowd].tolist())
        if len(table) and not present and name != "train":
            report.add("nothing-to-measure", "warning", "split without a usable box: it has no scores", [name])
        absent = [class_map.names[label] for label in range(len(class_map)) if label not in present]
        report.add("class-absent", "warning", "class without boxes", (f"{name}: {class_name}" for class_name in absent))
        unlearned = [class_map.names[label] for label in sorted(present - trained)]
        report.add(
            "class-untrained",
            "warning",
            "class with boxes here and none in train: it cannot be learned",
            (f"{name}: {class_name}" for class_name in unlearned),
        )
        unlabelled = table.file_names[table.counts == 0]
        report.add("no-objects", "note", "image without boxes: a negative", (f"{name}/{f}" for f in unlabelled))
        in_image = np.repeat(np.arange(len(table)), table.counts)
        crowds = table.file_names[in_image[table.crowd]]
        report.add(
            "crowd", "note", "crowd region: ignored in training, kept for evaluation", (f"{name}/{f}" for f in crowds)
        )


def _printable(text: str) -> str:
    """One line that can be written as UTF-8: names on a disk may hold line breaks and stray bytes."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
