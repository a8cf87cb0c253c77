"""The detector's interface: state dict, initial values, padding, stochastic depth, memory savers, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

from rfdetr_core.config import ModelConfig
from rfdetr_core.errors import ConfigError
from rfdetr_core.models.detector import RFDETR, pad_images
from rfdetr_core.models.linear import constant_weights
from rfdetr_core.models.vit import drop_windows
from tests.models import golden

SMALL: dict[str, Any] = {**golden.TINY, "variant": "pico", "resolution": 64, "dec_layers": 2}


@pytest.mark.parametrize("variant", ["nano", "small", "medium", "base", "large", "large-deprecated"])
def test_state_dict_keys_and_shapes(variant: str) -> None:
    with torch.device("meta"):
        model = RFDETR(ModelConfig(variant=variant))
    expected = golden.scalars(f"state_dict/state_dict_{variant.replace('-', '_')}")
    found = {
        key: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for key, value in model.state_dict().items()
    }
    assert found == expected


def test_refined_references_name_the_box_head_twice() -> None:
    model = RFDETR(ModelConfig(**SMALL, lite_refpoint_refine=False))
    state = model.state_dict()
    for i in range(3):
        alias = state[f"transformer.decoder.bbox_embed.layers.{i}.weight"]
        assert alias.data_ptr() == state[f"bbox_embed.layers.{i}.weight"].data_ptr()


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = RFDETR(ModelConfig(**SMALL))
    state = model.state_dict()
    assert_allclose(state["class_embed.bias"], -math.log(99.0), rtol=1e-6)
    assert not state["bbox_embed.layers.2.weight"].any()
    assert not state["refpoint_embed.weight"].any()
    assert state["query_feat.weight"].std().item() == pytest.approx(1.0, abs=0.05)
    for group in range(3):
        for part in ("weight", "bias"):
            assert torch.equal(state[f"transformer.enc_out_class_embed.{group}.{part}"], state[f"class_embed.{part}"])
            key = f"layers.0.{part}"
            assert torch.equal(state[f"transformer.enc_out_bbox_embed.{group}.{key}"], state[f"bbox_embed.{key}"])
    first, second = (f"transformer.decoder.layers.{i}." for i in range(2))
    assert torch.equal(state[first + "linear1.bias"], state[second + "linear1.bias"])
    assert not torch.equal(state[first + "linear1.weight"], state[second + "linear1.weight"])
    bound = math.sqrt(6.0 / (128 + 1024))  # Xavier-uniform
    assert state[first + "linear1.weight"].abs().max().item() == pytest.approx(bound, rel=1e-2)
    assert state[first + "cross_attn.sampling_offsets.bias"].any()
    assert not state[first + "cross_attn.sampling_offsets.weight"].any()
    vit = "backbone.0.encoder.encoder."
    assert (state[vit + "encoder.layer.0.layer_scale1.lambda1"] == 1.0).all()
    outputs = model.eval()(torch.zeros(1, 3, 64, 64))
    assert outputs["pred_logits"].sigmoid().mean().item() == pytest.approx(0.01, abs=0.02)


@pytest.mark.parametrize(("variant", "weight_std", "position_std"), [("nano", 0.02, 0.02), ("pico", 0.06, 0.3)])
def test_initial_spread_of_the_encoder(variant: str, weight_std: float, position_std: float) -> None:
    """Spec 2.5 for the published sizes; pico's is its own."""
    torch.manual_seed(0)
    state = RFDETR(ModelConfig.parse({"variant": variant, "num_queries": 4, "group_detr": 1})).state_dict()
    vit = "backbone.0.encoder.encoder."
    assert state[vit + "encoder.layer.0.mlp.fc1.weight"].std().item() == pytest.approx(weight_std, rel=0.05)
    assert state[vit + "embeddings.patch_embeddings.projection.weight"].std().item() == pytest.approx(
        weight_std, rel=0.05
    )
    assert not state[vit + "encoder.layer.0.mlp.fc1.bias"].any()
    assert state[vit + "embeddings.position_embeddings"].std().item() == pytest.approx(position_std, rel=0.1)


def test_auxiliary_outputs_only_when_asked() -> None:
    model, images = RFDETR(ModelConfig(**SMALL)), torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        plain, full = model.eval()(images), model(images, with_aux=True)
        training, bare = model.train()(images), model(images, with_aux=False)
    assert plain.keys() == bare.keys() == {"pred_logits", "pred_boxes"}
    assert full.keys() == training.keys() == {"pred_logits", "pred_boxes", "aux_outputs", "enc_outputs"}
    assert_allclose(plain["pred_boxes"], full["pred_boxes"], rtol=0, atol=1e-6)
    assert training["pred_logits"].shape == (1, 3 * 20, 8)
    assert [len(layers["aux_outputs"]) for layers in (full, training)] == [1, 1]


def test_padding_of_a_list() -> None:
    images = [torch.ones(3, 4, 6), torch.ones(3, 8, 2)]
    batch, mask = pad_images(images)
    assert mask is not None
    assert batch.shape == (2, 3, 8, 6)
    assert torch.equal(batch[:, 0] == 0.0, mask)
    assert mask[0, 4:].all() and not mask[0, :4].any()
    assert pad_images([images[0], images[0]])[1] is None


def test_a_list_and_a_mask_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="own padding mask"):
        RFDETR(ModelConfig(**SMALL))([torch.zeros(3, 64, 64)], torch.zeros(1, 64, 64, dtype=torch.bool))


def test_what_is_padded_does_not_matter_to_the_decoder() -> None:
    """Masked memory tokens are neither proposed nor read, whatever they hold."""
    model = RFDETR(ModelConfig(**SMALL)).eval()
    golden.fill_w1(model)
    _, mask = pad_images([torch.zeros(3, 64, 32), torch.zeros(3, 64, 64)])
    noise = torch.zeros(2, 8, 8, 128)
    noise[0, :, 4:] = 100.0

    def outputs(add: torch.Tensor) -> torch.Tensor:
        projector = model.backbone[0].projector
        handle = projector.register_forward_hook(lambda _m, _i, maps: [maps[0] + add])
        with torch.no_grad():
            result: torch.Tensor = model(golden.gauss(1, (2, 3, 64, 64)), mask)["pred_boxes"]
        handle.remove()
        return result

    assert_allclose(outputs(noise), outputs(torch.zeros(())), rtol=0, atol=1e-6)


def test_image_sizes_must_fit_patches_and_windows() -> None:
    with pytest.raises(ConfigError, match="72x64 is not a multiple of 16"):
        RFDETR(ModelConfig(**SMALL))(torch.zeros(1, 3, 72, 64))


def test_stochastic_depth_drops_whole_windows() -> None:
    torch.manual_seed(0)
    dropped = drop_windows(torch.ones(4000, 3, 2), 0.25)
    per_window = dropped[:, 0, 0]
    assert torch.equal(dropped, per_window[:, None, None].expand_as(dropped))
    assert per_window.unique().tolist() == pytest.approx([0.0, 4.0 / 3.0])
    assert (per_window == 0.0).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parameter("drop_path")
def test_stochastic_depth_rises_linearly_and_rests_in_evaluation() -> None:
    model, images = RFDETR(ModelConfig(**SMALL), drop_path=0.5), golden.gauss(1, (2, 3, 64, 64))
    vit = model.backbone[0].encoder.encoder
    assert [block.drop_path for block in vit.encoder.layer] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    with torch.no_grad():
        still = [vit.eval()(images, (8, 8))[3] for _ in range(2)]
        moving = [vit.train()(images, (8, 8))[3] for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(*moving)


@pytest.mark.parameter("gradient_checkpointing")
def test_checkpointing_changes_memory_only() -> None:
    gradients, recomputed = [], []
    for checkpointing in (False, True):
        model = RFDETR(ModelConfig(**SMALL, gradient_checkpointing=checkpointing)).train()
        golden.fill_w1(model)
        calls: list[int] = []
        block = model.backbone[0].encoder.encoder.encoder.layer[2]
        block.norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        outputs = model(golden.gauss(1, (1, 3, 64, 64)))
        (outputs["pred_logits"].sum() + outputs["pred_boxes"].sum()).backward()
        gradients.append(model.backbone[0].encoder.encoder.embeddings.cls_token.grad)
        recomputed.append(len(calls))
    assert recomputed == [1, 2]
    assert_allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_a_frozen_encoder_gets_no_gradient() -> None:
    model = RFDETR(ModelConfig(**SMALL, freeze_encoder=True)).train()
    model(golden.gauss(1, (1, 3, 64, 64)))["pred_logits"].sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any(name.startswith("backbone.0.encoder.") for name in with_gradient)
    assert any(name.startswith("backbone.0.projector.") for name in with_gradient)


def test_what_is_kept_of_constant_weights_changes_nothing() -> None:
    """Evaluation of two sizes in turn, with and without the promise; the positional table is of a third."""
    model = RFDETR(ModelConfig(**SMALL)).eval()
    golden.fill_w1(model)
    for with_aux in (False, True):
        sizes = [golden.gauss(1, (2, 3, 48, 80)), golden.gauss(2, (1, 3, 80, 48))]
        with torch.no_grad():
            plain = [model(images, with_aux=with_aux) for images in sizes]
            with constant_weights(model):
                kept = [model(images, with_aux=with_aux) for images in [*sizes, *sizes]][2:]
        graded = [model(images, with_aux=with_aux) for images in sizes]
        for others in (kept, graded):
            for a, b in zip(plain, others, strict=True):
                assert a.keys() == b.keys()
                for part in ("pred_boxes", "pred_logits"):
                    assert_allclose(a[part], b[part].detach(), rtol=0, atol=2e-5)
                if with_aux:
                    for part, values in a["enc_outputs"].items():
                        assert_allclose(values, b["enc_outputs"][part].detach(), rtol=0, atol=2e-5)


def test_a_frozen_encoder_keeps_its_packed_weights_in_training() -> None:
    model, images = RFDETR(ModelConfig(**SMALL, freeze_encoder=True)).train(), golden.gauss(1, (1, 3, 64, 64))
    golden.fill_w1(model)
    model(images)["pred_logits"].sum().backward()
    layer = model.backbone[0].encoder.encoder.encoder.layer[0].mlp.fc1
    first = layer.kept._value
    assert first is not None
    found = model(images)["pred_logits"]
    assert layer.kept._value is first
    learning = RFDETR(ModelConfig(**SMALL)).train()
    learning.load_state_dict(model.state_dict())
    assert_allclose(found.detach(), learning(images)["pred_logits"].detach(), rtol=0, atol=2e-5)
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    assert not torch.allclose(model(images)["pred_logits"], found)


def test_blocks_behind_the_last_feature_are_not_computed() -> None:
    model = RFDETR(ModelConfig(**{**SMALL, "out_feature_indexes": (1, 3, 5)})).train()
    model(golden.gauss(1, (1, 3, 64, 64)))["pred_logits"].sum().backward()
    blocks = model.backbone[0].encoder.encoder.encoder.layer
    assert blocks[4].mlp.fc1.weight.grad is not None
    assert blocks[5].mlp.fc1.weight.grad is None


@pytest.mark.parametrize(
    ("field", "value"), [("segmentation_head", True), ("backbone_lora", True), ("num_decoder_registers", 2)]
)
def test_what_is_not_built_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"model.{field}: {value} is not built yet"):
        RFDETR(ModelConfig(**SMALL).model_copy(update={field: value}))
