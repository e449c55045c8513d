"""The report: well formed, harmless whatever the model wrote, and right about the numbers."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastgpt.chart import Series, line_chart, number, smooth
from fastgpt.errors import UsageError
from fastgpt.report import environment, regenerate, write_report
from fastgpt.rundir import MetricsLog, RunDir

HOSTILE = "</b><script>alert(1)</script><img src=x onerror=alert(1)> \x00\x1b[31m \ud800 &amp; ü 東"
CONFIG = {"preset": "<i>tiny</i>", "optim": {"lr": 0.003, "betas": [0.9, 0.95]}}


class Page(HTMLParser):
    """Tags, attributes and text as a browser would see them; checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def make_run(path: Path, steps: int, *, finite: bool = True) -> RunDir:
    run = RunDir.create(path)
    run.config_path.write_text('preset = "tiny"\n[optim]\nlr = 0.003\n')
    with MetricsLog(run.metrics_path) as metrics, MetricsLog(run.timings_path) as timings:
        for step in range(1, steps + 1):
            loss = 2 + 8 / step if finite else (math.nan, math.inf)[step % 2]
            values = {"loss": loss, "grad_norm": 40.0 if step == 5 else 1.0, "lr": 1e-3}
            if step % 10 == 0:
                values |= {"val_loss": loss + 0.5, "val_bpb": loss / 3}
            metrics.log(step, tokens=step * 1024, **values)
            timings.log(step, tokens_per_s=8000.0 + step, mfu=0.3, seconds=step * 0.1)
    return run


def charts(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_report_shows_curves_numbers_samples_and_settings(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", 100)
    samples = [{"prompt": "The sea ", "text": "was\n calm."}]
    assert write_report(run, samples, CONFIG, {"torch": "2.13"}) == run.report_path
    page = run.report_path.read_text(encoding="utf-8")
    parsed = Page(page)
    for text in [
        *("Loss, nats per token", "Bits per byte", "Learning rate", "Gradient norm (log scale)"),
        *("Throughput, tokens / s", "Evaluations (10)", "The sea was\n calm.", "102.4k"),
        *("optim.betas", "0.9, 0.95", "torch", "2.13", "30.0 %"),
    ]:
        assert text in parsed.text
    assert "2.580" in parsed.text  # the last validation loss: 2 + 8 / 100 + 0.5
    labels = [svg.get("aria-label") for svg in charts(page)]
    assert labels[0] == "Loss, nats per token"
    assert len(labels) == 5


def test_text_of_a_model_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>x", 3)
    samples = [{"prompt": HOSTILE, "text": HOSTILE}, {}]
    write_report(run, samples, {HOSTILE: HOSTILE}, {HOSTILE: [HOSTILE]})
    page = run.report_path.read_text(encoding="utf-8")
    parsed = Page(page)
    assert not {"script", "img", "i", "link", "iframe", "object", "a"} & set(parsed.tags)
    assert parsed.text.count("<script>alert(1)</script>") >= 4
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)
    names = {name for _, name, _ in parsed.attributes}
    assert not {"style", "src", "href"} & names
    assert not any(name.startswith("on") for name in names)


def test_policy_forbids_everything_but_the_one_style(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", 3)
    write_report(run, [], {}, {})
    page = run.report_path.read_text(encoding="utf-8")
    policy = next(v for _, name, v in Page(page).attributes if name == "content")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert page.index("Content-Security-Policy") < page.index("<style>")
    links = set(re.findall(r"[a-z]+://[^\s\"<]+", page))
    assert links == {"http://www.w3.org/2000/svg"}  # a name, not an address


@pytest.mark.parametrize("steps", [0, 1, 2, 29, 30, 5000])
def test_any_length_is_readable(tmp_path: Path, steps: int) -> None:
    run = make_run(tmp_path / "x", steps)
    write_report(run, [], {}, {})
    page = run.report_path.read_text(encoding="utf-8")
    assert Page(page).text.strip()
    assert len(page) < 400_000
    for svg in charts(page):
        for element in svg.iter():
            for name in ("cx", "cy", "x", "y", "x1", "x2", "y1", "y2"):
                if name in element.attrib:
                    assert -1 <= float(element.attrib[name]) <= 980


def test_a_diverged_run_is_readable(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", 40, finite=False)
    write_report(run, [], {}, {})
    page = run.report_path.read_text(encoding="utf-8")
    loss = charts(page)[0]
    assert "no finite values" in "".join(loss.itertext())
    assert "train loss" not in Page(page).text


def test_other_values_get_a_chart_each(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "ppo")
    with MetricsLog(run.metrics_path) as log:
        for step in range(5):
            log.log(step, reward=step / 2, kl_divergence=0.1, note="text")
    write_report(run, [], {}, {})
    page = run.report_path.read_text(encoding="utf-8")
    assert [svg.get("aria-label") for svg in charts(page)] == ["kl divergence", "reward"]


def test_regenerating_gives_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", 20)
    config = {"preset": "tiny", "optim": {"lr": 0.003}}
    write_report(run, [{"prompt": "a", "text": HOSTILE}], config, {"torch": "2.13", "threads": 2})
    before = run.report_path.read_bytes()
    run.report_path.unlink()
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "fastgpt.report", str(run.path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(run.report_path)
    assert run.report_path.read_bytes() == before


def test_regenerate_works_from_the_metrics_alone_and_says_what_is_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", 20)
    run.config_path.unlink()
    run.timings_path.unlink()
    assert "Loss" in regenerate(run).read_text(encoding="utf-8")
    for content in ("[", '"x"', '{"samples": 3}', '{"samples": [3]}', '{"environment": 3}'):
        run.report_data_path.write_text(content)
        with pytest.raises(UsageError, match="cannot write the report"):
            regenerate(run)
    run.metrics_path.unlink()
    with pytest.raises(UsageError, match=r"no metrics\.jsonl"):
        regenerate(run)


def test_environment_names_neither_machine_nor_user() -> None:
    facts = environment()
    assert {"python", "torch", "fastgpt", "torch threads", "logical cores"} <= facts.keys()
    text = json.dumps(facts)
    node = os.uname().nodename
    assert node not in text.split()
    assert str(Path.home()) not in text


def path_points(svg: str) -> list[list[tuple[float, float]]]:
    paths = re.findall(r'd="M([^"]+)"', svg)
    return [[tuple(map(float, p.split())) for p in path.split("L")] for path in paths]  # type: ignore[misc]


def test_chart_places_values_on_its_axes() -> None:
    svg = line_chart([Series("a", [(0, 0.0), (50, 5.0), (100, 10.0)])], label="x")
    ((x0, y0), (x1, y1), (x2, y2)) = path_points(svg)[0]
    assert (x0 + x2) / 2 == pytest.approx(x1)
    assert (y0 + y2) / 2 == pytest.approx(y1)
    assert y2 < y1 < y0  # up is more
    ticks = {
        e.text: float(e.attrib["y"]) for e in ET.fromstring(svg).iter() if e.get("class") == "y"
    }
    assert ticks["0"] == y0
    assert ticks["10"] == y2
    logarithmic = line_chart([Series("a", [(0, 0.01), (1, 1.0), (2, 100.0)])], label="x", log=True)
    ((_, y0), (_, y1), (_, y2)) = path_points(logarithmic)[0]
    assert (y0 + y2) / 2 == pytest.approx(y1, abs=0.1)


def test_chart_interrupts_at_gaps_and_keeps_spikes() -> None:
    points = [(float(x), 1.0) for x in range(10)]
    points[4] = (4.0, math.nan)
    svg = line_chart([Series("a", points)], label="x")
    assert [len(path) for path in path_points(svg)] == [4, 5]
    assert "step 4: not finite" in svg
    many = [(float(x), 50.0 if x == 7777 else 1.0) for x in range(20_000)]
    faint, line = (
        path_points(line_chart([Series("a", many, 0, s)], label="x"))[0] for s in ("faint", "line")
    )
    assert max(len(faint), len(line)) <= 610
    svg = line_chart([Series("a", many, 0, "faint")], label="x")
    ticks = [e.text for e in ET.fromstring(svg).iter() if e.get("class") == "y"]
    assert ticks[-1] == "50"  # the spike is drawn in full height
    assert faint[-1][0] == pytest.approx(line[-1][0], abs=1)


def test_smooth_has_no_lag_and_leaves_out_non_finite_values() -> None:
    line = [(float(x), 3.0 - 0.01 * x) for x in range(200)]
    for (x, y), (sx, sy) in zip(line, smooth(line, 0.1), strict=True):
        assert (sx, sy) == (x, pytest.approx(y))
    noisy = [(float(x), 1.0 + (-1) ** x) for x in range(400)]
    assert all(abs(y - 1) < 0.15 for _, y in smooth(noisy, 0.1)[20:-20])
    assert smooth([(0, math.nan), (1, 2.0)]) == [(1, 2.0)]
    assert smooth([]) == []


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0, 2, "0"),
        (1200, 0, "1,200"),
        (12_000, 0, "12k"),
        (2.5e9, 0, "2.5G"),
        (-1.25, 2, "-1.25"),
        (3e-6, 6, "3e-06"),
    ],
)
def test_number(value: float, decimals: int, text: str) -> None:
    assert number(value, decimals) == text
