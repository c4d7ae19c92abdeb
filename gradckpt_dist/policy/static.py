"""``static``: the baselines, and what a user can pin."""

from __future__ import annotations

from gradckpt_dist.policy.base import Evidence, Plan, Policy


class StaticPolicy(Policy):
    """Recompute none (``every_n`` 0), all (1), or every n-th block, the first one included."""

    name = "static"

    def __init__(self, every_n: int) -> None:
        self._every_n = every_n

    def initial(self, blocks: int) -> tuple[str, ...]:
        n = self._every_n
        return tuple("recompute" if n and i % n == 0 else "keep" for i in range(blocks))

    def plan(self, evidence: Evidence) -> Plan:
        return Plan(storages=self.initial(len(evidence.current)), theta=None, reason=f"static, every_n {self._every_n}")
