"""Losses, their gradients and the assignment behind them, against reference numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor

from rfdetr_core.config import ModelConfig
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.training.criterion import Criterion
from rfdetr_core.training.matcher import match
from tests.models import golden

Targets = list[dict[str, Tensor]]
VARIANTS = {name: flags for name, flags in golden.VARIANTS.items() if name != "var_batchnorm_projector"}


def losses_of(model: RFDETR, images: Any, targets: Targets, mode: str) -> tuple[dict[str, Tensor], Tensor]:
    """Loss terms and their weighted sum; the model carries no older gradients."""
    model.train(mode == "train").zero_grad(set_to_none=True)
    criterion = Criterion(model.config).train(mode == "train")
    losses = criterion(model(images, with_aux=True), targets)
    return losses, criterion.total(losses)


def assert_losses(losses: dict[str, Tensor], expected: dict[str, float], rtol: float = 1e-4) -> None:
    assert list(losses) == list(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=rtol, abs=1e-6), name


def assert_gradients(model: RFDETR, expected: dict[str, Any], rel: float = 1e-2, floor: float = 1e-2) -> None:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == expected["grad_none"]
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items() if gradient is not None}
    assert norms.keys() == expected["grad_norms"].keys()
    wrong = {k: (v, norms[k]) for k, v in expected["grad_norms"].items() if abs(norms[k] - v) > rel * v + floor}
    assert not wrong


def inline_targets(section: dict[str, Any]) -> Targets:
    return [
        {"boxes": torch.tensor(t["boxes"]).reshape(-1, 4), "labels": torch.tensor(t["labels"], dtype=torch.int64)}
        for t in section["targets"]
    ]


CASES: dict[str, Any] = {
    "tiny": lambda: golden.gauss(*golden.TINY_IMAGE),
    "tiny_rect": lambda: golden.gauss(1235, (2, 3, 96, 160)),
    "tiny_fewtokens": lambda: golden.gauss(1239, (2, 3, 64, 64)),
    "tiny_padded": lambda: [golden.gauss(1237, (3, 128, 96)), golden.gauss(1238, (3, 100, 128))],
}


@pytest.mark.parametrize("case", CASES)
def test_training_losses_assignments_and_gradient_norms(case: str) -> None:
    model, targets, expected = golden.shared_tiny(), golden.targets(case), golden.scalars("tiny")[case]
    losses, total = losses_of(model, CASES[case](), targets, "train")
    assert_losses(losses, expected["train_losses_ia_bce"])
    assert total.item() == pytest.approx(expected["train_total_ia_bce"], rel=1e-4)
    assert Criterion(model.config).weight_dict == expected["weight_dict"]
    total.backward()
    assert_gradients(model, expected)

    with torch.no_grad():
        outputs = model(CASES[case]())
    layers = {"": outputs, "_enc": outputs["enc_outputs"]}
    layers |= {f"_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])}
    data = golden.arrays(case)
    for suffix, layer in layers.items():
        for i, (query, target) in enumerate(match(layer, targets, groups=3)):
            assert_array_equal(query, data[f"train.match{suffix}.img{i}.query"])
            assert_array_equal(target, data[f"train.match{suffix}.img{i}.target"])


@pytest.mark.parametrize("case", CASES)
def test_evaluation_losses(case: str) -> None:
    with torch.no_grad():
        losses, total = losses_of(golden.shared_tiny(), CASES[case](), golden.targets(case), "eval")
    assert_losses(losses, golden.scalars("tiny")[case]["eval_losses_ia_bce"])
    assert total.item() == pytest.approx(golden.scalars("tiny")[case]["eval_total"], rel=1e-4)


def test_gradients() -> None:
    model = golden.shared_tiny()
    losses_of(model, golden.gauss(*golden.TINY_IMAGE), golden.targets("tiny"), "train")[1].backward()
    assert_gradient_arrays(model, "tiny", 5e-3)


def test_float64_losses_and_gradients() -> None:
    model = golden.build(torch.float64)
    image, expected = golden.gauss(*golden.TINY_IMAGE).double(), golden.scalars("tiny_float64")
    losses, total = losses_of(model, image, golden.targets("tiny"), "train")
    assert_losses(losses, expected["train_losses_ia_bce"], rtol=1e-7)
    total.backward()
    none = golden.scalars("tiny")["tiny"]["grad_none"]
    assert_gradients(model, {"grad_none": none, **expected}, rel=1e-9, floor=1e-9)
    assert_gradient_arrays(model, "tiny_float64", 1e-9)


def assert_gradient_arrays(model: RFDETR, case: str, tolerance: float) -> None:
    parameters, data = dict(model.named_parameters()), golden.arrays(case)
    names = [key.removeprefix("grad.") for key in data if key.startswith("grad.")]
    assert len(names) == 22
    for name in names:
        gradient = parameters[name].grad
        assert gradient is not None
        wanted = data[f"grad.{name}"]
        assert np.linalg.norm(gradient.numpy() - wanted) <= tolerance * np.linalg.norm(wanted), name


@pytest.mark.parametrize(
    ("case", "loss"),
    [
        ("tiny_oneempty", "ia_bce"),
        ("tiny_oneempty", "focal"),
        ("tiny_allempty", "ia_bce"),
        ("tiny_allempty", "focal"),
        ("tiny_crowded", "ia_bce"),
    ],
)
def test_unusual_numbers_of_targets(case: str, loss: str) -> None:
    section = golden.scalars("tiny")[case]
    model = golden.shared_tiny().train()
    criterion = Criterion(model.config.model_copy(update={"ia_bce_loss": loss == "ia_bce"}))
    with torch.no_grad():
        assert_losses(
            criterion(model(golden.gauss(*golden.TINY_IMAGE)), inline_targets(section)), section[f"train_losses_{loss}"]
        )


def test_a_batch_of_one() -> None:
    with torch.no_grad():
        losses, _ = losses_of(
            golden.shared_tiny(), golden.gauss(*golden.TINY_IMAGE)[:1], golden.targets("tiny")[:1], "train"
        )
    assert_losses(losses, golden.scalars("tiny")["tiny_batch1"]["train_losses_ia_bce"])


@pytest.mark.parametrize("case", VARIANTS)
def test_losses_and_gradients_with_other_architectures(case: str) -> None:
    model, expected = golden.build(**VARIANTS[case]), golden.scalars("tiny")[case]
    side = model.config.resolution
    losses, total = losses_of(model, golden.gauss(1248, (2, 3, side, side)), golden.targets("tiny"), "train")
    assert_losses(losses, expected["train_losses_ia_bce"])
    assert Criterion(model.config).weight_dict == expected["weight_dict"]
    total.backward()
    assert_gradients(model, expected)


@pytest.mark.long
def test_full_size_training_with_thirteen_groups() -> None:
    data, expected = golden.arrays("nano60_train"), golden.scalars("nano60_train")
    model, targets = golden.build(variant="nano", num_queries=60, num_select=60), golden.targets("nano60_train")
    model.train()
    criterion = Criterion(model.config)
    outputs = model(golden.gauss(437, (2, 3, 384, 384)))
    assert_allclose(outputs["pred_boxes"].detach(), data["train.pred_boxes"], rtol=0, atol=2e-5)
    for i, (query, target) in enumerate(match(outputs, targets, groups=13)):
        assert_array_equal(query, data[f"train.match.img{i}.query"])
        assert_array_equal(target, data[f"train.match.img{i}.target"])
    losses = criterion(outputs, targets)
    assert_losses(losses, expected["losses"])
    criterion.total(losses).backward()
    assert_gradients(model, expected)


def unit_outputs() -> dict[str, Any]:
    data = golden.arrays("units")

    def layer(name: str) -> dict[str, Tensor]:
        return {
            f"pred_{part}": torch.from_numpy(data[f"criterion.{name}.{part}"]).requires_grad_()
            for part in ("logits", "boxes")
        }

    return {**layer("final"), "aux_outputs": [layer("aux0")], "enc_outputs": layer("enc")}


def unit_criterion(loss: str) -> Criterion:
    return Criterion(ModelConfig(num_classes=5, dec_layers=2, group_detr=3, ia_bce_loss=loss == "ia_bce"))


@pytest.mark.parametrize("loss", ["ia_bce", "focal"])
def test_losses_of_given_outputs(loss: str) -> None:
    outputs, targets = unit_outputs(), golden.targets("units", 2, "criterion.")
    expected, criterion = golden.scalars("units")["criterion"], unit_criterion(loss)
    assert_losses(criterion.eval()(outputs, targets), expected[f"{loss}.eval.avg"])
    assert_losses(criterion.train()(outputs, targets, num_boxes=1.0), expected[f"{loss}.train.num_boxes_1"])
    losses = criterion(outputs, targets)
    assert_losses(losses, expected[f"{loss}.train.avg"])
    sum(losses[name] for name in ("loss_ce", "loss_bbox", "loss_giou")).backward()  # unweighted, as stored
    data = golden.arrays("units")
    for part in ("logits", "boxes"):
        assert_allclose(outputs[f"pred_{part}"].grad, data[f"criterion.{loss}.grad_{part}_final"], rtol=1e-4, atol=1e-6)


def test_the_classification_weight_scales_its_term_only() -> None:
    outputs, targets = unit_outputs(), golden.targets("units", 2, "criterion.")
    config = ModelConfig(num_classes=5, dec_layers=2, group_detr=3)
    plain, heavy = Criterion(config), Criterion(config, cls_loss_coef=3.0)
    losses = plain(outputs, targets)
    classification = sum(losses[f"loss_ce{suffix}"].item() for suffix in ("", "_0", "_enc"))
    added = heavy.total(losses).item() - plain.total(losses).item()
    assert added == pytest.approx(2.0 * classification, rel=1e-5)


def test_low_precision_outputs_are_summed_in_float32() -> None:
    outputs, targets = unit_outputs(), golden.targets("units", 2, "criterion.")
    half = {
        "pred_logits": outputs["pred_logits"].detach().bfloat16(),
        "pred_boxes": outputs["pred_boxes"].detach(),
    }
    exact = {"pred_logits": half["pred_logits"].float(), "pred_boxes": half["pred_boxes"]}
    criterion = unit_criterion("ia_bce")
    low, high = criterion(half, targets), criterion(exact, targets)
    assert low["loss_ce"].dtype == torch.float32
    assert low["loss_ce"].item() == high["loss_ce"].item()


def _rank(rank: int, rendezvous: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    outputs, targets = unit_outputs(), golden.targets("units", 2, "criterion.")  # 5 and 3 targets
    if rank == 1:
        targets = [{part: values[:1] for part, values in target.items()} for target in targets]  # 1 and 1
    criterion = unit_criterion("ia_bce")
    shared, explicit = criterion(outputs, targets), criterion(outputs, targets, num_boxes=(8 + 2) * 3 / 2)
    torch.distributed.destroy_process_group()
    assert all(torch.equal(shared[name], explicit[name]) for name in explicit)


@pytest.mark.long
def test_the_normaliser_is_averaged_over_the_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (f"file://{tmp_path}/rendezvous",), nprocs=2)
