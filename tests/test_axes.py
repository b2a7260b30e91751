"""Named axes: collectives equal reductions over the stacked values, wherever in the body they stand."""

import copy

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacrev, jvp, vjp

import torchlift
from torchlift import all_gather, axis_index, pmax, pmean, pmin, psum

pytestmark = pytest.mark.usefixtures("float64")

N, D = 4, 3
NOTHING = nn.Identity()


def mapped(body, **options):
    """``body(x)`` at each index of the axis ``i``, and the number of calls that this takes is one."""
    lifted = torchlift.vmap(lambda m, *xs: body(*xs), axis_name="i", **options)
    return lambda *xs: lifted(NOTHING, *xs)


def compiled(fn):
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


EAGER_AND_COMPILED = pytest.mark.parametrize("run", [lambda f: f, compiled], ids=["eager", "compiled"])

COLLECTIVES = {
    "psum": (lambda x: psum(x, "i"), lambda xs: xs.sum(0)),
    "pmean": (lambda x: pmean(x, "i"), lambda xs: xs.mean(0)),
    "pmax": (lambda x: pmax(x, "i"), lambda xs: xs.amax(0)),
    "pmin": (lambda x: pmin(x, "i"), lambda xs: xs.amin(0)),
    "all_gather": (lambda x: all_gather(x, "i"), lambda xs: xs),
    "all_gather_last": (lambda x: all_gather(x, "i", axis=-1), lambda xs: xs.movedim(0, -1)),
    "all_gather_tiled": (lambda x: all_gather(x, "i", axis=-1, tiled=True), lambda xs: xs.reshape(-1)),
}
COLLECTIVE = pytest.mark.parametrize("name", COLLECTIVES)


def stacked(name):
    """The collective as a function of all indices at once, its result repeated for each."""
    reduce = COLLECTIVES[name][1]
    return lambda xs: reduce(xs).expand(N, *reduce(xs).shape)


def weigh(y):
    """A number from a value, different in each place, and its square: first and second derivatives are not zero."""
    return (y.flatten() ** 3 * torch.arange(1.0, y.numel() + 1)).sum()


# Values and derivatives ----------------------------------------------------------------------------------------------


@COLLECTIVE
@EAGER_AND_COMPILED
def test_value_equals_the_reduction(name, run):
    x = torch.randn(N, D)
    torch.testing.assert_close(run(mapped(COLLECTIVES[name][0]))(x), stacked(name)(x))


@COLLECTIVE
@EAGER_AND_COMPILED
def test_grad_inside_is_that_of_the_sum_of_all_losses(name, run):
    collective = COLLECTIVES[name][0]
    x = torch.randn(N, D)
    out = run(mapped(grad(lambda x: weigh(collective(x)) * x.sin().sum())))(x)
    expected = grad(lambda xs: sum(weigh(y) * x.sin().sum() for x, y in zip(xs, stacked(name)(xs), strict=True)))(x)
    torch.testing.assert_close(out, expected)


@COLLECTIVE
@EAGER_AND_COMPILED
def test_ordinary_autograd_outside(name, run):
    x = torch.randn(N, D, requires_grad=True)
    (got,) = torch.autograd.grad(weigh(run(mapped(COLLECTIVES[name][0]))(x)), x)
    (expected,) = torch.autograd.grad(weigh(stacked(name)(x)), x)
    torch.testing.assert_close(got, expected)


@COLLECTIVE
def test_jvp_and_its_nestings_inside(name):
    collective, full = COLLECTIVES[name][0], stacked(name)
    x, t = torch.randn(N, D), torch.randn(N, D)

    def twice(f, x, t):
        return jvp(lambda x: jvp(f, (x,), (t,))[1], (x,), (t,))[1]

    cubed = lambda x: collective(x) ** 3
    torch.testing.assert_close(
        mapped(lambda x, t: jvp(cubed, (x,), (t,))[1])(x, t), jvp(lambda x: full(x) ** 3, (x,), (t,))[1]
    )
    torch.testing.assert_close(mapped(lambda x, t: twice(cubed, x, t))(x, t), twice(lambda x: full(x) ** 3, x, t))

    def total(xs):
        return sum(weigh(y) for y in full(xs))

    forward_over_reverse = mapped(lambda x, t: jvp(grad(lambda x: weigh(collective(x))), (x,), (t,))[1])
    torch.testing.assert_close(forward_over_reverse(x, t), jvp(grad(total), (x,), (t,))[1])
    reverse_over_reverse = mapped(lambda x, t: grad(lambda x: (grad(lambda x: weigh(collective(x)))(x) * t).sum())(x))
    torch.testing.assert_close(reverse_over_reverse(x, t), grad(lambda x: (grad(total)(x) * t).sum())(x))


@COLLECTIVE
def test_torch_func_outside(name):
    x = torch.randn(N, D)
    out, full = mapped(COLLECTIVES[name][0]), stacked(name)
    torch.testing.assert_close(jacrev(out)(x), jacrev(full)(x))
    torch.testing.assert_close(hessian(lambda x: weigh(out(x)))(x), hessian(lambda x: weigh(full(x)))(x))
    torch.testing.assert_close(torch.func.vmap(out)(x[None] * 2), full(x * 2)[None])


@EAGER_AND_COMPILED
def test_extreme_shares_its_gradient_as_amax_does(run):
    x = torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    got = run(mapped(grad(lambda x: pmax(x, "i").sum())))(x)
    assert got.flatten().tolist() == [0.0, 2.0, 2.0, 0.0]  # four losses, two indices


def test_jacobian_inside_maps_the_cotangent():
    x = torch.randn(N, D)
    out = mapped(jacrev(lambda x: psum(x**2, "i")))(x)
    expected = torch.stack([N * torch.diag(2 * x[i]) for i in range(N)])
    torch.testing.assert_close(out, expected)


# Several axes, trees, numbers ----------------------------------------------------------------------------------------


@EAGER_AND_COMPILED
def test_outer_axis_through_an_inner_map(run):
    inner = torchlift.vmap(
        lambda m, x: (psum(x, "outer"), psum(x, "inner"), psum(x, ("outer", "inner")), axis_index(("outer", "inner"))),
        axis_name="inner",
    )
    x = torch.randn(N, 2, D)
    outer, inside, both, number = run(torchlift.vmap(inner, axis_name="outer"))(NOTHING, x)
    torch.testing.assert_close(outer, x.sum(0).expand_as(x))
    torch.testing.assert_close(inside, x.sum(1, keepdim=True).expand_as(x))
    torch.testing.assert_close(both, x.sum((0, 1)).expand_as(x))
    assert number.flatten().tolist() == list(range(2 * N))


@pytest.mark.parametrize("tiled", [False, True])
def test_all_gather_over_several_axes(tiled):
    x = torch.randn(N, 2, D)
    body = lambda m, x: all_gather(x, ("outer", "inner"), tiled=tiled)
    got = torchlift.vmap(torchlift.vmap(body, axis_name="inner"), axis_name="outer")(NOTHING, x)
    torch.testing.assert_close(got[1, 1], x.flatten(0, 2) if tiled else x.flatten(0, 1))


@EAGER_AND_COMPILED
def test_through_torch_func_vmap(run):
    x = torch.randn(N, 5, D)
    for dim in (0, 1):
        body = torch.func.vmap(lambda x: (psum(x, "i"), all_gather(x, "i", axis=1)), in_dims=dim, out_dims=(dim, 0))
        total, gathered = run(mapped(body))(x)
        torch.testing.assert_close(total, x.sum(0).expand_as(x))
        torch.testing.assert_close(gathered[0], x.movedim(0, -1) if dim == 0 else x.permute(2, 1, 0))


def test_inner_axis_hides_an_outer_one_of_its_name():
    x = torch.randn(N, 2)
    body = torchlift.vmap(lambda m, x: psum(x, "i"), axis_name="i")
    torch.testing.assert_close(torchlift.vmap(body, axis_name="i")(NOTHING, x), x.sum(1, keepdim=True).expand_as(x))


def test_trees_numbers_and_values_that_are_not_mapped():
    x = torch.randn(N, D)
    shared = torch.randn(D)
    out = mapped(lambda x: psum({"x": (x, None), "one": 1, "shared": shared}, "i"))(x)
    torch.testing.assert_close(out["x"][0], x.sum(0).expand_as(x))
    assert out["x"][1] is None
    assert out["one"].tolist() == [N] * N
    torch.testing.assert_close(out["shared"][0], N * shared)
    gathered, largest, mean = mapped(lambda x: (all_gather(shared, "i"), pmax(shared, "i"), pmean(2, "i")))(x)
    torch.testing.assert_close(gathered[0], shared.expand(N, D))
    torch.testing.assert_close(largest[0], shared)
    assert mean.tolist() == [2.0] * N


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_dtypes_are_kept(dtype):
    x = torch.arange(N).to(dtype)
    for collective in (psum, pmax, pmin, all_gather):
        assert mapped(lambda x, c=collective: c(x, "i"))(x).dtype == dtype
    assert mapped(lambda x: psum(x, "i"))(torch.tensor([True, True, False])).tolist() == [2, 2, 2]


# Inside of the other transforms --------------------------------------------------------------------------------------


class Centred(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return (y - pmean(y, "i")).tanh()


@pytest.fixture
def centred():
    return Centred(D, D)


def looped(module, x):
    y = nn.functional.linear(x, module.weight, module.bias)
    return (y - y.mean(0)).tanh()


def gradients(out, module):
    return torch.autograd.grad(weigh(out), list(module.parameters()))


@EAGER_AND_COMPILED
def test_inside_remat(run, centred):
    x = torch.randn(N, 2, D)
    body = torchlift.remat(lambda m, x: m(m(x)))
    out = run(torchlift.vmap(body, {"params": None}, axis_name="i"))(centred, x)
    expected = looped(centred, looped(centred, x))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, centred), gradients(expected, centred))


def test_inside_grad_inside_remat(centred):
    x = torch.randn(N, 2, D)
    loss = torchlift.remat(lambda m, x: weigh(m(x)))
    out = torchlift.vmap(lambda m, x: grad(lambda x: loss(m, x))(x), {"params": None}, axis_name="i")(centred, x)
    expected = grad(lambda xs: sum(weigh(y) for y in looped(centred, xs)))(x)
    torch.testing.assert_close(out, expected)


def test_remat_outside(centred):
    x = torch.randn(N, 2, D)
    out = torchlift.remat(torchlift.vmap(lambda m, x: m(x), {"params": None}, axis_name="i"))(centred, x)
    torch.testing.assert_close(gradients(out, centred), gradients(looped(centred, x), centred))


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["loop", "graphs"])
@EAGER_AND_COMPILED
def test_inside_scan(run, compile, centred):
    x = torch.randn(N, 2, D)
    body = torchlift.scan(lambda m, c: (m(c), None), length=3, compile=compile)
    out, _ = run(torchlift.vmap(body, {"params": None}, axis_name="i"))(centred, x)
    expected = looped(centred, looped(centred, looped(centred, x)))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, centred), gradients(expected, centred))


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["loop", "graphs"])
def test_scan_outside(compile, centred):
    x = torch.randn(3, N, 2, D)
    body = torchlift.vmap(lambda m, x: m(x), {"params": None}, axis_name="i")
    scanned = torchlift.scan(lambda m, c, x: (c, body(m, x)), compile=compile)
    _, out = scanned(centred, torch.zeros(()), x)
    expected = torch.stack([looped(centred, row) for row in x])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, centred), gradients(expected, centred))


def test_separate_variables_and_state():
    class Whitened(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(D))
            torchlift.variable(self, "state", "mean", torch.zeros, D)

        def forward(self, x):
            self.mean = pmean(x, "i") * self.scale
            return x - self.mean

    stack = torchlift.vmap(Whitened, {"params": 0}, axis_size=N, axis_name="i")()
    x = torch.randn(N, D)
    torch.testing.assert_close(stack(x), x - x.mean(0) * stack.scale)
    torch.testing.assert_close(stack.mean, (x.mean(0) * stack.scale).detach())


# Batch norm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 2, 2)])
def test_sync_batch_norm_equals_the_joined_batch(shape, momentum):
    plain = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](3, momentum=momentum)
    nn.init.normal_(plain.weight)
    layer = torchlift.sync_batch_norm(copy.deepcopy(plain), "i")
    run = torchlift.vmap(lambda m, x: m(x), {"params": None, "batch_stats": None}, axis_name="i")
    for _ in range(2):
        x = torch.randn(N, *shape, requires_grad=True)
        joined = x.flatten(0, 1)
        out, expected = run(layer, x), plain(joined).unflatten(0, (N, -1))
        torch.testing.assert_close(out, expected)
        a = torch.autograd.grad(weigh(out), [x, *layer.parameters()])
        b = torch.autograd.grad(weigh(expected), [x, *plain.parameters()])
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))
    layer.eval(), plain.eval()
    torch.testing.assert_close(run(layer, x), plain(joined).unflatten(0, (N, -1)))


SHARED_STATISTICS = dict(variable_axes={"params": None, "batch_stats": None}, axis_name="i")


def test_sync_batch_norm_compiled():
    net = torchlift.sync_batch_norm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "i")
    twin, x = copy.deepcopy(net), torch.randn(N, 5, 3)
    run = torchlift.vmap(lambda m, x: m(x), **SHARED_STATISTICS)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(net, x), run(twin, x))
    torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))


def test_sync_batch_norm_keeps_no_statistics_where_they_are_turned_off():
    plain = nn.BatchNorm1d(3)
    layer, x = torchlift.sync_batch_norm(copy.deepcopy(plain), "i"), torch.randn(N, 5, 3)
    plain.track_running_stats = layer.track_running_stats = False
    out = torchlift.vmap(lambda m, x: m(x), **SHARED_STATISTICS)(layer, x)
    torch.testing.assert_close(out.flatten(0, 1), plain(x.flatten(0, 1)))
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sync_batch_norm_of_half_precision_has_exact_statistics(dtype):
    plain = nn.BatchNorm1d(3, dtype=torch.float32)
    layer, x = torchlift.sync_batch_norm(copy.deepcopy(plain), "i"), (torch.randn(N, 64, 3) + 5).to(dtype)
    out, expected = torchlift.vmap(lambda m, x: m(x), **SHARED_STATISTICS)(layer, x), plain(x.flatten(0, 1))
    assert out.dtype == dtype
    torch.testing.assert_close(out.flatten(0, 1), expected)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()), rtol=1e-5, atol=1e-6)


def test_sync_batch_norm_keeps_tensors_and_replaces_every_name():
    shared = nn.BatchNorm1d(3, affine=False)
    net = nn.Sequential(nn.Linear(3, 3), shared, nn.Sequential(shared, nn.BatchNorm1d(3, track_running_stats=False)))
    before = {name: id(tensor) for name, tensor in net.state_dict(keep_vars=True).items()}
    assert torchlift.sync_batch_norm(net, "i") is net
    assert {name: id(tensor) for name, tensor in net.state_dict(keep_vars=True).items()} == before
    assert net[1] is net[2][0] and isinstance(net[1], nn.modules.batchnorm._BatchNorm)
    assert set(torchlift.variables(net)) == {"params", "batch_stats"}
    assert "axis_name='i'" in repr(net)
    x = torch.randn(N, 5, 3)
    run = torchlift.vmap(lambda m, x: m(x), {True: None}, axis_name="i")
    torch.testing.assert_close(run(net, x).flatten(0, 1).mean(0), torch.zeros(3))


def test_sync_batch_norm_refuses_what_it_cannot_convert():
    with pytest.raises(torchlift.TransformTargetError, match="expected a module that was constructed"):
        torchlift.sync_batch_norm(nn.BatchNorm1d, "i")
    with pytest.raises(torchlift.TransformTargetError, match="0 is a LazyBatchNorm1d that does not know its size"):
        torchlift.sync_batch_norm(nn.Sequential(nn.LazyBatchNorm1d()), "i")
    with pytest.raises(ValueError, match="at least 2 dimensions, got 1"):
        torchlift.sync_batch_norm(nn.BatchNorm1d(3), "i")(torch.ones(3))


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collective", [psum, pmean, pmax, pmin, all_gather])
def test_an_unknown_name_lists_the_known_ones(collective):
    with pytest.raises(
        torchlift.AxisNameError, match=rf"{collective.__name__}: got the axis name 'j', expected one of \['i'\]"
    ):
        mapped(lambda x: collective(x, "j"))(torch.ones(2))
    with pytest.raises(NameError, match=r"axis_name='j'"):
        collective(torch.ones(2), "j")
    with pytest.raises(torchlift.AxisNameError, match=r"axis_index: got the axis name 'j', expected one of \[\]"):
        axis_index(("j",))


def test_all_gather_names_an_axis_that_is_not_there():
    with pytest.raises(
        torchlift.AxisError, match=r"all_gather: axis is 2, expected -2 to 1 for a value of shape \(3,\)"
    ):
        mapped(lambda x: all_gather(x, "i", axis=2))(torch.ones(N, D))
    with pytest.raises(torchlift.AxisError, match=r"axis is 1, expected -1 to 0 .* with tiled=True"):
        mapped(lambda x: all_gather(x, "i", axis=1, tiled=True))(torch.ones(N, D))


def test_a_collective_needs_all_indices_at_once():
    for collective in (psum, pmax, all_gather):
        with pytest.raises(torchlift.AxisError, match="chunk_size"):
            mapped(lambda x, c=collective: c(x, "i"), chunk_size=2)(torch.ones(N, D))


def test_a_collective_in_a_map_that_runs_index_by_index_is_refused():
    def body(m, x):
        return psum(x, "i") + torch.rand(1) + torch.rand(1, generator=torchlift.make_rng("noise"))

    run = torchlift.vmap(body, axis_name="i", split_rngs={"dropout": True, "noise": False})
    with (
        torchlift.seed_rngs(noise=0),
        pytest.raises(torchlift.UnsupportedError, match="split all random streams alike"),
    ):
        run(NOTHING, torch.ones(N, D))
    for collective in (pmax, all_gather):
        run = torchlift.vmap(
            lambda m, x, c=collective: c(x, "i"), axis_name="i", split_rngs={"dropout": True, "noise": False}
        )
        with torchlift.seed_rngs(noise=0), pytest.raises(torchlift.UnsupportedError, match="index by index"):
            run(NOTHING, torch.ones(N, D))


def test_vjp_inside_and_two_threads():
    import threading

    x = torch.randn(N, D)
    results = {}

    def work(k):
        for _ in range(20):
            results[k] = mapped(lambda x: vjp(lambda x: psum(x**2, "i"), x)[1](x * k)[0])(x)

    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    torch.testing.assert_close(results[1], 2 * x * x.sum(0))
    torch.testing.assert_close(results[2], 2 * results[1])
