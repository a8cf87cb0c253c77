"""The largest batch that a dataset can give, held against batches that the loader really makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rfdetr_core.data.loading import LoaderSettings, train_loader
from rfdetr_core.data.sampling import EpochSampler
from rfdetr_core.training.worst_case import DatasetFacts, scale_weights, worst_case, worst_case_batch
from tests.training import tiny


def facts(**changes: Any) -> DatasetFacts:
    values: dict[str, Any] = {
        "train_images": 1000,
        "valid_images": 100,
        "test_images": 50,
        "max_boxes": 3,
        "valid_max_boxes": 3,
        "widest": (64, 64),
        "tallest": (64, 64),
    }
    return DatasetFacts(**{**values, **changes})


@pytest.mark.parametrize(
    ("settings", "side"),
    [
        ({"multi_scale": "off"}, 32),
        ({"multi_scale": "per-batch"}, 112),
        ({"multi_scale": "per-sample"}, 112),
        ({"multi_scale": "per-batch", "expanded_scales": False}, 96),
    ],
)
def test_the_largest_side_that_training_draws(settings: dict[str, Any], side: int) -> None:
    worst = worst_case(tiny.model_config(), tiny.train_config(**settings), facts())
    assert worst.largest == (side, side)
    assert worst.padded is (settings["multi_scale"] == "per-sample")
    assert worst.shapes_known


@pytest.mark.parameter("auto_batch_max_targets_per_image")
@pytest.mark.parametrize(
    ("max_boxes", "limit", "expected"), [(3, 100, 3), (700, 100, 100), (700, 500, 500), (0, 100, 1)]
)
def test_as_many_boxes_as_the_fullest_image_up_to_the_limit(max_boxes: int, limit: int, expected: int) -> None:
    train = tiny.train_config(auto_batch_max_targets_per_image=limit)
    assert worst_case(tiny.model_config(), train, facts(max_boxes=max_boxes)).targets == expected


KEPT = {"square_resize_div_64": False, "multi_scale": "off"}


@pytest.mark.parameter("square_resize_div_64")
@pytest.mark.parametrize(
    ("widest", "tallest", "settings", "extent"),
    [
        ((640, 480), (480, 640), {}, (528, 528)),  # 512 high or wide, in blocks of 48
        ((1000, 100), (640, 480), {}, (384, 1344)),  # 384 x 3840 is cut at 1333, which is 1344 in blocks
        ((1000, 100), (640, 480), {"scale_jitter": False}, (384, 1344)),
        ((1000, 100), (1000, 200), {"scale_jitter": False}, (288, 1344)),  # 267 high: a crop would have 384
        ((1000, 100), (100, 1000), {}, (1344, 1344)),
        (None, None, {}, (1344, 1344)),  # prepared before shapes were recorded
    ],
)
def test_where_the_aspect_is_kept_shapes_decide(
    widest: Any, tallest: Any, settings: dict[str, Any], extent: tuple[int, int]
) -> None:
    model = tiny.model_config(resolution=384, patch_size=16, num_windows=3)
    train = tiny.train_config(**KEPT, **settings)
    worst = worst_case(model, train, facts(widest=widest, tallest=tallest))
    assert worst.largest == extent
    assert worst.padded
    assert worst.shapes_known is (widest is not None)


@pytest.mark.parameter("square_resize_div_64")
@pytest.mark.parametrize("settings", [{}, {"multi_scale": "per-sample"}, {"square_resize_div_64": True}])
def test_no_batch_of_the_loader_is_larger_and_one_is_as_large(tmp_path: Any, settings: dict[str, Any]) -> None:
    folder = tiny.draw(tmp_path / "coco", train=8)
    for number, size in enumerate([(120, 40), (40, 200), (64, 64), (300, 30)]):
        path = sorted((folder / "train").glob("*.jpg"))[number]
        _reshape(folder, path.name, size)
    dataset = tiny.prepare(folder, tmp_path / "prepared")
    model = tiny.model_config()
    train = tiny.train_config(**{"square_resize_div_64": False, "multi_scale": "per-batch", **settings})
    worst = worst_case(model, train, DatasetFacts.of(dataset.document))
    split = dataset.split("train")
    sampler = EpochSampler(
        len(split),
        batch_size=4,
        grad_accum_steps=1,
        seed=0,
        scales=[
            height
            for height, _ in worst_case(model, train.model_copy(update={"square_resize_div_64": True}), facts()).extents
        ],
        per_sample=train.multi_scale == "per-sample",
    )
    loader = train_loader(
        split,
        sampler,
        LoaderSettings(0, None, None, None),
        torch.device("cpu"),
        seed=0,
        scale_jitter=True,
        flip=True,
        square=train.square_resize_div_64,
        multiple=model.block,
    )
    heights, widths = [], []
    for epoch in range(60):
        sampler.start(epoch)
        for batch in loader:
            heights.append(batch.pixels.shape[2])
            widths.append(batch.pixels.shape[3])
            assert batch.sizes is None or worst.padded
    assert (max(heights), max(widths)) == worst.largest


def _reshape(folder: Any, name: str, size: tuple[int, int]) -> None:
    """Give a drawn image another size, without boxes."""
    import json

    Image.fromarray(np.zeros((size[1], size[0], 3), dtype=np.uint8)).save(folder / "train" / name)
    path = folder / "train" / "_annotations.coco.json"
    document = json.loads(path.read_text())
    row = next(image for image in document["images"] if image["file_name"] == name)
    row["width"], row["height"] = size
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != row["id"]]
    path.write_text(json.dumps(document))


def test_facts_come_from_the_prepared_dataset(tmp_path: Any) -> None:
    dataset = tiny.prepare(tiny.draw(tmp_path / "coco", train=5, valid=3, test=2), tmp_path / "prepared")
    found = DatasetFacts.of(dataset.document)
    assert (found.train_images, found.valid_images, found.test_images) == (5, 3, 2)
    table = dataset.split("train").table
    shapes = {(int(w), int(h)) for w, h in zip(table.widths, table.heights, strict=True)}
    assert {found.widest, found.tallest} <= shapes
    assert found.widest is not None and found.tallest is not None
    assert found.widest[0] / found.widest[1] == max(w / h for w, h in shapes)
    assert found.tallest[0] / found.tallest[1] == min(w / h for w, h in shapes)
    assert found.max_boxes == dataset.max_boxes_per_image
    del dataset.document["splits"]["train"]["extreme_images"]
    assert DatasetFacts.of(dataset.document).widest is None


def test_a_batch_of_it_is_legal() -> None:
    batch = worst_case_batch(2, (32, 48), 50, 3, padded=True)
    x1y1, x2y2 = batch.boxes[:, :2] - batch.boxes[:, 2:] / 2, batch.boxes[:, :2] + batch.boxes[:, 2:] / 2
    assert batch.pixels.shape == (2, 3, 32, 48)
    assert batch.boxes.shape == (100, 4)
    assert (x2y2 > x1y1).all()
    assert (batch.boxes > 0).all()
    assert (batch.boxes < 1).all()
    assert set(batch.labels.tolist()) == {0, 1, 2}
    assert len({tuple(box) for box in batch.boxes.tolist()}) == 100  # identical boxes would match too easily
    assert batch.mask is not None and batch.mask[:, -1].all() and not batch.mask[:, :-1, :-1].any()
    assert worst_case_batch(2, (32, 32), 1, 3).mask is None


def test_how_often_a_batch_has_each_scale() -> None:
    assert scale_weights(4, per_sample=False, batch_size=9) == [0.25] * 4
    assert scale_weights(4, per_sample=True, batch_size=1) == pytest.approx([0.25] * 4)
    drawn = np.random.default_rng(0).integers(3, size=(20_000, 2)).max(axis=1)
    counted = np.bincount(drawn, minlength=3) / len(drawn)
    assert scale_weights(3, per_sample=True, batch_size=2) == pytest.approx(counted, abs=0.02)
