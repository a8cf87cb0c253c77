"""RunConfig: one YAML file, one run of the pipeline (DESIGN section 3)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from rfdetr_core.config.base import Config, Text
from rfdetr_core.config.device import amp_dtype, contradiction, is_device, train_settings, warn_moved_to_train
from rfdetr_core.config.model import ModelSection
from rfdetr_core.config.problems import Problem, broken_rule, not_allowed, refusal, show
from rfdetr_core.config.sections import (
    DatasetConfig,
    EvaluateConfig,
    ExportConfig,
    NotifyConfig,
    ProbeConfig,
    PromoteConfig,
)
from rfdetr_core.config.train import API_ONLY, MOVED_TO_MODEL, TrainConfig, warn_moved
from rfdetr_core.config.unbuilt import unbuilt_fields, unbuilt_problems


def _registry_name(value: str) -> str:
    if re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", value):
        return value
    rule = "must be up to 63 of a-z, 0-9 and -, and begin with a letter or digit"
    near = re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-")[:63]
    raise broken_rule("name", rule, near or "detector")


class RunConfig(Config):
    """All that a user says about a run."""

    name: Annotated[Text, AfterValidator(_registry_name)]
    """The model's name in the registry; runs of the same name compete for the same champion."""
    dataset: DatasetConfig
    """Where the data is."""
    model: ModelSection = Field(default_factory=ModelSection)
    """Variant and architecture."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """Training."""
    probe: ProbeConfig = Field(default_factory=ProbeConfig)
    """Search for the batch size."""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    """Evaluation of candidate and champion."""
    export: ExportConfig = Field(default_factory=ExportConfig)
    """ONNX model and its proof."""
    promote: PromoteConfig = Field(default_factory=PromoteConfig)
    """The gate."""
    notify: NotifyConfig = Field(default_factory=NotifyConfig)
    """Who is told."""

    def not_built(self) -> list[str]:
        """Fields that are accepted at their default only, each with what is missing."""
        return unbuilt_fields()

    def as_dict(self) -> dict[str, Any]:
        """Plain values of all sections, in the order of the classes; `parse` makes an equal one of them."""
        unused = {*API_ONLY, *MOVED_TO_MODEL}
        return self.model_dump(mode="json", exclude={"train": unused})

    @model_validator(mode="before")
    @classmethod
    def _one_place_for_each(cls, given: Any) -> Any:
        """Fill in absent sections, and move what has two spellings to the one place where it is kept."""
        if not isinstance(given, dict):
            return given
        values = {name: _plain_section(value) for name, value in given.items()}
        for name in cls.model_fields:
            if name != "name" and values.get(name) is None:
                values[name] = {}
        train, model = values["train"], values["model"]
        if isinstance(train, dict) and isinstance(model, dict):
            for name in (*MOVED_TO_MODEL, "resolution"):
                _move(name, train, model)
            _move_to_train(model, train)
        return values

    @model_validator(mode="after")
    def _belongs_here(self) -> Self:
        problems = [*self._foreign_fields(), *unbuilt_problems(self)]
        if (wrong := self.export.shape_problem(self.model.block)) is not None:
            problems.append(wrong)
        if self.promote.max_p_value is not None and self.evaluate.bootstrap_samples == 0:
            rule = "needs a bootstrap, and evaluate.bootstrap_samples is 0"
            problems.append(not_allowed("promote.max_p_value", self.promote.max_p_value, rule, None))
        if problems:
            raise refusal(problems)
        return self

    def _foreign_fields(self) -> Iterator[Problem]:
        for name, instead in API_ONLY.items():
            if name in self.train.model_fields_set:
                yield Problem(f"train.{name}", f"belongs to the Python API; the pipeline owns it: {instead}")
        for name in (*MOVED_TO_MODEL, "resolution"):
            value = getattr(self.train, name)
            if value is not None:  # had the model section agreed, it would have been moved there
                other = getattr(self.model, name)
                if name == "resolution":
                    other = self.model.requested_resolution or other
                yield not_allowed(f"train.{name}", value, f"model.{name} is {show(other)}; give one of them", None)
        device = self.model.device
        if device is not None:  # or it would have been moved to train
            other = contradiction(device, self.train.model_dump(include={"accelerator", "devices"}))
            yield not_allowed("model.device", device, f"{other}; give one of them", None)


def _plain_section(value: Any) -> Any:
    """What was given, as a dict of its own: it is changed below."""
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in value.model_fields_set}
    return dict(value) if isinstance(value, dict) else value


def _move(name: str, train: dict[str, Any], model: dict[str, Any]) -> None:
    """Move a training field to the model section, unless that says otherwise."""
    value, other = train.get(name), model.get(name)
    if value is None:
        return
    if other is None or (other == value and isinstance(other, bool) == isinstance(value, bool)):
        del train[name]
        model[name] = value
        if name in MOVED_TO_MODEL:
            warn_moved(name)


def _move_to_train(model: dict[str, Any], train: dict[str, Any]) -> None:
    """Move device and amp to the fields that they stand for; what is not legal or contradicts them reports itself."""
    device, amp = model.get("device"), model.get("amp")
    if is_device(device) and not contradiction(device, train):
        del model["device"]
        train |= train_settings(device)
        warn_moved_to_train("device")
    if isinstance(amp, bool):
        del model["amp"]
        train["amp_dtype"] = amp_dtype(amp, train.get("amp_dtype", "auto"))
        warn_moved_to_train("amp")
