"""Functions that a module keeps and that refer to it: bound methods, partials, closures, a forward of its own."""

import copy
import functools

import pytest
import torch
from torch import nn

import torchlift

pytestmark = pytest.mark.usefixtures("float64")

AOT = {"backend": "aot_eager"}


class Layer(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        KEEP[keep](self)

    def twice(self, x, by=2.0):
        return by * self.linear(x)

    def forward(self, x):
        return x + self.kept(x).tanh()


def in_a_dict(module):
    module.table = {"twice": module.twice, "other": [module.forward]}
    module.kept = lambda x: module.table["twice"](x)


def wrapped_forward(module):
    module.kept, old = torch.sin, module.linear.forward
    module.linear.forward = lambda x: 2.0 * old(x)
    module.kept = lambda x: module.linear(x)


KEEP = {
    "a bound method": lambda m: setattr(m, "kept", m.twice),
    "a bound method of a submodule": lambda m: setattr(m, "kept", m.linear.forward),
    "a partial": lambda m: setattr(m, "kept", functools.partial(m.twice, by=3.0)),
    "a partial of a function": lambda m: setattr(m, "kept", functools.partial(Layer.twice, m)),
    "a closure": lambda m: setattr(m, "kept", lambda x: m.linear(x)),
    "a table of methods": in_a_dict,
    "a forward around another": wrapped_forward,
}
every_kind = pytest.mark.parametrize("kind", KEEP)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_kind
@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
def test_each_layer_has_its_own(kind, compile):
    layers, x = [Layer(kind) for _ in range(3)], torch.randn(4, 3)
    run, out = torchlift.scan_layers(layers, compile=compile), x
    for layer in layers:
        out = layer(out)
    got = run(x)
    close(got, out)
    parameters = list(run.parameters())
    close(
        torch.autograd.grad(got.sum(), parameters, allow_unused=True),
        torch.autograd.grad(out.sum(), parameters, allow_unused=True),
    )
    assert torchlift.explain(run, x)[0].path == ("plain" if compile is False else "compiled")


@every_kind
def test_each_index_has_its_own(kind):
    x = torch.randn(4, 3)
    stack = torchlift.vmap(Layer, variable_axes={"params": 0}, in_axes=None, axis_size=3)(kind)
    layers = stack.to_modules()
    close(stack(x), torch.stack([layer(x) for layer in layers]))
    again = type(stack).from_modules(layers)
    for other in (again, copy.deepcopy(stack)):
        close(other(x), stack(x))
    late = torchlift.vmap(Layer, variable_axes={"params": 0}, in_axes=None)(kind)
    late.load_state_dict(stack.state_dict())
    close(late(x), stack(x))


@every_kind
def test_given_variables_are_the_ones_that_count(kind):
    layer, x = Layer(kind), torch.randn(4, 3)
    given = {name: 2.0 * p for name, p in layer.named_parameters()}
    got = torchlift.apply(layer, {"params": given}, x)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2.0)
    close(got, layer(x))


@every_kind
def test_rematerialised(kind):
    layer, x = torchlift.remat(Layer)(kind), torch.randn(4, 3, requires_grad=True)
    plain = copy.deepcopy(layer) if kind.startswith("a bound") else layer
    loss = torchlift.remat(lambda m, x: m(x))(plain, x).square().sum()
    wanted = [x, *plain.parameters()]
    close(
        torch.autograd.grad(loss, wanted, allow_unused=True),
        torch.autograd.grad(plain(x).square().sum(), wanted, allow_unused=True),
    )


CLOSURES = [kind for kind in KEEP if "closure" in kind or "table" in kind or "forward around" in kind]


@every_kind
def test_compiled_around(kind):
    layers, x = [Layer(kind) for _ in range(3)], torch.randn(4, 3)
    run = torchlift.scan_layers(layers, compile=AOT)
    close(torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x))
    stack = torchlift.vmap(Layer, variable_axes={"params": 0}, in_axes=None, axis_size=3)(kind)
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    if kind not in CLOSURES:
        close(compiled(x), stack(x))
        return
    with pytest.raises(Exception, match="a function in a plain attribute that closes over a module or tensor"):
        compiled(x)
