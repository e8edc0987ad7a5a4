"""What all pages share: templates, the stylesheet, and how a page gets to the disk."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tailrace.harness.errors import StorageError
from tailrace.reports.svg import palette_css
from tailrace.reports.text import printable, tied


def render(template: str, **content: Any) -> str:
    """A page from a template of this folder, everything in it escaped; ``style`` is there besides."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: (files("tailrace.reports") / name).read_text(encoding="utf-8")),
    )
    environment.filters["tied"] = tied
    style = Markup(_stylesheet())  # noqa: S704 - our own file
    return printable(environment.get_template(template).render(style=style, **content))


def write_page(page: str, path: Path) -> Path:
    """Write a page by rename, and return its path. Raises :class:`StorageError`."""
    staged = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("w", encoding="utf-8", newline="\n") as handle:
            handle.write(page)
            handle.flush()
            os.fsync(handle.fileno())
        staged.replace(path)
    except OSError as error:
        raise StorageError.of(path, error) from error
    return path


def _stylesheet() -> str:
    sheet = (files("tailrace.reports") / "report.css").read_text(encoding="utf-8")
    dark = f"@media screen and (prefers-color-scheme: dark){{:root{{{palette_css(dark=True)}}}}}"
    return f":root{{{palette_css(dark=False)}}}\n{dark}\n{sheet}"
