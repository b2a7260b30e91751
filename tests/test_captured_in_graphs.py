"""What is sown in code that torch.compile traces, and how it is named and laid out."""

import pytest
import torch
from torch import nn
from ways import AOT

import torchlift
from torchlift import capture, sow

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:Using `torch.compile")]


class Sower(nn.Linear):
    def forward(self, x):
        sow(self, "intermediates", "x", x)
        sow(self, "squares", "x", x * x)
        return super().forward(x).tanh()


LIFTED = {
    "plain": Sower,
    "remat": torchlift.remat(Sower),
    "vmap": torchlift.vmap(Sower, {"params": 0}, axis_size=2),
    "remat_scan": torchlift.remat_scan(Sower, lengths=(2,), compile=AOT),
    "remat_scan, plain": torchlift.remat_scan(Sower, lengths=(2, 1), compile=False),
    "remat_scan in map_variables": torchlift.map_variables(
        torchlift.remat_scan(Sower, lengths=(2,), compile=AOT), "params"
    ),
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def captured(run, x, *collections):
    with capture(*collections) as store:
        run(x)
    return store


def same(got, expected):
    assert {c: list(names) for c, names in got.items()} == {c: list(names) for c, names in expected.items()}
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LIFTED)
@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_module_sows_under_its_own_names(kind, warm):
    module, x = nn.Sequential(LIFTED[kind](3, 3)), torch.randn(2, 3)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    if warm:
        compiled(x)
    expected = captured(module, x)
    assert set(expected["intermediates"]) == {"0.x"}
    same(captured(compiled, x), expected)


def test_what_torch_compile_returned_has_no_part_in_names():
    outer, x = nn.Sequential(torch.compile(nn.Sequential(Sower(3, 3)), backend="aot_eager")), torch.randn(2, 3)
    assert list(captured(outer, x)["intermediates"]) == ["0.0.x"]


def looped(m, c):
    return m(c), None


LOOPS = {
    "scan": lambda m, x: torchlift.scan(looped, length=2, compile=AOT)(m, x),
    "remat_scan": torchlift.remat_scan(lambda m, c: m(c), (2,), variable_broadcast=True, variable_axes={}, compile=AOT),
    "scan in jit": torchlift.jit(lambda m, x: torchlift.scan(looped, length=2, compile=AOT)(m, x), backend="aot_eager"),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_in_a_graph_sows_what_is_asked_for_now(loop):
    module, x = Sower(3, 3), torch.randn(3)
    run = torch.compile(lambda x: LOOPS[loop](module, x), backend="aot_eager", fullgraph="jit" not in loop)
    run(x)
    for asked in (["intermediates"], ["squares"], [], ["squares", "intermediates"]):
        same(captured(run, x, *asked), captured(lambda x: LOOPS[loop](module, x), x, *asked))
        run(x)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
def test_a_nest_sows_as_its_parameters_are_laid_out(compile, axis):
    axes = {"params": 0, "intermediates": axis}
    nest = torchlift.remat_scan(Sower, lengths=(2, 3), variable_axes=axes, compile=compile)(4, 4)
    x, expected = torch.randn(5, 4), torch.empty(2, 3, 5, 4)
    store = captured(nest, x, "intermediates")
    with torch.no_grad():
        for index, layer in enumerate(nest.to_modules()):
            expected[index // 3, index % 3] = x
            x = layer(x)
    expected = expected.movedim((0, 1), (axis % 3, axis % 3 + 1))
    torch.testing.assert_close(store["intermediates"]["x"][0].detach(), expected, rtol=1e-12, atol=1e-12)
