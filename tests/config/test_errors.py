"""One line for people: suggestions, several problems, nothing secret."""

from __future__ import annotations

from typing import Any

import pytest

from rfdetr_core.config.problems import dotted, redact, show
from tests.config.helpers import error_of


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"epoch": 3}}, "train.epoch: unknown field; did you mean train.epochs?"),
        ({"train": {"batch-size": 3}}, "train.batch-size: unknown field; did you mean train.batch_size?"),
        ({"epochs": 3}, "epochs: unknown field; did you mean train.epochs?"),
        ({"trian": {}}, "trian: unknown field; did you mean train?"),
        (
            {"train": {"gradient_checkpointing": True}},
            "train.gradient_checkpointing: unknown field; did you mean model.gradient_checkpointing?",
        ),
        ({"train": {"opset": 17}}, "train.opset: unknown field; did you mean export.opset?"),
        ({"promote": {"tolerances": 1}}, "promote.tolerances: unknown field; did you mean export.ap_tolerance?"),
        (
            {"dataset": {"uri": "x", "zzz": 1}},
            "dataset.zzz: unknown field; known here: format, max_annotation_mb, max_class_ratio, max_image_pixels, "
            "max_unpacked_gb, min_box_patches, missing_test, reduce, strict, tolerate, uri",
        ),
        (
            {"qqq": 1},
            "qqq: unknown field; known here: dataset, evaluate, export, model, name, notify, probe, promote, train",
        ),
    ],
)
def test_unknown_fields(sections: dict[str, Any], message: str) -> None:
    assert error_of(**sections) == message


def test_several_problems_stand_in_one_line() -> None:
    assert error_of(train={"epochs": 0, "epoch": 3}, export={"opset": 3.5}) == (
        "train.epochs: 0 is not allowed: must be at least 1 (use 1); "
        "train.epoch: unknown field; did you mean train.epochs?; "
        "export.opset: 3.5 is not allowed: must be a whole number (use 17)"
    )


def test_five_problems_are_spelled_out_and_the_rest_counted() -> None:
    fields = ["epochs", "grad_accum_steps", "checkpoint_interval", "eval_interval", "num_nodes"]
    five = error_of(train=dict.fromkeys(fields, 0))
    assert five.count("is not allowed") == 5
    assert "more" not in five
    seven = error_of(train=dict.fromkeys([*fields, "lr_drop", "eval_max_dets"], 0))
    assert seven.count("is not allowed") == 5
    assert seven.endswith("; and 2 more")


@pytest.mark.parametrize(
    ("sections", "secret"),
    [
        ({"dataset": {"uri": "https://user:hunter2@host/x"}}, "hunter2"),
        ({"dataset": {"uri": "s3://AKIA:hunter2@bucket/x"}}, "hunter2"),
        ({"dataset": {"uri": "https://user:pass@hunter2@host/x"}}, "hunter2"),
        ({"dataset": {"uri": "https://host/x?X-Amz-Signature=hunter2"}}, "hunter2"),
        ({"notify": {"webhook_secret_env": "https://hooks.example/hunter2"}}, "hunter2"),
        ({"notify": {"webhook_url": "https://hooks.example/hunter2"}}, "hunter2"),
        ({"notify": {"webhook_secret_env": ["hunter2"]}}, "hunter2"),
        ({"notify": "https://hooks.example/?hunter2"}, "hunter2"),
        ({"train": {"token": "hunter2"}}, "hunter2"),
        ({"model": {"pretrain_weights": "s3://AKIA:hunter2@bucket/x"}}, "hunter2"),
        ({"train": {"notes": {1: "https://user:hunter2@host"}}}, "hunter2"),
    ],
)
def test_no_secret_is_repeated(sections: dict[str, Any], secret: str) -> None:
    assert secret not in error_of(**sections)


def test_credentials_in_a_uri_are_refused() -> None:
    assert error_of(dataset={"uri": "s3://key:secret@bucket/x"}) == (
        'dataset.uri: "s3://***@bucket/x" is not allowed: must not hold credentials; the environment gives them'
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        (float("-inf"), "-inf"),
        ("a", '"a"'),
        ("ä", '"ä"'),
        ([1, "a"], '[1, "a"]'),
        ("a" * 100, '"' + "a" * 58 + "…"),
        ({1, 2}, '"{1, 2}"'),
    ],
)
def test_show(value: object, text: str) -> None:
    assert show(value) == text


def test_show_of_a_number_too_long_to_print() -> None:
    assert show(16**5000) == "int"


def test_redact() -> None:
    assert redact("see s3://a:b@c/d and https://e/f?g=h, then i@j?k") == (
        "see s3://***@c/d and https://e/f?*** then i@j?k"
    )


def test_redact_hides_a_password_up_to_the_last_at_sign_before_the_path() -> None:
    assert redact("https://me:a@b@c@host/models@v1/x") == "https://***@host/models@v1/x"


def test_dotted() -> None:
    assert dotted(("model", "projector_scale", 0)) == "model.projector_scale[0]"
    assert dotted(()) == ""
