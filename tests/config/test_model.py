"""ModelConfig and ModelSection: variants, resolution, and what must fit together."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfdetr_core.config import ENCODERS, VARIANTS, ModelConfig, ModelSection
from rfdetr_core.config.resolution import legal_resolution, nearest_resolutions
from rfdetr_core.errors import ConfigError
from tests.config.helpers import error_of, run_config


def refused(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.parse(values)
    return str(caught.value)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cls", [ModelConfig, ModelSection])
def test_a_variant_fills_what_is_not_given(cls: type[ModelSection], variant: str) -> None:
    config = cls(variant=variant)
    for name, value in VARIANTS[variant].items():
        assert getattr(config, name) == value
    assert config.resolution % config.block == 0
    assert config.requested_resolution is None


@pytest.mark.parametrize(
    ("variant", "side"),
    [("pico", 16), ("nano", 24), ("small", 32), ("medium", 36), ("large", 44), ("base", 37), ("large-deprecated", 37)],
)
def test_positional_table(variant: str, side: int) -> None:
    assert ModelConfig(variant=variant).positional_encoding_size == side


def test_positional_table_follows_the_resolution_unless_given_or_fixed() -> None:
    assert ModelConfig(resolution=512).positional_encoding_size == 32
    assert ModelConfig(resolution=512.0).positional_encoding_size == 32
    assert ModelConfig(resolution=512, positional_encoding_size=24).positional_encoding_size == 24
    assert ModelConfig(variant="base", resolution=672).positional_encoding_size == 37


def test_null_is_not_given() -> None:
    config = ModelConfig.parse({"dec_layers": None, "resolution": None, "positional_encoding_size": None})
    assert config == ModelConfig()


def test_number_of_classes() -> None:
    assert ModelConfig().num_classes == 90
    assert ModelSection().num_classes is None
    assert ModelSection(num_classes=7.0).num_classes == 7
    made = ModelSection(variant="small", dec_layers=2).with_num_classes(5)
    assert made == ModelConfig(variant="small", dec_layers=2, num_classes=5)
    assert type(made) is ModelConfig
    assert made.with_num_classes(6).num_classes == 6
    with pytest.raises(ConfigError, match=r"num_classes: 0 is not allowed: must be at least 1 \(use 1\)"):
        ModelSection().with_num_classes(0)
    assert refused(num_classes=None) == "num_classes: null is not allowed: must be a whole number (use 90)"


def test_num_select_shrinks_only_where_nobody_chose_it() -> None:
    assert ModelConfig(num_queries=20, num_classes=3).num_select == 80
    assert ModelConfig(num_queries=20, num_classes=90).num_select == 300
    section = ModelSection(num_queries=20)
    assert section.num_select == 300
    assert section.with_num_classes(3).num_select == 80
    assert ModelSection(num_queries=20, num_select=25).with_num_classes(3).num_select == 25
    with pytest.raises(ConfigError) as caught:
        ModelSection(num_queries=20, num_select=90).with_num_classes(3)
    assert str(caught.value) == (
        "num_select: 90 is not allowed: must be at most num_queries x (num_classes + 1) = 80 (use 80)"
    )


@pytest.mark.parameter("resolution")
@pytest.mark.parametrize("resolution", [64, 384, 416, 560.0, 14, 392])
def test_resolution_taken_or_rounded_up(resolution: float) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = ModelConfig(resolution=resolution)
    used = {64: 64, 384: 384, 416: 416, 560: 576, 14: 32, 392: 416}[int(resolution)]
    assert config.resolution == used
    assert config.positional_encoding_size == used // 16
    rounded = used != resolution
    assert config.requested_resolution == (resolution if rounded else None)
    assert [str(w.message) for w in caught] == (
        [
            f"resolution {resolution:.0f} is not a multiple of patch_size x num_windows = 32: {used} is used for "
            "training, evaluation and export"
        ]
        if rounded
        else []
    )


@pytest.mark.parameter("resolution")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resolution": 400}, "400 is not allowed: must be a multiple of patch_size x num_windows = 32, or of 14 "
         "(use 384 or 416)"),
        ({"resolution": 1}, "1 is not allowed: must be a multiple of patch_size x num_windows = 32, or of 14 (use 32)"),
        ({"resolution": 0}, "0 is not allowed: must be a multiple of patch_size x num_windows = 32, or of 14 (use 32)"),
        ({"resolution": -32}, "-32 is not allowed: must be a multiple of patch_size x num_windows = 32, or of 14 "
         "(use 32)"),
        ({"resolution": 600, "variant": "base"}, "600 is not allowed: must be a multiple of patch_size x num_windows "
         "= 56, or of 14 (use 560 or 616)"),
        ({"patch_size": 15}, "384 is not allowed: must be a multiple of patch_size x num_windows = 30, or of 14 "
         "(use 360 or 390)"),
        ({"resolution": "x"}, '"x" is not allowed: must be a whole number'),
        ({"resolution": True}, "true is not allowed: must be a whole number, not a boolean"),
    ],
)  # fmt: skip
def test_resolution_refused(values: dict[str, Any], message: str) -> None:
    assert refused(**values) == f"resolution: {message}"


def test_requested_resolution_is_a_record() -> None:
    assert ModelConfig(resolution=576, requested_resolution=560).requested_resolution == 560
    for requested in (384, 560, 400):
        assert refused(requested_resolution=requested) == (
            f"requested_resolution: {requested} is not allowed: is recorded by us, never given; leave it out"
        )


@given(st.integers(-100, 5000), st.integers(1, 200))
def test_legal_resolutions(requested: int, block: int) -> None:
    legal = legal_resolution(requested, block)
    if requested > 0 and (requested % block == 0 or requested % 14 == 0):
        assert legal is not None
        assert legal % block == 0
        assert 0 <= legal - requested < block
    else:
        assert legal is None
    near = nearest_resolutions(requested, block)
    assert all(side > 0 and side % block == 0 for side in near)
    if len(near) == 2:
        assert near[0] <= requested < near[1] == near[0] + block
    else:
        assert requested < block == near[0]


def test_resolution_has_two_spellings_and_one_place() -> None:
    config = run_config(train={"resolution": 512})
    assert (config.model.resolution, config.train.resolution) == (512, None)
    assert run_config(train={"resolution": 512.0}, model={"resolution": 512}).model.resolution == 512
    with pytest.warns(UserWarning, match="resolution 560"):
        config = run_config(train={"resolution": 560})
    assert (config.model.resolution, config.model.requested_resolution) == (576, 560)
    assert error_of(train={"resolution": 512}, model={"resolution": 384}) == (
        "train.resolution: 512 is not allowed: model.resolution is 384; give one of them (use null)"
    )
    with pytest.warns(UserWarning):
        message = error_of(train={"resolution": 512}, model={"resolution": 560})
    assert "model.resolution is 560; give one of them" in message
    assert error_of(train={"resolution": 400}).startswith("model.resolution: 400 is not allowed")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"hidden_dim": 250},
            "hidden_dim: 250 is not allowed: must be a multiple of 4, sa_nheads = 8 and ca_nheads = 16 (use 256)",
        ),
        (
            {"hidden_dim": 10, "sa_nheads": 2, "ca_nheads": 5},
            "hidden_dim: 10 is not allowed: must be a multiple of 4, sa_nheads = 2 and ca_nheads = 5 (use 20)",
        ),
        (
            {"out_feature_indexes": [3, 3]},
            "out_feature_indexes: [3, 3] is not allowed: must be ascending encoder depths between 1 and 12 (use [3])",
        ),
        (
            {"out_feature_indexes": [6, 3]},
            "out_feature_indexes: [6, 3] is not allowed: must be ascending encoder depths between 1 and 12 "
            "(use [3, 6])",
        ),
        (
            {"out_feature_indexes": [0, 13]},
            "out_feature_indexes: [0, 13] is not allowed: must be ascending encoder depths between 1 and 12 "
            "(use [1, 12])",
        ),
        (
            {"variant": "pico", "out_feature_indexes": [3, 7]},
            "out_feature_indexes: [3, 7] is not allowed: must be ascending encoder depths between 1 and 6 "
            "(use [3, 6])",
        ),
        (
            {"out_feature_indexes": []},
            "out_feature_indexes: [] is not allowed: must be ascending encoder depths between 1 and 12 (use [12])",
        ),
        (
            {"projector_scale": ["P4", "P3"]},
            'projector_scale: ["P4", "P3"] is not allowed: must be ascending scales, each once (use ["P3", "P4"])',
        ),
        (
            {"projector_scale": []},
            'projector_scale: [] is not allowed: must be ascending scales, each once (use ["P4"])',
        ),
        (
            {"projector_scale": ["P6"]},
            'projector_scale[0]: "P6" is not allowed: must be one of "P3", "P4", "P5" (use "P3")',
        ),
        (
            {"out_feature_indexes": [3, True]},
            "out_feature_indexes[1]: true is not allowed: must be a whole number, not a boolean",
        ),
        (
            {"variant": "nanoo"},
            'variant: "nanoo" is not allowed: must be one of "pico", "nano", "small", "medium", "large", "base", '
            '"large-deprecated" (use "nano")',
        ),
        ({"group_detr": 0}, "group_detr: 0 is not allowed: must be at least 1 (use 1)"),
        ({"two_stage": 1}, "two_stage: 1 is not allowed: must be true or false (use true)"),
        ({"variant": ["nano"]}, 'variant: ["nano"] is not allowed: must be one of "pico", "nano", "small", "medium", '
         '"large", "base", "large-deprecated" (use "nano")'),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(values: dict[str, Any], message: str) -> None:
    assert refused(**values) == message


def test_all_inconsistencies_are_named_at_once() -> None:
    message = refused(resolution=400, hidden_dim=250, projector_scale=["P5", "P4"], num_select=10**6)
    assert [part.partition(":")[0] for part in message.split("; ")] == [
        *("resolution", "hidden_dim", "projector_scale", "num_select")
    ]


LOSSES = ("ia_bce_loss", "use_position_supervised_loss", "use_varifocal_loss")


@pytest.mark.parametrize("chosen", [*LOSSES, None])
def test_one_classification_loss(chosen: str | None) -> None:
    config = ModelConfig(**{name: name == chosen for name in LOSSES})
    assert [name for name in LOSSES if getattr(config, name)] == ([chosen] if chosen else [])


def test_a_second_classification_loss_would_be_ignored() -> None:
    assert refused(use_varifocal_loss=True) == (
        "use_varifocal_loss: true is not allowed: ia_bce_loss is true, and one loss is used; "
        "set model.ia_bce_loss: false"
    )
    assert error_of(model={"ia_bce_loss": False, "use_position_supervised_loss": True, "use_varifocal_loss": True}) == (
        "model.use_varifocal_loss: true is not allowed: use_position_supervised_loss is true, and one loss is used; "
        "set model.use_position_supervised_loss: false"
    )
    message = refused(use_varifocal_loss=True, use_position_supervised_loss=True)
    assert [part.partition(":")[0] for part in message.split("; ") if "not allowed" in part] == [*LOSSES[1:]]


def test_whole_numbers_inside_lists_may_come_as_floats() -> None:
    config = ModelConfig(out_feature_indexes=[3.0, 6.0])
    assert config.out_feature_indexes == (3, 6)
    assert all(type(index) is int for index in config.out_feature_indexes)


def test_every_encoder_can_be_chosen() -> None:
    for encoder, size in ENCODERS.items():
        assert size.width % size.heads == 0
        indexes = (1, size.depth)
        assert ModelConfig(encoder=encoder, out_feature_indexes=indexes).encoder == encoder


@pytest.mark.parametrize("name", ModelSection.model_fields)
def test_every_field_is_explained(name: str) -> None:
    assert ModelSection.model_fields[name].description
    assert ModelConfig.model_fields[name].description


def test_an_impossible_size_is_refused() -> None:
    for size in (16_000_000, 14_000_014, 10**9 + 1):  # a multiple of 32, of 14, of neither
        with warnings.catch_warnings(action="error"):  # it is not said to be rounded
            assert refused(resolution=size) == (
                f"resolution: {size} is not allowed: must be at most 4096 pixels (use 4096)"
            )
    assert "(use 4088)" in refused(resolution=5000, variant="base")
    assert refused(resolution=4090, variant="base").endswith("(use 4088)")  # 4144 is too large
    assert refused(resolution=5000, patch_size=5000).endswith("must be at most 4096 pixels")
    assert ModelConfig(variant="nano", resolution=4096).resolution == 4096
