"""The training that ``gradckpt bench impact`` looks into."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradckpt_dist.api import enable
from gradckpt_dist.bench.demo_model import load_text_model
from gradckpt_dist.bench.gradient_errors import GradientErrors, Sample
from gradckpt_dist.bench.impact_plans import Array
from gradckpt_dist.config import Config
from gradckpt_dist.policy import Evidence, Plan, Policy

EXTRA_SECONDS = {
    "keep": 0.0,
    "recompute": 0.37,
    "selective": 0.06,
    "selective_half": 0.15,
    "derive": 0.04,
    "compress8": 0.07,
    "compress6": 0.07,
    "compress4": 0.05,
    "selective8": 0.13,
    "selective6": 0.13,
    "selective4": 0.12,
}
"""Stated, as fractions of a block's step under ``keep``: about what `gradckpt bench storage` finds at d = 512.

Blocks so small that they learn within minutes are recomputed faster than they are quantised: by their own seconds no
plan would hold anything lossily.
"""
WARMUP_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Sizes of the bench; ``points`` are where metrics are compared, ``checks`` where the mask in force is."""

    steps: int
    layers: int
    width: int
    context: int
    batch: int
    interval: int
    points: int
    checks: int
    samples: int
    draws: int


class Training:
    """The demo's model, learning under the engine: policy ``budget``, metric ``probe``, all storages on offer."""

    def __init__(self, extent: Extent, *, memory_budget: float, gradient_tolerance: float) -> None:
        self._extent = extent
        text_model = load_text_model()
        self._text = text_model.read_text(None)
        sizes = {"context": extent.context, "width": extent.width, "layers": extent.layers}
        torch.manual_seed(0)
        self.model, twin = (
            text_model.GPT(vocabulary=self._text.vocabulary, heads=4, dropout=0.1, **sizes) for _ in range(2)
        )
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self._batches = torch.Generator().manual_seed(0)
        self._samples = torch.Generator().manual_seed(1)
        self.errors = GradientErrors(twin, loss)
        config = Config(
            memory_budget=memory_budget, gradient_tolerance=gradient_tolerance, interval=extent.interval, impact="probe"
        )
        self.engine = enable(self.model, config, optimizer=self._optimizer)
        self.engine._policy = StatedSeconds(self.engine._policy)
        self.steps = 0

    def advance(self, steps: int) -> None:
        """Train until so many steps are done."""
        while self.steps < steps:
            for group in self._optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (self.steps + 1) / WARMUP_STEPS)
            self._optimizer.zero_grad()
            loss(self.model, self._windows(self._batches)).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self.steps += 1

    def look(self) -> list[Sample]:
        """Bring the errors' twin to the weights as they are now; samples to compare gradients on."""
        self.errors.load(self.model.state_dict())
        return [
            Sample(batch=self._windows(self._samples), seed=self.steps * self._extent.samples + number)
            for number in range(self._extent.samples)
        ]

    def evidence(self) -> Evidence:
        """What the policy knows now, with the stated seconds."""
        return with_stated_seconds(self.engine._knowledge.evidence(self.engine.mask))

    def predicted(self, metric: str) -> Array:
        """[blocks, lossy]: the squared relative errors of the whole gradient that this metric makes of what is known.

        The metric in force gathers what the others read.
        """
        knowledge = self.engine._knowledge
        if knowledge.errors is None:
            return np.full((self.errors.blocks, 0), np.inf)
        return knowledge.errors.squared(metric, knowledge.running.mean_square)

    def _windows(self, generator: torch.Generator) -> Tensor:
        windows: Tensor = self._text.sample(self._extent.batch, self._extent.context, generator)
        return windows


class StatedSeconds(Policy):
    """A policy that goes by the stated seconds."""

    def __init__(self, policy: Policy) -> None:
        self.name = policy.name  # type: ignore[misc]
        self._policy = policy

    def plan(self, evidence: Evidence) -> Plan:
        return self._policy.plan(with_stated_seconds(evidence))


def with_stated_seconds(evidence: Evidence) -> Evidence:
    """The same evidence, but for the seconds of storages that serve a block."""
    costs = evidence.costs
    if costs is None:
        return evidence
    stated = np.array([EXTRA_SECONDS[name] for name in costs.storages])
    return replace(evidence, costs=replace(costs, extra_seconds=np.where(costs.serves, stated, np.inf)))


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss of the next characters (nats)."""
    return functional.cross_entropy(model(windows[:, :-1]), windows[:, 1:].flatten())
