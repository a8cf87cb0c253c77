"""Batches: which images, in which order, with which boxes; and how workers are run."""

from __future__ import annotations

import io
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.data.images import decode_image
from rfdetr_core.data.loading import (
    Batch,
    BatchLoader,
    Draw,
    EpochSampler,
    EvalImages,
    Item,
    LoaderSettings,
    TrainImages,
    collate,
    eval_loader,
    train_loader,
)
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.data.transforms import View, aspect_size, normalise, resample, to_square
from rfdetr_core.errors import DatasetError
from tests.data.helpers import (
    STORED_BY,
    annotation,
    document,
    encoded,
    grid_dataset,
    image_row,
    prepared,
    write_dataset,
)

CPU = torch.device("cpu")
ALONE = LoaderSettings(0, None, None, None)
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12 on any fork


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> PreparedSplit:
    folder = tmp_path_factory.mktemp("loading")
    return prepared(grid_dataset(folder / "source", 10), folder / "prepared").split("train")


def sampler_of(images: int, batch: int, accum: int, *, seed: int = 3, scales: Any = (32, 64, 96)) -> EpochSampler:
    return EpochSampler(images, batch_size=batch, grad_accum_steps=accum, seed=seed, scales=scales)


def drawn(sampler: EpochSampler, epoch: int, step: int = 0) -> list[list[Draw]]:
    sampler.start(epoch, step)
    return list(sampler)


# ---- which images (training spec 4.5) ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "batch", "accum", "micro_batches", "steps"),
    [(64, 4, 3, 18, 6), (64, 8, 1, 8, 8), (60, 4, 3, 15, 5), (59, 4, 3, 15, 5), (61, 4, 3, 18, 6), (1, 2, 2, 10, 5)],
)
def test_the_length_of_an_epoch(images: int, batch: int, accum: int, micro_batches: int, steps: int) -> None:
    sampler = sampler_of(images, batch, accum)
    batches = drawn(sampler, 0)
    assert len(batches) == len(sampler) == micro_batches
    assert sampler.steps_per_epoch == steps
    assert all(len(one) == batch for one in batches)


def images_of(batches: list[list[Draw]]) -> list[int]:
    return [draw.image for one in batches for draw in one]


def test_every_image_is_seen_and_the_padding_is_drawn_once() -> None:
    """64 images in steps of 12: 72 draws, 8 of them a second time, the same ones in every epoch and for every seed."""
    extra = set()
    for seed, epoch in ((3, 0), (3, 1), (4, 0)):
        counts = Counter(images_of(drawn(sampler_of(64, 4, 3, seed=seed), epoch)))
        assert set(counts) == set(range(64)) and sum(counts.values()) == 72
        extra.add(tuple(sorted((counts - Counter(range(64))).elements())))
    assert len(extra) == 1


def test_a_tiny_set_is_drawn_with_replacement() -> None:
    """59 images and a step of 12: 60 draws, of which about 63 % differ; 60 images: each once."""
    counts = Counter(images_of(drawn(sampler_of(59, 4, 3), 0)))
    assert sum(counts.values()) == 60 and 25 < len(counts) < 50
    assert Counter(images_of(drawn(sampler_of(60, 4, 3), 0))) == Counter(range(60))


@pytest.mark.parameter("seed")
def test_the_order_depends_on_seed_and_epoch_only() -> None:
    sampler = sampler_of(64, 4, 3)
    epochs = [drawn(sampler, epoch) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    assert drawn(sampler_of(64, 4, 3), 1) == epochs[1]
    assert images_of(drawn(sampler_of(64, 4, 3, seed=4), 0)) != images_of(epochs[0])
    assert images_of(epochs[0]) != sorted(images_of(epochs[0]))
    assert all(draw.epoch == epoch for epoch in (0, 1) for one in epochs[epoch] for draw in one)


@pytest.mark.parametrize("step", [0, 1, 4, 6])
def test_an_epoch_entered_midway_is_the_rest_of_it(step: int) -> None:
    sampler = sampler_of(64, 4, 3)
    rest = drawn(sampler, 2, step)
    assert len(sampler) == len(rest) == (6 - step) * 3
    assert rest == drawn(sampler, 2)[step * 3 :]


def test_a_step_has_one_side_drawn_by_its_number() -> None:
    """random.Random(global step).choice(scales), whatever the seed (training spec 3.2)."""
    import random

    scales = list(range(224, 545, 32))
    sides = set()
    for seed in (0, 9):
        sampler = sampler_of(64, 4, 3, seed=seed, scales=scales)
        for epoch in (0, 3):
            batches = drawn(sampler, epoch)
            for step in range(6):
                window = {draw.side for one in batches[3 * step : 3 * step + 3] for draw in one}
                assert window == {random.Random(epoch * 6 + step).choice(scales)}
                sides |= window
    assert len(sides) > 4


# ---- training images --------------------------------------------------------------------------------------


def train_images(split: PreparedSplit, **options: Any) -> TrainImages:
    return TrainImages(split, **{"seed": 0, "scale_jitter": False, "flip": False, **options})


def near(pixels: Any, expected: Any) -> bool:
    """Training resizes by torch, evaluation by Pillow: one of 256 levels apart."""
    return bool(np.abs(pixels.astype(int) - expected).max() <= 1)


def test_a_plain_view_is_the_whole_image(split: PreparedSplit) -> None:
    pixels, boxes, labels, image, _ = train_images(split)[Draw(2, 0, 32)]
    assert near(pixels, to_square(split.decode(2), 32))
    rows = split.table.rows(2)
    x1, y1, x2, y2 = (split.table.boxes[rows] / [64, 48, 64, 48]).T
    expected = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1)
    assert boxes == pytest.approx(expected, abs=1e-6)
    assert labels.tolist() == split.table.labels[rows].tolist() and image == 2


def test_augmentation_depends_on_seed_epoch_and_image_only(split: PreparedSplit) -> None:
    def item(seed: int, epoch: int, image: int, side: int = 32) -> tuple[bytes, bytes]:
        pixels, boxes, *_ = train_images(split, seed=seed, scale_jitter=True, flip=True)[Draw(image, epoch, side)]
        return pixels.tobytes(), boxes.tobytes()

    assert item(0, 1, 2) == item(0, 1, 2)
    assert len({item(0, epoch, 2) for epoch in range(20)}) > 5
    assert len({item(seed, 0, 2) for seed in range(20)}) > 5
    assert item(0, 5, 2, side=64)[1] == item(0, 5, 2)[1]  # the same view at another side


def test_flips_mirror_pixels_and_boxes(split: PreparedSplit) -> None:
    plain, flipping = train_images(split), train_images(split, flip=True)
    mirrored = 0
    for epoch in range(200):
        pixels, boxes, labels, *_ = plain[Draw(1, epoch, 32)]
        other, others, other_labels, *_ = flipping[Draw(1, epoch, 32)]
        assert labels.tolist() == other_labels.tolist()
        if np.array_equal(other, pixels[:, ::-1]):
            mirrored += 1
            assert others == pytest.approx(np.stack([1 - boxes[:, 0], *boxes[:, 1:].T], axis=1), abs=1e-6)
        else:
            assert np.array_equal(other, pixels) and np.array_equal(others, boxes)
    assert 70 < mirrored < 130


def marked(
    tmp_path: Path, size: tuple[int, int], box: tuple[int, int, int, int], orientation: int = 1
) -> PreparedSplit:
    """One black JPEG with a white box, stored turned if so asked."""
    x, y, w, h = box
    shown = Image.new("RGB", size)
    shown.paste((255, 255, 255), (x, y, x + w, y + h))
    write_dataset(tmp_path / "source", document([image_row(1, "a.jpg", *size)], [annotation(bbox=box)]))
    tags = Image.Exif()
    tags[0x0112] = orientation
    held = decode_image(encoded(shown), STORED_BY[orientation])
    held.save(tmp_path / "source" / "train" / "a.jpg", quality=100, subsampling=0, exif=tags)
    return prepared(tmp_path / "source", tmp_path / "prepared").split("train")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("size", "box"),
    [((1001, 803), (800, 600, 190, 190)), ((1001, 803), (3, 5, 200, 90)), ((650, 431), (500, 100, 140, 320))],
)
def test_a_marker_lands_within_a_pixel_of_its_box_at_every_decode_scale(
    tmp_path: Path, size: tuple[int, int], box: tuple[int, int, int, int], orientation: int
) -> None:
    marker = marked(tmp_path, size, box, orientation)
    images = train_images(marker, scale_jitter=True, flip=True)
    shown = 0
    for epoch in range(28):
        side = (64, 96, 160, 416)[epoch % 4]
        pixels, boxes, *_ = images[Draw(0, epoch, side)]
        light = np.clip(pixels[..., 1].astype(float) - 8, 0, None) / 247  # without the compression's ripples
        if not len(boxes):
            assert light.sum() < side / 2  # at most a sliver
            continue
        cx, cy, w, h = boxes[0].astype(float) * side
        if min(w, h) < 4:
            continue
        shown += 1
        centres = np.arange(side) + 0.5
        centre = (light.sum(axis=0) @ centres / light.sum(), light.sum(axis=1) @ centres / light.sum())
        assert centre == pytest.approx((cx, cy), abs=0.3)
        assert light.sum() == pytest.approx(w * h, abs=0.5 * (w + h))  # half a pixel on each side
    assert shown > 10


def test_a_scaled_decode_is_used_and_never_below_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every draw the decoded window has at least the side's pixels, unless the image itself has fewer."""
    split = marked(tmp_path, (1208, 904), (100, 100, 300, 300))
    seen: list[tuple[float, int, int]] = []

    def record(pixels: Any, size: tuple[int, int], view: Any) -> Any:
        height, width = pixels.shape[:2]
        assert width / 1208 == height / 904
        seen.append((min(view.width, view.height), size[0], width))
        return resample(pixels, size, view)

    monkeypatch.setattr("rfdetr_core.data.loading.resample", record)
    images = train_images(split, scale_jitter=True, flip=False)
    for epoch in range(60):
        _ = images[Draw(0, epoch, (56, 150, 400, 900, 1400)[epoch % 5])]
    for window, side, width in seen:  # the window in decoded pixels
        assert window >= side - 1 or width == 1208  # the window is rounded to whole pixels
        assert window < 2.03 * side or width == 151  # no more than need be; the need is rounded up to a pixel
    assert {width for *_, width in seen} == {1208, 604, 302, 151}


def test_crowd_regions_are_no_targets(tmp_path: Path) -> None:
    boxes = [annotation(1, bbox=(0, 0, 30, 30), iscrowd=1), annotation(2, category=2), annotation(3, iscrowd=1)]
    write_dataset(tmp_path / "source", document(annotations=boxes))
    split = prepared(tmp_path / "source", tmp_path / "prepared").split("train")
    assert split.table.crowd.tolist() == [True, False, True]
    _, found, labels, *_ = train_images(split)[Draw(0, 0, 32)]
    assert labels.tolist() == [1] and found.shape == (1, 4)
    _, found, labels, *_ = EvalImages(split, 32)[0]
    assert labels.tolist() == [1] and found[0] == pytest.approx([14 / 64, 9 / 48, 20 / 64, 10 / 48])


# ---- batches ----------------------------------------------------------------------------------------------


def as_bytes(batch: Batch) -> tuple[Any, ...]:
    tensors = (batch.pixels, batch.boxes, batch.labels)
    return (*(tensor.numpy().tobytes() for tensor in tensors), batch.counts, batch.images)


def batches_of(split: PreparedSplit, workers: int, *, epoch: int = 1, step: int = 0) -> list[tuple[Any, ...]]:
    sampler = sampler_of(len(split), 2, 1)
    sampler.start(epoch, step)
    settings = LoaderSettings(workers, None, None, None)
    loader = train_loader(split, sampler, settings, CPU, seed=3, scale_jitter=True, flip=True)
    return [as_bytes(batch) for batch in loader]


@forks
@pytest.mark.parameter("num_workers", "seed")
def test_batches_do_not_depend_on_workers_or_on_where_an_epoch_is_entered(split: PreparedSplit) -> None:
    alone = batches_of(split, 0)
    assert len(alone) == 5 and len(set(alone)) == 5
    assert batches_of(split, 2) == alone
    assert batches_of(split, 2, step=3) == batches_of(split, 0, step=3) == alone[3:]
    assert batches_of(split, 0, epoch=2) != alone


@forks
def test_one_loader_serves_all_epochs(split: PreparedSplit) -> None:
    sampler = sampler_of(len(split), 2, 1)
    loader = train_loader(
        split, sampler, LoaderSettings(2, None, None, None), CPU, seed=3, scale_jitter=True, flip=True
    )
    for epoch, step in ((1, 0), (2, 3), (1, 3)):
        sampler.start(epoch, step)
        assert [as_bytes(batch) for batch in loader] == batches_of(split, 0, epoch=epoch, step=step)


def test_a_batch_is_what_its_images_are(split: PreparedSplit) -> None:
    images = train_images(split)
    draws = [Draw(i, 0, 32) for i in (4, 1, 7)]
    batch = collate([images[draw] for draw in draws])
    assert batch.pixels.shape == (3, 3, 32, 32) and batch.pixels.dtype == torch.uint8
    assert batch.pixels.is_contiguous()
    assert batch.images == (4, 1, 7)
    assert batch.counts == tuple(len(images[draw][1]) for draw in draws)
    pixels, targets = batch.on(CPU)
    assert torch.equal(pixels, normalise(batch.pixels))
    for i, draw in enumerate(draws):
        expected, boxes, labels, *_ = images[draw]
        assert np.array_equal(batch.pixels[i].permute(1, 2, 0).numpy(), expected)
        assert set(targets[i]) == {"labels", "boxes"}
        assert np.array_equal(targets[i]["boxes"].numpy(), boxes) and targets[i]["boxes"].dtype == torch.float32
        assert targets[i]["labels"].tolist() == labels.tolist() and targets[i]["labels"].dtype == torch.int64


def test_an_image_without_boxes_has_an_empty_target(tmp_path: Path) -> None:
    write_dataset(tmp_path / "source", document([image_row(), image_row(2, "b.png")], [annotation()]))
    split = prepared(tmp_path / "source", tmp_path / "prepared").split("train")
    batch = collate([EvalImages(split, 32)[i] for i in (1, 0)])
    assert batch.counts == (0, 1)
    _, targets = batch.on(CPU)
    assert targets[0]["boxes"].shape == (0, 4) and targets[0]["labels"].shape == (0,)
    assert targets[1]["boxes"].shape == (1, 4)
    _, targets = collate([EvalImages(split, 32)[1]]).on(CPU)
    assert targets[0]["boxes"].shape == (0, 4)


def test_evaluation_sees_every_image_once_whole_and_in_order(split: PreparedSplit) -> None:
    batches = list(eval_loader(split, ALONE, CPU, resolution=48, batch_size=4))
    assert [batch.images for batch in batches] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    for batch in batches:
        for i, image in enumerate(batch.images):
            expected = to_square(split.decode(image), 48)
            assert np.array_equal(batch.pixels[i].permute(1, 2, 0).numpy(), expected)


def test_evaluation_never_decodes_small(tmp_path: Path) -> None:
    """A scaled decode changes pixels: for training only (DESIGN section 5)."""
    write_dataset(tmp_path / "source", document([image_row(1, "a.jpg", 640, 480)], [annotation()]))
    split = prepared(tmp_path / "source", tmp_path / "prepared").split("train")
    whole = Image.open(io.BytesIO(split.read_bytes(0))).resize((32, 32), Image.Resampling.BILINEAR)
    evaluated = EvalImages(split, 32)[0][0]
    trained = train_images(split)[Draw(0, 0, 32)][0]
    assert np.array_equal(evaluated, np.asarray(whole))
    assert not np.array_equal(trained, evaluated)


# ---- how workers are run (seed document, Data loading) ----------------------------------------------------


@pytest.mark.parameter("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ((0, None, None, None), "cpu", (0, False, False, None)),
        ((2, None, None, None), "cpu", (2, False, True, 2)),
        ((2, None, None, None), "cuda", (2, True, True, 2)),
        ((2, False, False, 5), "cuda", (2, False, False, 5)),
        ((2, True, True, 1), "cpu", (2, True, True, 1)),
        ((0, None, False, None), "cuda", (0, True, False, None)),
    ],
)
def test_what_is_left_open_is_resolved(settings: Any, device: str, expected: Any) -> None:
    words = LoaderSettings(*settings).keywords(torch.device(device))
    names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
    assert tuple(words[name] for name in names) == expected


@pytest.mark.parameter("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
def test_the_settings_reach_both_loaders(split: PreparedSplit) -> None:
    settings = LoaderSettings(1, True, False, 4)
    training = train_loader(split, sampler_of(10, 2, 1), settings, CPU, seed=0, scale_jitter=True, flip=True)
    for loader in (training, eval_loader(split, settings, CPU, resolution=32, batch_size=2)):
        assert (loader.num_workers, loader.prefetch_factor) == (1, 4)
        assert loader.pin_memory and not loader.persistent_workers


@pytest.mark.parameter("persistent_workers", "prefetch_factor")
@pytest.mark.parametrize(
    ("settings", "named"),
    [((0, None, True, None), "persistent_workers=True"), ((0, None, None, 4), "prefetch_factor=4")],
)
def test_settings_of_workers_without_workers_are_ignored_with_a_warning(
    split: PreparedSplit, settings: Any, named: str
) -> None:
    with pytest.warns(UserWarning, match=rf"{named} is ignored: there are no workers \(num_workers=0\)"):
        ignoring = LoaderSettings(*settings)
    words = ("num_workers", "persistent_workers", "prefetch_factor")
    assert [ignoring.keywords(CPU)[word] for word in words] == [0, False, None]
    batches = list(eval_loader(split, ignoring, CPU, resolution=32, batch_size=10))  # DataLoader itself would refuse
    assert len(batches) == 1


class Origin(EvalImages):
    """Gives away which process loaded an image, and with how many threads."""

    def __getitem__(self, image: int) -> Any:
        assert get_worker_info() is not None
        empty = np.empty((0, 4), dtype=np.float32)
        facts = np.array([os.getpid(), torch.get_num_threads()], dtype=np.int64)
        return Item(np.zeros((2, 2, 3), dtype=np.uint8), empty, facts, image)


@forks
@pytest.mark.parameter("num_workers", "persistent_workers")
@pytest.mark.parametrize("persistent", [None, True, False])
def test_workers_are_processes_that_stay_unless_told_not_to(split: PreparedSplit, persistent: bool | None) -> None:
    words = LoaderSettings(2, None, persistent, None).keywords(CPU)
    loader: Any = torch.utils.data.DataLoader(Origin(split, 32), batch_size=5, **words)

    def facts() -> tuple[set[int], set[int]]:
        labels: list[Tensor] = [batch.labels.view(-1, 2) for batch in loader]
        processes, threads = torch.cat(labels).T.tolist()
        return set(processes), set(threads)

    (first, threads), (second, _) = facts(), facts()
    assert len(first) == 2 and os.getpid() not in first
    assert threads == {1}
    assert (first == second) is (persistent is not False)


@pytest.mark.parameter("pin_memory")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: page-locked memory cannot be asked for")
def test_pinned_batches_are_page_locked(split: PreparedSplit) -> None:
    for given, expected in ((None, True), (False, False)):
        settings = LoaderSettings(0, given, None, None)
        for batch in eval_loader(split, settings, torch.device("cuda"), resolution=32, batch_size=4):
            assert [t.is_pinned() for t in (batch.pixels, batch.boxes, batch.labels)] == [expected] * 3
            assert isinstance(batch, Batch) and len(batch.counts) == len(batch.images)


# ---- images of several sizes in one batch -----------------------------------------------------------------


def an_item(height: int, width: int, *, skipped: tuple[int, ...] = ()) -> Item:
    pixels = np.full((height, width, 3), 200, dtype=np.uint8)
    return Item(pixels, np.array([[0.5, 0.5, 1, 1]], dtype=np.float32), np.array([1]), 0, skipped)


def test_smaller_images_stand_at_the_top_left_and_the_rest_is_padding() -> None:
    batch = collate([an_item(32, 64), an_item(64, 32), an_item(50, 60)], 32)
    assert batch.pixels.shape == (3, 3, 64, 64) and batch.sizes == ((32, 64), (64, 32), (50, 60))
    pixels, targets = batch.on(CPU)
    assert batch.mask is not None
    light = float(normalise(torch.full((1, 3, 1, 1), 200, dtype=torch.uint8))[0, 0])
    for i, (height, width) in enumerate(batch.sizes):
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[:height, :width] = True
        assert torch.equal(batch.mask[i], ~inside)
        assert torch.equal(pixels[i, 0], torch.where(inside, light, 0.0))  # 0 is the mean colour: after normalising
        assert targets[i]["boxes"].tolist() == [[0.5, 0.5, 1, 1]]  # of the image, not of the padded extent


def test_a_batch_is_padded_to_whole_blocks_even_where_its_images_agree() -> None:
    assert collate([an_item(32, 32), an_item(32, 32)], 32).mask is None
    batch = collate([an_item(40, 32), an_item(40, 32)], 32)
    assert batch.pixels.shape[-2:] == (64, 32) and batch.mask is not None
    assert (~batch.mask).sum(dim=(1, 2)).tolist() == [40 * 32, 40 * 32]


@pytest.mark.parameter("multi_scale")
def test_per_sample_draws_a_side_for_each_image() -> None:
    sampler = EpochSampler(64, batch_size=4, grad_accum_steps=3, seed=3, scales=(32, 64, 96), per_sample=True)
    batches = drawn(sampler, 1)
    assert Counter(draw.side for one in batches for draw in one).keys() == {32, 64, 96}
    assert any(len({draw.side for draw in one}) == 3 for one in batches)
    assert drawn(sampler, 1, 4) == batches[12:] and images_of(batches) == images_of(drawn(sampler_of(64, 4, 3), 1))
    assert [d.side for one in drawn(sampler, 2) for d in one] != [d.side for one in batches for d in one]


@pytest.mark.parameter("multi_scale")
def test_per_sample_batches_are_as_large_as_their_largest_image(split: PreparedSplit) -> None:
    sampler = EpochSampler(10, batch_size=2, grad_accum_steps=1, seed=3, scales=(32, 64, 96), per_sample=True)
    sampler.start(0)
    draws = list(sampler)
    loader = train_loader(split, sampler, ALONE, CPU, seed=3, scale_jitter=False, flip=False, multiple=32)
    padded = 0
    for asked, batch in zip(draws, loader, strict=True):
        sides = [draw.side for draw in asked]
        assert batch.pixels.shape[-2:] == (max(sides), max(sides))
        assert (batch.sizes or ((max(sides),) * 2,) * 2) == tuple((side, side) for side in sides)
        padded += batch.mask is not None
        for i, draw in enumerate(asked):
            found = batch.pixels[i, :, : draw.side, : draw.side].permute(1, 2, 0).numpy()
            assert near(found, to_square(split.decode(draw.image), draw.side))
    assert padded > 0


@pytest.mark.parameter("square_resize_div_64")
@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((640, 480), 384, (512, 384)),
        ((480, 640), 384, (384, 512)),
        ((2000, 400), 384, (1333, 267)),
        ((9, 9), 64, (64, 64)),
    ],
)  # fmt: skip
def test_without_squares_the_shorter_side_is_resized_and_the_longer_one_capped(
    size: tuple[int, int], side: int, expected: tuple[int, int]
) -> None:
    assert aspect_size(View(0, 0, *size, flip=False), side) == expected
    assert aspect_size(View(0, 0, 399.7, 400.2, flip=False, cropped=True), side) == (side, side)


@pytest.mark.parameter("square_resize_div_64")
def test_without_squares_images_keep_their_aspect_and_boxes_their_place(tmp_path: Path) -> None:
    marker = marked(tmp_path, (640, 320), (320, 160, 160, 80))
    item = train_images(marker, square=False)[Draw(0, 0, 64)]
    assert item.pixels.shape == (64, 128, 3)
    assert item.boxes[0] == pytest.approx([0.625, 0.625, 0.25, 0.25])
    light = item.pixels[..., 1] > 128
    assert np.argwhere(light).min(axis=0).tolist() == [32, 64] and light.sum() == 16 * 32
    jittered = [train_images(marker, square=False, scale_jitter=True)[Draw(0, epoch, 64)].pixels for epoch in range(30)]
    assert {pixels.shape for pixels in jittered} == {(64, 128, 3), (64, 64, 3)}  # the recipe's crop is a square
    assert train_images(marker)[Draw(0, 0, 64)].pixels.shape == (64, 64, 3)


@pytest.mark.parameter("square_resize_div_64")
def test_batches_without_squares_are_padded_to_whole_blocks(split: PreparedSplit) -> None:
    """64 x 48 images at a shorter side of 32: 43 x 32, in batches of 64 x 32."""
    sampler = sampler_of(10, 2, 1, scales=(32,))
    words: Any = {"seed": 3, "scale_jitter": False, "flip": False, "multiple": 32}
    for batch in train_loader(split, sampler, ALONE, CPU, square=False, **words):
        assert batch.pixels.shape == (2, 3, 32, 64) and batch.sizes == ((32, 43), (32, 43))
        pixels, targets = batch.on(CPU)
        assert batch.mask is not None and (pixels[:, :, :, 43:] == 0).all() and (pixels[:, :, :, :43] != 0).any()
        for image, target in zip(batch.images, targets, strict=True):  # fractions of the image: those of a square
            assert np.array_equal(target["boxes"].numpy(), EvalImages(split, 32)[image].boxes)


@pytest.mark.parameter("scale_jitter")
def test_scale_jitter_crops_and_without_it_the_image_is_whole(split: PreparedSplit) -> None:
    for jitter in (True, False):
        items = [train_images(split, scale_jitter=jitter)[Draw(2, epoch, 32)].pixels for epoch in range(40)]
        whole = sum(near(pixels, to_square(split.decode(2), 32)) for pixels in items)
        assert 8 < whole < 32 if jitter else whole == 40


# ---- unreadable images ------------------------------------------------------------------------------------


def damaged(folder: Path, broken: tuple[int, ...], images: int = 10) -> PreparedSplit:
    """A prepared dataset of which some train images were spoilt afterwards, inside the shard."""
    prepared_set = prepared(grid_dataset(folder / "source", images), folder / "prepared")
    index = prepared_set.split("train").index
    with (folder / "prepared" / "train" / index.shards[0]).open("r+b") as shard:
        for position in broken:
            shard.seek(int(index.offsets[position]))
            shard.write(b"\0" * int(index.lengths[position]))
    return prepared_set.split("train")


def load_all(split: PreparedSplit, workers: int, **options: Any) -> list[Batch]:
    sampler = sampler_of(len(split), 2, 1)
    settings = LoaderSettings(workers, None, None, None)
    words = {"seed": 3, "scale_jitter": True, "flip": True, **options}
    return list(train_loader(split, sampler, settings, CPU, **words))


@forks
@pytest.mark.parameter("skip_corrupt")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_an_error_of_one_line_that_names_it(tmp_path: Path, workers: int) -> None:
    split = damaged(tmp_path, (4,))
    with pytest.raises(DatasetError) as caught:
        load_all(split, workers)
    assert str(caught.value) == (
        "training image train004.png (number 5 of 10) cannot be read: no image format that Pillow knows "
        "(mend or remove it in the source and prepare the dataset again, or allow more than train.skip_corrupt: 0)"
    )
    assert type(caught.value) is DatasetError and caught.value.exit_code == 2
    with pytest.raises(DatasetError, match=r"^evaluation image train004.png \(number 5 of 10\) cannot be read"):
        list(eval_loader(split, LoaderSettings(workers, None, None, None), CPU, resolution=32, batch_size=4))


@forks
@pytest.mark.parameter("skip_corrupt")
@pytest.mark.long
def test_skipped_images_are_replaced_in_the_same_way_wherever_they_are_loaded(tmp_path: Path) -> None:
    split = damaged(tmp_path, (4, 7))
    batches = load_all(split, 0, skip_corrupt=2)
    assert list(map(as_bytes, load_all(split, 2, skip_corrupt=2))) == list(map(as_bytes, batches))
    assert {image for batch in batches for image in batch.skipped} == {4, 7}
    assert sum(len(batch.images) for batch in batches) == 10
    assert not {4, 7} & {image for batch in batches for image in batch.images}
    for batch in batches:  # who stands in brings boxes of its own
        for image, count in zip(batch.images, batch.counts, strict=True):
            assert count <= len(split.table.boxes[split.table.rows(image)])


@pytest.mark.parameter("skip_corrupt")
def test_one_image_passes_over_no_more_than_allowed(tmp_path: Path) -> None:
    """Seven of ten are unreadable: sooner or later a stand-in is unreadable as well."""
    split = damaged(tmp_path, tuple(range(7)))
    batches = load_all(split, 0, skip_corrupt=7)
    assert {image for batch in batches for image in batch.skipped} == set(range(7))
    assert {image for batch in batches for image in batch.images} <= {7, 8, 9}
    with pytest.raises(DatasetError, match=r"or allow more than train\.skip_corrupt: 1\)$"):
        load_all(split, 0, skip_corrupt=1)


@pytest.mark.parameter("skip_corrupt")
def test_a_split_without_one_readable_image_ends_at_once(tmp_path: Path) -> None:
    split = damaged(tmp_path, (0, 1), images=2)
    with pytest.raises(DatasetError, match=r"^training image train000.png \(number 1 of 2\) cannot be read"):
        _ = train_images(split, skip_corrupt=100)[Draw(0, 0, 32)]


def test_a_damaged_shard_is_no_unreadable_image(tmp_path: Path) -> None:
    split = damaged(tmp_path, ())
    shard = tmp_path / "prepared" / "train" / split.index.shards[0]
    with shard.open("r+b") as file:
        file.truncate(int(split.index.offsets[9]) + 5)
    with pytest.raises(DatasetError, match=r"cut short within image 9"):
        _ = train_images(split, skip_corrupt=5)[Draw(9, 0, 32)]


# ---- memory -----------------------------------------------------------------------------------------------


def memory_of_this_process() -> tuple[int, int]:
    """Resident and private bytes; what a fork shares counts to the first only, until it is written to."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: 1024 * int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


class Weighed(TrainImages):
    """Loads an image as training does, and tells the memory of the process that did it in the place of labels."""

    def __getitem__(self, draw: Draw) -> Item:
        item = super().__getitem__(draw)
        assert len(item.boxes) > 500
        # To ask takes as long as to load a hundred images.
        memory = memory_of_this_process() if draw.image % 100 == 0 else (0, 0)
        return item._replace(boxes=item.boxes[:2], labels=np.array(memory, dtype=np.int64))


@forks
@pytest.mark.long
def test_the_memory_of_a_worker_does_not_grow_with_epochs_or_annotations(tmp_path: Path) -> None:
    """A million boxes, twenty epochs: flat arrays are shared, where Python objects would be copied page by page."""
    images, each = 500, 2000
    split = prepared(grid_dataset(tmp_path / "source", 1, width=32, height=32), tmp_path / "prepared").split("train")
    corner = np.random.default_rng(0).uniform(0, 24, (images * each, 2))
    nothing = np.zeros(images, dtype=np.int64)
    split.table = AnnotationTable(
        file_names=np.array([f"{i:06d}.png" for i in range(images)]),
        widths=nothing + 32,
        heights=nothing + 32,
        offsets=np.arange(images + 1) * each,
        boxes=np.concatenate([corner, corner + 8], axis=1),
        labels=np.zeros(images * each, dtype=np.int64),
        areas=np.full(images * each, 64.0),
        crowd=np.zeros(images * each, dtype=np.bool_),
    )
    lengths, first = nothing + split.index.lengths[0], nothing + split.index.offsets[0]
    split.index = replace(split.index, shard_of=nothing, offsets=first, lengths=lengths, orientations=nothing + 1)
    sampler = sampler_of(images, 10, 1, scales=(32,))
    weighed = Weighed(split, seed=0, scale_jitter=False, flip=True)
    loader = BatchLoader(weighed, batch_sampler=sampler, **LoaderSettings(1, None, None, None).keywords(CPU))
    epochs = []
    for epoch in range(20):
        sampler.start(epoch)
        epochs.append(np.concatenate([batch.labels.view(-1, 2).numpy() for batch in loader]).max(axis=0))
    resident, private = np.array(epochs, dtype=np.float64)[1:].T
    slope, start = np.polyfit(np.arange(len(resident)), resident, 1)
    assert slope * len(resident) <= 0.02 * start
    assert private[-1] - private[0] <= 0.02 * start  # a copied page counts here, and not in the sum above
