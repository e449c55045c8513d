"""Reward for exact sums alone makes a model add; see bench/acceptance_addition.py."""

from __future__ import annotations

import pytest

from bench import acceptance_addition


@pytest.mark.acceptance
def test_sums_become_exact(tmp_path):
    assert acceptance_addition.main(["--folder", str(tmp_path)]) == 0
