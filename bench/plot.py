"""Charts of the kernels' results: ``python -m bench.plot [--out DIR] [RESULTS.json ...]``.

One chart per results file and direction, as PNG and SVG: how many times as long as ours each peer
takes (the median over rounds), with the peer's spread as the whisker. Right of 1 ours is faster.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
plt.switch_backend("agg")
plt.rcParams["svg.fonttype"] = "none"  # text stays text


def draw(path: Path, out: Path) -> list[Path]:
    """Write the charts of a results file to the folder ``out`` and return their paths."""
    content = json.loads(path.read_text())
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for direction in ("forward", "backward", "both"):
        rows = {
            key.removesuffix(f" {direction}"): value
            for key, value in content["cases"].items()
            if key.endswith(f" {direction}")
        }
        if not rows:
            continue
        figure = _chart(rows, f"{direction}, {content['stamp']['device']}", content["stamp"])
        for kind in ("png", "svg"):
            written.append(out / f"{path.stem}_{direction}.{kind}")
            figure.savefig(written[-1], dpi=150, bbox_inches="tight")
        plt.close(figure)
    return written


def _chart(rows: dict[str, dict[str, Any]], title: str, stamp: dict[str, Any]) -> Any:
    peers = sorted({name for row in rows.values() for name in row} - {"ours"})
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.32 * len(rows) * max(1, len(peers) / 2)))
    height = 0.8 / max(1, len(peers))
    for index, peer in enumerate(peers):
        named = [(y, row[peer]) for y, row in enumerate(rows.values()) if peer in row]
        places = [y + (index - (len(peers) - 1) / 2) * height for y, _ in named]
        ratios = [row["over_ours"] for _, row in named]
        spreads = [row["over_ours"] * row["spread"] / 2 for _, row in named]
        axes.barh(places, ratios, height, xerr=spreads, label=peer, error_kw={"lw": 0.8})
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("time of the peer / time of ours")
    versions = f"torch {stamp['torch']}, commit {stamp.get('commit', 'unknown')}"
    axes.set_title(f"{title}\n{versions}", fontsize=9)
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("bench.plot", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="default: all of bench/results")
    parser.add_argument("--out", type=Path, default=Path("charts"), help="folder for the charts")
    options = parser.parse_args()
    for path in options.results or sorted(RESULTS.glob("kernels_*.json")):
        for written in draw(path, options.out):
            print(written)


if __name__ == "__main__":
    main()
