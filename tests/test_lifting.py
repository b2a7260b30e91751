"""Lifting forms: classes, partials, functions, methods, decorators; what instances can do; where modules hide."""

import collections
import copy
import dataclasses
import functools
import inspect
import io
import pickle
import warnings
from typing import Any, Generic, Optional, TypeVar

import pytest
import torch
from torch import nn

import torchlift
from torchlift import Variable, remat, remat_scan, scan, variable, vmap
from torchlift.errors import TransformedMethodReturnValueError, TransformTargetError, UnsupportedError

pytestmark = pytest.mark.usefixtures("float64")


T = TypeVar("T")


class Typed(nn.Linear, Generic[T]):
    pass


class Block(nn.Module):
    """At module level, so that pickle finds it."""

    def __init__(self, size=3, *, bias=True):
        super().__init__()
        self.linear = nn.Linear(size, size, bias=bias)
        self.norm = nn.BatchNorm1d(size)
        variable(self, "state", "count", torch.zeros, ())

    def forward(self, x, scale=1.0):
        self.count += 1
        return self.norm(self.linear(x)) * scale

    def double(self, x):
        return 2 * self.linear(x)

    def step(self, carry):
        return self.linear(carry), None

    @property
    def width(self):
        return self.linear.weight.shape[-1]


class Sub(remat(Block)):
    """A user's subclass of a lifted class."""

    def forward(self, x):
        return super().forward(x) + 1


STACKED = vmap(Block, variable_axes={"params": 0}, axis_size=2)
LIFTED = {
    "remat": (remat(Block), (4, 3)),
    "vmap": (STACKED, (2, 4, 3)),
    "remat(vmap)": (remat(STACKED), (2, 4, 3)),
    "vmap(remat)": (vmap(remat(Block), variable_axes={"params": 0}, axis_size=2), (2, 4, 3)),
    "vmap(vmap)": (vmap(STACKED, variable_axes={"params": 0}, axis_size=5), (5, 2, 4, 3)),
    "subclass": (Sub, (4, 3)),
}


# Classes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIFTED)
def test_a_lifted_class_is_a_subclass(name):
    cls, shape = LIFTED[name]
    module = cls(3, bias=False)
    assert issubclass(cls, Block) and isinstance(module, Block) and module.linear.bias is None
    assert list(module.state_dict()) == list(Block(bias=False).state_dict())
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in Block(bias=False).named_parameters()]
    assert module(torch.ones(shape)).shape == shape and module.width == 3
    assert inspect.signature(cls) == inspect.signature(Block) and cls.__module__ == Block.__module__


@pytest.mark.parametrize("name", LIFTED)
def test_instances_are_modules_in_every_way(name):
    cls, shape = LIFTED[name]
    module, x = cls().eval(), torch.randn(shape)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)]
    fresh = cls().eval()
    fresh.load_state_dict(module.state_dict())
    expected = module(x)
    for other in [*copies, fresh]:
        assert type(other) is cls and other is not module
        other.count.zero_()
        assert torch.equal(other(x), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in module.parameters()}
    assert module.half().linear.weight.dtype == torch.float16
    assert module.to("meta").linear.weight.is_meta


def test_the_same_arguments_give_the_same_class():
    assert vmap(Block, variable_axes={"params": 0}, axis_size=2) is STACKED
    assert vmap(Block, {"params": 0}, axis_size=2, in_axes=0, methods=None) is STACKED
    others = [
        vmap(Block, variable_axes={"params": 0}, axis_size=3),
        vmap(Block, variable_axes={"params": 1}, axis_size=2),
        vmap(Block, variable_axes={"params": 0}, axis_size=2, in_axes=None),
        vmap(Block, variable_axes={"params": 0, "state": 1}, axis_size=2),
        vmap(Block, variable_axes={"params": 0}, axis_size=2, methods=["double"]),
        vmap(nn.Linear, variable_axes={"params": 0}, axis_size=2),
        remat(Block),
        scan(Block, length=2),
        scan(Block, length=2, compile=False),
        scan(Block, length=2, compile={"mode": "default"}),
    ]
    assert len({STACKED, *others}) == 1 + len(others)


def test_methods_as_a_list():
    cls = vmap(Block, variable_axes={"params": 0}, axis_size=2, methods=["double"])
    module, x = cls(), torch.randn(2, 4, 3)
    expected = torch.stack([m.double(row) for m, row in zip(module.to_modules(), x)])
    torch.testing.assert_close(module.double(x), expected, rtol=1e-12, atol=1e-12)
    both = vmap(Block, variable_axes={"params": 0}, axis_size=2, methods=["forward", "double"])()
    assert both(x).shape == both.double(x).shape == (2, 4, 3) and both.count.tolist() == [1, 1]


def test_methods_as_a_dict():
    cls = vmap(
        Block,
        variable_axes={"params": 0},
        axis_size=2,
        methods={"forward": {}, "double": {"in_axes": None, "out_axes": 1}},
    )
    module, x = cls(), torch.randn(4, 3)
    assert module(x.expand(2, 4, 3)).shape == (2, 4, 3)
    expected = torch.stack([m.double(x) for m in module.to_modules()], 1)
    torch.testing.assert_close(module.double(x), expected, rtol=1e-12, atol=1e-12)


def test_a_lifted_method_calls_its_siblings_unlifted():
    class Net(nn.Linear):
        def forward(self, x):
            return self.helper(x) + 1

        def helper(self, x):
            assert x.ndim == 1  # inside the map already
            return super().forward(x)

    net = vmap(Net, variable_axes={"params": 0}, axis_size=2, methods=["forward", "helper"])(3, 3)
    x = torch.randn(2, 3)
    assert torch.equal(net(x), net.helper(x) + 1)


def test_super_and_user_subclasses():
    class Plus(STACKED):
        def forward(self, x):
            return super().forward(x) + 1

    plus, x = Plus(), torch.randn(2, 4, 3)
    base = STACKED()
    base.load_state_dict(plus.state_dict())
    assert torch.equal(plus(x), base(x) + 1) and plus.count.tolist() == [1, 1]
    sub, block = Sub(), Block()
    block.load_state_dict(sub.state_dict())
    assert torch.equal(sub(x[0]), block(x[0]) + 1)
    lifted = remat(Sub)()
    lifted.load_state_dict(block.state_dict())
    assert torch.equal(lifted(x[0]), sub(x[0]))


def test_a_partial_gives_a_partial():
    made = vmap(functools.partial(Block, bias=False), variable_axes={"params": 0}, axis_size=2)
    assert isinstance(made, functools.partial) and made.func is STACKED
    assert made(5).linear.weight.shape == (2, 5, 5) and made().linear.bias is None


# Functions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [Block.double, lambda m, x: m.double(x), lambda m, x: 2 * m.linear(x)])
@pytest.mark.parametrize("transform", [remat, vmap], ids=["remat", "vmap"])
def test_functions(transform, fn):
    module, x = Block(), torch.randn(4, 3)
    lifted = transform(fn)
    assert torch.equal(lifted(module, x), module.double(x)) and torch.equal(lifted(module, x=x), module.double(x))
    assert inspect.signature(lifted) == inspect.signature(fn) and lifted.__name__ == fn.__name__
    assert module.count == 0 and module.norm.num_batches_tracked == 0


def test_a_bound_method_gives_a_function_without_the_module():
    module, x = Block(), torch.randn(4, 3)
    for lifted in (remat(module.double), vmap(module.double)):
        assert torch.equal(lifted(x), module.double(x)) and lifted.__name__ == "double"
    lifted = remat(module.forward)
    lifted(x)
    assert module.count == 1 and module.norm.num_batches_tracked == 1


def test_a_decorator_with_and_without_arguments():
    class Net(nn.Linear):
        @remat
        def forward(self, x):
            return super().forward(x)

        @vmap(in_axes=0, out_axes=1)
        def mapped(self, x):
            return nn.Linear.forward(self, x)

        @remat()
        def third(self, x, *, factor):
            return factor * self.forward(x)

    net, x = Net(3, 4), torch.randn(5, 3)
    expected = nn.Linear.forward(net, x)
    assert torch.equal(net(x), expected) and torch.equal(net.third(x, factor=2), 2 * expected)
    torch.testing.assert_close(net.mapped(x), expected.T, rtol=1e-12, atol=1e-12)

    @vmap(variable_axes={"params": 0}, axis_size=2)
    class Twice(nn.Linear):
        pass

    assert issubclass(Twice, nn.Linear) and Twice(3, 4).weight.shape == (2, 4, 3)


# Targets that cannot be lifted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [vmap, remat, scan, functools.partial(remat_scan, lengths=(2,))])
def test_an_instance_is_refused_with_what_to_write(transform):
    name = getattr(transform, "func", transform).__name__.replace("checkpoint", "remat")
    match = rf"{name}: got an instance of Linear, .*; write {name}\(Linear, \.\.\.\)\(\.\.\.\) .*lambda m, \*args: m\("
    for instance in (nn.Linear(1, 1), functools.partial(nn.Linear(1, 1), torch.ones(1))):
        with pytest.raises(TransformTargetError, match=match):
            transform(instance)
    for target in (3, "Linear", [nn.Linear], int, functools.partial):
        with pytest.raises(TransformTargetError, match=rf"{name}: got .*, expected an nn.Module subclass, a functools"):
            transform(target)
    with pytest.raises(TransformTargetError, match=r"the first argument is a Tensor, expected an nn.Module"):
        transform(lambda x: x)(torch.ones(1))


def test_wrong_methods():
    for methods in ("forward", 3, {"forward"}):
        with pytest.raises(TransformTargetError, match=r"remat\(Block\): methods is .*, expected None, a list of"):
            remat(Block, methods=methods)
    with pytest.raises(TransformTargetError, match=r"remat\(Block\): there is no method 'forwards' to lift"):
        remat(Block, methods=["forwards"])
    with pytest.raises(TypeError):
        remat(Block, methods={"forward": {"no_such_argument": 1}})


def test_a_script_module_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(UnsupportedError, match="the module is a ScriptModule.*lift the Python module"):
        remat(lambda m, x: m(x))(scripted, torch.ones(1, 2))


def test_a_lazy_module_is_refused_until_it_was_called():
    lazy, x = nn.LazyLinear(2), torch.ones(1, 2)
    lifted = remat(lambda m, x: m(x))
    with pytest.raises(
        UnsupportedError, match=r"remat\(.*\): 'weight' is not initialised yet; call the lazy module once"
    ):
        lifted(lazy, x)
    lazy(x)
    assert torch.equal(lifted(lazy, x), lazy(x))


# Modules and Variables anywhere --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Box:
    inner: Any
    label: str = "box"


Pair = collections.namedtuple("Pair", "a b")
WRAPS = {
    "itself": (lambda x: x, lambda x: x),
    "dict": (lambda x: {"k": {"x": x, "n": None}}, lambda w: w["k"]["x"]),
    "list": (lambda x: [1, [x]], lambda w: w[1][0]),
    "namedtuple": (lambda x: Pair(x, 3), lambda w: w.a),
    "dataclass": (lambda x: Box({"a": [x]}), lambda w: w.inner["a"][0]),
    "frozen": (lambda x: Box(Box((x,))), lambda w: w.inner.inner[0]),
}


@pytest.mark.parametrize("place", ["argument", "keyword", "attribute"])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", ["module", "variable"])
def test_modules_and_variables_anywhere(kind, wrap, place):
    into, out_of = WRAPS[wrap]
    owner, x = Block(), torch.randn(4, 3)
    given = into(owner if kind == "module" else Variable(owner, "state", "count"))

    def use(thing, x):
        if isinstance(thing, Variable):
            thing.value = thing.value + 1
            return x + thing.value
        return thing(x)

    class Top(nn.Module):
        pass

    top = Top()
    if place == "attribute" and wrap == "itself" and kind == "module":
        top.__dict__["held"] = given  # not registered
    elif place == "attribute":
        top.held = given
    bodies = {
        "argument": (lambda m, held, x: use(out_of(held), x), (given, x), {}),
        "keyword": (lambda m, x, *, held: use(out_of(held), x), (x,), {"held": given}),
        "attribute": (lambda m, x: use(out_of(m.held), x), (x,), {}),
    }
    fn, args, kwargs = bodies[place]
    twin = copy.deepcopy(owner)
    twin_out = use(twin if kind == "module" else Variable(twin, "state", "count"), x)
    out = remat(fn)(top, *args, **kwargs)
    assert torch.equal(out, twin_out)
    for (name, got), expected in zip(owner.state_dict().items(), twin.state_dict().values()):
        assert torch.equal(got, expected), name
    if kind == "module":
        out.square().sum().backward()
        twin_out.square().sum().backward()
        for (name, got), expected in zip(owner.named_parameters(), twin.parameters()):
            assert torch.equal(got.grad, expected.grad), name


def test_a_module_in_an_argument_that_is_a_part_of_another_is_covered():
    net, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.randn(4, 3)
    out = remat(lambda m, part, x: part(m[0](x)))(net, net[1], x)
    assert net[1].num_batches_tracked == 1
    torch.testing.assert_close(out, nn.BatchNorm1d(3)(net[0](x)))


RETURNS = {
    "module": lambda m: m,
    "variable": lambda m: Variable(m, "state", "count"),
    "submodule in a dict": lambda m: {"x": [m.linear]},
    "variable in a dataclass": lambda m: Box(Variable(m, "state", "count")),
    "module in dataclasses": lambda m: (Box([Box(m)]), 3),
}


@pytest.mark.parametrize("name", RETURNS)
@pytest.mark.parametrize("transform", ["vmap", "remat", "scan carry", "scan ys", "apply"])
def test_returning_modules_or_variables_is_refused(transform, name):
    returned = RETURNS[name]
    x, module = torch.ones(2), Block()
    call = {
        "vmap": lambda: vmap(lambda m, x: returned(m))(module, x),
        "remat": lambda: remat(lambda m, x: returned(m))(module, x),
        "scan carry": lambda: scan(lambda m, c: (returned(m), None), length=2, compile=False)(module, x),
        "scan ys": lambda: scan(lambda m, c: (c, returned(m)), length=2, compile=False)(module, x),
        "apply": lambda: torchlift.apply(module, {}, method=returned),
    }[transform]
    with pytest.raises(
        TransformedMethodReturnValueError, match=r"returned a (Variable|Block|Linear), expected tensors"
    ):
        call()


def test_model_outputs_pass():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        loss: Any = None

    module, x = Block(), torch.randn(4, 3)
    out = remat(lambda m, x: Output(m.linear(x)))(module, x)
    assert type(out) is Output and torch.equal(out.logits, module.linear(x)) and out.loss is None


@pytest.mark.parametrize("name", ["vmap", "remat", "map_variables", "named_call", "apply", "scan_layers"])
def test_keyword_arguments_may_have_any_name(name):
    class Layer(nn.Linear):
        def forward(self, x, **extra):
            return super().forward(x) + sum(extra.values())

    layer, x, names = Layer(2, 2), torch.ones(3, 2), ("layer", "m", "fn", "label", "inside")
    extra = {key: torch.ones(3, 2) for key in (*names, "module")[: 5 if name == "apply" else 6]}
    call = lambda m, /, *args, **kwargs: m(*args, **kwargs)
    way = {
        "vmap": lambda: torchlift.vmap(call)(layer, x, **extra),
        "remat": lambda: torchlift.remat(call)(layer, x, **extra),
        "map_variables": lambda: torchlift.map_variables(call, "params", lambda v: v)(layer, x, **extra),
        "named_call": lambda: torchlift.named_call(call)(layer, x, **extra),
        "apply": lambda: torchlift.apply(layer, {}, x, **extra),
        "scan_layers": lambda: torchlift.scan_layers([layer], compile=False)(x, **extra),
    }[name]
    torch.testing.assert_close(way(), nn.Linear.forward(layer, x) + len(extra))


def test_the_parameters_of_a_generic_class_are_for_type_checkers():
    assert remat(Typed[int]) is remat(Typed)
    heads = vmap(functools.partial(Typed[int], 3), variable_axes={"params": 0}, in_axes=None, axis_size=2)(4)
    assert heads(torch.ones(5, 3)).shape == (2, 5, 4) and isinstance(heads, Typed)
    assert pickle.loads(pickle.dumps(heads)).weight.shape == (2, 4, 3)
    for alias in (list[int], Optional[nn.Linear]):  # noqa: UP045  not what `|` makes
        with pytest.raises(TransformTargetError, match="remat: got .*, expected an nn.Module subclass"):
            remat(alias)
