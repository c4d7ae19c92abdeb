"""Proactive gradient-aware activation checkpointing for distributed PyTorch training."""

from gradckpt_dist.api import enable
from gradckpt_dist.config import Config, ThresholdConfig
from gradckpt_dist.engine import Engine
from gradckpt_dist.errors import (
    AgreementError,
    BlocksNotFoundError,
    BudgetError,
    ConfigError,
    ConflictError,
    GradckptError,
    MaskError,
    StorageError,
)
from gradckpt_dist.mask import Mask
from gradckpt_dist.version import __version__

__all__ = [
    "AgreementError",
    "BlocksNotFoundError",
    "BudgetError",
    "Config",
    "ConfigError",
    "ConflictError",
    "Engine",
    "GradckptError",
    "Mask",
    "MaskError",
    "StorageError",
    "ThresholdConfig",
    "__version__",
    "enable",
]
