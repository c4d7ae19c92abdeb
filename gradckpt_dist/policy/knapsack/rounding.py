"""From the relaxation's mixture of choices to one choice, and the blocks worth a second look."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradckpt_dist.cost.table import Choice
from gradckpt_dist.policy.knapsack.instance import Floats, Instance, Ints
from gradckpt_dist.policy.knapsack.relaxation import Relaxation


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounded:
    """A choice near the mixture, which may exceed a limit by little; ``order``: blocks, the least certain first."""

    choice: Choice
    order: Ints


def round_mixture(instance: Instance, relaxation: Relaxation) -> Rounded:
    """Blocks on which all mixed choices agree have their option; the others are grouped by what the choices give them.

    In a group, such as identical blocks at a tie, each option gets its share of blocks. The options that hold least go
    to the earliest blocks: what late blocks hold is free again when early ones are in backward.
    """
    choice = relaxation.choices[np.argmax(relaxation.weights)].copy()
    sure = _second_best(relaxation.regret)
    differing = np.flatnonzero((relaxation.choices != relaxation.choices[0]).any(axis=0))
    if len(differing):
        codes = _codes(relaxation.choices[:, differing], len(instance.seconds))
        for code in np.unique(codes):
            members = differing[codes == code]
            options = relaxation.choices[:, members[0]]
            lean_first = np.lexsort((options, instance.held[options, members[0]]))
            edges = np.cumsum(relaxation.weights[lean_first]) * len(members)
            places = np.arange(len(members)) + 0.5
            choice[members] = options[lean_first][np.minimum(np.searchsorted(edges, places), len(edges) - 1)]
            # Certain by their distance from where the option changes, and less than any block that is not at a tie.
            distance = np.abs(places[:, None] - edges[None, :-1]).min(axis=1, initial=len(members))
            sure[members] = -1.0 / (1.0 + distance)
    return Rounded(choice=choice, order=np.argsort(sure, kind="stable"))


def _second_best(regret: Floats) -> Floats:
    if len(regret) == 1:
        return np.full(regret.shape[1], np.inf)
    second: Floats = np.partition(regret, 1, axis=0)[1]
    return second


def _codes(choices: Choice, options: int) -> Ints:
    """One number for each column of [mixed, blocks]; equal only for equal columns."""
    codes: Ints = choices[0].copy()
    for row in choices[1:]:
        codes = np.unique(codes * options + row, return_inverse=True)[1].astype(np.int64)
    return codes
