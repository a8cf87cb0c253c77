"""The reference cases of whole models: outputs, intermediates, losses, assignments and gradients."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from rfdetr_core.config import ModelConfig
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.postprocess import postprocess
from rfdetr_core.training.criterion import Criterion
from rfdetr_core.training.matcher import match
from tests.models import golden
from tests.models.golden_check import FLOAT64, Check

Targets = Sequence[dict[str, Tensor]]

LOSSES: dict[str, dict[str, bool]] = {
    "ia_bce": {},
    "ia_bce_sumgroups": {"sum_group_losses": True},
    "focal": {"ia_bce_loss": False},
    "position": {"ia_bce_loss": False, "use_position_supervised_loss": True},
    "varifocal": {"ia_bce_loss": False, "use_varifocal_loss": True},
}
"""Flags of the losses, by the name that the reference numbers have for them."""

TINY_IMAGES: dict[str, Any] = {
    "tiny": golden.TINY_IMAGE,
    "tiny_rect": (1235, (2, 3, 96, 160)),  # positional table resized to another aspect ratio
    "tiny_up192": (1236, (1, 3, 192, 192)),
    "tiny_fewtokens": (1239, (2, 3, 64, 64)),  # 16 tokens for 20 queries
    "tiny_padded": [(1237, (3, 128, 96)), (1238, (3, 100, 128))],
}
"""Seeds and shapes of the images that the tiny model sees."""

FULL = ("nano", "small", "medium", "base", "large", "large_deprecated")


def images_of(seeds: Any) -> Tensor | list[Tensor]:
    """One batch, or a list of images of different sizes."""
    return [golden.gauss(*seed) for seed in seeds] if isinstance(seeds, list) else golden.gauss(*seeds)


# Running


class Run(NamedTuple):
    """What a model returns, and what its parts return on the way, by the names of the reference."""

    outputs: dict[str, Any]
    topk: Tensor | None
    """(G, B, k) selected tokens; None without the two-stage selection."""
    taps: dict[str, Tensor]

    @property
    def layers(self) -> dict[str, Any]:
        """Outputs by the prefix of their arrays."""
        layers = {"": self.outputs} | {f"aux{i}.": layer for i, layer in enumerate(self.outputs["aux_outputs"])}
        return layers | ({"enc.": self.outputs["enc_outputs"]} if "enc_outputs" in self.outputs else {})


@contextmanager
def captured(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what `module` returns."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def run(model: RFDETR, images: Tensor | list[Tensor], mode: str) -> Run:
    """One forward in `mode`, "eval" or "train", with every head."""
    model.train(mode == "train")
    vit, projector = model.backbone[0].encoder.encoder, model.backbone[0].projector
    decoder = model.transformer.decoder
    parts = {"embeddings": vit.embeddings, "vit": vit, "projector": projector, "transformer": model.transformer}
    parts["query_pos"] = decoder.ref_point_head
    for i, layer in enumerate(decoder.layers):
        parts |= {f"dec{i}.self_attn": layer.self_attn, f"dec{i}.cross_attn": layer.cross_attn, f"dec{i}.out": layer}
    with ExitStack() as stack:
        seen = {name: stack.enter_context(captured(part)) for name, part in parts.items()}
        outputs = model(images, with_aux=True)
    _, references, selection = seen["transformer"][0]
    taps = {name: found[0] for name, found in seen.items() if name not in ("vit", "projector", "transformer")}
    taps["refpoints_in"] = references[0]
    for name, maps in (("backbone_feature", seen["vit"][0]), ("projector", seen["projector"][0])):
        taps |= {f"{name}{i}": feature.permute(0, 3, 1, 2) for i, feature in enumerate(maps)}  # (B, C, h, w)
    return Run(outputs, None if selection is None else selection.indices, taps)


# Comparing


def thinned(x: Tensor, entry: str) -> Tensor:
    """What is stored of a tensor, by the end of the entry's name."""
    ending = entry.rpartition(".")[2]
    if ending.startswith("every"):
        return x[:, :: int(ending.removeprefix("every").rstrip("rdth"))]
    if ending == "b0_every8ch":
        return x[0, ::8]
    return x[0, :3] if ending == "ch0to2" else x


def check_outputs(check: Check, case: str, mode: str, found: Run, *, indices: bool = True) -> None:
    """Every stored output, intermediate and selected token of `mode`."""
    file, names = f"{case}.npz", golden.arrays(case)
    for prefix, layer in found.layers.items():
        for kind in ("logits", "boxes"):
            (name,) = [name for name in names if name.startswith(f"{mode}.{prefix}pred_{kind}")]
            check(file, name, kind, thinned(layer[f"pred_{kind}"], name))
    for name in names:
        if name.startswith(f"{mode}.tap."):
            part = name.removeprefix(f"{mode}.tap.")
            part = part.removesuffix(".ch0to2").removesuffix(".b0_every8ch").removesuffix(".every30th")
            check(file, name, "features", thinned(found.taps[part], name))
    if found.topk is not None and indices and f"{mode}.topk_indices" in names:
        check(file, f"{mode}.topk_indices", "equal", found.topk[0] if mode == "eval" else found.topk)


def check_postprocessing(check: Check, case: str, num_select: int) -> None:
    """Detections from the stored outputs, so that no near-tie can swap."""
    stored = golden.arrays(case)
    inputs = [torch.from_numpy(stored[f"eval.{name}"]) for name in ("pred_logits", "pred_boxes", "target_sizes")]
    for i, detections in enumerate(postprocess(*inputs, num_select)):
        for part, kind in (("scores", "scores"), ("labels", "equal"), ("boxes", "pixels")):
            check(f"{case}.npz", f"eval.post{i}.{part}", kind, detections[part])


def losses_of(
    config: ModelConfig, outputs: dict[str, Any], targets: Targets, mode: str, loss: str = "ia_bce"
) -> tuple[dict[str, Tensor], Tensor]:
    """Loss terms and their weighted sum, by the name of the loss in `LOSSES`."""
    criterion = Criterion(config.model_copy(update=LOSSES[loss])).train(mode == "train")
    losses = criterion(outputs, targets)
    return losses, criterion.total(losses)


def check_losses(check: Check, section: str, config: ModelConfig, found: Run, targets: Targets) -> None:
    """Every kind of training loss that a section of tiny.json has."""
    names = golden.scalars("tiny")[section]
    for loss in LOSSES:
        if f"train_losses_{loss}" in names:
            losses, total = losses_of(config, found.outputs, targets, "train", loss)
            check("tiny.json", f"{section}/train_losses_{loss}", "losses", losses)
            if f"train_total_{loss}" in names:
                check("tiny.json", f"{section}/train_total_{loss}", "losses", total)


def check_gradients(check: Check, file: str, section: str, model: RFDETR, arrays: str | None) -> None:
    """Norms of all gradients, and the stored arrays of some, after a backward."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items() if gradient is not None}
    names = golden.scalars(file.removesuffix(".json"))
    names = names[section.rstrip("/")] if section else names
    check(file, f"{section}grad_norms", "norms", norms)
    if "grad_none" in names:
        check(file, f"{section}grad_none", "equal", [name for name, grad in gradients.items() if grad is None])
    if "grad_total_norm" in names:
        check(file, f"{section}grad_total_norm", "norms", float(np.linalg.norm(list(norms.values()))))
    for name in golden.arrays(arrays) if arrays else ():
        if name.startswith("grad."):
            check(f"{arrays}.npz", name, "gradients", gradients[name.removeprefix("grad.")])


def check_matches(check: Check, case: str, found: Run, targets: Targets, groups: int) -> None:
    """The assignment of every layer."""
    for prefix, layer in found.layers.items():
        suffix = prefix.replace("aux", "_").replace("enc", "_enc").rstrip(".")
        for i, pairs in enumerate(match(layer, targets, groups)):
            for part, rows in zip(("query", "target"), pairs, strict=True):
                check(f"{case}.npz", f"train.match{suffix}.img{i}.{part}", "equal", rows)


# Cases of the tiny model


def small_case(case: str) -> Check:
    """The tiny model on its images, or one of its architecture variants: evaluation, then one training step."""
    check, section = Check(), golden.scalars("tiny")[case]
    model = golden.build(**golden.VARIANTS[case]) if case in golden.VARIANTS else golden.shared_tiny()
    side = model.config.resolution
    images = images_of(TINY_IMAGES.get(case, (1248, (2, 3, side, side))))
    targets = golden.targets(case, len(images))
    # All masked tokens of a padded batch tie, and are chosen in any order.
    indices = case != "tiny_padded"
    with torch.no_grad():
        found = run(model, images, "eval")
        losses, total = losses_of(model.config, found.outputs, targets, "eval")
    check_outputs(check, case, "eval", found, indices=indices)
    check("tiny.json", f"{case}/eval_losses_ia_bce", "losses", losses)
    check("tiny.json", f"{case}/eval_total", "losses", total)
    check("tiny.json", f"{case}/weight_dict", "equal", Criterion(model.config).weight_dict)
    if "eval.post0.scores" in golden.arrays(case):
        check_postprocessing(check, case, model.config.num_select)
    if "train_losses_ia_bce" not in section:  # batch norm, and the larger image, were evaluated only
        return check
    model.zero_grad(set_to_none=True)
    found = run(model, images, "train")
    check_outputs(check, case, "train", found, indices=indices)
    check_losses(check, case, model.config, found, targets)
    check_matches(check, case, found, targets, model.config.group_detr)
    losses_of(model.config, found.outputs, targets, "train")[1].backward()
    check_gradients(check, "tiny.json", f"{case}/", model, case)
    return check


def tiny_targets() -> Check:
    """The tiny model with unusual numbers of targets: none, more than queries, one image, padded to a fixed size."""
    check, sections = Check(), golden.scalars("tiny")
    model, image = golden.shared_tiny(), golden.gauss(*golden.TINY_IMAGE)
    usual = golden.targets("tiny")
    cases = {name: inline_targets(sections[name]) for name in ("tiny_oneempty", "tiny_allempty", "tiny_crowded")}
    cases |= {"tiny_batch1": usual[:1], "tiny_padtargets6": [padded(target, 6) for target in usual]}
    with torch.no_grad():
        for name, targets in cases.items():
            found = run(model, image[: len(targets)], "train")
            check_losses(check, name, model.config, found, targets)
            if "match_final" in sections[name]:
                pairs = [[rows.tolist() for rows in pair] for pair in match(found.outputs, targets, groups=3)]
                stored = sections[name]["match_final"]
                for i, pair in enumerate(pairs):
                    check.values("tiny.json", f"{name}/match_final", "equal", pair, stored[i])
    return check


def inline_targets(section: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The targets that a section of tiny.json lists."""
    return [
        {"boxes": torch.tensor(t["boxes"]).reshape(-1, 4), "labels": torch.tensor(t["labels"], dtype=torch.int64)}
        for t in section["targets"]
    ]


def padded(target: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """A target of a fixed number of rows; `valid` tells which are real."""
    real = len(target["labels"])
    boxes = torch.cat([target["boxes"], torch.full((rows - real, 4), 0.5)])
    labels = torch.cat([target["labels"], torch.ones(rows - real, dtype=torch.int64)])
    return {"boxes": boxes, "labels": labels, "valid": torch.arange(rows) < real}


def tiny_float64() -> Check:
    """The tiny model in double precision."""
    check = Check(FLOAT64)
    model, image = golden.build(torch.float64), golden.gauss(*golden.TINY_IMAGE).double()
    with torch.no_grad():
        check_outputs(check, "tiny_float64", "eval", run(model, image, "eval"))
    found = run(model, image, "train")
    check_outputs(check, "tiny_float64", "train", found)
    losses, total = losses_of(model.config, found.outputs, golden.targets("tiny"), "train")
    stored = golden.scalars("tiny_float64")["train_losses_ia_bce"]
    # The reference rounds the percentage to float32.
    rounded = {name: value.float() if name == "class_error" else value for name, value in losses.items()}
    check.values("tiny_float64.json", "train_losses_ia_bce", "losses", rounded, stored)
    check("tiny_float64.json", "train_total_ia_bce", "losses", total)
    total.backward()
    check_gradients(check, "tiny_float64.json", "", model, "tiny_float64")
    return check


# Cases of full size


def full_eval(name: str) -> Check:
    """A published architecture at its resolution."""
    case, section = f"full_{name}_eval", golden.scalars("full")[name]
    check, model = Check(), golden.build(variant=name.replace("_", "-"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    check("full.json", f"{name}/num_parameters", "equal", parameters)
    check("full.json", f"{name}/weights_sha256", "equal", weights_sha256(model))
    with torch.no_grad():
        found = run(model, golden.gauss(section["image_seed"], tuple(section["image_shape"])), "eval")
    check_outputs(check, case, "eval", found)
    check_postprocessing(check, case, model.config.num_select)
    for tap, stored in section["stats"].items():
        x = found.taps[tap].double()
        stats = {"shape": list(x.shape), "mean": x.mean(), "std": x.std(), "abs_sum": x.abs().sum()}
        for part, kind in (("shape", "equal"), ("mean", "features"), ("std", "sums"), ("abs_sum", "sums")):
            check.values("full.json", f"{name}/stats", kind, stats[part], stored[part])
    return check


def weights_sha256(model: RFDETR) -> str:
    """SHA-256 over the floating-point entries of a state dict, in the order of their keys."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if value.is_floating_point():
            digest.update(key.encode())
            digest.update(value.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def full_nano_padded() -> Check:
    """Two images of different sizes; some scores of neighbours are 3e-6 apart."""
    check, file = Check(), "full_nano_padded_eval.npz"
    images = [golden.gauss(601, (3, 384, 288)), golden.gauss(602, (3, 300, 384))]
    with torch.no_grad(), order_of_the_reference(check, file, "eval.topk_indices"):
        outputs = golden.build(variant="nano").eval()(images)
    for kind, name in (("logits", "eval.pred_logits.every3rd"), ("boxes", "eval.pred_boxes")):
        check(file, name, kind, thinned(outputs[f"pred_{kind}"], name))
    return check


def nano60_train() -> Check:
    """A training step of nano at its resolution, 13 groups of 60 queries."""
    check, case = Check(), "nano60_train"
    model, targets = golden.build(variant="nano", num_queries=60, num_select=60), golden.targets(case)
    found = run(model, golden.gauss(437, (2, 3, 384, 384)), "train")
    check_outputs(check, case, "train", found)
    check_matches(check, case, found, targets, groups=13)
    losses, total = losses_of(model.config, found.outputs, targets, "train")
    check(f"{case}.json", "losses", "losses", losses)
    check(f"{case}.json", "total", "losses", total)
    check(f"{case}.json", "weight_dict", "equal", Criterion(model.config).weight_dict)
    total.backward()
    check_gradients(check, f"{case}.json", "", model, case)
    return check


def full_nano_train() -> Check:
    """A training step of nano as it is, 13 groups of 300 queries; some scores of neighbours are 7e-7 apart."""
    check, case, section = Check(), "full_nano_train", golden.scalars("full")["nano_train"]
    model, targets = golden.build(variant="nano"), golden.targets(case)
    with order_of_the_reference(check, f"{case}.npz", "train.topk_indices"):
        found = run(model, golden.gauss(section["image_seed"], tuple(section["image_shape"])), "train")
    check_outputs(check, case, "train", found, indices=False)
    check_matches(check, case, found, targets, groups=13)
    losses, total = losses_of(model.config, found.outputs, targets, "train")
    check("full.json", "nano_train/losses", "losses", losses)
    check("full.json", "nano_train/total", "losses", total)
    check("full.json", "nano_train/weight_dict", "equal", Criterion(model.config).weight_dict)
    total.backward()
    check_gradients(check, "full.json", "nano_train/", model, case)
    return check


@contextmanager
def order_of_the_reference(check: Check, file: str, entry: str) -> Iterator[None]:
    """Take the stored tokens in the two-stage selection, if their scores are our best but for rounding.

    Which of two neighbours comes first decides which query starts from which token, and moves boxes by 0.4 and losses
    by 1e-3. The only call of Tensor.topk is the selection's.
    """
    select, calls = Tensor.topk, []

    def topk(scores: Tensor, k: int, dim: int = -1) -> Any:
        order = torch.from_numpy(golden.arrays(file.removesuffix(".npz"))[entry]).long().view(-1, scores.shape[1], k)
        values = scores.gather(dim, order)  # (G, B, k)
        check.values(file, entry, "order", values, select(scores, k, dim).values)
        calls.append(k)
        return torch.return_types.topk((values, order))

    with mock.patch.object(Tensor, "topk", topk):
        yield
    assert len(calls) == 1, "the selection no longer runs through one Tensor.topk"


SMALL = {name: functools.partial(small_case, name) for name in (*TINY_IMAGES, *golden.VARIANTS)}
CASES = {**SMALL, "tiny_targets": tiny_targets, "tiny_float64": tiny_float64}
LONG_CASES = {f"full_{name}_eval": functools.partial(full_eval, name) for name in FULL} | {
    "full_nano_padded": full_nano_padded,
    "nano60_train": nano60_train,
    "full_nano_train": full_nano_train,
}
