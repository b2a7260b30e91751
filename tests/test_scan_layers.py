"""scan_layers is a ModuleList that runs: equal to the Python loop in values, gradients, state and draws."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from measure import saved_bytes
from torch import Tensor, nn

import torchlift
from torchlift import LayerMismatchError, OptionError, TorchliftCompileWarning, TransformTargetError
from torchlift.engine.compiled import clear_cache

AOT = {"backend": "aot_eager"}
MODES: dict[str, dict[str, Any]] = {
    "plain": {"compile": False},
    "compiled": {"compile": AOT},
    "unrolled": {"compile": AOT, "unroll": 4},
    "auto": {"compile": AOT, "unroll": "auto"},
    "remat": {"compile": AOT, "remat": True},
    "remat plain": {"compile": False, "remat": True},
    "every": {"compile": AOT, "remat": True, "every": 4},
    "lengths": {"compile": AOT, "lengths": (2, 3)},
    "policy": {"compile": AOT, "policy": torchlift.checkpoint_policies.dots_saveable},
    "host": {"compile": AOT, "policy": torchlift.checkpoint_policies.offload_carries},
    "host plain": {"compile": False, "policy": torchlift.checkpoint_policies.offload_carries},
}


class Block(nn.Module):
    def __init__(self, width: int = 4, p: float = 0.25):
        super().__init__()
        self.norm, self.linear, self.p = nn.BatchNorm1d(width), nn.Linear(width, width), p

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y = F.dropout(torch.tanh(self.linear(self.norm(x))), self.p, self.training)
        return x + y if shift is None else x + y * shift


def loop(layers: nn.ModuleList, x: Any, *args: Any) -> Any:
    for layer in layers:
        x = layer(x, *args)
    return x


def results(call: Callable[..., Tensor], layers: nn.Module, x: Tensor, *args: Any) -> list[Tensor]:
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    out = call(x, *args)
    trained = [p for p in layers.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.square().sum(), [x, *trained])
    return [out, *grads, *layers.buffers(), torch.get_rng_state()]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_loop(mode: str) -> None:
    scanned = torchlift.scan_layers([Block() for _ in range(6)], **MODES[mode])
    plain = copy.deepcopy(nn.ModuleList(scanned))
    for batch in (5, 7):
        x, shift = torch.randn(batch, 4), torch.randn(batch, 1)
        assert_equal(results(scanned, scanned, x), results(lambda *a: loop(plain, *a), plain, x))
        assert_equal(results(scanned, scanned, x, shift), results(lambda *a: loop(plain, *a), plain, x, shift))


@pytest.mark.parametrize("mode", ["compiled", "remat"])
def test_is_one_step_of_an_outer_graph(mode: str) -> None:
    scanned = torchlift.scan_layers([Block() for _ in range(6)], **MODES[mode])
    plain = copy.deepcopy(nn.ModuleList(scanned))
    outer = torch.compile(lambda x: scanned(x.sin()).cos(), backend="aot_eager", fullgraph=True)
    for batch in (5, 7, 8):
        x = torch.randn(batch, 4)
        assert_equal(results(outer, scanned, x), results(lambda x: loop(plain, x.sin()).cos(), plain, x))


def test_is_the_module_list_of_its_layers() -> None:
    layers = [Block() for _ in range(3)]
    scanned, plain = torchlift.scan_layers(layers, compile=False), nn.ModuleList(layers)
    assert isinstance(scanned, nn.ModuleList)
    assert list(scanned.state_dict()) == list(plain.state_dict())
    assert [id(p) for p in scanned.parameters()] == [id(p) for p in plain.parameters()]
    assert scanned[1] is layers[1] and len(scanned) == 3


def test_compiles_once_whatever_the_depth() -> None:
    def compilations(depth: int) -> int:
        scanned = torchlift.scan_layers([Block(5) for _ in range(depth)], compile=AOT)
        return torchlift.explain(scanned, torch.randn(3, 5))[0].compilations

    assert compilations(2) == compilations(9)


@pytest.mark.parametrize(
    ("given", "depth", "width", "nodes"),
    [
        ({"unroll": "auto"}, 8, 5, 2),
        ({"unroll": "auto"}, 9, 5, 3),
        ({"unroll": "auto"}, 7, 5, 7),  # no graph of another size for what would be left
        ({"unroll": "auto"}, 4, 1024, 4),
        ({"unroll": "auto", "remat": True}, 8, 5, 8),
        ({"unroll": 3}, 6, 5, 2),
    ],
)
def test_unroll_is_how_many_layers_make_the_one_graph(given: Any, depth: int, width: int, nodes: int) -> None:
    scanned = torchlift.scan_layers([Block(width) for _ in range(depth)], compile=AOT, **given)
    clear_cache()
    report = torchlift.explain(scanned, torch.randn(3, width))[0]
    assert report.path == "compiled" and report.nodes == nodes and report.compilations == 1


class WithExtra(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y.relu(), y.sum(-1)


def test_a_tuple_carries_its_first_element_and_the_last_layer_is_returned() -> None:
    scanned = torchlift.scan_layers([WithExtra(4, 4) for _ in range(3)], compile=AOT)
    x = torch.randn(2, 4)
    out = scanned(x)
    for layer in scanned:
        x, extra = layer(x)
    assert torch.equal(out[0], x) and torch.equal(out[1], extra)


def test_mixed_requires_grad() -> None:
    layers = [Block() for _ in range(6)]
    for layer in layers[:3]:
        layer.requires_grad_(False)
    scanned = torchlift.scan_layers(layers, compile=AOT)
    plain = copy.deepcopy(nn.ModuleList(layers))
    x = torch.randn(5, 4)
    assert_equal(results(scanned, scanned, x), results(lambda x: loop(plain, x), plain, x))


def test_layers_in_different_modes_hooks_and_shared_buffers_run_as_the_loop() -> None:
    scanned = torchlift.scan_layers([Block() for _ in range(4)], compile=AOT)
    scanned[0].eval()
    assert torchlift.explain(scanned, torch.randn(5, 4))[0].reason.startswith(
        "some layers are in training mode and some are not"
    )
    scanned.train()
    calls: list[int] = []
    scanned[1].linear.register_forward_hook(lambda *_: calls.append(1))
    scanned(torch.randn(5, 4))
    assert calls == [1]
    shared = torchlift.scan_layers([Block() for _ in range(2)], compile=AOT)
    shared[1].norm = shared[0].norm
    shared(torch.randn(5, 4))
    assert shared[0].norm.num_batches_tracked == 2


def patched(**submodules: nn.Module) -> Block:
    block = Block()
    for name, module in submodules.items():
        setattr(block, name, module)
    return block


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: Block(p=0.5), r"layer 2: p 0.5 != 0.25"),
        (lambda: Block(5), r"layer 2: norm.num_features 5 != 4|layer 2: norm.weight \(5,\)"),
        (lambda: nn.Linear(4, 4), "layer 2: the layer is a Linear, but a Block in layer 0; "),
        (lambda: patched(linear=nn.Sequential(nn.Linear(4, 4))), "layer 2: linear is a Sequential, but a Linear in"),
        (lambda: patched(more=nn.ReLU()), r"layer 2: submodules \['more'\] are in one layer only"),
        (lambda: Block().double().half(), "layer 2: norm.weight .*float16 != .*float64"),
    ],
)
def test_a_layer_that_differs_is_refused_with_the_difference(other: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(LayerMismatchError, match=match):
        torchlift.scan_layers([Block(), Block(), other()])


def test_a_difference_that_comes_later_is_refused_too() -> None:
    scanned = torchlift.scan_layers([Block() for _ in range(3)], compile=AOT)
    scanned(torch.randn(5, 4))
    scanned[2].p = 0.9
    with pytest.raises(LayerMismatchError, match="layer 2: p 0.9 != 0.25"):
        scanned(torch.randn(5, 4))


def test_scanned_attributes_may_differ() -> None:
    scanned = torchlift.scan_layers([Block(p=0.1 * i) for i in range(3)], compile=AOT, scanned_attributes=["p"])
    plain = copy.deepcopy(nn.ModuleList(scanned))
    x = torch.randn(5, 4)
    assert_equal(results(scanned, scanned, x), results(lambda x: loop(plain, x), plain, x))


def test_a_scanned_attribute_that_no_layer_has_is_named_where_layers_differ() -> None:
    layers = [patched(inner=Block(p=0.1 * i)) for i in range(2)]
    match = r"layer 1: inner.p 0.1 != 0.0; .*scanned_attributes=; no layer has a plain attribute {}, which scanned_a"
    for wrong, named in (("inner.pp", r"'inner.pp' \(did you mean 'inner.p'\?\)"), ("x", "'x'")):
        with pytest.raises(LayerMismatchError, match=match.format(named)):
            torchlift.scan_layers(layers, scanned_attributes=["training", wrong])
    with pytest.raises(LayerMismatchError, match=r"the names in scanned_attributes=$"):
        torchlift.scan_layers(layers, scanned_attributes=["training"])
    torchlift.scan_layers(layers, scanned_attributes=["inner.p", "x"])


def test_a_layer_is_a_module() -> None:
    with pytest.raises(TransformTargetError, match="module 1 is function, expected an nn.Module"):
        torchlift.scan_layers([Block(), lambda x: x])


class Widening(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)


def test_what_changes_shape_from_layer_to_layer_runs_as_the_loop_with_a_warning() -> None:
    scanned = torchlift.scan_layers([Widening() for _ in range(3)], compile=AOT)
    with pytest.warns(TorchliftCompileWarning, match="runs layer by layer"):
        assert scanned(torch.ones(2, 1)).shape == (2, 8)


def test_no_layers() -> None:
    x = torch.randn(2)
    assert torchlift.scan_layers([])(x) is x


def test_a_failing_layer_leaves_everything_as_it_was() -> None:
    class Failing(Block):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            out = super().forward(x)
            if shift is not None:
                raise RuntimeError("on purpose")
            return out

    scanned = torchlift.scan_layers([Failing() for _ in range(3)], compile=AOT)
    before = copy.deepcopy(scanned.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"):
        scanned(torch.randn(5, 4), torch.ones(5, 1))
    for key, value in scanned.state_dict().items():
        assert torch.equal(value, before[key]), key


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.drop(self.norm(x))


def fails(*_):
    raise ZeroDivisionError("mine")


DIRECTLY = {
    "hooks": lambda layers: None,
    "a shared buffer": lambda layers: setattr(layers[0], "calls", layers[1].calls),
    "mixed modes": lambda layers: layers[1].eval(),
}


@pytest.mark.parametrize("why", DIRECTLY)
def test_layers_called_directly_publish_nothing_when_one_raises(why):
    layers = [Stateful() for _ in range(3)]
    DIRECTLY[why](layers)
    handle = layers[2].register_forward_hook(fails)
    run = torchlift.scan_layers(layers)
    before = {name: (t, t.clone()) for name, t in run.named_buffers(remove_duplicate=False)}
    with pytest.raises(ZeroDivisionError, match="mine"):
        run(torch.randn(5, 4))
    for name, t in run.named_buffers(remove_duplicate=False):
        assert t is before[name][0] and torch.equal(t, before[name][1])
    handle.remove()
    run(torch.randn(5, 4))
    assert layers[0].calls == 1 and layers[0].norm.num_batches_tracked == 1


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["plain", "compiled"])
def test_layers_that_run_again_one_by_one_draw_as_a_loop_does(compile):
    class Widening(nn.Module):
        def forward(self, x):
            return torch.cat([nn.functional.dropout(x), x])

    layers, x = [Widening() for _ in range(3)], torch.ones(4)
    torch.manual_seed(5)
    with pytest.warns(TorchliftCompileWarning, match="runs layer by layer"):
        got = torchlift.scan_layers(layers, compile=compile)(x)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    for layer in layers:
        x = layer(x)
    assert torch.equal(got, x) and torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("unroll", [0, "all"])
def test_an_unroll_without_meaning_is_refused_at_once(unroll):
    with pytest.raises(OptionError, match=r"scan_layers: unroll \(or 'auto'\) is .*, expected an int from 1 on"):
        torchlift.scan_layers([nn.Linear(4, 4)], unroll=unroll)


def test_a_slice_runs_its_layers_in_the_same_way():
    layers = torchlift.scan_layers([nn.Linear(4, 4) for _ in range(5)], every=2, compile=False)  # implies remat
    assert layers.options()["remat"] is True
    part, x = layers[1:4], torch.randn(2, 4)
    assert type(part) is type(layers) and part.settings() == layers.settings() and part[0] is layers[1]
    torch.testing.assert_close(part(x), layers[3](layers[2](layers[1](x))))


class Named(NamedTuple):
    hidden: Tensor
    norm: Tensor


@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
def test_a_named_tuple_comes_back_as_one(compile):
    class Layer(nn.Linear):
        def forward(self, x, layer=0):
            y = super().forward(x) + layer
            return Named(y, y.norm())

    layers, x = torchlift.scan_layers([Layer(4, 4) for _ in range(3)], compile=compile), torch.randn(2, 4)
    expected = layers[2](layers[1](layers[0](x, 1).hidden, 1).hidden, 1)
    got = layers(x, layer=1)
    assert type(got) is Named
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-12, atol=1e-12)


def test_a_slice_runs_as_the_whole_does() -> None:
    layers = [Numbered(4, at) for at in range(4)]
    scanned = torchlift.scan_layers(layers, compile=AOT, lengths=(2, 2), scanned_attributes=["at"])
    some, x = scanned[1:3], torch.randn(2, 4)
    assert isinstance(some, nn.ModuleList) and list(some) == layers[1:3] and scanned[-1] is layers[-1]
    expected = {**scanned.settings(), "lengths": None, "remat": True}  # type: ignore[attr-defined]
    assert some.settings() == expected  # type: ignore[attr-defined]
    torch.testing.assert_close(some(x), loop(some, x), rtol=1e-12, atol=1e-12)
    for layer in scanned[:2]:  # as many models run theirs
        x = layer(x)


class Numbered(nn.Linear):
    def __init__(self, width: int, at: int):
        super().__init__(width, width)
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() * (1 + self.at)


PLAIN = {
    "hooks around a layer": lambda layers, calls: layers[1].register_forward_pre_hook(lambda *_: calls.append(1)),
    "hooks in a layer": lambda layers, calls: layers[1].linear.register_forward_hook(lambda *_: calls.append(1)),
    "mixed modes": lambda layers, calls: layers[1].eval(),
}


@pytest.mark.parametrize("options", [{"remat": True}, {"policy": torchlift.checkpoint_policies.nothing_saveable}])
@pytest.mark.parametrize("why", PLAIN)
def test_layers_that_run_one_by_one_are_rematerialised_too(why: str, options: dict[str, Any]) -> None:
    scanned = torchlift.scan_layers([Block(16) for _ in range(4)], compile=AOT, **options)
    plain = copy.deepcopy(nn.ModuleList(scanned))
    calls: list[int] = []
    for layers in (scanned, plain):
        PLAIN[why](layers, calls)
    x = torch.randn(64, 16)
    assert_equal(results(scanned, scanned, x), results(lambda x: loop(plain, x), plain, x))
    # One of the recomputed layer, one of the twin; that around a layer runs once.
    assert len(calls) == {"hooks around a layer": 2, "hooks in a layer": 3, "mixed modes": 0}[why]
    own = [*scanned.parameters(), *scanned.buffers(), *plain.parameters(), *plain.buffers()]
    assert 3 * saved_bytes(lambda: scanned(x), *own) < saved_bytes(lambda: loop(plain, x), *own)


class Cache:
    """Keys and values by layer, as decoders keep them."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def update(self, x: Tensor, at: int) -> Tensor:
        self.seen[at] = x if at not in self.seen else torch.cat([self.seen[at], x])
        return self.seen[at]


class Caching(Numbered):
    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return super().forward(x) if cache is None else x + super().forward(cache.update(x, self.at)).sum(0)


def test_an_object_of_ones_own_as_an_argument_sends_the_layers_to_python() -> None:
    scanned = torchlift.scan_layers([Caching(4, at) for at in range(3)], compile=AOT, scanned_attributes=["at"])
    cache, twin = Cache(), Cache()
    for _ in range(3):
        x = torch.randn(1, 4)
        with pytest.warns(TorchliftCompileWarning, match=r"layer by layer: an argument is a Cache, whose content"):
            got = scanned(x, cache)
        for layer in scanned:
            x = layer(x, twin)
        assert torch.equal(got, x)
    assert [torch.equal(cache.seen[at], twin.seen[at]) for at in range(3)] == [True] * 3
    assert torch.compile(scanned, backend="aot_eager")(torch.ones(1, 4), cache).shape == (1, 4)
    assert len(cache.seen[0]) == 4


class AtPosition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(9, 4))

    def forward(self, x: Tensor, at: int) -> Tensor:
        self.seen[at : at + 1] = self.linear(x)
        return x + self.seen[: at + 1].sum(0)


def test_a_position_under_an_outer_compile() -> None:
    scanned = torchlift.scan_layers([AtPosition() for _ in range(2)], compile=AOT)
    plain = copy.deepcopy(nn.ModuleList(scanned))
    outer = torch.compile(scanned, backend="aot_eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", TorchliftCompileWarning)
        for at in range(4):
            x = torch.randn(1, 4)
            assert_equal([outer(x, at)], [loop(plain, x, at)])
            assert_equal(list(scanned.buffers()), list(plain.buffers()))


def test_layers_that_tie_weights_differently_run_one_by_one() -> None:
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]
    layers[1][1].weight = layers[1][0].weight
    x = torch.randn(2, 4)
    with pytest.warns(TorchliftCompileWarning, match="layer by layer: some layers tie tensors or submodules that"):
        got = torchlift.scan_layers(layers, compile=AOT)(x)
    assert torch.equal(got, loop(nn.ModuleList(layers), x))
