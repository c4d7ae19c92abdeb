"""What may go wrong in one short run, drawn from a seed, and how a rank brings it about."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradckpt_dist import Engine

STEPS = 14
POISONS = (float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 1e18, -1.0, -0.0)
FORMS = ("local", "coupled", "ddp")
"""No collectives but the plugin's; tensor-parallel ones within each block, at forward and backward; DDP's."""

HARMLESS = ("delays", "late decision", "sums", "maxima", "samples", "dropped samples", "full disk", "clock", "nothing")
"""All ranks go through to the end."""
DEADLY = ("kill", "terminate", "terminate by exit")
STOPPING = ("mask of one rank", "stuck", "step count", "corrupt broadcast", "corrupt receipt")
"""Ranks stop with an error."""
BY_OWN_ACCOUNT = ("mask of one rank", "step count")
"""The victim is out of step with the others, and names one of them."""
FAULTS = (*HARMLESS, *DEADLY, *STOPPING)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run."""

    seed: int
    fault: str
    form: str
    ranks: int
    victim: int
    step: int
    config: dict[str, Any]
    folder: str

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"folder": None}


def draw(seed: int, folder: Path) -> Plan:
    """The run of this seed; faults take turns."""
    chance = random.Random(seed)
    fault = FAULTS[seed % len(FAULTS)]
    ranks = chance.choice((2, 2, 3, 4))
    policy = chance.choice(("threshold", "threshold", "budget"))
    config: dict[str, Any] = {
        "policy": policy,
        "interval": chance.choice((2, 3, 4, 5)),
        "warmup_steps": chance.choice((0, 1, 2)),
        "memory_budget": chance.choice((0.2, 0.5, 0.8, "2GiB")),
        "agreement_timeout_s": 30.0 if fault in HARMLESS else 5.0,
        "log_level": "debug",
    }
    if policy == "threshold" and chance.random() < 0.5:
        config["threshold"] = {"quantile": chance.random()}
    return Plan(
        seed=seed,
        fault=fault,
        # Under the others a framework's own collective fails first, and with its own error.
        form="local" if fault in {*DEADLY, *STOPPING} and chance.random() < 0.8 else chance.choice(FORMS),
        ranks=ranks,
        victim=chance.randrange(ranks),
        step=chance.randrange(1, STEPS),
        config=config,
        folder=str(folder),
    )


def arrange(plan: Plan, engine: Engine, rank: int) -> Callable[[int], None]:
    """Prepare this rank; the result is called before each step."""
    chance = random.Random(plan.seed * 64 + rank)
    arrangements: dict[str, Callable[[], Callable[[int], None] | None]] = {
        "delays": lambda: lambda step: time.sleep(chance.random() * 0.1),
        "late decision": lambda: _late_decision(engine, chance),
        "sums": lambda: _poison(engine._observer, "take_sums", chance),
        "maxima": lambda: _poison(engine._observer, "take_maxima", chance),
        "samples": lambda: _poison_samples(engine, chance),
        "dropped samples": lambda: _drop_samples(engine, chance),
        "clock": lambda: _jump(plan.step, chance),
        "kill": lambda: _at(plan.step, lambda: os.kill(os.getpid(), signal.SIGKILL)),
        "terminate": lambda: _at(plan.step, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        "terminate by exit": lambda: _terminated_by_exit(plan.step),
        "mask of one rank": lambda: _at(plan.step, lambda: engine.set_mask(["keep"] * len(engine.mask))),
        "stuck": lambda: _at(plan.step, lambda: time.sleep(2 * plan.config["agreement_timeout_s"])),
        "step count": lambda: _at(plan.step, lambda: _miscount(engine)),
        "corrupt receipt": lambda: _corrupt(engine, "_finish", chance),
    }
    everywhere = plan.fault in {"delays", "late decision"}
    if plan.fault == "corrupt broadcast" and rank == 0:
        return _corrupt(engine, "_new_message", chance)
    if rank == plan.victim or everywhere:
        return arrangements.get(plan.fault, lambda: None)() or _nothing
    return _nothing


def full_disk(folder: Path, rank: int) -> str:
    """A folder whose event log is on a full device."""
    place = folder / f"log{rank}"
    place.mkdir()
    for name in ("gradckpt.jsonl", f"gradckpt.rank{rank}.jsonl"):
        (place / name).symlink_to("/dev/full")
    return str(place)


def _nothing(step: int) -> None: ...


def _at(when: int, act: Callable[[], Any]) -> Callable[[int], None]:
    return lambda step: act() if step == when else None


def _late_decision(engine: Engine, chance: random.Random) -> Callable[[int], None]:
    plan = engine._policy.plan

    def late(evidence: Any) -> Any:
        time.sleep(chance.random() * 0.2)
        return plan(evidence)

    engine._policy.plan = late
    return lambda step: time.sleep(chance.random() * 0.05)


def _poison(owner: Any, name: str, chance: random.Random) -> None:
    """Put a wrong number, or only wrong ones, into what this rank sends, in about half of the decisions."""
    take = getattr(owner, name)

    def poisoned(*args: Any) -> Any:
        values = take(*args)
        if chance.random() < 0.5:
            count = chance.choice((1, 3, len(values)))
            for position in chance.sample(range(len(values)), min(count, len(values))):
                values[position] = chance.choice(POISONS)
        return values

    setattr(owner, name, poisoned)


def _poison_samples(engine: Engine, chance: random.Random) -> None:
    impact = engine._observer.impact
    end_step = impact.end_step

    def poisoned() -> None:
        values = impact._step.values().view(-1)
        values[chance.randrange(len(values))] = chance.choice(POISONS)
        end_step()

    impact.end_step = poisoned


def _drop_samples(engine: Engine, chance: random.Random) -> None:
    impact = engine._observer.impact
    watch = impact.watch
    impact.watch = lambda *args: watch(*args) if chance.random() < 0.3 else None


def _jump(when: int, chance: random.Random) -> Callable[[int], None]:
    leap = chance.choice((-1e9, -60.0, 3600.0, 1e9))

    def jump(step: int) -> None:
        if step == when:
            wall, counter = time.time, time.perf_counter
            time.time, time.perf_counter = lambda: wall() + leap, lambda: counter() + leap

    return jump


def _terminated_by_exit(when: int) -> Callable[[int], None]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    return _at(when, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _miscount(engine: Engine) -> None:
    engine._step += 3


def _corrupt(engine: Engine, name: str, chance: random.Random) -> Callable[[int], None]:
    """Flip one bit of the broadcast, where it is sent or where it arrives."""
    agreement = engine._agreement
    call = getattr(agreement, name)

    def corrupted(*args: Any) -> Any:
        result = call(*args)
        if str(result.dtype) == "torch.uint8":
            result[chance.randrange(len(result))] ^= 1 << chance.randrange(8)
        return result

    setattr(agreement, name, corrupted)
    return _nothing
