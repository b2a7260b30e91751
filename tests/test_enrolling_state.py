"""State that layers write, batch statistics say, where the graph that runs them does not hold them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from enrolled import AOT, Graphs, Model, assert_equal, compiled, results
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchlift
from torchlift import _compat

pytestmark = [
    pytest.mark.skipif(not _compat.TRACES_MODULES, reason=_compat.NOT_TRACED),
    pytest.mark.usefixtures("float64"),
]


class Norm(nn.Module):
    """Batch statistics, dropout, and a buffer whose value backward needs, and that is written after it was read."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.25)
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("fixed", torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.linear(x)) * self.mean.clone()) * self.fixed
        if self.training:
            self.mean.lerp_(y.detach().mean(0), 0.25)
        return x + self.drop(y)


class Net(Model):
    def __init__(self, n: int = 6, layer: Callable[[], nn.Module] = Norm, **options: Any):
        super().__init__(0)
        self.blocks = torchlift.scan_layers([layer() for _ in range(n)], **{"compile": AOT, **options})


def check(model: nn.Module, *, graphs: Any = "aot_eager", calls: int = 3, batch: int = 5) -> None:
    """Trains, and compares with a twin that runs the plain loop: results, gradients, and all state after each call."""
    twin: Any = copy.deepcopy(model)
    call = compiled(model, graphs)
    for at in range(calls):
        x = torch.randn(batch + at, 4)
        got, expected = results(call, model, x), results(twin.loop, twin, x)
        assert_equal([*got, *map(torch.clone, model.buffers())], [*expected, *map(torch.clone, twin.buffers())])


def test_the_graph_has_as_many_inputs_at_any_depth() -> None:
    found = {}
    for n in (2, 9):
        graphs = Graphs()
        check(Net(n), graphs=graphs, calls=1)
        found[n] = graphs.inputs
    assert found[2] == found[9] and found[2][0] < 5 + 4 + 2  # x, embed, head; what stands for four; a ticket


@pytest.mark.parametrize(
    "options",
    [
        {"unroll": 2}, {"remat": True}, {"remat": True, "every": 2}, {"lengths": (2, 3)},
        {"policy": torchlift.checkpoint_policies.dots_saveable},
    ],
    ids=["unroll", "remat", "every", "lengths", "policy"],
)  # fmt: skip
def test_equals_the_loop(options: dict[str, Any]) -> None:
    graphs = Graphs()
    check(Net(**options), graphs=graphs)
    assert all(count < 16 for count in graphs.inputs)


def test_inductor() -> None:
    check(Net(3, compile=True), graphs="inductor")


def test_a_graph_that_is_not_compiled() -> None:
    check(Net(3), graphs="eager")


def test_training_then_evaluation_then_training() -> None:
    model = Net(3)
    twin, call = copy.deepcopy(model), compiled(model)
    for training in (True, False, True):
        model.train(training), twin.train(training)
        x = torch.randn(5, 4)
        assert_equal(results(call, model, x), results(twin.loop, twin, x))
    assert_equal(list(model.buffers()), list(twin.buffers()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    model = Net(3)
    twin, call = copy.deepcopy(model), compiled(model)
    with mode():
        for _ in range(2):
            x = torch.randn(5, 4)
            torch.manual_seed(0)
            got = call(x)
            torch.manual_seed(0)
            assert_equal([got], [twin.loop(x)])
    assert_equal(list(model.buffers()), list(twin.buffers()))


class Twice(Net):
    """Runs its layers twice in one graph, side by side."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return super().forward(x) * super().forward(x.flip(-1))

    def loop(self, x: Tensor, *args: Any) -> Tensor:
        return super().loop(x) * super().loop(x.flip(-1))


class Still(Norm):
    """Writes batch statistics, and nothing that its own backward reads."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.norm(self.linear(x))))


def test_layers_that_run_twice_in_a_graph() -> None:
    graphs = Graphs()
    check(Twice(3, layer=Still), graphs=graphs)
    assert all(count < 16 for count in graphs.inputs)


def test_two_calls_before_their_backward() -> None:
    model = Net(3, layer=Still)
    twin, call = copy.deepcopy(model), compiled(model)

    def both(run: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: run(x) * run(x.flip(-1))

    x = torch.randn(5, 4)
    assert_equal(results(both(call), model, x), results(both(twin.loop), twin, x))
    assert_equal(list(model.buffers()), list(twin.buffers()))


def test_a_backward_reads_what_a_buffer_held_when_its_layer_ran() -> None:
    model, graphs = Net(3), Graphs()
    twin, call = copy.deepcopy(model), compiled(model, graphs)

    def both(run: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: run(x) * run(x.flip(-1))

    x = torch.randn(5, 4)
    assert_equal(results(both(call), model, x), results(both(twin.loop), twin, x))
    assert all(count < 16 for count in graphs.inputs)


def reads_after(model: Any, x: Tensor, run: Any) -> Tensor:
    return run(x) * model.blocks[1].norm.running_mean


def reads_before(model: Any, x: Tensor, run: Any) -> Tensor:
    before = model.blocks[2].mean.clone()
    return run(x) * before


def writes_after(model: Any, x: Tensor, run: Any) -> Tensor:
    out = run(x)
    model.blocks[0].mean.mul_(0.5)
    return out


def runs_a_layer(model: Any, x: Tensor, run: Any) -> Tensor:
    return model.blocks[1](run(x))


def runs_a_slice(model: Any, x: Tensor, run: Any) -> Tensor:
    x = run(x)
    for layer in model.blocks[1:]:
        x = layer(x)
    return x


class Beside(Net):
    """Does something with the same layers in the graph that runs them."""

    def __init__(self, what: Callable[..., Tensor], **options: Any):
        super().__init__(3, **options)
        self.what = what

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.what(self, x, super().forward)

    def loop(self, x: Tensor, *args: Any) -> Tensor:
        return self.what(self, x, super().loop)


@pytest.mark.parametrize("what", [reads_after, reads_before, writes_after, runs_a_layer, runs_a_slice])
def test_a_graph_that_does_something_else_with_the_layers(what: Callable[..., Tensor]) -> None:
    check(Beside(what))


class TwoStacks(Net):
    """Two stacks of which the second has layers of the first."""

    def __init__(self) -> None:
        super().__init__(3, layer=Still)
        self.others = torchlift.scan_layers([self.blocks[2], self.blocks[0]], compile=AOT)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.others(super().forward(x))

    def loop(self, x: Tensor, *args: Any) -> Tensor:
        x = super().loop(x)
        for layer in self.others:
            x = layer(x)
        return x


def test_stacks_that_have_layers_in_common() -> None:
    check(TwoStacks())


class Recomputed(Net):
    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.head(checkpoint(self.blocks, self.embed(x), use_reentrant=False))


def test_inside_a_checkpoint_what_is_written_is_written_once() -> None:
    check(Recomputed(3, layer=Still))


class Common(Net):
    """Layers that write one buffer."""

    def __init__(self) -> None:
        super().__init__(3, layer=Still)
        for block in self.blocks:
            block.norm.running_mean = self.blocks[0].norm.running_mean


def test_layers_that_share_a_buffer_which_they_write() -> None:
    check(Common())


class Rebinds(Norm):
    def forward(self, x: Tensor) -> Tensor:
        self.fixed = self.fixed * 0.5 + x.detach().mean(0)
        return super().forward(x)


def test_a_buffer_that_is_replaced() -> None:
    check(Net(3, layer=Rebinds))


def test_a_layer_that_returns_more_than_the_carry() -> None:
    class More(Norm):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x.mean(0)

    class Takes(Net):
        def forward(self, x: Tensor, *args: Any) -> Tensor:
            y, mean = self.blocks(x)
            return y * mean

        def loop(self, x: Tensor, *args: Any) -> Tensor:
            for block in self.blocks:
                x, mean = block(x)
            return x * mean

    model = Takes(3, layer=More)
    for p in [*model.embed.parameters(), *model.head.parameters()]:
        p.requires_grad_(False)
    check(model)


@pytest.mark.parametrize("layer", [Norm, lambda: nn.Linear(4, 4)], ids=["state", "none"])
def test_under_hooks_on_saved_tensors(layer: Callable[[], nn.Module]) -> None:
    """Their forward saves carries and values of its own; only the graph around gives them to hooks."""

    def around(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return run(x)

        return call

    model = Net(3, layer=layer)
    twin, call, x = copy.deepcopy(model), compiled(model), torch.randn(5, 4)
    assert_equal(results(around(call), model, x), results(around(twin.loop), twin, x))
    recomputed = results(lambda x: checkpoint(call, x, use_reentrant=False), model.eval(), x)
    assert_equal(recomputed, results(twin.eval().loop, twin, x))


def test_frozen_layers_whose_statistics_move() -> None:
    model = Net(3)
    model.blocks.requires_grad_(False)
    check(model)


def test_what_a_user_saved_for_a_backward_of_his_own_is_seen_to_change() -> None:
    """As in plain torch: a buffer that is no batch statistic counts what is written into it."""
    model = Net(3)
    call = compiled(model)
    y = torch.ones(4, requires_grad=True) * model.blocks[0].mean
    call(torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_ticket_lives_until_it_is_out_of_date() -> None:
    """Guards tell tensors apart by address: one that is gone leaves its own to the ticket of another stack."""
    model = Net(3)
    ticket = model.blocks.enrolment[1]
    assert model.blocks.enrolment[1] is ticket
    compiled(model)(torch.randn(5, 4))
    assert model.blocks.enrolment[1] is not ticket
