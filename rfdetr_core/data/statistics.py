"""Counts and histograms of a split, for dataset.json and for people."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.data.checks import CheckOptions


def split_statistics(table: AnnotationTable, class_map: ClassMap) -> dict[str, Any]:
    """Counts and histograms of one split that later stages and the report need; sizes in pixels."""
    usable = ~table.crowd
    image_of = np.repeat(np.arange(len(table)), table.counts)
    sides = np.sqrt(np.prod(table.boxes[usable, 2:] - table.boxes[usable, :2], axis=1))
    per_class = np.bincount(table.labels[usable], minlength=len(class_map))
    return {
        "images": len(table),
        "boxes": int(usable.sum()),
        "crowd_regions": int(table.crowd.sum()),
        "images_without_boxes": int((table.counts == 0).sum()),
        "max_boxes_per_image": int(np.bincount(image_of[usable]).max(initial=0)),
        "boxes_per_class": {name: int(n) for name, n in zip(class_map.names, per_class, strict=True)},
        "box_side_histogram": _histogram(sides, [0, 8, 16, 32, 64, 96, 128, 256, 512]),
        "image_short_side_histogram": _histogram(
            np.minimum(table.widths, table.heights), [0, 128, 256, 384, 512, 768, 1024, 2048, 4096]
        ),
        "extreme_images": _extreme_images(table),
    }


def _extreme_images(table: AnnotationTable) -> dict[str, list[int]]:
    """Width and height of the image with the largest aspect, and of the one with the smallest; empty without images."""
    if not len(table):
        return {}
    aspects = table.widths / table.heights
    chosen = {"widest": aspects.argmax(), "tallest": aspects.argmin()}
    return {name: [int(table.widths[image]), int(table.heights[image])] for name, image in chosen.items()}


def _histogram(values: np.ndarray[Any, Any], edges: list[int]) -> dict[str, int]:
    counts = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges))
    labels = [f"{low}-{high}" for low, high in pairwise(edges)] + [f"{edges[-1]}+"]
    return {label: int(n) for label, n in zip(labels, counts, strict=True)}


def shape_histograms(table: AnnotationTable, options: CheckOptions) -> dict[str, tuple[list[str], list[int]]]:
    """For people: title → labels and counts of box sizes and shapes as the model sees them, and of images."""
    usable = ~table.crowd
    image_of = np.repeat(np.arange(len(table)), table.counts)[usable]
    sides = table.boxes[usable, 2:] - table.boxes[usable, :2]
    image_sides = np.stack([table.widths, table.heights], axis=1)
    seen = sides / np.maximum(image_sides[image_of], 1) * options.resolution  # (N, 2) px of the model
    patches = np.sqrt(np.prod(seen, axis=1)) / options.patch_size
    aspects = np.log2(np.maximum(seen[:, 0], 1e-9) / np.maximum(seen[:, 1], 1e-9))
    per_image = np.bincount(image_of, minlength=len(table))
    return {
        "side of a box, in patches of the model": _binned(patches, _PATCHES),
        "width : height of a box, as the model sees it": _binned(aspects, _ASPECTS),
        "shorter side of an image, in pixels": _binned(image_sides.min(axis=1), _SIDES),
        "boxes in an image": _binned(per_image, _BOXES),
    }


_Bins = tuple[list[float], list[str]]  # edges, and a label for what lies below, between and above them
_PATCHES: _Bins = ([0.25, 0.5, 1, 2, 4, 8, 16], ["<¼", "¼–½", "½–1", "1–2", "2–4", "4–8", "8–16", "≥16"])
_ASPECTS: _Bins = ([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], ["1:8", "1:4", "1:2", "1:1", "2:1", "4:1", "8:1"])
_SIDES: _Bins = (
    [128, 256, 384, 512, 768, 1024, 2048],
    ["<128", "–256", "–384", "–512", "–768", "–1024", "–2048", "≥2048"],
)
_BOXES: _Bins = (
    [1, 2, 4, 8, 16, 32, 64, 128, 301],
    ["0", "1", "2–3", "–7", "–15", "–31", "–63", "–127", "–300", ">300"],
)


def _binned(values: np.ndarray[Any, Any], bins: _Bins) -> tuple[list[str], list[int]]:
    edges, labels = bins
    return labels, np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(labels)).tolist()
