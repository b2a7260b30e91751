"""What is remembered from call to call of what tensors are like is never taken for what is another."""

import pytest
import torch
from torch import nn

import torchlift
from torchlift.engine import compiled, forms, loop
from torchlift.engine.compiled import clear_cache
from torchlift.engine.forms import Forms, Likeness
from torchlift.engine.run import last_report, run
from torchlift.engine.trees import split

EAGER = {"backend": "aot_eager"}


def row():
    return [torch.ones(2, 3), nn.Parameter(torch.ones(4)), torch.ones(2, dtype=torch.int64)]


CHANGES = {
    "sizes": lambda t: [t[0][:, :2], *t[1:]],
    "strides": lambda t: [torch.ones(3, 2).t(), *t[1:]],
    "dtype": lambda t: [t[0].double(), *t[1:]],
    "device": lambda t: [t[0].to("meta"), *t[1:]],
    "class": lambda t: [nn.Parameter(t[0], requires_grad=False), *t[1:]],
    "requires_grad": lambda t: [t[0].requires_grad_(), *t[1:]],
    "layout": lambda t: [t[0].to_sparse(), *t[1:]],
    "conjugate": lambda t: [torch.ones(2, 3, dtype=torch.complex64).conj(), *t[1:]],
    "nested": lambda t: [torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), *t[1:]],
    "count": lambda t: t[:2],
    "order": lambda t: [t[1], t[0], t[2]],
    "one twice": lambda t: [t[0], t[0], t[2]],
}


def test_others_like_them_fit():
    assert Likeness(row()).fits(row())


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_differs_does_not_fit(change):
    assert not Likeness(row()).fits(change(row()))


def test_a_tensor_may_be_there_twice():
    a, b = torch.ones(2), torch.ones(2)
    twice = Likeness([a, b, a])
    assert twice.fits([b, a, b]) and not twice.fits([a, a, b]) and not twice.fits([a, b, torch.ones(2)])
    assert not Likeness([a, b, torch.ones(2)]).fits([a, b, a])


def test_the_last_form_of_a_kind_is_known_and_few_kinds_are(monkeypatch):
    monkeypatch.setattr(forms, "KINDS", 2)
    known = Forms()
    known.note("a", row(), 1)
    assert known.find("a", row())[1] == 1 and known.find("b", row()) is None
    known.note("a", [torch.ones(5)], 2)
    assert known.find("a", [torch.ones(5)])[1] == 2 and known.find("a", row()) is None
    known.note("b", row(), 3)
    known.note("c", row(), 4)
    assert known.find("a", [torch.ones(5)]) is None and known.find("c", row())[1] == 4
    known.clear()
    assert known.find("c", row()) is None


def layers(**options):
    torch.manual_seed(0)
    return torchlift.scan_layers([nn.Linear(3, 3) for _ in range(3)], compile=EAGER, **options)


def test_calls_in_turn_of_other_kinds_are_right_each_time():
    """Sizes, dtypes, gradients and modes alternate, so that what is remembered is of another call each time."""
    module, exact = layers(), layers().double()
    plain = torchlift.scan_layers([*layers()], compile=False)
    inputs = [torch.randn(2, 3), torch.randn(5, 3), torch.randn(3, 2).t(), torch.randn(2, 3, requires_grad=True)]
    for _ in range(3):
        for x in inputs:
            torch.testing.assert_close(module(x), plain(x))
            with torch.no_grad():
                torch.testing.assert_close(module(x), plain(x))
            wanted = torch.autograd.grad(plain(x).sum(), plain[0].weight)
            torch.testing.assert_close(torch.autograd.grad(module(x).sum(), module[0].weight), wanted)
            assert exact(x.double()).dtype is torch.float64
            assert last_report().path == "compiled"


def test_frozen_layers_among_others_get_no_gradient_at_any_call():
    module = layers()
    x = torch.randn(2, 3)
    for frozen in (None, 1, None, 0):
        for at, layer in enumerate(module):
            layer.requires_grad_(at != frozen)
        module.zero_grad()
        module(x).sum().backward()
        assert [layer.weight.grad is None for layer in module] == [at == frozen for at in range(3)]


def test_what_is_forgotten_is_compiled_again():
    module, x = layers(), torch.randn(2, 3)
    module(x)
    clear_cache()
    module(x)
    assert last_report().compilations == 1


def test_a_list_a_tuple_and_a_dict_of_tensors_are_told_apart():
    tensors = row()
    kinds = [split(tree)[1] for tree in (tensors, tuple(tensors), dict(enumerate(tensors)), tensors[:2], [*tensors, 1])]
    assert len({*kinds}) == 5
    for template, tree in zip(kinds, (list, tuple, dict)):
        assert type(template.fill(tensors)) is tree
    assert split([])[1] == split([])[1] and split([])[1] != split(())[1]


def test_forms_are_forgotten_with_the_programs():
    layers()(torch.randn(2, 3))
    assert compiled._last._known and compiled.plain_ones._known
    clear_cache()
    assert not compiled._last._known and not compiled.plain_ones._known


class Zero(nn.Module):
    def __init__(self, content):
        super().__init__()
        self.content = content

    def forward(self, x):
        return x / self.content


def test_zeros_of_either_sign_are_told_apart():
    layer = torchlift.scan_layers([Zero(0.0)], compile=EAGER)
    assert layer(torch.ones(2))[0] == torch.inf
    layer[0].content = -0.0
    assert layer(torch.ones(2))[0] == -torch.inf


def test_an_attribute_may_be_called_as_a_part_of_a_key():
    both = [Zero(1.0), Zero(2.0)]
    torchlift.scan_layers(both, compile=EAGER, scanned_attributes=["content"])(torch.ones(2))
    for layer in both:
        torchlift.scan_layers([layer], compile=EAGER)(torch.ones(2))
    torchlift.scan_layers(both, compile=EAGER, scanned_attributes=["content"])(torch.ones(2))
    assert last_report().path == "compiled"


def test_others_that_were_like_an_earlier_first_one_are_not_taken_for_like_this_one():
    def doubled(consts, carry, x):
        return [carry[0] + x[0]], [x[0] * 2 + torch.zeros(2, dtype=x[0].dtype)]  # so that a graph has the dtype in it

    body = loop.Body(doubled, "others", "others")
    rows = {dtype: [[torch.rand(2, dtype=dtype)] for _ in range(3)] for dtype in (torch.float32, torch.float64)}
    plain, wide = rows.values()
    for xs in (plain, plain, wide, [wide[0], *plain[1:]], [wide[0], *plain[1:]], wide, wide):
        carry = [torch.zeros(2, dtype=torch.float64)]
        (out,), ys = run(body, [], carry, xs, 3, compile=EAGER)
        (wanted,), others = run(body, [], carry, xs, 3, compile=False)
        assert torch.equal(out, wanted) and all(torch.equal(a, b) for (a,), (b,) in zip(ys, others, strict=True))
        assert [y.dtype for (y,) in ys] == [x.dtype for (x,) in xs]
