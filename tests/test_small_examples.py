"""The small examples compute what they say."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import grad

pytestmark = pytest.mark.usefixtures("float64")


def example(name):
    path = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_implicit_layer():
    layer = example("implicit_layer")
    losses = layer.main(steps=8)
    assert losses[-1] < 0.8 * losses[0]
    cell, x = layer.Cell(2, 4), torch.randn(3, 2, requires_grad=True)
    z, through = layer.implicit(cell, x), torch.zeros(3, 4)
    for _ in range(200):
        through = cell(through, x)
    torch.testing.assert_close(z, through, rtol=1e-8, atol=1e-9)
    inputs = [x, *cell.parameters()]
    found, wanted = (torch.autograd.grad(y.square().sum(), inputs) for y in (z, through))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)
    samples = torch.func.vmap(grad(lambda x: layer.implicit(cell, x).square().sum()))(x.detach())
    torch.testing.assert_close(samples, wanted[0], rtol=1e-7, atol=1e-8)


def test_tied_autoencoder():
    tied = example("map_variables/tied_autoencoder")
    model, losses = tied.main()
    assert losses[-1] < 0.2 * losses[0] and [p.shape for p in model.parameters()] == [(3, 8)]
    x = torch.randn(5, 8, dtype=torch.float32)
    assert torch.equal(model.to(x.dtype)(x), x @ model.encoder.weight.T @ model.encoder.weight)


def test_causal_mask():
    depends = example("map_variables/causal_mask").main()
    assert torch.equal(depends, torch.ones(6, 6).tril().bool())


def test_one_bit():
    one_bit = example("map_variables/one_bit")
    model, losses = one_bit.main()
    assert losses[-1] < 0.5 * losses[0]
    plain = nn.Sequential(*copy.deepcopy(list(model)))
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(one_bit.one_bit(p))
    x = torch.randn(5, 2)
    assert_same(model(x), plain(x))
    weight = torch.randn(3, 3, requires_grad=True)
    one_bit.one_bit(weight).square().sum().backward()
    assert_same(weight.grad, 2 * one_bit.one_bit(weight).detach())


def test_weight_norm():
    layer = example("map_variables/weight_norm").main()
    twin = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    with torch.no_grad():
        twin.bias.copy_(layer.bias)
        twin.parametrizations.weight.original0.copy_(layer.g)
        twin.parametrizations.weight.original1.copy_(layer.v)
    x = torch.randn(5, 4)
    assert_same(layer(x), twin(x))


def test_lora():
    lora = example("map_variables/lora")
    stack, losses = lora.main()
    assert losses[-1] < losses[0]
    assert {name for name, p in stack.named_parameters() if p.grad is not None} == {"a", "b"}
    x = torch.randn(5, 16)
    expected = x
    for weight, bias, a, b in zip(stack.weight, stack.bias, stack.a, stack.b):
        expected = expected + nn.functional.linear(expected, weight + b @ a, bias).tanh()
    assert_same(stack(x)[0], expected)


def test_straight_through():
    module = example("custom_vjp/straight_through")
    model, losses = module.main()
    assert losses[-1] < 0.5 * losses[0]
    x = torch.randn(5, 8)
    code = model.code(x.to(torch.get_default_dtype()))
    assert set(code.unique().tolist()) == {0.0, 1.0}
    weights = torch.randn(5, 6)
    logits = torch.randn(5, 6, requires_grad=True)
    (module.straight_through(model, logits) * weights).sum().backward()
    assert_same(logits.grad, weights)


def test_clipped_gradients():
    module = example("custom_vjp/clipped_gradients")
    exploded, clipped = module.main()
    assert exploded > 1e4 and clipped <= module.LIMIT * (1 + 1e-6)
    # Where nothing explodes, nothing is clipped.
    cell, xs = module.Cell(4, gain=0.1), torch.randn(5, 4, requires_grad=True)
    found, wanted = (
        torch.autograd.grad(module.last_state(cell, xs, step).sum() / 8, [xs, *cell.parameters()])
        for step in (module.clipped, module.call)
    )
    assert_same(found, wanted)


def test_sign_gradients():
    module = example("custom_vjp/sign_gradients")
    net, losses = module.main()
    assert losses[-1] < 0.2 * losses[0]
    x = torch.randn(5, 2, dtype=net[0].weight.dtype)
    found, wanted = (
        torch.autograd.grad(fn(net, x).square().sum(), list(net.parameters())) for fn in (module.signed, module.call)
    )
    assert_same(found, tuple(g.sign() for g in wanted))
