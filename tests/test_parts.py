"""Every thread computes its part of the batch, where the graph allows it, and nothing but the order of sums changes."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from engine_zoo import WAYS, ZOO, assert_equal, double, evaluate
from torch import nn

from torchlift import _compat, scan, scan_layers
from torchlift.engine import compiled, driver, graphs, parts
from torchlift.engine.driver import OWN
from torchlift.engine.placements import SUM, Inseparable, Rows, carried
from torchlift.engine.run import last_report
from torchlift.engine.shelf import shelve

__all__ = ["double"]  # a fixture
INDUCTOR = {"backend": "inductor"}


def in_python(part, count):
    """The program of all parts, as the driver in C++ has it."""

    def put_together(place, values):
        if values[0] is None or place is None:
            return values[:1]
        if place == OWN:
            return values
        if place == SUM:
            return [sum(values)]
        blocks = [value.unflatten(place.dim, (place.blocks, -1)) for value in values]
        return [torch.cat(blocks, place.dim + 1).flatten(place.dim, place.dim + 1)]

    def call(inputs):
        given, at = [[] for _ in range(count)], 0
        for place in part.takes:
            for number, values in enumerate(given):
                value = inputs[at + number if place == OWN else at]
                values.append(value.chunk(count, place.dim)[number] if isinstance(place, Rows) else value)
            at += count if place == OWN else 1
        inputs.clear()
        results = zip(*(part.graph(*values) for values in given), strict=True)
        return [out for place, values in zip(part.gives, results, strict=True) for out in put_together(place, values)]

    return call


@pytest.fixture
def divisions(monkeypatch):
    """Graphs run in Python, in two parts each where they can; of each pair of graphs, whether it is divided."""
    found = []

    def divide(*args):
        result = parts.divide(*args)
        found.append(result is not None)
        return result

    def compile_parts(whole, inductor, signature, forward, backward, count):
        if parts.is_small(whole.fw):
            found[-1] = False
            return None
        if backward is not None:
            backward.spread(count, whole, SimpleNamespace(packed={}, outputs=forward.gives))
        return in_python(forward, count), backward and in_python(backward, count)

    def boxed(graph):
        return lambda inputs: [graph(*inputs), inputs.clear()][0]

    monkeypatch.setattr(parts, "LEAST", 0)
    monkeypatch.setattr(graphs, "divide", divide)
    monkeypatch.setattr(graphs, "_compile_parts", compile_parts)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(_compat.Inductor, "forward", lambda self, graph, *_: (boxed(graph), None))
    monkeypatch.setattr(_compat.Inductor, "backward", lambda self, graph, *_: boxed(graph))
    yield found
    compiled.clear_cache()


@pytest.mark.parametrize("way", ["plain", "unroll"])
@pytest.mark.parametrize("name", ZOO)
def test_every_body_equals_the_plain_loop(divisions, name, way):
    fn, make = ZOO[name]
    plain = {k: v for k, v in WAYS[way].items() if k in ("reverse", "shared_draws")}
    (_, *expected), (_, *got) = evaluate(fn, make, False, plain, False), evaluate(fn, make, False, WAYS[way], INDUCTOR)
    for a, b in zip(got[:2], expected[:2]):
        assert_equal(a, b, exact=False)


class Block(nn.Module):
    """A block of a transformer, with what users put into one."""

    def __init__(self, width=8, heads=2, first=True):
        super().__init__()
        self.heads, self.first = heads, first
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale, self.up, self.down = nn.Parameter(torch.ones(width)), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x, mask=None):
        batch_first = x if self.first else x.transpose(0, 1)
        split = self.qkv(self.norm(batch_first)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in split)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = batch_first + self.out(mixed)
        x = x + self.down(F.silu(self.up(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale)))
        return x if self.first else x.transpose(0, 1)


def grads_of(model, *inputs):
    params = list(model.parameters())
    out = model(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), [inputs[0], *params], allow_unused=True)]


def in_turn(layers):
    def run(x, *others):
        for layer in layers:
            x = layer(x, *others)
        return x

    run.parameters = layers.parameters
    return run


def check(layers, *inputs, tolerance=1e-10, **given):
    got, expected = grads_of(scan_layers(layers, **given), *inputs), grads_of(in_turn(nn.ModuleList(layers)), *inputs)
    assert last_report().path == "compiled", last_report()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def rand(*sizes):
    return torch.randn(*sizes, requires_grad=True)


def test_a_transformer_is_divided(divisions):
    check([Block() for _ in range(3)], rand(4, 5, 8))
    assert divisions == [True]


def test_a_batch_in_the_second_dimension_is_divided(divisions):
    check([Block(first=False) for _ in range(3)], rand(5, 4, 8))
    assert divisions[-1]


@pytest.mark.parametrize("shape", [(4, 1, 1, 5), (1, 1, 5, 5), (5, 5), (4, 1, 5, 5)])
def test_a_mask_comes_in_parts_where_it_has_the_batch(divisions, shape):
    check([Block() for _ in range(2)], rand(4, 5, 8), torch.rand(shape) < 0.3)
    assert divisions == [True]


@pytest.mark.parametrize("settings", [{}, {"unroll": 4}, {"unroll": 4, "reverse": True}])
def test_a_loop_over_time_is_divided(divisions, settings):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(7, 12)

        def forward(self, carry, x):
            h, c = carry
            i, f, o = self.cell(torch.cat([h, x], -1)).chunk(3, -1)
            c = f.sigmoid() * c + i.tanh()
            return (o.sigmoid() * c.tanh(), c), {"h": h, "sum": c.sum(-1), "first": x[:, :1]}

    make = lambda **more: scan(Cell, variable_broadcast="params", in_axes=1, out_axes=1, **settings, **more)()  # noqa: E731
    loop, plain = make(), make(compile=False)
    plain.load_state_dict(loop.state_dict())
    start, x = (rand(4, 4), rand(4, 4)), rand(4, 8, 3)
    results = []
    for model in (loop, plain):
        (h, c), ys = model(start, x)
        total = sum((t * torch.linspace(0, 1, t.numel()).view(t.shape)).sum() for t in (h, c, *ys.values()))
        results.append([h, c, *ys.values(), *torch.autograd.grad(total, [*start, x, *model.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert all(divisions)


class Mixing(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix, self.linear = mix, nn.Linear(6, 6)

    def forward(self, x):
        return x + self.mix(self.linear(x))


MIXES = {
    "mean": lambda x: x - x.mean(0),
    "sum": lambda x: x * x.sum(0),
    "softmax": lambda x: x.softmax(0),
    "cumsum": lambda x: x.cumsum(0),
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "sort": lambda x: x.sort(0).values,
    "max": lambda x: x.amax(0, keepdim=True) + x,
    "matrix": lambda x: (x @ x.T) @ x,
    "first": lambda x: x + x[0],
    "half": lambda x: torch.cat([x[2:], x[:2]]),
    "loss": lambda x: x * x.square().mean(),
    "number": lambda x: x * torch.arange(x.shape[0], dtype=x.dtype)[:, None],
    "random": lambda x: F.dropout(x, 0.5) * 0,
    "transposed": lambda x: x.T.reshape(x.shape),
    "batchnorm": lambda x: F.batch_norm(x, None, None, training=True),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_the_batch_is_not_divided(divisions, name):
    check([Mixing(MIXES[name]) for _ in range(2)], rand(4, 6))
    # In the other dimension, the features, the weights mix them.
    assert not any(divisions)


@pytest.mark.parametrize("sizes", [(3, 5, 8), (1, 3, 8)])
def test_a_batch_without_an_equal_part_for_each_is_not_divided(divisions, sizes):
    check([Block() for _ in range(2)], rand(*sizes))
    assert divisions == [False]


def over_time(fn, start, xs, **settings):
    """Outputs and gradients of a loop, and of the plain loop."""
    results = []
    for compile in (True, False):
        module = nn.Linear(start.shape[-1], start.shape[-1])
        with torch.no_grad():
            [p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape)) for p in module.parameters()]
        h, ys = scan(fn, variable_broadcast="params", compile=compile, **settings)(module, start, xs)
        outs = [h, *ys.values()]
        total = sum((t * torch.linspace(0, 1, t.numel()).view(t.shape)).sum() for t in outs if t.requires_grad)
        grads = torch.autograd.grad(total, [start, xs, *module.parameters()], allow_unused=True)
        results.append([*outs, *(g for g in grads if g is not None)])
    return results


BODIES = {
    "sums of the batch": lambda m, c, x: (m(c) + x, {"y": (c * 3).sum(0), "more": (c * x).sum()}),
    "columns": lambda m, c, x: (torch.tanh(m(c) + x), {"y": c.t().contiguous().t(), "z": c.t().contiguous()}),
    "the last rows": lambda m, c, x: (m(c) * x, {"y": (c * x)[-8:].tanh(), "z": (c * x)[-99:99]}),
    "two at a time": lambda m, c, x: (m(c) + x, {"y": (c * x)[::2], "z": c.unflatten(0, (2, -1))}),
    "equal outputs": lambda m, c, x: (h := torch.tanh(m(c) + x), {"y": h, "z": h}),
    "ones": lambda m, c, x: (m(c) + x, {"y": c[:, None].squeeze(1), "z": (c * x).sum(1, keepdim=True)}),
    "pieces of a hoisted product": lambda m, c, x: (
        m(c) + torch.cat(m(x).split([2, 4], -1)[::-1], -1).tanh(),
        {"y": c.chunk(2, -1)[0]},
    ),
    "a mask in rows": lambda m, c, x: (
        m(c) + x,
        {"y": F.scaled_dot_product_attention(*[torch.ones(len(c), 2, 4, 4)] * 3, attn_mask=(c * x)[:, None, None, :4])},
    ),
}


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_were_divided_wrongly_or_not(divisions, name, rows):
    unroll = 3 if "hoisted" in name else 1
    got, expected = over_time(BODIES[name], rand(rows, 6), rand(3, rows, 6), unroll=unroll)
    assert all(divisions) == (name not in ("the last rows", "two at a time", "a mask in rows"))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_carry_without_a_batch_is_not_divided(divisions):
    check([Mixing(torch.tanh) for _ in range(2)], rand(6))
    assert divisions == [False]


def test_small_work_and_large_weights_are_not_divided(divisions, monkeypatch):
    monkeypatch.setattr(parts, "LEAST", 10**5)
    check([Block() for _ in range(2)], rand(4, 5, 8))
    monkeypatch.setattr(parts, "LEAST", 0)
    monkeypatch.setattr(parts, "SHARED", 100)
    check([Block() for _ in range(2)], rand(4, 6, 8))
    assert divisions == [False, False]


def test_layers_in_one_graph_weigh_as_one(divisions, monkeypatch):
    monkeypatch.setattr(parts, "SHARED", 150)  # of the four products the largest has 192
    check([Block() for _ in range(4)], rand(4, 5, 8), unroll=4)
    assert divisions == [True]


@pytest.mark.parametrize(
    ("shape", "rows", "new", "found"),
    [
        ((4, 5, 8), Rows(0), (20, 8), Rows(0)),
        ((20, 8), Rows(0), (4, 5, 8), Rows(0)),
        ((3, 4, 8), Rows(1), (12, 8), Rows(0, 3)),
        ((12, 8), Rows(0, 3), (3, 4, 8), Rows(1)),
        ((12, 8), Rows(0, 3), (3, 4, 2, 4), Rows(1)),
        ((1, 4, 8), Rows(1), (4, 1, 8), Rows(0)),
        ((8, 3), Rows(0), (2, 4, 3), Rows(0)),
        ((6, 3), Rows(0), (3, 2, 3), None),
        ((3, 4), Rows(1), (4, 3), None),
    ],
)
def test_rows_are_followed_through_views(shape, rows, new, found):
    if found is None:
        with pytest.raises(Inseparable, match="seen as"):
            carried(shape, rows, new, 2)
        return
    assert carried(shape, rows, new, 2) == found
    local = list(shape)
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    local[rows.dim] //= 2
    for part in range(2):
        take = lambda t, r: t.unflatten(r.dim, (r.blocks, 2, -1)).select(r.dim + 1, part).flatten(r.dim, r.dim + 1)  # noqa: B023, E731
        assert torch.equal(take(whole, rows).reshape(take(whole.view(new), found).shape), take(whole.view(new), found))


# The programs themselves ----------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    divided = []
    monkeypatch.setattr(parts, "LEAST", 0)
    monkeypatch.setattr(graphs, "divide", lambda *args: [result := parts.divide(*args), divided.append(result)][0])
    yield divided
    torch.set_num_threads(before)


class Steps(Block):
    """A block with values of other dtypes for backward, and a part that only the first call takes."""

    def forward(self, x, mask=None):
        kept = torch.where(x > 0, x, 0.1 * x)
        return super().forward(kept, mask) * (x.argmax(-1, keepdim=True) > 2)


def test_programs_equal_the_plain_loop(two_threads):
    layers, x, mask = [Steps() for _ in range(3)], rand(4, 5, 8), torch.rand(4, 1, 1, 5) < 0.3
    check(layers, x, mask)
    compiled.clear_cache()
    check(layers, x, mask)  # captured again, where Inductor has loaded the same program
    model, (first, *_) = scan_layers(layers), two_threads
    assert first is not None
    with torch.no_grad():  # another program
        torch.testing.assert_close(model(x, mask), in_turn(nn.ModuleList(layers))(x, mask))
    with torch.inference_mode():
        torch.testing.assert_close(model(x, mask), in_turn(nn.ModuleList(layers))(x, mask))
    # One graph, used twice; and by a thread that may use one processor only.
    out = model(x, mask)
    again = [torch.autograd.grad(out.sum(), list(model.parameters()), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again))
    torch.set_num_threads(1)
    found = torch.autograd.grad(model(x, mask).sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, again[0]))
    results = []
    threads = [threading.Thread(target=lambda: results.append(model(x, mask).detach())) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(result, out) for result in results)


@pytest.mark.parametrize("refusal", ["parts", "native"])
def test_why_a_faster_program_could_not_be_built_is_logged(two_threads, refusal, monkeypatch, caplog):
    """The next best computes the same, and nobody would see why it is slow."""
    fail = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("of another kind"))
    monkeypatch.setattr(driver, "shelve", fail)
    if refusal == "native":
        monkeypatch.setattr(_compat, "_built", fail)
    caplog.set_level("DEBUG", "torchlift")
    torch.set_default_dtype(torch.float32)
    check([Steps() for _ in range(2)], rand(4, 5, 8), tolerance=1e-4)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("torchlift")]
    wanted = ["no parts of the batch", "called from Python, not C++"][: 2 if refusal == "native" else 1]
    for line, words in zip(told, wanted, strict=True):
        assert line.startswith(f"scan_layers(Steps): {words}") and line.endswith("of another kind")


@pytest.mark.parametrize("name", ["equal outputs", "sums of the batch", "columns"])
def test_programs_of_loops_over_time(two_threads, name):
    for a, b in zip(*over_time(BODIES[name], rand(2, 6), rand(3, 2, 6)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert two_threads[0] is not None


def test_hooks_are_given_what_is_saved(two_threads):
    """In float32 it is one tensor, every number of which is one that was saved, or 0."""
    torch.set_default_dtype(torch.float32)
    layers, seen = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6)) for _ in range(2)], []
    x = rand(4, 6)

    def halved(t):
        seen.append(t)
        return t.to(torch.bfloat16)

    with torch.autograd.graph.saved_tensors_hooks(halved, lambda t: t.float()):
        out = scan_layers(layers)(x)
    found = torch.autograd.grad(out.square().sum(), [x, *layers[0].parameters()])
    expected = torch.autograd.grad(in_turn(nn.ModuleList(layers))(x).square().sum(), [x, *layers[0].parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)
    assert two_threads[0] is not None
    assert all(t.isfinite().all() for t in seen)


PROGRAM = """
    auto inputs = steal_from_raw_handles_to_raii_handles(input_handles, 1);
    static constexpr int64_t sizes[] = {4L, 8L};
    static constexpr int64_t strides[] = {8L, 1L};
    AtenTensorHandle a_handle;
    CHECK(aoti_torch_empty_strided(2, sizes, strides, cached_torch_dtype_float32, cached_torch_device_type_cpu, 0, &a_handle));
    RAIIAtenTensorHandle a(a_handle);
    kernel((float*)(a.data_ptr()));
    AtenTensorHandle b_handle;
    CHECK(aoti_torch_empty_strided(2, sizes, strides, cached_torch_dtype_float32, cached_torch_device_type_cpu, 0, &b_handle));
    RAIIAtenTensorHandle b(b_handle);
    auto view = wrap(reinterpret_tensor_wrapper(a, 2, sizes, strides, 0L)); a.reset();  // reuse
    kernel((float*)(view.data_ptr()), (float*)(b.data_ptr()));
    AtenTensorHandle c_handle;
    CHECK(aoti_torch_empty_strided(2, sizes, strides, cached_torch_dtype_float32, cached_torch_device_type_cpu, 0, &c_handle));
    RAIIAtenTensorHandle c(c_handle);
    kernel((float*)(b.data_ptr()), (float*)(c.data_ptr()));
    AtenTensorHandle d_handle;
    CHECK(aoti_torch_empty_strided(2, sizes, strides, cached_torch_dtype_float32, cached_torch_device_type_cpu, 0, &d_handle));
    RAIIAtenTensorHandle d(d_handle);
    kernel((float*)(c.data_ptr()), (float*)(d.data_ptr()));
    auto var_0 = wrap(reinterpret_tensor_wrapper(d, 2, sizes, strides, 0L));
    output_handles[0] = var_0.release();
    output_handles[1] = output_handles[0];
"""


def test_memory_is_planned_by_the_last_use_of_every_name():
    shelf = shelve(PROGRAM)
    assert [(b.handle, b.outputs) for b in shelf.kept] == [("d_handle", [0, 1])]
    # `view` keeps `a` in use while `b` is made; `c` takes its place.
    assert shelf.bytes == 256
    for place in ("block + 0, 2, sizes", "block + 128, 2, sizes", "take(0, &d_handle)"):
        assert place in shelf.code
    assert "aoti_torch_empty_strided" not in shelf.code


@pytest.mark.parametrize(
    "line",
    ["    for (auto& x : inputs) x.reset();", "    if (inputs.empty()) return;", "    call(a,", "    { a.reset(); }"],
)
def test_a_program_with_anything_else_keeps_its_memory(line):
    assert shelve(PROGRAM.replace("    kernel((float*)(a.data_ptr()));", line)) is None
