"""The examples of derivatives compute what torch computes by itself."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "autodiff"
pytestmark = pytest.mark.usefixtures("float64")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_autodiff_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def net(*widths: int) -> nn.Module:
    return nn.Sequential(nn.Linear(*widths[:2]), nn.Tanh(), nn.Linear(*widths[1:]))


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "maml"))
def test_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    load(name).main()
    assert capsys.readouterr().out


def test_per_sample_gradients() -> None:
    example, m = load("per_sample_gradients"), net(4, 5, 3)
    xs, ys = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    found = example.per_sample_gradients(m, xs, ys)
    for i in range(6):
        expected = torch.autograd.grad(F.cross_entropy(m(xs[i]), ys[i]), list(m.parameters()))
        for (name, _), g in zip(m.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name][i], g, rtol=1e-12, atol=1e-12)
    mean = example.clipped(found, 1e9)
    torch.testing.assert_close(mean["0.weight"], found["0.weight"].mean(0))
    assert all(g.norm() <= 0.01 + 1e-12 for g in example.clipped(found, 0.01).values())


def test_hessian_vector_products() -> None:
    example, m = load("hessian_vector_products"), net(3, 4, 1)
    x, y = torch.randn(7, 3), torch.randn(7, 1)
    names = [name for name, _ in m.named_parameters()]
    shapes = [p.shape for p in m.parameters()]

    def flat_loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        params = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.mse_loss(torch.func.functional_call(m, params, (x,)), y)

    hessian = torch.func.hessian(flat_loss)(nn.utils.parameters_to_vector(m.parameters()).detach())
    vector = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    found = example.hessian_vector_product(m, x, y, vector)
    flatten = lambda tree: torch.cat([tree[name].flatten() for name in names])
    torch.testing.assert_close(flatten(found), hessian @ flatten(vector), rtol=1e-12, atol=1e-12)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    largest = eigenvalues[eigenvalues.abs().argmax()]
    assert example.largest_eigenvalue(m, x, y, steps=100) == pytest.approx(float(largest), rel=1e-2)


def test_jacobians() -> None:
    example = load("jacobians")
    m = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    rows = example.by_rows(m, x)
    assert m[1].num_batches_tracked == 1
    torch.testing.assert_close(example.by_columns(m, x), rows, rtol=1e-12, atol=1e-12)
    assert m[1].num_batches_tracked == 1
    torch.testing.assert_close(torch.autograd.functional.jacobian(m, x), rows, rtol=1e-12, atol=1e-12)
    plain = net(3, 4, 2)
    expected = torch.stack([torch.autograd.functional.jacobian(plain, row) for row in x])
    torch.testing.assert_close(example.per_sample(plain, x), expected, rtol=1e-12, atol=1e-12)


def test_maml(capsys: pytest.CaptureFixture[str]) -> None:
    example, m = load("maml"), net(1, 4, 1)
    x, y, new_x, new_y = (torch.randn(6, 1) for _ in range(4))
    found = torch.autograd.grad(example.adapted_loss(m, x, y, new_x, new_y), list(m.parameters()))
    params = dict(m.named_parameters())
    inner = torch.autograd.grad(F.mse_loss(m(x), y), list(params.values()), create_graph=True)
    stepped = {name: p - 0.1 * g for (name, p), g in zip(params.items(), inner, strict=True)}
    after = F.mse_loss(torch.func.functional_call(m, stepped, (new_x,)), new_y)
    for a, b in zip(found, torch.autograd.grad(after, list(params.values())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    losses = example.main(["--steps", "30"])
    assert len(losses) == 30 and sum(losses[-10:]) < sum(losses[:10])
    assert "after" in capsys.readouterr().out
