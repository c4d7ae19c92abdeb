"""What trackers of training runs are told: one number a name."""

from __future__ import annotations

from collections import Counter

from gradckpt_dist.engine import Engine

PREFIX = "gradckpt/"

_COUNTS = ("epoch", "decisions", "plugin_seconds")
_ONCE_KNOWN = (
    "held_bytes",
    "measured_peak_bytes",
    "process_peak_bytes",
    "predicted_process_peak_bytes",
    "relative_error_predicted",
    "theta",
)


def figures_of(engine: Engine) -> dict[str, float]:
    """How many blocks have each storage, and of ``Engine.stats`` what is one number and known by now."""
    stats = engine.stats()
    blocks = Counter(stats["mask"])
    figures = {f"blocks_{storage}": blocks[storage] for storage in engine.config.storages}
    figures |= {name: stats[name] for name in _COUNTS}
    figures |= {name: stats[name] for name in _ONCE_KNOWN if stats[name]}
    return {f"{PREFIX}{name}": value for name, value in figures.items()}
