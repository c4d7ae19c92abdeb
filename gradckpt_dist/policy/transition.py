"""From the mask in force towards the one that would be best: what pays, and not too much at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gradckpt_dist.cost import CostTable
from gradckpt_dist.cost.table import Choice


@dataclass(frozen=True, kw_only=True)
class ChangeRules:
    """When a change of mask pays and how far it goes.

    A change pays if what it saves in the ``interval`` steps up to the next decision is more than ``seconds_at_once``
    and its own ``seconds_per_change`` for each block changed, and its aim saves more than the share ``hysteresis`` of
    the extra seconds in force. Of all blocks at most the share ``relaxed_share``, rounded up, changes at once while
    the limits are kept.
    """

    interval: int
    hysteresis: float = 0.05
    seconds_at_once: float = 0.0
    seconds_per_change: float = 0.0
    relaxed_share: float = 0.5


def next_choice(
    costs: CostTable, current: Choice, aim: Choice, rules: ChangeRules, fits: Callable[[Choice], bool]
) -> Choice:
    """The choice to use next, on the way from ``current`` to ``aim``, both of which fit; ``current`` if none pays."""
    saved = costs.seconds_of(current) - costs.seconds_of(aim)
    if not saved > rules.hysteresis * abs(costs.seconds_of(current)):
        return current
    most = max(1, int(np.ceil(rules.relaxed_share * costs.blocks)))
    step = aim if int((current != aim).sum()) <= most else _step(costs, current, aim, most, fits)
    saved = costs.seconds_of(current) - costs.seconds_of(step)
    changes = int((current != step).sum())
    cost = rules.seconds_at_once + changes * rules.seconds_per_change
    return step if saved * rules.interval > cost else current


def _step(costs: CostTable, current: Choice, aim: Choice, most: int, fits: Callable[[Choice], bool]) -> Choice:
    """The most saving step of at most ``most`` changes: the fastest changes, and those that make room for them.

    Of equally fast ones the later: what a block holds is in the way of the working sets of those behind it. Where no
    such step fits, the whole way at once, which does.
    """
    blocks = np.arange(costs.blocks)
    saved = costs.extra_seconds[blocks, current] - costs.extra_seconds[blocks, aim]
    freed = costs.held_bytes[blocks, current] - costs.held_bytes[blocks, aim]
    changed = np.flatnonzero(current != aim)
    faster = changed[saved[changed] > 0]
    faster = faster[np.lexsort((-faster, -saved[faster]))]
    slower = changed[saved[changed] <= 0]
    slower = slower[np.argsort(-saved[slower] / np.maximum(freed[slower], 1), kind="stable")]
    best, best_saved = aim, 0.0
    taken = made_room = 0
    while taken < len(faster) and taken + made_room < most:
        step = current.copy()
        chosen = np.concatenate([faster[: taken + 1], slower[:made_room]])
        step[chosen] = aim[chosen]
        if fits(step):
            taken += 1
            if saved[chosen].sum() > best_saved:
                best, best_saved = step, float(saved[chosen].sum())
        elif made_room < len(slower):
            made_room += 1
        else:
            break
    return best
