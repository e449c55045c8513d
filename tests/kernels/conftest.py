"""Shared by all kernel tests; importing it puts ``tests/kernels`` (``harness``) on the path."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    torch._dynamo.reset()
