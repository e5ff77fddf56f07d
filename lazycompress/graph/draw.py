"""Show what was located: branches as a table of text, or as a drawing of the model with its branches marked.

The drawing is one self-contained SVG. A block is a row: branches that follow one another in the graph and whose names
share the same numbered prefix. A row is a bar per branch in the order in which they run; its colour is the kind, its length
the multiply-accumulates. All rows share one scale, so that a glance tells where the work is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Protocol

from rich.table import Table

from ..report import render

#: Fill and text colour per kind; distinguishable without colour vision, readable on white and on black.
COLOURS = {
    "attention": ("#2f6db5", "#ffffff"),
    "joint-attention": ("#6a4fb3", "#ffffff"),
    "cross-attention": ("#1e9aa8", "#ffffff"),
    "mlp": ("#e8a33d", "#201500"),
    "parallel": ("#b9405e", "#ffffff"),
}

#: In every drawing: by it a file is known that may be drawn again.
MARK = "<!-- drawn by lazycompress -->"

_SHORT = {
    "attention": "attn",
    "joint-attention": "joint",
    "cross-attention": "cross",
    "mlp": "mlp",
    "parallel": "attn + mlp",
}

_STYLE = (
    "body{margin:16px auto;max-width:1000px;font:14px system-ui,sans-serif;color:#1b1f24;background:#fff}"
    "svg{max-width:100%;height:auto}table{border-collapse:collapse;margin:16px 20px}"
    "th,td{padding:2px 14px 2px 0;text-align:right}th{border-bottom:1px solid #afb8c1}"
    "td:first-child,td:nth-child(2),th:first-child,th:nth-child(2){text-align:left}p{margin:4px 20px;color:#57606a}"
)

_FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


class Drawable(Protocol):
    """What a table or a drawing needs to know of a branch."""

    name: str
    kind: str
    macs: int

    @property
    def streams(self) -> Sequence[object]: ...


def branches_table(branches: Sequence[Drawable], dense_macs: int | None = None) -> str:
    """The branches as text: name, kind, streams, MMACs, share of the model's multiply-accumulates.

    Args:
        branches: what `locate_branches` found.
        dense_macs: multiply-accumulates of the whole model per sample; without it, shares are of the branches' sum.
    """
    total = sum(branch.macs for branch in branches)
    whole = dense_macs or total or 1
    table = Table(title=f"{len(branches)} branches")
    for header, right in (("branch", False), ("kind", False), ("streams", True), ("MMACs", True), ("share", True)):
        table.add_column(header, justify="right" if right else "left", overflow="fold")
    for branch in branches:
        table.add_row(
            branch.name,
            branch.kind,
            str(len(branch.streams)),
            f"{branch.macs / 1e6:,.3f}",
            f"{branch.macs / whole:.1%}",
        )
    table.add_section()
    table.add_row("all branches", "", "", f"{total / 1e6:,.3f}", f"{total / whole:.1%}", style="bold")
    if dense_macs:
        rest = dense_macs - total
        table.add_row("everything else", "", "", f"{rest / 1e6:,.3f}", f"{rest / whole:.1%}")
    return render(table)


def blocks_of(branches: Sequence[Drawable]) -> list[tuple[str, list[Drawable]]]:
    """Branches in rows, in order: consecutive ones whose names agree up to and including their last number."""
    rows: list[tuple[str, list[Drawable]]] = []
    for branch in branches:
        match = re.match(r"^(.*?\b\d+)(?=\.|$)", branch.name)
        block = match.group(1) if match else branch.name
        if rows and rows[-1][0] == block:
            rows[-1][1].append(branch)
        else:
            rows.append((block, [branch]))
    return rows


def branches_svg(
    branches: Sequence[Drawable], title: str = "", dense_macs: int | None = None, reused: Sequence[float] | None = None
) -> str:
    """The model as a column of blocks with its branches marked: a self-contained SVG, to be read as it is or within HTML.

    Args:
        branches: what `locate_branches` found.
        title: what is written above, the model's name for instance.
        dense_macs: multiply-accumulates of the whole model per sample, for the shares in the heading.
        reused: share of runs reused per branch, drawn as a lighter part of its bar.
    """
    rows = blocks_of(branches)
    height = 22 if len(rows) <= 24 else 16
    gap, top, label, width = 4, 92, 250, 1000
    scale = (width - label - 110) / max((sum(b.macs for b in row) for _, row in rows), default=1)
    shares = dict(zip(map(id, branches), reused, strict=True)) if reused is not None else {}
    total = sum(branch.macs for branch in branches)
    whole = dense_macs or total or 1
    bottom = top + len(rows) * (height + gap) + 12
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {bottom}' width='{width}' height='{bottom}' "
        f"role='img' {_FONT}>",
        f"<title>{escape(title or 'branches')}</title>",
        f"<rect width='{width}' height='{bottom}' fill='#ffffff'/>",
        f"<text x='20' y='32' font-size='20' font-weight='600' fill='#1b1f24'>{escape(title)}</text>",
        f"<text x='20' y='54' font-size='13' fill='#57606a'>{len(branches)} branches in {len(rows)} blocks, "
        f"{_amount(total)} per sample"
        + (f", {total / whole:.1%} of the model" if dense_macs else "")
        + "; the longer a bar, the more work</text>",
    ]
    x = 20.0
    for kind in [kind for kind in COLOURS if any(branch.kind == kind for branch in branches)]:
        count = sum(branch.kind == kind for branch in branches)
        parts.append(f"<rect x='{x}' y='66' width='12' height='12' rx='2' fill='{COLOURS[kind][0]}'/>")
        parts.append(f"<text x='{x + 17}' y='76.5' font-size='12' fill='#1b1f24'>{kind} ({count})</text>")
        x += 40 + 7.2 * (len(kind) + 4)
    spine = label - 12
    parts.append(
        f"<line x1='{spine}' y1='{top - 4}' x2='{spine}' y2='{bottom - 10}' stroke='#afb8c1' stroke-width='2'/>"
    )
    for k, (block, row) in enumerate(rows):
        y = top + k * (height + gap)
        middle = y + height / 2
        size = 12 if height > 18 else 10.5
        parts.append(f"<circle cx='{spine}' cy='{middle}' r='3.2' fill='#57606a'/>")
        parts.append(
            f"<text x='{spine - 12}' y='{middle + size / 3:.1f}' font-size='{size}' text-anchor='end' fill='#1b1f24'>"
            f"{escape(_fit(block, 36))}</text>"
        )
        x = float(label)
        for branch in row:
            length = max(2.0, branch.macs * scale)
            parts.append(_bar(branch, x, y, length, height, size, branch.macs / whole, shares.get(id(branch))))
            x += length
        amount = _amount(sum(branch.macs for branch in row))
        parts.append(
            f"<text x='{width - 16}' y='{middle + size / 3:.1f}' font-size='{size}' text-anchor='end' fill='#57606a'>"
            f"{amount}</text>"
        )
    parts.append("</svg>")
    return "\n".join([parts[0], MARK, *parts[1:]]) + "\n"


def branches_html(
    branches: Sequence[Drawable], title: str = "", dense_macs: int | None = None, notes: Sequence[str] = ()
) -> str:
    """A self-contained page: the drawing, the branches as a table, and what there is to note."""
    whole = dense_macs or sum(branch.macs for branch in branches) or 1
    rows = [
        f"<tr><td>{escape(branch.name)}</td><td>{escape(branch.kind)}</td><td>{len(branch.streams)}</td>"
        f"<td>{branch.macs / 1e6:,.3f}</td><td>{branch.macs / whole:.1%}</td></tr>"
        for branch in branches
    ]
    lines = [
        "<!doctype html>",
        f"<html lang='en'><head><meta charset='utf-8'><title>{escape(title or 'branches')}</title><style>{_STYLE}</style>"
        "</head><body>",
        branches_svg(branches, title, dense_macs),
        *(f"<p>{escape(note)}</p>" for note in notes),
        "<table><thead><tr><th>branch</th><th>kind</th><th>streams</th><th>MMACs</th><th>share</th></tr></thead><tbody>",
        *rows,
        "</tbody></table></body></html>",
    ]
    return "\n".join(lines) + "\n"


def _bar(
    branch: Drawable, x: float, y: float, length: float, height: float, size: float, share: float, reused: float | None
) -> str:
    fill, ink = COLOURS.get(branch.kind, ("#8c959f", "#ffffff"))
    streams = len(branch.streams)
    length = max(1.0, length - 2)  # the gap to the next one
    tip = f"{branch.name}: {branch.kind}, {streams} stream{'s' * (streams > 1)}, {_amount(branch.macs)}, {share:.1%}"
    parts = [f"<g><title>{escape(tip + ('' if reused is None else f', reused {reused:.0%}'))}</title>"]
    parts.append(f"<rect x='{x:.1f}' y='{y}' width='{length:.1f}' height='{height}' rx='3' fill='{fill}'/>")
    if reused:
        part = length * min(1.0, reused)
        parts.append(
            f"<rect x='{x + length - part:.1f}' y='{y}' width='{part:.1f}' height='{height}' rx='3' fill='#ffffff' "
            "fill-opacity='0.6'/>"
        )
    text = _SHORT.get(branch.kind, branch.kind)
    texts = [f"{text}, {streams} streams", text] if streams > 1 else [text]
    text = next((t for t in texts if length - 10 > len(t) * size * 0.56), "")
    if text:
        parts.append(
            f"<text x='{x + 6:.1f}' y='{y + height / 2 + size / 3:.1f}' font-size='{size}' fill='{ink}'>{text}</text>"
        )
    return "".join([*parts, "</g>"])


def _fit(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[-(length - 1) :]


def _amount(macs: int) -> str:
    for factor, unit in ((10**12, "TMACs"), (10**9, "GMACs"), (10**6, "MMACs"), (10**3, "kMACs")):
        if macs >= factor:
            return f"{macs / factor:,.3g} {unit}"
    return f"{macs} MACs"
