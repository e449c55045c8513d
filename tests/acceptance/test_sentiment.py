"""The four stages make a model that two strangers like better; see bench/acceptance_sentiment.py.

``pytest -m acceptance`` runs one seed; ``ACCEPTANCE_SEEDS="0 1 2" ACCEPTANCE_CONTROLS=1`` runs
more, with the controls that must fail. The reviews come from PyPI: without it the test is skipped.
``ACCEPTANCE_FOLDER`` keeps the runs, so that what is complete is not trained again.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import acceptance_sentiment, sentiment

pytestmark = pytest.mark.acceptance


def test_reviews_become_kinder(tmp_path):
    folder = Path(os.environ.get("ACCEPTANCE_FOLDER", tmp_path))
    try:
        sentiment.download(folder)
    except RuntimeError as error:
        pytest.skip(str(error))
    seeds = os.environ.get("ACCEPTANCE_SEEDS", "0").split()
    controls = ["--controls"] if os.environ.get("ACCEPTANCE_CONTROLS") else []
    assert acceptance_sentiment.main(["--folder", str(folder), "--seeds", *seeds, *controls]) == 0
