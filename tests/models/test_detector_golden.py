"""The detector against the reference numbers: outputs, tokens chosen, intermediates, losses, gradients."""

from __future__ import annotations

import pytest
import torch
from numpy.testing import assert_allclose

from rfdetr_core.models.detector import pad_images
from tests.models import golden, golden_models
from tests.models.golden_check import breaches
from tests.models.golden_report import computed


@pytest.mark.parametrize("case", golden_models.CASES)
def test_small_models(case: str) -> None:
    assert not breaches(computed(case))


@pytest.mark.long
@pytest.mark.parametrize("case", golden_models.LONG_CASES)
def test_full_size(case: str) -> None:
    assert not breaches(computed(case))


def test_a_batch_with_its_mask_is_a_list_of_images() -> None:
    model = golden.shared_tiny().eval()
    images = golden_models.images_of(golden_models.TINY_IMAGES["tiny_padded"])
    batch, mask = pad_images(images)
    with torch.no_grad():
        found, expected = model(batch, mask), model(images)
    for part in ("pred_logits", "pred_boxes"):
        assert_allclose(found[part], expected[part], rtol=0, atol=1e-6)
    assert_allclose(found["pred_boxes"], golden.arrays("tiny_padded")["eval.pred_boxes"], rtol=0, atol=2e-5)


def test_query_positions_are_computed_once_when_references_are_refined_once() -> None:
    model = golden.shared_tiny().eval()
    with torch.no_grad(), golden_models.captured(model.transformer.decoder.ref_point_head) as positions:
        model(golden.gauss(*golden.TINY_IMAGE), with_aux=True)
    assert len(positions) == 1
