"""The names that every example in a docstring starts with."""

from typing import Any

import pytest
import torch

import torchlift


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, torchlift=torchlift)
    torch.manual_seed(0)
