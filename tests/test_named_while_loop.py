"""named_call in a while_loop without max_steps=, which torch runs where torch.compile traces it."""

import pytest
import torch
from test_named_loops import AOT, Net, Quiet, X, acts, spans, trace
from torch import nn

import torchlift
from torchlift import named_call


@named_call
def goes(module, carry):
    return carry[1] < 2


class Until(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        body = lambda m, c: (m(c[0]), c[1] + 1)
        return torchlift.while_loop(goes, body, self.inner, (x, torch.zeros(())))[0]


class Step(nn.Module):
    act = named_call(lambda self, x: x.tanh() * 0.9)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @named_call
    def forward(self, x):
        return self.act(self.linear(x))


class Trained(Step):
    """The loop takes no part in the gradient."""

    def __init__(self):
        super().__init__()
        self.loop = Until(Step())

    @named_call
    def forward(self, x):
        with torch.no_grad():
            y = self.loop(x)
        return self.linear(y)


UNTIL = {
    "plainly": lambda: Until(Step()),
    "nested": lambda: Until(Net(Until(Step()))),
    "two": lambda: nn.Sequential(Until(Step()), Until(Step())),
    "remat": lambda: Until(torchlift.remat(Step)()),
    "layers": lambda: Until(Net(torchlift.scan_layers([Step(), Step()], compile=AOT))),
    "trained": Trained,
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", UNTIL.values(), ids=UNTIL)
def test_the_loop_names_every_iteration(make, backend):
    net = Net(make())
    run = torch.compile(net, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(make is Trained):
        run(X)
        assert spans(run, X) == spans(net, X)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_operators_lie_in_their_spans(backend):
    net = Net(Until(Step()))
    options = {"cpp.enable_kernel_profile": True} if backend == "inductor" else None
    run = torch.compile(net, fullgraph=True, backend=backend, options=options)
    with torch.no_grad():
        run(X)
        found = trace(run, X)
        once = ["Net.inner.inner.forward", "Net.inner.inner.<lambda>", "Net.inner.inner.goes"]
        assert spans(run, X) == ["Net.forward", once[-1], *once * 2]
    where = {part: [around[1:] for name, around in found if part in name] for part in ("addmm", "tanh", "::lt")}
    assert where["addmm"] == [once[:1]] * 2
    assert where["tanh"] == [once[:2]] * 2
    # Inductor makes one kernel of the condition and of the question whether it is 0, which comes after it.
    assert where["::lt"] == [once[2:]] * 3 * (backend == "aot_eager")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_spans_change_no_bit(backend):
    class Softmax(Quiet):
        def act(self, x):
            return super().act(x).softmax(-1) + (x - x.mean(-1, keepdim=True)).exp()

    net = Until(Softmax().eval()).bfloat16()
    found = []
    for wanted in (False, True):
        torch._dynamo.reset()
        run = torch.compile(net, fullgraph=True, backend=backend)
        with torch.no_grad(), torchlift.override_named_call(wanted):
            found.append(run(X.bfloat16()))
            assert len(acts(run, X.bfloat16())) == 2 * wanted
    torch.testing.assert_close(*found, rtol=0, atol=0)
