"""What a graph writes into layers that it does not hold, and which grad mode it sets around them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from enrolled import Block, Graphs, Model, assert_equal, check, compiled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchlift
from torchlift import _compat

pytestmark = [
    pytest.mark.skipif(not _compat.TRACES_MODULES, reason=_compat.NOT_TRACED),
    pytest.mark.usefixtures("float64"),
]


class Writes(Model):
    """A model that writes into its layers in its forward."""

    def __init__(self, when: str, what: Callable[[nn.Module], None]):
        super().__init__()
        self.when, self.what = when, what
        self.flat, self.other = self.blocks[0].linear.weight.detach().view(-1), Block()

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if self.when == "before":
            self.what(self)
        out = super().forward(x, *args)
        if self.when == "after":
            self.what(self)
        return out

    def loop(self, x: Tensor, *args: Any) -> Tensor:
        if self.when == "before":
            self.what(self)
        out = super().loop(x, *args)
        if self.when == "after":
            self.what(self)
        return out


def scales_a_parameter(model: Any) -> None:
    with torch.no_grad():
        model.blocks[1].linear.weight.mul_(0.5)


def scales_a_view(model: Any) -> None:
    with torch.no_grad():
        model.blocks[1].linear.weight[0].copy_(model.blocks[0].linear.weight[1])


def scales_a_buffer(model: Any) -> None:
    model.blocks[2].shift.mul_(0.5)


def changes_an_attribute(model: Any) -> None:
    for block in model.blocks:
        block.p = 0.5


def replaces_a_buffer(model: Any) -> None:
    model.blocks[1].shift = model.blocks[1].shift + 1


def scales_data(model: Any) -> None:
    model.blocks[1].linear.weight.data.mul_(0.5)


def replaces_data(model: Any) -> None:
    model.blocks[1].linear.weight.data = model.blocks[1].linear.weight.data * 0.5


def scales_the_storage(model: Any) -> None:
    with torch.no_grad():
        model.flat.mul_(0.5)


def exchanges_layers(model: Any) -> None:
    model.blocks[0] = model.other


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "what", [
        scales_a_parameter, scales_a_view, scales_a_buffer, changes_an_attribute, replaces_a_buffer, scales_data,
        replaces_data, exchanges_layers,
    ],
)  # fmt: skip
def test_a_graph_that_writes_into_the_layers(what: Callable[[nn.Module], None], when: str) -> None:
    model = Writes(when, what)
    twin = copy.deepcopy(model)
    call, x = compiled(model), torch.randn(3, 4)
    if what is changes_an_attribute and when == "before":
        with pytest.warns(torchlift.TorchliftCompileWarning, match="sets attributes of the layers"):
            call(x)
        what(twin)
    for _ in range(3):
        got, expected = [], []
        for into, run, of in ((got, call, model), (expected, twin.loop, twin)):
            torch.manual_seed(1)
            grad = when == "before" and what is not replaces_data  # which torch.compile cuts off from its parameter
            with torch.set_grad_enabled(grad):
                out = run(x)
            if grad:
                into += [out, *(torch.autograd.grad(out.sum(), list(of.blocks.parameters())))]
            into += [out, *of.parameters(), *of.buffers()]
        assert_equal(got, expected)


def write_in_place(model: Model) -> None:
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(1.5)


class Settings:
    def __init__(self) -> None:
        self.p, self.calls = 0.25, 0


class Configured(Model):
    """A model whose layers share an object, and which writes to that or to another one."""

    def __init__(self, shared: bool):
        super().__init__()
        self.settings, own = Settings(), Settings()
        for block in self.blocks:
            block.settings = self.settings if shared else own

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        self.settings.calls += 1
        return super().forward(x, *args)


def test_a_write_to_an_object_counts_if_the_layers_hold_it() -> None:
    inputs = {}
    for shared in (False, True):
        torch._dynamo.reset()
        model, graphs = Configured(shared), Graphs()
        call = compiled(model, graphs)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", torchlift.TorchliftCompileWarning)
            check(call, model)
        assert any("sets attributes of the layers" in str(each.message) for each in told) == shared
        (inputs[shared],) = graphs.inputs
    assert inputs[False] < 16 < inputs[True]


def test_a_write_to_what_shares_a_storage_is_seen() -> None:
    # torch then refuses views of one storage that are inputs beside each other, as it does without scan_layers.
    model = Writes("before", scales_the_storage)
    with pytest.raises(Exception, match="does not yet handle non-differentiable view input mutations"):
        compiled(model)(torch.randn(3, 4))


SCALE = 1.0


class ByGlobal(Block):
    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        return super().forward(x) * SCALE


class SetsGlobal(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torchlift.scan_layers([ByGlobal() for _ in range(3)], compile={"backend": "aot_eager"})

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        global SCALE
        SCALE = 2.0
        return super().forward(x)


@pytest.mark.filterwarnings("ignore::torchlift.TorchliftCompileWarning")
def test_a_graph_that_sets_a_global_which_the_layers_read() -> None:
    global SCALE
    model, x = SetsGlobal().eval(), torch.randn(3, 4)
    for _ in range(2):
        SCALE = 1.0
        got = compiled(model)(x)
        SCALE = 2.0
        torch.testing.assert_close(got, model.loop(x))
    SCALE = 1.0


class Recomputed(Model):
    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.head(checkpoint(self.blocks, self.embed(x), use_reentrant=False))


@pytest.mark.parametrize("kind", [Model, Recomputed])
def test_a_write_between_forward_and_backward_is_refused(kind: type[Model]) -> None:
    model = kind()
    out = compiled(model)(torch.randn(3, 4)).sum()
    write_in_place(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


class Moves(Block):
    """Writes, if asked to, a buffer whose value backward needs."""

    def forward(self, x: Tensor, move: bool = False) -> Tensor:  # type: ignore[override]
        y = torch.tanh(self.linear(x)) * self.shift.clone()
        if move:
            self.shift.lerp_(x.detach().mean(0), 0.5)
        return x + y


class Moving(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torchlift.scan_layers([Moves() for _ in range(3)], compile={"backend": "aot_eager"})


def test_a_write_by_a_later_call_of_the_layers_is_refused_if_backward_needs_what_was_there() -> None:
    model = Moving()
    call, x = compiled(model), torch.randn(3, 4)
    out = call(x, False).sum()
    call(x, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_backward_does_not_mind_who_writes_what_its_forward_wrote() -> None:
    model, graphs = Moving(), Graphs()
    twin, call, x = copy.deepcopy(model), compiled(model, graphs), torch.randn(3, 4)
    for run, of in ((call, model), (twin.loop, twin)):
        out = run(x, True).sum()
        of.loop(x, True)
        out.backward()
    assert_equal(
        [p.grad for p in model.blocks[1].linear.parameters()], [p.grad for p in twin.blocks[1].linear.parameters()]
    )
    assert all(count < 16 for count in graphs.inputs)


class Gradless(Model):
    def forward(self, x: Tensor, *args: Any) -> Tensor:
        with torch.no_grad():
            first = self.blocks(x)
        return super().forward(x + first, *args)

    def loop(self, x: Tensor, *args: Any) -> Tensor:
        with torch.no_grad():
            first = x
            for block in self.blocks:
                first = block(first)
        return super().loop(x + first, *args)


def test_a_graph_that_changes_the_grad_mode() -> None:
    model, graphs = Gradless(), Graphs()
    call = compiled(model, graphs)
    for _ in range(3):
        check(call, model)
    assert len(graphs.inputs) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    model = Model()
    call, x = compiled(model), torch.randn(3, 4)
    for _ in range(2):
        with mode():
            torch.manual_seed(1)
            got = call(x)
            torch.manual_seed(1)
            torch.testing.assert_close(got, model.loop(x), rtol=1e-12, atol=1e-12)
        check(call, model)
