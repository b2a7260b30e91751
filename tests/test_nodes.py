"""A module tree that is known again, and every change that makes it another one."""

import dataclasses
import functools
import gc
import weakref

import pytest
import torch
from torch import nn

import torchlift
from torchlift import _compat, apply, scan_layers, variables
from torchlift.engine.run import last_report
from torchlift.nodes import Forest, ground, remembered

pytestmark = pytest.mark.usefixtures("float64")


@dataclasses.dataclass
class Config:
    scale: float = 2.0
    powers: list = dataclasses.field(default_factory=lambda: [1, 2])


class Halved(Config):
    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        return value / 2 if name == "scale" else value


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.config, self.table, self.shift, self.act = Config(), {"gain": 1.0}, 0.5, torch.tanh
        self.register_buffer("offset", torch.zeros(2))
        self.register_parameter("gate", None)

    def forward(self, x):
        for power in self.config.powers:
            x = x + self.config.scale * self.act(self.inner(x)) ** power
        x = x * self.table["gain"] + self.shift + self.offset
        return x if self.gate is None else x * self.gate


class Doubled(Layer):
    def forward(self, x):
        return super().forward(x) * 2


CHANGES = {
    "a number": lambda m: setattr(m, "shift", 1.5),
    "a number for a truth value": lambda m: setattr(m, "shift", True),
    "a function": lambda m: setattr(m, "act", torch.sin),
    "an entry of a dict": lambda m: m.table.update(gain=3.0),
    "a field of a configuration": lambda m: setattr(m.config, "scale", 0.5),
    "the fields of a configuration": lambda m: setattr(m.config, "__dict__", {"scale": 3.0, "powers": [2]}),
    "the class of a configuration": lambda m: setattr(m.config, "__class__", Halved),
    "a list in a configuration": lambda m: m.config.powers.append(3),
    "a parameter": lambda m: setattr(m.inner[0], "weight", nn.Parameter(torch.eye(2))),
    "the data of a parameter": lambda m: setattr(m.inner[0].weight, "data", torch.eye(2)),
    "a parameter that was None": lambda m: setattr(m, "gate", nn.Parameter(torch.full((2,), 3.0))),
    "a parameter made None": lambda m: setattr(m.inner[0], "bias", None),
    "a buffer": lambda m: setattr(m, "offset", torch.ones(2)),
    "a tie": lambda m: setattr(m.inner[1], "bias", m.inner[0].bias),
    "a submodule": lambda m: m.inner.__setitem__(0, nn.Linear(2, 2, bias=False)),
    "one more submodule": lambda m: m.inner.append(nn.Tanh()),
    "the mode": lambda m: m.eval(),
    "the class": lambda m: setattr(m, "__class__", Doubled),
    "a hook": lambda m: m.inner.register_forward_hook(lambda module, args, out: out * 5),
    "a forward of its own": lambda m: setattr(m.inner, "forward", lambda x: x * 7),
}


def expected(layers, x):
    for layer in layers:
        x = layer(x)
    return x


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    layers = nn.ModuleList([Layer(), Layer()])
    stack, x = scan_layers(layers, compile={"backend": "aot_eager"}), torch.randn(3, 2)
    for _ in range(2):
        stack(x)
    assert remembered(layers[0]).recall() is not None
    for layer in layers:
        CHANGES[change](layer)
    twin = scan_layers(layers, compile=False)
    state = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    wanted = expected(layers, x)
    twin.load_state_dict(state)
    torch.testing.assert_close(stack(x), wanted, rtol=1e-12, atol=1e-12)
    twin.load_state_dict(state)
    torch.testing.assert_close(
        apply(layers[0], {}, x, mutable=True)[0], expected(layers[:1], x), rtol=1e-12, atol=1e-12
    )


counted = pytest.mark.skipif(_compat.dict_versions([]) is None, reason="this Python counts no changes of a dict")


def planted(count=3):
    """A stack whose layers were found together, and will be."""
    stack, x = scan_layers([Layer() for _ in range(count)], compile={"backend": "aot_eager"}), torch.randn(3, 2)
    for _ in range(3):
        stack(x)
    return stack, x


@counted
@pytest.mark.parametrize("change", sorted(CHANGES.keys() - {"the data of a parameter"}))
def test_layers_are_not_recalled_together_when_one_has_changed(change):
    stack, _ = planted()
    CHANGES[change](stack[-1])
    assert ground(stack).forest.recall(list(stack)) is None


@counted
def test_layers_are_recalled_together_until_one_is_replaced():
    stack, x = planted()
    known = ground(stack).forest
    stack[1].inner[0].weight.data = torch.eye(2)
    assert any(tensor is stack[1].inner[0].weight for tensor in known.recall(list(stack))[1])
    stack(x)
    assert ground(stack).forest is known
    stack[2] = other = Layer()
    assert known.recall(list(stack)) is None
    for _ in range(4):
        stack(x)
    assert ground(stack).forest.nodes[2][0].module is other


@counted
def test_layers_that_change_at_each_call_are_rarely_looked_at_together(monkeypatch):
    planted, plant = [], Forest.__init__
    monkeypatch.setattr(Forest, "__init__", lambda self, *args: (planted.append(1), plant(self, *args))[1])
    stack, x = scan_layers([Layer() for _ in range(3)], compile={"backend": "aot_eager"}), torch.randn(3, 2)
    for _ in range(40):
        stack[1].offset = torch.ones(2)
        stack(x)
    assert len(planted) <= 5


def test_layers_are_found_one_by_one_where_python_counts_no_changes(monkeypatch):
    """As from Python 3.12 on."""
    monkeypatch.setattr(_compat, "dict_versions", lambda dicts: None)
    stack, x = scan_layers([Layer() for _ in range(3)], compile={"backend": "aot_eager"}), torch.randn(3, 2)
    for shift in (0.5, 0.5, 1.5):
        for layer in stack:
            layer.shift = shift
        torch.testing.assert_close(stack(x), expected(scan_layers(stack, compile=False), x), rtol=1e-12, atol=1e-12)
    assert ground(stack).forest is None


def test_a_layer_in_another_mode_is_told_at_each_call():
    stack, x = planted()
    stack[1].eval()
    for _ in range(3):
        stack(x)
        assert last_report().reason.startswith("some layers are in training mode and some are not")
    stack.train()
    for _ in range(3):
        stack(x)
        assert last_report().path == "compiled"


def test_a_forest_dies_with_its_stack():
    stack, _ = planted()
    dead = [weakref.ref(stack), weakref.ref(stack[1]), weakref.ref(stack[1].inner[0].weight)]
    del stack
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_where_python_counts_none(change, monkeypatch):
    """As from Python 3.12 on."""
    monkeypatch.setattr(_compat, "dict_versions", lambda dicts: None)
    layer, x = Layer(), torch.randn(3, 2)
    for _ in range(2):
        apply(layer, {}, x, mutable=True)
    assert remembered(layer).recall() is not None
    CHANGES[change](layer)
    out, _ = apply(layer, {}, x, mutable=True)
    torch.testing.assert_close(out, layer(x), rtol=1e-12, atol=1e-12)


FACTORS = {"gain": 2.0}


def scaled(x):
    return x * FACTORS["gain"]


class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.extra, self.scale, self.fn = nn.Linear(2, 2), [], 1.0, scaled

    def forward(self, x):
        x = self.fn(self.linear(x)) * self.scale
        return self.extra[0](x) if self.extra else x


def test_a_change_is_seen_after_one_that_cannot_be_watched(monkeypatch):
    layers, shared, x = nn.ModuleList([Keeping() for _ in range(3)]), nn.Linear(2, 2), torch.randn(3, 2)
    stack = scan_layers(layers, compile={"backend": "aot_eager"})
    for change in (
        lambda layer: None,
        lambda layer: layer.extra.append(shared),
        lambda layer: setattr(layer, "scale", 3.0),
        lambda layer: monkeypatch.setitem(FACTORS, "gain", 5.0),
        lambda layer: layer.register_forward_hook(lambda module, args, out: out * 5),
    ):
        for layer in layers:
            change(layer)
        torch.testing.assert_close(stack(x), expected(layers, x), rtol=1e-12, atol=1e-12)


def test_a_renamed_submodule_is_seen():
    net = nn.Sequential(nn.Linear(2, 2))
    apply(net, {}, torch.ones(1, 2))
    net._modules["other"] = net._modules.pop("0")
    out = apply(net, {"params": {"other.bias": torch.full((2,), 9.0)}}, torch.zeros(1, 2))
    assert out.tolist() == [[9.0, 9.0]]


UNWATCHED = {
    "a function of ones own": lambda: scaled,
    "a closure": lambda: (lambda value: lambda x: x * value)(2),
    "a partial": lambda: functools.partial(torch.add, torch.ones(1)),
    "a bound method": lambda: nn.Linear(1, 1).forward,
    "a module in a list": lambda: [nn.Linear(1, 1)],
    "a tensor": lambda: torch.ones(1),
    "a set": lambda: {1},
}


@pytest.mark.parametrize("value", UNWATCHED)
def test_what_can_change_unseen_is_not_remembered(value):
    layer = nn.Linear(2, 2)
    layer.extra = UNWATCHED[value]()
    apply(layer, {}, torch.ones(1, 2))
    assert remembered(layer) is None


def test_a_tied_tree_is_not_remembered():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    apply(net, {}, torch.ones(1, 2))
    assert remembered(net) is None


def test_the_memory_keeps_nothing_alive():
    net = Layer()
    apply(net, {}, torch.ones(3, 2), mutable=True)
    assert remembered(net) is not None
    dead = [weakref.ref(net), *map(weakref.ref, net.parameters())]
    before = len(torchlift.nodes._memories)
    del net
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)
    assert len(torchlift.nodes._memories) < before


def test_names_are_those_of_variables():
    net = Layer()
    for _ in range(2):
        updated = apply(net, {}, torch.ones(3, 2), mutable=True)[1]
        assert {c: set(named) for c, named in updated.items()} == {c: set(n) for c, n in variables(net).items()}
