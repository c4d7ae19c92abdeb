"""Where rank 0's policy thinks: beside a training step, so that the other ranks do not wait for it."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from gradckpt_dist.policy import Evidence, Plan, Policy


class PlanningDesk:
    """One plan at a time. NumPy lets go of Python's lock for most of it, as PyTorch does in training."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._plan: Future[Plan] | None = None

    def begin(self, policy: Policy, evidence: Evidence) -> None:
        """Start to plan."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gradckpt-planning")
        self._plan = self._worker.submit(policy.plan, evidence)

    def take(self) -> Plan | None:
        """The plan, waiting for it if need be; None if none was begun. What the policy raised is raised here."""
        plan, self._plan = self._plan, None
        return None if plan is None else plan.result()

    def close(self) -> None:
        """End the thread; a plan under way is finished and dropped."""
        if self._worker is not None:
            self._worker.shutdown()
        self._worker = self._plan = None
