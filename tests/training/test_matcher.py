"""The assignment against stored reference cases, scipy on the whole problem, and broken predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from scipy.optimize import linear_sum_assignment

from rfdetr_core.errors import DatasetError
from rfdetr_core.training.matcher import match, match_layers, pack_targets, pair_costs
from tests.models import golden
from tests.models.golden_check import breaches
from tests.models.golden_report import computed
from tests.models.golden_units import BREAKAGE
from tests.models.golden_units import matcher_case as case


@pytest.mark.parametrize("name", BREAKAGE)
def test_reference_numbers(name: str) -> None:
    """Costs, those that stand in for broken ones among them, and the assignments of one and three groups."""
    assert not breaches(computed(f"matcher.{name}"))


def test_broken_predictions_are_reported() -> None:
    outputs, targets = case("nan_logit")
    with pytest.warns(RuntimeWarning, match="not finite"):
        match(outputs, targets, groups=1)


def test_padded_targets_are_matched_like_the_real_ones_alone() -> None:
    outputs, targets = case("plain")
    rows = [torch.tensor([1, 0, 1, 1, 1, 0]), torch.tensor([0, 0]), torch.ones(7, dtype=torch.int64)]
    padded = []
    for target, real in zip(targets, rows, strict=True):
        labels, boxes = torch.full((len(real),), -1), torch.full((len(real), 4), torch.nan)  # of no use to anyone
        labels[real.bool()], boxes[real.bool()] = target["labels"], target["boxes"]
        padded.append({"labels": labels, "boxes": boxes, "valid": real.bool()})
    for found, expected in zip(match(outputs, padded, groups=3), match(outputs, targets, groups=3), strict=True):
        assert_array_equal(found[0], expected[0])
        assert_array_equal(found[1], expected[1])
    assert pack_targets(padded, outputs["pred_boxes"]).counts == [4, 0, 7]


def test_layers_are_matched_as_if_alone() -> None:
    """Layers of unequal size side by side give the pairs of one call per layer."""
    outputs, targets = case("plain")
    short = {key: value[:, :6] for key, value in outputs.items()}
    logits, boxes = (torch.cat([outputs[key], short[key]], dim=1) for key in ("pred_logits", "pred_boxes"))
    together = match_layers(logits, boxes, pack_targets(targets, boxes), [12, 6], groups=3)
    first_rows = torch.tensor([0, 4, 4])
    for layer, (alone, offset) in enumerate([(match(outputs, targets, 3), 0), (match(short, targets, 3), 12)]):
        chosen = together.layer == layer
        image = together.image[chosen]
        for i, (query, target) in enumerate(alone):
            assert_array_equal(together.query[chosen][image == i] - offset, query)
            assert_array_equal(together.target[chosen][image == i] - first_rows[i], target)
    assert together.first_layer == 24


def test_more_targets_than_queries_match_every_query() -> None:
    generator = torch.Generator().manual_seed(3)
    outputs = {
        "pred_logits": torch.randn(1, 4, 3, generator=generator),
        "pred_boxes": torch.rand(1, 4, 4, generator=generator),
    }
    target = {"labels": torch.tensor([0, 1, 2] * 3), "boxes": torch.rand(9, 4, generator=generator)}
    ((query, matched),) = match(outputs, [target], groups=1)
    costs = pair_costs(outputs["pred_logits"][0].T[target["labels"]], outputs["pred_boxes"], target["boxes"][:, None])
    rows, columns = linear_sum_assignment(costs.T.numpy())
    assert_array_equal(query, rows)
    assert_array_equal(matched, columns)


def test_broken_layer_leaves_the_others_alone() -> None:
    """The value that stands in for a broken cost is that layer's own, and finite layers keep their pairs."""
    outputs, targets = case("plain")
    broken, _ = case("nan_box")
    logits, boxes = (torch.cat([outputs[key], broken[key]], dim=1) for key in ("pred_logits", "pred_boxes"))
    with pytest.warns(RuntimeWarning, match="not finite"):
        together = match_layers(logits, boxes, pack_targets(targets, boxes), [12, 12], groups=1)
    data = golden.arrays("units")
    for layer, name in enumerate(["plain", "nan_box"]):
        chosen = (together.layer == layer) & (together.image == 2)
        assert_array_equal(together.query[chosen] - 12 * layer, data[f"matcher.{name}.g1.img2.query"])


@pytest.mark.parametrize("label", [5, -1])
def test_a_label_without_a_column_is_named(label: int) -> None:
    outputs, targets = case("plain")
    targets[2]["labels"] = targets[2]["labels"].clone()
    targets[2]["labels"][4] = label
    with pytest.raises(DatasetError, match=rf"label {label} of image 2 in the batch is outside 0\.\.4"):
        match(outputs, targets, groups=1)


def test_one_target_list_per_image() -> None:
    outputs, targets = case("plain")
    with pytest.raises(ValueError, match="2 targets for 3 images"):
        match(outputs, targets[:2], groups=1)


def test_images_without_targets() -> None:
    outputs, _ = case("plain")
    empty = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    assert [len(q) + len(t) for q, t in match(outputs, [empty] * 3, groups=3)] == [0, 0, 0]
    assert np.all(golden.arrays("units")["matcher.targets1.labels"].shape == (0,))
