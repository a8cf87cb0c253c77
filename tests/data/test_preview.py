"""Grids of images with boxes: on their place, in their colour, and without touching the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rfdetr_core.data.loading import EpochSampler, Item, LoaderSettings, collate, eval_loader, train_loader
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.preview import grid, write_augmentation_preview, write_dataset_grids
from rfdetr_core.errors import StorageAccessError
from tests.data.helpers import grid_dataset, prepared

CPU = torch.device("cpu")
ALONE = LoaderSettings(0, None, None, None)
NAMES = ("cat", "dog")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("preview")
    return prepared(grid_dataset(folder / "source", 20), folder / "prepared")


def loaders(dataset: PreparedDataset, **options: Any) -> tuple[Any, Any]:
    train, valid = dataset.split("train"), dataset.split("valid")
    sampler = EpochSampler(len(train), batch_size=4, grad_accum_steps=1, seed=3, scales=(32, 64), per_sample=True)
    sampler.start(0)
    words = {"seed": 3, "scale_jitter": True, "flip": True, "multiple": 32, **options}
    return (
        train_loader(train, sampler, ALONE, CPU, **words),
        eval_loader(valid, ALONE, CPU, resolution=64, batch_size=4),
    )


def item(height: int, width: int, box: tuple[float, float, float, float], label: int) -> Item:
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    return Item(pixels, np.array([box], dtype=np.float32), np.array([label]), 0)


def test_a_box_is_drawn_around_its_place_and_padding_is_left_out() -> None:
    sheet = np.asarray(grid(collate([item(32, 64, (0.5, 0.5, 0.5, 0.5), 0), item(64, 64, (0.5, 0.5, 1, 1), 1)]), NAMES))
    assert sheet.shape == (960, 960, 3)
    first = sheet[:320, :320].astype(int)
    assert (first[:160] != 32).any(axis=(1, 2)).all() and (first[160:] == 32).all()  # 2 : 1, and nothing below it
    colour = (first == first[40, 150]).all(axis=2)
    rows, columns = np.nonzero(colour[40:])  # above is the name
    assert first[40, 150].tolist() != [128, 128, 128]
    assert (columns.min(), columns.max(), rows.max() + 40) == (80, 240, 120)
    assert (first[60:100, 100:220] == 128).all()
    second = sheet[:320, 320:640].astype(int)
    assert (second[300, 0] != first[40, 150]).any() and (second[300, 0] == second[300, 319]).all()
    assert (sheet[320:] == 32).all()


def test_the_class_s_name_is_written_beside_its_box() -> None:
    sheets = [
        np.asarray(grid(collate([item(64, 64, (0.5, 0.5, 0.1, 0.1), 0)]), [name, "x"])) for name in ("cat", "dog")
    ]
    assert not np.array_equal(*sheets)
    assert np.array_equal(sheets[0][200:], sheets[1][200:])


@pytest.mark.parameter("save_dataset_grids")
def test_the_first_three_batches_of_each_split_become_grids(dataset: PreparedDataset, tmp_path: Path) -> None:
    train, valid = loaders(dataset)
    folder = tmp_path / "dataset_grids"
    written = write_dataset_grids(folder, "train", train, NAMES) + write_dataset_grids(folder, "val", valid, NAMES)
    names = ["train_batch0_grid.jpg", "train_batch1_grid.jpg", "train_batch2_grid.jpg", "val_batch0_grid.jpg"]
    assert [path.name for path in written] == names == sorted(path.name for path in folder.iterdir())
    for path, batch in zip(written, [*list(train)[:3], *valid], strict=True):
        with Image.open(path) as image:
            assert image.format == "JPEG"
            difference = np.asarray(image).astype(int) - np.asarray(grid(batch, NAMES)).astype(int)
        assert np.abs(difference).mean() < 12  # the pictures of just these batches; JPEG blurs thin lines and noise
    pictures = [path.read_bytes() for path in written]
    assert len(set(pictures)) == 4


def test_training_is_not_disturbed(dataset: PreparedDataset, tmp_path: Path) -> None:
    untouched = [batch.pixels.numpy().tobytes() for batch in loaders(dataset)[0]]
    train, _ = loaders(dataset)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    write_augmentation_preview(tmp_path / "augmentation.jpg", train, NAMES)
    write_dataset_grids(tmp_path, "train", train, NAMES)
    assert torch.equal(torch.get_rng_state(), state)
    assert [batch.pixels.numpy().tobytes() for batch in train] == untouched


def test_the_preview_shows_nine_augmented_images(dataset: PreparedDataset, tmp_path: Path) -> None:
    pictures = []
    for config in ({}, {"RandomBrightnessContrast": {"brightness_limit": [0.9, 0.9], "p": 1.0}}):
        train, _ = loaders(dataset, flip=False, aug_config=config)
        path = tmp_path / "deep" / "augmentation.jpg"
        write_augmentation_preview(path, train, NAMES)
        with Image.open(path) as image:
            pictures.append(np.asarray(image).astype(float))
    cells = pictures[0].reshape(3, 320, 3, 320, 3).std(axis=(1, 3, 4))
    assert (cells > 5).all()  # nine pictures of noise, none of them empty
    assert pictures[1].mean() > pictures[0].mean() + 40


def test_a_folder_that_cannot_be_written_is_named(dataset: PreparedDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageAccessError, match=r"file/augmentation.jpg: cannot be written: (Not a directory|File exists) "
    ):
        write_augmentation_preview(tmp_path / "file" / "augmentation.jpg", loaders(dataset)[0], NAMES)
