"""Movie reviews with human ratings, and two judges of sentiment, for the acceptance experiment.

All of it comes from the source distribution of vaderSentiment (Hutto & Gilbert 2014, MIT), which is
downloaded and verified, never part of this repository: review snippets, each rated by about twenty
people, and the VADER lexicon with its code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
FOLDER = SDIST.removesuffix(".tar.gz")
OTHERS = ("amazonReview", "nytEditorial", "tweets")
HELD_OUT = 0.12

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[!?]")


@dataclass(frozen=True)
class Snippet:
    """A sentence of a review and the mean of its human ratings, -4 to 4."""

    text: str
    rating: float


@dataclass(frozen=True)
class Reviews:
    """Snippets to train on, snippets held out, and other texts for pretraining."""

    train: list[Snippet]
    held_out: list[Snippet]
    other_texts: list[str]


def download(folder: Path) -> Path:
    """The unpacked source distribution below ``folder``, from the package index unless there.

    Raises RuntimeError when it cannot be had or is not the file this was written for.
    """
    root = folder / FOLDER
    if root.is_dir():
        return root
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
    done = subprocess.run(
        [*command, "vaderSentiment==3.3.2"], capture_output=True, text=True, check=False
    )
    archive = folder / SDIST
    if not archive.is_file():
        raise RuntimeError(f"cannot download {SDIST}: {done.stderr.strip()[-300:]}")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        raise RuntimeError(f"{archive}: not the file that was expected (SHA-256 differs)")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    with tarfile.open(root / "additional_resources" / "hutto_ICWSM_2014.tar.gz") as tar:
        tar.extractall(root, filter="data")
    return root


def read_reviews(root: Path, seed: int = 0) -> Reviews:
    """The snippets, split by ``seed``; texts that occur twice are held out or trained on once."""
    snippets = {text: rating for rating, text in _rows(root, "movieReview")}
    texts = sorted(snippets)
    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    cut = round(HELD_OUT * len(texts))
    held_out, train = (
        [Snippet(texts[i], snippets[texts[i]]) for i in part] for part in (order[:cut], order[cut:])
    )
    return Reviews(train, held_out, [text for name in OTHERS for _, text in _rows(root, name)])


def _rows(root: Path, name: str) -> list[tuple[float, str]]:
    stem = name if name == "tweets" else f"{name}Snippets"
    path = root / "hutto_ICWSM_2014" / f"{stem}_GroundTruth.txt"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t", 2)
        rows.append((float(rating), text.strip().replace("''", '"')))
    return rows


def load_vader(root: Path) -> Callable[[str], float]:
    """VADER's compound score of a text, -1 to 1."""
    path = root / "vaderSentiment" / "vaderSentiment.py"
    spec = importlib.util.spec_from_file_location("_vader", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_vader"] = module  # it asks for its own source file to find the lexicon
    spec.loader.exec_module(module)
    analyzer = module.SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]


class HumanJudge:
    """Ridge regression from words and pairs of words to the human rating of a snippet."""

    def __init__(self, snippets: Sequence[Snippet], penalty: float = 20.0):
        counts = Counter(feature for s in snippets for feature in set(_features(s.text)))
        kept = [f for f, n in counts.items() if n >= (20 if " " in f else 8)]
        self.index = {feature: i for i, feature in enumerate(sorted(kept))}
        self.idf = np.array(
            [np.log(len(snippets) / counts[f]) for f in sorted(kept)], dtype=np.float64
        )
        x = self._matrix([s.text for s in snippets])
        y = np.array([s.rating for s in snippets])
        self.mean = y.mean()
        gram = x.T @ x + penalty * np.eye(x.shape[1])
        self.weights = np.linalg.solve(gram, x.T @ (y - self.mean))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Predicted ratings."""
        return self._matrix(texts) @ self.weights + self.mean

    def _matrix(self, texts: Sequence[str]) -> np.ndarray:
        x = np.zeros((len(texts), len(self.index)))
        for row, text in zip(x, texts, strict=True):
            for feature in set(_features(text)) & self.index.keys():
                row[self.index[feature]] = self.idf[self.index[feature]]
            row /= max(1.0, float(np.linalg.norm(row))) / 4
        return x


def _features(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return [*words, *map(" ".join, itertools.pairwise(words))]
