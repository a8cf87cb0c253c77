"""The reference cases of single components, of the weights' formula, and of tables (units.*, state_dict/*)."""

from __future__ import annotations

import functools
import math
import warnings
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.scales import training_scales
from rfdetr_core.data.transforms import normalise
from rfdetr_core.models.boxes import cxcywh_to_xyxy, iou_and_giou
from rfdetr_core.models.decoder import Memory, sine_embedding
from rfdetr_core.models.deformable_attention import DeformableAttention
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.postprocess import postprocess
from rfdetr_core.models.projector import Projector
from rfdetr_core.models.transformer import anchors
from rfdetr_core.models.vit import Embeddings, WindowedViT
from rfdetr_core.models.weights import resize_class_rows, resize_positions, slice_queries
from rfdetr_core.training.criterion import Criterion
from rfdetr_core.training.ema import ModelEMA
from rfdetr_core.training.matcher import assignment_costs, match, pack_targets, pair_costs
from rfdetr_core.training.optimizer import learning_rate_and_decay
from tests.models import golden
from tests.models.golden_check import FLOAT32, Check
from tests.models.golden_models import FULL, LOSSES

ARRAYS, SCALARS = "units.npz", "units.json"
TOLERANCES = {**FLOAT32, "features": 2e-5, "gradients": 1e-5, "boxes": 1e-6, "pixels": 1e-3, "losses": 1e-5}
"""Few operations lie between input and output."""

BREAKAGE: dict[str, list[tuple[str, Any, float]]] = {
    "plain": [],
    "nan_box": [("pred_boxes", (0, 2), torch.nan), ("pred_boxes", (2, 5), torch.inf)],
    "nan_logit": [("pred_logits", (0, 3, 0), torch.nan), ("pred_logits", (2, 7, 3), torch.nan)],
    "all_nan": [("pred_boxes", slice(None), torch.nan)],
}
"""How the predictions of the matcher's cases are broken: part, place, value."""


def unit(name: str) -> Tensor:
    """An array of units.npz."""
    return torch.from_numpy(golden.arrays("units")[name]).clone()


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in module.state_dict().items()}


# Parts of the model


def deformable_attention() -> Check:
    check, shapes = Check(TOLERANCES), [(6, 5), (3, 4)]
    attention = DeformableAttention(32, heads=4, levels=2, points=3)
    golden.fill_w1(attention, "unit.msdeform.")
    for case, mask in (("ref4", None), ("ref4_mask", unit("msdeform.mask")), ("ref2", None)):
        query, memory, references = (
            unit(f"msdeform.{name}").requires_grad_() for name in ("query", "value_input", case[:4])
        )
        out = attention(query, references, memory, shapes, mask)
        check(ARRAYS, f"msdeform.{case}.out", "features", out)
        out.backward(unit("msdeform.cotangent"))
        for name, tensor in (("query", query), ("ref", references), ("value_input", memory)):
            check(ARRAYS, f"msdeform.{case}.grad_{name}", "gradients", tensor.grad)
    for width, heads, levels, points in ((256, 16, 1, 2), (384, 24, 2, 4)):
        bias = DeformableAttention(width, heads=heads, levels=levels, points=points).sampling_offsets.bias
        check(ARRAYS, f"msdeform.init_offsets_bias_{width}_{heads}h_{levels}l_{points}p", "features", bias)
    return check


@torch.no_grad()
def projector(case: str) -> Check:
    check, spec = Check(TOLERANCES), golden.scalars("units")[f"projector.{case}"]
    module = Projector(
        spec["in_channels"], spec["out_channels"], spec["scale_factors"], layer_norm=spec["layer_norm"]
    ).eval()
    check(SCALARS, f"projector.{case}/keys", "equal", shapes_of(module))
    golden.fill_w1(module, f"unit.projector.{case}.")
    maps = [golden.gauss(seed, tuple(spec["input_shape"])).permute(0, 2, 3, 1) for seed in spec["input_seeds"]]
    for i, out in enumerate(module(maps)):
        check(ARRAYS, f"projector.{case}.out{i}", "features", out.permute(0, 3, 1, 2))
    return check


@torch.no_grad()
def encoder(case: str) -> Check:
    check, spec = Check(TOLERANCES), golden.scalars("units")[f"backbone.{case}"]
    vit = WindowedViT(
        width=spec["hidden"],
        depth=spec["layers"],
        heads=spec["heads"],
        patch_size=spec["patch"],
        num_windows=spec["num_windows"],
        table_side=spec["image_size"] // spec["patch"],
        outputs_after_blocks=spec["outputs_after_blocks"],
        windowed_blocks=spec["window_blocks"],
        registers=spec["registers"],
    )
    check(SCALARS, f"backbone.{case}/keys", "equal", shapes_of(vit))
    golden.fill_w1(vit, spec["weight_prefix"])
    for image, seed, batch, grid in (("sq", 20, 2, (8, 8)), ("rect16x40", 21, 1, (4, 10))):
        maps = vit(golden.gauss(seed, (batch, 3, 4 * grid[0], 4 * grid[1])), grid)
        for i, out in enumerate(maps):
            check(ARRAYS, f"backbone.{case}.{image}.stage{i}", "features", out.permute(0, 3, 1, 2))
    return check


def sine_embeddings() -> Check:
    check = Check(TOLERANCES)
    for per_coordinate in (8, 128):
        embedded = sine_embedding(unit("sine.pos4"), 2 * per_coordinate)
        check(ARRAYS, f"sine.embed4_dim{per_coordinate}", "features", embedded)
    check(ARRAYS, "sine.embed2_dim8", "features", sine_embedding(unit("sine.pos4")[..., :2], 16))
    return check


def memory_of(tokens: Tensor, shapes: list[tuple[int, int]], mask: Tensor | None) -> Memory:
    """Tokens of levels of these shapes, some of them padding."""
    return Memory(tokens, shapes, mask, None)


def proposals() -> Check:
    check, tokens = Check(TOLERANCES), unit("proposals.memory_in")
    boxes, usable = anchors(memory_of(tokens, [(4, 6), (2, 3)], unit("proposals.mask")))
    for flag, bbox_reparam in enumerate((True, False)):
        # The reference's flag says that boxes are kept as logits.
        with torch.device("meta"):
            transformer = RFDETR(ModelConfig(variant="pico", bbox_reparam=bbox_reparam)).transformer
        name = f"proposals.unsigmoid{flag}"
        check(ARRAYS, f"{name}.boxes", "boxes", transformer._proposals(boxes, usable), 1e-5 if flag else None)
        check(ARRAYS, f"{name}.memory", "equal", tokens.masked_fill(~usable[..., None], 0.0))
    _, usable = anchors(memory_of(torch.zeros(1, 6400, 1), [(80, 80)], None))
    check(ARRAYS, "proposals.80x80.valid", "equal", usable.view(80, 80).to(torch.uint8))
    return check


@torch.no_grad()
def positional_tables() -> Check:
    check, table = Check(TOLERANCES), unit("pe.in_5x5")
    embeddings = Embeddings(channels=3, width=6, patch_size=4, num_windows=1, table_side=5, registers=0)
    embeddings.position_embeddings.copy_(table)
    for side in (3, 7, 8):
        for resized in (embeddings.positions((side, side)), resize_positions(table, side)):
            check(ARRAYS, f"pe.out_{side}x{side}", "features", resized)
    return check


def weight_files() -> Check:
    """Query tables and class heads of another size."""
    check = Check(TOLERANCES)
    for held, wanted in (((4, 3), (4, 3)), ((4, 3), (2, 3)), ((4, 3), (4, 2)), ((4, 3), (3, 1)), ((4, 3), (6, 2))):
        name = "slice.ckpt{}x{}_to_{}x{}.rows".format(*held, *wanted)
        rows = torch.arange(math.prod(held), dtype=torch.float32)[:, None]
        check(ARRAYS, name, "equal", slice_queries(rows, held, wanted)[:, 0])
    for count in (3, 8, 12):
        for part, step in (("weight", 1.0), ("bias", 10.0)):
            check(ARRAYS, f"head.5_to_{count}.{part}", "equal", resize_class_rows(torch.arange(5) * step, count))
    return check


def boxes() -> Check:
    check = Check(TOLERANCES)
    one, other = unit("box.a_cxcywh"), unit("box.b_cxcywh")
    iou, giou = iou_and_giou(cxcywh_to_xyxy(one)[:, None], cxcywh_to_xyxy(other))
    check(ARRAYS, "box.a_xyxy", "boxes", cxcywh_to_xyxy(one))
    check(ARRAYS, "box.iou", "boxes", iou)
    check(ARRAYS, "box.giou", "boxes", giou)
    # Equal logits cost each pair the same, and what is left beside the GIoU is 5 x L1.
    cost = pair_costs(torch.zeros(len(one), len(other)), one[:, None], other)
    class_cost = 2.0 * (0.25 - 0.75) * 0.25 * math.log(2.0)
    check(ARRAYS, "box.l1", "boxes", (cost - class_cost + 2.0 * giou) / 5.0)
    return check


def postprocessing() -> Check:
    check = Check(TOLERANCES)
    inputs = [unit(f"post.{name}") for name in ("logits", "boxes", "target_sizes")]
    for num_select in (15, 300):
        for i, detections in enumerate(postprocess(*inputs, num_select)):
            for part, kind in (("scores", "scores"), ("labels", "equal"), ("boxes", "pixels")):
                check(ARRAYS, f"post.n{num_select}.img{i}.{part}", kind, detections[part])
    return check


def preprocessing() -> Check:
    """The reference resizes without antialias. We chose to antialias (spec, section 12), so that step is made here."""
    check = Check(TOLERANCES)
    pixels = unit("pre.image_hwc_uint8").permute(2, 0, 1)[None]
    for height, width in ((64, 64), (32, 32), (20, 48)):
        resized = F.interpolate(pixels / 255.0, size=(height, width), mode="bilinear", align_corners=False)
        check(ARRAYS, f"pre.resized_{height}x{width}", "features", resized[0])
        # Ours takes 0..255; the mean and the standard deviation are the same.
        normalised = normalise(resized * 255.0)[0]
        check(ARRAYS, f"pre.normalized_{height}x{width}", "features", normalised)
    return check


# Training


def matcher_case(name: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Predictions, broken in the way of that name, and targets."""
    outputs = {f"pred_{part}": unit(f"matcher.{part}") for part in ("logits", "boxes")}
    for part, where, value in BREAKAGE[name]:
        outputs[part][where] = value
    return outputs, golden.targets("units", 3, "matcher.")


def matcher(name: str) -> Check:
    check = Check({**TOLERANCES, "features": 1e-5})
    outputs, targets = matcher_case(name)
    logits, predicted = outputs["pred_logits"], outputs["pred_boxes"]
    with warnings.catch_warnings():
        if BREAKAGE[name]:
            warnings.filterwarnings("ignore", "predictions are not finite", RuntimeWarning)
        costs = assignment_costs(logits, predicted, pack_targets(targets, predicted), [logits.shape[1]])
        check(ARRAYS, f"matcher.{name}.cost", "features", costs.T)
        for groups in (1, 3):
            for i, pairs in enumerate(match(outputs, targets, groups)):
                for part, rows in zip(("query", "target"), pairs, strict=True):
                    check(ARRAYS, f"matcher.{name}.g{groups}.img{i}.{part}", "equal", rows)
    return check


def criterion_outputs() -> dict[str, Any]:
    """Given outputs of three layers, to differentiate by."""

    def layer(name: str) -> dict[str, Tensor]:
        return {f"pred_{part}": unit(f"criterion.{name}.{part}").requires_grad_() for part in ("logits", "boxes")}

    return {**layer("final"), "aux_outputs": [layer("aux0")], "enc_outputs": layer("enc")}


def criterion_for(loss: str, **flags: bool) -> Criterion:
    """The criterion for those outputs, by the name of the loss in `LOSSES`."""
    return Criterion(ModelConfig(num_classes=5, dec_layers=2, group_detr=3, **LOSSES[loss], **flags))


def criterion(loss: str) -> Check:
    check, targets = Check(TOLERANCES), golden.targets("units", 2, "criterion.")
    for groups, flags in (("avg", {}), ("sumgroups", {"sum_group_losses": True})):
        for mode in ("train", "eval"):
            losses = criterion_for(loss, **flags).train(mode == "train")(criterion_outputs(), targets)
            check(SCALARS, f"criterion/{loss}.{mode}.{groups}", "losses", losses)
    given = criterion_for(loss)(criterion_outputs(), targets, num_boxes=1.0)
    check(SCALARS, f"criterion/{loss}.train.num_boxes_1", "losses", given)
    outputs = criterion_outputs()
    losses = criterion_for(loss)(outputs, targets)
    sum(losses[name] for name in ("loss_ce", "loss_bbox", "loss_giou")).backward()  # unweighted, as stored
    for part in ("logits", "boxes"):
        check(ARRAYS, f"criterion.{loss}.grad_{part}_final", "gradients", outputs[f"pred_{part}"].grad)
    return check


def training_tables() -> Check:
    """Sizes of the images, decay of the average, learning rate and weight decay of every parameter."""
    check, tables = Check({**TOLERANCES, "sums": 1e-6}), golden.scalars("units")
    for name, stored in tables["multi_scale"].items():
        model = ModelConfig(variant=name)
        for part, expanded in (("expanded", True), ("plain", False)):
            sides = training_scales(model.resolution, model.block, multi_scale=True, expanded=expanded)
            check.values(SCALARS, f"multi_scale/{name}", "equal", sides, stored[part])
    ema = ModelEMA(nn.Linear(1, 1), decay=0.993, tau=100)
    # Ours copies at the first update, where the reference's decay of 0.01 forgets the initial weights almost wholly.
    later = [index for index in tables["ema_decay_update_index_zero_based"] if index]
    decays = [ema.effective_decay(index + 1) for index in later]
    check.values(SCALARS, "ema_decay_first_updates", "sums", decays, tables["ema_decay_first_updates"][1:])
    for name in ("nano", "base"):
        model, stored = ModelConfig(variant=name), tables[f"param_groups_{name}"]
        with torch.device("meta"):
            parameters = [key for key, _ in RFDETR(model).named_parameters()]
        found = {key: learning_rate_and_decay(key, model, TrainConfig()) for key in parameters}
        for key, settings in stored.items():  # relative, as numbers above 1
            rates = [setting * 1e6 for setting in found.get(key, ())]
            check.values(SCALARS, f"param_groups_{name}/{key}", "sums", rates, [setting * 1e6 for setting in settings])
    return check


# State dicts


def state_dict(name: str) -> Check:
    """Names, shapes and types of a published architecture."""
    check = Check()
    with torch.device("meta"):
        state = RFDETR(ModelConfig(variant=name.replace("_", "-"))).state_dict()
    for key in golden.scalars(f"state_dict/state_dict_{name}"):
        found = state.pop(key, None)
        made = {} if found is None else {"shape": list(found.shape), "dtype": str(found.dtype).removeprefix("torch.")}
        check(f"state_dict/state_dict_{name}.json", key, "equal", made)
    assert not state, f"not in the reference: {list(state)}"
    return check


def weight_formula() -> Check:
    """The formula of all reference weights."""
    check, file = Check(), "weight_check_nano.json"
    for key, stored in golden.scalars("weight_check_nano").items():
        weights = golden.w1.__wrapped__(key, tuple(stored["shape"])).double().flatten()
        check.values(file, key, "equal", zlib.crc32(key.encode()), stored["crc32"])
        check.values(file, key, "equal", weights[:3], stored["first"])
        check.values(file, key, "sums", [weights.sum(), weights.abs().sum()], [stored["sum"], stored["abs_sum"]], 1e-9)
    return check


CASES = {
    "deformable_attention": deformable_attention,
    **{f"projector.{case}": functools.partial(projector, case) for case in ("p3p4p5", "x4_and_pool", "bn")},
    **{f"encoder.{case}": functools.partial(encoder, case) for case in ("reg3_w2", "reg0_w2", "reg3_w1")},
    "sine_embeddings": sine_embeddings,
    "proposals": proposals,
    "positional_tables": positional_tables,
    "weight_files": weight_files,
    "boxes": boxes,
    "postprocessing": postprocessing,
    "preprocessing": preprocessing,
    **{f"matcher.{name}": functools.partial(matcher, name) for name in BREAKAGE},
    **{f"criterion.{loss}": functools.partial(criterion, loss) for loss in LOSSES if loss != "ia_bce_sumgroups"},
    "training_tables": training_tables,
    **{f"state_dict.{name}": functools.partial(state_dict, name) for name in FULL},
    "weight_formula": weight_formula,
}
