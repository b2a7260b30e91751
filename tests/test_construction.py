"""Construction under an axis, sizes that come later, and stacks of modules that exist."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import Allocations
from torch import nn

import torchlift
from torchlift import remat_scan, scan, stack_modules, unstack_modules, vmap
from torchlift.errors import AxisError, LayerMismatchError, StackedModuleError

pytestmark = pytest.mark.usefixtures("float64")


class Layer(nn.Module):
    """With every way to initialise: torch's, the user's own in ``__init__`` and in ``reset_parameters``."""

    def __init__(self, size=4, hidden=6):
        super().__init__()
        self.up, self.down = nn.Linear(size, hidden), nn.Linear(hidden, size, bias=False)
        self.norm = nn.BatchNorm1d(size)
        self.scale = nn.Parameter(torch.full((), 0.1))
        self.tied = self.scale
        self.frozen = nn.Parameter(torch.rand(size), requires_grad=False)
        self.register_buffer("table", torch.randn(2))
        nn.init.orthogonal_(self.down.weight)

    def reset_parameters(self):
        nn.init.xavier_normal_(self.up.weight)
        self.up.bias.data = torch.ones_like(self.up.bias)

    def forward(self, x):
        return x + self.scale * self.down(self.up(self.norm(x)).relu())


SHIFTED = {
    "vmap": (lambda **kw: vmap(Layer, variable_axes={"params": 0}, axis_size=3, **kw), (3,)),
    "axis 1 for the buffers": (
        lambda **kw: vmap(Layer, variable_axes={"params": -1, "buffers": 1, "batch_stats": 0}, axis_size=3, **kw),
        (3,),
    ),
    "scan": (lambda **kw: scan(Layer, variable_axes={"params": 0}, length=3, **kw), (3,)),
    "remat_scan": (lambda **kw: remat_scan(Layer, lengths=(2, 3), **kw), (2, 3)),
    "one": (lambda **kw: vmap(Layer, variable_axes={True: 0}, axis_size=1, **kw), (1,)),
}


def assert_same_modules(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert type(a) is type(b)
        assert list(a.state_dict()) == list(b.state_dict())
        for (name, x), y in zip(a.state_dict(keep_vars=True).items(), b.state_dict(keep_vars=True).values()):
            assert torch.equal(x, y) and x.dtype == y.dtype and x.requires_grad == y.requires_grad, name


# The user's own construction -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIFTED)
def test_a_stack_equals_modules_built_in_a_loop(name):
    make, sizes = SHIFTED[name]
    torch.manual_seed(3)
    expected = [Layer(5) for _ in range(math.prod(sizes))]
    after = torch.rand(1)
    torch.manual_seed(3)
    stack = make()(5)
    assert torch.equal(torch.rand(1), after)
    assert_same_modules(stack.to_modules(), expected)
    assert stack.tied is stack.scale and not stack.frozen.requires_grad and stack.scale.shape == sizes
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in stack.parameters())


def test_axes_are_where_they_were_asked():
    stack = SHIFTED["axis 1 for the buffers"][0]()(5)
    assert stack.up.weight.shape == (6, 5, 3) and stack.up.bias.shape == (6, 3)
    assert stack.table.shape == (2, 3) and stack.norm.running_mean.shape == (3, 5)


def test_nested_stacks():
    Inner = vmap(Layer, variable_axes={"params": 0}, axis_size=2)
    torch.manual_seed(0)
    expected = [Layer() for _ in range(6)]
    torch.manual_seed(0)
    stack = scan(Inner, variable_axes={"params": 0}, length=3)()
    assert stack.up.weight.shape == (3, 2, 6, 4)
    assert_same_modules([m for inner in stack.to_modules() for m in inner.to_modules()], expected)


def test_params_that_are_not_split_are_the_same_everywhere():
    Stack = vmap(Layer, variable_axes={"params": 0}, split_rngs={"params": False}, axis_size=3)
    torch.manual_seed(3)
    one = Layer()
    after = torch.rand(1)
    torch.manual_seed(3)
    stack = Stack()
    assert torch.equal(torch.rand(1), after)
    assert_same_modules(stack.to_modules(), [one] * 3)


def test_a_collection_without_an_axis_must_come_out_equal():
    match = (
        r"vmap\(Layer, .*\): 'table' of module 1 differs from that of module 0, expected equal values: 'buffers' is "
        r"shared there; give it an axis: variable_axes=\{'buffers': 0\}"
    )
    with pytest.raises(AxisError, match=match):
        vmap(Layer, variable_axes={"params": 0, "buffers": None}, axis_size=2)()
    with pytest.raises(AxisError, match=r"'params' is shared there; .* split_rngs=\{'params': False\}"):
        vmap(nn.Linear, variable_axes={"buffers": 0}, split_rngs={"params": True}, axis_size=2)(2, 2)
    shared = vmap(nn.BatchNorm1d, variable_axes={"params": None, "batch_stats": 0}, axis_size=2)(3)
    assert shared.weight.shape == (3,) and shared.running_mean.shape == (2, 3)


def test_construction_that_differs_from_index_to_index_is_refused():
    built = []

    class Odd(nn.Module):
        def __init__(self, how):
            super().__init__()
            built.append(self)
            second = len(built) % 2 == 0
            self.w = nn.Parameter(torch.ones(3 if second and how == "shape" else 2), not (second and how == "grad"))
            if second and how == "name":
                self.v = nn.Parameter(torch.ones(2))

    class Setting(nn.Linear):
        def __init__(self):
            super().__init__(1, 1)
            built.append(self)
            self.index = len(built)

    with pytest.raises(LayerMismatchError, match=r"module 1: 'index' is 2, expected 1 as in module 0"):
        vmap(Setting, variable_axes={"params": 0}, axis_size=2)()
    built.clear()
    for how, match in (
        ("shape", r"'w' of module 1 is \(3,\) torch.float64, expected \(2,\) torch.float64 as in module 0"),
        (
            "grad",
            r"'w' of module 1 has requires_grad=False, expected True as in module 0: a stack is frozen as a whole",
        ),
        ("name", r"module 1 has variables \['w', 'v'\], expected those of module 0: \['w'\]"),
    ):
        with pytest.raises(LayerMismatchError, match=match):
            vmap(Odd, variable_axes={"params": 0}, axis_size=2)(how)


def test_an_axis_that_does_not_exist():
    with pytest.raises(AxisError, match=r"'bias' has 1 dimensions, so its stack has axes -2 to 1, got 2"):
        vmap(nn.Linear, variable_axes={"params": 2}, axis_size=2)(2, 2)


def test_a_constructor_that_fails_leaves_nothing():
    class Fails(nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        vmap(Fails, variable_axes={"params": 0}, axis_size=2)(2, 2)


def test_peak_memory_is_the_stack_plus_one_layer():
    size = 8
    with Allocations() as layer:
        one = nn.Linear(64, 64)
    with Allocations() as seen:
        stack = vmap(nn.Linear, variable_axes={"params": 0}, axis_size=size)(64, 64)
    total = sum(p.nbytes for p in stack.parameters())
    assert total == size * sum(p.nbytes for p in one.parameters())
    assert total < seen.peak <= total + layer.peak


def test_meta_device():
    with torch.device("meta"):
        stack = vmap(Layer, variable_axes={"params": 0, "buffers": None}, axis_size=3)(5)
    assert stack.up.weight.is_meta and stack.up.weight.shape == (3, 6, 5)
    assert all(m.up.weight.is_meta for m in stack.to_modules())
    assert stack.to_empty(device="cpu").up.weight.device.type == "cpu"


# Per index -----------------------------------------------------------------------------------------------------------


def test_apply_and_reset_parameters_run_per_index():
    stack = vmap(Layer, variable_axes={"params": 0}, axis_size=3)()
    shapes = []

    def init(module):
        if isinstance(module, nn.Linear):
            shapes.append(tuple(module.weight.shape))
            nn.init.xavier_uniform_(module.weight)

    held = list(stack.parameters())
    torch.manual_seed(1)
    assert stack.apply(init) is stack
    torch.manual_seed(1)
    expected = [Layer.apply(m, init) for m in stack.to_modules()]
    assert shapes == [(6, 4), (4, 6)] * 6
    assert_same_modules(stack.to_modules(), expected)
    torch.manual_seed(2)
    stack.reset_parameters()
    torch.manual_seed(2)
    for module in expected:
        module.reset_parameters()
    assert_same_modules(stack.to_modules(), expected)
    assert all(a is b for a, b in zip(stack.parameters(), held))


def test_apply_on_a_model_that_holds_a_stack():
    model = nn.Sequential(nn.Linear(4, 4), vmap(nn.Linear, variable_axes={"params": 0}, axis_size=3)(64, 64))
    model.apply(lambda m: nn.init.xavier_normal_(m.weight) if isinstance(m, nn.Linear) else None)
    assert abs(model[1].weight.std().item() - 0.125) < 0.01  # sqrt(2 / (64 + 64))


# A size that comes later ---------------------------------------------------------------------------------------------


class Louder(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def lazy_class():
    return vmap(nn.Linear, variable_axes={"params": 0})


def test_lazy_size_by_the_first_call():
    torch.manual_seed(0)
    expected = [nn.Linear(4, 2) for _ in range(3)]
    torch.manual_seed(0)
    stack = lazy_class()(4, 2)
    assert all(nn.parameter.is_lazy(p) for p in stack.parameters())
    optimizer = torch.optim.SGD(stack.parameters(), lr=1.0)
    x = torch.ones(3, 4)
    out = stack(x)
    assert_same_modules(stack.to_modules(), expected)
    torch.testing.assert_close(out, torch.stack([m(row) for m, row in zip(expected, x)]), rtol=1e-12, atol=1e-12)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], stack.parameters()))
    out.sum().backward()
    before = stack.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(stack.weight, before - x[:, None].expand(3, 2, 4))
    with pytest.raises(AxisError, match="the sizes of the mapped axis disagree"):
        stack(torch.ones(2, 4))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_lazy_size_by_load_state_dict(axis):
    class Net(nn.Module):
        def __init__(self, **kw):
            super().__init__()
            self.heads = vmap(nn.Linear, variable_axes={"params": axis}, **kw)(4, 2)

    source, lazy = Net(axis_size=3), Net()
    held = list(lazy.parameters())
    lazy.load_state_dict(source.state_dict())
    assert_same_modules(lazy.heads.to_modules(), source.heads.to_modules())
    assert all(a is b for a, b in zip(lazy.parameters(), held))


def test_lazy_size_in_a_scan():
    class Step(nn.Linear):
        def forward(self, carry, x):
            return carry + super().forward(x), None

    torch.manual_seed(0)
    expected = [nn.Linear(2, 2) for _ in range(3)]
    torch.manual_seed(0)
    stack = scan(Step, variable_axes={"params": 0}, compile=False)(2, 2)
    carry, _ = stack(torch.zeros(2), torch.ones(3, 2))
    torch.testing.assert_close(carry, sum(m(torch.ones(2)) for m in expected), rtol=1e-12, atol=1e-12)


def test_a_lazy_stack_copies_and_refuses_what_needs_its_size():
    stack = lazy_class()(4, 2)
    other = copy.deepcopy(stack)
    other(torch.ones(5, 4))
    assert other.weight.shape == (5, 2, 4) and nn.parameter.is_lazy(stack.weight)
    with pytest.raises(AxisError, match=r"the size is not known; pass axis_size="):
        vmap(nn.Linear, variable_axes={"params": 0}, in_axes=None)(4, 2)(torch.ones(4))
    for use in (stack.to_modules, lambda: stack.apply(print), stack.reset_parameters):
        with pytest.raises(AxisError, match=r"the size is not known yet: call the module or load_state_dict first"):
            use()


# Modules that exist --------------------------------------------------------------------------------------------------

linears = st.lists(st.integers(0, 2**31), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(linears, st.sampled_from([0, 1, -1]))
def test_stack_and_unstack_are_inverse(seeds, axis):
    layers = []
    for seed in seeds:
        torch.manual_seed(seed)
        layers.append(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)).train(seed % 2 == 0 and len(seeds) == 1))
    stack = stack_modules(layers, axis)
    assert type(stack) is nn.Sequential and stack[0].weight.shape[axis] == len(layers)
    again = unstack_modules(stack)
    assert_same_modules(again, layers)
    stack[0].weight.data.zero_()
    assert_same_modules(again, layers)  # tensors of their own
    x = torch.randn(2)
    assert all(torch.equal(a.eval()(x), b.eval()(x)) for a, b in zip(again, layers))


@settings(max_examples=10, deadline=None)
@given(linears)
def test_from_modules_and_to_modules_are_inverse(seeds):
    layers = []
    for seed in seeds:
        torch.manual_seed(seed)
        layers.append(Layer())
    Stack = vmap(Layer, variable_axes={"params": 0})
    stack = Stack.from_modules(layers)
    assert isinstance(stack, Layer) and stack.tied is stack.scale and stack.up.weight.shape[0] == len(layers)
    assert_same_modules(stack.to_modules(), layers)
    assert_same_modules(Stack.from_modules(stack.to_modules()).to_modules(), layers)
    assert not {id(p) for p in stack.parameters()} & {id(p) for layer in layers for p in layer.parameters()}
    assert all(layer.tied is layer.scale for layer in stack.to_modules())


def test_from_modules_of_several_levels():
    layers = [nn.Linear(2, 2) for _ in range(6)]
    stack = remat_scan(nn.Linear, lengths=(2, 3), compile=False).from_modules(layers)
    assert stack.weight.shape == (2, 3, 2, 2)
    x = expected = torch.randn(2)
    for layer in layers:
        expected = layer(expected)
    torch.testing.assert_close(stack(x), expected, rtol=1e-12, atol=1e-12)


def test_ties_survive_stacking():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight
            self.part = self.a

    layers = [Tied() for _ in range(3)]
    for stack, back in (
        (stack_modules(layers), unstack_modules),
        (vmap(Tied, variable_axes={"params": 0}).from_modules(layers), lambda s: s.to_modules()),
    ):
        assert stack.b.weight is stack.a.weight and stack.part is stack.a and len(list(stack.parameters())) == 1
        assert all(m.b.weight is m.a.weight and m.part is m.a for m in back(stack))
        assert_same_modules(back(stack), layers)


def test_a_stack_runs_through_the_function_forms_only():
    layers = [nn.BatchNorm1d(2) for _ in range(3)]
    stack, x = stack_modules(layers), torch.randn(3, 5, 2)
    with pytest.raises(StackedModuleError, match="stack_modules: a stack of BatchNorm1d was called directly; call it"):
        stack(x)
    out = vmap(lambda m, x: m(x), variable_axes={True: 0})(stack, x)
    expected = torch.stack([layer(row) for layer, row in zip(layers, x)])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert_same_modules(unstack_modules(stack), layers)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: stack_modules([]), AxisError, "stack_modules: got no modules, expected at least one"),
        (
            lambda: stack_modules([nn.Linear(1, 1), nn.Bilinear(1, 1, 1)]),
            LayerMismatchError,
            "stack_modules: module 1 is a Bilinear, expected a Linear$",
        ),
        (
            lambda: stack_modules([nn.Linear(1, 1), Louder(1, 1)]),
            LayerMismatchError,
            "module 1 is a Louder, expected a Linear, whose methods the stack has; lift or stack its own class",
        ),
        (
            lambda: stack_modules([nn.Linear(1, 2), nn.Linear(1, 1)]),
            LayerMismatchError,
            r"stack_modules: 'weight' of module 1 is \(1, 1\) torch.float64, expected \(2, 1\)",
        ),
        (
            lambda: stack_modules([nn.Linear(1, 2), nn.Linear(1, 2).requires_grad_(False)]),
            LayerMismatchError,
            "'weight' of module 1 has requires_grad=False, expected True",
        ),
        (
            lambda: stack_modules([nn.Linear(1, 2), nn.Linear(1, 2).half()]),
            LayerMismatchError,
            "torch.float16, expected",
        ),
        (
            lambda: stack_modules([nn.Dropout(0.1), nn.Dropout(0.9)]),
            LayerMismatchError,
            "stack_modules: module 1: 'p' is 0.9, expected 0.1 as in module 0: a stack has one for all",
        ),
        (
            lambda: stack_modules([nn.Sequential(nn.Linear(1, 1), act) for act in (nn.ReLU(), nn.Tanh())]),
            LayerMismatchError,
            "module 1: '1' is a Tanh, expected a ReLU as in module 0",
        ),
        (
            lambda: lazy_class().from_modules([nn.Linear(1, 1), nn.Linear(1, 1).eval()]),
            LayerMismatchError,
            r"vmap\(Linear, .*\): module 1: 'training' is False, expected True",
        ),
        (lambda: unstack_modules(nn.Linear(1, 1)), StackedModuleError, "got a Linear, expected what stack_modules"),
        (
            lambda: lazy_class().from_modules([nn.ReLU()]),
            LayerMismatchError,
            r"vmap\(Linear, .*\): module 0 is a ReLU, expected a Linear",
        ),
        (
            lambda: lazy_class().from_modules([Louder(1, 1)]),
            LayerMismatchError,
            r"vmap\(Linear, .*\): module 0 is a Louder, expected a Linear, whose methods the stack has; lift or stack its",
        ),
        (lambda: lazy_class().from_modules([]), AxisError, "got 0 modules, expected at least one"),
        (
            lambda: vmap(nn.Linear, variable_axes={"params": 0}, axis_size=3).from_modules([nn.Linear(1, 1)]),
            AxisError,
            "got 1 modules, expected 3",
        ),
        (
            lambda: vmap(nn.ReLU, variable_axes={"params": 0}).from_modules([nn.ReLU()]).to_modules(),
            AxisError,
            "nothing in the module has a stacked axis, and no size was given",
        ),
    ],
)
def test_stacks_that_cannot_be(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_stacking_changes_nothing_in_the_modules():
    layers = [Layer() for _ in range(2)]
    before = copy.deepcopy(layers)
    torchlift.unstack_modules(stack_modules(layers))
    assert_same_modules(layers, before)
