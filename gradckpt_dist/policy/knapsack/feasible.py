"""The smallest peak that any choice has, and a choice that has it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradckpt_dist.cost.table import Choice
from gradckpt_dist.policy.knapsack.instance import Instance, Ints, take

_LABELS = 256
_NEVER = 2**60


@dataclass(frozen=True, kw_only=True, eq=False)
class SmallestPeak:
    """``peak_bytes`` is of the blocks alone. ``exact`` is False if a smaller one was not ruled out."""

    peak_bytes: int
    choice: Choice
    exact: bool


def suffix_peaks(instance: Instance) -> Ints:
    """The smallest peak of blocks i..n-1 by themselves, for each i, whatever the error; [blocks + 1], the last one 0.

    Held bytes of earlier blocks shift every peak of a suffix alike, hence d_i = min over options of
    (held + max(working set, d_{i+1})).
    """
    held = np.where(instance.allowed, instance.held, _NEVER).T.tolist()
    working = instance.working.T.tolist()
    peaks = [0] * (instance.blocks + 1)
    after = 0
    for i in range(instance.blocks - 1, -1, -1):
        after = min([h + (w if w > after else after) for h, w in zip(held[i], working[i], strict=True)])
        peaks[i] = after
    return np.array(peaks, dtype=np.int64)


def smallest_peak(instance: Instance) -> SmallestPeak | None:
    """The smallest peak under the tolerance; None if no choice keeps to the tolerance.

    Exact if the choice of least peak keeps to the tolerance by itself. Otherwise peak and error are traded from the
    last block to the first, with at most 256 trade-offs kept; exact unless there were more.
    """
    peaks = suffix_peaks(instance)
    unconstrained = _peak_choice(instance, peaks)
    if take(instance.error, unconstrained).sum() <= instance.tolerance:
        return SmallestPeak(peak_bytes=int(peaks[0]), choice=unconstrained, exact=True)
    return _traded(instance)


def _peak_choice(instance: Instance, peaks: Ints) -> Choice:
    held = np.where(instance.allowed, instance.held, _NEVER)
    total = held + np.maximum(instance.working, peaks[1:])
    choice: Choice = np.argmin(total, axis=0)
    return choice


def _traded(instance: Instance) -> SmallestPeak | None:
    least = np.where(instance.allowed, instance.error, _NEVER).min(axis=0)
    before = np.concatenate([[0], np.cumsum(least)])  # what the blocks before i need at least
    if before[-1] > instance.tolerance:
        return None
    peak = error = np.zeros(1, dtype=np.int64)
    steps: list[tuple[Ints, Ints]] = []
    exact = True
    for i in range(instance.blocks - 1, -1, -1):
        options = np.flatnonzero(instance.allowed[:, i])
        peaks = instance.held[options, i, None] + np.maximum(instance.working[options, i, None], peak)
        errors = instance.error[options, i, None] + error
        kept, whole = _front(peaks.ravel(), np.where(errors + before[i] <= instance.tolerance, errors, _NEVER).ravel())
        exact &= whole
        steps.append((options[kept // len(peak)], kept % len(peak)))
        peak, error = peaks.ravel()[kept], errors.ravel()[kept]
    choice = np.zeros(instance.blocks, dtype=np.int64)
    label = 0  # the front is in ascending order of peaks
    for i, (options, parents) in enumerate(reversed(steps)):
        choice[i], label = options[label], parents[label]
    return SmallestPeak(peak_bytes=int(peak[0]), choice=choice, exact=exact)


def _front(peaks: Ints, errors: Ints) -> tuple[Ints, bool]:
    """The trade-offs worth keeping, by ascending peak, and whether these are all."""
    order = np.lexsort((errors, peaks))
    best = np.minimum.accumulate(errors[order])
    is_new = (best < _NEVER) & np.concatenate([[True], best[1:] < best[:-1]])
    front = order[is_new]
    if len(front) <= _LABELS:
        return front, True
    # Both ends stay: the last has the least error, so that a choice within the tolerance is never lost.
    return front[np.linspace(0, len(front) - 1, _LABELS).astype(np.int64)], False
