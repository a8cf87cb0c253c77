"""Typed configuration: what a user may say, checked before anything runs (DESIGN section 3)."""

from rfdetr_core.config.digest import section_digest
from rfdetr_core.config.load import (
    dump_yaml,
    load_run_config,
    merge,
    parse_assignments,
    parse_overrides,
    parse_run_config,
)
from rfdetr_core.config.model import ENCODERS, VARIANTS, EncoderSize, ModelConfig, ModelSection
from rfdetr_core.config.run import RunConfig
from rfdetr_core.config.sections import (
    DatasetConfig,
    EvaluateConfig,
    ExportConfig,
    NotifyConfig,
    ProbeConfig,
    PromoteConfig,
)
from rfdetr_core.config.train import TrainConfig
from rfdetr_core.config.unbuilt import NOT_BUILT, Unbuilt, refuse_unbuilt

__all__ = [
    "ENCODERS",
    "NOT_BUILT",
    "VARIANTS",
    "DatasetConfig",
    "EncoderSize",
    "EvaluateConfig",
    "ExportConfig",
    "ModelConfig",
    "ModelSection",
    "NotifyConfig",
    "ProbeConfig",
    "PromoteConfig",
    "RunConfig",
    "TrainConfig",
    "Unbuilt",
    "dump_yaml",
    "load_run_config",
    "merge",
    "parse_assignments",
    "parse_overrides",
    "parse_run_config",
    "refuse_unbuilt",
    "section_digest",
]
