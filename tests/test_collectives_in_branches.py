"""Collectives where rows choose differently: as in flax, they are of all rows, whatever these choose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchlift
from torchlift.errors import AxisError

P, X = torch.tensor([True, False, True, False]), torch.arange(4.0) + 1


def called(fn):
    return fn


def compiled(fn):
    return torch.compile(fn, backend="aot_eager", fullgraph=True)


def choose(branch, **kwargs):
    def row(m, x, p):
        return torchlift.cond(p, lambda m, x: branch(x), lambda m, x: x, m, x)

    return lambda x, p: torchlift.vmap(row, axis_name="i", **kwargs)(nn.Identity(), x, p)


BRANCHES = {  # what rows that chose the branch have
    "psum": (lambda x: torchlift.psum(x, "i"), 10.0),
    "pmean": (lambda x: torchlift.pmean(x, "i"), 2.5),
    "pmax": (lambda x: torchlift.pmax(x, "i"), 4.0),
    "all_gather": (lambda x: torchlift.all_gather(x, "i").prod(), 24.0),
    "a branch in a branch": (
        lambda x: torchlift.cond(x > 2, lambda m, x: torchlift.psum(x, "i"), lambda m, x: -x, nn.Identity(), x),
        None,
    ),
}


@pytest.mark.parametrize("around", [called, compiled])
@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_that_some_rows_take(name, around):
    branch, value = BRANCHES[name]
    first, third = (value, value) if value is not None else (-1.0, 10.0)
    x = X.clone().requires_grad_()
    found = around(choose(branch))(x, P)
    assert found.tolist() == [first, 2.0, third, 4.0]


@pytest.mark.parametrize("around", [called, compiled])
def test_gradients_of_a_branch_that_some_rows_take(around):
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(around(choose(BRANCHES["psum"][0]))(x, P).sum(), x)
    assert grad.tolist() == [2.0, 3.0, 2.0, 3.0]  # of two sums over all, and of two rows as they are


@pytest.mark.parametrize("bound", [None, 5])
def test_a_loop_that_rows_leave_one_by_one(bound):
    def row(m, x):
        return torchlift.while_loop(
            lambda m, c: c[0] < x, lambda m, c: (c[0] + 1, c[1] + torchlift.psum(torch.ones(()), "i")),
            m, (torch.zeros(()), x * 0), max_steps=bound,
        )[1]  # fmt: skip

    assert torchlift.vmap(row, axis_name="i")(nn.Identity(), X).tolist() == [4.0, 8.0, 12.0, 16.0]


def test_some_indices_of_a_chunked_map_are_refused_still():
    with pytest.raises(AxisError, match=r"got 2 of the 4 indices .* leave out vmap's chunk_size"):
        choose(BRANCHES["psum"][0], chunk_size=2)(X, P)


@pytest.mark.parametrize("bound", [None, 5])
def test_gradients_of_a_loop_that_rows_leave_one_by_one(bound):
    def row(m, x, w):
        return torchlift.while_loop(
            lambda m, c: c[0] < x, lambda m, c: (c[0] + 1, torchlift.psum(c[1], "i")), m, (torch.zeros(()), w),
            max_steps=bound,
        )[1]  # fmt: skip

    w = torch.ones(4, requires_grad=True)
    found = torchlift.vmap(row, axis_name="i")(nn.Identity(), torch.tensor([0.0, 1.0, 2.0, 2.0]), w)
    assert found.tolist() == [1.0, 4.0, 13.0, 13.0]  # the first is 1 still when the others are summed again
    (grad,) = torch.autograd.grad(found.sum(), w)
    assert grad.tolist() == [1.0 + 1 + 2 * 4, *[1.0 + 2 * 3] * 3]


def test_draws_go_on_from_where_they_began():
    """The run of some rows that met the collective is as if it had not been."""

    def noisy(m, x):
        return torchlift.psum(x, "i") + torch.rand(())

    def row(m, x, p):
        return torchlift.cond(p, noisy, lambda m, x: x, m, x)

    torch.manual_seed(0)
    expected = 10 + torch.rand(4)
    torch.manual_seed(0)
    found = torchlift.vmap(row, axis_name="i", split_rngs={True: True})(nn.Identity(), X, P)
    torch.testing.assert_close(found, torch.where(P, expected, X))
