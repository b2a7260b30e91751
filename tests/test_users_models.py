"""What users' models have in them and loops must take: each was refused, or ended in an error of torch."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchlift
from torchlift import LayerMismatchError, TorchliftCompileWarning, TorchliftWarning, TransformTargetError
from torchlift.engine.run import last_report

AOT = {"backend": "aot_eager"}
traced = pytest.mark.skipif(not torchlift._compat.TRACES_MODULES, reason="this torch traces no lifted modules")


def loop(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        out = layer(x)
        x = out[0] if isinstance(out, tuple) else out
    return x


def assert_trains_alike(call: Any, layers: nn.Module, x: Tensor) -> None:
    reference = copy.deepcopy(nn.ModuleList(layers.children()))
    for _ in range(2):
        out, expected = call(x), loop(reference, x)
        out = out[0] if isinstance(out, tuple) else out
        got = torch.autograd.grad(out.square().sum(), list(layers.parameters()))
        wanted = torch.autograd.grad(expected.square().sum(), list(reference.parameters()))
        for a, b in zip((out, *got), (expected, *wanted), strict=True):
            torch.testing.assert_close(a, b)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.cell = kind(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cell(x)[0]


@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_layers_with_torchs_recurrent_ones(kind: type[nn.RNNBase], compile: Any) -> None:
    layers = torchlift.scan_layers([Recurrent(kind) for _ in range(3)], compile=compile)
    assert_trains_alike(layers, layers, torch.randn(2, 5, 4))


class Extras(nn.Module):
    def __init__(self, extra: Any):
        super().__init__()
        self.linear, self.extra = nn.Linear(4, 4), extra

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.linear(x), self.extra


@traced
@pytest.mark.parametrize("extra", [None, (None, None), 3, True, 0.5, "name", {"a": None, "b": 2}])
def test_what_is_no_tensor_beside_the_carry_inside_torch_compile(extra: Any) -> None:
    layers = torchlift.scan_layers([Extras(extra) for _ in range(3)], compile=AOT)
    call = torch.compile(layers, backend="aot_eager", fullgraph=True)
    assert call(torch.randn(2, 4))[1] == extra
    assert_trains_alike(call, layers, torch.randn(2, 4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).relu() * self.scale


@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
def test_layers_that_were_compiled_one_by_one(compile: Any) -> None:
    blocks = [Block() for _ in range(3)]
    for block in blocks:
        block.compile(backend="aot_eager")
    layers = torchlift.scan_layers(blocks, compile=compile)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_trains_alike(layers, layers, torch.randn(2, 4))


@traced
def test_a_lifted_module_compiles_itself() -> None:
    x = torch.randn(2, 4)
    for module in (
        torchlift.remat(Block)(),
        torchlift.vmap(Block, variable_axes={"params": 0}, in_axes=None, axis_size=2)(),
        torchlift.scan_layers([Block() for _ in range(3)], compile=AOT),
    ):
        expected = module(x)
        module.compile(backend="aot_eager", fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(module(x), expected)


def test_what_torch_compile_returned_is_no_layer() -> None:
    with pytest.raises(TransformTargetError, match="module 0 is what torch.compile returned, expected the module that"):
        torchlift.scan_layers([torch.compile(Block()) for _ in range(2)])


@traced
def test_a_stack_that_is_no_attribute_inside_torch_compile() -> None:
    layers = torchlift.scan_layers([Block() for _ in range(3)], compile=AOT)
    x = torch.randn(2, 4)
    compiled = lambda fn, *args: torch.compile(fn, backend="aot_eager", fullgraph=True)(*args)
    torch.testing.assert_close(compiled(lambda x: layers[:2](x), x), loop(layers[:2], x))
    parameters = dict(layers.named_parameters())
    called = compiled(lambda p, x: torch.func.functional_call(layers, p, (x,)), parameters, x)
    torch.testing.assert_close(called, loop(layers, x))
    layers[0].eval()
    torch.testing.assert_close(compiled(layers, x), loop(layers, x))


def test_a_layer_that_was_appended_is_said_to_differ() -> None:
    layers = torchlift.scan_layers([Block() for _ in range(3)], compile=AOT)
    layers.append(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    x = torch.randn(2, 4)
    with pytest.warns(TorchliftCompileWarning, match="layer 3 has other submodules than layer 0, 3 modules, expected"):
        torch.testing.assert_close(layers(x), loop(layers, x))


class Rate(nn.Module):
    def __init__(self, rate: float):
        super().__init__()
        self.linear, self.rate = nn.Linear(4, 4), rate

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.rate != self.rate else self.linear(x) * self.rate


def test_a_number_that_is_none() -> None:
    layers = torchlift.scan_layers([Rate(float("nan")) for _ in range(3)], compile=AOT)
    assert_trains_alike(layers, layers, torch.randn(2, 4))
    report = last_report()
    assert report is not None and report.compilations == 1
    with pytest.raises(LayerMismatchError, match="rate 1.0 != nan"):
        torchlift.scan_layers([Rate(float("nan")), Rate(1.0)])


class Incomparable:
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise ValueError("__eq__")

    __hash__ = object.__hash__


def test_values_that_cannot_be_compared_run_in_python() -> None:
    blocks = [Block() for _ in range(3)]
    for block in blocks:
        block.packed = Incomparable()
    layers = torchlift.scan_layers(blocks, compile=AOT)
    with pytest.warns(
        TorchliftCompileWarning, match="a plain value of type Incomparable cannot be compared by content"
    ):
        assert_trains_alike(layers, layers, torch.randn(2, 4))


class OldFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Sampled(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.how == "rsample":
            return torch.distributions.Normal(y, 0 * y.detach() + 1e-9).rsample()
        if self.how == "function":
            return OldFunction.apply(y)
        with torch.enable_grad():
            z = y.detach().requires_grad_()
            return y + torch.autograd.grad(z.square().sum(), z)[0]


@pytest.mark.parametrize("how", ["rsample", "function", "energy"])
def test_what_torch_cannot_map_is_mapped_index_by_index(how: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("torchlift.transforms.vmap._warned", set())
    ensemble = torchlift.vmap(Sampled, variable_axes={"params": 0}, in_axes=None, axis_size=3)(how)
    x = torch.randn(2, 4)
    with pytest.warns(TorchliftWarning, match="runs index by index"):
        out = ensemble(x)
    for row, weight, bias in zip(out, ensemble.linear.weight, ensemble.linear.bias, strict=True):
        y = nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(row, {"rsample": y, "function": 2 * y, "energy": y + 2 * y}[how])


@pytest.mark.parametrize("how", ["remat", "scan_layers"])
def test_what_is_rematerialised_is_exported(how: str) -> None:
    module = (
        torchlift.remat(Block)() if how == "remat" else torchlift.scan_layers([Block() for _ in range(3)], remat=True)
    )
    batch = torch.export.Dim("batch")
    exported = torch.export.export(module, (torch.randn(2, 4),), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(5, 4)
    torch.testing.assert_close(exported(x), module(x))


class Stepping(nn.Module):
    def __init__(self, extra: Any):
        super().__init__()
        self.linear, self.extra = nn.Linear(4, 4), extra

    def forward(self, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        return torch.tanh(self.linear(c) + x), self.extra


@traced
@pytest.mark.parametrize("extra", [None, {"a": None}, {"a": None, "k": 3}, (None, 1)], ids=str)
def test_iterations_that_return_none_in_a_tree_inside_torch_compile(extra: Any) -> None:
    scanned = torchlift.scan(Stepping, variable_broadcast="params", compile=AOT)(extra)
    c, xs = torch.randn(4), torch.randn(5, 4)
    got = torch.compile(scanned, backend="aot_eager", fullgraph=True)(c, xs)
    torch.testing.assert_close(got, scanned(c, xs))
