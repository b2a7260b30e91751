"""Graphs that are called from C++, and those that are not."""

import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import torchlift
from torchlift import _compat
from torchlift.engine import graphs, native
from torchlift.errors import TorchliftCompileWarning

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """A product, and what a function of it and of indices says."""

    def __init__(self, fn):
        super().__init__()
        self.linear, self.fn = nn.Linear(4, 4), fn

    def forward(self, x, *args):
        return x + self.fn(self.linear(x), *args)


@pytest.fixture
def decided(monkeypatch):
    """What was decided about the graphs that were compiled."""
    found, seen = [], []

    def decide(graph):
        if not any(graph is other for other in seen):  # asked once more where no part of it can be computed
            seen.append(graph)
            found.append(native.is_native(graph))
        return native.is_native(graph)

    monkeypatch.setattr(graphs, "is_native", decide)
    return found


def trained(fn, args=(), compile=True):
    torch.manual_seed(0)
    layers = torchlift.scan_layers([Layer(fn) for _ in range(3)], compile=compile)
    x = X.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TorchliftCompileWarning)
        out = layers(x, *args)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *layers.parameters()])]


def assert_as_the_loop(fn, args=()):
    for a, b in zip(trained(fn, args, compile=False), trained(fn, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SAME = {
    "products and pointwise": lambda y: (y @ y.t()).softmax(-1) @ torch.nn.functional.gelu(y),
    "normalized": lambda y: torch.nn.functional.layer_norm(y, (4,)),
    "dropout": lambda y: torch.nn.functional.dropout(y, 0.5),
    "attention": lambda y: torch.nn.functional.scaled_dot_product_attention(
        y[None, None], y[None, None], y[None, None]
    )[0, 0],
    "parts": lambda y: torch.cat(y.flip(0).chunk(2, -1)[::-1], -1),
}


@pytest.mark.parametrize("fn", SAME.values(), ids=SAME)
def test_native_graphs_compute_what_the_loop_computes(fn, decided):
    assert_as_the_loop(fn)
    assert decided and all(decided)


PYTHON = {
    "scatter_add": (lambda y, i: torch.zeros_like(y).scatter_add(0, i[:, None].expand(3, 4), y), True),
    "index_put": (lambda y, i: torch.zeros_like(y).index_put((i,), y, accumulate=True), True),
    "complex": (lambda y, i: torch.view_as_real(torch.view_as_complex(y.view(3, 2, 2))).view(3, 4) * i[:, None], False),
    "random": (lambda y, i: y + torch.randint_like(y, 5) + i.sum(), False),
}


@pytest.mark.parametrize(("fn", "fails"), PYTHON.values(), ids=PYTHON)
def test_what_may_fail_unheard_is_called_from_python(fn, fails, decided):
    good, bad = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 9])
    assert_as_the_loop(fn, (good,))
    assert not all(decided)
    if fails:
        with pytest.raises(RuntimeError, match="out of (bounds|range)"):
            trained(fn, (bad,))


def test_an_index_out_of_range_raises_in_native_graphs(decided):
    table = nn.Parameter(torch.randn(5, 4))
    with torch.no_grad():
        layers = torchlift.scan_layers([Layer(lambda y, i: y + table[i]) for _ in range(2)])
        with pytest.raises(RuntimeError, match="out of bounds"):
            layers(X, torch.tensor([0, 1, 9]))
    assert decided == [True]


def test_sizes_that_change_make_one_native_graph_more(decided):
    layers = torchlift.scan_layers([Layer(torch.tanh) for _ in range(3)])
    plain = torchlift.scan_layers(list(layers), compile=False)
    for size in (3, 5, 7, 9):
        x = torch.randn(size, 4)
        torch.testing.assert_close(layers(x), plain(x), rtol=1e-4, atol=1e-5)
    assert decided == [True] * 4  # forward and backward, of one size and of all


@pytest.mark.parametrize("wanted", [True, False])
def test_the_option_of_inductor_has_the_last_word(wanted, monkeypatch, decided):
    built, build = [], _compat.Inductor._build
    monkeypatch.setattr(_compat.Inductor, "_build", lambda *args, **options: built.append(1) or build(*args, **options))
    trained(torch.tan, compile={"options": {"cpp_wrapper": wanted}})
    assert not decided and len(built) == (2 if wanted else 0)


def test_an_operator_that_has_no_kernel_for_a_dtype_is_called_from_python(decided):
    """``2 ** integers`` went through a C interface that takes numbers of another type."""
    powers = torch.tensor([1, 2, 3])
    fn = lambda y, i: y * (2**i)[:, None]
    assert_as_the_loop(fn, (powers,))
    assert True in decided  # as far as can be told beforehand


def test_a_graph_without_operators_runs():
    layer = lambda: Layer(lambda y: X)  # its output is its input, and a constant
    layers = torchlift.scan_layers([layer() for _ in range(2)])
    x = X.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TorchliftCompileWarning)
        out = layers(x)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))


def test_an_error_of_the_body_is_raised_the_first_time():
    calls = []

    def fail(y):
        calls.append(1)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        torchlift.scan_layers([Layer(fail)])(X)
    assert len(calls) == 2 and not _compat._doubted  # the capture, and the plain loop in its place


def test_a_program_that_cannot_be_built_is_called_from_python(monkeypatch):
    from torch._inductor.codecache import CppWrapperCodeCache

    def refuse(*args, **kwargs):
        raise ImportError("no such library")

    monkeypatch.setattr(CppWrapperCodeCache, "load_pybinding_async", refuse)
    monkeypatch.setattr(_compat, "_doubted", True)
    assert_as_the_loop(torch.sinh)
    assert torchlift.engine.run.last_report().path == "compiled"


@pytest.fixture
def programs(monkeypatch):
    """Those of a process that has not looked for precompiled headers."""
    found = _compat._programs()
    events = {"known": threading.Event(), "built": threading.Event()}
    for name, value in {"headers": None, "search": None, "cache": {}, **events}.items():
        monkeypatch.setattr(found, name, value)
    return found


def test_headers_are_precompiled_once_and_anew_where_a_process_left_them_unfinished(programs, monkeypatch, tmp_path):
    """NOTE [Headers]: GCC would pass over the unfinished file for ever."""
    from torch._inductor import codecache

    made = []

    def compile_cpp(lock, builders):
        file = Path(builders[0].get_target_file_path())
        if not file.exists():
            made.append(file)
            file.write_bytes(b"gpch.014")

    def forget():
        codecache._precompile_header.cache_clear()
        programs.headers = None
        programs.cache.clear()
        programs.known.clear()
        programs.built.clear()

    monkeypatch.setattr(codecache, "_HEADER_DIR", str(tmp_path))
    monkeypatch.setattr(codecache, "_HEADER_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.setattr(codecache, "_worker_compile_cpp", compile_cpp)
    for count, left in enumerate((None, b"gpcWrite" + bytes(4096), b""), 1):
        forget()
        if left is not None:
            made[0].write_bytes(left)
        with ThreadPoolExecutor(1) as pool:
            making = pool.submit(_compat._precompile_headers)
            assert programs.known.wait(60)  # and nothing is made before the first programs are built
            assert programs.headers is None and len(made) == count - 1 and not making.done()
            programs.built.set()
            making.result()
        assert "cpp_prefix.h" in programs.headers and len(made) == count
        forget()
        _compat._precompile_headers()  # as a later process
        assert programs.known.is_set() and programs.headers and len(made) == count and len(set(made)) == 1
    codecache._precompile_header.cache_clear()


@pytest.mark.parametrize("wrong", ["headers", "code"])
def test_headers_that_are_all_that_is_wrong_with_a_program_are_removed(programs, wrong, monkeypatch, tmp_path):
    """They are cut short, on a full disk, say; where the code is wrong they stay."""
    from torch._inductor.exc import CppCompileError

    header = tmp_path / "headers.h.gch"
    header.write_text("gpch")

    def load(cls, code):
        if cls.headers or wrong == "code":
            raise CppCompileError(["g++", "-include", str(tmp_path / "headers.h")], "cannot read PCH file")
        return lambda: code

    monkeypatch.setattr(programs, "load_pybinding_async", classmethod(load))
    programs.headers = "headers.h"
    if wrong == "headers":
        assert _compat._built("a program") == "a program"
    else:
        with pytest.raises(RuntimeError, match=r"C\+\+ compile error"):
            _compat._built("a program")
    assert header.exists() == (programs.headers is not None) == (wrong == "code")


def test_loops_compile_where_warnings_are_errors():
    """torch deprecates what Inductor is imported with; in a process of its own, which has not imported it."""
    code = "import torch, torchlift; torchlift.scan_layers([torch.nn.Tanh() for _ in range(2)])(torch.ones(2))"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=300)


def test_what_inductor_precompiles_for_other_devices_stays(programs):
    assert programs._get_uncompiled_header("cpu") is None and "cuda" in programs._get_uncompiled_header("cuda")


def test_native_graphs_run_in_threads():
    layers = torchlift.scan_layers([Layer(torch.cos) for _ in range(3)])
    layers(X)
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda _: layers(X), range(20)))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_dtypes_that_do_not_fit_are_told_as_torch_tells_them():
    layers = torchlift.scan_layers([nn.Linear(4, 4) for _ in range(3)])
    with pytest.raises(RuntimeError, match="mat1 and mat2 must have the same dtype, but got Double and Float"):
        layers(torch.ones(2, 4, dtype=torch.float64))
