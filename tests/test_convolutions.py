"""Convolutions in compiled loops: Inductor lays their values out as it likes, and would take sizes for constants."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torchlift
from torchlift.engine import compiled, graphs
from torchlift.engine.run import last_report

pytestmark = pytest.mark.usefixtures("float64")


class Block(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm2d(4) if isinstance(conv, nn.Conv2d) else nn.Identity()

    def forward(self, x):
        return x + torch.tanh(self.norm(self.conv(x)))


def compare(layers, x):
    twin = nn.Sequential(*copy.deepcopy(list(layers)))
    found, expected = layers(x), twin(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    inputs = [[x, *module.parameters()] for module in (layers, twin)]
    grads = [torch.autograd.grad(out.sin().sum(), given) for out, given in zip((found, expected), inputs)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(list(layers.buffers()), list(twin.buffers()), rtol=1e-10, atol=1e-10)


def test_images_of_any_size_make_one_program_more():
    layers = torchlift.scan_layers([Block(nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2)])
    for batch, height, width in ((2, 6, 6), (3, 5, 7), (2, 8, 4), (5, 3, 11)):
        compare(layers, torch.randn(batch, 4, height, width, requires_grad=True))
    report = last_report()
    assert report.path == "compiled" and report.compilations == 2
    # What Inductor kept of programs of other sizes serves none of these.
    compiled.clear_cache()
    for height, width in ((9, 9), (4, 13), (5, 7)):
        compare(layers, torch.randn(2, 4, height, width, requires_grad=True))


@pytest.mark.parametrize(("batch", "channels"), [(1, 3), (2, 1)])
def test_one_image_at_a_time_and_one_channel(batch, channels):
    layers = torchlift.scan_layers([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)])
    for height, width in ((6, 6), (5, 7), (8, 4)):
        compare(layers, torch.randn(batch, channels, height, width, requires_grad=True))
    assert last_report().compilations == 2


@pytest.mark.parametrize("conv", [lambda: nn.Conv1d(4, 4, 3, padding=1), lambda: nn.ConvTranspose1d(4, 4, 1)])
def test_signals_of_any_length(conv):
    layers = torchlift.scan_layers([Block(conv()) for _ in range(2)])
    for batch, length in ((2, 6), (3, 7), (2, 9)):
        compare(layers, torch.randn(batch, 4, length, requires_grad=True))
    assert last_report().path == "compiled"


def test_gaps_in_what_is_saved_are_refused_where_sizes_may_change():
    """Programs for one size serve then; see ``_restride``."""
    value = torch.empty(4, 6)
    mode = torch._subclasses.FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv())
    symbolic = torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext(
        dynamic_sizes=[torch.fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC] * 2
    )
    fake = mode.from_tensor(value, symbolic_context=symbolic, source=torch._dynamo.source.ConstantSource("t"))
    given = graphs.Graphs(None, None, [], [fake], 0, [("saved", 0)])
    graphs._restride(given, [(1, 4)], mode)
    assert [s.node.hint if isinstance(s, torch.SymInt) else s for s in given.bw_inputs[0].stride()] == [1, 4]
    with pytest.raises(RuntimeError, match="Inductor leaves gaps in what is saved"):
        graphs._restride(given, [(1, 8)], mode)
