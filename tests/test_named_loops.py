"""named_call in the loops that torchlift compiles itself: spans, their names, and what lies in them."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import torchlift
from torchlift import named_call
from torchlift.engine import compiled
from torchlift.engine.run import last_report

AOT = {"backend": "aot_eager"}
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_cache():
    compiled.clear_cache()  # compilations are counted below


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    @named_call
    def forward(self, x):
        return x + self.act(self.linear(x))

    @named_call
    def act(self, x):
        return self.drop(x).relu()


class Net(nn.Module):
    """Calls what it is given, which lies in ``inner``."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @named_call
    def forward(self, *args):
        out = self.inner(*args)
        return out[0] if isinstance(out, tuple) else out


def trace(fn, *args):
    """Spans and operators of a run of ``fn(*args)``: (name, names of the spans around it)."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        fn(*args)
    events = []
    for event in sorted(found.events(), key=lambda e: (e.time_range.start, -e.time_range.end)):
        around, parent = [], event.cpu_parent
        while parent is not None:
            if _is_span(parent.name):
                around.insert(0, parent.name)
            parent = parent.cpu_parent
        events.append((event.name, around))
    return events


def _is_span(name):
    return name.startswith(("Net.", "Layer.", "Cell.", "Block.", "Scan", "Remat_scan")) and "::" not in name


def spans(fn, *args):
    return [name for name, _ in trace(fn, *args) if _is_span(name)]


def per_layer(names, root="Net.inner."):
    return [f"{root}{i}.{method}" for i in names for method in ("forward", "act")]


LAYERS = {
    "plainly": {},
    "unroll": {"unroll": 2},
    "remat": {"remat": True},
    "remat every": {"remat": True, "every": 2},
    "policy": {"policy": torchlift.checkpoint_policies.dots_saveable},
    "lengths": {"lengths": (2, 2)},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("outer", [False, True], ids=["eager", "outer compile"])
def test_scan_layers_names_every_layer(options, outer):
    net = Net(torchlift.scan_layers([Layer() for _ in range(4)], compile=AOT, **options))
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if outer else net
    expected = ["Net.forward", *per_layer(range(4))]
    run(X).sum().backward()
    assert outer or last_report().path == "compiled"
    assert spans(run, X) == expected
    with torch.no_grad():
        run(X)
        assert spans(run, X) == expected


def test_layers_alone_are_named_by_their_class():
    layers = torchlift.scan_layers([Layer() for _ in range(2)], compile=AOT)
    layers(X)
    assert spans(layers, X) == ["Layer.forward", "Layer.act"] * 2


@pytest.mark.parametrize("unroll", [1, 2])
def test_operators_lie_in_their_spans(unroll):
    net = Net(torchlift.scan_layers([Layer() for _ in range(2)], compile=AOT, unroll=unroll))
    net(X)
    found = trace(net, X)
    where = {name: [around for other, around in found if other == name] for name in ("aten::addmm", "aten::relu")}
    layers = [["Net.forward", f"Net.inner.{i}.forward"] for i in range(2)]
    assert where["aten::addmm"] == layers
    assert where["aten::relu"] == [[*layer, layer[-1].replace("forward", "act")] for layer in layers]
    assert [around for name, around in found if name == "aten::add"] == layers


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @named_call
    def forward(self, carry, x):
        carry = self.step(carry, x)
        return carry, carry

    @named_call
    def step(self, carry, x):
        return (self.linear(carry) + x).tanh()


@pytest.mark.parametrize("outer", [False, True], ids=["eager", "outer compile"])
@pytest.mark.parametrize("unroll", [1, 2])
def test_a_loop_over_time(outer, unroll):
    Loop = torchlift.scan(Cell, variable_broadcast="params", unroll=unroll, compile=AOT)
    net = Net(Loop())
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if outer else net
    xs = torch.randn(3, 2, 4)
    run(X, xs).sum().backward()
    assert spans(run, X, xs) == ["Net.forward", *["Net.inner.forward", "Net.inner.step"] * 3]
    assert spans(net.inner, X, xs) == ["ScanCell.forward", "ScanCell.step"] * 3


def test_as_in_the_plain_loop():
    plain, fast = (torchlift.scan(Cell, variable_broadcast="params", compile=c)() for c in (False, AOT))
    xs = torch.randn(3, 2, 4)
    fast(X, xs)
    assert spans(fast, X, xs) == spans(plain, X, xs)
    assert spans(Net(fast), X, xs) == spans(Net(plain), X, xs)


def test_stacked_layers_and_remat_scan():
    Stack = torchlift.scan(Layer, {"params": 0}, split_rngs={"dropout": True}, length=2, compile=AOT)
    Deep = torchlift.remat_scan(Layer, lengths=(2, 2), compile=AOT)

    class Block(Layer):
        @named_call
        def forward(self, x):
            return self.act(x), None

    Stack = torchlift.scan(Block, {"params": 0}, length=2, split_rngs={"dropout": True}, compile=AOT)
    for inner, count in ((Stack(), 2), (Deep(), 4)):
        net = Net(inner)
        net(X).sum()
        assert spans(net, X) == ["Net.forward", *["Net.inner.forward", "Net.inner.act"] * count]


def test_recomputation_has_the_spans_again_and_ordinary_backward_none():
    for options, again in (({"remat": True}, per_layer([1]) + per_layer([0])), ({}, [])):
        net = Net(torchlift.scan_layers([Layer() for _ in range(2)], compile=AOT, **options))
        net(X).sum().backward()
        forward = ["Net.forward", *per_layer(range(2))]
        assert spans(lambda net=net: net(X).sum().backward()) == forward + again


def test_a_transform_in_the_body_keeps_the_whole_path():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torchlift.remat(Layer)()

        @named_call
        def forward(self, x):
            return self.layer(x)

    net = Net(torchlift.scan_layers([Block() for _ in range(2)], compile=AOT))
    net(X).sum().backward()
    each = ["forward", "layer.forward", "layer.act"]
    expected = ["Net.forward", *[f"Net.inner.{i}.{name}" for i in range(2) for name in each]]
    assert spans(net, X) == expected
    net.inner.compile_options = False
    assert spans(net, X) == expected


def test_a_stack_of_layers_in_a_body_keeps_the_whole_path():
    class Block(nn.Module):
        def __init__(self, compile):
            super().__init__()
            self.layers = torchlift.scan_layers([Layer() for _ in range(2)], compile=compile)

        @named_call
        def forward(self, x):
            return self.layers(x)

    for inner in (AOT, False):
        net = Net(torchlift.remat(Block)(inner))
        assert spans(net, X) == ["Net.forward", "Net.inner.forward", *per_layer(range(2), "Net.inner.layers.")]
        net = Net(torchlift.scan_layers([Block(inner) for _ in range(2)], compile=AOT))
        net(X)
        found = [[f"Net.inner.{i}.forward", *per_layer(range(2), f"Net.inner.{i}.layers.")] for i in range(2)]
        assert spans(net, X) == ["Net.forward", *found[0], *found[1]]


def test_dynamic_sizes_compile_no_more_than_without():
    layers = torchlift.scan_layers([Layer() for _ in range(2)], compile={**AOT, "dynamic": True})
    for rows in (3, 5, 7):
        layers(torch.randn(rows, 4)).sum().backward()
        assert last_report().compilations == 1
        assert spans(layers, torch.randn(rows, 4)) == ["Layer.forward", "Layer.act"] * 2
    assert last_report().compilations == 1  # nor does a profiler make a difference


def test_the_first_run_is_compiled_under_the_profiler():
    layers = torchlift.scan_layers([Layer() for _ in range(2)], compile=AOT)
    assert spans(layers, X) == ["Layer.forward", "Layer.act"] * 2


class Quiet(Layer):
    """Labelled where that is enabled."""

    forward = named_call(Layer.forward.__wrapped__, force=False)
    act = named_call(Layer.act.__wrapped__, force=False)


def acts(fn, *args):
    return [name for name, _ in trace(fn, *args) if name.endswith(".act")]


def _results(layers, x):
    torch.manual_seed(1)
    out = layers(x)
    layers.zero_grad()
    out.square().sum().backward()
    return [out.detach(), torch.rand(1), *(p.grad.clone() for p in layers.parameters())]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["plainly", "unroll", "policy"])
def test_spans_change_no_bit_and_can_be_toggled(backend, how):
    layers = torchlift.scan_layers([Quiet() for _ in range(4)], compile={"backend": backend}, **LAYERS[how])
    x = X.bfloat16() if backend == "inductor" else X
    layers.to(x.dtype)
    without = _results(layers, x)
    count = last_report().compilations
    assert acts(layers, x) == []
    with torchlift.override_named_call():
        found = _results(layers, x)
        assert last_report().compilations == 2 * count
        assert acts(layers, x) == [f"ScanLayers.{i}.act" for i in range(4)]
    for a, b in zip(without, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert acts(layers, x) == []
    assert last_report().compilations == 2 * count  # both are kept


def test_enabled_when_first_compiled():
    layers = torchlift.scan_layers([Quiet() for _ in range(2)], compile=AOT)
    with torchlift.override_named_call():
        layers(X)
        assert acts(layers, X) == ["ScanLayers.0.act", "ScanLayers.1.act"]
    layers(X)
    assert acts(layers, X) == []


def test_toggling_in_an_outer_compile():
    net = Net(torchlift.scan_layers([Quiet() for _ in range(2)], compile=AOT))
    run = torch.compile(net, fullgraph=True, backend="aot_eager")
    for wanted in (False, True, False):
        with torchlift.override_named_call(wanted):
            torch._dynamo.reset()
            run(X)
            assert acts(run, X) == [f"Net.inner.{i}.act" for i in range(2) if wanted]


def test_bodies_without_optional_spans_are_not_compiled_again():
    layers = torchlift.scan_layers([Layer() for _ in range(2)], compile=AOT)
    layers(X)
    with torchlift.override_named_call():
        layers(X)
    assert last_report().compilations == 1


class Fragile(Layer):
    fails = False

    @named_call
    def forward(self, x):
        return self.act(torch.ops.torchlift_tests.maybe_raise(self.linear(x)))


@torch.library.custom_op("torchlift_tests::maybe_raise", mutates_args=())
def maybe_raise(x: torch.Tensor) -> torch.Tensor:
    if Fragile.fails:
        raise KeyError("no")
    return x.clone()


maybe_raise.register_fake(lambda x: torch.empty_like(x))


def test_spans_close_when_a_graph_raises(monkeypatch):
    layers = torchlift.scan_layers([Fragile() for _ in range(2)], compile=AOT)
    with torch.no_grad():
        layers(X)

        def fail():
            with pytest.raises(KeyError, match="no"):
                layers(X)

        monkeypatch.setattr(torchlift.engine.spans._local, "open", ())
        Fragile.fails = True
        try:
            found = trace(fail)
        finally:
            Fragile.fails = False
        assert "Fragile.forward" in [name for name, _ in found]
        assert torchlift.engine.spans._local.open == ()
        found = trace(layers, X)
        assert [around for name, around in found if name == "Fragile.forward"] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"unroll": 2}], ids=str)
def test_inductor_puts_kernels_in_their_spans(options):
    class Plain(Layer):
        def __init__(self):
            super().__init__()
            self.drop = nn.Identity()

    compile = {"options": {"cpp.enable_kernel_profile": True}}  # kernels are events, too
    net = Net(torchlift.scan_layers([Plain() for _ in range(2)], compile=compile, **options))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            net(X)
            found = trace(net, X)
        assert [name for name, _ in found if _is_span(name)] == ["Net.forward", *per_layer(range(2))]
        products = [around for name, around in found if name in ("aten::addmm", "aten::mm", "aten::linear")]
        assert products == [["Net.forward", f"Net.inner.{i}.forward"] for i in range(2)]
        kernels = [around[-1] for name, around in found if name.startswith("cpp_fused") and "relu" in name]
        assert kernels == [f"Net.inner.{i}.forward" for i in range(2)]  # the sum is the last that it computes
