"""Parameters of the seed document, seen from outside: what a call of `train` with this value does, and without it not.

The list of all of them, and of the tests that prove them elsewhere, is `tests.parameters` (make parameters).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rfdetr_core import RFDETRPico
from rfdetr_core.config import ModelSection, TrainConfig
from rfdetr_core.config.table import SEED_MODEL, SEED_TRAIN
from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.data.loading import Batch
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import ConfigError
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.training import checkpoint, validation
from rfdetr_core.training.engine import Engine, build_engine
from rfdetr_core.training.loop import train
from tests import parameters
from tests.training import tiny
from tests.training.test_loop import Scores

ARCHITECTURE = {name: value for name, value in tiny.MODEL.items() if name not in ("variant", "num_classes")}
SETTINGS: dict[str, Any] = {**tiny.TRAIN, "epochs": 1, "batch_size": 2, "grad_accum_steps": 1}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.draw(tmp_path_factory.mktemp("drawn") / "coco")


class Steps:
    """Takes the place of the optimizer step: notes what it is called with, and changes nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.factors: list[float] = []
        self.images: list[list[int]] = []  # of each micro-batch, by step

        def step(engine: Engine, window: Sequence[Batch], *, factor: float, **_: Any) -> dict[str, Tensor]:
            self.factors.append(factor)
            self.images.append([len(batch.counts) for batch in window])
            return {"loss": torch.tensor(1.0)}

        monkeypatch.setattr(Engine, "optimizer_step", step)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ---- core ---------------------------------------------------------------------------------------------------------


@pytest.mark.parameter("epochs")
@pytest.mark.parametrize("epochs", [1, 3])
def test_epochs_are_passes_over_the_images(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    steps = Steps(monkeypatch)
    assert train(tiny.job(dataset, tmp_path, epochs=epochs, eval_interval=9)).epochs == epochs
    assert [(row["epoch"], row["step"]) for row in rows(tmp_path)] == [(0, 4), (1, 9), (2, 14)][:epochs]
    assert len(steps.factors) == 5 * epochs


@pytest.mark.parameter("output_dir")
@pytest.mark.parametrize(("given", "place"), [({}, "here/output"), ({"output_dir": "~/x/../y"}, "home/y")])
def test_everything_lands_in_output_dir_and_nowhere_else(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], place: str
) -> None:
    Steps(monkeypatch)
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    before = files(coco)
    RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, **SETTINGS, **given)
    found = files(tmp_path)
    assert {f"{place}/{name}" for name in ("checkpoint.pth", "metrics.csv", "report.html")} <= found
    assert {name for name in found if not name.startswith(f"{place}/")} == set()
    assert files(coco) == before


# ---- batch and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parameter("batch_size", "grad_accum_steps")
@pytest.mark.parametrize(("batch", "accum"), [(2, 3), (3, 1)])
def test_so_many_images_in_a_batch_and_batches_in_a_step(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, accum: int
) -> None:
    steps = Steps(monkeypatch)
    settings = {**SETTINGS, "batch_size": batch, "grad_accum_steps": accum}
    RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, output_dir=tmp_path, **settings)
    assert {tuple(step) for step in steps.images} == {(batch,) * accum}


@pytest.mark.parameter("gradient_checkpointing")
def test_checkpointing_computes_twice_and_the_same() -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        engine = build_engine(tiny.model_config(gradient_checkpointing=checkpointing), tiny.train_config())
        calls: list[int] = []
        block = engine.raw_model.backbone[0].encoder.encoder.encoder.layer[1]
        block.norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        gradients: dict[str, Tensor] = {}

        def read(*_: Any, engine: Engine = engine, gradients: dict[str, Tensor] = gradients) -> None:
            named = engine.raw_model.named_parameters()
            gradients.update({name: value.grad.clone() for name, value in named if value.grad is not None})

        engine.optimizer.optimizer.register_step_pre_hook(read)
        terms = engine.optimizer_step([tiny.batch(0)], factor=0.0, global_step=0)
        assert terms is not None
        assert len(calls) == 1 + checkpointing
        found.append({"loss": terms["loss"], **gradients})
    assert len(found[0]) > 50
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parameter("gradient_checkpointing")
def test_checkpointing_is_said_to_the_constructor(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Steps(monkeypatch)
    model = RFDETRPico(gradient_checkpointing=True, **ARCHITECTURE)
    model.train(dataset_dir=coco, output_dir=tmp_path / "out", **SETTINGS)
    assert model._trained is not None
    assert model._trained.module.backbone[0].encoder.encoder.gradient_checkpointing
    with pytest.raises(ConfigError, match=r"architecture \(RFDETRPico\(gradient_checkpointing=…\)\)"):
        RFDETRPico().train(dataset_dir=coco, output_dir=tmp_path / "no", gradient_checkpointing=True)


# ---- learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        pytest.param({}, [1.0] * 10, id="defaults", marks=pytest.mark.parameter("lr_scheduler", "warmup_epochs")),
        pytest.param(
            {"lr_drop": 1},
            [1.0] * 5 + [0.1] * 5,
            id="step drops",
            marks=pytest.mark.parameter("lr_scheduler", "lr_drop"),
        ),
        pytest.param(
            {"lr_scheduler": "cosine"},
            [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)],
            id="cosine",
            marks=pytest.mark.parameter("lr_scheduler"),
        ),
        pytest.param(
            {"lr_scheduler": "cosine", "lr_min_factor": 0.4},
            [0.4 + 0.6 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)],
            id="cosine with a floor",
            marks=pytest.mark.parameter("lr_min_factor"),
        ),
        pytest.param(
            {"lr_min_factor": 0.4}, [1.0] * 10, id="step has no floor", marks=pytest.mark.parameter("lr_min_factor")
        ),
        pytest.param(
            {"warmup_epochs": 0.8},
            [0.0, 0.25, 0.5, 0.75, *[1.0] * 6],
            id="warm-up",
            marks=pytest.mark.parameter("warmup_epochs"),
        ),
    ],
)
def test_the_rate_follows_its_schedule(
    dataset: PreparedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    factors: list[float],
) -> None:
    steps = Steps(monkeypatch)
    train(tiny.job(dataset, tmp_path, epochs=2, eval_interval=2, **settings))
    assert steps.factors == pytest.approx(factors)


@pytest.mark.parameter("lr", "lr_encoder")
def test_each_part_steps_with_its_rate(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's first step moves a weight by its rate, whatever the gradient: lr, or a decayed lr_encoder."""
    moved: dict[str, float] = {}
    original = Engine.optimizer_step

    def step(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        before = {name: value.detach().clone() for name, value in engine.raw_model.named_parameters()}
        terms = original(engine, *args, **kwargs)
        if not moved:
            after = dict(engine.raw_model.named_parameters())
            moved.update({name: float((after[name].detach() - value).abs().max()) for name, value in before.items()})
        return terms

    monkeypatch.setattr(Engine, "optimizer_step", step)
    train(tiny.job(dataset, tmp_path, epochs=1, lr=3e-3, lr_encoder=5e-5, weight_decay=0.0))
    assert moved["class_embed.weight"] == pytest.approx(3e-3, rel=0.02)
    norm = "backbone.0.encoder.encoder.layernorm.weight"
    assert moved[norm] == pytest.approx(5e-5 * 0.7**2, rel=0.02)  # lr_component_decay, twice


# ---- resolution ---------------------------------------------------------------------------------------------------


@pytest.mark.parameter("resolution")
def test_images_have_the_resolution_in_training_and_evaluation(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[bool, tuple[int, ...]]] = set()
    forward = RFDETR.forward

    def look(self: RFDETR, images: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add((self.training, tuple(images.shape[-2:])))
        return forward(self, images, *args, **kwargs)

    monkeypatch.setattr(RFDETR, "forward", look)
    model = RFDETRPico(**{name: value for name, value in ARCHITECTURE.items() if name != "resolution"})
    assert model.config.resolution == 128
    model.train(dataset_dir=coco, output_dir=tmp_path, resolution=48, **SETTINGS)
    assert seen == {(True, (48, 48)), (False, (48, 48))}
    assert (model.config.resolution, model.config.positional_encoding_size) == (48, 6)  # and it stays so


@pytest.mark.parameter("resolution")
def test_a_resolution_of_the_seed_is_rounded_up_and_others_are_refused(coco: Path, tmp_path: Path) -> None:
    model = RFDETRPico(**{name: value for name, value in ARCHITECTURE.items() if name != "resolution"})
    with pytest.raises(ConfigError, match=r"resolution: 50 is not allowed: .*\(use 48 or 64\)"):
        model.train(dataset_dir=coco, output_dir=tmp_path, resolution=50, **SETTINGS)
    with pytest.warns(UserWarning, match="resolution 42 is not a multiple of .* = 16: 48 is used"):
        model.train(dataset_dir=coco, output_dir=tmp_path, resolution=42, **SETTINGS)
    assert (model.config.resolution, model.config.requested_resolution) == (48, 42)


# ---- regularisation, average --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(field, value, marks=pytest.mark.parameter(field), id=field)
        for field, value in (("weight_decay", 0.5), ("drop_path", 0.5), ("seed", 8))
    ],
)
def test_without_it_the_weights_would_be_others(
    dataset: PreparedDataset, tmp_path: Path, field: str, value: Any
) -> None:
    """Where every training with the same settings ends in the same weights (test_loop.TestReproducibility)."""
    for name, settings in (("without", {}), ("with", {field: value})):
        train(tiny.job(dataset, tmp_path / name, epochs=1, lr=1e-2, **settings))
    without, other = (checkpoint.load(tmp_path / name / checkpoint.LATEST)["model"] for name in ("without", "with"))
    assert tiny.differing(without, other)


@pytest.mark.parameter("use_ema")
@pytest.mark.parametrize("use_ema", [True, False])
def test_an_average_of_the_weights_is_kept(dataset: PreparedDataset, tmp_path: Path, use_ema: bool) -> None:
    train(tiny.job(dataset, tmp_path, epochs=1, use_ema=use_ema))
    content = checkpoint.load(tmp_path / checkpoint.LATEST)
    assert (content["ema_model"] is not None) is use_ema
    assert (tmp_path / "checkpoint_best_ema.pth").exists() is use_ema
    assert ("val/ema_mAP_50_95" in rows(tmp_path)[0]) is use_ema
    if use_ema:
        assert tiny.differing(content["model"], content["ema_model"])


# ---- early stopping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        pytest.param({}, 5, id="off", marks=pytest.mark.parameter("early_stopping")),
        pytest.param({"early_stopping": True}, 5, id="patience 10", marks=pytest.mark.parameter("early_stopping")),
        pytest.param(
            {"early_stopping": True, "early_stopping_patience": 2},
            3,
            id="patience 2",
            marks=pytest.mark.parameter("early_stopping", "early_stopping_patience", "early_stopping_min_delta"),
        ),
        pytest.param(
            {"early_stopping": True, "early_stopping_patience": 3},
            4,
            id="patience 3",
            marks=pytest.mark.parameter("early_stopping_patience"),
        ),
        pytest.param(
            {"early_stopping": True, "early_stopping_patience": 2, "early_stopping_min_delta": 0.0001},
            5,
            id="smaller delta",
            marks=pytest.mark.parameter("early_stopping_min_delta"),
        ),
    ],
)
def test_small_gains_stop_it(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], epochs: int
) -> None:
    Steps(monkeypatch)
    Scores(monkeypatch, raw=[0.1000, 0.1005, 0.1009, 0.1010, 0.1011], ema=[0.05] * 5)
    result = train(tiny.job(dataset, tmp_path, epochs=5, **settings))
    assert (result.epochs, result.stopped_early) == (epochs, epochs < 5)


@pytest.mark.parameter("early_stopping_use_ema")
@pytest.mark.parametrize(("use_ema", "epochs"), [(True, 3), (False, 4)])
def test_the_average_alone_is_watched(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_ema: bool, epochs: int
) -> None:
    Steps(monkeypatch)
    Scores(monkeypatch, raw=[0.1, 0.6, 0.7, 0.8], ema=[0.5] * 4)
    watch = {"early_stopping": True, "early_stopping_patience": 2, "early_stopping_use_ema": use_ema}
    assert train(tiny.job(dataset, tmp_path, epochs=4, **watch)).epochs == epochs


# ---- evaluation ---------------------------------------------------------------------------------------------------


@pytest.mark.parameter("eval_max_dets")
def test_so_many_detections_count(dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that finds every object: at one detection of a class in an image, it cannot name two of them."""

    def know(outputs: Any, images: Sequence[int], table: AnnotationTable, **_: Any) -> Detections:
        own = np.flatnonzero(np.isin(np.repeat(np.arange(len(table)), table.counts), images))
        where = np.repeat(np.arange(len(table)), table.counts)[own]
        return Detections(where, table.labels[own], np.ones(len(own)), table.boxes[own].astype(np.float64))

    Steps(monkeypatch)
    monkeypatch.setattr(validation, "detections_of", know)
    recall = {}
    for most in (1, 500):
        train(tiny.job(dataset, tmp_path / str(most), epochs=1, eval_max_dets=most))
        recall[most] = rows(tmp_path / str(most))[0]["val/mAR"]
    assert recall[500] == 1.0
    assert 0.3 < recall[1] < 1.0


# ---- hardware -----------------------------------------------------------------------------------------------------


@pytest.mark.parameter("accelerator")
def test_cpu_is_the_cpu_also_where_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        engine = build_engine(tiny.model_config(), tiny.train_config(accelerator="cpu"))
    assert {parameter.device.type for parameter in engine.raw_model.parameters()} == {engine.device.type} == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train\.accelerator: cuda is not available here"):
        build_engine(tiny.model_config(), tiny.train_config(accelerator="cuda"))


# ---- deprecated here, of the architecture -------------------------------------------------------------------------


def trained_with(coco: Path, folder: Path, **moved: Any) -> RFDETRPico:
    """A model after a training that was given a field of the architecture."""
    model = RFDETRPico(**{name: value for name, value in ARCHITECTURE.items() if name not in moved})
    if moved:
        (name,) = moved
        with pytest.warns(FutureWarning, match=f"train.{name} is deprecated: give model.{name}"):
            model.train(dataset_dir=coco, output_dir=folder, **SETTINGS, **moved)
    else:
        model.train(dataset_dir=coco, output_dir=folder, **SETTINGS)
    return model


@pytest.mark.parameter("group_detr")
def test_queries_are_copied_in_training_only(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries: set[tuple[bool, int]] = set()
    forward = RFDETR.forward

    def look(self: RFDETR, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        queries.add((self.training, outputs["pred_logits"].shape[1]))
        return outputs

    monkeypatch.setattr(RFDETR, "forward", look)
    assert trained_with(coco, tmp_path, group_detr=3).config.group_detr == 3
    assert queries == {(True, 3 * 8), (False, 8)}


@pytest.mark.parameter("ia_bce_loss")
@pytest.mark.long
def test_the_other_classification_loss(coco: Path, tmp_path: Path) -> None:
    losses = []
    for name, moved in (("default", {}), ("true", {"ia_bce_loss": True}), ("false", {"ia_bce_loss": False})):
        trained_with(coco, tmp_path / name, **moved)
        losses.append(rows(tmp_path / name)[0]["train/loss_ce"])
    assert losses[0] == losses[1]
    assert losses[2] != pytest.approx(losses[0], rel=0.05)


@pytest.mark.parameter("num_select")
def test_at_most_so_many_detections(coco: Path, tmp_path: Path) -> None:
    picture = next((coco / "valid").glob("*.jpg"))
    assert len(trained_with(coco, tmp_path / "8").predict(picture, threshold=0)) > 5
    assert 0 < len(trained_with(coco, tmp_path / "5", num_select=5).predict(picture, threshold=0)) <= 5


@pytest.mark.parameter("segmentation_head")
def test_a_head_of_masks_is_forwarded(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Steps(monkeypatch)
    assert trained_with(coco, tmp_path / "false", segmentation_head=False).config.segmentation_head is False
    with (
        pytest.warns(FutureWarning, match=r"train\.segmentation_head is deprecated"),
        pytest.raises(ConfigError, match=r"model\.segmentation_head: true is not built yet"),
    ):
        RFDETRPico().train(dataset_dir=coco, output_dir=tmp_path / "true", segmentation_head=True)


@pytest.mark.parametrize(
    ("name", "own", "other"),
    [
        pytest.param("group_detr", 2, 3, marks=pytest.mark.parameter("group_detr")),
        pytest.param("ia_bce_loss", True, False, marks=pytest.mark.parameter("ia_bce_loss")),
        pytest.param("num_select", 8, 5, marks=pytest.mark.parameter("num_select")),
        pytest.param("segmentation_head", False, True, marks=pytest.mark.parameter("segmentation_head")),
    ],
)
def test_a_contradiction_to_the_constructor_is_refused(
    coco: Path, tmp_path: Path, name: str, own: Any, other: Any
) -> None:
    model = RFDETRPico(**{**ARCHITECTURE, name: own})
    message = rf"train\(\): {name}: {other} contradicts RFDETRPico\({name}={own}\)"
    with pytest.warns(FutureWarning, match="deprecated"), pytest.raises(ConfigError, match=message):
        model.train(dataset_dir=coco, output_dir=tmp_path, **SETTINGS, **{name: other})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "nearest"), [("epoch", "epochs"), ("learning_rate_encoder", "lr_encoder"), ("batchsize", "batch_size")]
)
def test_an_unknown_parameter_names_the_nearest(coco: Path, tmp_path: Path, given: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\(\): {given}: unknown field; did you mean {nearest}\?"):
        RFDETRPico().train(dataset_dir=coco, output_dir=tmp_path, **{given: 3})


# ---- the table of all of them -------------------------------------------------------------------------------------


def test_the_list_is_that_of_the_seed_and_its_defaults_are_ours() -> None:
    assert set(parameters.SEED) == SEED_TRAIN | SEED_MODEL
    for name, default in parameters.SEED.items():
        owner = TrainConfig if name in SEED_TRAIN else ModelSection
        ours = owner.model_fields[name].default
        assert ours is None if default in ("required", "model-specific") else ours == default, name


PROVEN = {name: {f"test_{name}": "passed"} for name in parameters.SEED}


@pytest.mark.parametrize(
    ("found", "said", "proven"),
    [
        ({}, "48 parameters of the seed, none missing", True),
        ({"lr": {}}, "lr: no test", False),
        ({"lr": {"a": "passed", "b": "failed"}}, "lr: failed", False),
        ({"lr": {"a": "skipped"}}, "lr: skipped", False),
        ({"lr": {"a": "passed", "b": "skipped"}}, "48 parameters of the seed, none missing", True),
        ({"lr": {"a": "passed", "b": ""}}, "lr: not finished", False),
        ({"skip_corrupt": {"a": "failed"}, "epochs": {}}, "epochs: no test; skip_corrupt: failed", False),
        ({"learning_rate": {"a": "passed"}}, "learning_rate: no such parameter", False),
    ],
)
def test_the_table_says_what_is_not_proven(found: dict[str, Any], said: str, proven: bool) -> None:
    lines, verdict = parameters.report({**PROVEN, **found}, ran=True)
    assert (lines[-1], verdict) == (said, proven)
    table = {line.split()[0]: line.split()[1:] for line in lines}
    assert table["epochs"] == ["100", "0", "no", "test"] if "epochs" in found else ["100", "1", "passed"]
    assert ("skip_corrupt" in table) is ("skip_corrupt" in found)


@pytest.mark.slow
def test_every_parameter_has_a_test(capsys: pytest.CaptureFixture[str]) -> None:
    """Collected in this process, which has imported most tests already."""
    code = parameters.main(["--collect-only"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.splitlines()[-1] == "48 parameters of the seed, none missing"


def test_the_command_runs_the_tests_of_the_marker(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\n"
        "@pytest.mark.parameter('lr', 'epochs')\n"
        "def test_good(): pass\n"
        "@pytest.mark.parameter('lr')\n"
        "def test_bad(): raise ValueError\n"
        "@pytest.mark.parameter('seed')\n"
        "@pytest.mark.long\n"
        "def test_long(): pass\n"
        "def test_of_nothing(): raise ValueError\n"
    )
    command = [sys.executable, "-m", "tests.parameters", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    assert done.returncode == 1
    assert table["lr"] == ["0.0001", "2", "failed"]
    assert table["epochs"] == ["100", "1", "passed"]
    assert table["seed"] == ["null", "0", "no", "test"]
    assert "1 failed, 1 passed, 2 deselected" in done.stdout
    assert done.stdout.splitlines()[-2].endswith("::test_bad")
