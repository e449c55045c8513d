"""``report.html``: what a run did, in one file that needs no network and runs no script.

``python -m fastgpt.report runs/x`` writes it again from the files of the run. Everything in it is
escaped, since a model may well write ``<script>``; the page also forbids scripts to itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import fastgpt
from fastgpt.chart import Point, Series, legend, line_chart, number, smooth
from fastgpt.errors import UsageError
from fastgpt.rundir import RunDir, read_metrics, write_atomic

Records = Sequence[Mapping[str, Any]]

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "sentencepiece", "transformers")
_MOST_ROWS = 200
_CHARTS_ELSEWHERE = {
    *("step", "loss", "val_loss", "val_bpb", "lr", "grad_norm", "tokens"),
    *("tokens_per_s", "mfu", "seconds"),
}


def write_report(
    run: RunDir,
    samples: Sequence[Mapping[str, str]],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Path:
    """Write ``report.html``, and ``report.json`` from which it can be written again.

    Curves come from ``metrics.jsonl`` (``loss``, ``val_loss`` in nats per token, ``val_bpb``,
    ``lr``, ``grad_norm``, ``tokens``) and ``timings.jsonl`` (``tokens_per_s``, ``mfu``,
    ``seconds``); any other number in them gets a chart of its own.

    Args:
        run: an existing run directory.
        samples: texts of the model, each with ``prompt`` and ``text`` (what it added).
        config: nested settings.
        environment: see `environment`.

    Returns:
        The path of the report.
    """
    data = {"samples": [dict(sample) for sample in samples], "environment": dict(environment)}
    write_atomic(run.report_data_path, json.dumps(data, indent=1, default=str) + "\n")
    page = render(
        run.path.resolve().name,
        read_metrics(run.metrics_path),
        read_metrics(run.timings_path),
        samples,
        config,
        environment,
    )
    write_atomic(run.report_path, page.encode("utf-8", errors="replace"))
    return run.report_path


def regenerate(run: RunDir) -> Path:
    """Write the report from the files of the run alone; what is missing there is left out.

    Raises:
        UsageError: there is no metrics.jsonl, or a file that cannot be read.
    """
    if not run.metrics_path.is_file():
        raise UsageError(f"{run.path}: not a run directory: it has no metrics.jsonl")
    config: dict[str, Any] = {}
    data: dict[str, Any] = {}
    try:
        if run.config_path.is_file():
            config = tomllib.loads(run.config_path.read_text(encoding="utf-8"))
        if run.report_data_path.is_file():
            data = json.loads(run.report_data_path.read_bytes())
        return write_report(run, data.get("samples", []), config, data.get("environment", {}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"{run.path}: cannot write the report: {error}") from error


def environment() -> dict[str, Any]:
    """Facts that explain a speed or a difference; nothing that names the machine or its user."""
    import torch

    facts: dict[str, Any] = {
        "fastgpt": fastgpt.__version__,
        "git commit": _git_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "logical cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "memory": _memory(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["gpus"] = ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names))
        facts["cuda"], facts["rocm"] = torch.version.cuda, torch.version.hip
    return {key: value for key, value in facts.items() if value is not None}


def _git_commit() -> str | None:
    """Commit of the source tree this package was imported from, if it is one."""
    root = Path(fastgpt.__file__).resolve().parent.parent
    if not (
        root / ".git"
    ).exists():  # an installed package may lie inside somebody else's repository
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _memory() -> str | None:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (OSError, ValueError, AttributeError):
        return None


# The page


def render(
    name: str,
    metrics: Records,
    timings: Records,
    samples: Sequence[Mapping[str, str]],
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> str:
    """The whole page as text."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    body = [
        f"<header><p>fastgpt run</p><h1>{_text(name)}</h1></header>",
        _tiles(metrics, timings),
        _curves(metrics, timings),
        _evaluations(metrics),
        _samples(samples),
        _table("Configuration", _flat(config)),
        _table("Environment", facts),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_text(name)} · fastgpt</title><style>{_STYLE}</style></head>\n"
        f"<body><main>{chr(10).join(part for part in body if part)}</main></body></html>\n"
    )


def _points(records: Records, key: str) -> list[Point]:
    values = ((r["step"], r.get(key)) for r in records)
    return [(x, float(y)) for x, y in values if isinstance(y, int | float)]


def _finite(records: Records, key: str) -> list[float]:
    return [y for _, y in _points(records, key) if math.isfinite(y)]


def _tiles(metrics: Records, timings: Records) -> str:
    tiles: list[tuple[str, str, str]] = []
    if metrics:
        tiles.append(("steps", f"{metrics[-1]['step']:,}", ""))
    if tokens := _finite(metrics, "tokens"):
        tiles.append(("tokens", number(tokens[-1], 0), ""))
    if values := _finite(metrics, "loss"):
        recent = values[-math.ceil(len(values) / 50) :]
        tiles.append(("train loss", f"{sum(recent) / len(recent):.3f}", "recent mean"))
    if values := _finite(metrics, "val_loss"):
        note = "nats per token" if values[-1] == min(values) else f"best {min(values):.3f}"
        tiles.append(("validation loss", f"{values[-1]:.3f}", note))
    if values := _finite(metrics, "val_bpb"):
        tiles.append(("bits per byte", f"{values[-1]:.3f}", "validation"))
    if values := _finite(timings, "tokens_per_s"):
        tiles.append(("tokens / s", number(median(values), 0), "median"))
    if values := _finite(timings, "mfu"):
        tiles.append(("MFU", f"{100 * median(values):.1f} %", "median"))
    cells = [
        f"<div><dt>{_text(label)}</dt><dd>{_text(value)}<small>{_text(note)}</small></dd></div>"
        for label, value, note in tiles
    ]
    return f'<dl class="tiles">{"".join(cells)}</dl>' if cells else ""


def _curves(metrics: Records, timings: Records) -> str:
    figures = [_loss_figure(metrics)]
    bpb = Series("validation", _points(metrics, "val_bpb"), 1, "dots")
    figures.append(_figure("Bits per byte", [bpb], log=False))
    figures.append(_figure("Learning rate", [Series("lr", _points(metrics, "lr"))], log=False))
    norm = _points(metrics, "grad_norm")
    figures.append(_figure("Gradient norm", _raw_and_smooth("norm", norm), log=_spreads(norm)))
    # No curve of the MFU: it is the throughput times a constant.
    rate = _raw_and_smooth("tokens / s", _points(timings, "tokens_per_s"), 2)
    figures.append(_figure("Throughput, tokens / s", rate, log=False))
    for records in (metrics, timings):
        for key in dict.fromkeys(key for record in records for key in record):
            points = _points(records, key)
            if key not in _CHARTS_ELSEWHERE and any(y for _, y in points):  # "skipped" is mostly 0
                curve = _raw_and_smooth(key, points)
                figures.append(_figure(key.replace("_", " "), curve, log=False))
    figures = [figure for figure in figures if figure]
    return f'<section class="charts">{"".join(figures)}</section>' if figures else ""


def _loss_figure(metrics: Records) -> str:
    train = _raw_and_smooth("train", _points(metrics, "loss"))
    val = Series("validation", _points(metrics, "val_loss"), 1, "dots")
    series = [*train, val] if val.points else train
    return _figure("Loss, nats per token", series, log=False, wide=True)


def _raw_and_smooth(name: str, points: list[Point], color: int = 0) -> list[Series]:
    if len(points) < 30:
        return [Series(name, points, color)]
    smoothed = Series(f"{name}, smoothed", smooth(points), color)
    return [Series(name, points, color, "faint"), smoothed]


def _spreads(points: list[Point]) -> bool:
    values = [y for _, y in points if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) > 20 * median(values)


def _figure(title: str, series: list[Series], *, log: bool, wide: bool = False) -> str:
    if not any(one.points for one in series):
        return ""
    width, height = (980, 320) if wide else (480, 220)
    chart = line_chart(series, label=title, log=log, width=width, height=height)
    key = legend(series) if len(series) > 1 else ""
    suffix = " (log scale)" if log else ""
    css = ' class="wide"' if wide else ""
    caption = f"<figcaption>{_text(title + suffix)}{key}</figcaption>"
    return f'<figure{css}>{caption}<div class="plot">{chart}</div></figure>'


def _evaluations(metrics: Records) -> str:
    rows = [r for r in metrics if r.get("val_loss") is not None]
    if not rows:
        return ""
    title = f"Evaluations ({len(rows)})"
    if len(rows) > _MOST_ROWS:
        rows, title = rows[-_MOST_ROWS:], f"Last {_MOST_ROWS} of {len(rows)} evaluations"
    keys = ["step", "loss", *sorted({k for r in rows for k in r if k.startswith("val_")})]
    head = "".join(f"<th>{_text(key)}</th>" for key in keys)
    lines = ["".join(f"<td>{_text(_value(r.get(key)))}</td>" for key in keys) for r in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f"<details><summary>{title}</summary>"
        f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</details>"
    )


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    blocks = [
        f"<blockquote><b>{_text(s.get('prompt', ''))}</b>{_text(s.get('text', ''))}</blockquote>"
        for s in samples
    ]
    return f"<section><h2>Samples</h2>{''.join(blocks)}</section>" if blocks else ""


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = [
        f'<tr><th scope="row">{_text(key)}</th><td>{_text(_value(value))}</td></tr>'
        for key, value in values.items()
    ]
    if not rows:
        return ""
    return f'<section><h2>{_text(title)}</h2><table class="facts">{"".join(rows)}</table></section>'


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _value(value: Any) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return str(value)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def _text(value: Any) -> str:
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
.tiles div,figure,blockquote,.facts,.numbers{background:var(--card);border:1px solid var(--line);
border-radius:10px}
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
.numbers{margin-top:10px}
.numbers th,.numbers td{text-align:right}
thead th{border-bottom:1px solid var(--line)!important}
@media print{body{background:none}figure,blockquote,tr{break-inside:avoid}}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: write the report of a run again."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m fastgpt.report", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run directory, such as runs/x")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    print(regenerate(RunDir(parser.parse_args(argv).run)))


if __name__ == "__main__":
    from fastgpt.cli import command

    sys.exit(command(main)())
