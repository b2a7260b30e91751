"""Properties that hold for any shapes, axes, lengths and nestings, against plain loops."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nests import KINDS, LAYERS, build, join, lifted_class, lifted_function, plain, stacked, state_and_grads
from torch import nn

import torchlift
from torchlift import cond, custom_vjp, jvp, map_variables, named_call, remat, remat_scan, scan, switch, vjp, vmap
from torchlift.engine.run import last_report

pytestmark = pytest.mark.usefixtures("float64")
AOT = {"backend": "aot_eager"}


def many(count):
    # The fixture that sets the default dtype holds for all examples of a test.
    suppressed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=suppressed
    )


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def gradients(out, inputs):
    """Of a number on which every output depends in its own way."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    weighed = [(leaf * torch.arange(1.0, 1 + leaf.numel()).view(leaf.shape).cos()).sum() for leaf in leaves]
    return torch.autograd.grad(sum(weighed, torch.zeros(())), inputs, materialize_grads=True)


# Identities ----------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3)
trees = st.recursive(
    shapes,
    lambda inner: st.lists(inner, min_size=1, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, min_size=1),
    max_leaves=3,
)


def made(shape_tree):
    """A tree of tensors of these shapes."""
    if isinstance(shape_tree, dict):
        return {key: made(value) for key, value in shape_tree.items()}
    if shape_tree and isinstance(shape_tree[0], int):
        return torch.randn(*shape_tree, requires_grad=True)
    return tuple(made(value) for value in shape_tree)


def identity(m, tree):
    return tree


def tree_map(fn, tree):
    return torch.utils._pytree.tree_map(fn, tree)


def rows_of(tree):
    return tree_map(lambda x: torch.stack([x, x]), tree)


def by_scan(m, tree):
    carry, ys = scan(lambda m, carry, x: (carry, x), compile=False)(m, tree, rows_of(tree))
    close(ys, rows_of(tree))
    return carry


def by_pull(m, tree):
    out, pull = vjp(identity, m, tree)
    cotangent = tree_map(torch.cos, tree)
    variables, pulled = pull(cotangent)
    close(pulled, cotangent)
    assert not any(p.any() for p in variables["params"].values())
    return out


def by_push(m, tree):
    tangents = tree_map(torch.cos, tree)
    out, pushed = jvp(identity, m, (tree,), (tangents,), {})
    close(pushed, tangents)
    return out


def by_layers(m, tree):
    # In a dict, for of a tuple a layer carries on the first element alone.
    return torchlift.scan_layers([nn.Identity(), nn.Identity()], compile=False)({"tree": tree})["tree"]


own = custom_vjp(identity, lambda m, x: vjp(identity, m, x), lambda pull, cotangent: pull(cotangent))
IDENTITIES = {
    "vmap": lambda m, x: tree_map(lambda x: x[1], vmap(identity)(m, rows_of(x))),
    "scan": by_scan,
    "remat": remat(identity),
    "remat_scan": remat_scan(identity, lengths=(2, 1), variable_axes={}, compile=False),
    "scan_layers": by_layers,
    "jit": torchlift.jit(identity, backend="eager"),
    "map_variables": map_variables(identity, "params", lambda tree: tree),
    "vjp": by_pull,
    "jvp": by_push,
    "custom_vjp": own,
    "cond": lambda m, x: cond(torch.tensor(True), identity, lambda m, x: None, m, x),
    "switch": lambda m, x: switch(1, [lambda m, x: None, identity], m, x),
    "while_loop": lambda m, x: torchlift.while_loop(lambda m, x: True, identity, m, x, max_steps=2),
    "named_call": named_call(identity),
    "add_metadata_axis": torchlift.add_metadata_axis(identity),
}


@pytest.mark.parametrize("name", IDENTITIES)
@many(8)
@given(tree=trees)
def test_lifting_an_identity_is_an_identity(name, tree):
    m, tree = nn.Linear(2, 2), made(tree)
    inputs = torch.utils._pytree.tree_leaves(tree)
    out = IDENTITIES[name](m, tree)
    assert torch.utils._pytree.tree_structure(out) == torch.utils._pytree.tree_structure(tree)
    close(out, tree)
    if inputs:
        close(gradients(out, inputs), gradients(tree_map(lambda x: x * 1, tree), inputs))


# Maps ----------------------------------------------------------------------------------------------------------------


class Mix(nn.Module):
    """Mixes the last axis, whatever comes before; with a state that remembers."""

    def __init__(self, size=2):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        torchlift.variable(self, "state", "seen", torch.zeros, size)

    def forward(self, x):
        self.seen = self.seen + (self.weight * x).detach().reshape(-1, x.shape[-1]).sum(0)
        return torch.tanh(self.weight * x) + x.sum() * self.seen


def stack_of(cells, axes):
    """One module that holds a grid of cells, nested lists, with one axis of each level; innermost is put in first."""
    whole = Mix()
    whole.weight = nn.Parameter(grid(cells, axes, lambda cell: cell.weight.detach()))
    whole.seen = grid(cells, axes, lambda cell: cell.seen)
    return whole


def grid(cells, axes, read):
    if not axes:
        return read(cells)
    return torch.stack([grid(cell, axes[1:], read) for cell in cells], axes[0])


@many(60)
@given(data=st.data(), sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)), rank=st.integers(0, 1))
def test_vmap_of_vmap_is_a_loop_of_loops(data, sizes, rank):
    draw = lambda most: data.draw(st.integers(-most, most - 1))
    # Axes of x and out at each level, with as many dimensions as there are then; and those of params and state.
    outer_in, inner_in, outer_out, inner_out = draw(rank + 3), draw(rank + 2), draw(rank + 3), draw(rank + 2)
    outer_axis, inner_axis = draw(3), draw(2)
    cells = [[Mix() for _ in range(sizes[1])] for _ in range(sizes[0])]
    m = stack_of(cells, (outer_axis, inner_axis))
    inner = vmap(lambda m, x: m(x), {True: inner_axis}, in_axes=inner_in, out_axes=inner_out)
    mapped = vmap(inner, {True: outer_axis}, in_axes=outer_in, out_axes=outer_out)
    x = torch.randn([2] * rank + [2])
    x = torch.stack(
        [torch.stack([x * (i + j + 1) for j in range(sizes[1])], inner_in) for i in range(sizes[0])], outer_in
    )
    x.requires_grad_()

    def loop(x):
        rows = zip(x.unbind(outer_in), cells, strict=True)
        done = [[cell(x) for x, cell in zip(row.unbind(inner_in), line, strict=True)] for row, line in rows]
        return torch.stack([torch.stack(line, inner_out) for line in done], outer_out)

    for _ in range(2):  # the second time from the state that the first one left
        out, want = mapped(m, x), loop(x)
        close(out, want)
        close(m.seen, grid(cells, (outer_axis, inner_axis), lambda cell: cell.seen))
    x_grad, weight_grad = gradients(out, [x, m.weight])
    weights = [cell.weight for line in cells for cell in line]
    want_x, *want_weights = gradients(want, [x, *weights])
    close(x_grad, want_x)
    at = iter(want_weights)
    close(weight_grad, grid(cells, (outer_axis, inner_axis), lambda cell: next(at)))


# Loops ---------------------------------------------------------------------------------------------------------------


def step(m, carry, x):
    y = m(x + carry)
    return torch.tanh(carry + y), {"y": y, "sum": x.sum()}


def check_scan(draw, compile):
    length, reverse, unroll = draw(st.sampled_from([0, 1, 2, 3, 5])), draw(st.booleans()), draw(st.integers(1, 4))
    x_axis, y_axis, sum_axis = draw(st.integers(-2, 1)), draw(st.integers(-2, 1)), draw(st.integers(-1, 0))
    params = draw(st.sampled_from(["shared", -2, -1, 0, 1]))
    state = draw(st.sampled_from(["carried", -2, -1, 0, 1]))
    cells = [Mix() for _ in range(max(length, 1))]
    m = Mix()
    if params == "shared":
        for cell in cells:
            cell.weight = m.weight
    else:
        m.weight = nn.Parameter(
            torch.stack([cell.weight.detach() for cell in cells[:length]] or [torch.ones(2)], params)
        )
        if not length:
            m.weight = nn.Parameter(m.weight.detach().narrow(params, 0, 0))
    if state != "carried":
        seen = torch.randn(max(length, 1), 2)
        for cell, value in zip(cells, seen, strict=True):
            cell.seen = value.clone()
        m.seen = torch.stack([*seen], state).narrow(state, 0, length).clone()
    axes = {name: at for name, at in (("params", params), ("state", state)) if isinstance(at, int)}
    options = dict(
        variable_axes=axes, variable_broadcast="params" if params == "shared" else False,
        variable_carry="state" if state == "carried" else False, in_axes=x_axis, out_axes={"y": y_axis, "sum": sum_axis},
        reverse=reverse, unroll=unroll, length=length, compile=compile,
    )  # fmt: skip
    xs = torch.randn(length, 2).movedim(0, x_axis).contiguous().requires_grad_()
    carry = torch.randn(2, requires_grad=True)

    got, ys = scan(step, **options)(m, carry, xs)
    assert not compile or not length or last_report().path == "compiled", last_report().reason

    order = list(range(length))[:: -1 if reverse else 1]
    want, found, seen = carry, {}, Mix().seen
    for at in order:
        if state == "carried":
            cells[at].seen = seen
        want, found[at] = step(cells[at], want, xs.select(x_axis, at))
        seen = cells[at].seen
    close(got, want)
    if length:
        close(ys["y"], torch.stack([found[at]["y"] for at in range(length)], y_axis))
        close(ys["sum"], torch.stack([found[at]["sum"] for at in range(length)], sum_axis))
        expected = (
            torch.stack([found[at]["y"] for at in range(length)]),
            torch.stack([found[at]["sum"] for at in range(length)]),
        )
    else:
        assert ys["y"].shape[y_axis] == ys["sum"].shape[sum_axis] == 0 and ys["y"].ndim == 2 and ys["sum"].ndim == 1
        expected = ()
    close(
        m.seen,
        seen if state == "carried" else torch.stack([cell.seen for cell in cells], state).narrow(state, 0, length),
    )
    outs = (got, ys["y"].movedim(y_axis, 0), ys["sum"]) if length else (got,)
    weights = [m.weight] if params == "shared" else [cell.weight for cell in cells]
    carry_grad, xs_grad, weight_grad = gradients(outs, [carry, xs, m.weight])
    want_carry, want_xs, *want_weights = gradients((want, *expected), [carry, xs, *weights])
    close((carry_grad, xs_grad), (want_carry, want_xs))
    close(
        weight_grad,
        want_weights[0] if params == "shared" else torch.stack(want_weights, params).narrow(params, 0, length),
    )


@many(100)
@given(data=st.data())
def test_scan_equals_the_loop(data):
    check_scan(data.draw, False)


@many(8)
@given(data=st.data())
def test_compiled_scan_equals_the_loop(data):
    check_scan(data.draw, AOT)


# Nests ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["class", "function"])
@many(40)
@given(kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4), layer=st.sampled_from(list(LAYERS)))
def test_nests_equal_plain_loops(form, kinds, layer):
    check_nest(tuple(kinds), LAYERS[layer], form)


def check_nest(kinds, layer, form):
    torch.manual_seed(1)
    layers = build(kinds, layer, lambda kind, found: found)
    torch.manual_seed(1)
    if form == "class":
        cls = layer
        for kind in reversed(kinds):
            cls = lifted_class(kind, cls)
        module = call = cls()
    else:
        fn = lambda m, x: m(x)
        for kind in reversed(kinds):
            fn = lifted_function(kind, fn)
        module = build(kinds, layer, join)
        call = lambda x: fn(module, x)
    x = torch.randn(*[2] * kinds.count("vmap"), 4, 3, requires_grad=True)
    for _ in range(2):
        for run in (call, lambda x: plain(kinds, layers, x)):
            torch.manual_seed(2)
            out = run(x)
            (x_grad,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
            out.square().sum().backward(inputs=list(module.parameters()) if run is call else parameters(layers))
            if run is call:
                got, got_grad = out, x_grad
        close((got, got_grad), (out, x_grad))
        close(state_and_grads(module), stacked(kinds, layers, state_and_grads))


def parameters(layers):
    if isinstance(layers, list):
        return [p for layer in layers for p in parameters(layer)]
    return list(layers.parameters())


# Choices -------------------------------------------------------------------------------------------------------------


class Keeper(nn.Module):
    """Any number of states."""

    def __init__(self, states):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        for at in range(states):
            torchlift.variable(self, "state", f"s{at}", lambda at=at: torch.full((4, 3), at + 1.0))


def branch(sign, outputs, changed):
    """A branch with this many outputs, which changes some of the states: in place, or bound anew."""

    def run(m, x):
        y = torch.sin(sign * m.weight * x)
        for at in changed:
            state = getattr(m, f"s{at}")
            if at % 2:
                state.mul_(sign * 2.0)
            else:
                setattr(m, f"s{at}", state + y.detach())
        return [(at + 1) * y for at in range(outputs)]

    return run


@many(30)
@given(data=st.data(), outputs=st.integers(0, 4), states=st.integers(0, 3), way=st.sampled_from(["cond", "switch"]))
def test_every_output_and_state_is_selected_in_rows(data, outputs, states, way):
    changed = [data.draw(st.sets(st.integers(0, states - 1) if states else st.nothing())) for _ in range(2)]
    branches = [branch(1.0, outputs, changed[0]), branch(-0.5, outputs, changed[1])]
    m, plain, x = Keeper(states), Keeper(states), torch.randn(4, 3, requires_grad=True)
    plain.weight = m.weight

    def choose(m, x):
        if way == "cond":
            return cond(x[0] > 0, branches[0], branches[1], m, x)
        return switch((x[0] <= 0).long(), branches, m, x)

    got = vmap(choose, {"params": None, "state": 0})(m, x)
    want = [[] for _ in range(outputs)]
    for at, row in enumerate(x.unbind()):
        one = Keeper(states)
        one.weight = m.weight
        for name, state in plain.named_buffers():
            setattr(one, name, state[at].clone())
        for outs, out in zip(want, branches[int(row[0] <= 0)](one, row), strict=True):
            outs.append(out)
        for name, state in one.named_buffers():
            getattr(plain, name)[at] = state
    want = [torch.stack(outs) for outs in want]
    close(got, want)
    close(dict(m.named_buffers()), dict(plain.named_buffers()))
    if outputs:
        close(gradients(got, [x, m.weight]), gradients(want, [x, m.weight]))
