"""What the storages of one engine's blocks share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gradckpt_dist.storage.half_choice import HalfChoices
from gradckpt_dist.storage.lane import OffloadLane
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.saved import Slack

if TYPE_CHECKING:
    from gradckpt_dist.storage.kept_inputs import KeptInputs


@dataclass
class StorageContext:
    """``lane``: where offloading blocks meet; ``noise``: where lossy ones get their seeds.

    ``slack``: what they have let go of in backward. ``half_choices``: what ``selective_half`` holds, by kind of block.
    ``kept_inputs``: where inputs of recomputed blocks wait, if they are to be moved. ``foreign_random_states``: whether
    blocks draw from states that a framework keeps. ``said``: what is not said again.
    """

    lane: OffloadLane = field(default_factory=OffloadLane)
    noise: NoiseSource = field(default_factory=NoiseSource)
    slack: Slack = field(default_factory=Slack)
    half_choices: HalfChoices = field(default_factory=HalfChoices)
    kept_inputs: KeptInputs | None = None
    foreign_random_states: bool = False
    said: set[str] = field(default_factory=set)
