"""Losses and their gradients against reference numbers, and what each setting does to them.

The losses of whole models are compared in tests/models/test_detector_golden.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rfdetr_core.config import ModelConfig
from rfdetr_core.training.criterion import Criterion
from tests.models import golden
from tests.models.golden_check import breaches
from tests.models.golden_models import LOSSES
from tests.models.golden_report import computed
from tests.models.golden_units import criterion_for, criterion_outputs

CLASSIFICATION = [loss for loss in LOSSES if loss != "ia_bce_sumgroups"]


@pytest.mark.parametrize("loss", CLASSIFICATION)
def test_reference_numbers(loss: str) -> None:
    assert not breaches(computed(f"criterion.{loss}"))


def test_each_flag_chooses_another_classification_loss_and_no_other_box_loss() -> None:
    targets = golden.targets("units", 2, "criterion.")
    found = {loss: criterion_for(loss)(criterion_outputs(), targets) for loss in CLASSIFICATION}
    assert len({losses["loss_ce"].item() for losses in found.values()}) == 4
    assert len({losses["loss_bbox"].item() for losses in found.values()}) == 1


def test_summed_groups_are_not_averaged_in_training() -> None:
    targets = golden.targets("units", 2, "criterion.")
    averaged, summed = (criterion_for(loss) for loss in ("ia_bce", "ia_bce_sumgroups"))
    for mode, factor in ((True, 3.0), (False, 1.0)):
        mean, total = (c.train(mode)(criterion_outputs(), targets) for c in (averaged, summed))
        for name in averaged.weight_dict:
            assert total[name].item() == pytest.approx(factor * mean[name].item(), rel=1e-6), name
        assert total["class_error"] == mean["class_error"]


def one_pair(loss: str, iou: bool) -> Tensor:
    """Class loss of one query with one target that its box covers wholly, or not at all."""
    box = torch.tensor([[0.2, 0.2, 0.2, 0.2]])
    outputs = {"pred_logits": torch.tensor([[[0.7, -0.3]]]), "pred_boxes": (box if iou else 1.0 - box)[None]}
    target = {"labels": torch.tensor([0]), "boxes": box}
    config = ModelConfig(num_classes=1, dec_layers=1, group_detr=1, two_stage=False, **LOSSES[loss])
    value: Tensor = Criterion(config)(outputs, [target])["loss_ce"]
    return value


@pytest.mark.parametrize(("loss", "weight"), [("varifocal", 1.0), ("position", 0.25 * (1 - 0.668188) ** 2)])
def test_without_overlap_a_match_counts_as_negative(loss: str, weight: float) -> None:
    z = torch.tensor([0.7, -0.3])
    softplus = torch.nn.functional.softplus
    matched, other = (0.75 * z.sigmoid().square() * softplus(z)).tolist()
    assert one_pair(loss, iou=False).item() == pytest.approx(matched + other, rel=1e-6)
    assert one_pair(loss, iou=True).item() == pytest.approx(weight * softplus(-z[0]).item() + other, rel=1e-5)


def test_the_best_match_of_each_image_is_a_full_positive() -> None:
    """Position-supervised: IoUs count relative to the best of their image and layer, not of the batch."""
    outputs, targets = criterion_outputs(), golden.targets("units", 2, "criterion.")
    together = criterion_for("position").eval()(outputs, targets, num_boxes=1.0)
    alone = []
    for i in (0, 1):
        layers = [{part: x[i : i + 1] for part, x in layer.items()} for layer in (outputs["aux_outputs"][0],)]
        one = {"pred_logits": outputs["pred_logits"][i : i + 1], "pred_boxes": outputs["pred_boxes"][i : i + 1]}
        alone.append(criterion_for("position").eval()({**one, "aux_outputs": layers}, [targets[i]], num_boxes=1.0))
    for name in ("loss_ce", "loss_ce_0"):
        assert together[name].item() == pytest.approx(sum(losses[name].item() for losses in alone), rel=1e-6)


def test_terms_come_in_the_order_in_which_they_are_logged() -> None:
    losses = criterion_for("ia_bce")(criterion_outputs(), golden.targets("units", 2, "criterion."))
    assert list(losses) == list(golden.scalars("units")["criterion"]["ia_bce.train.avg"])


def test_the_classification_weight_scales_its_term_only() -> None:
    outputs, targets = criterion_outputs(), golden.targets("units", 2, "criterion.")
    config = ModelConfig(num_classes=5, dec_layers=2, group_detr=3)
    plain, heavy = Criterion(config), Criterion(config, cls_loss_coef=3.0)
    losses = plain(outputs, targets)
    classification = sum(losses[f"loss_ce{suffix}"].item() for suffix in ("", "_0", "_enc"))
    added = heavy.total(losses).item() - plain.total(losses).item()
    assert added == pytest.approx(2.0 * classification, rel=1e-5)


def test_low_precision_outputs_are_summed_in_float32() -> None:
    outputs, targets = criterion_outputs(), golden.targets("units", 2, "criterion.")
    half = {
        "pred_logits": outputs["pred_logits"].detach().bfloat16(),
        "pred_boxes": outputs["pred_boxes"].detach(),
    }
    exact = {"pred_logits": half["pred_logits"].float(), "pred_boxes": half["pred_boxes"]}
    criterion = criterion_for("ia_bce")
    low, high = criterion(half, targets), criterion(exact, targets)
    assert low["loss_ce"].dtype == torch.float32
    assert low["loss_ce"].item() == high["loss_ce"].item()


def _rank(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    outputs, targets = criterion_outputs(), golden.targets("units", 2, "criterion.")  # 5 and 3 targets
    if rank == 1:
        targets = [{part: values[:1] for part, values in target.items()} for target in targets]  # 1 and 1
    criterion = criterion_for("ia_bce")
    shared, explicit = criterion(outputs, targets), criterion(outputs, targets, num_boxes=(8 + 2) * 3 / 2)
    torch.distributed.destroy_process_group()
    torch.save([shared, explicit], folder / f"losses{rank}.pt")


@pytest.mark.long
def test_the_normaliser_is_averaged_over_the_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    for rank in range(2):
        shared, explicit = torch.load(tmp_path / f"losses{rank}.pt", weights_only=True)
        assert shared.keys() == explicit.keys()
        assert all(torch.equal(shared[name], explicit[name]) for name in explicit)
