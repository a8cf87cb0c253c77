"""Every check of a dataset: its code, how grave it is, and what is done about what it finds.

An *error* stops the stage. A *warning* names rows that were dropped or mended, or that a person should look at; a
*note* changes nothing. `dataset.tolerate` sets how many rows of a code are accepted, `dataset.strict` makes an error
of every mended or dropped box.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from rfdetr_core.config import ModelSection
from rfdetr_core.config.sections import DatasetConfig
from rfdetr_core.errors import ConfigError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Check(NamedTuple):
    """What a code stands for.

    `mends`: labels were changed or dropped, which `strict` forbids. `final`: an error that nothing can be dropped for,
    so that it cannot be tolerated.
    """

    severity: Severity
    message: str
    mends: bool = False
    final: bool = False


CHECKS: dict[str, Check] = {
    # What is listed, and what lies there
    "bad-categories": Check("error", "the list of classes cannot be used", final=True),
    "category-dropped": Check("note", "category that only groups others and has no annotation: not a class"),
    "category-renamed": Check("error", "category id with another name than in train", final=True),
    "unknown-category": Check("error", "annotation of a category that train does not have"),
    "duplicate-image-id": Check("error", "image id used twice", final=True),
    "duplicate-annotation-id": Check("error", "annotation id used twice"),
    "duplicate-file-name": Check("error", "file name listed twice", final=True),
    "annotation-id-zero": Check("note", "annotation id 0, which COCO tools take for no match: ids are given anew"),
    "unknown-image": Check("error", "annotation of an image that is not listed"),
    "unlisted-image": Check("warning", "image lies in the folder but is not listed: not used"),
    "bad-file-name": Check("error", "file name holds an unprintable character", final=True),
    "outside-dataset": Check("error", "file leads out of the dataset's folder"),
    # Label files of YOLO and VOC
    "declared-folder-ignored": Check("note", "folder that the data file names is not in the dataset: a usual one is"),
    "labels-missing": Check("error", "split has images and no folder of labels", final=True),
    "label-file-absent": Check("note", "image without a label file: a negative"),
    "label-file-shared": Check("warning", "images of one name share a label file: each has its boxes"),
    "label-without-image": Check("warning", "label file without an image: not used"),
    "unreadable-labels": Check("error", "label file cannot be read"),
    "bad-label-line": Check("error", "label line cannot be understood"),
    "bad-object": Check("error", "object of an annotation file cannot be understood"),
    "class-out-of-range": Check("error", "label line names a class that the data file does not have"),
    "coordinate-out-of-range": Check("error", "coordinate is not a share of the image from 0 to 1"),
    "pixel-coordinates": Check(
        "error", "coordinates are above 1 in most label lines: pixels instead of shares?", final=True
    ),
    "image-by-other-name": Check("note", "annotation file names another image than the one found beside it"),
    "difficult-object": Check("note", "object marked as difficult: taken like any other"),
    # Image files
    "missing-image": Check("error", "listed image is not there"),
    "empty-image": Check("error", "image file has no bytes"),
    "truncated-image": Check("error", "image file is cut short"),
    "unreadable-image": Check("error", "image cannot be read"),
    "oversized-image": Check("error", "image has too many pixels (a decompression bomb?)"),
    "extension-differs": Check("warning", "image is of another format than its name says: read all the same"),
    "exif-orientation": Check(
        "note", "image is stored turned or mirrored: shown upright, as its EXIF orientation says"
    ),
    "exif-ignored": Check(
        "warning", "listed size or boxes are those of the image as stored: its EXIF orientation is ignored", mends=True
    ),
    "size-differs": Check("warning", "listed size differs from the file's: the file's is used, boxes stay in pixels"),
    "cmyk-image": Check("note", "image in four inks (CMYK): converted to RGB without a colour profile"),
    "deep-image": Check("note", "image of 16 bits a channel: its upper 8 are used"),
    "palette-image": Check("note", "image with a palette: its colours are used"),
    "alpha-image": Check("note", "image with transparency: it is dropped, unless the model takes four channels"),
    "animated-image": Check("note", "image of several frames: its first is used"),
    # Boxes
    "box-not-finite": Check("error", "box holds NaN or infinity"),
    "box-negative": Check("warning", "box of negative width or height: dropped", mends=True),
    "box-empty": Check("warning", "box without width or height: dropped", mends=True),
    "box-outside": Check("warning", "box lies wholly outside of its image: dropped", mends=True),
    "box-oversized": Check("warning", "box is larger than its image: clipped", mends=True),
    "box-clipped": Check("warning", "box leaves its image by over 2 px: clipped", mends=True),
    "box-rounded": Check("note", "box leaves its image by up to 2 px: clipped", mends=True),
    "box-repeated": Check("warning", "box of the same class and place twice in an image: kept"),
    "box-tiny": Check("warning", "box is absurdly small for the model: see dataset.min_box_patches"),
    "area-replaced": Check("warning", "area is not a positive number: that of the box is used", mends=True),
    "mask-only-box": Check("note", "annotation with an RLE mask: its box is used"),
    "crowd": Check("note", "crowd region: ignored in training, kept for evaluation"),
    # The whole
    "image-repeated": Check("warning", "same image twice in a split"),
    "image-in-two-splits": Check("warning", "same image in two splits: metrics will flatter"),
    "no-boxes": Check("error", "train has no usable box", final=True),
    "nothing-to-measure": Check("warning", "split without a usable box: it has no scores"),
    "empty-split": Check("error", "split has no images", final=True),
    "class-absent": Check("warning", "class without boxes"),
    "class-untrained": Check("warning", "class with boxes here and none in train: it cannot be learned"),
    "class-imbalance": Check("warning", "class is rare beside the most frequent one: see dataset.max_class_ratio"),
    "no-objects": Check("note", "image without boxes: a negative"),
    "too-many-boxes": Check("warning", "image has more boxes than the model has queries: some cannot be found"),
    "split-by-hash": Check("note", "split absent from the source: taken from train by the hash of the file name"),
    "test-is-valid": Check("warning", "test split absent from the source: valid stands in for it"),
    "too-few-images": Check("error", "train has too few images to take the missing splits from it", final=True),
}


@dataclass(frozen=True)
class CheckOptions:
    """What the checks measure against; the defaults are those of the configuration."""

    strict: bool = False
    tolerate: dict[str, int] = field(default_factory=dict)
    max_image_pixels: int = 89_478_485
    max_annotation_mb: int = 2048
    max_class_ratio: float = 100.0
    min_box_patches: float = 0.125
    resolution: int = 560
    patch_size: int = 14
    num_queries: int = 300

    @classmethod
    def of(cls, dataset: DatasetConfig, model: ModelSection) -> CheckOptions:
        """As the sections of a run say.

        Raises:
            ConfigError: dataset.tolerate names no check, or one that nothing can be dropped for.
        """
        return cls(
            strict=dataset.strict,
            tolerate=checked_limits(dataset.tolerate),
            max_image_pixels=dataset.max_image_pixels,
            max_annotation_mb=dataset.max_annotation_mb,
            max_class_ratio=dataset.max_class_ratio,
            min_box_patches=dataset.min_box_patches,
            resolution=model.resolution,
            patch_size=model.patch_size,
            num_queries=model.num_queries,
        )

    def limit(self, code: str) -> int | None:
        """The most rows of a code that do not stop the stage; None: any number."""
        check = CHECKS[code]
        if code in self.tolerate:
            return self.tolerate[code]
        return 0 if check.severity == "error" or (self.strict and check.mends) else None


def checked_limits(tolerate: dict[str, int]) -> dict[str, int]:
    """`dataset.tolerate`, if all its codes can be tolerated.

    Raises:
        ConfigError: see `CheckOptions.of`.
    """
    for code, limit in tolerate.items():
        check = CHECKS.get(code)
        if check is None:
            near = difflib.get_close_matches(code, CHECKS, n=1)
            hint = f"did you mean {near[0]}?" if near else "docs/datasets.md lists them"
            raise ConfigError(f"dataset.tolerate: {code!r} is no check", hint=hint)
        if check.final and limit:
            raise ConfigError(
                f"dataset.tolerate.{code}: {limit} is not possible, since nothing can be dropped to go on without it",
                hint="mend the dataset",
            )
    return tolerate
