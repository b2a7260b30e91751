"""named_call: spans in profiler traces, in eager and compiled runs."""

import threading

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import torchlift
from torchlift import named_call


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @named_call
    def forward(self, x):
        return self.act(self.linear(x))

    @named_call
    def act(self, x):
        return x.relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    @named_call
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


EXPECTED = [
    "Net.forward",
    "Net.layers.0.forward", "Net.layers.0.act",
    "Net.layers.1.forward", "Net.layers.1.act",
]  # fmt: skip


def spans(fn, *args):
    """The names of the spans of modules in a trace of ``fn(*args)``, in order."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        fn(*args)
    roots = ("Net", "Layer", "Vmap", "Scan", "Remat", "Jit", "Sequential", "Raises")
    found = [event for event in trace.events() if event.name.startswith(roots) and "." in event.name]
    return [event.name for event in sorted(found, key=lambda event: event.time_range.start)]


def test_eager():
    assert spans(Net(), torch.ones(2, 4)) == EXPECTED
    assert spans(Layer(), torch.ones(2, 4)) == ["Layer.forward", "Layer.act"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend):
    net, x = Net(), torch.ones(2, 4)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    compiled(x).sum().backward()
    assert spans(compiled, x) == EXPECTED
    torch.testing.assert_close(compiled(x), net(x))
    with torch.no_grad():
        compiled(x)
        assert spans(compiled, x) == EXPECTED


def test_compiled_before_any_profiler_and_called_from_a_span():
    net = torch.compile(Net(), fullgraph=True, backend="aot_eager")
    net(torch.ones(2, 4))
    outer = named_call(lambda m, x: net(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert spans(outer, nn.Sequential(), torch.ones(2, 4)) == ["Sequential.<lambda>", *EXPECTED]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_inside_transforms(compiled):
    run = (lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")) if compiled else lambda f: f
    x = torch.ones(3, 2, 4)
    cases = {
        "VmapNet": (torchlift.vmap(Net, {"params": 0}, axis_size=3)(), x),
        "RematNet": (torchlift.remat(Net)(), x[0]),
        "JitNet": (torchlift.jit(Net, backend="aot_eager")(), x[0]),
    }
    for root, (module, x) in cases.items():
        module = run(module)
        module(x)
        assert spans(module, x) == [name.replace("Net", root, 1) for name in EXPECTED]
    body = named_call(lambda m, c: (m(c), None))
    loop = torchlift.scan(body, {"params": 0}, length=2, compile=False)
    loop = run(loop)
    stack = torchlift.stack_modules([Layer(), Layer()])
    loop(stack, x)
    assert spans(loop, stack, x) == ["Layer.<lambda>", "Layer.forward", "Layer.act"] * 2


class NetOfNets(nn.Module):
    """Lifted modules in a module, and in each other."""

    def __init__(self):
        super().__init__()
        self.shallow = torchlift.remat(Layer)()
        self.deep = torchlift.remat(Inner)()

    @named_call
    def forward(self, x):
        return self.deep(self.shallow(x))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torchlift.remat(Layer)()

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_lifted_module_keeps_its_path(compiled):
    net = NetOfNets()
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    run(torch.ones(2, 4))
    paths = ["forward", *[f"{path}.{method}" for path in ("shallow", "deep.layer") for method in ("forward", "act")]]
    assert spans(run, torch.ones(2, 4)) == [f"NetOfNets.{path}" for path in paths]
    expected = [f"RematInner.layer.{method}" for method in ("forward", "act")]
    assert spans(net.deep, torch.ones(2, 4)) == expected  # nothing around it is labelled: by what was lifted


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.func.vmap(f)(x[None])])
def test_inside_torch_func(transform):
    net = Net()
    x = torch.ones(2, 4)
    assert spans(transform(lambda x: net(x).sum()), x) == EXPECTED


def test_values_gradients_and_signature_are_those_of_the_method():
    net = Net()
    x = torch.randn(2, 4, requires_grad=True)
    plain = lambda x: net.layers[1].linear(net.layers[0].linear(x).relu()).relu()
    with profile():
        (got,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(plain(x).sum(), x)[0], rtol=0, atol=0)
    assert Layer.act.__name__ == "act"


def test_force_enable_disable_override():
    class Net(nn.Sequential):
        def forward(self, x):
            return self.inner(super().forward(x))

        inner = named_call(lambda self, x: x + 1, force=False)

    net, x = Net(nn.ReLU()), torch.ones(2)
    everything = ["Net.forward", "Net.0.forward", "Net.<lambda>"]
    assert spans(net, x) == []
    torchlift.enable_named_call()
    torchlift.enable_named_call()
    try:
        assert spans(net, x) == everything
        with torchlift.override_named_call(False):
            assert spans(net, x) == []
        assert spans(net, x) == everything
    finally:
        torchlift.disable_named_call()
    assert spans(net, x) == []
    with torchlift.override_named_call():
        assert spans(net, x) == everything
    assert spans(net, x) == []


def test_spans_close_when_a_module_raises():
    class Raises(nn.Module):
        @named_call
        def forward(self, x):
            raise KeyError("no")

    def run(module):
        with pytest.raises(KeyError, match="no"):
            module(1)

    with torchlift.override_named_call():
        assert spans(run, nn.Sequential(Raises()))[:2] == ["Sequential.forward", "Sequential.0.forward"]
        assert spans(nn.Sequential(nn.ReLU()), torch.ones(1)) == ["Sequential.forward", "Sequential.0.forward"]
    assert spans(run, Raises()) == ["Raises.forward"]
    assert spans(Layer(), torch.ones(2, 4)) == ["Layer.forward", "Layer.act"]


def test_threads_have_spans_of_their_own():
    found = []
    net = Net()

    def work():
        net(torch.ones(2, 4))
        found.append(torchlift.transforms.profiling._running.modules)

    with profile():
        threads = [threading.Thread(target=work) for _ in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert found == [(), (), ()]


def test_errors():
    for target in (Net, Net(), None):
        with pytest.raises(torchlift.TransformTargetError, match=r"(?s)named_call: got .*expected a method"):
            named_call(target)
    with pytest.raises(torchlift.TransformTargetError, match="the first argument is a int, expected a module"):
        named_call(lambda m: m)(1)
