"""What every test starts from: a seed, few threads, nothing compiled before."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.compile_fx

from torchlift import _compat

# With one process for each core, threads within them would only wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# What torch is made of stays: not to be gone through at every collection. Dynamo and fx make many objects, few of them
# garbage: to look for it as often as Python does takes a tenth of the time.
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 20, 20)


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


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test whose ``torch.compile`` is refused, by name, since this release of torch cannot do that, is skipped."""
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        last: BaseException | None = error
        while last is not None and not _compat.TRACES_MODULES:
            if _compat.NOT_TRACED in str(last):
                pytest.skip(_compat.NOT_TRACED)
            last = last.__context__
        raise
