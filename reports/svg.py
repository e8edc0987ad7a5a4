"""From matplotlib to inline SVG that belongs to the page: its fonts, its colours by day and night, its tooltips."""

from __future__ import annotations

import colorsys
import io
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID, PAPER = "#1f2a37", "#5d6875", "#d5dbe1", "#fefdfb"
ALARM, CAUTION = "#b3261e", "#8a5a00"
"""Colours of everything that is not a framework, as drawn; the page maps each to a variable of its theme."""
_THEME = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", ALARM: "alarm", CAUTION: "warn"}
_COLOURS = ("#949494", "#0173b2", "#56b4e9", "#de8f05", "#cc78bc", "#029e73", "#d55e00", "#ca9161")
"""Of frameworks by slot: seaborn's palette ``colorblind`` without its pink and its yellow, for they fade on paper."""
_PREFERRED_SLOTS = 6
_LIGHT, _DARK = 0.4, 0.64
"""Lightness at most on paper and at least in the dark, so that lines keep a contrast of 3 to 1 with either."""

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", _XLINK)

WIDTH = 420
"""Every figure is drawn this wide, in CSS pixels: a phone shows it whole, and a desktop sets two side by side."""


@cache
def palette() -> tuple[tuple[str, str], ...]:
    """Colours of frameworks by slot, as hexadecimal for light and dark pages."""
    # Takes a second, which only those who draw shall wait for; so too below.
    from matplotlib.colors import to_hex, to_rgb

    def at(colour: str, low: float, high: float) -> str:
        hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
        return to_hex(colorsys.hls_to_rgb(hue, min(max(lightness, low), high), saturation))

    return tuple((at(colour, 0, _LIGHT), at(colour, _DARK, 1)) for colour in _COLOURS)


def slots(names: Iterable[str]) -> dict[str, int]:
    """A colour for each framework: by its name, so that it keeps its colour from report to report, the next free slot
    where two names collide, and round again when there are more frameworks than colours."""
    chosen: dict[str, int] = {}
    size = len(_COLOURS)
    for name in sorted(set(names)):
        slot = zlib.adler32(name.encode()) % _PREFERRED_SLOTS
        if len(chosen) < size:
            while slot in chosen.values():
                slot = (slot + 1) % size
        chosen[name] = slot
    return chosen


def colour(slot: int) -> str:
    """The colour of a slot, as drawn."""
    return palette()[slot][0]


def palette_css(*, dark: bool) -> str:
    """The declarations of ``--s0`` … for the page's style."""
    return "".join(f"--s{slot}:{pair[dark]};" for slot, pair in enumerate(palette()))


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings while figures are drawn: quiet axes, text as text, the same bytes every time."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "tailrace",
        "text.parse_math": False,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "axes.labelcolor": MUTED,
        "axes.labelsize": 12,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "xtick.labelsize": 11.5,
        "ytick.labelsize": 11.5,
        "font.size": 12,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.axisbelow": True,
        "lines.solid_capstyle": "round",
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page's own fonts draw the text
        yield


def new_figure(height: float) -> Figure:
    """An empty figure, ``WIDTH`` × ``height`` CSS pixels, outside of pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH / 72, height / 72), dpi=72)


def few_ticks(most: int = 3) -> MaxNLocator:
    """Round ticks, whole numbers: two or three for a low panel."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True)


def inline(figure: Figure, *, name: str, alt: str, tooltips: Mapping[str, str] | None = None) -> Markup:
    """The figure as an ``<svg>`` element for an HTML page.

    ``name`` is unique in the page and becomes part of every id. ``alt`` is what a screen reader says.
    ``tooltips`` give artists, by their gid, a text to show on hover.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # The text was written by matplotlib a moment ago, with everything escaped.
    root = ET.fromstring(buffer.getvalue())  # noqa: S314
    for parent in root.iter():
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}metadata" or child.find(f"{{{_SVG}}}style") is not None:
                parent.remove(child)
    references = set(re.findall(r"#([\w.-]+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in root.iter():
        _adapt(element, name, references, tooltips or {})
    _unwrap(root)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704 - serialised with everything escaped


def _adapt(element: ET.Element, name: str, references: set[str], tooltips: Mapping[str, str]) -> None:
    identity = element.attrib.pop("id", "")
    if identity in tooltips:
        title = ET.Element(f"{{{_SVG}}}title")
        title.text = tooltips[identity]
        element.insert(0, title)
        element.set("class", "tip")
    elif identity in references:
        element.set("id", f"{name}-{identity}")
    for key, value in list(element.attrib.items()):
        if key == "style":
            element.set(key, _style(value))
        elif key == "d":
            element.set(key, re.sub(r"\s+", " ", re.sub(r"-?\d+\.\d+", _shorter, value)).strip())
        elif key in ("x", "y"):
            element.set(key, _round(value))
        elif key == "transform" and value.startswith("rotate(-0 "):
            del element.attrib[key]
        elif value.startswith("url(#"):
            element.set(key, f"url(#{name}-{value[5:]}")
        elif key == f"{{{_XLINK}}}href":
            element.set(key, f"#{name}-{value[1:]}")
    if element.tag not in (f"{{{_SVG}}}text", f"{{{_SVG}}}title"):
        element.text = None
    element.tail = None


def _shorter(match: re.Match[str]) -> str:
    return _round(match[0])


def _round(value: str) -> str:
    """Hundredths of a pixel are enough, and a third of the bytes."""
    return f"{float(value):.2f}".rstrip("0").rstrip(".")


def _style(value: str) -> str:
    value = re.sub(r"font-family:[^;]*;?\s*", "", value)
    value = re.sub(r"font: ((?:\w+ )*)([\d.]+px) [^;]*", r"font-size: \2", value)  # matplotlib before 3.10
    for drawn, variable in _mapping().items():
        value = value.replace(drawn, f"var(--{variable},{drawn})")
    return re.sub(r"([:;]) ", r"\1", value)


@cache
def _mapping() -> dict[str, str]:
    return {**_THEME, **{light: f"s{slot}" for slot, (light, _) in enumerate(palette())}}


def _unwrap(element: ET.Element) -> None:
    """Remove groups that group nothing: without attributes, or without children."""
    children: list[ET.Element] = []
    for child in list(element):
        _unwrap(child)
        if child.tag == f"{{{_SVG}}}g" and not child.attrib:
            children += list(child)
        elif child.tag != f"{{{_SVG}}}g" or len(child):
            children.append(child)
    element[:] = children
