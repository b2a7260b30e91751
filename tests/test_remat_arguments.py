"""remat of a body whose argument is an object that it changes: a cache of keys and values."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchlift
from torchlift.errors import TorchliftCompileWarning, TorchliftWarning


class Cache:
    def __init__(self):
        self.keys, self.calls, self.sizes = {}, [], set()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = nn.Linear(4, 4)

    def forward(self, x, cache):
        k, past = self.k(x), cache.keys.get(0)
        cache.keys[0] = k = k if past is None else torch.cat([past, k])
        cache.calls.append(len(cache.calls))
        cache.sizes.add(len(k))
        return x + F.scaled_dot_product_attention(x, k, k, is_causal=True)


def kept(name):
    return pytest.warns(TorchliftWarning, match=rf"{name}: intermediate values are kept.*an argument is a Cache")


@pytest.fixture
def layer():
    return Attention()


@pytest.fixture
def again(layer):
    again = torchlift.remat(Attention)()
    again.load_state_dict(layer.state_dict())
    return again


X = torch.randn(5, 4)


def gradient(call, module):
    module.zero_grad()
    call(X, Cache()).square().sum().backward()
    return module.k.weight.grad.clone()


def test_autograd(layer, again):
    assert torch.equal(gradient(again, again), gradient(layer, layer))


def test_what_the_body_did_to_the_object_is_done_once(again):
    cache = Cache()
    again(again(X, cache), cache).square().sum().backward()
    assert cache.calls == [0, 1] and cache.sizes == {5, 10} and len(cache.keys[0]) == 10


def test_memory_is_saved(layer, again):
    def saved(module):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            module(X, Cache())
        return len(found)

    assert saved(again) < saved(layer)


class Static(Cache):
    def __init__(self):
        super().__init__()
        self.written = torch.zeros(5, 4)


class Writes(Attention):
    def forward(self, x, cache):
        cache.written.add_(1)
        return super().forward(x, cache)


def test_what_was_written_in_place_is_refused():
    module = torchlift.remat(Writes)()
    match = r"remat\(Writes\): the body wrote into a tensor in an argument, a Static"
    with pytest.raises(torchlift.UnsupportedError, match=match):
        module(X, Static())


def test_what_others_do_to_the_object_stays(again):
    cache = Static()
    out = again(X, cache)
    cache.written.mul_(2)
    cache.calls.append("outside")
    out.sum().backward()
    assert cache.calls == [0, "outside"]


@pytest.mark.parametrize(
    "differentiate", [torch.func.grad, lambda f: lambda p: torch.func.vjp(f, p)[1](torch.ones([]))[0]]
)
def test_transforms(differentiate, layer, again):
    params = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(module):
        return lambda params: torchlift.apply(module, {"params": params}, X, Cache()).square().sum()

    found = differentiate(loss(again))(params)
    assert torch.equal(found["k.weight"], differentiate(loss(layer))(params)["k.weight"])


def test_compiled(layer, again):
    compiled = torch.compile(lambda x, cache: again(x, cache), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled, again), gradient(layer, layer))


@pytest.mark.filterwarnings("ignore:.*an argument is a Cache")
@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
def test_layers(compile):
    layers = [Attention() for _ in range(3)]
    expected = gradient(torchlift.scan_layers(layers, compile=False), layers[1])
    layers[1].zero_grad()
    assert torch.equal(gradient(torchlift.scan_layers(layers, remat=True, compile=compile), layers[1]), expected)


def test_nest_of_loops(layer):
    def body(module, carry):
        x, cache = carry
        return module(x, cache), cache

    def plain(x, cache):
        return layer(layer(x, cache), cache)

    nest = torchlift.remat_scan(body, lengths=(2,), variable_axes={}, variable_broadcast=True)
    with kept(r"remat_scan\(body.*"), pytest.warns(TorchliftCompileWarning, match="an argument is a Cache"):
        found = gradient(lambda x, cache: nest(layer, (x, cache))[0], layer)
    assert torch.equal(found, gradient(plain, layer))


def test_nothing_is_said_where_nothing_is_computed_again(again):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        again(X, Cache())
