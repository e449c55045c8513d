"""What a report says about scores of ranked answers: how often they are right, and how sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastgpt.chart import Series, legend, line_chart
from fastgpt.page import columns, facts_table, html_text
from fastgpt.preference.comparisons import Comparison, all_pairs
from fastgpt.preference.metrics import (
    Table,
    accuracy,
    by_count,
    by_difference,
    calibration,
    calibration_error,
    correlation,
    leads_of,
    text_table,
)


@dataclass(frozen=True)
class Assessment:
    """Held-out pairs under the scores, and under "the longer answer wins"."""

    facts: dict[str, float | int]
    margins: Table
    counts: Table
    calibration: Table


def assess(comparisons: Sequence[Comparison], scores: np.ndarray) -> Assessment:
    """Compare raw ``scores`` of all answers, numbered through, with the rankings."""
    pairs, _, differences = all_pairs(comparisons)
    leads = leads_of(scores, pairs)
    counts = [len(c.answers) for c in comparisons for _ in c.pairs]
    lengths = np.array([len(ids) - c.prompt for c in comparisons for ids in c.answers], dtype=float)
    prompts = np.repeat(np.arange(len(comparisons)), [len(c.answers) for c in comparisons])
    lines = calibration(leads)
    return Assessment(
        {
            "pairs": len(pairs),
            "accuracy": accuracy(leads),
            "accuracy of the longer answer": accuracy(leads_of(lengths, pairs)),
            "accuracy of the shorter answer": accuracy(leads_of(-lengths, pairs)),
            "calibration error": calibration_error(lines),
            "correlation with length": correlation(scores, lengths),
            "the same within a prompt": correlation(scores, lengths, prompts),
        },
        by_difference(leads, differences),
        by_count(leads, np.array(counts)),
        lines,
    )


def summary(found: Assessment) -> str:
    """The numbers as text."""
    facts = [
        f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in found.facts.items()
    ]
    tables = [text_table(table) for table in (found.margins, found.counts, found.calibration)]
    return "held out\n" + "\n\n".join(["\n".join(facts), *tables])


def sections(found: Assessment) -> list[str]:
    """The numbers as sections of a report page."""
    tables = [
        f"<h2>{html_text(title)}</h2>{columns(list(table[0]), table)}"
        for title, table in (
            ("Accuracy by score difference", found.margins),
            ("Accuracy by number of answers", found.counts),
            ("Calibration", found.calibration),
        )
        if table
    ]
    chart = _calibration_chart(found.calibration)
    return [
        facts_table("Held-out pairs", found.facts),
        *(f"<section>{t}</section>" for t in tables),
        chart,
    ]


def _calibration_chart(lines: Table) -> str:
    points = [(100 * float(n["predicted"]), 100 * float(n["accuracy"])) for n in lines]
    series = [
        Series("as predicted", [(50.0, 50.0), (100.0, 100.0)], 0, "faint"),
        Series("accuracy", points, 1, "dots"),
    ]
    title = "Accuracy by predicted probability, %"
    chart = line_chart(series, label=title, x_label="predicted, %")
    caption = f"<figcaption>{title}{legend(series)}</figcaption>"
    figure = f'<figure>{caption}<div class="plot">{chart}</div></figure>'
    return f'<section class="charts">{figure}</section>'
