"""``report.html``: what a run did, in one file that needs no network and runs no script.

``python -m fastgpt.report runs/x`` writes it again from the files of the run.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import fastgpt
from fastgpt.chart import Series, number
from fastgpt.errors import UsageError
from fastgpt.page import (
    charts,
    columns,
    facts_table,
    figure,
    flat,
    html_text,
    page,
    points,
    raw_and_smooth,
    spreads,
    tiles,
)
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
    sections: Sequence[str] = (),
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
        sections: HTML of the stage's own, made of the parts in `fastgpt.page`.

    Returns:
        The path of the report.
    """
    data = {
        "samples": [dict(sample) for sample in samples],
        "environment": dict(environment),
        "sections": list(sections),
    }
    write_atomic(run.report_data_path, json.dumps(data, indent=1, default=str) + "\n")
    page = render(
        run.path.resolve().name,
        read_metrics(run.metrics_path),
        read_metrics(run.timings_path),
        samples,
        config,
        environment,
        sections,
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
        samples, facts = data.get("samples", []), data.get("environment", {})
        return write_report(run, samples, config, facts, data.get("sections", []))
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
    sections: Sequence[str] = (),
) -> str:
    """The whole page as text."""
    body = [
        _tiles(metrics, timings),
        _curves(metrics, timings),
        *sections,
        _evaluations(metrics),
        _samples(samples),
        facts_table("Configuration", flat(config)),
        facts_table("Environment", facts),
    ]
    return page(name, "fastgpt run", body)


def _finite(records: Records, key: str) -> list[float]:
    return [y for _, y in points(records, key) if math.isfinite(y)]


def _tiles(metrics: Records, timings: Records) -> str:
    shown: list[tuple[str, str, str]] = []
    if metrics:
        shown.append(("steps", f"{metrics[-1]['step']:,}", ""))
    if tokens := _finite(metrics, "tokens"):
        shown.append(("tokens", number(tokens[-1], 0), ""))
    if values := _finite(metrics, "loss"):
        recent = values[-math.ceil(len(values) / 50) :]
        shown.append(("train loss", f"{sum(recent) / len(recent):.3f}", "recent mean"))
    if values := _finite(metrics, "val_loss"):
        unit = "nats per token" if "tokens" in metrics[-1] else ""
        note = unit if values[-1] == min(values) else f"best {min(values):.3f}"
        shown.append(("validation loss", f"{values[-1]:.3f}", note))
    if values := _finite(metrics, "val_bpb"):
        shown.append(("bits per byte", f"{values[-1]:.3f}", "validation"))
    if values := _finite(timings, "tokens_per_s"):
        shown.append(("tokens / s", number(median(values), 0), "median"))
    if values := _finite(timings, "mfu"):
        shown.append(("MFU", f"{100 * median(values):.1f} %", "median"))
    return tiles(shown)


def _curves(metrics: Records, timings: Records) -> str:
    figures = [_loss_figure(metrics)]
    bpb = Series("validation", points(metrics, "val_bpb"), 1, "dots")
    figures.append(figure("Bits per byte", [bpb], log=False))
    figures.append(figure("Learning rate", [Series("lr", points(metrics, "lr"))], log=False))
    norm = points(metrics, "grad_norm")
    figures.append(figure("Gradient norm", raw_and_smooth("norm", norm), log=spreads(norm)))
    # No curve of the MFU: it is the throughput times a constant.
    rate = raw_and_smooth("tokens / s", points(timings, "tokens_per_s"), 2)
    figures.append(figure("Throughput, tokens / s", rate, log=False))
    for records in (metrics, timings):
        for key in dict.fromkeys(key for record in records for key in record):
            found = points(records, key)
            if key not in _CHARTS_ELSEWHERE and any(y for _, y in found):  # "skipped" is mostly 0
                curve = raw_and_smooth(key, found)
                figures.append(figure(key.replace("_", " "), curve, log=False))
    return charts(figures)


def _loss_figure(metrics: Records) -> str:
    train = raw_and_smooth("train", points(metrics, "loss"))
    val = Series("validation", points(metrics, "val_loss"), 1, "dots")
    series = [*train, val] if val.points else train
    title = "Loss, nats per token" if metrics and "tokens" in metrics[-1] else "Loss"
    return figure(title, series, log=False, wide=True)


def _evaluations(metrics: Records) -> str:
    rows = [r for r in metrics if r.get("val_loss") is not None]
    if not rows:
        return ""
    title = f"Evaluations ({len(rows)})"
    if len(rows) > _MOST_ROWS:
        rows, title = rows[-_MOST_ROWS:], f"Last {_MOST_ROWS} of {len(rows)} evaluations"
    keys = ["step", "loss", *sorted({k for r in rows for k in r if k.startswith("val_")})]
    return f"<details><summary>{title}</summary>{columns(keys, rows)}</details>"


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    blocks = [
        f"<blockquote><b>{html_text(prompt)}</b>{html_text(text)}</blockquote>"
        for prompt, text in ((s.get("prompt", ""), s.get("text", "")) for s in samples)
    ]
    return f"<section><h2>Samples</h2>{''.join(blocks)}</section>" if blocks else ""


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
