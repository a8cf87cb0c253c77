"""The table of fields without effect: complete, true, and enforced."""

from __future__ import annotations

from typing import Any

import pytest

from rfdetr_core.config import NOT_BUILT, ModelConfig, RunConfig, TrainConfig, Unbuilt, refuse_unbuilt
from rfdetr_core.config import unbuilt as table
from rfdetr_core.config.problems import field_paths
from rfdetr_core.errors import ConfigError
from tests.config.helpers import MINIMAL, error_of, run_config

# A legal value that asks for what is missing, and what else must be said for it to be legal.
ASKS: dict[str, Any] = {
    "dataset.format": "voc",
    "model.variant": "large-deprecated",
    "model.encoder": "dinov2_registers_windowed_small",
    "model.projector_scale": ["P3", "P4"],
    "model.two_stage": False,
    "model.bbox_reparam": False,
    "model.lite_refpoint_refine": False,
    "model.layer_norm": False,
    "model.ia_bce_loss": False,
    "model.segmentation_head": True,
    "model.mask_downsample_ratio": 2,
    "model.backbone_lora": True,
    "model.num_decoder_registers": 2,
    "model.cuda_graphs": True,
    "train.max_hours": 2.0,
    "train.resume": "s3://b/c.pth",
    "train.notes": "n",
    "train.dont_save_weights": True,
    "train.smooth_alpha": 0.5,
    "train.run_test": True,
    "train.eval_masks_head_resolution": True,
    "train.compute_val_loss": "auto",
    "train.compute_train_metrics": True,
    "train.fp16_eval": True,
    "train.class_names": ["a"],
    "train.wandb": True,
    "train.mlflow": True,
    "train.project": "p",
    "train.run": "r",
    "train.dataset_file": "yolo",
    "train.multi_scale": "per-sample",
    "train.square_resize_div_64": False,
    "train.aug_config": {"HorizontalFlip": {"p": 1.0}},
    "train.save_dataset_grids": True,
    "train.skip_corrupt": 1,
    "train.accelerator": "tpu",
    "train.amp_dtype": "fp8",
    "train.devices": 2,
    "notify.webhook_secret_env": "HOOK",
}


def nested(path: str, value: Any) -> dict[str, Any]:
    section, _, name = path.partition(".")
    return {section: {**MINIMAL.get(section, {}), name: value}}


def test_every_row_is_a_field() -> None:
    assert set(NOT_BUILT) <= set(field_paths(RunConfig))


@pytest.mark.parametrize("path", NOT_BUILT)
def test_a_value_that_asks_for_it_is_refused(path: str) -> None:
    row = NOT_BUILT[path]
    if path not in ASKS:
        assert set(row.works) == {True, False}, f"{path}: give a value that is not built"
        return
    message = error_of(**nested(path, ASKS[path]))
    assert f"{path}: " in message
    assert " is not built yet; leave it at " in message
    assert f"(missing: {row.missing})" in message


@pytest.mark.parametrize(("path", "value"), [(p, v) for p, row in NOT_BUILT.items() for v in row.works])
def test_a_value_that_works_is_taken(path: str, value: Any) -> None:
    section, _, name = path.partition(".")
    values = nested(path, value)
    if path == "model.encoder":
        values["model"]["out_feature_indexes"] = [1, 2]
    assert getattr(getattr(run_config(**values), section), name) == value


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "train.wandb",
            "train.wandb: true is not built yet; leave it at false (missing: logging to Weights & Biases)",
        ),
        (
            "dataset.format",
            'dataset.format: "voc" is not built yet; leave it at "auto" or use "coco" '
            "(missing: the readers of YOLO and Pascal VOC)",
        ),
        (
            "notify.webhook_secret_env",
            "notify.webhook_secret_env: this value is not built yet; leave it at null (missing: notification)",
        ),
    ],
)
def test_exact_words(path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The rows go as the features come; the words of the error stay.
    rows = {
        "train.wandb": Unbuilt("logging to Weights & Biases"),
        "dataset.format": Unbuilt("the readers of YOLO and Pascal VOC", works=("auto", "coco")),
        "notify.webhook_secret_env": Unbuilt("notification"),
    }
    monkeypatch.setattr(table, "NOT_BUILT", rows)
    assert error_of(**nested(path, ASKS[path])) == message


def test_deprecated_spellings_are_checked_where_they_land(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "NOT_BUILT", {"model.segmentation_head": Unbuilt("masks")})
    with pytest.warns(FutureWarning):
        assert error_of(train={"segmentation_head": True}) == (
            "model.segmentation_head: true is not built yet; leave it at false (missing: masks)"
        )


def test_several_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "NOT_BUILT", {"train.wandb": Unbuilt("a"), "train.mlflow": Unbuilt("b")})
    assert error_of(train={"wandb": True, "mlflow": True}).count("is not built yet") == 2


def test_not_built_lists_the_table() -> None:
    listed = run_config().not_built()
    assert [line.partition(": ")[0] for line in listed] == list(NOT_BUILT)


def test_other_channels_go_with_prediction_alone() -> None:
    for channels in (1, 3, 4):
        table.refuse_other_channels(ModelConfig(num_channels=channels), "training")
    with pytest.raises(ConfigError, match=r"^model.num_channels: 2 does not go with training: .*\(use 1, 3 or 4;"):
        table.refuse_other_channels(ModelConfig(num_channels=2), "training")


def test_sections_that_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"model.two_stage": Unbuilt("x"), "train.wandb": Unbuilt("y"), "dataset.format": Unbuilt("z")}
    monkeypatch.setattr(table, "NOT_BUILT", rows)
    refuse_unbuilt(ModelConfig(), "model")
    refuse_unbuilt(TrainConfig(), "train")
    with pytest.raises(ConfigError, match=r"^model.two_stage: false is not built yet; leave it at true"):
        refuse_unbuilt(ModelConfig(two_stage=False), "model")
    with pytest.raises(ConfigError, match=r"^train.wandb: true is not built yet; leave it at false"):
        refuse_unbuilt(TrainConfig(wandb=True), "train")
