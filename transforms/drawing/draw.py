"""A picture of a model or graph with its DropConnect sites marked, laid out and drawn by Graphviz."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from torch import fx, nn

from surgery import apply_dropconnect, strip_dropconnect
from surgery.base.files import whole_file
from surgery.spec.plan import Plan

from ..capture.capture import capture
from ..capture.untouched import plain
from .diagram import Diagram
from .dot import FONT, INK, MUTED, dot
from .module_diagram import module_diagram
from .node_diagram import node_diagram
from .outline import describe, outline

Detail = Literal["modules", "nodes"]

_SANS = "system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif"
_MARGIN = 20
_GAP = 126
"""Room between two panels for the arrow and the verb."""
_HEADER = 52
_MANY = 60
"""Graphs of more nodes than this are drawn by module unless asked otherwise."""


def draw(
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    plan: Plan | None = None,
    example_inputs: Any = None,
    detail: Detail | None = None,
) -> str:
    """A picture of a model with its DropConnect sites marked.

    Args:
        model: plain or operated, or a `torch.fx.GraphModule`. Not changed.
        path: where to write the picture too, as SVG whatever the name is. A file that is there is
            replaced (`surgery draw` refuses); the new one appears whole or not at all.
        plan: mark these sites instead of those in place: what `apply_dropconnect` would do.
        example_inputs: for `surgery.transforms.capture`, which finds out what feeds what.
        detail: `"modules"` draws the modules that hold weights or compute, and the operations that
            join two flows, with equal layers drawn once. `"nodes"` draws every node of a
            `GraphModule`, the default for one that is not large.

    Returns:
        the text of an SVG file, the same for the same model.

    Raises:
        ImportError: Graphviz is missing.
        CaptureError: it cannot be found out what feeds what; the message says what to give.
        ValueError: `detail="nodes"` for a model that is not a graph.
        OSError: the file cannot be written.
    """
    panel = _panel(model, plan, example_inputs, detail, {})
    return _written(_sheet([panel], [], []), path)


def draw_states(
    model: nn.Module,
    plan: Plan,
    path: str | os.PathLike[str] | None = None,
    *,
    example_inputs: Any = None,
    detail: Detail | None = None,
    titles: Sequence[str] = ("before", "operated", "stripped"),
    captions: Sequence[str] = (
        "the model as it is",
        "a fresh mask at every forward",
        "the same model, bit for bit",
    ),
) -> str:
    """Three pictures side by side: the model, with the plan in place, and stripped again.

    The plan is really carried out and taken out again.

    Args:
        model: a model without DropConnect; it is so again afterwards.
        plan: from `plan_dropconnect`.
        titles, captions: what stands above each of the three.

    The other arguments, the result and the errors are those of `draw` and `apply_dropconnect`.
    """
    room = {name: describe(site.config) for site in plan for name in (site.name, *site.shared_with)}
    panels = [_panel(model, None, example_inputs, detail, room)]
    apply_dropconnect(model, plan)
    try:
        panels.append(_panel(model, None, example_inputs, detail, room))
    finally:
        strip_dropconnect(model)
    panels.append(_panel(model, None, example_inputs, detail, room))
    return _written(_sheet(panels, titles, captions), path)


def _written(picture: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        with whole_file(Path(path)) as temporary:
            Path(temporary).write_text(picture, encoding="utf-8")
    return picture


class _Panel:
    """What Graphviz drew: elements of an SVG, and their size in points."""

    def __init__(self, svg: str) -> None:
        size = re.search(r'<svg width="([\d.]+)pt" height="([\d.]+)pt"', svg)
        body = re.search(r"<g id=\"graph0\".*</g>", svg, re.DOTALL)
        assert size is not None
        assert body is not None
        self.width, self.height = float(size[1]), float(size[2])
        drawn = re.sub(r"<!--.*?-->\n", "", body[0], flags=re.DOTALL)
        self.body = re.sub(r'(<g) id="[^"]*"', r"\1", drawn)


def _panel(
    model: nn.Module,
    plan: Plan | None,
    example_inputs: Any,
    detail: Detail | None,
    room: Mapping[str, str],
) -> _Panel:
    graphviz = _graphviz()
    diagram = _diagram(model, plan, example_inputs, detail)
    svg = graphviz.AGraph(string=dot(diagram, room)).draw(format="svg", prog="dot")
    return _Panel(svg.decode())


def _graphviz() -> Any:
    try:
        return importlib.import_module("pygraphviz")
    except ImportError as error:
        raise ImportError(
            "pictures are drawn by Graphviz, which pygraphviz brings: "
            "pip install 'dropconnect-surgery[draw]'"
        ) from error


def _diagram(
    model: nn.Module, plan: Plan | None, example_inputs: Any, detail: Detail | None
) -> Diagram:
    if detail not in (None, "modules", "nodes"):
        raise ValueError(f"detail must be 'modules' or 'nodes'; got {detail!r}")
    root = outline(model, plan)
    if isinstance(model, fx.GraphModule):
        if (detail or ("nodes" if len(model.graph.nodes) <= _MANY else "modules")) == "nodes":
            return node_diagram(model, root)
        return module_diagram(model, model, root)
    if detail == "nodes":
        raise ValueError(
            f"detail='nodes' draws a torch.fx.GraphModule, and {type(model).__name__} is none; "
            "give draw(capture(model, example_inputs)), or detail='modules'"
        )
    return plain(model, lambda: module_diagram(capture(model, example_inputs), model, root))


def _sheet(panels: Sequence[_Panel], titles: Sequence[str], captions: Sequence[str]) -> str:
    """A white card, which suits light and dark pages, with the panels side by side."""
    top = _MARGIN + (_HEADER if titles else 0)
    tallest = max(panel.height for panel in panels)
    parts: list[str] = []
    x = float(_MARGIN)
    for number, panel in enumerate(panels):
        y = top + (tallest - panel.height) / 2
        parts.append(f'<g transform="translate({x:g} {y:g})">\n{panel.body}\n</g>')
        if titles:
            middle = x + panel.width / 2
            parts.append(_text(middle, _MARGIN + 16, titles[number], 18, INK, "bold"))
            parts.append(_text(middle, _MARGIN + 37, captions[number], 13, MUTED))
        x += panel.width
        if number + 1 < len(panels):
            parts += _arrow(
                x, top + tallest / 2, ("apply_dropconnect", "strip_dropconnect")[number]
            )
            x += _GAP
    width, height = x + _MARGIN, top + tallest + _MARGIN
    card = (
        f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="10" '
        'fill="#ffffff" stroke="#d0d7de"/>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">'
    )
    return "\n".join([head, card, *parts, "</svg>\n"])


def _arrow(x: float, y: float, verb: str) -> list[str]:
    start, end = x + 10, x + _GAP - 10
    return [
        _text((start + end) / 2, y - 12, verb, 11, INK, "bold", FONT),
        f'<path d="M{start:g} {y:g}H{end - 9:g}" stroke="{INK}" stroke-width="2"/>',
        f'<path d="M{end:g} {y:g}l-11 -6v12z" fill="{INK}"/>',
    ]


def _text(
    x: float, y: float, text: str, size: int, color: str, weight: str = "normal", font: str = _SANS
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-family="{font}" font-size="{size}" '
        f'font-weight="{weight}" text-anchor="middle" fill="{color}">{escape(text)}</text>'
    )
