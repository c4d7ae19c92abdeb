"""Proactive gradient-aware activation checkpointing for distributed PyTorch training."""

from typing import TYPE_CHECKING, Any

from gradckpt_dist.adapters import versions
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

if TYPE_CHECKING:
    from gradckpt_dist.launcher.trainer import GradckptCallback as GradckptCallback

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


def __getattr__(name: str) -> Any:
    """``GradckptCallback`` imports transformers, hence only where it is asked for."""
    if name != "GradckptCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    versions.require("transformers")
    from gradckpt_dist.launcher.trainer import GradckptCallback  # noqa: PLC0415

    return GradckptCallback
