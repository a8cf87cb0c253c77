"""section_digest: equal inputs give equal digests, any other value another one."""

from __future__ import annotations

import hashlib

import pytest

from rfdetr_core.config import section_digest
from tests.config.helpers import run_config

PARTS = ["name", "dataset", "train.seed"]


def test_canonical_form() -> None:
    text = (
        '{"dataset":{"format":"auto","max_annotation_mb":2048,"max_class_ratio":100.0,"max_image_pixels":89478485,'
        '"max_unpacked_gb":200.0,"min_box_patches":0.125,"missing_test":"hash","reduce":true,"strict":false,'
        '"tolerate":{},"uri":"s3://data/zellen-ä"},"name":"cells","train.seed":null}'
    )
    config = run_config(dataset={"uri": "s3://data/zellen-ä"})
    assert section_digest(config, PARTS) == hashlib.sha256(text.encode()).hexdigest()


def test_order_and_repetition_make_no_difference() -> None:
    config = run_config()
    assert section_digest(config, PARTS) == section_digest(config, [*reversed(PARTS), "name"])


def test_only_the_named_parts_count() -> None:
    plain = section_digest(run_config(), PARTS)
    assert section_digest(run_config(train={"epochs": 3}, export={"opset": 18}), PARTS) == plain
    assert section_digest(run_config(train={"seed": 0}), PARTS) != plain
    assert section_digest(run_config(dataset={"uri": "s3://data/cells", "reduce": False}), PARTS) != plain
    assert section_digest(run_config(), [*PARTS, "train"]) != plain


def test_spelling_makes_no_difference() -> None:
    given = run_config(train={"epochs": 3.0, "lr": 1, "resolution": 512, "progress_bar": False})
    same = run_config(train={"epochs": 3, "lr": 1.0}, model={"resolution": 512})
    assert section_digest(given, ["model", "train"]) == section_digest(same, ["model", "train"])


@pytest.mark.parametrize("part", ["trains", "train.epoch", "name.x", "train.output_dir", ""])
def test_unknown_parts(part: str) -> None:
    with pytest.raises(KeyError, match="the configuration has no"):
        section_digest(run_config(), [part])
