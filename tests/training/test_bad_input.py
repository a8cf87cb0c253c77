"""What no one would want to train on, and where no one could write: a training ends well, or says what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from rfdetr_core import RFDETRPico, hardware
from rfdetr_core.__main__ import main
from rfdetr_core.data import transforms
from rfdetr_core.data.loading import Batch
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import StorageAccessError
from rfdetr_core.training.engine import Engine
from rfdetr_core.training.loop import train
from tests.data.helpers import annotation, document, image_row, prepared, write_dataset, write_split
from tests.training import tiny
from tests.training.test_data_fields import batches as batches
from tests.training.test_loop import best_files, rows
from tests.training.test_parameters import ARCHITECTURE, SETTINGS

SIZES = ((8, 8), (2000, 40), (40, 2000), (640, 480), (1, 1), (4000, 1))
"""Width and height: nothing that a camera makes in one series."""


def images_of(sizes: Sequence[tuple[int, int]], *, boxes: bool = True) -> dict[str, Any]:
    """A COCO document with an image of each size; in each, a box of a quarter of its sides and one of all of it."""
    listed = [image_row(i, f"{i}.png", *size) for i, size in enumerate(sizes)]
    found = [
        annotation(2 * i + whole, i, 1 + whole, (0, 0, w, h) if whole else (w / 2, h / 2, w / 4, h / 4))
        for i, (w, h) in enumerate(sizes)
        for whole in (0, 1)
    ]
    return document(listed, found if boxes else [])


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("odd")
    source = write_dataset(folder / "source", images_of(SIZES), images_of(SIZES))
    return prepared(source, folder / "prepared")


@pytest.mark.parameter("square_resize_div_64")
class TestSizes:
    @pytest.mark.parametrize("jitter", [True, False])
    @pytest.mark.parametrize("square", [True, False])
    def test_all_kinds_in_one_batch(
        self,
        odd: PreparedDataset,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        batches: list[Batch],
        square: bool,
        jitter: bool,
    ) -> None:
        monkeypatch.setattr(transforms, "LONGEST_SIDE", 100)  # the real one takes minutes here: see the test below
        settings = {"square_resize_div_64": square, "scale_jitter": jitter, "save_dataset_grids": True}
        measured = {"compute_val_loss": True, "compute_train_metrics": True}
        result = train(tiny.job(odd, tmp_path, epochs=2, batch=len(SIZES), **settings, **measured))
        assert (result.epochs, result.optimizer_steps) == (2, len(batches))
        assert {image for batch in batches for image in batch.images} == set(range(len(SIZES)))
        for batch in batches:
            assert (batch.boxes > 0).all() and (batch.boxes <= 1).all()
            assert batch.boxes.shape == (sum(batch.counts), 4)
        for row in rows(tmp_path):
            assert all(math.isfinite(value) for value in row.values()), row
            assert 0.0 <= row["val/mAP_50_95"] <= 1.0
        shapes = {tuple(batch.pixels.shape[-2:]) for batch in batches}
        assert (shapes == {(32, 32)}) is square
        assert all(side % tiny.model_config().block == 0 for shape in shapes for side in shape)

    @pytest.mark.long  # steps on strips of 1,344 px
    def test_one_by_one_a_strip_stays_one(self, odd: PreparedDataset, tmp_path: Path, batches: list[Batch]) -> None:
        train(tiny.job(odd, tmp_path, epochs=2, batch=1, square_resize_div_64=False, scale_jitter=False))
        found = {batch.images[0]: (tuple(batch.pixels.shape[-2:]), batch.sizes) for batch in batches}
        assert found == {
            0: ((32, 32), None),
            1: ((32, 1344), ((27, 1333),)),
            2: ((1344, 32), ((1333, 27),)),
            3: ((32, 48), ((32, 43),)),
            4: ((32, 32), None),
            5: ((16, 1344), ((1, 1333),)),
        }


@pytest.mark.parametrize("early_stopping", [False, True])
def test_valid_images_without_any_box(tmp_path: Path, caplog: pytest.LogCaptureFixture, early_stopping: bool) -> None:
    """From the folder of images to detections: it is said twice, and -1 stands for what cannot be measured."""
    source = write_dataset(tmp_path / "source", images_of([(64, 48)] * 6), images_of([(64, 48)] * 3, boxes=False))
    write_split(source, "test", images_of([(64, 48)] * 2), seed=3)
    settings = {**SETTINGS, "epochs": 3, "compute_val_loss": True, "log_per_class_metrics": True, "run_test": True}
    stopping = {"early_stopping": early_stopping, "early_stopping_patience": 1}
    model, output = RFDETRPico(**ARCHITECTURE), tmp_path / "out"
    result = model.train(dataset_dir=source, output_dir=output, **settings, **stopping)
    assert (result.best_score, result.best_epoch, result.epochs) == (-1.0, 0, 2 if early_stopping else 3)
    assert "class without boxes" in caplog.text and "valid: cat" in caplog.text
    assert "none of 3 validation images has a box" in caplog.text
    *epochs, test = rows(output)
    for row in epochs:
        numbers = {name: value for name, value in row.items() if name.startswith("val/")}
        assert all(math.isfinite(value) for value in numbers.values())
        assert {value for name, value in numbers.items() if "mA" in name or "F1" in name} == {-1.0}
        assert not [name for name in numbers if "AP/" in name]
        assert numbers["val/loss_bbox"] == numbers["val/loss_giou"] == 0.0 < numbers["val/loss_ce"]
    assert 0.0 <= test["test/mAP_50_95"] <= 1.0
    assert best_files(output) == {"regular": ("regular", 0), "ema": ("ema", 0), "total": ("regular", 0)}
    assert len(model.predict(source / "valid" / "0.png", threshold=0)) > 0
    assert model.evaluate(dataset_dir=source, split="valid", num_workers=0).map == -1.0


def test_one_image_and_a_batch_of_many(tmp_path: Path, batches: list[Batch]) -> None:
    source = write_dataset(tmp_path / "source", images_of([(64, 48)]), images_of([(64, 48)]))
    dataset = prepared(source, tmp_path / "prepared")
    result = train(tiny.job(dataset, tmp_path / "out", epochs=1, batch=4, accum=3, num_workers=2))
    assert {batch.images for batch in batches} == {(0,) * 4}
    assert len(batches) == 3 * result.optimizer_steps
    assert 0.0 <= rows(tmp_path / "out")[0]["val/mAP_50_95"] <= 1.0


class TestUnwritable:
    """Said before anything is computed, in one line that names the place."""

    @pytest.fixture(autouse=True)
    def nothing_is_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rfdetr_core.training.batches.train_loader", None)
        monkeypatch.setattr(Engine, "optimizer_step", None)

    @pytest.mark.parametrize("below", ["", "below/it"])
    def test_a_file_in_the_place_of_the_folder(self, dataset: PreparedDataset, tmp_path: Path, below: str) -> None:
        (tmp_path / "taken").write_text("mine")
        with pytest.raises(StorageAccessError, match=rf"^cannot write {tmp_path}/taken.*: ") as caught:
            train(tiny.job(dataset, tmp_path / "taken" / below, epochs=1))
        self.is_told_well(caught.value)
        assert (tmp_path / "taken").read_text() == "mine"

    @pytest.mark.parametrize("name", ["checkpoints", "output"])
    def test_either_folder_of_a_stage(self, dataset: PreparedDataset, tmp_path: Path, name: str) -> None:
        (tmp_path / "taken").touch()
        job = dataclasses.replace(tiny.job(dataset, tmp_path / "good", epochs=1), **{name: tmp_path / "taken"})
        with pytest.raises(StorageAccessError, match=rf"^cannot write {tmp_path}/taken: ") as caught:
            train(job)
        self.is_told_well(caught.value)

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_folder_of_someone_else(self, dataset: PreparedDataset, exists: bool) -> None:
        with tempfile.TemporaryDirectory() as folder, unprivileged(Path(folder)):
            place = Path(folder) / ("" if exists else "new")
            with pytest.raises(StorageAccessError, match=rf"^cannot write {folder}.*: Permission denied ") as caught:
                train(tiny.job(dataset, place, epochs=1))
        self.is_told_well(caught.value)

    @pytest.mark.parametrize("kind", ["api", "command"])
    @pytest.mark.parametrize("below", ["", "below/it"])
    def test_by_every_way_to_train(
        self,
        dataset: PreparedDataset,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        kind: str,
        below: str,
    ) -> None:
        """A prepared dataset is used where it lies: nothing else needs the folder before."""
        (tmp_path / "taken").touch()
        place = tmp_path / "taken" / below
        if kind == "api":
            with pytest.raises(StorageAccessError, match=r"^cannot write .*taken") as caught:
                RFDETRPico(**ARCHITECTURE).train(dataset_dir=dataset.folder, output_dir=place, **SETTINGS)
            self.is_told_well(caught.value)
            return
        config = {
            "name": "shapes",
            "dataset": {"uri": str(dataset.folder)},
            "model": {"variant": "pico", **ARCHITECTURE},
            "train": SETTINGS,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
        monkeypatch.setattr(hardware, "keep_freed_memory", lambda: None)  # what the command does to its process ...
        for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):  # ... is not done to that of the tests
            monkeypatch.setenv(name, os.environ.get(name, "1"))
        code = main(["train", "--config", str(tmp_path / "run.yaml"), "--output-dir", str(place)])
        said = capsys.readouterr().err.splitlines()[-1]
        assert code == 2
        assert "cannot write" in said and "taken" in said

    @staticmethod
    def is_told_well(error: StorageAccessError) -> None:
        assert error.exit_code == 2
        assert error.hint
        assert "\n" not in str(error)


@contextlib.contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """A folder that can be read and not written, also where root runs the tests."""
    root = os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o700)
