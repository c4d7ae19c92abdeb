"""The figure: peak bytes across, step-time ratio up, one line a system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradckpt_dist.bench.frontier.setting import OURS
from gradckpt_dist.errors import ConfigError

_NO_MATPLOTLIB = "the figure needs matplotlib; install the extra `bench`: pip install 'gradckpt_dist[bench]'"
_MIB = 2**20
_PANEL_INCHES = (5.2, 4.2)
_LEGEND_INCHES = 1.0


@dataclass(frozen=True)
class _Style:
    """A line's label and looks: colours of Okabe and Ito, told apart by marker and dashes too."""

    label: str
    colour: str
    marker: str
    dashes: str = "-"


_EVERY_N = "every_n"
_STYLES: dict[tuple[str, float], _Style] = {
    (OURS, 0.0): _Style("gradckpt, exact", "#0072B2", "o"),
    (OURS, 0.01): _Style("gradckpt, tolerance 0.01", "#009E73", "s"),
    (OURS, 0.05): _Style("gradckpt, tolerance 0.05", "#D55E00", "D"),
    (_EVERY_N, 0.0): _Style("recompute every n-th block (n = 1 to 4)", "#000000", "v", ":"),
    ("compile_budget", 0.0): _Style("torch.compile, memory budget", "#CC79A7", "^", "--"),
    ("torchtitan_budget", 0.0): _Style("torchtitan MemoryBudgetAC", "#E69F00", "<", "-."),
    ("pytorch_sac", 0.0): _Style("PyTorch selective checkpointing", "#56B4E9", "P"),
    ("torchtitan_selective", 0.0): _Style("torchtitan SelectiveAC", "#E69F00", "X"),
    ("torchtitan_full", 0.0): _Style("torchtitan FullAC", "#E69F00", ">"),
    ("keep", 0.0): _Style("keep all", "#000000", "*"),
}


def draw_frontier(result: Mapping[str, Any], path: Path) -> list[Path]:
    """Write ``path`` with the suffixes .png and .svg: a panel for each model with eager and with compiled blocks.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise ConfigError(_NO_MATPLOTLIB) from None
    rows = result["rows"]
    kinds = list(dict.fromkeys((row["model"], row["compiled"]) for row in rows))
    columns = min(2, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(
        figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines + _LEGEND_INCHES), layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, (model, compiled) in zip(panels, kinds, strict=False):
        here = [row for row in rows if (row["model"], row["compiled"]) == (model, compiled)]
        _draw_panel(panel, f"{model} model, {'compiled' if compiled else 'eager'} blocks", here)
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    legend: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        legend = dict(zip(labels, handles, strict=True)) | legend
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    path.parent.mkdir(parents=True, exist_ok=True)
    for target in paths:
        figure.savefig(target, dpi=150)
    return paths


def _draw_panel(panel: Any, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    for key, style in _STYLES.items():
        line = sorted(_line(rows, *key), key=lambda row: (row["peak_bytes"], row["step_ratio"]))
        if not line:
            continue
        panel.plot(
            [row["peak_bytes"] / _MIB for row in line],
            [row["step_ratio"] for row in line],
            label=style.label,
            color=style.colour,
            marker=style.marker,
            linestyle=style.dashes if len(line) > 1 else "none",
            markersize=6,
            linewidth=1.4,
            alpha=0.85,
        )
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("peak of a step above parameters and gradients (MiB)")
    panel.set_ylabel("step time / eager keep")
    panel.grid(alpha=0.3, linewidth=0.5)


def _line(rows: Sequence[Mapping[str, Any]], system: str, tolerance: float) -> list[Mapping[str, Any]]:
    if system == _EVERY_N:
        return [row for row in rows if row["system"] == "recompute" or row["system"].startswith("every_")]
    return [row for row in rows if (row["system"], row["tolerance"]) == (system, tolerance)]
