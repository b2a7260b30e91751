"""jit: one compilation for all that agree, the same values, gradients and state as the plain call."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import torchlift

pytestmark = pytest.mark.usefixtures("float64")


class Counting:
    """A backend that counts its compilations."""

    def __init__(self):
        self.compiled = 0

    def __call__(self, graph, inputs):
        self.compiled += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def backend():
    return Counting()


class Block(nn.Module):
    def __init__(self, dim=4, power=1):
        super().__init__()
        self.linear, self.norm, self.power = nn.Linear(dim, dim), nn.BatchNorm1d(dim), power
        torchlift.variable(self, "state", "total", torch.zeros, dim)

    def forward(self, x, scale=1.0):
        y = self.norm(self.linear(x)) ** self.power
        self.total = self.total + y.sum(0)
        return x + scale * y


def equal(jitted, plain, *args):
    """The two agree in values, gradients and state."""
    leaves = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
    for x in leaves:
        out, expected = jitted(x, *args), plain(x, *args)
        torch.testing.assert_close(out, expected)
        a = torch.autograd.grad((out**3).sum(), [x, *jitted.parameters()])
        b = torch.autograd.grad((expected**3).sum(), [x, *plain.parameters()])
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(dict(jitted.named_buffers()), dict(plain.named_buffers()))


def pair(**options):
    torch.manual_seed(1)
    jitted = torchlift.jit(Block, **options)()
    plain = Block()
    plain.load_state_dict(jitted.state_dict())
    return jitted, plain


# Compilations --------------------------------------------------------------------------------------------------------


def test_one_compilation_serves_all_instances(backend):
    Fast = torchlift.jit(Block, backend=backend)
    x = torch.randn(5, 4)
    for _ in range(12):
        Fast()(x)
    assert backend.compiled == 1
    for power in range(2, 14):  # each static field is one more, and their number has no limit
        Fast(power=power)(x)
    assert backend.compiled == 13
    torchlift.jit(Block, backend=backend)(power=3)(x)  # the same class
    assert backend.compiled == 13


def test_one_compilation_for_a_function_over_instances(backend):
    run = torchlift.jit(lambda m, x: m(x).sum(), backend=backend)
    for _ in range(12):
        run(Block(), torch.randn(5, 4))
    assert backend.compiled == 1


def test_a_list_of_jitted_layers_is_compiled_once(backend):
    Fast = torchlift.jit(Block, backend=backend)
    net = nn.Sequential(*[Fast() for _ in range(10)])
    net(torch.randn(5, 4))
    assert backend.compiled <= 2  # the first layer's input needs no gradient, the others' do


def test_no_compilation_for_a_batch_size_after_the_second(backend):
    block = torchlift.jit(Block, backend=backend)()
    for size in (5, 6, 7, 8, 9, 31):
        block(torch.randn(size, 4))
    assert backend.compiled == 2


@pytest.mark.parametrize("how", [{"static_argnums": 2}, {"static_argnames": "power"}, {"static_argnums": -1}])
@pytest.mark.parametrize("by_name", [False, True])
def test_one_compilation_for_each_static_argument(backend, how, by_name):
    def fn(m, x, power):
        return m(x) ** power

    run = torchlift.jit(fn, backend=backend, **how)
    m, x = nn.Linear(4, 4), torch.randn(5, 4)
    for power in (2, 3, 4, 2, 3, 4, 5, 2.0):
        out = run(m, x, power=power) if by_name else run(m, x, power)
        torch.testing.assert_close(out, m(x) ** power)
    assert backend.compiled == 5


@pytest.mark.parametrize("static", [{}, {"static_argnums": 2}, {"static_argnames": "power"}])
def test_arguments_by_position_and_by_name_are_compiled_once(backend, static):
    def fn(m, x, power=2, *, scale=1.0):
        return m(x) ** power * scale

    run = torchlift.jit(fn, backend=backend, **static)
    m, x = nn.Linear(4, 4), torch.randn(5, 4)
    for out in (run(m, x, 3), run(m, x, power=3), run(m, x=x, power=3), run(m, power=3, x=x)):
        torch.testing.assert_close(out, m(x) ** 3)
    assert backend.compiled == 1
    torch.testing.assert_close(run(m, x, scale=2.0), 2 * m(x) ** 2)


def test_static_arguments_are_any_hashable_values():
    def fn(m, activation, x, *rest, sizes):
        return activation(m(x)).view(*sizes) + len(rest)

    run = torchlift.jit(fn, static_argnums=(1, 3), static_argnames="sizes", backend="aot_eager")
    m, x = nn.Linear(4, 4), torch.randn(2, 4)
    torch.testing.assert_close(run(m, torch.tanh, x, "a", sizes=(8,)), m(x).tanh().view(8) + 1)
    torch.testing.assert_close(run(m, torch.relu, x, "b", sizes=(4, 2)), m(x).relu().view(4, 2) + 1)


# Equality ------------------------------------------------------------------------------------------------------------


def test_equals_the_plain_module():
    equal(*pair(backend="aot_eager"))
    equal(*pair(backend="aot_eager", fullgraph=False), 2.0)


@pytest.mark.slow
def test_equals_the_plain_module_under_inductor():
    equal(*pair())


def test_state_comes_out_detached_and_in_its_own_storage():
    block, _ = pair(backend="aot_eager")
    held = block.norm.running_mean
    for _ in range(3):
        block(torch.randn(5, 4)).sum().backward()
    assert not block.total.requires_grad and block.norm.running_mean is held and held.abs().sum() > 0
    assert block.norm.num_batches_tracked == 3


def test_a_body_may_set_a_buffer_and_a_name_and_sow():
    class Sets(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            self.mode = "ran"
            torchlift.sow(self, "intermediates", "double", 2 * x)
            return x + self.count

    module = torchlift.jit(Sets, backend="aot_eager")()
    for count in (1, 2):
        with torchlift.capture("intermediates") as store:
            assert module(torch.zeros(1)) == count == module.count
        assert module.mode == "ran" and len(store["intermediates"]["double"]) == 1


def test_nothing_is_published_when_the_body_raises():
    class Fails(Block):
        def forward(self, x):
            super().forward(x)
            if x.shape[0] == 7:
                raise KeyError("seven")
            return x

    module = torchlift.jit(Fails, backend="aot_eager")()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(KeyError, match="seven"):
        module(torch.randn(7, 4))
    torch.testing.assert_close(module.state_dict(), before)


def test_draws_are_those_of_the_plain_call():
    dropout = torchlift.jit(nn.Dropout, backend="aot_eager")(0.5)
    x = torch.ones(100)
    torch.manual_seed(0)
    first, second, after = dropout(x), dropout(x), torch.rand(())
    torch.manual_seed(0)
    plain = nn.Dropout(0.5)
    torch.testing.assert_close((first, second, after), (plain(x), plain(x), torch.rand(())), rtol=0, atol=0)
    assert (first != second).any()


def test_sown_values_come_out():
    class Sows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                torchlift.sow(self, "intermediates", "x", x)
                torchlift.sow(layer, "other", "y", x)
            return x

    module = torchlift.jit(Sows, backend="aot_eager")()
    x = torch.randn(2, 4)
    module(x)
    with torchlift.capture("intermediates") as store:
        out = module(x)
    assert list(store) == ["intermediates"]
    first, second = store["intermediates"]["x"]
    torch.testing.assert_close((first, second), (module.layers[0](x), out))
    with torchlift.capture() as store:
        module(x)
    assert set(store["other"]) == {"layers.0.y", "layers.1.y"}


def test_methods_and_copies():
    class Two(Block):
        def twice(self, x):
            return self(self(x))

    module = torchlift.jit(Two, methods=["forward", "twice"], backend="aot_eager")().eval()
    plain = Two().eval()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(5, 4)
    torch.testing.assert_close(module.twice(x), plain.twice(x))
    for again in (copy.deepcopy(module), copy.copy(module)):
        torch.testing.assert_close(again(x), module(x))


def test_two_threads():
    module, results = torchlift.jit(Block, backend="aot_eager")().eval(), {}
    plain = copy.deepcopy(module)
    x = torch.randn(5, 4)

    def work(k):
        results[k] = [module(x * k) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for k in (1, 2):
        torch.testing.assert_close(results[k][-1], Block.forward(plain, x * k))


def test_a_lifted_class_pickles():
    linear = torchlift.jit(nn.Linear, backend="aot_eager")(4, 4)
    again = pickle.loads(pickle.dumps(linear))
    assert type(again) is type(linear) and isinstance(again, nn.Linear)
    torch.testing.assert_close(again(torch.ones(4)), linear(torch.ones(4)))


def test_modules_and_variables_as_arguments():
    def fn(m, other, count, x):
        count.value = count.value + 1
        return m(other(x))

    run = torchlift.jit(fn, backend="aot_eager")
    a, b = nn.Linear(4, 4), Block()
    count = torchlift.variable(a, "state", "count", torch.zeros, ())
    run(a, b, count, torch.randn(5, 4)), run(a, b, count, torch.randn(5, 4))
    assert count.value == 2 and b.norm.num_batches_tracked == 2 and not b.total.requires_grad


# Compositions --------------------------------------------------------------------------------------------------------


STACKED = {"variable_axes": {"params": 0}}


def test_modules_in_plain_attributes_are_part_of_the_state(backend):
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            torchlift.variable(self, "state", "mean", torch.zeros, 3)

        def forward(self, x):
            self.mean = 0.5 * self.mean + self.weight * x
            return self.mean * 1

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = [Average()]

        def forward(self, x):
            return self.held[0](x)

    module = torchlift.jit(Holds, backend=backend)()
    for expected in (1.0, 1.5):
        out = module(torch.ones(3))
        assert out.tolist() == [expected] * 3 and not module.held[0].mean.requires_grad
    out.sum().backward()  # through this call alone
    assert backend.compiled == 1
    module = torchlift.jit(Holds, variables="params", backend="aot_eager")()
    with pytest.raises(torchlift.ModifyCollectionError, match="changed 'mean' of collection 'state'"):
        module(torch.ones(3))
    assert module.held[0].mean.tolist() == [0.0] * 3


def test_a_method_has_arguments_of_its_own(backend):
    class Powers(nn.Linear):
        def forward(self, x, power):
            return super().forward(x) ** power

    module = torchlift.jit(Powers, methods={"forward": {"static_argnums": 2, "backend": backend}})(4, 4)
    for power in (1, 2, 1):
        module(torch.randn(5, 4), power)
    assert backend.compiled == 2


def test_inside_and_outside_of_vmap(backend):
    stack = torchlift.vmap(torchlift.jit(Block, backend=backend), **STACKED, axis_size=3)()
    outer = torchlift.jit(torchlift.vmap(Block, **STACKED, axis_size=3), backend=backend)()
    plain = torchlift.vmap(Block, **STACKED, axis_size=3)()
    plain.load_state_dict(stack.state_dict())
    outer.load_state_dict(stack.state_dict())
    x = torch.randn(3, 5, 4)
    expected = plain(x)
    torch.testing.assert_close(stack(x), expected)
    assert backend.compiled == 0  # the body is part of the map
    torch.testing.assert_close(outer(x), expected)
    assert backend.compiled == 1
    torch.testing.assert_close(outer.total, plain.total)
    torch.testing.assert_close(stack.total, plain.total)


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_scan(order):
    class Step(Block):
        def forward(self, x, _=None):
            return super().forward(x), None

    scan = lambda cls: torchlift.scan(cls, **STACKED, length=3, compile=False)
    jit = lambda cls: torchlift.jit(cls, backend="aot_eager")
    fast = scan(jit(Step))() if order == "inside" else jit(scan(Step))()
    plain = scan(Step)()
    plain.load_state_dict(fast.state_dict())
    for _ in range(2):
        x = torch.randn(5, 4, requires_grad=True)
        out, expected = fast(x)[0], plain(x)[0]
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad((out**2).sum(), [x, *fast.parameters()]),
            torch.autograd.grad((expected**2).sum(), [x, *plain.parameters()]),
        )
        torch.testing.assert_close(dict(fast.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("policy", [None, torchlift.checkpoint_policies.dots_saveable])
def test_remat(policy):
    for fast in (
        torchlift.remat(torchlift.jit(Block, backend="aot_eager"), policy=policy)(),
        torchlift.jit(torchlift.remat(Block, policy=policy), backend="aot_eager")(),
    ):
        plain = Block()
        plain.load_state_dict(fast.state_dict())
        equal(fast, plain)


@pytest.mark.parametrize("outer", ["grad", "vmap", "jvp", "hessian"])
def test_torch_func_outside(outer, backend):
    fast, plain = torchlift.jit(nn.Linear, backend=backend)(4, 4), nn.Linear(4, 4)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(4)
    f, g = (lambda m: lambda x: (m(x) ** 3).sum())(fast), (lambda m: lambda x: (m(x) ** 3).sum())(plain)
    transform = {
        "grad": torch.func.grad,
        "hessian": torch.func.hessian,
        "vmap": lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, x])),
        "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    }[outer]
    torch.testing.assert_close(transform(f)(x), transform(g)(x))
    assert backend.compiled == 0


def test_torch_func_inside(backend):
    class Gradient(nn.Linear):
        def forward(self, x):
            return torch.func.vmap(torch.func.grad(lambda x: (super(Gradient, self).forward(x) ** 3).sum()))(x)

    fast = torchlift.jit(Gradient, backend=backend)(4, 4)
    x = torch.randn(5, 4)
    torch.testing.assert_close(fast(x), Gradient.forward(fast, x))
    assert backend.compiled == 1


def test_under_torch_compile(backend):
    fast, plain = pair(backend=backend)
    compiled = torch.compile(lambda x: fast(x), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(5, 4)
        torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(dict(fast.named_buffers()), dict(plain.named_buffers()))
    assert backend.compiled == 0


def test_jit_of_jit(backend):
    inner = torchlift.jit(Block, backend=backend)
    net = torchlift.jit(lambda m, x: m(m(x)), backend=backend)
    net(inner(), torch.randn(5, 4))
    assert backend.compiled == 1
