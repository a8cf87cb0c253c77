"""Learning rate and weight decay of every parameter, against the reference table and the training spec."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.training.engine import build_engine
from rfdetr_core.training.optimizer import build_optimizer, learning_rate_and_decay, parameter_groups
from tests.models import golden
from tests.training import tiny


def settings_of(module: RFDETR, train: TrainConfig) -> dict[str, tuple[float, float]]:
    """(lr, weight decay) of every parameter that is in a group, by name."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in parameter_groups(module, module.config, train):
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = (group["lr"], group["weight_decay"])
    return found


@pytest.mark.parametrize("variant", ["nano", "base"])
def test_every_parameter_has_the_rate_and_decay_of_the_reference(variant: str) -> None:
    found = settings_of(RFDETR(ModelConfig(variant=variant)), TrainConfig())
    expected = golden.scalars("units")[f"param_groups_{variant}"]
    assert found.keys() == expected.keys()
    wrong = {
        name: (found[name], values)
        for name, values in expected.items()
        if found[name] != pytest.approx(tuple(values), rel=1e-9)
    }
    assert not wrong


def test_equal_settings_share_a_group() -> None:
    module = RFDETR(ModelConfig(variant="nano"))
    groups = parameter_groups(module, module.config, TrainConfig())
    sizes = Counter((len(g["params"]), float(f"{g['lr']:.4e}"), g["weight_decay"]) for g in groups)
    assert len(groups) == 28
    assert sizes[192, 1e-4, 1e-4] == sizes[50, 7e-5, 1e-4] == sizes[5, 3.2326e-6, 0.0] == sizes[2, 7.35e-5, 0.0] == 1
    assert sizes[10, 4.0407e-6, 0.0] == sizes[8, 4.0407e-6, 1e-4] == sizes[10, 4.704e-5, 0.0] == 1


@pytest.mark.parameter("lr", "lr_encoder")
def test_lr_moves_heads_and_decoder_and_lr_encoder_the_encoder() -> None:
    model = ModelConfig(variant="nano")

    def rate(name: str, **train: float) -> float:
        return learning_rate_and_decay(name, model, TrainConfig(**train))[0]

    head, block = "class_embed.weight", "backbone.0.encoder.encoder.encoder.layer.11.norm1.weight"
    decoder = "transformer.decoder.layers.0.linear1.weight"
    embeddings = "backbone.0.encoder.encoder.embeddings.cls_token"
    final_norm = "backbone.0.encoder.encoder.layernorm.weight"
    assert rate(head, lr=2e-4) == pytest.approx(2e-4)
    assert rate(decoder, lr=2e-4) == pytest.approx(1.4e-4)
    assert rate(block, lr=2e-4) == rate(block)
    assert rate(block, lr_encoder=3e-4) == pytest.approx(9.408e-5)
    assert rate(embeddings, lr_encoder=3e-4) == pytest.approx(3e-4 * 0.8**14 * 0.49)
    assert rate(final_norm, lr_encoder=3e-4) == pytest.approx(1.47e-4)
    assert rate(head, lr_encoder=3e-4) == rate(head)
    assert rate(decoder, lr_component_decay=0.5) == pytest.approx(5e-5)
    assert rate(block, lr_vit_layer_decay=0.5) == pytest.approx(1.5e-4 * 0.25 * 0.49)


def test_a_frozen_encoder_is_left_out() -> None:
    names = settings_of(RFDETR(tiny.model_config(freeze_encoder=True)), tiny.train_config())
    assert names
    assert not [name for name in names if name.startswith("backbone.0.encoder.")]
    assert [name for name in names if name.startswith("backbone.0.projector.")]


@pytest.mark.parameter("lr_encoder")
def test_lr_encoder_zero_freezes_the_encoder() -> None:
    engine = build_engine(tiny.model_config(), tiny.train_config(lr_encoder=0))
    before = {name: value.clone() for name, value in engine.raw_model.state_dict().items()}
    engine.optimizer_step([tiny.batch(0)], factor=1.0, global_step=0)
    changed = {name for name, value in engine.raw_model.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in changed if name.startswith("backbone.0.encoder.")]
    assert "class_embed.weight" in changed
    assert [name for name in changed if name.startswith("backbone.0.projector.")]
    assert all(p.grad is None and not p.requires_grad for p in engine.raw_model.backbone[0].encoder.parameters())


@pytest.mark.parameter("weight_decay")
@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_weight_decay_alone_shrinks_what_has_it(decay: float) -> None:
    train = tiny.train_config(weight_decay=decay)
    module = RFDETR(tiny.model_config())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    optimizer = build_optimizer(module, module.config, train)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    after = {name: parameter.flatten()[0].item() for name, parameter in module.named_parameters()}
    assert after["transformer.decoder.layers.0.linear1.weight"] == pytest.approx(1 - 7e-5 * decay, abs=1e-7)
    assert after["transformer.decoder.layers.0.norm1.bias"] == pytest.approx(1 - 7e-5 * decay, abs=1e-7)
    assert after["class_embed.bias"] == pytest.approx(1 - 1e-4 * decay, abs=1e-7)
    assert after["backbone.0.encoder.encoder.encoder.layer.0.norm1.weight"] == 1.0
    assert after["backbone.0.encoder.encoder.encoder.layer.0.mlp.fc1.bias"] == 1.0
    assert after["backbone.0.encoder.encoder.embeddings.cls_token"] == 1.0
    if decay == 0.0:
        assert set(after.values()) == {1.0}
    else:
        assert after["transformer.decoder.layers.0.linear1.weight"] < 1.0


def test_adamw_is_the_published_one() -> None:
    optimizer = build_optimizer(RFDETR(tiny.model_config()), tiny.model_config(), tiny.train_config())
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["eps"] == 1e-8
    assert not optimizer.defaults["amsgrad"]
