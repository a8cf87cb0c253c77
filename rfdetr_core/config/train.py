"""TrainConfig: everything about a training run (the seed's reference table; training spec 1.2)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rfdetr_core.config.augment import legal_aug_config
from rfdetr_core.config.base import Bool, Config, Float, Int, Text, Uri, home_expanded, plain_json, whole_number
from rfdetr_core.config.problems import Problem, broken_rule, not_allowed, refusal, show

API_ONLY = {
    "dataset_dir": "the dataset is dataset.uri",
    "output_dir": "results go to the run's own folder",
}
"""Fields that exist in the Python API only, and what stands for them in a pipeline."""

MOVED_TO_MODEL = ("group_detr", "ia_bce_loss", "segmentation_head", "num_select")
"""Deprecated here: they belong to the architecture, and are forwarded to the model section."""

OWN_CHECKPOINT = ("", "auto", "last")
"""Values of `resume` that mean the training's own checkpoint, which is continued anyway."""


def _batch_size(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        number = whole_number(value)
    except ValueError:
        number = 0
    if number < 1:
        raise broken_rule("batch_size", 'must be "auto" or a whole number of at least 1', ("auto", 1))
    return number


def _true_false_or_auto(value: Any) -> Any:
    if not isinstance(value, bool) and value != "auto":
        raise broken_rule("true_false_auto", 'must be true, false or "auto"', True)
    return value


def _progress_bar(value: Any) -> Any:
    """The legacy booleans: true is tqdm, false is none."""
    return {True: "tqdm", False: None}[value] if isinstance(value, bool) else value


def _multi_scale(value: Any) -> Any:
    """The legacy booleans: true is per-batch, false is off."""
    return {True: "per-batch", False: "off"}[value] if isinstance(value, bool) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _own_is_null(value: Any) -> Any:
    return None if value in OWN_CHECKPOINT else value


def _devices(value: Any) -> Any:
    """A count, a list such as "0,2" or "1,", or all there are: "auto", as which -1 is kept."""
    if isinstance(value, str):
        if value == "auto" or all(part.strip().isdecimal() for part in value.removesuffix(",").split(",")):
            return value
    else:
        number = whole_number(value)
        if number == -1:
            return "auto"
        if number >= 1:
            return number
    raise broken_rule("devices", 'must be a count of at least 1, a list such as "0,2", or "auto"', ("auto", 1))


def _resolved_path(value: str) -> str:
    return os.path.realpath(home_expanded(value))


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise broken_rule("distinct", "must not name a class twice")
    return names


class TrainConfig(Config):
    """Every parameter of `train`; names and defaults are the seed's, or rfdetr 1.11.2's if it is silent."""

    # --- Core
    dataset_dir: Annotated[Text, AfterValidator(_resolved_path)] | None = None
    """Python API only: the folder of the dataset (COCO, YOLO or prepared)."""
    output_dir: Annotated[Text, AfterValidator(_resolved_path)] = Field(default="output", validate_default=False)
    """Python API only: the folder of all results; the default lies in the current folder."""
    epochs: Int = Field(default=100, ge=1)
    """Passes over the training images."""
    max_hours: Float | None = Field(default=None, gt=0)
    """Hours after which training ends with the epoch it is in; null: no limit."""
    resume: Annotated[Uri | None, BeforeValidator(_own_is_null)] = None
    """Checkpoint file to continue, in full from checkpoint.pth or checkpoint_<N>.pth, with its weights only from
    others; a training that has a checkpoint of its own continues that one, as it does with null or "auto"."""
    seed: Int | None = Field(default=None, ge=0, le=2**32 - 1)
    """Seed of weights, data order and augmentation; null draws one."""
    notes: Annotated[Any, BeforeValidator(plain_json)] = None
    """Anything worth keeping with the checkpoints; has no effect."""

    # --- Batch and memory
    batch_size: Annotated[Int | Literal["auto"], BeforeValidator(_batch_size)] = 4
    """Images per device and micro-batch; "auto" probes for the largest safe one."""
    grad_accum_steps: Int = Field(default=4, ge=1)
    """Micro-batches per optimizer step; batch_size "auto" chooses it as well."""
    eval_batch_size: Int | None = Field(default=None, ge=1)
    """Images per batch in evaluation; null: the training batch."""
    auto_batch_target_effective: Int = Field(default=16, ge=1)
    """batch_size x grad_accum_steps per device that "auto" aims at; a floor, not a cap."""
    auto_batch_max_targets_per_image: Int = Field(default=100, ge=1)
    """Boxes per image that "auto" probes with: the worst case to expect."""
    auto_batch_ema_headroom: Float = Field(default=0.7, gt=0, le=1)
    """Share of the safe batch that "auto" takes when use_ema is on, as the average needs memory too."""

    # --- Optimizer and schedule
    lr: Float = Field(default=1e-4, gt=0)
    """Learning rate of everything but the encoder; the decoder gets lr x lr_component_decay."""
    lr_encoder: Float = Field(default=1.5e-4, ge=0)
    """Learning rate of the encoder, before its decays; 0 freezes it."""
    weight_decay: Float = Field(default=1e-4, ge=0)
    """AdamW's decoupled weight decay; the encoder's norms, biases and embeddings have none."""
    lr_scheduler: Annotated[Literal["step", "cosine"], BeforeValidator(_lower)] = "step"
    """step: one drop to a tenth at lr_drop; cosine: down to lr_min_factor at the end."""
    lr_drop: Int = Field(default=100, ge=1)
    """Epoch of the drop of "step"."""
    lr_min_factor: Float = Field(default=0.0, ge=0, le=1)
    """Floor of "cosine" as a fraction of the initial rate; "step" does not use it."""
    warmup_epochs: Float = Field(default=0.0, ge=0)
    """Epochs of linear warm-up from 0; fractions are allowed."""
    lr_vit_layer_decay: Float = Field(default=0.8, gt=0, le=1)
    """Factor on the learning rate per encoder block, counted down from the last."""
    lr_component_decay: Float = Field(default=0.7, gt=0, le=1)
    """Factor on the learning rate of the decoder; squared, of the encoder."""
    clip_max_norm: Float = Field(default=0.1, ge=0)
    """Largest global L2 norm of the gradient; 0: no clipping. As upstream, 0.1 clips nearly every step."""
    drop_path: Float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth rate of the last encoder block; linear from 0 at the first."""
    cls_loss_coef: Float = Field(default=1.0, ge=0)
    """Weight of the classification loss; boxes have 5 (L1) and 2 (GIoU)."""

    # --- Average of the weights, checkpoints, stopping
    use_ema: Bool = True
    """Keep an exponential moving average of the weights, which competes with them for the best model."""
    ema_decay: Float = Field(default=0.993, gt=0, lt=1)
    """Decay per update, once warmed up."""
    ema_tau: Int = Field(default=100, ge=0)
    """Updates of warm-up of the decay; 0: none."""
    ema_update_interval: Int = Field(default=1, ge=1)
    """Optimizer steps per update of the average."""
    checkpoint_interval: Int = Field(default=10, ge=1)
    """Epochs between checkpoint_<N>.pth files; checkpoint.pth is written after every epoch anyway."""
    checkpoint_minutes: Float = Field(default=15.0, gt=0)
    """Minutes between uploads of checkpoint.pth, also within an epoch: what a killed pod loses at most."""
    dont_save_weights: Bool = False
    """Write no periodic and no best-of-kind files, only what resuming and later stages need."""
    best_model_metric: Literal["map", "mar"] = "map"
    """What makes a model the best, and drives early stopping: mAP 50:95, or recall at eval_max_dets."""
    skip_best_epochs: Int = Field(default=0, ge=0)
    """First epochs that cannot become the best and do not count for early stopping."""
    smooth_alpha: Float = Field(default=0.0, ge=0, lt=1)
    """Smoothing of the raw weights' metric before the question whether it is better; 0: none."""
    early_stopping: Bool = False
    """Stop when the metric no longer improves."""
    early_stopping_patience: Int = Field(default=10, ge=1)
    """Evaluations in a row without improvement before stopping; epochs, when eval_interval is 1."""
    early_stopping_min_delta: Float = Field(default=0.001, ge=0)
    """What an improvement must exceed."""
    early_stopping_use_ema: Bool = False
    """Watch the averaged weights only, instead of the better of both."""
    run_test: Bool = False
    """Evaluate the best model on the test split at the end of training."""

    # --- Evaluation and logs
    eval_interval: Int = Field(default=1, ge=1)
    """Epochs between evaluations; the last epoch is always evaluated."""
    eval_max_dets: Int = Field(default=500, ge=1)
    """Detections per image that COCO evaluation takes; the model gives at most model.num_select."""
    eval_base_model: Bool = True
    """Evaluate the raw weights beside the averaged ones, so that both best files exist: a second pass."""
    eval_masks_head_resolution: Bool = False
    """Segmentation: evaluate masks at the head's size."""
    log_per_class_metrics: Bool = True
    """Report AP per class, in the logs and on the console."""
    compute_val_loss: Annotated[bool | Literal["auto"], BeforeValidator(_true_false_or_auto)] = True
    """Log the loss on the validation split; "auto": only where something reads it."""
    compute_test_loss: Bool = True
    """Log the loss on the test split at the end of training."""
    compute_train_metrics: Bool = False
    """Report mAP on the training images as well, in epochs that are evaluated."""
    fp16_eval: Bool = False
    """Evaluate under float16 autocast (CUDA): less memory; scores and boxes stay float32."""
    class_names: Annotated[tuple[Text, ...], AfterValidator(_distinct)] | None = None
    """Names by label, to check the dataset against; null: the dataset's own."""
    tensorboard: Bool = True
    """Write TensorBoard event files."""
    wandb: Bool = False
    """Log to Weights & Biases."""
    mlflow: Bool = False
    """Log to MLflow."""
    project: Text | None = None
    """Project in W&B, experiment in MLflow."""
    run: Text | None = None
    """Name of the run in W&B and MLflow; null: a generated one."""
    progress_bar: Annotated[Literal["tqdm", "rich"] | None, BeforeValidator(_progress_bar)] = None
    """Progress bar on the console; the booleans of older versions are understood."""

    # --- Data
    dataset_file: Literal["roboflow", "coco", "yolo", "voc"] = "roboflow"
    """Layout of dataset_dir in the Python API; "roboflow" finds out by itself."""
    resolution: Int | None = None
    """Side of the square input; null: the variant's. The same as model.resolution, where its rules stand."""
    multi_scale: Annotated[Literal["off", "per-batch", "per-sample"], BeforeValidator(_multi_scale)] = "per-batch"
    """Vary the input size in training; the booleans of older versions are understood."""
    expanded_scales: Bool = True
    """Eleven sizes (-5 to 5 blocks around the resolution) instead of eight."""
    square_resize_div_64: Bool = True
    """Resize to a square; false keeps the aspect."""
    scale_jitter: Bool = True
    """Every second training image is cropped at random before it is resized."""
    aug_config: Annotated[dict[str, Any] | list[Any] | None, BeforeValidator(legal_aug_config)] = None
    """Augmentations by name with their parameters; null: a horizontal flip; {}: none (docs/augmentation.md)."""
    save_dataset_grids: Bool = False
    """Save the first training and validation batches as pictures."""
    skip_corrupt: Int = Field(default=0, ge=0)
    """Unreadable training images that are skipped, and counted, before training fails."""
    num_workers: Int = Field(default=2, ge=0)
    """Processes that load images; 0 loads in the training process."""
    pin_memory: Bool | None = None
    """Load into page-locked memory, for faster transfers; null: where training is on CUDA."""
    persistent_workers: Bool | None = None
    """Keep the loading processes from epoch to epoch; null: where there are any."""
    prefetch_factor: Int | None = Field(default=None, ge=1)
    """Batches that each loading process prepares in advance; null: 2."""

    # --- Hardware
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = "auto"
    """Where to train; "auto": CUDA, else MPS, else the CPU."""
    amp_dtype: Literal["auto", "bf16", "fp16", "fp8"] | None = "auto"
    """Mixed precision: null is float32; "auto" is bf16, or fp16 on GPUs without it, and float32 on CPUs."""
    devices: Annotated[Int | Text, BeforeValidator(_devices)] = 1
    """GPUs per node: a count, a list such as "0,2" (of one: "1,"), or "auto"."""
    num_nodes: Int = Field(default=1, ge=1)
    """Machines that train together, with `devices` each; 2 and more need the profile multi-node (docs/training.md)."""

    # --- Deprecated: set them in the model section
    group_detr: Int | None = Field(default=None, ge=1)
    """Deprecated spelling of model.group_detr."""
    ia_bce_loss: Bool | None = None
    """Deprecated spelling of model.ia_bce_loss."""
    segmentation_head: Bool | None = None
    """Deprecated spelling of model.segmentation_head."""
    num_select: Int | None = Field(default=None, ge=1)
    """Deprecated spelling of model.num_select."""

    @model_validator(mode="before")
    @classmethod
    def _other_spellings(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        values = dict(given)
        problems = [*_scheduler_kwargs(values), *_eval_ema_only(values)]
        if problems:
            raise refusal(problems)
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in MOVED_TO_MODEL:
            if getattr(self, name) is not None:
                warn_moved(name)
        problems = list(self._inconsistencies())
        if problems:
            raise refusal(problems)
        return self

    def _inconsistencies(self) -> Iterator[Problem]:
        if self.skip_best_epochs >= self.epochs:
            rule = f"must be less than epochs = {self.epochs}, or no epoch can be the best"
            yield not_allowed("skip_best_epochs", self.skip_best_epochs, rule, self.epochs - 1)
        if self.batch_size == "auto" and self.amp_dtype == "fp8":
            yield not_allowed("batch_size", "auto", 'must be a whole number with amp_dtype "fp8"', 4)
        if not self.use_ema:
            if not self.eval_base_model:
                rule = "without use_ema there is nothing else to evaluate"
                yield not_allowed("eval_base_model", False, rule, True)
            if self.early_stopping_use_ema:
                yield not_allowed("early_stopping_use_ema", True, "needs use_ema: true", False)


def warn_moved(name: str) -> None:
    """Say that a training field belongs to the model section."""
    warnings.warn(f"train.{name} is deprecated: give model.{name}", FutureWarning, stacklevel=2)


def _scheduler_kwargs(values: dict[str, Any]) -> Iterator[Problem]:
    """lr_scheduler_kwargs of rfdetr 1.11.2: the same as lr_drop and lr_min_factor."""
    kwargs = values.pop("lr_scheduler_kwargs", None) or {}
    names = {"lr_drop": "lr_drop", "min_factor": "lr_min_factor"}
    if not isinstance(kwargs, Mapping) or set(kwargs) - set(names):
        rule = "may hold lr_drop and min_factor"
        yield not_allowed("lr_scheduler_kwargs", kwargs, rule, {"lr_drop": 100, "min_factor": 0.0})
        return
    for key, value in kwargs.items():
        name = names[key]
        if name in values and values[name] != value:
            yield not_allowed(f"lr_scheduler_kwargs.{key}", value, f"{name} is {show(values[name])}; give one")
        values[name] = value


def _eval_ema_only(values: dict[str, Any]) -> Iterator[Problem]:
    """eval_ema_only of rfdetr 1.11.2, deprecated there: eval_base_model the other way round."""
    only = values.pop("eval_ema_only", None)
    if only is None:
        return
    if not isinstance(only, bool):
        yield not_allowed("eval_ema_only", only, "must be true or false", False)
        return
    warnings.warn("train.eval_ema_only is deprecated: give train.eval_base_model", FutureWarning, stacklevel=2)
    if only and values.setdefault("eval_base_model", False) is not False:
        yield not_allowed("eval_ema_only", True, "contradicts eval_base_model: true; give one", False)
