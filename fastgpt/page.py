"""Parts of a report page: one HTML file that needs no network and runs no script.

Everything shown is escaped, since a model may well write ``<script>``; the page also forbids
scripts to itself.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from fastgpt.chart import Point, Series, legend, line_chart, smooth


def page(name: str, kicker: str, sections: Sequence[str]) -> str:
    """The page with ``name`` as its heading, ``kicker`` above it, and the non-empty sections."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    header = f"<header><p>{html_text(kicker)}</p><h1>{html_text(name)}</h1></header>"
    body = "\n".join(part for part in (header, *sections) if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html_text(name)} · fastgpt</title><style>{_STYLE}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """Figures in large print, each with a label and a note."""
    cells = [
        f"<div><dt>{html_text(label)}</dt><dd>{html_text(value)}<small>{html_text(note)}</small></dd></div>"
        for label, value, note in values
    ]
    return f'<dl class="tiles">{"".join(cells)}</dl>' if cells else ""


def charts(figures: Sequence[str]) -> str:
    """Figures side by side."""
    figures = [figure for figure in figures if figure]
    return f'<section class="charts">{"".join(figures)}</section>' if figures else ""


def columns(keys: Sequence[str], rows: Sequence[Mapping[str, Any]], *, css: str = "numbers") -> str:
    """A table with a line for each row; ``css`` is "numbers" or "texts"."""
    head = "".join(f"<th>{html_text(key)}</th>" for key in keys)
    lines = ["".join(f"<td>{html_text(value_text(r.get(key)))}</td>" for key in keys) for r in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def points(records: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) of the records that have a number under ``key``."""
    values = ((r["step"], r.get(key)) for r in records)
    return [(x, float(y)) for x, y in values if isinstance(y, int | float)]


def raw_and_smooth(name: str, points: list[Point], color: int = 0) -> list[Series]:
    """A curve; a long one faint, with its moving average over it."""
    if len(points) < 30:
        return [Series(name, points, color)]
    smoothed = Series(f"{name}, smoothed", smooth(points), color)
    return [Series(name, points, color, "faint"), smoothed]


def spreads(points: list[Point]) -> bool:
    """Whether a curve is better seen on a logarithmic axis."""
    values = [y for _, y in points if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) > 20 * median(values)


def figure(title: str, series: list[Series], *, log: bool = False, wide: bool = False) -> str:
    """A chart with its title; nothing when no curve has a point."""
    if not any(one.points for one in series):
        return ""
    width, height = (980, 320) if wide else (480, 220)
    chart = line_chart(series, label=title, log=log, width=width, height=height)
    key = legend(series) if len(series) > 1 else ""
    suffix = " (log scale)" if log else ""
    css = ' class="wide"' if wide else ""
    caption = f"<figcaption>{html_text(title + suffix)}{key}</figcaption>"
    return f'<figure{css}>{caption}<div class="plot">{chart}</div></figure>'


def facts_table(title: str, values: Mapping[str, Any]) -> str:
    """A section with a name and a value a line; nothing without values."""
    rows = [
        f'<tr><th scope="row">{html_text(key)}</th><td>{html_text(value_text(value))}</td></tr>'
        for key, value in values.items()
    ]
    if not rows:
        return ""
    table = f'<table class="facts">{"".join(rows)}</table>'
    return f"<section><h2>{html_text(title)}</h2>{table}</section>"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def value_text(value: Any) -> str:
    """A value as people write it."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    return str(value)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def html_text(value: Any) -> str:
    """Text as HTML: escaped, and with control characters made visible."""
    return escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value).replace("\r\n", "\n")))


_STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#16191d;--soft:#626a73;--line:#e3e6ea;
--c0:#2563eb;--c1:#d9480f;--c2:#0f8a5f;--c3:#8b3fd9;--bad:#d6293e}
@media(prefers-color-scheme:dark){:root{--bg:#111417;--card:#191d21;--ink:#e8eaed;--soft:#98a1ab;
--line:#2b3137;--c0:#6ea8fe;--c1:#ff9a62;--c2:#4fd1a1;--c3:#c79bff;--bad:#ff6b7a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1060px;margin:0 auto;padding:40px 24px 64px}
header p{margin:0;color:var(--soft);font-size:13px;letter-spacing:.04em}
h1{margin:0 0 24px;font-size:30px;line-height:1.2;font-weight:650;letter-spacing:-.015em;
overflow-wrap:anywhere}
h2{margin:44px 0 12px;font-size:19px;font-weight:650;letter-spacing:-.01em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:12px;
margin:0 0 20px}
.tiles div,figure,blockquote,.facts,.numbers,.texts{background:var(--card);
border:1px solid var(--line);border-radius:10px}
.tiles div{padding:12px 16px 10px}
.tiles dt{color:var(--soft);font-size:13px}
.tiles dd{margin:0;font-size:23px;font-weight:620;font-variant-numeric:tabular-nums;
letter-spacing:-.01em}
.tiles small{display:block;min-height:18px;color:var(--soft);font-size:12px;font-weight:400;
letter-spacing:0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
figure{margin:0;padding:14px 16px 10px;min-width:0}
figure.wide{grid-column:1/-1}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:2px 16px;margin-bottom:8px;
font-size:14px;font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:0;padding:0;list-style:none;
color:var(--soft);font-size:13px;font-weight:400}
.key{display:inline-block;width:16px;height:0;margin-right:6px;vertical-align:middle;
border-top:2.5px solid;border-radius:2px}
.key.faint{opacity:.4}
.key.dots{width:8px;height:8px;border:0;border-radius:50%;background:currentColor}
.plot{overflow-x:auto}
@media(max-width:700px){.wide svg{width:720px}}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:11.5px;font-variant-numeric:tabular-nums}
svg .x,svg .mid{text-anchor:middle}
svg .y{text-anchor:end;dominant-baseline:central}
svg path{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
svg path.faint{stroke-width:1;opacity:.32}
.grid{stroke:var(--line)}
.axis{stroke:var(--soft);stroke-opacity:.6}
.dot{fill:currentColor}
.lost{fill:var(--bad)}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
details{margin-top:16px}
summary{cursor:pointer;color:var(--soft);font-size:14px}
blockquote{margin:0 0 12px;padding:14px 18px;white-space:pre-wrap;overflow-wrap:anywhere;
font:15px/1.6 Charter,"Iowan Old Style","Source Serif 4",Georgia,serif}
blockquote b{color:var(--c0);font-weight:600}
table{border-spacing:0;font-size:14px;font-variant-numeric:tabular-nums}
.facts{width:100%}
th,td{padding:6px 16px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;
overflow-wrap:anywhere}
tr:last-child>*{border-bottom:0}
th{color:var(--soft);font-weight:500}
.facts th{width:32%}
.numbers,.texts{margin-top:10px}
.texts td{white-space:pre-wrap}
.numbers th,.numbers td{text-align:right}
thead th{border-bottom:1px solid var(--line)!important}
@media print{body{background:none}figure,blockquote,tr{break-inside:avoid}}
"""
