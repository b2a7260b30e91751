"""The contracts that every transform keeps, one section each; the second, publish, has a file of its own."""

import copy
import inspect
import threading
import warnings

import pytest
import torch
from torch import func, nn
from ways import NOT_MUTABLE, SIZE, WAYS, Net, clone, close, every_eager_way, every_way

import torchlift
from torchlift import apply, capture, errors, remat, scan, sow, vmap
from torchlift.errors import (
    AliasError,
    PlainAttributeError,
    TorchliftError,
    TorchliftWarning,
)

pytestmark = pytest.mark.usefixtures("float64")

# 1. Bind -------------------------------------------------------------------------------------------------------------


def test_bind_threads_do_not_see_each_other():
    module, failures = Net(), []
    before, x = clone(module), torch.randn(SIZE)
    weights = [torch.full((SIZE, SIZE), float(i)) for i in range(8)]

    def use(weight):
        for _ in range(40):
            given = {"params": {"linear.weight": weight}}
            out = apply(module, given, x, method=remat(lambda m, x: m.linear(x)))
            if not torch.equal(out, weight @ x + module.linear.bias):
                failures.append(weight[0, 0])

    threads = [threading.Thread(target=use, args=(weight,)) for weight in weights]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and all(torch.equal(before[name], t) for name, t in module.state_dict().items())


@every_way
def test_bind_leaves_the_real_module_alone(way):
    module, seen = Net(), []
    fields = {id(m): dict(m.__dict__) for m in module.modules()}
    slots = [dict(m._parameters) for m in module.modules()]

    def body(m, x):
        seen.append(m is module or m.linear is module.linear)
        assert type(m) is Net and isinstance(m.linear, nn.Linear)
        for real, before in zip(module.modules(), slots):
            assert real.__dict__ == fields[id(real)] and all(real._parameters[k] is v for k, v in before.items())
        return m.linear(x)

    close(WAYS[way](body)(module, torch.ones(SIZE)), module.linear(torch.ones(SIZE)))
    assert seen and not any(seen)


@every_way
def test_bind_notices_a_changed_tree(way):
    module, lifted = nn.Sequential(nn.Linear(SIZE, SIZE)), WAYS[way](lambda m, x: m(x))
    x = torch.randn(SIZE)
    close(lifted(module, x), module(x))
    module.append(nn.Tanh())
    module[0] = nn.Linear(SIZE, SIZE, bias=False)
    close(lifted(module, x), module(x))
    module.append(nn.Linear(SIZE, SIZE))
    module[2].weight.data.mul_(2)
    close(lifted(module, x), module(x))


def test_bind_gives_clones_of_what_a_body_may_mutate():
    module, x = nn.BatchNorm1d(SIZE), torch.randn(4, SIZE)
    before = clone(module)
    read = lambda x: apply(module, {}, x, mutable="batch_stats")[0].sum()
    func.grad(read)(x), func.vmap(lambda _: read(x))(torch.ones(2)), read(x)
    given = {"running_mean": torch.zeros(SIZE)}
    apply(module, {"batch_stats": given}, x, mutable="batch_stats")
    assert not given["running_mean"].any()
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


# 3. Alias ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(SIZE, SIZE, bias=False), nn.Linear(SIZE, SIZE, bias=False)
        self.b.weight = self.a.weight
        self.part = self.a
        self.register_buffer("t", torch.zeros(1))
        self.a.register_buffer("same", self.t)

    def forward(self, x):
        assert self.a.weight is self.b.weight and self.part is self.a and self.t is self.a.same
        self.t += 1
        return self.b(self.a(x).tanh())


@every_way
def test_alias_is_lifted_once(way):
    module, x = torchlift.set_collection(Tied(), "state", "t"), torch.randn(SIZE)
    torchlift.set_collection(module.a, "state", "same")
    twin = copy.deepcopy(module)
    out = WAYS[way](Tied.forward)(module, x)
    close(out, twin(x))
    close(torch.autograd.grad(out.sum(), module.a.weight), torch.autograd.grad(twin(x).sum(), twin.a.weight))
    assert module.t is module.a.same and module.t == 1


@pytest.mark.parametrize("transform", [vmap, scan])
def test_alias_with_two_axes_is_refused_with_every_path(transform):
    module = torchlift.set_collection(Tied(), "state", "t")
    match = (
        r"\w+\(.*\): one tensor has several names: 't' asks for axis 0, 'a.same' asks for axis None; give them the same"
    )
    with pytest.raises(AliasError, match=match):
        transform(lambda m, x: x, variable_axes={"state": 0})(module, torch.ones(1))


# 4. Closures ---------------------------------------------------------------------------------------------------------

a_global = torch.linspace(0.5, 1.5, SIZE, dtype=torch.float64).requires_grad_()


@every_way
def test_closures_keep_their_gradient(way):
    closed, outer = torch.randn(SIZE, requires_grad=True), nn.Linear(SIZE, SIZE)
    module, x = Net(), torch.randn(SIZE)
    module.plain, module.nested = torch.randn(SIZE, requires_grad=True), {"k": [torch.randn(SIZE, requires_grad=True)]}

    def body(m, x):
        return outer(m.linear(x * closed) * a_global) * m.plain + m.nested["k"][0]

    leaves = [closed, a_global, outer.weight, module.plain, module.nested["k"][0], module.linear.weight]
    got = torch.autograd.grad(WAYS[way](body)(module, x).square().sum(), leaves)
    close(got, torch.autograd.grad(body(module, x).square().sum(), leaves))


def test_closures_under_torch_func():
    module, x, w = Net(), torch.randn(SIZE), torch.randn(SIZE)
    for lift in (remat, lambda body: lambda m, x: vmap(body)(m, x[None])[0]):
        loss = lambda w, f: f(lambda m, x: m.linear(x * w).tanh())(module, x).sum()
        close(func.grad(loss)(w, lift), func.grad(loss)(w, lambda body: body))


# 6. Eager = compiled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["vmap", "remat", "scan", "remat of remat"])
def test_eager_equals_compiled(way):
    module, twin, x = Net(), Net(), torch.randn(SIZE)
    twin.load_state_dict(module.state_dict())
    lifted = WAYS[way](Net.forward)
    compiled = torch.compile(lifted, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        close(compiled(module, x), lifted(twin, x))
    close(module.state_dict(), twin.state_dict())
    compiled(module, x).sum().backward()
    lifted(twin, x).sum().backward()
    close(module.linear.weight.grad, twin.linear.weight.grad)


@pytest.mark.parametrize("way", ["vmap", "remat", "scan"])
def test_compiled_refuses_what_eager_refuses(way):
    def body(m, x):
        m.total = m.total + 1
        return (x, None) if way == "scan" else x

    module, lifted = Net(), NOT_MUTABLE[way][0](body)
    for call in (lifted, torch.compile(lifted, backend="eager", fullgraph=True)):
        with pytest.raises(Exception, match="changed 'total' of collection 'state', which is read-only there"):
            call(module, torch.ones(1, SIZE))
    assert not module.total.any()


@pytest.mark.parametrize("way", ["vmap", "remat"])
def test_compiled_an_error_of_the_users_own_comes_through(way):
    def body(m, x):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        torch.compile(WAYS[way](body), backend="eager")(Net(), torch.ones(SIZE, requires_grad=True))


# 7. Exactly once -----------------------------------------------------------------------------------------------------


@every_way
def test_exactly_once(way):
    class Counting(Net):
        def forward(self, x):
            self.total += 1
            sow(self, "intermediates", "seen", self.total)
            return super().forward(x)

    module, x = Counting(), torch.randn(SIZE, requires_grad=True)
    with torch.no_grad():
        module.linear.bias.zero_()
    with capture("intermediates") as store:
        out = WAYS[way](lambda m, x: m(x))(module, x)
        (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        g.sum().backward(retain_graph=True)
        g.sum().backward()
    assert module.total.tolist() == [1] * SIZE and len(store["intermediates"]["seen"]) == 1


@pytest.mark.parametrize("lift", [remat, lambda c: vmap(c, variable_axes={"params": None})], ids=["remat", "vmap"])
def test_root_hooks_run_around_the_call_once(lift):
    calls = []
    module = lift(nn.Linear)(SIZE, SIZE)
    module.register_forward_pre_hook(lambda m, args: calls.append(("pre", type(args[0]), args[0].shape)))
    module.register_forward_hook(lambda m, args, out: calls.append(("post", type(out), out.shape)))
    module(torch.ones(5, SIZE, requires_grad=True)).sum().backward()
    assert calls == [("pre", torch.Tensor, (5, SIZE)), ("post", torch.Tensor, (5, SIZE))]


# 8. Plain attributes -------------------------------------------------------------------------------------------------

ASSIGNS = {
    "new": lambda m, x: setattr(m, "cache", 2 * x),
    "in a list": lambda m, x: setattr(m, "history", [2 * x]),
    "in a dict": lambda m, x: setattr(m, "history", {"k": (2 * x,)}),
    "of a part": lambda m, x: setattr(m.linear, "cache", 2 * x),
}


@pytest.mark.parametrize("name", ASSIGNS)
@every_way
def test_a_tensor_in_a_plain_attribute_is_refused(way, name):
    module = Net()

    def body(m, x):
        ASSIGNS[name](m, x)
        return x

    match = (
        r"assigned '(linear\.)?(cache|history)' in the body, a tensor in a plain attribute, .*torchlift.variable\(self,"
    )
    with pytest.raises(PlainAttributeError, match=match):
        WAYS[way](body)(module, torch.ones(SIZE))
    assert not hasattr(module, "cache") and module.history == []


GROWS = {
    "append": lambda m, x: m.history.append(2 * x),
    "in a dict": lambda m, x: m.named.update(new=2 * x),
    "nested": lambda m, x: m.named["list"].append([2 * x]),
    "replaced": lambda m, x: m.named.update(kept=2 * x),
    "of a part": lambda m, x: m.linear.seen.append(2 * x),
    "beside a tensor": lambda m, x: m.beside.append(2 * x),
    "a long one": lambda m, x: m.words.append(2 * x),
}


@pytest.mark.parametrize("name", GROWS)
@every_way
def test_a_tensor_put_into_a_plain_list_or_dict_is_refused(way, name):
    module = Net()
    module.named, module.linear.seen, module.words = {"kept": 1, "list": ["a"]}, [0], list(range(100))
    module.beside = [torch.zeros(SIZE)]
    lists = [module.history, module.named, module.named["list"], module.linear.seen, module.words, module.beside]
    before = copy.deepcopy(lists)

    def body(m, x):
        GROWS[name](m, x)
        return x

    match = (
        r"put a tensor into '(linear\.)?\w+' in the body, a tensor in a plain (list|dict), .*torchlift.variable\(self,"
    )

    def failing(m, x):
        return body(m, x) / [][0]

    for run, error, text in ((body, PlainAttributeError, match), (failing, IndexError, "list index")):
        with pytest.raises(error, match=text):
            WAYS[way](run)(module, torch.ones(SIZE))
        assert str(lists) == str(before)


@pytest.mark.parametrize("way", ["vmap", "remat", "scan"])
def test_a_tensor_put_into_a_plain_list_is_refused_by_torch_compile(way):
    def body(m, x):
        m.history.append(2 * x)
        return x

    module = Net()
    compiled = torch.compile(WAYS[way](body), backend="eager", fullgraph=True)
    # The body of a checkpoint may change nothing outside of it: there Dynamo itself refuses.
    match = "Attempted to mutate ListVariable" if way == "remat" else "put a tensor into 'history' in the body"
    with pytest.raises(Exception, match=match):
        compiled(module, torch.ones(SIZE))
    assert module.history == []


@every_eager_way
def test_what_is_no_tensor_stays_in_a_plain_list(way):
    def body(m, x):
        m.history.append("called")
        return x

    module = Net()
    WAYS[way](body)(module, torch.ones(SIZE))
    assert module.history and set(module.history) == {"called"}


@every_eager_way
def test_a_changed_number_is_noticed(way):
    def body(m, x):
        m.steps += 1
        return x

    module = Net()
    with pytest.warns(TorchliftWarning, match=r"assigned 'steps' in the body: 0 -> 1, which is not kept: .*declare it"):
        WAYS[way](body)(module, torch.ones(SIZE))
    assert module.steps == 0


@every_eager_way
def test_attributes_that_do_not_change_are_no_matter(way):
    module = nn.utils.parametrizations.weight_norm(nn.Linear(SIZE, SIZE))
    old_style = nn.Linear(SIZE, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(old_style)
    x = torch.randn(SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for m in (module, old_style):
            out = WAYS[way](lambda m, x: m(x))(m, x)
            close(out, m(x))
            m.zero_grad()
            out.sum().backward()
            assert all(p.grad is not None for p in m.parameters())


# 9. Errors -----------------------------------------------------------------------------------------------------------

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, TorchliftError)]


@pytest.mark.parametrize("cls", [c for c in CLASSES if c is not TorchliftError], ids=lambda c: c.__name__)
def test_errors_are_torchlifts_and_the_fitting_builtin(cls):
    builtins = [
        base for base in cls.__mro__ if base.__module__ == "builtins" and base not in (Exception, BaseException)
    ]
    assert [base for base in builtins if base is not object] and cls.__doc__
    assert str(cls("one\nmessage")) == "one\nmessage"
