"""Inside torch.compile, layers that change no state are run by a graph that holds none of their tensors."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from enrolled import AOT, Block, Graphs, Model, assert_equal, check, compiled, results
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchlift
from torchlift import _compat

pytestmark = [
    pytest.mark.skipif(not _compat.TRACES_MODULES, reason=_compat.NOT_TRACED),
    pytest.mark.usefixtures("float64"),
]


def test_the_graph_has_as_many_inputs_at_any_depth() -> None:
    found = {}
    for n in (2, 9):
        model, graphs = Model(n), Graphs()
        check(compiled(model, graphs), model)
        found[n] = graphs.inputs
    assert found[2] == found[9] and len(found[2]) == 1
    assert found[2][0] < 5 + 2 + 4 + 2  # x, embed, head, what stands for four parameters, and a ticket


@pytest.mark.parametrize(
    "options",
    [
        {}, {"unroll": 2}, {"remat": True}, {"remat": True, "every": 2}, {"lengths": (2, 3)},
        {"policy": torchlift.checkpoint_policies.dots_saveable},
    ],
    ids=["as it is", "unroll", "remat", "every", "lengths", "policy"],
)  # fmt: skip
def test_equals_the_loop(options: dict[str, Any]) -> None:
    model, graphs = Model(6, **options), Graphs()
    call = compiled(model, graphs)
    for batch in (3, 5, 7):
        check(call, model, batch=batch)
        check(call, model, torch.randn(batch, 1), batch=batch)
    assert all(count < 16 for count in graphs.inputs)


def test_inductor() -> None:
    model = Model(3, compile=True)
    check(compiled(model, "inductor"), model)


def test_a_graph_that_is_not_compiled() -> None:
    model = Model(3)
    check(compiled(model, "eager"), model)


def test_another_model_of_the_same_form_has_the_same_graph() -> None:
    graphs = Graphs()
    for _ in range(3):
        model = Model()
        check(compiled(model, graphs), model)
    assert len(graphs.inputs) == 1


def replace_a_parameter(model: Model) -> None:
    model.blocks[1].linear.weight = nn.Parameter(torch.randn(4, 4))


def load_by_assignment(model: Model) -> None:
    model.load_state_dict(Model().state_dict(), assign=True)


def write_in_place(model: Model) -> None:
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(1.5)


def freeze_a_column(model: Model) -> None:
    for block in model.blocks:
        block.linear.bias.requires_grad_(False)


def freeze_a_layer(model: Model) -> None:
    model.blocks[2].requires_grad_(False)


def freeze_all(model: Model) -> None:
    model.blocks.requires_grad_(False)


def evaluate(model: Model) -> None:
    model.eval()


def append(model: Model) -> None:
    model.blocks.append(Block())


def change_a_number(model: Model) -> None:
    for block in model.blocks:
        block.p = 0.5


def change_the_class(model: Model) -> None:
    Block.scale = 2.0


def change_a_buffer(model: Model) -> None:
    model.blocks[3].shift = torch.randn(4)


def add_a_hook(model: Model) -> None:
    model.blocks[0].register_forward_hook(lambda module, args, out: out * 2)


CHANGES = [
    replace_a_parameter, load_by_assignment, write_in_place, freeze_a_column, freeze_a_layer, freeze_all, evaluate,
    append, change_a_number, change_the_class, change_a_buffer, add_a_hook,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_layers_is_seen(change: Callable[[Model], None]) -> None:
    model = Model()
    call = compiled(model)
    check(call, model)
    try:
        change(model)
        check(call, model)
        check(call, model)
    finally:
        Block.scale = 1.0


@pytest.mark.parametrize("change", [replace_a_parameter, load_by_assignment, write_in_place, change_a_buffer])
def test_new_values_need_no_new_graph(change: Callable[[Model], None]) -> None:
    model, graphs = Model(), Graphs()
    call = compiled(model, graphs)
    check(call, model)
    change(model)
    check(call, model)
    assert len(graphs.inputs) == 1


class Twice(Model):
    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return super().forward(x) * 2 + self.blocks(x) + self.blocks[0].linear.weight.square().sum()

    def loop(self, x: Tensor, *args: Any) -> Tensor:
        y = super().loop(x) * 2
        for block in self.blocks:
            x = block(x)
        return y + x + self.blocks[0].linear.weight.square().sum()


def test_layers_that_run_twice_and_are_read_beside_it() -> None:
    model = Twice()
    check(compiled(model), model)


def test_two_stacks_that_differ_in_what_is_frozen() -> None:
    class Two(Model):
        def __init__(self) -> None:
            super().__init__()
            self.others = torchlift.scan_layers([Block() for _ in range(3)], compile=AOT)
            self.others.requires_grad_(False)

        def forward(self, x: Tensor, *args: Any) -> Tensor:
            return super().forward(self.others(x))

        def loop(self, x: Tensor, *args: Any) -> Tensor:
            for block in self.others:
                x = block(x)
            return super().loop(x)

    model = Two()
    check(compiled(model), model)


def test_backward_twice_accumulation_and_hooks_of_parameters() -> None:
    model = Model()
    twin = copy.deepcopy(model)
    fired: list[int] = []
    for at, parameter in enumerate(model.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda _, at=at: fired.append(at))
    call, x = compiled(model), torch.randn(3, 4)
    for run, of in ((call, model), (twin.loop, twin)):
        torch.manual_seed(2)
        out = run(x).square().sum()
        out.backward(retain_graph=True)
        out.backward()
        run(x).sum().backward()
        torch.nn.utils.clip_grad_norm_(of.parameters(), 0.1)
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert sorted(fired) == sorted([*range(len(list(model.parameters())))] * 3)


def test_functional_call_inside_and_around() -> None:
    model = Model()
    new = {k: torch.randn_like(p).requires_grad_() for k, p in model.named_parameters()}
    x = torch.randn(3, 4)

    model.eval()

    def run(call: Any) -> list[Tensor]:
        out = torch.func.functional_call(call, new, (x,))
        return [out, *torch.autograd.grad(out.sum(), list(new.values()))]

    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Model.loop(self, x)  # type: ignore[arg-type]

    plain = Loop()
    plain.__dict__.update(model.__dict__)
    expected = run(plain)
    inside = torch.compile(lambda: torch.func.functional_call(model, new, (x,)), fullgraph=True, backend="aot_eager")
    assert_equal([inside(), *torch.autograd.grad(inside().sum(), list(new.values()))], expected)
    around = compiled(model)
    check(around, model)
    new = {f"_orig_mod.{k}": p for k, p in new.items()}
    assert_equal(run(around), expected)


class Checkpointed(Model):
    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.head(checkpoint(self.blocks, self.embed(x), use_reentrant=False))


def test_inside_a_checkpoint() -> None:
    model = Checkpointed()
    check(compiled(model), model)


def test_symbolic_sizes_from_the_start() -> None:
    model = Model()
    call = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5):
        check(call, model, batch=batch)


def test_layers_without_tensors() -> None:
    class Bare(Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torchlift.scan_layers([nn.Tanh() for _ in range(4)], compile=AOT)

    model = Bare()
    check(compiled(model), model)


def test_layers_made_in_the_traced_code_and_slices_of_layers() -> None:
    class Slices(Model):
        def forward(self, x: Tensor, *args: Any) -> Tensor:
            return self.head(self.blocks[2:](self.blocks[:2](self.embed(x))))

    model = Slices()
    check(compiled(model), model)


def test_an_export_holds_the_parameters() -> None:
    model = Model(compile=AOT).eval()
    x = torch.randn(3, 4)
    exported = torch.export.export(model, (x,), strict=True)
    torch.testing.assert_close(exported.module()(x), model.loop(x), rtol=1e-12, atol=1e-12)
    assert any("linear.weight" in name for name in exported.state_dict)


def test_two_threads() -> None:
    models = [Model(), Model()]
    calls = [compiled(model) for model in models]
    x = torch.randn(3, 4)
    for model, call in zip(models, calls):
        model.eval()
        check(call, model)
    found: list[Any] = [None, None]

    def work(at: int) -> None:
        for _ in range(20):
            found[at] = torch.autograd.grad(calls[at](x).square().sum(), list(models[at].parameters()))

    threads = [threading.Thread(target=work, args=(at,)) for at in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, model in enumerate(models):
        assert_equal(found[at], torch.autograd.grad(model.loop(x).square().sum(), list(model.parameters())))


def test_a_model_that_is_dropped_is_freed() -> None:
    model = Model()
    call = compiled(model)
    check(call, model)
    pending = call(torch.randn(3, 4)).sum()
    weight = weakref.ref(model.blocks[0].linear.weight)
    del model, call
    gc.collect()
    pending.backward()
    del pending
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("change", [replace_a_parameter, load_by_assignment])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_backward_waits_for_outlives_a_change(change: Callable[[Model], None], frozen: bool) -> None:
    model = Model()
    model.blocks.requires_grad_(not frozen)
    twin, call, x = copy.deepcopy(model), compiled(model), torch.randn(3, 4)
    torch.manual_seed(1)
    got, before = call(x).sum(), list(model.parameters())
    torch.manual_seed(1)
    expected = torch.autograd.grad(twin.loop(x).sum(), [p for p in twin.parameters() if p.requires_grad])
    change(model)
    call(x)
    gc.collect()
    assert_equal(torch.autograd.grad(got, [p for p in before if p.requires_grad]), expected)


def test_the_grad_mode_of_a_call_leaves_no_trace() -> None:
    model = Model()
    call, x = compiled(model), torch.randn(3, 4)
    check(call, model)
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(call(x), model.loop(x))
    check(call, model)
    with torch.device("meta"):
        call(x)


def gap(model: Model) -> None:
    model.blocks[1].linear.weight = nn.Parameter(torch.randn(4, 8)[:, :4])


def expand(model: Model) -> None:
    for block in model.blocks:
        block.shift = torch.ones(()).expand(4)


@pytest.mark.parametrize("change", [gap, expand])
def test_tensors_with_gaps_are_inputs_of_the_graph(change: Callable[[Model], None]) -> None:
    model = Model()
    change(model)
    check(compiled(model), model)
    assert model.blocks.enrolment == ("",)


def test_a_graph_that_is_not_compiled_serves_the_next_model() -> None:
    graphs = torch._dynamo.lookup_backend("eager")
    for _ in range(2):
        model = Model()
        check(compiled(model, graphs), model)
        del model
        gc.collect()


def test_what_only_an_address_tells_is_an_input_of_the_graph() -> None:
    model = Model()
    for block in model.blocks:
        block.settings = object()
    assert model.blocks.enrolment == ("",)
    model = Model()
    for block in model.blocks:
        block.activation = torch.relu
    assert model.blocks.enrolment[0]


def test_a_ticket_that_was_copied_needs_the_layers_as_they_are() -> None:
    model = Model()
    model.blocks.requires_grad_(False)
    call = compiled(model)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        kept, lost = call(torch.randn(3, 4)).sum(), call(torch.randn(3, 4)).sum()
    kept.backward()
    replace_a_parameter(model)
    call(torch.randn(3, 4))
    gc.collect()
    with pytest.raises(RuntimeError, match="replaced while a backward waited for them"):
        lost.backward()


def test_under_torch_func_nothing_is_enrolled() -> None:
    model = Model().eval()
    seen = []

    def loss(x: Tensor) -> Tensor:
        seen.append(model.blocks.enrolment)
        return x.sum()

    torch.func.grad(loss)(torch.ones(2))
    assert seen == [("",)]


def test_state_that_layers_change_is_published_by_the_graph() -> None:
    class Counts(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            self.calls.add_(1)
            return super().forward(x)

    model = Model()
    model.blocks = torchlift.scan_layers([Counts() for _ in range(3)], compile=AOT)
    twin, call = copy.deepcopy(model), compiled(model)
    for batch in (3, 5):
        x = torch.randn(batch, 4)
        assert_equal([*results(call, model, x), *model.buffers()], [*results(twin.loop, twin, x), *twin.buffers()])


def test_a_batch_of_another_size_in_channels_last() -> None:
    layers = torchlift.scan_layers(
        [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3)], compile=AOT
    )
    layers.to(memory_format=torch.channels_last)
    graphs = Graphs()
    call = compiled(layers, graphs)

    def loop(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    with warnings.catch_warnings():
        warnings.simplefilter("error", torchlift.TorchliftCompileWarning)
        for batch in (2, 3, 5):
            x = torch.randn(batch, 4, 6, 6).to(memory_format=torch.channels_last)
            got = results(call, layers, x)
            assert_equal(got, results(loop, layers, x))
            assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert all(count < 6 for count in graphs.inputs) and len(graphs.inputs) == 2
