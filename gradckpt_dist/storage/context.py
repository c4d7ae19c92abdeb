"""What the storages of one engine's blocks share."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradckpt_dist.storage.lane import OffloadLane


@dataclass
class StorageContext:
    """``lane``: where offloading blocks meet."""

    lane: OffloadLane = field(default_factory=OffloadLane)
