"""Fixtures for tests that run a model."""

from __future__ import annotations

import pytest
import torch

from fastgpt_kernels import cpu


@pytest.fixture
def uncompiled(monkeypatch):
    """The CPU paths uncompiled: the same numbers, without a C++ compiler run for each shape."""
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


@pytest.fixture
def seeded():
    torch.manual_seed(0)
