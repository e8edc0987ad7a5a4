"""Fewer points with the same look, for lines longer than a screen is wide."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def largest_triangles(x: NDArray[np.float64], y: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Indices of at most ``most`` (≥ 3) of ``n`` points: ends kept, of each bucket between the point that spans the
    largest triangle with the one kept before and the mean of the next bucket.

    ``x`` and ``y`` have shape (n,) and are finite. (LTTB: Steinarsson, Downsampling Time Series for Visual
    Representation, 2013.)
    """
    n = len(x)
    if n <= most:
        return np.arange(n)
    edges = np.linspace(1, n - 1, most - 1).astype(np.int64)
    kept = [0]
    for i in range(most - 2):
        begin, end = edges[i], edges[i + 1]
        following = slice(end, edges[i + 2]) if i + 2 < len(edges) else slice(n - 1, n)
        ahead_x, ahead_y = x[following].mean(), y[following].mean()
        last = kept[-1]
        area = np.abs((x[last] - ahead_x) * (y[begin:end] - y[last]) - (x[last] - x[begin:end]) * (ahead_y - y[last]))
        kept.append(int(begin + np.argmax(area)))
    return np.array([*kept, n - 1])
