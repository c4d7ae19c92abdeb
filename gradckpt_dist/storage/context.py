"""What the storages of one engine's blocks share."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradckpt_dist.storage.half_choice import HalfChoices
from gradckpt_dist.storage.lane import OffloadLane
from gradckpt_dist.storage.noise import NoiseSource


@dataclass
class StorageContext:
    """``lane``: where offloading blocks meet; ``noise``: where lossy ones get their seeds.

    ``half_choices``: what ``selective_half`` holds, by kind of block.
    """

    lane: OffloadLane = field(default_factory=OffloadLane)
    noise: NoiseSource = field(default_factory=NoiseSource)
    half_choices: HalfChoices = field(default_factory=HalfChoices)
