"""A seeded COCO dataset of textured shapes, for demos and tests: real images, no download."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rfdetr_core.errors import ConfigError

CLASS_NAMES = ("rectangle", "ellipse", "triangle")
SPLITS = ("train", "valid", "test")


def write_sample_dataset(
    folder: Path,
    *,
    train: int = 800,
    valid: int = 100,
    test: int = 100,
    size: int = 400,
    max_objects: int = 6,
    seed: int = 0,
) -> None:
    """Write `train`/`valid`/`test` splits in the COCO layout of Roboflow exports.

    Each image is about `size` x `size` px: a textured background and 1 to `max_objects` filled shapes,
    each side 8 to 40 % of the image's shorter side, a darker outline, colour independent of class, overlaps allowed.
    An image depends only on (seed, split, index), so a larger set contains the smaller one.

    Raises:
        ConfigError: a count below 1, a size below 32 px, a negative seed, or a folder that cannot be written or
            already holds something else.
    """
    counts = dict(zip(SPLITS, (train, valid, test), strict=True))
    for name, value, least in (*((s, n, 1) for s, n in counts.items()), ("size", size, 32), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name}: {value} is not allowed", hint=f"use {least} or more")
    if max_objects < 1:
        raise ConfigError(f"max_objects: {max_objects} is not allowed", hint="use 1 or more")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists and is not an empty folder", hint="name a new folder with --out")
        _write_splits(folder, counts, size, max_objects, seed)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}", hint="name another folder") from error


def _write_splits(folder: Path, counts: dict[str, int], size: int, max_objects: int, seed: int) -> None:
    """Draw aside, and move when all is whole: an interrupted drawing leaves nothing that looks finished."""
    exists = folder.exists()  # it may be a mounted volume, which cannot be replaced, only filled
    beside = folder if exists else folder.parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{folder.name}-") as scratch:
        drawn = Path(scratch) / "drawn"
        for split, count in counts.items():
            _write_split(drawn / split, split, count, size, max_objects, seed)
        if exists:
            for split in reversed(SPLITS):  # train last: without it, it is no dataset
                (drawn / split).rename(folder / split)
        else:
            drawn.rename(folder)


def _write_split(folder: Path, split: str, count: int, size: int, max_objects: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        image, shapes = draw_image(rng, size, max_objects)
        file_name = f"{split}_{index:05d}.jpg"
        image.save(folder / file_name, quality=90)
        images.append({"id": index, "file_name": file_name, "width": image.width, "height": image.height})
        for label, (x, y, w, h) in shapes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "bbox": [x, y, w, h],
                    "area": round(w * h, 2),
                    "iscrowd": 0,
                    "segmentation": [],
                }
            )
    # The parent category without annotations is what Roboflow's exports look like; readers must drop it.
    categories = [{"id": 0, "name": "shapes", "supercategory": "none"}]
    categories += [{"id": i + 1, "name": name, "supercategory": "shapes"} for i, name in enumerate(CLASS_NAMES)]
    document = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(document))


def draw_image(
    rng: np.random.Generator, size: int, max_objects: int
) -> tuple[Image.Image, list[tuple[int, tuple[float, float, float, float]]]]:
    """One image and its shapes as (label, (x, y, w, h) in pixels), drawn in that order."""
    width, height = (int(size * rng.uniform(0.9, 1.1)) for _ in range(2))
    image = Image.fromarray(_texture(rng, width, height))
    draw = ImageDraw.Draw(image)
    shapes = []
    for _ in range(int(rng.integers(1, max_objects + 1))):
        label = int(rng.integers(len(CLASS_NAMES)))
        short_side = min(width, height)
        w = float(rng.uniform(0.08, 0.40)) * short_side
        h = float(np.clip(w * rng.uniform(0.75, 1.33), 0.08 * short_side, 0.40 * short_side))
        x, y = float(rng.uniform(0, width - w)), float(rng.uniform(0, height - h))
        fill = tuple(int(v) for v in rng.integers(0, 256, 3))
        outline = tuple(v // 3 for v in fill)
        if CLASS_NAMES[label] == "rectangle":
            draw.rectangle([x, y, x + w, y + h], fill=fill, outline=outline, width=2)
        elif CLASS_NAMES[label] == "ellipse":
            draw.ellipse([x, y, x + w, y + h], fill=fill, outline=outline, width=2)
        else:
            draw.polygon([(x + w / 2, y), (x, y + h), (x + w, y + h)], fill=fill, outline=outline, width=2)
        shapes.append((label, (round(x, 2), round(y, 2), round(w, 2), round(h, 2))))
    return image, shapes


def _texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth patches around one base colour plus grey pixel noise. (H, W, 3)"""
    base = rng.uniform(40, 215, 3)
    patches = Image.fromarray(np.clip(base + rng.normal(0, 35, (8, 8, 3)), 0, 255).astype(np.uint8))
    smooth = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + 12 * rng.standard_normal((height, width, 1), dtype=np.float32)
    texture: np.ndarray[Any, np.dtype[np.uint8]] = np.clip(noisy, 0, 255).astype(np.uint8)
    return texture
