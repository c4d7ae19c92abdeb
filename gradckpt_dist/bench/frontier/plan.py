"""Which systems are measured on which model, at what size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gradckpt_dist.bench.frontier.peers import BY_BUDGET
from gradckpt_dist.bench.frontier.setting import OURS, Setting, Size


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """One model's share of the bench.

    ``eager_peers`` and ``compiled_peers`` take no budget; eager ``keep`` is not among them. ``budget_peers`` run on
    compiled blocks at each of ``peer_budgets``. Ours runs at each of ``budgets``, with each of ``eager_tolerances``
    and ``compiled_tolerances``.
    """

    model: str
    eager_peers: tuple[str, ...]
    compiled_peers: tuple[str, ...]
    budget_peers: tuple[str, ...]
    peer_budgets: tuple[float, ...]
    budgets: tuple[float, ...]
    eager_tolerances: tuple[float, ...]
    compiled_tolerances: tuple[float, ...]

    @property
    def reference(self) -> Setting:
        """What all others are compared with."""
        return Setting(system="keep", model=self.model)

    @property
    def compiled_extremes(self) -> tuple[Setting, Setting] | None:
        """Full recompute and ``keep`` of compiled blocks, where both are among the peers of ours on such blocks."""
        if not (self.compiled_tolerances and {"keep", "recompute"} <= set(self.compiled_peers)):
            return None
        full, keep = (Setting(system=system, model=self.model, compiled=True) for system in ("recompute", "keep"))
        return full, keep

    def peers(self) -> Iterator[Setting]:
        """All but the reference."""
        for system in self.eager_peers:
            yield Setting(system=system, model=self.model)
        for system in self.compiled_peers:
            yield Setting(system=system, model=self.model, compiled=True)
        for system in self.budget_peers:
            for budget in self.peer_budgets:
                yield Setting(system=system, model=self.model, compiled=True, budget=budget)

    def ours(self) -> Iterator[Setting]:
        """One setting for each tolerance and kind of block, without a budget or a mask yet."""
        for compiled, tolerances in ((False, self.eager_tolerances), (True, self.compiled_tolerances)):
            for tolerance in tolerances:
                yield Setting(system=OURS, model=self.model, compiled=compiled, tolerance=tolerance)


@dataclass(frozen=True, kw_only=True)
class FrontierPlan:
    """``rounds`` of timed steps; at most ``group`` processes beside the reference's are alive at once."""

    size: Size
    rounds: int
    group: int
    models: tuple[ModelPlan, ...]


_TENTHS = tuple(tenth / 10 for tenth in range(11))
_EAGER_PEERS = ("recompute", "every_2", "every_3", "every_4", "pytorch_sac", "torchtitan_full", "torchtitan_selective")

_SIZE = Size(width=512, context=128, batch=8, layers=6, head_width=64)

# Two hours on one core of 2026. Of ours on compiled blocks, what the bars ask for.
FULL = FrontierPlan(
    size=_SIZE,
    rounds=20,
    group=30,
    models=tuple(
        ModelPlan(
            model=model,
            eager_peers=_EAGER_PEERS,
            compiled_peers=("keep", "recompute"),
            budget_peers=BY_BUDGET,
            peer_budgets=_TENTHS,
            budgets=_TENTHS,
            eager_tolerances=(0.0, 0.01, 0.05),
            compiled_tolerances=compiled_tolerances,
        )
        for model, compiled_tolerances in (("demo", (0.0, 0.05)), ("uneven", (0.0,)))
    ),
)

# About an hour.
COARSE = FrontierPlan(
    size=_SIZE,
    rounds=30,
    group=30,
    models=(
        ModelPlan(
            model="demo",
            eager_peers=_EAGER_PEERS,
            compiled_peers=("keep", "recompute"),
            budget_peers=("compile_budget",),
            peer_budgets=(0.0, 0.3, 0.6),
            budgets=(0.0, 0.3, 0.6),
            eager_tolerances=(0.0, 0.05),
            compiled_tolerances=(0.0, 0.05),
        ),
        ModelPlan(
            model="uneven",
            eager_peers=_EAGER_PEERS,
            compiled_peers=(),
            budget_peers=(),
            peer_budgets=(),
            budgets=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
            eager_tolerances=(0.0, 0.05),
            compiled_tolerances=(),
        ),
    ),
)

# Most of an hour: at full recompute's peak alone, where blocks compute twice as much for each byte that they hold.
WIDE = FrontierPlan(
    size=replace(_SIZE, width=1024),
    rounds=20,
    group=30,
    models=(
        ModelPlan(
            model="demo",
            eager_peers=("recompute", "torchtitan_full"),
            compiled_peers=("keep", "recompute"),
            budget_peers=("compile_budget",),
            peer_budgets=(0.0,),
            budgets=(0.0,),
            eager_tolerances=(0.05,),
            compiled_tolerances=(0.05,),
        ),
    ),
)

QUICK = FrontierPlan(
    size=Size(width=128, context=64, batch=4, layers=2, head_width=32),
    rounds=3,
    group=30,
    models=(
        ModelPlan(
            model="demo",
            eager_peers=("recompute", "pytorch_sac", "torchtitan_selective"),
            compiled_peers=(),
            budget_peers=("torchtitan_budget",),
            peer_budgets=(0.5,),
            budgets=(0.0, 1.0),
            eager_tolerances=(0.0, 0.05),
            compiled_tolerances=(),
        ),
        ModelPlan(
            model="uneven",
            eager_peers=(),
            compiled_peers=(),
            budget_peers=(),
            peer_budgets=(),
            budgets=(0.5,),
            eager_tolerances=(0.0,),
            compiled_tolerances=(),
        ),
    ),
)
