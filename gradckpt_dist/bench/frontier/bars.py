"""What the rows come to: this package against the best peer that needs no more memory.

Rows of eager blocks are compared with eager peers, rows of compiled blocks with compiled peers; each model by itself. A
peer *fits* a number of bytes if its peak is at most 2 % above it: resident bytes are not repeatable to less, and the
benefit of the doubt is the peer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradckpt_dist.bench.frontier.peers import BY_BUDGET
from gradckpt_dist.bench.frontier.setting import OURS

Row = Mapping[str, Any]

SLACK = 1.02
AHEAD = 0.95
LOSSY_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One model with eager or compiled blocks. None where the rows for a figure are missing.

    - ``share_of_full_recompute_cost``: among ours at ``gradient_tolerance`` 0.05 that fit full recompute's peak, the
      least step time; of it, what is added to ``keep``'s, divided by what full recompute adds.
    - ``budget_peer_share``: the same of the peers that take a memory budget. ``…_of_eager_cost``, both: with eager
      ``keep`` and eager full recompute for the scale, but the peak still that of full recompute on such blocks.
    - ``worst_against_best_peer``: over our exact rows, the largest of (our step time / that of the fastest peer that
      fits our peak) - 1. Positive is slower. A row where no peer fits is not compared.
    - ``budgets_ahead``: at how many of ``budgets`` ours is at least 5 % faster than that peer. ``budgets_compared`` of
      them have such a peer; the others are not ahead.
    """

    model: str
    compiled: bool
    share_of_full_recompute_cost: float | None
    budget_peer_share: float | None
    share_of_eager_cost: float | None
    budget_peer_share_of_eager_cost: float | None
    worst_against_best_peer: float | None
    budgets_ahead: int
    budgets_compared: int
    budgets: int


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """A comparison for each model and kind of block that the rows have."""
    kinds = dict.fromkeys((row["model"], row["compiled"]) for row in rows)
    return [_compare_kind(rows, model, compiled) for model, compiled in kinds]


def headline(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The figures at the top of the record.

    ``share_of_full_recompute_cost`` and ``worst_against_best_peer`` are the worst of all comparisons. ``budgets_ahead``
    is a share of the budgets, 0 to 1, on the uneven model with eager blocks.
    """
    shares = [one.share_of_full_recompute_cost for one in comparisons]
    against = [one.worst_against_best_peer for one in comparisons]
    uneven = [one for one in comparisons if one.model == "uneven" and not one.compiled and one.budgets]
    return {
        "share_of_full_recompute_cost": max((share for share in shares if share is not None), default=None),
        "worst_against_best_peer": max((ratio for ratio in against if ratio is not None), default=None),
        "budgets_ahead": uneven[0].budgets_ahead / uneven[0].budgets if uneven else None,
        "comparisons": [asdict(one) for one in comparisons],
    }


def _compare_kind(rows: Sequence[Row], model: str, compiled: bool) -> Comparison:
    here = [row for row in rows if row["model"] == model]
    kind = [row for row in here if row["compiled"] == compiled]
    exact_ours = [row for row in kind if row["system"] == OURS and row["tolerance"] == 0]
    lossy_ours = [row for row in kind if row["system"] == OURS and row["tolerance"] == LOSSY_TOLERANCE]
    peers = [row for row in kind if row["system"] != OURS]
    budget_peers = [row for row in peers if row["system"] in BY_BUDGET]
    scale = _Scale.of(kind)
    eager_scale = _Scale.of(row for row in here if not row["compiled"])
    peak = None if scale is None else scale.full_peak_bytes
    against = [ratio for row in exact_ours if (ratio := _against_best(row, peers)) is not None]
    return Comparison(
        model=model,
        compiled=compiled,
        share_of_full_recompute_cost=_share(lossy_ours, scale, peak),
        budget_peer_share=_share(budget_peers, scale, peak),
        share_of_eager_cost=_share(lossy_ours, eager_scale, peak),
        budget_peer_share_of_eager_cost=_share(budget_peers, eager_scale, peak),
        worst_against_best_peer=max((ratio - 1 for ratio in against), default=None),
        budgets_ahead=sum(ratio <= AHEAD for ratio in against),
        budgets_compared=len(against),
        budgets=len(exact_ours),
    )


@dataclass(frozen=True)
class _Scale:
    """Keeping all, and recomputing all."""

    keep_ratio: float
    full_ratio: float
    full_peak_bytes: int

    @classmethod
    def of(cls, rows: Iterable[Row]) -> _Scale | None:
        by_system = {row["system"]: row for row in rows}
        if not {"keep", "recompute"} <= set(by_system):
            return None
        full = by_system["recompute"]
        return cls(by_system["keep"]["step_ratio"], full["step_ratio"], full["peak_bytes"])


def _share(rows: Sequence[Row], scale: _Scale | None, peak_bytes: int | None) -> float | None:
    if scale is None or peak_bytes is None or scale.full_ratio <= scale.keep_ratio:
        return None
    ratio = _fastest_that_fits(rows, peak_bytes)
    return None if ratio is None else (ratio - scale.keep_ratio) / (scale.full_ratio - scale.keep_ratio)


def _against_best(row: Row, peers: Sequence[Row]) -> float | None:
    best = _fastest_that_fits(peers, row["peak_bytes"])
    return None if best is None else float(row["step_ratio"]) / best


def _fastest_that_fits(rows: Iterable[Row], peak_bytes: int) -> float | None:
    return min((float(row["step_ratio"]) for row in rows if row["peak_bytes"] <= SLACK * peak_bytes), default=None)
