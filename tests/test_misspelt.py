"""A name in a filter that nothing has is no error; where it looks like a slip, it is said once."""

import warnings

import pytest
import torch
from torch import nn

import torchlift
from torchlift import DenyList, TorchliftWarning

X = torch.ones(3, 2)


class Counts(nn.Linear):
    """A linear layer with a count of its calls, made in the first."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.plain = torch.ones(1)
        torchlift.variable(self, "state_a", "first", lambda: torch.zeros(()))

    def forward(self, x, *_):
        count = torchlift.variable(self, "state_b", "count", lambda: torch.zeros(()))
        count.value = count.value + 1
        return super().forward(x)


def step(m, c, x):
    return c, m(x)


def mapped(Layer, **given):
    return torchlift.vmap(Layer, axis_size=3, in_axes=None, **given)(2, 2)(torch.ones(2))


def scanned(Layer, **given):
    return torchlift.scan(step, compile=False, **given)(Layer(2, 2), 0, X)


SLIPS = {
    "vmap: variable_axes": lambda L: mapped(L, variable_axes={"parms": 0}),
    "vmap: variable_axes, denied": lambda L: mapped(L, variable_axes={DenyList(["parms"]): 0}),
    "vmap: split_rngs": lambda L: mapped(L, variable_axes={"params": 0}, split_rngs={("dropuot",): False}),
    "scan: variable_broadcast": lambda L: scanned(L, variable_broadcast=["parms", "batch_stats"]),
    "scan: variable_carry": lambda L: scanned(L, variable_carry="parms"),
    "scan: split_rngs": lambda L: scanned(L, split_rngs={"parms": True}),
    "remat_scan: variable_broadcast": lambda L: torchlift.remat_scan(
        L, lengths=(2,), variable_axes={}, variable_broadcast="parms", compile=False
    )(2, 2)(X),
    "map_variables: mapped_collections": lambda L: torchlift.map_variables(L, "parms", init=False)(2, 2)(X),
    "apply: mutable": lambda L: torchlift.apply(L(2, 2), {}, X, mutable=["parms"]),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_name_that_looks_like_a_slip_is_said_once(slip):
    class Layer(nn.Linear):
        pass

    transform, argument = slip.split(",")[0].split(": ")
    name, meant = ("dropuot", "dropout") if slip == "vmap: split_rngs" else ("parms?", "params")
    match = (
        rf"{transform}\(.*\): {argument} names '{name}', but for \w*Layer there are only \[.*did you mean '{meant}'\?"
    )
    with pytest.warns(TorchliftWarning, match=match) as caught:
        SLIPS[slip](Layer)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SLIPS[slip](Layer)


FINE = {
    "made in the call": lambda: torchlift.vmap(Counts, variable_axes={("params", "state_b"): 0})(2, 2)(X),
    "made in the call of apply": lambda: torchlift.apply(Counts(2, 2), {}, X, mutable="state_b"),
    "like one that is named too": lambda: mapped(nn.Linear, variable_axes={("params", "parms"): 0}),
    "like nothing": lambda: scanned(nn.Linear, variable_broadcast=["cache", "params"]),
    "usual": lambda: scanned(nn.Linear, variable_broadcast=["batch_stats", "buffers", "intermediates"]),
    "of an argument": lambda: torchlift.vmap(lambda m, x, other: x, variable_axes={"state_a": None})(
        nn.Linear(2, 2), X, Counts(2, 2)
    ),
}


@pytest.mark.parametrize("why", FINE)
def test_a_name_that_nothing_has_may_be_given(why):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FINE[why]()


def test_a_name_that_looks_like_a_slip_breaks_no_graph():
    class Layer(nn.Linear):
        pass

    layers = torchlift.vmap(Layer, variable_axes={"parms": 0}, axis_size=3)(2, 2)
    layer = Layer(2, 2)
    for call in (layers, lambda x: torchlift.vmap(Layer.forward, variable_axes={"parms": 0})(layer, x)):
        assert torch.compile(call, fullgraph=True, backend="eager")(X).shape == (3, 2)
