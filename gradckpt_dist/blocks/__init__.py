"""Finding the blocks of a model, and switching how each of them runs."""

from __future__ import annotations

from gradckpt_dist.blocks.conflicts import check_conflicts
from gradckpt_dist.blocks.discovery import Block, BlockKind, find_blocks
from gradckpt_dist.blocks.switch import BlockSwitch, Dispatch, install_all

__all__ = ["Block", "BlockKind", "BlockSwitch", "Dispatch", "check_conflicts", "find_blocks", "install_all"]
