"""Collectives over a dimension of a device mesh: what a vmap computes on one machine, each process computes its part of.

The definition is the mapped call, in the same process; one process has one index of it.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import torchlift
from torchlift import _compat
from torchlift.engine.run import last_report

NEEDS_GLOO = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
EAGER_GRAPHS = {"backend": "aot_eager"}
EVERYWHERE = {"variable_axes": {"params": None, "batch_stats": None}, "axis_name": "data"}


def body(module, x):
    total = torchlift.psum(x * x, "data") + torchlift.pmax(x, "data") * torchlift.pmin(x, "data")
    out = module(total - torchlift.pmean(x, "data"))
    tiled = torchlift.all_gather(x, "data", tiled=True)
    return out, torchlift.all_gather(x, "data", axis=1) * 2, tiled * tiled, torchlift.axis_index("data")


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, carry, x):
        carry = torch.tanh(self.linear(carry) + torchlift.pmean(x, "data"))
        return carry, torchlift.psum(carry, "data")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(torchlift.psum(self.linear(x), "data"))


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def of_every_collective(rank, call, module, x):
    """``call`` on this process's row of ``x`` against the mapped call on all of them: values and gradients."""
    rows = x.clone().requires_grad_()
    expected = torchlift.vmap(body, **EVERYWHERE)(module, rows)
    weights = [torch.randn_like(out) for out in expected[:3]]
    loss = sum((out * w).sum() for out, w in zip(expected, weights))
    of_rows, *of_params = torch.autograd.grad(loss, [rows, *module.parameters()])
    mine = x[rank].clone().requires_grad_()
    got = call(module, mine)
    for out, all_of_it in zip(got, expected):
        assert_close(out, all_of_it[rank])
    loss = sum((out * w[rank]).sum() for out, w in zip(got, weights))
    of_mine, *parts = torch.autograd.grad(loss, [mine, *module.parameters()])
    assert_close(of_mine, of_rows[rank])
    for part, whole in zip(parts, of_params):
        assert_close(torchlift.psum(part, "data"), whole)


def under_transforms(rank, module, x):
    def outputs(x):
        return body(module, x)[:3]

    def mapped(x):
        return torchlift.vmap(body, **EVERYWHERE)(module, x)[:3]

    tangent = torch.randn_like(x)
    expected = torch.func.jvp(mapped, (x,), (tangent,))[1]
    for got, whole in zip(torch.func.jvp(outputs, (x[rank],), (tangent[rank],))[1], expected):
        assert_close(got, whole[rank])
    gradient = torch.func.grad(lambda x: sum(out.sin().sum() for out in mapped(x)))(x)
    assert_close(torch.func.grad(lambda x: sum(out.sin().sum() for out in outputs(x)))(x[rank]), gradient[rank])
    # Another map around it, whose rows every process has.
    for out, row in zip(torchlift.vmap(body, axis_name="row")(module, x[rank].expand(2, 4, 3)), body(module, x[rank])):
        assert_close(out[1], row)


def in_a_scan(rank, compile):
    torch.manual_seed(1)
    scan = torchlift.scan(Step, variable_broadcast="params", compile=compile)().double()
    plain = torchlift.scan(Step, variable_broadcast="params", compile=False)().double()
    plain.load_state_dict(scan.state_dict())
    xs, start = torch.randn(2, 5, 4, 3).double(), torch.zeros(4, 3).double()
    _, expected = torchlift.vmap(lambda scan, x: scan(start, x), **EVERYWHERE)(plain, xs)
    _, got = scan(start, xs[rank])
    assert last_report().path == ("plain" if compile is False else "compiled")
    assert_close(got, expected[rank])
    parts = torch.autograd.grad(got.square().sum(), scan.parameters())
    for part, whole in zip(parts, torch.autograd.grad(expected.square().sum(), plain.parameters())):
        assert_close(torchlift.psum(part, "data"), whole)


def which_mesh_it_is(data, model):
    """A compiled call is not one over the mesh that was entered when it was compiled."""
    torch.manual_seed(2)
    layers = torchlift.scan_layers([Layer().double() for _ in range(3)], compile=EAGER_GRAPHS)
    inside = torch.compile(layers, backend="aot_eager", fullgraph=True) if _compat.TRACES_MODULES else layers
    x = torch.randn(2, 3).double()
    for mesh in (data, model, data):
        with mesh:
            expected = layers[2](layers[1](layers[0](x)))
            assert_close(layers(x), expected)
            assert_close(inside(x), expected)


def recomputed_after_the_mesh_was_left(rank, data, module, x):
    mine = x[rank].clone().requires_grad_()
    with data:
        loss = body(module, mine)[0].square().sum()
        (expected,) = torch.autograd.grad(loss, mine)
        loss = torchlift.remat(body)(module, mine)[0].square().sum()
    assert_close(torch.autograd.grad(loss, mine)[0], expected)


def of_other_dtypes(rank):
    assert torchlift.psum(torch.tensor([True, False]), "data").tolist() == [2, 0]
    assert torchlift.pmax(torch.tensor([rank == 0, False]), "data").tolist() == [True, False]
    assert torchlift.psum(torch.tensor([1 + 2j]), "data").tolist() == [2 + 4j]
    assert torchlift.psum({"a": 1, "b": None}, "data") == {"a": torch.tensor(2), "b": None}
    assert torchlift.pmin(torch.tensor([rank]), "data").tolist() == [0]
    assert torchlift.psum(torch.ones(2, dtype=torch.bfloat16), "data").tolist() == [2, 2]
    assert torchlift.all_gather(torch.zeros(0, 3), "data").shape == (2, 0, 3)
    assert torchlift.axis_index(("data",)) == rank


def batch_norm(rank, data):
    torch.manual_seed(3)
    whole, part = nn.BatchNorm1d(3).double(), torchlift.sync_batch_norm(nn.BatchNorm1d(3).double(), "data")
    x = torch.randn(8, 3).double()
    with data:
        got = part(x[4 * rank :][:4])
    assert_close(got, whole(x)[4 * rank :][:4])
    for name, statistic in whole.named_buffers():
        assert_close(part.get_buffer(name), statistic)


def work(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    data = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    model = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    torch.manual_seed(0)
    module, x = nn.Linear(3, 3).double(), torch.randn(2, 4, 3).double()
    with data:
        for call in (body, torchlift.remat(body)):
            of_every_collective(rank, call, module, x)
            if call is body or _compat.TRACES_MODULES:
                of_every_collective(rank, torch.compile(call, backend="aot_eager", fullgraph=True), module, x)
        under_transforms(rank, module, x)
        for compile in (False, EAGER_GRAPHS):
            in_a_scan(rank, compile)
        of_other_dtypes(rank)
    recomputed_after_the_mesh_was_left(rank, data, module, x)
    which_mesh_it_is(data, model)
    batch_norm(rank, data)
    dist.barrier()  # gloo ends a process whose peer has gone before it
    dist.destroy_process_group()


@NEEDS_GLOO
@pytest.mark.filterwarnings("ignore")
def test_collectives_over_a_mesh_are_those_of_a_map(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"),), nprocs=2)


@pytest.fixture
def mesh(one_process):
    return dist.init_device_mesh("cpu", (1,), mesh_dim_names=("data",))


def test_a_dimension_counts_while_its_mesh_is_entered(mesh):
    with mesh:
        assert torchlift.axis_index("data") == 0
        with pytest.raises(torchlift.AxisNameError, match=r"'model', expected one of \['data'\]"):
            torchlift.psum(torch.ones(2), "model")
    with pytest.raises(torchlift.AxisNameError, match=r"expected one of \[\].* or enter the mesh: with mesh:"):
        torchlift.psum(torch.ones(2), "data")


def test_a_mapped_axis_hides_a_dimension_of_its_name(mesh):
    with mesh:
        out = torchlift.vmap(lambda m, x: torchlift.psum(x, "data"), axis_name="data")(nn.Identity(), torch.ones(3))
    assert out.tolist() == [3, 3, 3]


def test_reduce_axes_refuses_a_dimension(mesh):
    linear, x = nn.Linear(2, 2), torch.ones(2)
    with mesh, pytest.raises(torchlift.UnsupportedError, match="reduce_axes has 'data', a dimension of a device mesh"):
        torchlift.grad(lambda m, x: m(x).sum(), linear, x, reduce_axes="data")
