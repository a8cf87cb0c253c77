"""The drawn dataset."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfdetr_core.data import sample
from rfdetr_core.data.sample import CLASS_NAMES, draw_image, write_sample_dataset
from rfdetr_core.errors import ConfigError


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def annotations(folder: Path, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / split / "_annotations.coco.json").read_text())
    return content


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "drawn"
    write_sample_dataset(folder, train=6, valid=2, test=2, size=96, seed=5)
    return folder


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(drawn: Path, tmp_path: Path) -> None:
    write_sample_dataset(tmp_path / "again", train=6, valid=2, test=2, size=96, seed=5)
    write_sample_dataset(tmp_path / "other", train=6, valid=2, test=2, size=96, seed=6)
    assert digests(drawn) == digests(tmp_path / "again")
    assert set(digests(drawn).values()).isdisjoint(digests(tmp_path / "other").values())


def test_a_larger_set_contains_the_smaller_one(drawn: Path, tmp_path: Path) -> None:
    write_sample_dataset(tmp_path / "small", train=3, valid=1, test=1, size=96, seed=5)
    small, large = digests(tmp_path / "small"), digests(drawn)
    pictures = {name: digest for name, digest in small.items() if name.endswith(".jpg")}
    assert len(pictures) == 5
    assert pictures.items() <= large.items()
    few, many = annotations(tmp_path / "small", "train"), annotations(drawn, "train")
    assert few["images"] == many["images"][:3]
    assert few["annotations"] == many["annotations"][: len(few["annotations"])]


def test_no_image_occurs_twice(drawn: Path) -> None:
    pictures = [digest for name, digest in digests(drawn).items() if name.endswith(".jpg")]
    assert len(set(pictures)) == len(pictures) == 10


def test_one_shape_lies_where_its_box_says() -> None:
    """The same draw without the shape shows which pixels the shape changed."""
    seen = set()
    for index in range(60):
        image, shapes = draw_image(np.random.default_rng(index), 200, 1)
        (label, (x, y, w, h)) = shapes[0]
        background = blank(index)
        rows, columns = np.nonzero((np.asarray(image) != background).any(axis=2))
        extent = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert extent == pytest.approx((x, y, x + w, y + h), abs=2), CLASS_NAMES[label]
        seen.add(label)
    assert seen == {0, 1, 2}


def blank(index: int, size: int = 200) -> np.ndarray[Any, Any]:
    """The background of `draw_image(default_rng(index), size, 1)`: its first draws, none of a shape."""
    rng = np.random.default_rng(index)
    width, height = (int(size * rng.uniform(0.9, 1.1)) for _ in range(2))
    return sample._texture(rng, width, height)


def test_each_class_has_the_shape_of_its_name() -> None:
    """Of its box, a rectangle covers all, an ellipse a share of pi / 4, a triangle half."""
    shares: dict[str, list[float]] = {name: [] for name in CLASS_NAMES}
    for index in range(60):
        image, [(label, (_, _, w, h))] = draw_image(np.random.default_rng(index), 300, 1)
        drawn = (np.asarray(image) != blank(index, 300)).any(axis=2).sum()
        shares[CLASS_NAMES[label]].append(drawn / (w * h))
    expected = {"rectangle": 1.0, "ellipse": np.pi / 4, "triangle": 0.5}
    assert {name: np.median(values) for name, values in shares.items()} == pytest.approx(expected, rel=0.06)


def test_sides_are_8_to_40_percent_of_the_short_side_and_inside() -> None:
    shares = []
    for index in range(300):
        image, shapes = draw_image(np.random.default_rng(index), 128, 6)
        assert 1 <= len(shapes) <= 6
        for _, (x, y, w, h) in shapes:
            shares += [w / min(image.size), h / min(image.size)]
            assert x >= 0 and y >= 0
            assert x + w <= image.width + 0.02 and y + h <= image.height + 0.02
    assert 0.079 <= min(shares) < 0.1  # both ends are reached, neither is passed
    assert 0.38 < max(shares) <= 0.401


def test_colour_is_independent_of_class() -> None:
    """The mean colour at the middle of a shape is the same for all classes, within the noise of 200 shapes each."""
    colours: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for index in range(600):
        image, [(label, (x, y, w, h))] = draw_image(np.random.default_rng(index), 128, 1)
        colours[label].append(image.getpixel((int(x + w / 2), int(y + h * 0.6))))
    for values in colours.values():
        # uniform 0..255 has a standard deviation of 74; 5 standard errors of a mean over at least 170 values
        assert len(values) > 170
        assert np.mean(values, axis=0) == pytest.approx([127.5] * 3, abs=5 * 74 / 170**0.5)


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [("train", 0, 1), ("valid", -1, 1), ("test", 0, 1), ("size", 31, 32), ("max_objects", 0, 1), ("seed", -1, 0)],
)
def test_numbers_out_of_range_are_named(tmp_path: Path, name: str, value: int, legal: int) -> None:
    numbers = {"train": 1, "valid": 1, "test": 1, "size": 32, "max_objects": 1, "seed": 0}
    with pytest.raises(ConfigError, match=f"^{name}: {value} is not allowed .use {legal} or more"):
        write_sample_dataset(tmp_path / "new", **{**numbers, name: value})
    assert not any(tmp_path.iterdir())
    write_sample_dataset(tmp_path / "new", **{**numbers, name: legal})


def test_a_folder_with_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not an empty folder .*--out"):
        write_sample_dataset(tmp_path, train=1, valid=1, test=1, size=32)
    with pytest.raises(ConfigError, match="is not an empty folder"):
        write_sample_dataset(tmp_path / "mine.txt", train=1, valid=1, test=1, size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled_as_a_new_one_is_made(tmp_path: Path) -> None:
    """An empty folder may be a mounted volume: nothing can be renamed over it."""
    (tmp_path / "empty").mkdir()
    inode = (tmp_path / "empty").stat().st_ino
    write_sample_dataset(tmp_path / "empty", train=1, valid=1, test=1, size=32)
    write_sample_dataset(tmp_path / "new" / "deep", train=1, valid=1, test=1, size=32)
    assert (tmp_path / "empty").stat().st_ino == inode
    assert digests(tmp_path / "empty") == digests(tmp_path / "new" / "deep")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"train", "valid", "test"}


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    folder = tmp_path / "sample"
    if exists:
        folder.mkdir()
    calls: list[int] = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # in the second split
            raise KeyboardInterrupt
        return draw_image(*args)

    monkeypatch.setattr(sample, "draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_sample_dataset(folder, train=3, valid=3, test=3, size=32)
    assert sorted(path.name for path in tmp_path.rglob("*")) == (["sample"] if exists else [])


def test_a_folder_that_cannot_be_written_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: ") as caught:
        write_sample_dataset(tmp_path / "file" / "sample", train=1, valid=1, test=1, size=32)
    assert "\n" not in str(caught.value)
