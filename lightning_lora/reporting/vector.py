# SPDX-License-Identifier: Apache-2.0
"""Figures as SVG inside a page: text stays text, and colours are the page's own, so that dark pages work too."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator
from typing import Any

#: Colours that people with any kind of colour vision tell apart (Okabe and Ito 2008), without yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_LINES = ("-", "--", ":")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextlib.contextmanager
def page_style(name: str) -> Iterator[None]:
    """Inside, matplotlib draws for a page; outside nothing has changed.

    Args:
        name: of the figure, different for each of a page.
    """
    import matplotlib
    from cycler import cycler

    values = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 11,
        "axes.prop_cycle": cycler(linestyle=_LINES) * cycler(color=COLOURS), "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    }  # fmt: skip
    with matplotlib.rc_context(values):
        yield


def svg_of(figure: Any, description: str) -> str:
    """The ``<svg>`` element of a figure, to be put into HTML as it is.

    Args:
        figure: any of matplotlib's, drawn inside `page_style`.
        description: for those who do not see it; text without markup.
    """
    from html import escape

    file = io.StringIO()
    # Without metadata: it names the program's site and the time.
    figure.savefig(file, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata.*?</metadata>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', text)
    opening = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{escape(description, quote=True)}">'
    text = opening + text[text.index(">") + 1 :]
    text = re.sub(r'<g id="[^"]*">', "<g>", text).replace("xlink:href", "href")
    text = re.sub(r"#000000\b", "currentColor", text).replace("#ffffff", "var(--page)")
    for number, colour in enumerate(COLOURS):
        text = text.replace(colour.lower(), f"var(--c{number})")  # the page has a lighter one for the dark
    return text
