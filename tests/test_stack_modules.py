"""What a stack of modules made by stack_modules does with each of them by itself."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchlift
from torchlift import stack_modules, unstack_modules
from torchlift.engine.run import last_report

pytestmark = pytest.mark.usefixtures("float64")


class Layer(nn.Sequential):
    """With an initialiser of its own, which draws and rebinds."""

    def __init__(self):
        super().__init__(nn.Linear(20, 3), nn.Tanh())

    def reset_parameters(self):
        self[0].weight = nn.Parameter(torch.randn(3, 20) * self[0].weight.shape[1])
        nn.init.uniform_(self[0].bias)


def init(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)


COPIES = {
    "itself": lambda stack: stack,
    "copied": copy.deepcopy,
    "pickled": lambda stack: pickle.loads(pickle.dumps(stack)),
    "stacked again": lambda stack: stack_modules(unstack_modules(stack)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_apply_and_reset_parameters_run_per_index(kind):
    layers = [Layer() for _ in range(4)]
    stack = COPIES[kind](stack_modules(layers))
    for use in (lambda m: m.apply(init), lambda m: m.reset_parameters(), lambda m: nn.ModuleList([m]).apply(init)):
        torch.manual_seed(0)
        use(stack)
        torch.manual_seed(0)
        for layer in layers:
            use(layer)
        for layer, other in zip(layers, unstack_modules(stack), strict=True):
            torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)
            assert set(other.__dict__) == set(layer.__dict__) and not other._forward_pre_hooks
    assert stack.apply(init) is stack and type(stack) is Layer


@pytest.mark.parametrize("axis", [1, -1])
def test_apply_where_the_modules_lie_on_another_axis(axis):
    stack = stack_modules([nn.Linear(20, 3, bias=False) for _ in range(4)], axis=axis)
    expected = torch.randn(4, 3, 20)
    values = iter(expected)

    def put(module):
        module.weight.copy_(next(values))

    with torch.no_grad():
        stack.apply(put)
    assert torch.equal(stack.weight, torch.stack([*expected], axis))


def test_what_has_no_reset_parameters_gets_none():
    assert not hasattr(stack_modules([nn.Tanh()]), "reset_parameters")


class Applies(nn.Linear):
    def forward(self, x):
        seen = []
        self.apply(lambda m: seen.append(m.weight.shape))
        return super().forward(x) + len(seen) * len(seen[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_in_a_body_it_is_one_module(compiled):
    layers, x = [Applies(3, 3) for _ in range(2)], torch.randn(3)
    run = torchlift.vmap(lambda m, x: m(x), {"params": 0}, in_axes=None)
    call = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    torch.testing.assert_close(call(stack_modules(layers), x), torch.stack([layer(x) for layer in layers]))


def test_stacks_share_a_compiled_body():
    run = torchlift.scan(lambda m, c: (m(c), None), {"params": 0}, compile={"backend": "aot_eager"})
    counts = []
    for _ in range(3):
        run(stack_modules([nn.Linear(3, 3) for _ in range(2)]), torch.randn(3))
        counts.append(last_report().compilations)
    assert last_report().path == "compiled" and counts[0] == counts[2]
