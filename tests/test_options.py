"""What an argument of a transform may not be is refused where the transform is made, or where it is first seen."""

import pytest
import torch
from torch import nn

import torchlift
from torchlift import ArgumentError, AxisError, OptionError, TransformTargetError, broadcast, checkpoint_policies

SIZES = [-1, 1.5, "3", True, (3,)]


def layers():
    return [nn.Linear(2, 2) for _ in range(3)]


def step(m, c, x):
    return c, m(x)


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    expected = r"is .*, expected an int from 0 on"
    with pytest.raises(AxisError, match=rf"vmap: axis_size {expected}"):
        torchlift.vmap(nn.Linear, variable_axes={"params": 0}, axis_size=size)
    with pytest.raises(AxisError, match=rf"scan: length {expected}"):
        torchlift.scan(step, length=size)
    with pytest.raises(AxisError, match=rf"remat_scan: lengths\[1\] {expected}"):
        torchlift.remat_scan(nn.Linear, lengths=(2, size))
    with pytest.raises(AxisError, match=rf"scan_layers: lengths\[0\] {expected}"):
        torchlift.scan_layers(layers(), lengths=(size, 3))


@pytest.mark.parametrize("lengths", [4, "4", None])
def test_lengths(lengths):
    with pytest.raises(AxisError, match=r"remat_scan: lengths is .*, expected the number of iterations at each level"):
        torchlift.remat_scan(nn.Linear, lengths=lengths)


@pytest.mark.parametrize("count", [0, -1, 1.5, "a", True])
def test_counts(count):
    with pytest.raises(OptionError, match="vmap: chunk_size is .*, expected an int from 1 on"):
        torchlift.vmap(nn.Linear, chunk_size=count)
    with pytest.raises(OptionError, match="scan_layers: every is .*, expected an int from 1 on"):
        torchlift.scan_layers(layers(), every=count)


LOOPS = {
    "scan": lambda **kwargs: torchlift.scan(step, **kwargs),
    "remat_scan": lambda **kwargs: torchlift.remat_scan(nn.Linear, lengths=(2,), **kwargs),
    "scan_layers": lambda **kwargs: torchlift.scan_layers(layers(), **kwargs),
}


@pytest.mark.parametrize("name", LOOPS)
def test_compile(name):
    for compile in ("yes", None, 1):
        with pytest.raises(OptionError, match=rf"{name}: compile= is .*, expected True, False, or a dict of options"):
            LOOPS[name](compile=compile)
    with pytest.raises(OptionError, match=rf"{name}: compile= has \['speed'\], expected backend, mode, options"):
        LOOPS[name](compile={"speed": 1})


def test_a_device_that_there_is_not():
    for device in ("nosuch", 1.5):
        with pytest.raises(OptionError, match=r"^jit: device is .*, expected a torch.device or the name of one, as in"):
            torchlift.jit(nn.Linear, device=device)
    elsewhere = "mps" if torch.cuda.is_available() else "cuda"
    module = torchlift.jit(nn.Linear, backend="aot_eager", device=elsewhere)(2, 2)
    with pytest.raises(
        OptionError, match=rf"^jit\(Linear, .*\): device is '{elsewhere}', expected one that this machine has: .+"
    ):
        module(torch.ones(2))


@pytest.mark.parametrize("name", [*LOOPS, "jit"])
def test_a_backend_that_there_is_not_is_refused_where_a_transform_is_made(name):
    def make(**options):
        return torchlift.jit(nn.Linear, **options) if name == "jit" else LOOPS[name](compile=options)

    known = r"expected one of \[.*'inductor'.*\] or a function of a graph and its inputs"
    with pytest.raises(OptionError, match=rf"{name}: .* the backend 'inductr', {known}; did you mean 'inductor'\?"):
        make(backend="inductr")
    with pytest.raises(OptionError, match=rf"{name}: .* the backend 3, {known}$"):
        make(backend=3)
    with pytest.raises(
        OptionError, match=rf"{name}: .* the mode 'fast', expected one that torch.compile knows: .*auto"
    ):
        make(mode="fast")
    with pytest.raises(OptionError, match=rf"{name}: .* the mode \['fast'\], expected one that torch.compile knows: "):
        make(mode=["fast"])
    make(backend=None, mode="max-autotune"), make(backend=lambda graph, inputs: graph), make(backend="aot_eager")


POLICIES = {
    "remat": lambda policy: torchlift.remat(lambda m, x: m(x).sin(), policy=policy),
    "remat_scan": lambda policy: torchlift.remat_scan(nn.Linear, lengths=(2,), policy=policy),
    "scan_layers": lambda policy: torchlift.scan_layers(layers(), policy=policy),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies(name):
    with pytest.raises(OptionError, match=rf"{name}: policy is 'dots', expected one of torchlift.checkpoint_policies"):
        POLICIES[name]("dots")


@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_a_policy_that_was_not_made_of_names(run):
    policy, x = checkpoint_policies.save_only_these_names, torch.ones(2, requires_grad=True)
    with pytest.raises(OptionError, match="policy=save_only_these_names returned a .*called with them"):
        if run == "eager":
            POLICIES["remat"](policy)(nn.Linear(2, 2), x)
        else:
            torchlift.scan_layers(layers(), policy=policy, compile={"backend": "aot_eager"})(x)


def test_scanned_attributes_are_a_list():
    with pytest.raises(OptionError, match=r"scanned_attributes is 'p', expected a list of names: \['p'\]"):
        torchlift.scan_layers(layers(), scanned_attributes="p")


@pytest.mark.parametrize("axis", ["a", 0.5, True])
def test_axes(axis):
    module, x = nn.Linear(2, 2), torch.ones(3, 2)
    for transform in (torchlift.vmap, lambda f, **kw: lambda m, x: torchlift.scan(step, compile=False, **kw)(m, 0, x)):
        for name in ("in_axes", "out_axes"):
            with pytest.raises(AxisError, match=rf"{name} has {axis!r}, expected ints and (broadcast and )?None"):
                transform(lambda m, x: m(x), **{name: axis})(module, x)


def test_what_no_index_has_given_a_value():
    body, x = lambda m, x: torch.ones(3), torch.ones(0, 2)
    with pytest.raises(AxisError, match="the output has no value, since the axis has no index: give it an axis"):
        torchlift.vmap(body, out_axes=None)(nn.Identity(), x)
    with pytest.raises(AxisError, match="ys has no value, since there is no iteration; expected at least one"):
        torchlift.scan(lambda m, c, x: (c, body(m, x)), out_axes=broadcast, compile=False)(nn.Identity(), 0, x)


@pytest.mark.parametrize("params", [3, "layers", None, ["layers"]])
def test_metadata_params(params):
    makes = {
        "scan": lambda: torchlift.scan(step, metadata_params=params),
        "vmap": lambda: torchlift.vmap(nn.Linear, metadata_params=params),
        "add_metadata_axis": lambda: torchlift.add_metadata_axis(nn.Linear, metadata_params=params),
    }
    for name, make in makes.items():
        with pytest.raises(
            OptionError, match=rf"^{name}: metadata_params is .*, expected a dict such as \{{torchlift\."
        ):
            make()


def test_data_transform():
    with pytest.raises(OptionError, match="scan: data_transform is 3, expected a function of"):
        torchlift.scan(step, data_transform=3)
    for wrong in (None, ((), {}), (({}, {}, {}), ()), ((1, 2, 3), ())):
        lifted = torchlift.scan(step, data_transform=lambda v, r, wrong=wrong: wrong, compile=False)
        with pytest.raises(ArgumentError, match="data_transform returned .*, expected .variable_groups, rng_groups"):
            lifted(nn.Linear(2, 2), 0, torch.ones(3, 2))


class Several(nn.Linear):
    @staticmethod
    def alone(x):
        return x

    @classmethod
    def made(cls):
        return cls(2, 2)


@pytest.mark.parametrize("methods", [[], {}, ["alone"], ["made"], [3], {"forward": None}, {"forward": {"axis": 1}}])
def test_methods(methods):
    match = (
        r"vmap\(Several\): (methods is .*, expected None, a list|there is no method|methods\['forward'\] is .* some of)"
    )
    with pytest.raises(TransformTargetError, match=match):
        torchlift.vmap(Several, methods=methods)


def test_flags_and_names():
    with pytest.raises(OptionError, match="scan: reverse is 'no', expected True or False"):
        torchlift.scan(step, reverse="no")
    for name in ("init", "mutable"):
        with pytest.raises(OptionError, match=f"map_variables: {name} is 1, expected True or False"):
            torchlift.map_variables(nn.Linear, "params", **{name: 1})
    for name in ("trans_in_fn", "trans_out_fn"):
        with pytest.raises(OptionError, match=rf"map_variables: {name} is 3, expected a function of"):
            torchlift.map_variables(nn.Linear, "params", **{name: 3})
    for name in ("axis_name", "spmd_axis_name"):
        with pytest.raises(OptionError, match=f"vmap: {name} is 3, expected a str"):
            torchlift.vmap(nn.Linear, **{name: 3})


def test_a_policy_is_no_remat():
    with pytest.raises(OptionError, match="scan_layers: remat is <function .*, expected a bool; .* is policy="):
        torchlift.scan_layers(layers(), remat=checkpoint_policies.dots_saveable)
