"""Axis metadata stays in step with the axes, and becomes placements on a mesh."""

import copy
import os
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchlift
from torchlift import PARTITION_NAME, Partitioned, axis_metadata, with_partitioning


class Mlp(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)
        self.register_buffer("scale", torch.ones(dim))
        with_partitioning(self, "up.weight", ("mlp", "embed"))
        with_partitioning(self.down, "weight", ("embed", "mlp"))
        with_partitioning(self, "scale", ("embed",))

    def forward(self, x):
        return x + self.scale * self.down(self.up(x).relu())


class Step(Mlp):
    def forward(self, x, _=None):
        return super().forward(x), None


LAYERS = {"metadata_params": {PARTITION_NAME: "layers"}}


def names(module):
    return {key: found.names for key, found in axis_metadata(module).items()}


def test_axis_metadata_lists_every_named_parameter():
    assert names(nn.Sequential(Mlp())) == {
        "0.scale": ("embed",), "0.up.weight": ("mlp", "embed"), "0.down.weight": ("embed", "mlp")
    }  # fmt: skip
    assert axis_metadata(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_vmap_and_scan_insert_and_remove_the_name(axis):
    for stack in (
        torchlift.vmap(Mlp, {"params": axis, "buffers": None}, axis_size=3, **LAYERS)(),
        torchlift.scan(Step, {"params": axis, "buffers": None}, length=3, compile=False, **LAYERS)(),
    ):
        expected = ["mlp", "embed"]
        expected.insert(axis % 3, "layers")
        assert names(stack)["up.weight"] == tuple(expected)
        assert names(stack)["scale"] == ("embed",)  # shared
        assert stack.up.weight.shape[axis] == 3
        single = names(type(stack).__mro__[1]())
        assert all(names(module) == single for module in stack.to_modules())
        assert names(type(stack).from_modules(stack.to_modules())) == names(stack)


def test_every_copy_keeps_it():
    stack = torchlift.vmap(Mlp, {"params": 0}, axis_size=3, **LAYERS)()
    for again in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), stack.double()):
        assert names(again) == names(stack)
        assert again(torch.ones(3, 2, 4, dtype=again.up.weight.dtype)).shape == (3, 2, 4)
    stack.apply(lambda m: None)  # runs on views of single modules
    assert names(stack)["up.weight"] == ("layers", "mlp", "embed")


def test_nested_lifts():
    inner = torchlift.scan(Step, {"params": 1}, length=3, compile=False, **LAYERS)
    outer = torchlift.vmap(inner, {"params": 0}, axis_size=2, metadata_params={PARTITION_NAME: "stages"})()
    assert names(outer)["up.weight"] == ("stages", "mlp", "layers", "embed")
    assert names(outer.to_modules()[1])["up.weight"] == ("mlp", "layers", "embed")


def test_a_size_not_known_yet():
    stack = torchlift.vmap(Mlp, {"params": -1}, **LAYERS)()
    expected = ("mlp", "embed", "layers")
    assert names(stack)["up.weight"] == expected
    stack(torch.ones(3, 2, 4))
    assert names(stack)["up.weight"] == expected
    assert names(stack.to_modules()[0])["up.weight"] == ("mlp", "embed")


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
def test_the_body_does_not_see_the_axis(compile):
    seen = []

    class Looks(Step):
        def forward(self, x, _=None):
            seen.append(names(self)["up.weight"])
            return super().forward(x)

    torchlift.vmap(Looks, {"params": 0}, axis_size=3, **LAYERS)()(torch.ones(3, 4))
    torchlift.scan(Looks, {"params": 1}, length=3, compile=compile, **LAYERS)()(torch.ones(2, 4))
    assert set(seen) == {("mlp", "embed")}
    linear = with_partitioning(nn.Linear(2, 2), "weight", ("stage", "out"))
    body = torchlift.add_metadata_axis(lambda m: names(m)["weight"], {"params": 0}, {PARTITION_NAME: "stage"})
    assert body(linear) == ("out",)


def test_stacks_without_an_argument_for_it_have_an_axis_without_a_name():
    stack = torchlift.stack_modules([Mlp(), Mlp()])
    assert names(stack)["up.weight"] == (None, "mlp", "embed")
    assert names(torchlift.unstack_modules(stack)[0])["up.weight"] == ("mlp", "embed")
    assert torchlift.vmap(lambda m, x: m(x), {"params": 0}, in_axes=None)(stack, torch.ones(4)).shape == (2, 4)
    deep = torchlift.remat_scan(Mlp, lengths=(2, 3), compile=False)()
    assert names(deep)["up.weight"] == (None, None, "mlp", "embed")
    assert names(deep.to_modules()[0])["up.weight"] == ("mlp", "embed")


def test_spmd_axis_name_names_the_axis():
    stack = torchlift.vmap(Mlp, {"params": 0}, axis_size=3, spmd_axis_name="data")()
    assert names(stack)["up.weight"] == ("data", "mlp", "embed")


def test_add_metadata_axis():
    staged = torchlift.add_metadata_axis(Mlp, {"params": -1, "buffers": None}, {PARTITION_NAME: "stage"})
    module = staged()
    assert names(module)["up.weight"] == ("mlp", "embed", "stage") and names(module)["scale"] == ("embed",)
    assert module.up.weight.shape == (8, 4) and isinstance(module, Mlp)
    x = torch.ones(2, 4)
    torch.testing.assert_close(module(x), Mlp.forward(module, x))
    assert names(pickle.loads(pickle.dumps(module))) == names(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_tied_parameters_are_named_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a
            with_partitioning(self, "a.weight", ("out", "in"))

    stack = torchlift.vmap(Tied, {"params": 0}, axis_size=2, **LAYERS)()
    assert names(stack) == {"a.weight": ("layers", "out", "in")}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["a", "b", None]), max_size=4), st.integers(0, 4), st.sampled_from(["layers", None]))
def test_remove_axis_undoes_add_axis(names, index, name):
    before, params = Partitioned(tuple(names)), {PARTITION_NAME: name}
    index = min(index, len(names))
    after = before.add_axis(index, params)
    assert after.names[index] == name and after.remove_axis(index, params) == before


# Errors --------------------------------------------------------------------------------------------------------------


def test_an_axis_behind_the_named_ones_leaves_unnamed_ones_between():
    added = Partitioned(("a",)).add_axis(3, {PARTITION_NAME: "z"})
    assert added.names == ("a", None, None, "z")  # as in Flax
    assert added.remove_axis(3, {PARTITION_NAME: "z"}).names == ("a", None, None)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = Mlp()


def test_errors():
    linear = nn.Linear(2, 3)
    with pytest.raises(
        torchlift.MetadataError, match=r"got 1 names \('a',\), expected 2, one for each axis of shape \(3, 2\)"
    ):
        with_partitioning(linear, "weight", ("a",))
    with pytest.raises(
        torchlift.MetadataError, match=r"no such parameter or buffer, expected one of \['weight', 'bias'\]"
    ):
        with_partitioning(linear, "kernel", ("a", "b"))
    for wrong in ((1, 2), "ab", None, 2):
        with pytest.raises(
            torchlift.MetadataError, match=f"names is {re.escape(repr(wrong))}, expected a name or None"
        ):
            Partitioned(wrong)
        with pytest.raises(torchlift.MetadataError, match="expected a name or None for each axis"):
            with_partitioning(linear, "weight", wrong)
    assert torchlift.axis_metadata(linear) == {}
    with pytest.raises(torchlift.MetadataError, match=r"metadata_params=\{torchlift.PARTITION_NAME: name\}"):
        torchlift.vmap(Mlp, {"params": 0}, axis_size=2)()
    child = r"'child\.scale': a transform adds an axis to Partitioned\(names=.*\), but has no name for it"
    for lift in (
        lambda: torchlift.scan(Parent, {"params": 0}, length=3)(),
        lambda: torchlift.vmap(Parent, {"params": 0})(),
        lambda: torchlift.add_metadata_axis(Parent, {"params": 0})(),
    ):
        with pytest.raises(torchlift.MetadataError, match=rf"^(scan|vmap|add_metadata_axis)\(Parent, .*\): {child}"):
            lift()
    with pytest.raises(
        torchlift.MetadataError, match=r"^vmap\(.*\): '\w+': axis 0 of .* is to be removed, expected it to be named"
    ):
        stack = torchlift.vmap(Mlp, {"params": 0}, axis_size=2, metadata_params={PARTITION_NAME: "layers"})()
        torchlift.vmap(lambda m: m.scale, {"params": 0}, metadata_params={PARTITION_NAME: "heads"})(stack)
    with pytest.raises(
        torchlift.MetadataError, match="axis 0 of .* is to be removed, expected it to be named 'layers'"
    ):
        Partitioned(("a",)).remove_axis(0, {PARTITION_NAME: "layers"})
    for method in ("add_axis", "remove_axis"):
        with pytest.raises(NotImplementedError, match=f"AxisMetadata.{method}"):
            getattr(torchlift.AxisMetadata(), method)(0, {})


# Meshes --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh(one_process):
    return torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model"))


def test_shard_places_names_on_a_mesh(mesh):
    from torch.distributed.tensor import Replicate, Shard

    torch.manual_seed(0)
    net = nn.Sequential(Mlp(), torchlift.scan(Step, {"params": 0}, length=3, compile=False, **LAYERS)())
    net[0].again = net[0].up
    x = torch.randn(2, 4)
    expected = net[1](net[0](x))[0]
    assert torchlift.shard(net, mesh, {"mlp": "model", "embed": None}) is net
    assert net[0].up.weight.placements == (Replicate(), Shard(0))
    assert net[0].down.weight.placements == (Replicate(), Shard(1))
    assert net[1].up.weight.placements == (Replicate(), Shard(1))
    assert net[0].up.bias.placements == net[0].scale.placements == (Replicate(), Replicate())
    assert net[0].again.weight is net[0].up.weight and isinstance(net[0].up.weight, nn.Parameter)
    spread = torch.distributed.tensor.distribute_tensor(x, mesh, [Replicate(), Replicate()])
    out = net[1](net[0](spread))[0]
    torch.testing.assert_close(out.full_tensor(), expected)
    out.full_tensor().sum().backward()
    assert net[1].up.weight.grad.placements == (Replicate(), Shard(1))


def test_shard_uses_names_of_the_mesh_itself(mesh):
    from torch.distributed.tensor import Replicate, Shard

    stack = torchlift.vmap(Mlp, {"params": 0}, axis_size=2, spmd_axis_name="data")()
    torchlift.shard(stack, mesh)
    assert stack.up.weight.placements == (Shard(0), Replicate())


def test_shard_errors(mesh):
    bare = torch.distributed.init_device_mesh("cpu", (1,))
    with pytest.raises(torchlift.MetadataError, match=r"shard: mesh is None, expected a DeviceMesh"):
        torchlift.shard(Mlp(), None)
    with pytest.raises(torchlift.MetadataError, match="expected one made with mesh_dim_names="):
        torchlift.shard(Mlp(), bare)
    with pytest.raises(
        torchlift.MetadataError, match=r"the rule for 'mlp' leads to 'tensor', expected .*'data', 'model'"
    ):
        torchlift.shard(Mlp(), mesh, {"mlp": "tensor"})
    with pytest.raises(
        torchlift.MetadataError, match="up.weight: two axes of .* lead to 'model', expected one at most"
    ):
        torchlift.shard(Mlp(), mesh, {"mlp": "model", "embed": "model"})
    stack = torchlift.vmap(
        torchlift.scan(Step, {"params": 1}, length=3, compile=False, **LAYERS),
        {"params": 0}, axis_size=2, metadata_params={PARTITION_NAME: "stages"},
    )()  # fmt: skip
    torchlift.shard(copy.deepcopy(stack), mesh, {"stages": "data"})
    with pytest.raises(torchlift.MetadataError, match="axis 2, 'layers', is that of a scan"):
        torchlift.shard(stack, mesh, {"layers": "data"})


def _two_processes(rank, path, results):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("model",))
    torch.manual_seed(0)
    stack = torchlift.scan(Step, {"params": 0}, length=2, compile=False, **LAYERS)()
    expected = stack(torch.ones(2, 4))[0]
    torchlift.shard(stack, mesh, {"mlp": "model"})
    assert stack.up.weight.to_local().shape == (2, 4, 4)  # half of the 8 rows of each layer
    x = dist.tensor.distribute_tensor(torch.ones(2, 4), mesh, [dist.tensor.Replicate()])
    torch.testing.assert_close(stack(x)[0].full_tensor(), expected)
    dist.barrier()  # gloo ends a process whose peer has gone before it
    dist.destroy_process_group()


@pytest.mark.slow
def test_shard_over_two_processes(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path / "store"), None), nprocs=2)
