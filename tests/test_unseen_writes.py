"""What bodies change in ways that torch does not count or that modules do not show: kept as the plain loop does, or refused."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchlift
from torchlift import CarryError, ModifyCollectionError, UnsupportedError

AOT = {"backend": "aot_eager"}


def ema_inplace(average: Tensor, new: Tensor) -> None:
    average.data.mul_(0.5).add_(new, alpha=0.5)


class Codebook(nn.Module):
    """Keeps an average by way of ``.data``, as vector quantisation does."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.linear = nn.Linear(2, 2)
        self.register_buffer("average", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "helper":
            ema_inplace(self.average, x.detach().mean(0))
        elif self.how == "method":
            self.average.data.add_(x.detach().mean(0))
        elif self.how == "assigned":
            self.average.data = self.average + x.detach().mean(0)
        else:
            self.average.numpy()[:] += 1
        return self.linear(x) * (1 + self.average)


def _layers(module: nn.Module, x: Tensor, compile: Any) -> Tensor:
    return torchlift.scan_layers([module], compile=compile)(x)


def _time(module: nn.Module, x: Tensor, compile: Any) -> Tensor:
    return torchlift.scan(lambda m, c: (m(c), None), variable_carry="buffers", length=1, compile=compile)(module, x)[0]


WAYS: dict[str, Callable[[nn.Module, Tensor, Any], Tensor]] = {
    "remat": lambda m, x, _: torchlift.remat(lambda m, x: m(x))(m, x),
    "cond": lambda m, x, _: torchlift.cond(torch.tensor(True), lambda m, x: m(x), lambda m, x: x * 1, m, x),
    "scan": _time,
    "scan_layers": _layers,
    "map_variables": lambda m, x, _: torchlift.map_variables(lambda m, x: m(x), "params", mutable=True)(m, x),
}


@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
@pytest.mark.parametrize("how", ["helper", "method", "assigned", "numpy"])
@pytest.mark.parametrize("way", WAYS)
def test_a_buffer_written_through_data_or_numpy_is_written(way: str, how: str, compile: Any) -> None:
    module = Codebook(how)
    plain = copy.deepcopy(module)
    for _ in range(3):
        x = torch.randn(4, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy() cannot be captured, which is said
            out, expected = WAYS[way](module, x, compile), plain(x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(module.average, plain.average)


helpers = types.ModuleType("helpers")
exec("def add(t, v):\n    t.data.add_(v)", vars(helpers))


def _closed_over() -> Callable[..., None]:
    def add(t: Tensor, v: Any) -> None:
        t.data.add_(v)

    return lambda t, v: add(t, v)


class Elsewhere(nn.Module):
    """Writes by way of a function that names lead to in other ways than to a global."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.register_buffer("count", torch.zeros(2))
        self.kept = ema_inplace if how == "kept" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "module":
            helpers.add(self.count, 1)
        elif self.how == "kept":
            self.kept(self.count, x.detach()[0])  # type: ignore[misc]
        return x * (1 + self.count)


class Caller:
    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        module.count.data.add_(1)
        return module(x)


@pytest.mark.parametrize("how", ["module", "kept", "closure", "object", "patched"])
def test_writes_by_functions_that_names_lead_to(how: str, monkeypatch: Any) -> None:
    module, x = Elsewhere(how), torch.ones(4, 2)
    plain = copy.deepcopy(module)
    body: Any = lambda m, x: m(x)
    if how == "closure":
        add = _closed_over()

        def body(m: nn.Module, x: Tensor) -> Tensor:
            add(m.count, 1)
            return m(x)
    elif how == "object":
        body = Caller()
    elif how == "patched":
        torchlift.remat(body)(module, x)  # looked at before
        monkeypatch.setattr(Elsewhere, "forward", lambda self, x: x + self.count.data.add_(1))
    torch.testing.assert_close(torchlift.remat(body)(module, x), body(plain, x))
    torch.testing.assert_close(module.count, plain.count)
    assert module.count.any()


class Constant(nn.Module):
    def __init__(self, device: str):
        super().__init__()
        self.register_buffer("mask", torch.full((2,), float("nan"), device=device))

    def forward(self, x: Tensor) -> Tensor:
        x.data.norm()
        return x * 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_buffer_that_is_not_written_is_not_taken_for_written(device: str) -> None:
    module, x = Constant(device), torch.ones(2)
    version = module.mask._version
    torchlift.apply(module, {}, x)
    torchlift.scan(lambda m, c: (m(c), None), variable_broadcast=True, length=3, compile=False)(module, x)
    torchlift.remat(lambda m, x: m(x))(module, x)
    assert module.mask._version == version


def test_what_is_assigned_to_data_cannot_be_captured(monkeypatch: Any) -> None:
    monkeypatch.setattr("torchlift.engine.run._warned", set())
    module = Codebook("assigned")
    with pytest.warns(torchlift.TorchliftCompileWarning, match="gives a tensor the memory of another by way of .data"):
        WAYS["scan"](module, torch.ones(4, 2), AOT)


def test_apply_returns_what_was_written_through_data_and_changes_nothing() -> None:
    module = Codebook("helper")
    _, updated = torchlift.apply(module, {}, torch.ones(4, 2), mutable="buffers")
    torch.testing.assert_close(updated["buffers"]["average"], torch.full((2,), 0.5))
    assert torch.equal(module.average, torch.zeros(2))
    with pytest.raises(ModifyCollectionError, match="changed 'average' of collection 'buffers', which is read-only"):
        torchlift.apply(module, {}, torch.ones(4, 2))


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, c: Tensor) -> Tensor:
        self.double()
        return c * self.weight

    @torch.no_grad()
    def double(self) -> None:  # type: ignore[override]
        self.weight.mul_(2)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Parent(nn.Module):
    """Writes into a parameter of its child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Part()

    @property
    def weight(self) -> Tensor:
        return self.child.weight

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.child.weight.mul_(2)
        return self.child(x)


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.embedding(x, self.weight, max_norm=0.1)


def test_apply_with_a_method_that_writes_into_parameters() -> None:
    def method(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.weight.mul_(2)
        return m(x)

    module = Part()
    with pytest.raises(ModifyCollectionError, match="changed 'weight' of collection 'params'"):
        torchlift.apply(module, {}, torch.ones(2), method=method)
    _, updated = torchlift.apply(module, {}, torch.ones(2), method=method, mutable=True)
    assert torch.equal(updated["params"]["weight"], torch.full((2,), 2.0))
    assert torch.equal(module.weight, torch.ones(2))


def test_apply_of_a_parent_that_writes_into_a_parameter_of_its_child() -> None:
    module = Parent()
    with pytest.raises(ModifyCollectionError, match="changed 'child.weight' of collection 'params'"):
        torchlift.apply(module, {}, torch.ones(2))
    assert torch.equal(module.weight, torch.ones(2))


@pytest.mark.parametrize(
    "make",
    [Doubling, lambda: nn.Embedding(4, 2, max_norm=0.1), Looking],
    ids=["written", "max_norm", "functional"],
)
def test_apply_changes_no_parameter(make: Callable[[], nn.Module]) -> None:
    module = make()
    x = torch.ones(2) if isinstance(module, Doubling) else torch.tensor([0, 1])
    before, plain = module.weight.detach().clone(), copy.deepcopy(module)
    given = before.clone()
    with pytest.raises(ModifyCollectionError, match="changed 'weight' of collection 'params', which is read-only"):
        torchlift.apply(module, {"params": {"weight": given}}, x)
    out, updated = torchlift.apply(module, {"params": {"weight": given}}, x, mutable="params")
    torch.testing.assert_close(out, plain(x))
    torch.testing.assert_close(updated["params"]["weight"], plain.weight.detach())
    assert torch.equal(module.weight, before)
    assert torch.equal(given, before)
    torchlift.explain(module, x)
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
def test_carried_parameters_that_are_written_in_place(compile: Any) -> None:
    module, plain = Doubling(), Doubling()
    loop = torchlift.scan(lambda m, c: (m(c), None), variable_carry="params", length=3, compile=compile)
    expected = torch.ones(2)
    for _ in range(3):
        expected = plain(expected)
    out, _ = loop(module, torch.ones(2))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(module.weight, plain.weight)


@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
def test_a_variable_created_where_it_is_carried_is_refused(compile: Any) -> None:
    def body(m: nn.Module, c: Tensor, x: Tensor) -> Any:
        count = torchlift.variable(m, "count", "n", lambda: torch.zeros(2))
        count.value = count.value + x
        return c, count.value.sum()

    module = nn.Identity()
    with pytest.raises(CarryError, match="created 'n' in 'count', which is carried.* declare it before the loop"):
        torchlift.scan(body, variable_carry="count", compile=compile)(module, torch.ones(2), torch.ones(3))
    assert not dict(module.named_buffers())


class Late(nn.Module):
    """Makes a part of itself in its first forward."""

    def __init__(self, how: str = "added"):
        super().__init__()
        self.how = how
        self.scale = nn.Parameter(torch.ones(2))
        if how != "added":
            self.part = Part()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "added" and not hasattr(self, "part"):
            self.part = Part()
        if self.how == "replaced":
            self.part = Part()
        out = self.part(x) * self.scale
        if self.how == "removed":
            del self.part
        return out


@pytest.mark.parametrize("how", ["added", "replaced", "removed"])
@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
@pytest.mark.parametrize("way", WAYS)
def test_a_submodule_that_a_body_changes_is_refused(way: str, compile: Any, how: str) -> None:
    module = Late(how)
    before = dict(module.named_children())
    with pytest.raises(
        UnsupportedError, match=f"{how} the submodule 'part' in the body.* call the module once without"
    ):
        if way == "scan_layers":  # compiled, it runs the layers one by one, each by itself
            torchlift.remat(lambda m, x: m(x))(module, torch.ones(4, 2))
        WAYS[way](module, torch.ones(4, 2), compile)
    assert dict(module.named_children()) == before


class Noting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.log, self.found = nn.Linear(2, 2), [], {}  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(x)
        self.found["x"] = x
        return self.linear(x)


@pytest.mark.parametrize("compile", [False, AOT], ids=["plain", "compiled"])
def test_all_containers_that_tensors_were_put_into_are_as_before(compile: Any) -> None:
    module = Noting()
    with pytest.raises(torchlift.PlainAttributeError, match="put a tensor into 'log' in the body"):
        WAYS["scan"](module, torch.ones(4, 2), compile)
    assert (module.log, module.found) == ([], {})


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "angles"):
            self.register_buffer("angles", torch.ones(2), persistent=False)
        return self.linear(x) * self.angles


@pytest.mark.parametrize("way", ["remat", "cond", "scan_layers", "map_variables"])
def test_a_created_buffer_that_is_not_persistent_stays_so(way: str) -> None:
    module = Rotary()
    for _ in range(2):
        WAYS[way](module, torch.ones(4, 2), False)
    assert torch.equal(module.angles, torch.ones(2))
    assert list(module.state_dict()) == ["linear.weight", "linear.bias"]


class Counting(nn.Module):
    """Counts two kinds of iterations."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ups", torch.zeros(()))
        self.register_buffer("downs", torch.zeros(()))

    def up(self, x: Tensor) -> Tensor:
        self.ups += 1
        return x * 1

    def down(self, x: Tensor) -> Tensor:
        self.downs += 1
        return x * 2

    def forward(self, c: Tensor, i: Tensor) -> Any:
        return torchlift.cond(i > 0, Counting.up, Counting.down, self, c), None


@pytest.mark.parametrize("around", ["plain", "grad"])
def test_iterations_that_change_different_carried_variables(around: str) -> None:
    loop = torchlift.scan(Counting, variable_carry="buffers", compile=False if around == "plain" else AOT)()
    signs = torch.tensor([1.0, -1.0, 1.0])
    if around == "plain":
        out, _ = loop(torch.ones(2), signs)
        assert torch.equal(out, torch.full((2,), 2.0))
        assert (int(loop.ups), int(loop.downs)) == (2, 1)
        return
    run = lambda c: torchlift.apply(loop, {}, c, signs, mutable=True)[0][0].sum()
    assert torch.equal(torch.func.grad(run)(torch.ones(2)), torch.full((2,), 2.0))
