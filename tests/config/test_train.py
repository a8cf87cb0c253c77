"""TrainConfig: the seed's table, the ranges, and the older spellings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from rfdetr_core.config import TrainConfig
from rfdetr_core.errors import ConfigError
from tests.config.helpers import error_of, run_config

# The seed document's complete reference table, less gradient_checkpointing, which it gives to the constructor.
SEED = {
    "output_dir": "output",
    "epochs": 100,
    "batch_size": 4,
    "grad_accum_steps": 4,
    "lr": 1e-4,
    "lr_encoder": 1.5e-4,
    "resolution": None,
    "weight_decay": 1e-4,
    "use_ema": True,
    "checkpoint_interval": 10,
    "resume": None,
    "tensorboard": True,
    "wandb": False,
    "mlflow": False,
    "project": None,
    "run": None,
    "early_stopping": False,
    "early_stopping_patience": 10,
    "early_stopping_min_delta": 0.001,
    "early_stopping_use_ema": False,
    "eval_max_dets": 500,
    "eval_interval": 1,
    "log_per_class_metrics": True,
    "progress_bar": None,
    "num_workers": 2,
    "accelerator": "auto",
    "seed": None,
    "lr_scheduler": "step",
    "lr_min_factor": 0.0,
    "warmup_epochs": 0.0,
    "drop_path": 0.0,
    "compute_val_loss": True,
    "compute_test_loss": True,
    "fp16_eval": False,
    "pin_memory": None,
    "persistent_workers": None,
    "prefetch_factor": None,
    "aug_config": None,
    "auto_batch_target_effective": 16,
    "auto_batch_max_targets_per_image": 100,
    "auto_batch_ema_headroom": 0.7,
}
# Not in the seed's table: named in its text, of rfdetr 1.11.2, or ours.
BESIDE_SEED = {
    "dataset_dir": None,
    "lr_drop": 100,
    "group_detr": None,
    "ia_bce_loss": None,
    "segmentation_head": None,
    "num_select": None,
    "eval_batch_size": None,
    "lr_vit_layer_decay": 0.8,
    "lr_component_decay": 0.7,
    "clip_max_norm": 0.1,
    "cls_loss_coef": 1.0,
    "amp_dtype": "auto",
    "ema_decay": 0.993,
    "ema_tau": 100,
    "ema_update_interval": 1,
    "skip_best_epochs": 0,
    "smooth_alpha": 0.0,
    "best_model_metric": "map",
    "dont_save_weights": False,
    "run_test": False,
    "notes": None,
    "class_names": None,
    "eval_base_model": True,
    "eval_masks_head_resolution": False,
    "compute_train_metrics": False,
    "dataset_file": "roboflow",
    "multi_scale": "per-batch",
    "expanded_scales": True,
    "square_resize_div_64": True,
    "scale_jitter": True,
    "save_dataset_grids": False,
    "devices": 1,
    "num_nodes": 1,
    "checkpoint_minutes": 15.0,
    "skip_corrupt": 0,
    "max_hours": None,
}


@pytest.mark.parametrize(("name", "default"), [*SEED.items(), *BESIDE_SEED.items()])
def test_default(name: str, default: object) -> None:
    value = getattr(TrainConfig(), name)
    assert value == default
    assert type(value) is type(default)


def test_no_other_fields() -> None:
    assert set(TrainConfig.model_fields) == {*SEED, *BESIDE_SEED}


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_every_field_is_explained(name: str) -> None:
    description = TrainConfig.model_fields[name].description
    assert description is not None
    assert description.endswith(".")


# Rejections: (field, value, what is said after "is not allowed: ").
REJECTED: list[tuple[str, Any, str]] = [
    ("epochs", 0, "must be at least 1 (use 1)"),
    ("epochs", -1, "must be at least 1 (use 1)"),
    ("epochs", 3.5, "must be a whole number (use 3 or 4)"),
    ("epochs", 0.5, "must be a whole number (use 1)"),
    ("epochs", True, "must be a whole number, not a boolean (use 100)"),
    ("epochs", "3", "must be a whole number (use 3)"),
    ("epochs", "many", "must be a whole number (use 100)"),
    ("epochs", None, "must be a whole number (use 100)"),
    ("epochs", [3], "must be a whole number (use 100)"),
    ("epochs", float("inf"), "must be a whole number (use 100)"),
    ("epochs", 2**63, "must be a whole number of at most 64 bits (use 100)"),
    ("batch_size", 0, 'must be "auto" or a whole number of at least 1 (use "auto" or 1)'),
    ("batch_size", -1, 'must be "auto" or a whole number of at least 1 (use "auto" or 1)'),
    ("batch_size", "x", 'must be "auto" or a whole number of at least 1 (use "auto" or 1)'),
    ("batch_size", True, 'must be "auto" or a whole number of at least 1 (use "auto" or 1)'),
    ("batch_size", 4.5, 'must be "auto" or a whole number of at least 1 (use "auto" or 1)'),
    ("grad_accum_steps", 0, "must be at least 1 (use 1)"),
    ("eval_batch_size", 0, "must be at least 1 (use 1)"),
    ("lr", 0, "must be greater than 0 (use 0.0001)"),
    ("lr", -1, "must be greater than 0 (use 0.0001)"),
    ("lr", "1e-4", "must be a number (use 0.0001)"),
    ("lr", True, "must be a number, not a boolean (use 0.0001)"),
    ("lr", float("nan"), "must be a finite number (use 0.0001)"),
    ("lr", float("inf"), "must be a finite number (use 0.0001)"),
    ("lr", 10**400, "must be a finite number (use 0.0001)"),
    ("lr_encoder", -1e-9, "must be at least 0 (use 0.0)"),
    ("weight_decay", -1, "must be at least 0 (use 0.0)"),
    ("lr_scheduler", "cosin", 'must be one of "step", "cosine" (use "cosine")'),
    ("lr_scheduler", 1, 'must be one of "step", "cosine" (use "step")'),
    ("lr_drop", 0, "must be at least 1 (use 1)"),
    ("lr_min_factor", 1.5, "must be at least 0 and at most 1 (use 1.0)"),
    ("lr_min_factor", -0.5, "must be at least 0 and at most 1 (use 0.0)"),
    ("warmup_epochs", -1, "must be at least 0 (use 0.0)"),
    ("lr_vit_layer_decay", 0, "must be greater than 0 and at most 1 (use 0.8)"),
    ("lr_component_decay", 1.1, "must be greater than 0 and at most 1 (use 1.0)"),
    ("clip_max_norm", -0.1, "must be at least 0 (use 0.0)"),
    ("drop_path", 1.0, "must be at least 0 and less than 1 (use 0.0)"),
    ("drop_path", -0.1, "must be at least 0 and less than 1 (use 0.0)"),
    ("drop_path", 2.0, "must be at least 0 and less than 1 (use 0.0)"),
    ("cls_loss_coef", -1, "must be at least 0 (use 0.0)"),
    ("use_ema", "yes", "must be true or false (use true)"),
    ("use_ema", 0, "must be true or false (use false)"),
    ("use_ema", None, "must be true or false (use true)"),
    ("ema_decay", 0, "must be greater than 0 and less than 1 (use 0.993)"),
    ("ema_decay", 1, "must be greater than 0 and less than 1 (use 0.993)"),
    ("ema_decay", 2, "must be greater than 0 and less than 1 (use 0.993)"),
    ("ema_tau", -1, "must be at least 0 (use 0)"),
    ("ema_update_interval", 0, "must be at least 1 (use 1)"),
    ("checkpoint_interval", 0, "must be at least 1 (use 1)"),
    ("checkpoint_minutes", 0, "must be greater than 0 (use 15.0)"),
    ("skip_best_epochs", -1, "must be at least 0 (use 0)"),
    ("smooth_alpha", 1, "must be at least 0 and less than 1 (use 0.0)"),
    ("best_model_metric", "mAP", 'must be one of "map", "mar" (use "map")'),
    ("early_stopping_patience", 0, "must be at least 1 (use 1)"),
    ("early_stopping_min_delta", -1, "must be at least 0 (use 0.0)"),
    ("eval_interval", 0, "must be at least 1 (use 1)"),
    ("eval_max_dets", 0, "must be at least 1 (use 1)"),
    ("num_workers", -1, "must be at least 0 (use 0)"),
    ("prefetch_factor", 0, "must be at least 1 (use 1)"),
    ("seed", -1, "must be at least 0 and at most 4294967295 (use 0)"),
    ("seed", 2**32, "must be at least 0 and at most 4294967295 (use 4294967295)"),
    ("auto_batch_target_effective", 0, "must be at least 1 (use 1)"),
    ("auto_batch_max_targets_per_image", 0, "must be at least 1 (use 1)"),
    ("auto_batch_ema_headroom", 0, "must be greater than 0 and at most 1 (use 0.7)"),
    ("auto_batch_ema_headroom", 1.01, "must be greater than 0 and at most 1 (use 1.0)"),
    ("accelerator", "gpus", 'must be one of "auto", "cpu", "gpu", "cuda", "mps", "tpu" (use "gpu")'),
    ("amp_dtype", "bf-16", 'must be one of "auto", "bf16", "fp16", "fp8", null (use "bf16")'),
    ("progress_bar", "x", 'must be one of "tqdm", "rich", null (use null)'),
    ("multi_scale", "per_batch", 'must be one of "off", "per-batch", "per-sample" (use "per-batch")'),
    ("compute_val_loss", 1, 'must be true, false or "auto" (use true)'),
    ("class_names", ["a", "a"], "must not name a class twice (use null)"),
    ("class_names", "a", "must be a list (use null)"),
    ("devices", 0, 'must be a count of at least 1, a list such as "0,2", or "auto" (use "auto" or 1)'),
    ("devices", "0;2", 'must be a count of at least 1, a list such as "0,2", or "auto" (use "auto" or 1)'),
    ("num_nodes", 0, "must be at least 1 (use 1)"),
    ("skip_corrupt", -1, "must be at least 0 (use 0)"),
    ("max_hours", 0, "must be greater than 0 (use null)"),
    ("run", 5, 'must be text (use "5")'),
    ("run", "", "must not be empty (use null)"),
    ("run", "two\nlines", "must be one line of printable characters (use null)"),
    ("resume", "gs://bucket/x", "must be a path, file:///path or s3://bucket/key (use null)"),
    ("aug_config", 5, "must be a mapping of transforms, or a list of them (use null)"),
    ("aug_config", "AERIAL", "must be a mapping of transforms, or a list of them (use null)"),
    ("aug_config", {"a": float("nan")}, "must be plain JSON: text, finite numbers, booleans, null, lists, mappings"),
    ("lr_scheduler_kwargs", {"gamma": 1}, "may hold lr_drop and min_factor"),
    ("eval_ema_only", 1, "must be true or false (use false)"),
]


@pytest.mark.parametrize(("name", "value", "rule"), REJECTED)
def test_rejected(name: str, value: Any, rule: str) -> None:
    message = error_of(train={name: value})
    assert message.startswith(f"train.{name}: ")
    assert f"is not allowed: {rule}" in message
    assert "; " not in message.removeprefix("train.")  # one problem, not several views of it


def test_json_that_is_not_plain_is_rejected() -> None:
    for notes in ({1: 2}, {"a": {1, 2}}, "\ud800", object(), (1, 2)):
        assert "must be plain JSON" in error_of(train={"notes": notes})


@pytest.mark.parametrize(
    "name", [n for n, v in [*SEED.items(), *BESIDE_SEED.items()] if isinstance(v, bool) and n != "compute_val_loss"]
)
@pytest.mark.parametrize("value", [1, 0.0, "true", "on", [True]])
def test_booleans_are_exact(name: str, value: Any) -> None:
    assert "must be true or false" in error_of(train={name: value})


WHOLE = [name for name, value in [*SEED.items(), *BESIDE_SEED.items()] if type(value) is int] + [
    *("seed", "eval_batch_size", "prefetch_factor", "num_select", "group_detr", "resolution")
]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_whole_numbers_may_come_as_floats(name: str) -> None:
    for value in (3.0, np.int64(3), np.float32(3.0)):
        taken = getattr(TrainConfig.parse({name: value}), name)
        assert taken == 3
        assert type(taken) is int


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [3.5, True, "3"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_numbers_are_not_whole(name: str, value: Any) -> None:
    if (name, value) == ("devices", "3"):
        value = "3;4"  # "3" is the list of one GPU, number 3
    with pytest.raises(ConfigError, match=f"{name}: .* is not allowed: must be "):
        TrainConfig.parse({name: value})


REAL = {n for n, v in [*SEED.items(), *BESIDE_SEED.items()] if isinstance(v, float)}


@pytest.mark.parametrize("name", sorted(REAL - {"drop_path", "ema_decay", "smooth_alpha"}))  # whose range ends below 1
def test_floats_take_integers(name: str) -> None:
    taken = getattr(TrainConfig.parse({name: 1}), name)
    assert taken == 1.0
    assert type(taken) is float


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"progress_bar": True}, "progress_bar", "tqdm"),
        ({"progress_bar": False}, "progress_bar", None),
        ({"progress_bar": "rich"}, "progress_bar", "rich"),
        ({"multi_scale": True}, "multi_scale", "per-batch"),
        ({"multi_scale": False}, "multi_scale", "off"),
        ({"lr_scheduler": "Cosine"}, "lr_scheduler", "cosine"),
        ({"batch_size": "auto"}, "batch_size", "auto"),
        ({"batch_size": 8.0}, "batch_size", 8),
        ({"compute_val_loss": "auto"}, "compute_val_loss", "auto"),
        ({"amp_dtype": None}, "amp_dtype", None),
        ({"resume": ""}, "resume", None),
        ({"devices": -1}, "devices", "auto"),
        ({"devices": "0,2"}, "devices", "0,2"),
        ({"devices": 2.0}, "devices", 2),
        ({"lr_encoder": 0}, "lr_encoder", 0.0),
        ({"class_names": ["b", "a"]}, "class_names", ("b", "a")),
        ({"lr_scheduler_kwargs": {"lr_drop": 7}}, "lr_drop", 7),
        ({"lr_scheduler_kwargs": {"min_factor": 0.1}}, "lr_min_factor", 0.1),
        ({"lr_scheduler_kwargs": {"lr_drop": 7}, "lr_drop": 7}, "lr_drop", 7),
        ({"lr_scheduler_kwargs": None}, "lr_drop", 100),
        ({"eval_ema_only": False}, "eval_base_model", True),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_spellings(given: dict[str, Any], name: str, value: Any) -> None:
    taken = getattr(TrainConfig.parse(given), name)
    assert taken == value
    assert type(taken) is type(value)


def test_scheduler_kwargs_contradict() -> None:
    assert error_of(train={"lr_drop": 4, "lr_scheduler_kwargs": {"lr_drop": 5}}) == (
        "train.lr_scheduler_kwargs.lr_drop: 5 is not allowed: lr_drop is 4; give one"
    )


def test_eval_ema_only_is_the_opposite_of_eval_base_model() -> None:
    with pytest.warns(FutureWarning, match="give train.eval_base_model"):
        assert TrainConfig.parse({"eval_ema_only": True}).eval_base_model is False
    with pytest.warns(FutureWarning):
        message = error_of(train={"eval_ema_only": True, "eval_base_model": True})
    assert message == (
        "train.eval_ema_only: true is not allowed: contradicts eval_base_model: true; give one (use false)"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"epochs": 5, "skip_best_epochs": 5},
            "train.skip_best_epochs: 5 is not allowed: must be less than epochs = 5, or no epoch can be the best "
            "(use 4)",
        ),
        (
            {"use_ema": False, "eval_base_model": False},
            "train.eval_base_model: false is not allowed: without use_ema there is nothing else to evaluate (use true)",
        ),
        (
            {"use_ema": False, "early_stopping_use_ema": True},
            "train.early_stopping_use_ema: true is not allowed: needs use_ema: true (use false)",
        ),
        (
            {"batch_size": "auto", "amp_dtype": "fp8"},
            'train.batch_size: "auto" is not allowed: must be a whole number with amp_dtype "fp8" (use 4)',
        ),
    ],
)
def test_impossible_combinations(given: dict[str, Any], message: str) -> None:
    assert error_of(train=given) == message


def test_possible_combinations() -> None:
    config = TrainConfig.parse({"epochs": 5, "skip_best_epochs": 4, "use_ema": False})
    assert config.eval_base_model
    assert TrainConfig.parse({"eval_base_model": False}).use_ema


@pytest.mark.parameter("output_dir")
def test_paths_are_made_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig.parse({"output_dir": "~/x/../y", "dataset_dir": Path("~/data")})
    real = os.path.realpath(tmp_path)
    assert config.output_dir == f"{real}/y"
    assert config.dataset_dir == f"{real}/data"
    assert TrainConfig.parse({"resume": Path("last")}).resume == "last"


def test_home_of_nobody_is_a_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert TrainConfig.parse({"output_dir": "~nobody-has-this/x"}).output_dir.endswith("/~nobody-has-this/x")


def test_it_never_changes() -> None:
    config = TrainConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.epochs = 3  # type: ignore[misc]


@pytest.mark.parameter("group_detr", "ia_bce_loss", "segmentation_head", "num_select")
@pytest.mark.parametrize(
    ("name", "value"), [("group_detr", 5), ("ia_bce_loss", True), ("segmentation_head", False), ("num_select", 7)]
)
def test_deprecated_fields_warn_and_move(name: str, value: Any) -> None:
    with pytest.warns(FutureWarning, match=f"train.{name} is deprecated: give model.{name}"):
        config = run_config(train={name: value})
    assert getattr(config.model, name) == value
    assert getattr(config.train, name) is None
    with pytest.warns(FutureWarning, match=f"give model.{name}"):
        assert getattr(TrainConfig.parse({name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"), [("group_detr", 0), ("ia_bce_loss", 1), ("segmentation_head", "no"), ("num_select", 2.5)]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_deprecated_fields_keep_their_rules(name: str, value: Any) -> None:
    assert error_of(train={name: value}).startswith(f"model.{name}: ")
    with pytest.raises(ConfigError, match=name):
        TrainConfig.parse({name: value})


def test_deprecated_fields_agree_or_fail() -> None:
    with pytest.warns(FutureWarning):
        assert run_config(train={"group_detr": 5.0}, model={"group_detr": 5}).model.group_detr == 5
    with pytest.warns(FutureWarning):
        message = error_of(train={"group_detr": 5}, model={"group_detr": 6})
    assert message == "train.group_detr: 5 is not allowed: model.group_detr is 6; give one of them (use null)"


@pytest.mark.parametrize(
    "name",
    [
        *("keypoint_loss_coef", "clearml", "pad_targets_to", "pack_targets", "optimizer", "optimizer_kwargs"),
        *("lr_scheduler_interval", "lr_scheduler_monitor", "augmentation_backend", "eval_backend", "strategy"),
        *("sync_bn", "train_log_on_step", "compact_train_metrics", "num_sanity_val_steps"),
    ],
)
def test_what_the_design_leaves_out_is_unknown(name: str) -> None:
    assert error_of(train={name: 1}).startswith(f"train.{name}: unknown field; ")
