"""What a loop refuses of its options, and of what iterations return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchlift
from torchlift import CarryError, IterationError, OptionError


def run(body: Any, **options: Any) -> Any:
    stack = torchlift.stack_modules([nn.Linear(2, 2) for _ in range(3)])
    return torchlift.scan(body, variable_axes={"params": 0}, **{"compile": False, **options})(stack, torch.ones(2), xs)


xs = torch.arange(3.0)


def plain(m: nn.Module, carry: Tensor, x: Tensor) -> Any:
    return m(carry), x


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"unroll": 0}, r"scan\(plain, .*unroll is 0, expected 1 or more"),
        ({"compile": {"speed": 1}}, r"compile= has \['speed'\], expected backend, mode"),
    ],
)
def test_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        run(plain, **options)


def test_lengths_of_layers() -> None:
    with pytest.raises(OptionError, match=r"product of lengths \(2, 2\) is not the length 3"):
        torchlift.scan_layers([nn.Linear(2, 2) for _ in range(3)], lengths=(2, 2), compile=False)(torch.ones(2))


@pytest.mark.parametrize(
    ("y", "match"),
    [
        (lambda x: x.new_ones(int(x) + 1), r"a y of torch.float32 \[2\], another one of torch.float32 \[1\]"),
        (lambda x: (x,) * (int(x) + 1), "beside tensors differs|structure"),
        (lambda x: str(float(x)), "beside tensors differs: '0.0'"),
    ],
)
def test_ys_that_cannot_be_stacked(y: Any, match: str) -> None:
    with pytest.raises(IterationError, match=match):
        run(lambda m, carry, x: (m(carry), y(x)))


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["plain", "compiled"])
@pytest.mark.parametrize(("value", "got"), [(torch.zeros(2), r"float32 \[2\]"), (torch.tensor(1), r"int64 \[\]")])
def test_a_carried_variable_stays_as_it_is(value: Tensor, got: str, compile: Any) -> None:
    module = nn.Sequential(nn.Identity())
    module.register_buffer("first", torch.zeros(2))
    module[0].register_buffer("n", torch.zeros(()))

    def write(m: Any, carry: Tensor) -> Tensor:
        m[0].n = value
        return carry

    options: Any = {"variable_carry": "buffers", "compile": compile}
    expected = (
        rf"'0\.n' in 'buffers', which is carried, changed: got torch.{got}, expected torch.float32 \[\], as before"
    )
    with pytest.raises(CarryError, match=rf"^scan\(.*: {expected} the loop; write a value like that, or declare"):
        torchlift.scan(lambda m, c, x: (write(m, c), x), **options)(module, torch.ones(2), xs)
    with pytest.raises(CarryError, match=rf"^remat_scan\(.*: {expected}"):
        torchlift.remat_scan(write, (2,), variable_broadcast="params", variable_axes={}, **options)(
            module, torch.ones(2)
        )
    assert module[0].n.shape == ()


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(()))
        self.register_buffer("b", torch.zeros(()))

    def forward(self, carry: Tensor, x: Tensor) -> Any:
        (self.a if x > 0 else self.b).add_(1)
        return carry, None


def test_iterations_may_change_different_variables() -> None:
    stack = torchlift.stack_modules([Sometimes() for _ in range(3)])
    scan = torchlift.scan(lambda m, c, x: m(c, x), variable_axes={True: 0}, compile=False)
    scan(stack, torch.ones(2), xs)
    assert stack.a.tolist() == [0.0, 1.0, 1.0] and stack.b.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
def test_a_carry_of_another_structure_is_called_the_same_compiled(compile: Any) -> None:
    scan = torchlift.scan(lambda m, c, x: (c["a"], x), compile=compile)
    with pytest.raises(torchlift.CarryError, match=r"structure: got Tensor with leaves \[''\], expected dict"):
        scan(nn.Identity(), {"a": torch.zeros(2)}, xs)


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
def test_an_error_of_a_body_comes_alone_and_says_what_an_iteration_is_given(compile: Any, caplog: Any) -> None:
    lifted = torchlift.scan(lambda m, c, x: (m(c) + x, None), variable_broadcast="params", in_axes=1, compile=compile)
    with pytest.raises(RuntimeError, match="must match the size") as caught:
        lifted(nn.Linear(2, 2), torch.ones(3, 2), torch.ones(5, 4, 2))
    label = f"scan(<lambda>, variable_broadcast='params', in_axes=1, compile={compile!r})"
    assert caught.value.__notes__ == [f"{label}: iteration 0 of 4 was given args[1] of shape (5, 2); see in_axes="]
    assert not caplog.records


def test_a_note_takes_the_place_of_no_error_and_is_written_once() -> None:
    error = ValueError("mine")

    def body(m: nn.Module, c: Tensor, x: Tensor, nested: Tensor) -> Any:
        raise error

    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    lifted = torchlift.scan(body, in_axes=(0, torchlift.broadcast), compile=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"):
            lifted(nn.Linear(2, 2), torch.ones(2), torch.ones(3, 1), nested)
    assert len(error.__notes__) == 1
