"""What ``apply`` takes: names by any path, and what it refuses."""

import re

import pytest
import torch
from torch import nn

from torchlift import (
    ArgumentError,
    ModifyCollectionError,
    TransformTargetError,
    VariableNameError,
    apply,
    explain,
    scan_layers,
)
from torchlift.engine.compiled import compilations

AOT = {"backend": "aot_eager"}


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(2, 2))
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("name", ["a.0.weight", "b.0.weight"])
def test_a_part_in_two_places_is_known_by_both_names(name):
    module, new, x = Twice(), torch.randn(2, 2), torch.randn(3, 2)
    expected = torch.func.functional_call(module, {name: new}, (x,))
    torch.testing.assert_close(apply(module, {"params": {name: new}}, x), expected)
    with pytest.raises(VariableNameError, match="'b.0.scale' of collection 'params', expected one of"):
        apply(module, {"params": {"b.0.scale": new}}, x)


@pytest.mark.parametrize("given", [None, {"0.weight": torch.ones(2, 2)}, [("params", {})]])
def test_variables_are_tensors_in_collections(given):
    match = re.escape("apply(Linear): got variables of type ") + ".*" + re.escape("{'params': {name: tensor}}")
    with pytest.raises(ArgumentError, match=match):
        apply(nn.Linear(2, 2), given, torch.ones(2))
    with pytest.raises(
        ArgumentError, match="got float for the variable 'weight' of collection 'params', expected a te"
    ):
        apply(nn.Linear(2, 2), {"params": {"weight": 1.0}}, torch.ones(2))


@pytest.mark.parametrize("method", ["none", 3])
def test_methods_that_are_none(method):
    with pytest.raises(VariableNameError, match=rf"apply\(Linear\): there is no method {method!r}"):
        apply(nn.Linear(2, 2), {}, torch.ones(2), method=method)


@pytest.mark.parametrize("rngs", [3, 0, "dropout", ["dropout"]])
def test_rngs_are_seeds_of_streams(rngs):
    with pytest.raises(ArgumentError, match=r"^apply\(Linear\): got rngs of type .*, expected \{stream: seed\}"):
        apply(nn.Linear(2, 2), {}, torch.ones(2), rngs=rngs)


def test_a_class_is_no_module():
    with pytest.raises(TransformTargetError, match="got <class .*Linear'>, expected an nn.Module"):
        apply(nn.Linear, {}, torch.ones(2))


def test_what_a_plain_attribute_holds_is_not_among_the_new_variables():
    net = nn.Linear(2, 2)
    net.shift = torch.ones(2)
    updated = apply(net, {}, torch.zeros(1, 2), mutable=True)[1]
    assert set(updated) == {"params"} and set(updated["params"]) == {"weight", "bias"}


def test_an_error_says_which_variables_are_not_like_those_of_the_module():
    linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    match = r"apply\(Linear\): got variables .*: 'weight' of collection 'params' is \(3, 5\), expected \(2, 2\)$"
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        apply(linear, {"params": {"weight": torch.ones(3, 5), "bias": torch.ones(2)}}, x)
    assert re.match(match, caught.value.__notes__[0])
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        apply(linear, {"params": {"weight": torch.ones(2, 2)}}, torch.ones(1, 3))
    assert not hasattr(caught.value, "__notes__")
    wider = {"weight": torch.ones(5, 2), "bias": torch.ones(5)}  # a module serves for any width that its code takes
    assert apply(linear, {"params": wider}, x).shape == (1, 5)


def test_an_error_is_caught_around_apply_in_a_graph():
    class Picky(nn.Linear):
        def forward(self, x):
            if x.shape[0] == 1:
                raise ValueError("one")
            return super().forward(x)

    module = Picky(2, 2)

    def tried(weight, x):
        try:
            return apply(module, {"params": {"weight": weight}}, x)
        except ValueError:
            return x + weight.sum()

    for width in (2, 3):
        x, weight = torch.ones(1, 2), torch.ones(2, width)
        assert torch.equal(torch.compile(tried, fullgraph=True, backend="eager")(weight, x), tried(weight, x))


@pytest.mark.parametrize("mutable", [True, "batch_stats", ["batch_stats", "seen"]], ids=str)
def test_a_loop_is_compiled_once_for_all_calls(mutable):
    layers = scan_layers([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)], compile=AOT)
    x, calls = torch.randn(3, 2), (lambda: apply(layers, {}, x, mutable=mutable), lambda: explain(layers, x))
    for call in calls:
        call()
        before = compilations.total()
        call()
        assert compilations.total() == before > 0


@pytest.mark.parametrize(
    ("mutable", "match"),
    [
        (False, r"read-only there; pass mutable=\['batch_stats'\] and take it from the result"),
        (
            ["batch_stat"],
            r"read-only there; mutable=\['batch_stat'\] does not allow it: name 'batch_stats' there and take",
        ),
    ],
)
def test_a_change_that_is_not_allowed_says_what_would_allow_it(mutable, match):
    with pytest.raises(ModifyCollectionError, match=match):
        apply(nn.BatchNorm1d(3), {}, torch.ones(4, 3), mutable=mutable)
