"""The published loading rules (model spec 7.3): what is made to fit, what is refused, what the report says."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from rfdetr_core.config import ModelConfig
from rfdetr_core.errors import CheckpointError
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.published import PUBLISHED
from rfdetr_core.models.weight_file import PATCHES, POSITIONS, WeightFile, read_weight_file
from rfdetr_core.models.weights import (
    LoadReport,
    adapt_channels,
    load_pretrained,
    resize_class_rows,
    resize_positions,
    slice_queries,
)
from tests.models import golden

SIZES: dict[str, Any] = {
    "variant": "pico",
    "resolution": 64,
    "num_queries": 4,
    "group_detr": 3,
    "num_classes": 4,
    "num_select": 10,
    "dec_layers": 1,
}
REFPOINTS, QUERIES = "refpoint_embed.weight", "query_feat.weight"
HEADS = ("class_embed.", "transformer.enc_out_class_embed.")


def unit(name: str) -> Tensor:
    return torch.from_numpy(golden.arrays("units")[name])


def model(**changed: Any) -> RFDETR:
    """Small, with weights that no file has."""
    torch.manual_seed(1)
    return RFDETR(ModelConfig(**{**SIZES, **changed}))


@functools.cache
def pico_state() -> dict[str, Tensor]:
    """The reference weights of SIZES."""
    detector = model()
    golden.fill_w1(detector)
    return detector.state_dict()


def weight_file(state: dict[str, Tensor] | None = None, **fields: Any) -> WeightFile:
    known: dict[str, Any] = {"args": {}, "model_name": "RFDETRPico", "model_config": {}, "class_names": (), "stubs": ()}
    values = {**known, "path": Path("weights.pth"), "md5": "0" * 32, **fields}
    return WeightFile(state=dict(pico_state() if state is None else state), **values)


def changed(**tensors: Tensor) -> dict[str, Tensor]:
    return {**pico_state(), **tensors}


def assert_loaded(detector: RFDETR, *, but: Callable[[str], bool] = lambda key: False) -> None:
    """All tensors of the model are the file's, except those named."""
    for key, value in detector.state_dict().items():
        if not but(key):
            assert torch.equal(value, pico_state()[key]), key


# Pure functions


@pytest.mark.parametrize("rows", [8, 3, 12, 5])
def test_class_rows_against_the_reference(rows: int) -> None:
    weight, bias = torch.arange(5.0), torch.arange(5.0) * 10
    expected = (weight, bias) if rows == 5 else (unit(f"head.5_to_{rows}.weight"), unit(f"head.5_to_{rows}.bias"))
    assert torch.equal(resize_class_rows(weight, rows), expected[0])
    assert torch.equal(resize_class_rows(bias, rows), expected[1])
    assert resize_class_rows(torch.ones(5, 7), rows).shape == (rows, 7)


@pytest.mark.parametrize(
    ("held", "wanted"), [((4, 3), (4, 3)), ((4, 3), (2, 3)), ((4, 3), (4, 2)), ((4, 3), (3, 1)), ((4, 3), (6, 2))]
)
def test_query_slices_against_the_reference(held: tuple[int, int], wanted: tuple[int, int]) -> None:
    name = "slice.ckpt{}x{}_to_{}x{}.rows".format(*held, *wanted)
    table = torch.arange(float(held[0] * held[1]))[:, None].expand(-1, 4)
    assert torch.equal(slice_queries(table, held, wanted), unit(name)[:, None].expand(-1, 4))


def test_a_flat_query_slice_against_the_reference() -> None:
    rows = slice_queries(torch.arange(15.0)[:, None], None, (3, 2))
    assert torch.equal(rows[:, 0], unit("slice.ckpt5x3_to_3x2.rows"))


@pytest.mark.parametrize("side", [3, 7, 8])
def test_positions_against_the_reference(side: int) -> None:
    resized = resize_positions(unit("pe.in_5x5"), side)
    assert_allclose(resized, unit(f"pe.out_{side}x{side}"), rtol=0, atol=1e-6)
    assert torch.equal(resized[:, 0], unit("pe.in_5x5")[:, 0])


def test_positions_of_half_precision_are_resized_in_single() -> None:
    half = unit("pe.in_5x5").half()
    assert resize_positions(half, 7).dtype == torch.float16
    assert torch.equal(resize_positions(half, 7), resize_positions(half.float(), 7).half())


def test_one_channel_is_the_mean() -> None:
    kernel = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1)
    assert adapt_channels(kernel, 1).flatten().tolist() == [3.0]


def test_more_channels_repeat_and_keep_the_sum() -> None:
    kernel = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1)
    assert adapt_channels(kernel, 2).flatten().tolist() == [1.5, 3.0]
    assert adapt_channels(kernel, 4).flatten().tolist() == [0.75, 1.5, 4.5, 0.75]
    assert_allclose(adapt_channels(kernel, 6).sum(), 9.0)


# Equal architectures


def test_a_file_of_the_reference_reproduces_its_outputs(tmp_path: Path) -> None:
    """The whole way: a file in the published form, read, loaded, and run on the reference image."""
    torch.save({"model": golden.shared_tiny().state_dict(), "args": {"num_queries": 20}}, tmp_path / "tiny.pth")
    detector = RFDETR(ModelConfig(**golden.TINY))
    report = load_pretrained(detector, read_weight_file(tmp_path / "tiny.pth"))
    assert (report.missing, report.unexpected, report.dropped, report.resized, report.sliced) == ((), (), (), (), ())
    with torch.no_grad():
        outputs = detector.eval()(golden.gauss(*golden.TINY_IMAGE))
    expected = golden.arrays("tiny")
    assert_allclose(outputs["pred_logits"], expected["eval.pred_logits"], rtol=0, atol=1e-4)
    assert_allclose(outputs["pred_boxes"], expected["eval.pred_boxes"], rtol=0, atol=2e-5)


def test_a_file_of_another_precision(tmp_path: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in pico_state().items()}
    detector = model()
    load_pretrained(detector, weight_file(half))
    for key, value in detector.state_dict().items():
        assert value.dtype == pico_state()[key].dtype
        assert torch.equal(value, half[key].to(value.dtype))


def test_the_file_and_the_model_share_no_memory() -> None:
    detector, file = model(), weight_file(changed(**{"class_embed.bias": torch.zeros(5)}))
    load_pretrained(detector, file)
    with torch.no_grad():
        detector.class_embed.bias.fill_(7.0)
    assert not file.state["class_embed.bias"].any()


# Class heads (rule 4)


@pytest.mark.parametrize("num_classes", [2, 3, 5, 12])
def test_class_heads_are_cut_or_repeated(num_classes: int) -> None:
    detector = model(num_classes=num_classes)
    report = load_pretrained(detector, weight_file())
    for key, value in detector.state_dict().items():
        if key.startswith(HEADS):
            rows = pico_state()[key]
            assert torch.equal(value, torch.stack([rows[i % 5] for i in range(num_classes + 1)])), key
    assert_loaded(detector, but=lambda key: key.startswith(HEADS))
    assert report.class_rows == (5, num_classes + 1)
    kept = f"the first {num_classes + 1} are kept" if num_classes < 4 else "repeated from the first on"
    assert f"class heads have 5 rows in the file and {num_classes + 1} in the model: {kept}" in said(report)


def said(report: LoadReport) -> str:
    return "\n".join(report.lines())


# Query tables (rule 5)


@pytest.mark.parametrize("source", ["args", "model_config"])
@pytest.mark.parametrize("known", [("num_queries", "group_detr"), ("num_queries",), ("group_detr",)])
def test_queries_are_cut_per_group(known: tuple[str, ...], source: str) -> None:
    detector = model(num_queries=2, group_detr=2)
    file = weight_file(**{source: {name: SIZES[name] for name in known}})
    report = load_pretrained(detector, file)
    for key in (REFPOINTS, QUERIES):
        assert torch.equal(detector.state_dict()[key], pico_state()[key][[0, 1, 4, 5]])
    assert [change.key for change in report.sliced] == [REFPOINTS, QUERIES]
    assert "refpoint_embed.weight cut from 12 to 4 queries\n" in said(report)
    # The two-stage heads of the group that went have no place.
    assert {key.split(".")[2] for key in report.unexpected} == {"2"}


def test_an_argument_that_says_nothing_hides_nothing() -> None:
    detector = model(num_queries=2, group_detr=2)
    file = weight_file(args={"num_queries": None, "patch_size": None}, model_config={"num_queries": 4, "patch_size": 8})
    load_pretrained(detector, file)
    assert torch.equal(detector.state_dict()[REFPOINTS], pico_state()[REFPOINTS][[0, 1, 4, 5]])


@pytest.mark.parametrize("args", [{}, {"num_queries": 5}, {"num_queries": "4"}, {"num_queries": 4, "group_detr": 13}])
def test_queries_are_cut_flat_where_the_file_does_not_say_its_groups(args: dict[str, Any]) -> None:
    detector = model(num_queries=2)
    report = load_pretrained(detector, weight_file(args=args))
    assert torch.equal(detector.state_dict()[REFPOINTS], pico_state()[REFPOINTS][:6])
    assert "cut from 12 to 6 queries, regardless of groups" in said(report)


@pytest.mark.parametrize(
    ("sizes", "args"),
    [
        ({"num_queries": 5}, {}),
        ({"num_queries": 5}, {"num_queries": 4}),
        ({"group_detr": 4}, {}),
        ({"group_detr": 4}, {"num_queries": 4}),
        ({"num_queries": 6, "group_detr": 2}, {"num_queries": 4}),  # as many rows, and not the same ones
    ],
    ids=str,
)
def test_queries_never_grow(sizes: dict[str, int], args: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match=r"refpoint_embed.weight has .* it cannot grow"):
        load_pretrained(model(**sizes), weight_file(args=args))


# Positions, channels, mask (rules 6, 7, 9)


@pytest.mark.parametrize("resolution", [32, 96])
def test_positions_follow_the_resolution(resolution: int) -> None:
    detector = model(resolution=resolution)
    report = load_pretrained(detector, weight_file())
    side = resolution // 8
    assert torch.equal(detector.state_dict()[POSITIONS], resize_positions(pico_state()[POSITIONS], side))
    assert_loaded(detector, but=lambda key: key == POSITIONS)
    assert [(change.key, change.before[1], change.after[1]) for change in report.resized] == [
        (POSITIONS, 65, 1 + side * side)
    ]
    assert "position_embeddings resized from 1 x 65 x 128 to" in said(report)


def test_positions_that_are_no_square() -> None:
    with pytest.raises(CheckpointError, match="position_embeddings is 1 x 60 x 128, and in the model 1 x 65 x 128"):
        load_pretrained(model(), weight_file(changed(**{POSITIONS: torch.zeros(1, 60, 128)})))


@pytest.mark.parametrize("channels", [1, 4])
def test_weights_of_colour_images_for_others(channels: int) -> None:
    detector = model(num_channels=channels)
    report = load_pretrained(detector, weight_file())
    assert torch.equal(detector.state_dict()[PATCHES], adapt_channels(pico_state()[PATCHES], channels))
    assert report.resized[0].after == (128, channels, 8, 8)


def test_weights_of_the_same_channels_stay() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(128, 4, 8, 8)
    detector = model(num_channels=4)
    assert load_pretrained(detector, weight_file(changed(**{PATCHES: kernel}))).resized == ()
    assert torch.equal(detector.state_dict()[PATCHES], kernel)


def test_weights_of_other_channels_do_not_fit() -> None:
    with pytest.raises(CheckpointError, match="is 128 x 4 x 8 x 8, and in the model 128 x 3 x 8 x 8"):
        load_pretrained(model(), weight_file(changed(**{PATCHES: torch.zeros(128, 4, 8, 8)})))


def test_a_keypoint_mask_of_another_shape_is_dropped() -> None:
    report = load_pretrained(model(), weight_file(changed(_kp_active_mask=torch.zeros(4, 17, dtype=torch.bool))))
    assert report.dropped == ("_kp_active_mask",)
    assert (report.missing, report.unexpected) == ((), ())


def test_a_file_from_before_keypoints_misses_nothing() -> None:
    state = {key: value for key, value in pico_state().items() if key != "_kp_active_mask"}
    detector = model()
    report = load_pretrained(detector, weight_file(state))
    assert (report.missing, report.dropped) == ((), ())
    assert_loaded(detector)


# What does not match


def test_missing_and_unexpected_tensors_are_reported() -> None:
    state = changed(extra=torch.ones(1))
    del state["transformer.decoder.norm.weight"]
    detector = model()
    before = detector.state_dict()["transformer.decoder.norm.weight"].clone()
    report = load_pretrained(detector, weight_file(state))
    assert report.missing == ("transformer.decoder.norm.weight",)
    assert report.unexpected == ("extra",)
    assert torch.equal(detector.state_dict()["transformer.decoder.norm.weight"], before)
    assert_loaded(detector, but=lambda key: key in report.missing)
    assert "1 tensor (transformer.decoder.norm.weight) not in the file: left at initial values" in said(report)
    assert "1 tensor (extra) of the file without a place in the model: not used" in said(report)
    assert report.loaded == len(pico_state()) - 1


def test_more_decoder_layers_than_the_file_has() -> None:
    report = load_pretrained(model(dec_layers=2), weight_file())
    assert report.missing and all(key.startswith("transformer.decoder.layers.1.") for key in report.missing)


@pytest.mark.parametrize("file_refines", [True, False])
@pytest.mark.parametrize("model_refines", [True, False])
def test_the_second_name_of_the_box_head(file_refines: bool, model_refines: bool) -> None:
    state = dict(pico_state())
    if file_refines:
        state |= {f"transformer.decoder.{k}": v for k, v in state.items() if k.startswith("bbox_embed.")}
    detector = model(lite_refpoint_refine=not model_refines)
    report = load_pretrained(detector, weight_file(state))
    assert report.missing == ()
    assert bool(report.unexpected) == (file_refines and not model_refines)
    assert torch.equal(detector.bbox_embed.layers[0].weight, state["bbox_embed.layers.0.weight"])


REFUSED: list[tuple[str, dict[str, Tensor], dict[str, Any], str]] = [
    ("width", {"class_embed.weight": torch.ones(5, 96)}, {}, "class_embed.weight is 5 x 96, and in the model 5 x 128"),
    ("scalar", {"bbox_embed.layers.0.bias": torch.tensor(1.0)}, {}, "is a scalar, and in the model 128"),
    ("type", {"bbox_embed.layers.0.bias": torch.ones(128, dtype=torch.long)}, {}, r"is of type torch\.int64"),
    ("queries", {REFPOINTS: torch.tensor(1.0)}, {}, r"refpoint_embed\.weight is a scalar"),
    ("head", {"transformer.enc_out_class_embed.1.bias": torch.ones(9)}, {}, r"enc_out_class_embed\.1\.bias is 9"),
    ("kernel", {PATCHES: torch.ones(128, 3, 14, 14)}, {}, "on patches of 14 pixels, and the model has patches of 8"),
    ("args", {}, {"args": {"patch_size": 14}}, "trained on patches of 14 pixels"),
    ("flag", {}, {"args": {"segmentation_head": True}}, "weights of a segmentation model, and masks are not built"),
    ("config", {}, {"model_config": {"segmentation_head": True}}, "weights of a segmentation model, and masks"),
    ("class", {}, {"model_name": "RFDETRSegNano"}, "weights of a segmentation model, and masks are not built"),
    ("masks", {"segmentation_head.bias": torch.ones(1)}, {}, "weights of a segmentation model, and masks are not"),
    ("keypoints", {"keypoint_embed.layers.0.bias": torch.ones(1)}, {}, "weights of a keypoint model, and keypoints"),
    ("pose", {}, {"model_name": "RFDETRKeypointPreview"}, "weights of a keypoint model, and keypoints are not built"),
    ("windows", {}, {"model_config": {"num_windows": 1}}, "another architecture: num_windows is 1 in the file and 2"),
    ("old windows", {}, {"args": {"num_windows": 1}}, "another architecture: num_windows is 1 in the file and 2"),
    ("several", {}, {"args": {"sa_nheads": 8, "bbox_reparam": False}},
     "bbox_reparam is False in the file and True in the model; sa_nheads is 8 in the file and 4 in"),
    ("depths", {}, {"args": {"out_feature_indexes": [2, 3, 5, 6]}}, "is 2, 3, 5, 6 in the file and 1, 3, 5, 6"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "fields", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_a_refusal_is_one_line_and_leaves_the_model_alone(
    tensors: dict[str, Tensor], fields: dict[str, Any], message: str
) -> None:
    detector = model()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(detector, weight_file(changed(**tensors), **fields))
    assert str(caught.value).startswith("weights.pth: ") and "\n" not in str(caught.value) and caught.value.hint
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


# Another network of the same tensors

NETWORKS: list[dict[str, Any]] = [
    {"encoder": "dinov2_windowed_small"},
    {"num_windows": 1},
    {"out_feature_indexes": (2, 3, 5, 6)},
    {"projector_scale": ("P3",)},
    {"sa_nheads": 8},
    {"ca_nheads": 4},
    {"dec_n_points": 4},
    {"two_stage": False},
    {"bbox_reparam": False},
    {"lite_refpoint_refine": False},
    {"layer_norm": False},
    {"num_decoder_registers": 2},
]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: next(iter(network)))
def test_what_the_file_says_of_its_network_is_compared(network: dict[str, Any]) -> None:
    buildable = {name: value for name, value in network.items() if name != "num_decoder_registers"}
    state = model(**buildable).state_dict()
    stated = {name: list(value) if isinstance(value, tuple) else value for name, value in network.items()}
    with pytest.raises(
        CheckpointError, match=f"is of another architecture: {next(iter(network))} is .* in the file and"
    ):
        load_pretrained(model(), weight_file(state, model_config=stated))


def test_tensors_that_contradict_what_is_said_are_believed() -> None:
    """The names of the tensors tell whether references come from the encoder."""
    assert load_pretrained(model(), weight_file(args={"two_stage": False})).differing == ()


@pytest.mark.parametrize("network", [{"num_windows": 1}, {"bbox_reparam": False}, {"sa_nheads": 8}], ids=str)
def test_a_network_that_the_file_was_trained_as_is_loaded(network: dict[str, Any]) -> None:
    detector = model(**network)
    report = load_pretrained(detector, weight_file(model_config=network))
    assert report.differing == () and report.missing == ()


@pytest.mark.parametrize("stated", [{"num_windows": 2}, {"num_windows": None}, {"resolution": 32}, {"num_select": 3}])
def test_what_is_equal_not_said_or_harmless_is_no_difference(stated: dict[str, Any]) -> None:
    assert load_pretrained(model(), weight_file(args=stated)).differing == ()


def test_another_network_on_purpose_is_a_warning() -> None:
    """The user has said num_windows, too, and of the variant's own value nobody can tell."""
    detector = model(num_windows=1, sa_nheads=8)
    file = weight_file(model_config={"num_windows": 2, "sa_nheads": 4})
    with pytest.warns(
        UserWarning, match=r"weights\.pth was trained as another network: num_windows is 2 in the file and 1"
    ):
        report = load_pretrained(detector, file)
    assert report.differing == (
        "num_windows is 2 in the file and 1 in the model",
        "sa_nheads is 4 in the file and 8 in the model",
    )
    assert "weights: num_windows is 2 in the file and 1 in the model, as asked for" in said(report)
    assert_loaded(detector)


def test_published_weights_are_their_variants_whatever_is_said_beside_them() -> None:
    md5 = PUBLISHED["rf-detr-nano.pth"].md5
    assert load_pretrained(model(), weight_file(args={"num_windows": 4}, md5=md5)).differing == ()


def test_the_variants_are_named() -> None:
    shapes = golden.scalars("state_dict/state_dict_base")
    state = {key: torch.zeros(entry["shape"]) for key, entry in shapes.items() if not key.startswith("_kp")}
    with pytest.raises(CheckpointError, match=r"patches of 14 .*: the file is base, and pico was asked for"):
        load_pretrained(model(), weight_file(state, model_name=None))


def test_a_variant_is_not_told_from_itself() -> None:
    state = {**pico_state(), "transformer.decoder.norm.weight": torch.zeros(7)}
    with pytest.raises(CheckpointError, match=r"norm\.weight is 7, and in the model \d+ \(") as caught:
        load_pretrained(model(), weight_file(state, model_name="RFDETRPico"))
    assert "asked for" not in str(caught.value)


@pytest.mark.parametrize(
    ("prefix", "part"), [("backbone.0.encoder.", "encoder"), ("transformer.decoder.layers.", "decoder layers")]
)
def test_a_part_of_a_detector_is_refused(prefix: str, part: str) -> None:
    state = {key: value for key, value in pico_state().items() if not key.startswith(prefix)}
    with pytest.raises(CheckpointError, match=f"has no {part}"):
        load_pretrained(model(), weight_file(state))


# The report


def test_the_report_of_a_perfect_match_is_one_line() -> None:
    report = load_pretrained(model(), weight_file())
    assert report.lines() == [f"weights: weights.pth (md5 {'0' * 32}, pico): {len(pico_state())} of the model's "
                              f"{len(pico_state())} tensors"]  # fmt: skip


def test_the_report_names_what_a_reader_should_know() -> None:
    file = weight_file(
        changed(**{"a\x1b[2J": torch.ones(1)}), stubs=("numpy.dtype",), notes=("a note",), model_name="RFDETRNano"
    )
    report = load_pretrained(model(), file)
    text = said(report)
    assert "unknown classes in the metadata, not loaded: numpy.dtype" in text
    assert "weights: a note" in text
    assert "the file is nano, and the model pico" in text
    assert "\x1b" not in text


def test_the_report_as_json() -> None:
    report = load_pretrained(model(resolution=32, num_classes=2, num_queries=2, num_select=6), weight_file())
    content = json.loads(json.dumps(report.to_json()))
    assert content["class_rows"] == [5, 3]
    assert content["resized"] == [{"key": POSITIONS, "before": [1, 65, 128], "after": [1, 17, 128]}]
    assert [row["after"] for row in content["sliced"]] == [[6, 4], [6, 128]]
    assert content["file"] == "weights.pth" and content["loaded"] == report.loaded
