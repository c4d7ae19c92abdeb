"""Dynamic programming over some blocks, the others' options given.

A label is a partial plan: bytes and error so far, and a bound on the seconds of any plan that it can grow into. By
Lagrangian duality that bound is the relaxation's, plus the regret of every option taken, plus price times slack of
every row passed. Labels that another is never worse than, that cannot fit any more, or whose bound says that they come
too late are dropped; beyond a width, so are those with the highest bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradckpt_dist.cost.table import Choice
from gradckpt_dist.policy.knapsack.instance import Bools, Floats, Instance, Ints, take
from gradckpt_dist.policy.knapsack.relaxation import Relaxation

_ERROR_LEVELS = 24
_NEVER = 2**60
_STEP_WORK = 400


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """``choice`` is None if no better one was found. No plan with these given options is below ``bound`` seconds.

    ``work`` is in proportion to the time taken, whatever the machine: partial plans looked at, and so many a block.
    """

    choice: Choice | None
    bound: float
    work: int


class LabelSearch:
    """Search among the options ``tried`` [storages, blocks] of the blocks ``free``; the others keep to ``given``."""

    def __init__(
        self, instance: Instance, relaxation: Relaxation, *, given: Choice, free: Ints, tried: Bools, width: int
    ) -> None:
        self._instance = instance
        self._relaxation = relaxation
        self._given = given
        self._free = free
        self._width = width
        self._options = [np.flatnonzero(tried[:, i]) for i in free]
        self._stretches = _Stretches(instance, relaxation, given, free)
        self._byte_price = float(relaxation.held_prices[0])
        self._most_held = self._latest_fits()
        self._most_error = self._error_left()
        left = instance.capacity - int(self._stretches.before[-1] + self._stretches.tail)
        self._held_course = _course(take(instance.held, given)[free], left)
        self._error_course = _course(take(instance.error, given)[free], self._most_error[-1])

    def run(self, below: float) -> Found:
        """The best plan of fewer than ``below`` seconds."""
        if self._most_held[0] < 0:  # the given options before the first free block are over the capacity
            return Found(choice=None, bound=below, work=_STEP_WORK)
        labels = _Labels.start(self._stretches, self._relaxation.bound)
        dropped, work = np.inf, 0
        steps: list[tuple[Ints, Ints]] = []
        for t in range(len(self._free)):
            labels = self._expanded(labels, t)
            work += _STEP_WORK + len(labels.held)
            kept = self._kept(labels, t, below)
            if len(kept) > self._width:
                kept, rest = self._widest(labels, t, kept)
                dropped = min(dropped, float(labels.bound[rest].min()))
            if not len(kept):
                return Found(choice=None, bound=min(dropped, below), work=work)
            labels = labels.only(kept)
            steps.append((labels.option, labels.parent))
        best = int(np.argmin(labels.seconds))
        choice = self._given.copy()
        label = best
        for i, (options, parents) in zip(self._free[::-1], reversed(steps), strict=True):
            choice[i], label = options[label], parents[label]
        return Found(choice=choice, bound=min(dropped, float(labels.seconds[best])), work=work)

    def _expanded(self, labels: _Labels, t: int) -> _Labels:
        """Every label with every option of block t, on to the end of the stretch behind it."""
        i, options, stretches = self._free[t], self._options[t], self._stretches
        instance, regret = self._instance, self._relaxation.regret
        held = (labels.held[:, None] + instance.held[options, i]).ravel()
        peak = held + np.tile(instance.working[options, i], len(labels.held)) + stretches.before[t]
        slack = stretches.price[t] * (instance.capacity - peak)
        slack += stretches.priced_slack[t + 1] - stretches.stretch_price[t + 1] * held
        error = (labels.error[:, None] + instance.error[options, i]).ravel()
        if t == len(self._free) - 1:
            slack += self._relaxation.error_price * (self._most_error[-1] - error)
        return _Labels(
            held=held,
            error=error,
            peak=peak,
            seconds=(labels.seconds[:, None] + instance.seconds[options, i]).ravel(),
            bound=(labels.bound[:, None] + regret[options, i]).ravel() + slack,
            option=np.tile(options, len(labels.held)),
            parent=np.repeat(np.arange(len(labels.held)), len(options)),
        )

    def _kept(self, labels: _Labels, t: int, below: float) -> Ints:
        """The labels to go on with."""
        fits = (labels.peak <= self._instance.capacity) & (labels.held <= self._most_held[t + 1])
        fits &= labels.error <= self._most_error[t + 1]
        if t == len(self._free) - 1:
            fits &= labels.seconds < below
        alive = np.flatnonzero(fits & (labels.bound < below))
        return alive[_not_dominated(labels.held[alive], labels.error[alive], labels.seconds[alive])]

    def _widest(self, labels: _Labels, t: int, kept: Ints) -> tuple[Ints, Ints]:
        """As many labels as the width allows, and the others: half by bound, half also by how near the course they are.

        Far from the course, slack is left at the end, which the bound of a partial plan does not know yet.
        """
        bound = labels.bound[kept]
        held = self._byte_price * np.abs(labels.held[kept] - self._held_course[t])
        error = self._relaxation.error_price * np.abs(labels.error[kept] - self._error_course[t])
        by_bound = np.argsort(bound, kind="stable")
        near, far = by_bound[: self._width // 2], by_bound[self._width // 2 :]
        far = far[np.argsort((bound + held + error)[far], kind="stable")]
        room = self._width - len(near)
        return kept[np.concatenate([near, far[:room]])], kept[far[room:]]

    def _latest_fits(self) -> list[int]:
        """The most that free blocks may hold before stretch t, so that everything behind can still fit."""
        instance, stretches = self._instance, self._stretches
        most = [instance.capacity - int(stretches.most[-1])]
        for t in range(len(self._free) - 1, -1, -1):
            i, options = self._free[t], self._options[t]
            held = instance.held[options, i]
            own = instance.capacity - int(stretches.before[t]) - held - instance.working[options, i]
            behind = int(np.minimum(own, most[-1] - held).max(initial=-_NEVER))
            most.append(min(behind, instance.capacity - int(stretches.most[t])))
        return most[::-1]

    def _error_left(self) -> list[int]:
        """The most error that free blocks may have taken before stretch t."""
        error = take(self._instance.error, self._given)
        error[self._free] = 0
        left = [self._instance.tolerance - int(error.sum())]
        for t in range(len(self._free) - 1, -1, -1):
            least = self._instance.error[self._options[t], self._free[t]].min(initial=_NEVER)
            left.append(left[-1] - int(least))
        return left[::-1]


class _Stretches:
    """The runs of given blocks before, between and behind the free ones, [free + 1] each."""

    def __init__(self, instance: Instance, relaxation: Relaxation, given: Choice, free: Ints) -> None:
        held = take(instance.held, given)
        held[free] = 0
        total = np.cumsum(held)
        peak = total + take(instance.working, given)
        peak[free] = -_NEVER
        prices = relaxation.peak_prices.copy()
        self.price = prices[free]
        prices[free] = 0.0
        slack = prices * np.where(prices > 0, instance.capacity - peak, 0)
        # A stretch starts at its free block, which adds nothing, so that none is empty; the first starts at block 0.
        starts = np.concatenate([[0], free])
        self.before = total[free]
        self.tail = total[-1] - total[free[-1]]
        self.most = np.maximum.reduceat(peak, starts)
        self.priced_slack = np.add.reduceat(slack, starts)
        self.stretch_price = np.add.reduceat(prices, starts)
        if len(free) and free[0] == 0:
            self.most[0], self.priced_slack[0], self.stretch_price[0] = -_NEVER, 0.0, 0.0
        seconds, regret = take(instance.seconds, given), take(relaxation.regret, given)
        seconds[free] = regret[free] = 0.0
        self.seconds, self.regret = float(seconds.sum()), float(regret.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Labels:
    """Partial plans, [labels] each; ``held`` and ``error`` are of the free blocks alone."""

    held: Ints
    error: Ints
    peak: Ints
    seconds: Floats
    bound: Floats
    option: Ints
    parent: Ints

    @classmethod
    def start(cls, stretches: _Stretches, bound: float) -> _Labels:
        zero = np.zeros(1, dtype=np.int64)
        bounds = np.array([bound + stretches.regret + stretches.priced_slack[0]])
        seconds = np.array([stretches.seconds])
        return cls(held=zero, error=zero, peak=zero, seconds=seconds, bound=bounds, option=zero, parent=zero)

    def only(self, kept: Ints) -> _Labels:
        return _Labels(**{name: values[kept] for name, values in vars(self).items()})


def _course(given: Ints, end: int) -> Floats:
    """What the given plan has taken by each free block, led to the limit in even steps."""
    taken = np.cumsum(given)
    course: Floats = taken + np.linspace(0, 1, len(taken) + 1)[1:] * (end - taken[-1])
    return course


def _not_dominated(held: Ints, error: Ints, seconds: Floats) -> Ints:
    """Labels without those that another is never worse than; where errors differ, not all of those are found."""
    if not len(held):
        return np.zeros(0, dtype=np.int64)
    order = np.lexsort((seconds, held))
    error, seconds = error[order], seconds[order]
    ascending = np.sort(error)
    levels = ascending[np.linspace(0, len(error) - 1, min(_ERROR_LEVELS, len(error))).astype(np.int64)]
    levels = levels[:1] if levels[0] == levels[-1] else levels
    best = np.minimum.accumulate(np.where(error[:, None] <= levels, seconds[:, None], np.inf), axis=0)
    own = np.searchsorted(levels, error[1:], side="right") - 1
    keeps = seconds[1:] < best[np.arange(len(own)), own]
    kept: Ints = order[np.concatenate([[True], keeps])]
    return kept
