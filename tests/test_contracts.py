"""The contracts that every transform keeps, one section each."""

import copy
import inspect
import threading
import warnings

import pytest
import torch
from torch import func, nn

import torchlift
from torchlift import apply, capture, errors, remat, remat_scan, scan, sow, variable, vmap
from torchlift.errors import (
    AliasError,
    ModifyCollectionError,
    PlainAttributeError,
    PublishError,
    TorchliftError,
    TorchliftWarning,
    UnsupportedError,
)

pytestmark = pytest.mark.usefixtures("float64")

AOT = {"backend": "aot_eager"}
SIZE = 3


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def clone(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# Every transform as a way to call ``body(module, x)`` once, with the leading axis that some need put on and taken off.
WAYS = {
    "vmap": lambda body, **kw: (
        lambda m, x: vmap(body, variable_axes={"state": None, "batch_stats": None}, **kw)(m, x[None])[0]
    ),
    "remat": lambda body: remat(body),
    "scan": lambda body: (
        lambda m, x: scan(lambda m, c, x: (c, body(m, x)), variable_carry=("state", "batch_stats"), compile=False)(
            m, 0, x[None]
        )[1][0]
    ),
    "scan aot": lambda body: (
        lambda m, x: scan(lambda m, c, x: (c, body(m, x)), variable_carry=("state", "batch_stats"), compile=AOT)(
            m, 0, x[None]
        )[1][0]
    ),
    "remat_scan": lambda body: remat_scan(
        body, lengths=(1, 1), variable_axes={}, variable_carry=("state", "batch_stats"), compile=False
    ),
    "remat of remat": lambda body: remat(remat(body)),
    "vmap of remat": lambda body: WAYS["vmap"](remat(body)),
    "remat of scan": lambda body: remat(WAYS["scan"](body)),
}
EAGER = [name for name in WAYS if "aot" not in name]
every_way = pytest.mark.parametrize("way", WAYS)
every_eager_way = pytest.mark.parametrize("way", EAGER)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)
        variable(self, "state", "total", torch.zeros, SIZE)
        variable(self, "state", "last", torch.zeros, SIZE)
        self.steps, self.history = 0, []

    def forward(self, x):
        self.total += self.linear.bias.detach()
        self.last = 2 * self.linear.bias
        return self.linear(x).tanh()


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


# 2. Publish ----------------------------------------------------------------------------------------------------------


@every_way
def test_publish_does_as_the_body_did(way):
    module, twin, x = Net(), Net(), torch.randn(SIZE)
    twin.load_state_dict(module.state_dict())
    total, last, held = module.total, module.last, module.state_dict()
    for _ in range(2):
        close(WAYS[way](Net.forward)(module, x), twin(x))
        assert module.total is total and torch.equal(total, twin.total) and torch.equal(held["total"], total)
        assert module.last is not last and torch.equal(module.last, twin.last)
        assert not module.last.requires_grad and module.last.grad_fn is None  # detached


@pytest.mark.parametrize("way", ["vmap", "remat", "scan"])
def test_publish_into_a_parameter_keeps_it_for_the_optimizer(way):
    module = nn.Linear(SIZE, SIZE)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)

    def body(m, x):
        m.weight = nn.Parameter(torch.ones_like(m.weight))
        return x

    lifted = {
        "vmap": lambda m, x: vmap(body, variable_axes={"params": None})(m, x[None]),
        "remat": remat(body),
        "scan": lambda m, x: scan(lambda m, c: (body(m, c), None), variable_carry="params", length=1, compile=False)(
            m, x
        ),
    }[way]
    lifted(module, torch.ones(SIZE))
    assert module.weight is optimizer.param_groups[0]["params"][0] and bool((module.weight == 1).all())


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@every_way
def test_publish_nothing_when_the_call_raises(way, error):
    module, x = Net(), torch.randn(SIZE)
    before, fields = clone(module), dict(module.__dict__)

    def body(m, x):
        m(x)
        with torch.no_grad():
            variable(m, "state", "new", torch.zeros, ())
        raise error

    for _ in range(2):
        with pytest.raises(error):
            WAYS[way](body)(module, x)
        assert module.__dict__ == fields and list(module.state_dict()) == list(before)
        assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    close(WAYS[way](lambda m, x: m.linear(x))(module, x), module.linear(x))


def test_publish_is_all_or_nothing():
    module = Net()

    def body(m, x):
        m.total += 1
        m.extra = x

    with pytest.raises(PlainAttributeError, match="extra"):
        remat(body)(module, torch.ones(SIZE))
    assert not module.total.any()


NOT_MUTABLE = {
    "vmap": (
        lambda body: vmap(body),
        r"vmap\(body\): changed 'total' of collection 'state', .*variable_axes=\{'state': 0",
    ),
    "remat": (lambda body: remat(body, variables="params"), r"remat\(body, .*'total' .*; add 'state' to variables="),
    "scan": (
        lambda body: lambda m, x: scan(body, length=1, compile=False)(m, x),
        r"scan\(body, .*'total' .*'state', which is read-only there; give it an axis, .*, or carry it .*variable_carry='st",
    ),
    "remat_scan": (
        lambda body: remat_scan(body, lengths=(1,), variable_axes={}, split_rngs={}, compile=False),
        "remat_scan.*'total' of collection 'state'",
    ),
    "apply": (
        lambda body: lambda m, x: apply(m, {}, x, method=body),
        r"apply\(Net\): changed 'total' .*mutable=\['state'\]",
    ),
}


@pytest.mark.parametrize("way", NOT_MUTABLE)
@pytest.mark.parametrize("how", ["in place", "rebound", "created", "in eval"])
def test_publish_refuses_what_is_not_mutable(way, how):
    lift, match = NOT_MUTABLE[way]

    def body(m, x):
        if how == "created":
            m.register_buffer("total", torch.ones(()))
            torchlift.set_collection(m, "state", "total")
        elif how == "rebound":
            m.total = m.total + 1
        else:
            m.total.add_(1)
        return x

    module = Net().train(how != "in eval")
    if how == "created":
        del module.total
        match = match.replace("changed", "created").replace(" of collection", " (in|of) collection")
    before = clone(module)
    with pytest.raises(ModifyCollectionError, match=match):
        lift(body)(module, torch.ones(1, SIZE))
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


def test_publish_does_not_invent_changes():
    norm = nn.Sequential(nn.BatchNorm1d(SIZE), nn.Linear(SIZE, SIZE))
    x = torch.randn(4, 2, SIZE)
    close(vmap(lambda m, x: m[1](x))(norm, x), norm[1](x))  # in training, but its norm is not called
    close(vmap(lambda m, x: m(x))(norm.eval(), x), torch.stack([norm(row) for row in x]))
    x = x[0]

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(SIZE))
            self.register_buffer("var", torch.ones(SIZE))

        def forward(self, x):
            return nn.functional.batch_norm(x, self.mean, self.var, training=self.training)

    ours, twin = Functional(), Functional()
    close(remat(lambda m, x: m(x))(ours, x), twin(x))
    assert torch.equal(ours.mean, twin.mean) and ours.mean.any()
    close(remat(lambda m, x: m(x), variables=False)(ours.eval(), x), twin.eval()(x))


@every_eager_way
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_publish_without_grad(way, context):
    module = nn.Sequential(Net(), nn.Identity() if "vmap" in way else nn.BatchNorm1d(SIZE))
    twin, x = copy.deepcopy(module), torch.randn(2, SIZE)
    with context():
        close(WAYS[way](lambda m, x: m(x))(module, x), twin(x))
    for (name, got), expected in zip(module.state_dict().items(), twin.state_dict().values()):
        assert torch.equal(got, expected), name


def test_publish_under_torch_func_is_a_named_error():
    module, x = Net(), torch.randn(SIZE)
    match = (
        r"remat\(.*\): 'last' of collection 'state' changed under an outer torch.func .*apply\(.*mutable=\['state'\]\)"
    )
    lifted = remat(lambda m, x: (setattr(m, "last", x * x), x.sum())[1])
    before = clone(module)
    for transform in (func.grad, func.vmap, lambda f: func.jacrev(f)):
        with pytest.raises(PublishError, match=match):
            transform(lambda x: lifted(module, x))(x)
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    grad, updated = func.grad(
        lambda x: (lambda out: (out[0], out[1]["state"]["last"]))(apply(module, {}, x, method=lifted, mutable="state")),
        has_aux=True,
    )(x)
    close(updated, x * x)
    lifted(module, x)
    close(module.last, x * x)


def test_publish_of_a_deleted_variable_is_refused():
    with pytest.raises(UnsupportedError, match="deleted 'total' in the body; delete it outside"):
        remat(lambda m, x: delattr(m, "total"))(Net(), torch.ones(SIZE))


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


@pytest.mark.parametrize("way", ["vmap", "remat", "scan"])
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
