"""Publish: what a body did to the variables reaches the real module as the body did it, or not at all."""

import copy

import pytest
import torch
from torch import func, nn
from ways import NOT_MUTABLE, SIZE, WAYS, Net, clone, close, every_eager_way, every_way

import torchlift
from torchlift import Variable, apply, remat, scan, variable, vmap
from torchlift.errors import (
    ModifyCollectionError,
    PlainAttributeError,
    PublishError,
    TorchliftCompileWarning,
    UnsupportedError,
)

pytestmark = pytest.mark.usefixtures("float64")


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


@pytest.mark.parametrize("lift", [torchlift.remat, torchlift.named_call], ids=["remat", "named_call"])
def test_statistics_are_written_as_batch_norm_writes_them(lift):
    """A plain call that awaits its backward has saved them; torch's own next call does not disturb it."""
    norms = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x, found = torch.randn(4, 3), []
    for norm, again in zip(norms, (norms[0].forward, lambda x: lift(nn.BatchNorm1d.forward)(norms[1], x)), strict=True):
        (norm(x).square().sum() + again(2 * x).pow(3).sum()).backward()
        found.append([norm.weight.grad, *norm.buffers()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_statistics_of_a_forward_that_a_class_is_given_later_are_written(monkeypatch):
    """torch's own counts its calls in a buffer, which tells that it wrote; another one need not."""

    def uncounted(self, x):
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, training=True)

    norm, twin, x = nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3, affine=False), torch.randn(4, 3)
    for _ in range(2):
        close(remat(lambda m, x: m(x))(norm, x), twin(x))
        close(list(norm.buffers()), list(twin.buffers()))
        monkeypatch.setattr(nn.BatchNorm1d, "forward", uncounted)


@pytest.mark.parametrize("way", ["vmap", "remat", "scan", "scan aot"])
def test_a_parameter_set_through_its_variable_is_published_once(way):
    class Growing(nn.Linear):
        def forward(self, x):
            weight = Variable(self, "params", "weight")
            weight.value = weight.value + 1
            return super().forward(x).tanh()

    AOT = {"backend": "aot_eager"}
    step = lambda m, c: (m(c), None)
    module, twin = Growing(SIZE, SIZE), Growing(SIZE, SIZE)
    twin.load_state_dict(module.state_dict())
    weight, x = module.weight, torch.randn(SIZE, requires_grad=True)
    out = {
        "vmap": lambda: vmap(lambda m, x: m(x), variable_axes={"params": None})(module, x[None])[0],
        "remat": lambda: remat(lambda m, x: m(x))(module, x),
        "scan": lambda: scan(step, variable_carry="params", length=1, compile=False)(module, x)[0],
        "scan aot": lambda: scan(step, variable_carry="params", length=1, compile=AOT)(module, x)[0],
    }[way]()
    expected = twin(x)
    close(out, expected)
    assert module.weight is weight and torch.equal(weight, twin.weight)
    if way in ("remat", "scan aot"):  # which keep the parameter for backward, and it is not what it was
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    else:
        close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x))
    read_only = scan(lambda m, c: (m(c), None), length=2, compile=False)
    with pytest.raises(
        ModifyCollectionError, match="changed 'weight' of collection 'params', which is read-only there"
    ):
        read_only(module, x)
    assert torch.equal(weight, twin.weight)


@pytest.mark.parametrize("loop", ["scan", "scan_layers"])
def test_a_parameter_written_in_place_is_as_the_loop_leaves_it(loop):
    class Doubling(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.mul_(2)
            return super().forward(x)

    step, x = lambda m, c: (m(c), None), torch.randn(SIZE)

    def run(compile):
        torch.manual_seed(0)
        modules = [Doubling(SIZE, SIZE) for _ in range(3)]
        if loop == "scan":
            out = scan(step, length=3, compile=compile)(modules[0], x)[0]
        else:
            out = torchlift.scan_layers(modules, compile=compile)(x)
        return out, *(p for module in modules for p in module.parameters())

    expected = run(False)
    with pytest.warns(TorchliftCompileWarning, match="the body writes in place into a tensor that is not its carry"):
        got = run({"backend": "aot_eager"})
    for a, b in zip(got, expected, strict=True):
        close(a, b)
