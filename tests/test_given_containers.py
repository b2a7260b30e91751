"""What a body puts into a list, dict or dataclass among its arguments is not lost unsaid: NOTE [Given containers]."""

import collections
import dataclasses
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import torchlift
from torchlift import UnsupportedError, scan_layers

AOT = {"backend": "aot_eager"}


class Layer(nn.Module):
    """One that fills what it is given."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, losses, cache=None):
        x = self.linear(x).tanh()
        losses.append(x.pow(2).mean())
        if cache is not None:
            cache["n"] = cache.get("n", 0) + 1
            cache["last"] = x + cache.get("last", 0)
            x = x + cache["last"].mean()
        return x


@dataclasses.dataclass
class Context:
    total: torch.Tensor


class InDict(Layer):
    def forward(self, x, context):
        context["total"] = context["total"] + x.mean()
        return self.linear(x) + context["total"]


class InDataclass(Layer):
    def forward(self, x, context):
        context.total = context.total + x.mean()
        return self.linear(x) + context.total


class InDeque(Layer):
    def forward(self, x, context):
        context.append(x.mean())
        return self.linear(x) + sum(context)


class Nested(Layer):
    def forward(self, x, context):
        context[0]["a"].append(x.mean())
        context[0]["pair"] = (context[0]["a"][-1], x.sum())
        context[0].pop("gone", None)
        return self.linear(x) + sum(context[0]["a"])


KINDS = {
    InDict: lambda: {"total": torch.zeros(())},
    InDataclass: lambda: Context(torch.zeros(())),
    InDeque: lambda: collections.deque([torch.zeros(())]),
    Nested: lambda: ({"a": [torch.zeros(())], "gone": 1, "pair": None},),
}


@contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torchlift.TorchliftCompileWarning)
        yield


def in_order(layers, x, *args, **kwargs):
    for layer in layers:
        x = layer(x, *args, **kwargs)
    return x


def leaves(tree):
    return [leaf for leaf in torchlift._tree.flatten(tree)[0] if leaf is not None]


def same(a, b):
    a, b = (leaves(list(x) if isinstance(x, collections.deque) else x) for x in (a, b))
    assert len(a) == len(b)
    for one, other in zip(a, b):
        torch.testing.assert_close(one, other)


def gradients(out, content, layers):
    total = out.sum() + sum(leaf.sum() for leaf in leaves(content) if isinstance(leaf, torch.Tensor))
    return torch.autograd.grad(total, [p for layer in layers for p in layer.parameters()])


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
def test_layers_that_fill_an_argument_run_one_by_one(compile, remat):
    layers, x = [Layer() for _ in range(3)], torch.randn(2, 4)
    stack = scan_layers(layers, compile=compile, remat=remat)
    for _ in range(2):  # the second call knows
        losses, cache, expected, kept = [], {}, [], {}
        told = pytest.warns(torchlift.TorchliftCompileWarning, match=r"changed args\[1\]\[0\], in a list")
        with told if compile else warnings.catch_warnings(action="error", category=torchlift.TorchliftWarning):
            out = stack(x, losses, cache=cache)
        plain = in_order(layers, x, expected, cache=kept)
        same(out, plain)
        same(losses, expected)
        same(cache, kept)
        same(gradients(out, (losses, cache), layers), gradients(plain, (expected, kept), layers))


@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_wrote_is_seen_by_the_next(kind, compile):
    layers, x = [kind() for _ in range(3)], torch.randn(2, 4)
    content, expected = KINDS[kind](), KINDS[kind]()
    with quiet():
        out = scan_layers(layers, compile=compile)(x, content)
    same(out, in_order(layers, x, expected))
    same(content, expected)


def test_a_cache_in_a_list_grows():
    class Cached(Layer):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def forward(self, x, past):
            key = self.linear(x)
            past[self.number] = key if past[self.number] is None else torch.cat([past[self.number], key], 1)
            return x + nn.functional.scaled_dot_product_attention(x, past[self.number], past[self.number])

    layers, xs = [Cached(number) for number in range(3)], torch.randn(3, 2, 1, 4)
    stack, past, expected = scan_layers(layers, compile=AOT, scanned_attributes=["number"]), [None] * 3, [None] * 3
    for x in xs:
        with quiet():
            out = stack(x, past)
        same(out, in_order(layers, x, expected))
    same(past, expected)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_in_a_graph_layers_that_fill_an_argument_are_traced_one_by_one(fullgraph):
    torch._dynamo.reset()
    layers, x, losses, expected = [Layer() for _ in range(3)], torch.randn(2, 4), [], []
    compiled = torch.compile(scan_layers(layers), backend="aot_eager", fullgraph=fullgraph)
    with quiet():
        same(compiled(x, losses), in_order(layers, x, expected))
    same(losses, expected)


def test_a_carry_is_handed_on_by_value():
    class Carrying(Layer):
        def forward(self, x):
            x["h"] = self.linear(x["h"])
            return x

    layers, x = [Carrying() for _ in range(3)], torch.randn(2, 4)
    stack = scan_layers(layers, compile=AOT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torchlift.TorchliftWarning)
        same(stack({"h": x}), in_order(layers, {"h": x}))
    assert torchlift.explain(stack, {"h": x})[0].path == "compiled"

    def body(m, carry, x):
        carry["h"] = m(carry["h"])
        x["used"] = 0
        return carry, None

    net = nn.Linear(4, 4)
    out, _ = torchlift.scan(body, variable_broadcast="params", compile=False)(net, {"h": x}, {"a": torch.zeros(2)})
    same(out["h"], net(net(x)))


WRITERS = {
    "remat": lambda m, x, *rest: torchlift.remat(lambda m, *args: m(*args))(m, x, *rest),
    "policy": lambda m, x, *rest: torchlift.remat(
        lambda m, *args: m(*args), policy=torchlift.checkpoint_policies.dots_saveable
    )(m, x, *rest),
    "apply": lambda m, x, *rest: torchlift.apply(m, {}, x, *rest),
    "map_variables": lambda m, x, *rest: torchlift.map_variables(lambda m, *args: m(*args), "params")(m, x, *rest),
    "cond": lambda m, x, *rest: torchlift.cond(True, lambda m, *args: m(*args), lambda m, x, *_: x, m, x, *rest),
    "remat in remat": lambda m, x, *rest: (
        WRITERS["remat"](m, x, *rest)
        if torchlift.is_recomputing()
        else torchlift.remat(lambda m, *args: WRITERS["remat"](m, *args))(m, x, *rest)
    ),
}


@pytest.mark.parametrize("way", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_where_a_body_runs_once_the_caller_finds_what_it_wrote(kind, way):
    layer, x, content, expected = kind(), torch.randn(2, 4), KINDS[kind](), KINDS[kind]()
    first = leaves(content)[0]
    out, plain = WRITERS[way](layer, x, content), layer(x, expected)
    same(out, plain)
    same(content, expected)
    assert kind in (InDict, InDataclass) or leaves(content)[0] is first  # what was there is the very same
    same(gradients(out, content, [layer]), gradients(plain, expected, [layer]))
    same(content, expected)  # a recomputation puts nothing in


def test_a_container_in_what_was_put_in_is_the_callers():
    def body(m, x, given):
        given["list"].append(m(x))
        given["again"] = given["list"]
        return x

    given = {"list": []}
    own = given["list"]
    torchlift.remat(body)(nn.Linear(4, 4), torch.randn(2, 4), given)
    assert given["list"] is own and given["again"] is own and len(own) == 1


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_remat_puts_what_it_wrote_where_a_transform_finds_it(transform):
    layer, x = Layer(), torch.randn(3, 4)

    def run(call, x):
        losses = []
        return call(layer, x, losses).sum() + 2 * losses[0]

    over = torch.func.vmap if transform == "vmap" else torch.func.grad
    same(over(lambda x: run(WRITERS["remat"], x))(x), over(lambda x: run(lambda m, *args: m(*args), x))(x))


def f(m, x, given):
    given["sum"] = m(x).sum()
    return given["sum"]


def scanned(compile):
    axes = (0, torchlift.broadcast)
    body = lambda m, c, x, given: (c + f(m, c, given), None)
    loop = torchlift.scan(body, variable_broadcast="params", in_axes=axes, compile=compile)
    return lambda m, x, given: loop(m, x, torch.zeros(2), given)


REFUSED = {
    "vmap": torchlift.vmap(f, in_axes=(0, None)),
    "vjp": lambda m, x, given: torchlift.vjp(f, m, x, given),
    "value_and_grad": lambda m, x, given: torchlift.value_and_grad(f, m, x, given),
    "one of several branches": lambda m, x, given: torch.func.vmap(
        lambda number: torchlift.switch(number, [f, f], m, x, given)
    )(torch.tensor([0, 1])),
    "scan": scanned(False),
    "compiled scan": scanned(AOT),
    "in a graph": torch.compile(
        lambda m, x, given: torchlift.apply(m, {}, x, given, method=f), backend="aot_eager", fullgraph=True
    ),
}


@pytest.mark.parametrize("way", REFUSED)
def test_elsewhere_it_is_refused(way):
    given = {"sum": None}
    with pytest.raises(Exception, match=r"the body changed args\[[12]\]\['sum'\], in a dict .* return the new value"):
        REFUSED[way](nn.Linear(4, 4), torch.randn(2, 4), given)
    assert given == {"sum": None}


def test_errors_name_what_is_given_by_keyword_and_returning_it_helps():
    def by_name(m, x, given, returned):
        given["sum"] = m(x).sum()
        return (x, given) if returned else x

    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    by_name = torchlift.vmap(by_name, in_axes=(0,))
    with pytest.raises(UnsupportedError, match=r"vmap.*: the body changed keyword argument 'given'\['sum'\]"):
        by_name(net, x, given={}, returned=False)
    assert by_name(net, x, given={}, returned=True)[1]["sum"].shape == (2,)


class Registered:
    def __init__(self, items):
        self.items = items


torch.utils._pytree.register_pytree_node(
    Registered, lambda x: (list(x.items), None), lambda items, _: Registered(list(items))
)


def test_what_only_the_body_can_have_is_refused():
    def modules(m, x, given):
        given.append(m)
        return m(x)

    def registered(m, x, given):
        given.items.append(m(x))
        return m(x)

    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    with pytest.raises(UnsupportedError, match=r"the body changed args\[1\]\[0\], in a list"):
        torchlift.remat(modules)(net, x, [])
    with pytest.raises(UnsupportedError, match=r"the body changed args\[1\], in a Registered"):
        torchlift.remat(registered)(net, x, Registered([x]))


# Containers of a module's own -----------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.counts, self.history, self.seen = {"n": 0}, [], set()

    def forward(self, x):
        self.counts["n"] += 1
        self.history.append(len(x))
        self.seen.add(len(x))
        return self.linear(x).tanh() * self.counts["n"]

    @property
    def state(self):
        return self.counts["n"], len(self.history), len(self.seen)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
def test_layers_that_fill_a_container_of_their_own_run_one_by_one(compile, remat):
    layers, twins, x = [Counting() for _ in range(2)], [Counting() for _ in range(2)], torch.randn(2, 4)
    for layer, twin in zip(layers, twins):
        twin.load_state_dict(layer.state_dict())
    stack = scan_layers(layers, compile=compile, remat=remat)
    told = pytest.warns(torchlift.TorchliftCompileWarning, match="changed what is in 'counts', a dict, .* declare it")
    for _ in range(2):
        with told if compile else warnings.catch_warnings(action="error", category=torchlift.TorchliftWarning):
            out = stack(x)
        plain = in_order(twins, x)
        same(out, plain)
        same(gradients(out, [], layers), gradients(plain, [], twins))
    assert [layer.state for layer in layers] == [twin.state for twin in twins] == [(2, 2, 1)] * 2


def test_remat_counts_once():
    layer, twin, x = Counting(), Counting(), torch.randn(2, 4)
    twin.load_state_dict(layer.state_dict())
    call = torchlift.remat(lambda m, x: m(x))
    outs, plain = [call(layer, x) for _ in range(2)], [twin(x) for _ in range(2)]
    same(gradients(outs[1], [outs[0]], [layer]), gradients(plain[1], [plain[0]], [twin]))
    assert layer.state == twin.state == (2, 2, 1)


def test_apply_leaves_containers_as_they_were_and_says_so():
    layer = Counting()
    with pytest.warns(torchlift.TorchliftWarning, match="apply.*changed what is in 'counts', a dict.* is not kept"):
        torchlift.apply(layer, {}, torch.randn(2, 4))
    assert layer.state == (0, 0, 0)
