"""A picture of a simulated search: what every setting's tail costs in replicas, and which settings nobody beats."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from tailrace.harness.analysis.frontier import non_dominated
from tailrace.harness.analysis.metrics import Floats
from tailrace.reports import svg
from tailrace.reports.page import write_page


def plot(mean_replicas: Floats, p99_ms: Floats, *, chosen: int | None, slo_ms: float, title: str, path: Path) -> Path:
    """Write an SVG of all settings (arrays of shape (n,)) with the frontier of few replicas against a short tail, the
    objective, and the setting that was ``chosen``. Settings without a finite p99 are left out. Raises
    :class:`StorageError`."""
    from matplotlib.ticker import LogLocator, NullLocator

    finite = np.isfinite(p99_ms)
    cost, tail = mean_replicas[finite], p99_ms[finite]
    on = non_dominated(cost, -tail)
    order = np.argsort(cost[on])
    with svg.style():
        canvas = svg.new_figure(320)
        ax = canvas.add_axes((0.12, 0.17, 0.85, 0.72))
        ax.scatter(cost[~on], tail[~on], s=9, color=svg.MUTED, alpha=0.35, lw=0, label="settings")
        ax.step(cost[on][order], tail[on][order], where="post", color=svg.colour(0), lw=1.3)
        ax.scatter(cost[on], tail[on], s=22, color=svg.colour(0), label="frontier")
        ax.axhline(slo_ms, color=svg.ALARM, lw=1, ls=(0, (2, 2)), label="objective")
        if chosen is not None:
            ax.scatter(
                [mean_replicas[chosen]], [p99_ms[chosen]], s=110, facecolors="none", edgecolors=svg.INK, label="chosen"
            )
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("replicas that are ready, on average")
        ax.set_ylabel("p99 response time, ms")
        ax.set_title(f"{title} (simulated)", loc="left", fontsize=12)
        ax.legend(frameon=False, fontsize=10, loc="upper right")
        drawn = io.StringIO()
        canvas.savefig(drawn, format="svg", metadata={"Date": None}, facecolor=svg.PAPER)
    return write_page(drawn.getvalue(), path)
