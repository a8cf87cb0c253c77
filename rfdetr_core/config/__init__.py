"""Typed configuration: what a user may say, checked before anything runs (DESIGN section 3)."""

from rfdetr_core.config.model import ENCODERS, VARIANTS, EncoderSize, ModelConfig

__all__ = ["ENCODERS", "VARIANTS", "EncoderSize", "ModelConfig"]
