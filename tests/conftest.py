"""What every test starts from: a seed, few threads, nothing compiled before."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

# With one process for each core, threads within them would only wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    # Compiled code would leak from test to test: Dynamo stops after a few recompilations of one function.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def float64() -> Iterator[torch.dtype]:
    """New tensors and modules are in double precision, so that equality can be asked to 1e-12."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(before)
