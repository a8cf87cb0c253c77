"""RunConfig: sections, defaults, what the pipeline owns."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rfdetr_core.config import (
    DatasetConfig,
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    ModelSection,
    NotifyConfig,
    ProbeConfig,
    PromoteConfig,
    RunConfig,
    TrainConfig,
)
from rfdetr_core.config.problems import field_paths
from rfdetr_core.errors import ConfigError
from tests.config.helpers import MINIMAL, error_of, run_config

SECTIONS = {
    "dataset": (
        DatasetConfig,
        {
            "uri": "s3://data/cells",
            "format": "auto",
            "reduce": True,
            "missing_test": "hash",
            "strict": False,
            "tolerate": {},
            "max_image_pixels": 89_478_485,
            "max_annotation_mb": 2048,
            "max_unpacked_gb": 200.0,
            "max_class_ratio": 100.0,
            "min_box_patches": 0.125,
        },
    ),
    "probe": (ProbeConfig, {"price_per_hour": None}),
    "evaluate": (EvaluateConfig, {"split": "test", "sample_images": 24, "bootstrap_samples": 1000, "batch_size": None}),
    "export": (
        ExportConfig,
        {
            "opset": 17,
            "precision": "fp32",
            "dynamic_batch": True,
            "fixed_batch": 1,
            "shape": None,
            "post_processing": False,
            "parity_images": 32,
            "logits_tolerance": None,
            "boxes_tolerance": None,
            "ap_tolerance": None,
        },
    ),
    "promote": (
        PromoteConfig,
        {
            "metric": "map",
            "min_value": 0.0,
            "min_delta": 0.0,
            "max_p_value": None,
            "min_class_ap": {},
            "max_class_loss": None,
            "allow_fewer_classes": False,
            "max_latency_ms": None,
            "max_size_mb": None,
            "allow_unguarded_store": False,
        },
    ),
    "notify": (NotifyConfig, {"webhook_secret_env": None, "format": "auto"}),
}


def test_sections_in_order() -> None:
    assert list(RunConfig.model_fields) == [
        *("name", "dataset", "model", "train", "probe", "evaluate", "export", "promote", "notify")
    ]
    assert list(run_config().as_dict()) == list(RunConfig.model_fields)


@pytest.mark.parametrize("section", SECTIONS)
def test_section_defaults(section: str) -> None:
    cls, values = SECTIONS[section]
    config = getattr(run_config(), section)
    assert type(config) is cls
    assert config.model_dump() == values


def test_model_and_train_defaults() -> None:
    config = run_config()
    assert config.model == ModelSection(variant="nano")
    assert config.train == TrainConfig()


@pytest.mark.parametrize("section", [name for name in RunConfig.model_fields if name not in ("name", "dataset")])
def test_an_empty_section_is_the_default(section: str) -> None:
    assert run_config(**{section: None}) == run_config(**{section: {}}) == run_config()


@pytest.mark.parametrize("path", list(field_paths(RunConfig)))
def test_every_field_is_explained(path: str) -> None:
    cls: Any = RunConfig
    *sections, name = path.split(".")
    for section in sections:
        cls = cls.model_fields[section].annotation
    assert cls.model_fields[name].description


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"name": "Cells_V2"},
            'name: "Cells_V2" is not allowed: must be up to 63 of a-z, 0-9 and -, and begin with a letter or digit '
            '(use "cells-v2")',
        ),
        (
            {"name": "-"},
            'name: "-" is not allowed: must be up to 63 of a-z, 0-9 and -, and begin with a letter or digit '
            '(use "detector")',
        ),
        ({"name": 5}, 'name: 5 is not allowed: must be text (use "5")'),
        ({"dataset": None}, "dataset.uri: required, and not given"),
        ({"dataset": {}}, "dataset.uri: required, and not given"),
        ({"dataset": {"uri": ""}}, 'dataset.uri: "" is not allowed: must not be empty'),
        ({"dataset": "s3://b/x"}, 'dataset: "s3://b/x" is not allowed: must be a mapping of fields'),
        ({"train": [1]}, "train: [1] is not allowed: must be a mapping of fields"),
        (
            {"dataset": {"uri": "x", "format": "yolov8"}},
            'dataset.format: "yolov8" is not allowed: must be one of "auto", "coco", "yolo", "voc" (use "yolo")',
        ),
        (
            {"evaluate": {"split": "val"}},
            'evaluate.split: "val" is not allowed: must be one of "test", "valid" (use "valid")',
        ),
        ({"evaluate": {"sample_images": -1}}, "evaluate.sample_images: -1 is not allowed: must be at least 0 (use 0)"),
        ({"evaluate": {"batch_size": 0}}, "evaluate.batch_size: 0 is not allowed: must be at least 1 (use 1)"),
        ({"export": {"opset": 11}}, "export.opset: 11 is not allowed: must be at least 16 and at most 23 (use 16)"),
        ({"export": {"opset": 99}}, "export.opset: 99 is not allowed: must be at least 16 and at most 23 (use 23)"),
        (
            {"export": {"logits_tolerance": 0}},
            "export.logits_tolerance: 0 is not allowed: must be greater than 0 (use null)",
        ),
        ({"export": {"parity_images": 0}}, "export.parity_images: 0 is not allowed: must be at least 1 (use 1)"),
        (
            {"promote": {"metric": "mAP50"}},
            'promote.metric: "mAP50" is not allowed: must be one of "map", "map50", "map75", "mar", "f1" (use "map50")',
        ),
        (
            {"promote": {"min_value": 50}},
            "promote.min_value: 50 is not allowed: must be at least 0 and at most 1 (use 1.0)",
        ),
        (
            {"promote": {"min_delta": -2}},
            "promote.min_delta: -2 is not allowed: must be at least -1 and at most 1 (use -1.0)",
        ),
        (
            {"promote": {"allow_unguarded_store": "true"}},
            'promote.allow_unguarded_store: "true" is not allowed: must be true or false (use true)',
        ),
        (
            {"promote": {"max_p_value": 0.05}, "evaluate": {"bootstrap_samples": 0}},
            "promote.max_p_value: 0.05 is not allowed: needs a bootstrap, and evaluate.bootstrap_samples is 0 "
            "(use null)",
        ),
        (
            {"promote": {"min_class_ap": {"cell": 30}}},
            "promote.min_class_ap.cell: 30 is not allowed: must be at most 1 (use 1)",
        ),
        (
            {"export": {"shape": [320, 450]}},
            "export.shape: [320, 450] is not allowed: both must be multiples of 32 (patch_size x num_windows) "
            "(use [320, 448])",
        ),
        (
            {"export": {"fixed_batch": 4}},
            "export.fixed_batch: 4 is not allowed: goes with dynamic_batch: false; an open batch takes every size "
            "(use 1)",
        ),
        ({"probe": {"price_per_hour": -1}}, "probe.price_per_hour: -1 is not allowed: must be at least 0 (use 0)"),
        (
            {"train": {"dataset_dir": "data"}},
            "train.dataset_dir: belongs to the Python API; the pipeline owns it: the dataset is dataset.uri",
        ),
        (
            {"train": {"output_dir": "out"}},
            "train.output_dir: belongs to the Python API; the pipeline owns it: results go to the run's own folder",
        ),
    ],
)  # fmt: skip
def test_refused(sections: dict[str, Any], message: str) -> None:
    assert error_of(**sections) == message


@pytest.mark.parametrize("name", ["a", "0", "cells-v2", "a" * 63])
def test_names(name: str) -> None:
    assert run_config(name=name).name == name


@pytest.mark.parametrize("name", ["", "-a", "a" * 64, "a\n", "a.b", "ä"])
def test_no_names(name: str) -> None:
    assert error_of(name=name).startswith("name: ")


@pytest.mark.parametrize("uri", ["data", "/data", "file:///data", "s3://bucket", "s3://b/a b/ä", "a:b", "数据\u3000集"])
def test_uris(uri: str) -> None:
    assert run_config(dataset={"uri": uri}).dataset.uri == uri


@pytest.mark.parametrize("uri", ["https://x/y", "file://host/x", "s3://", "s3:///key", "a\x00b", "\ud800", 5, None])
def test_no_uris(uri: Any) -> None:
    assert error_of(dataset={"uri": uri}).startswith("dataset.uri: ")


def test_sections_may_be_instances() -> None:
    config = RunConfig(
        name="cells",
        dataset=DatasetConfig(uri="s3://data/cells"),
        model=ModelConfig(variant="small"),
        train=TrainConfig(epochs=3),
        export=ExportConfig(opset=18),
    )
    assert config == run_config(model={"variant": "small"}, train={"epochs": 3}, export={"opset": 18})
    assert RunConfig.parse({**MINIMAL, "train": TrainConfig(epochs=3)}) == run_config(train={"epochs": 3})


def test_given_values_are_not_changed() -> None:
    values: dict[str, Any] = {**MINIMAL, "train": {"resolution": 512}, "model": {"variant": "small"}}
    RunConfig.parse(values)
    assert values["train"] == {"resolution": 512}
    assert values["model"] == {"variant": "small"}


def test_as_dict_gives_an_equal_configuration() -> None:
    config = run_config(model={"variant": "base", "dec_layers": 2}, train={"lr": 3e-5, "batch_size": "auto"})
    values = config.as_dict()
    assert RunConfig.parse(values) == config
    assert {"dataset_dir", "output_dir", "group_detr"}.isdisjoint(values["train"])


def test_the_constructor_raises_pydantics_error_and_parse_ours() -> None:
    with pytest.raises(ValidationError):
        RunConfig(**MINIMAL, train={"epochs": 0})
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse({**MINIMAL, "train": {"epochs": 0}})
    assert str(caught.value) == "train.epochs: 0 is not allowed: must be at least 1 (use 1)"
    assert caught.value.exit_code == 2
