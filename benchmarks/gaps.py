"""What works in torchlift and fails in torch alone: both ways side by side, and what happened.

    python benchmarks/gaps.py            # all rows, a minute
    python benchmarks/gaps.py --markdown # the table of the README

Every row runs torch's own way and torchlift's way on the same small problem and prints what came out.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchlift
from torchlift.engine.compiled import clear_cache

warnings.simplefilter("ignore")


class Net(nn.Module):
    def __init__(self, width: int = 8, p: float = 0.0):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.gelu(self.norm(self.linear(x))))


class Block(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def ensemble_statistics() -> tuple[Callable[[], str], Callable[[], str]]:
    """batch-norm statistics of an ensemble under vmap"""
    x = torch.randn(3, 16, 8)

    def torch_way() -> str:
        nets = [Net() for _ in range(3)]
        params, buffers = torch.func.stack_module_state(nets)
        base = copy.deepcopy(nets[0]).to("meta")
        torch.func.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)))(params, buffers, x)
        return f"the modules' statistics stay at {nets[0].norm.running_mean.abs().sum():.0f}: the update is lost"

    def torchlift_way() -> str:
        nets = torchlift.vmap(Net, variable_axes={"params": 0}, axis_size=3)()
        nets(x)
        return f"each member has its own: running_mean {tuple(nets.norm.running_mean.shape)}, updated once"

    return torch_way, torchlift_way


def ensemble_dropout() -> tuple[Callable[[], str], Callable[[], str]]:
    """dropout in an ensemble under vmap"""
    x = torch.randn(3, 16, 8)

    def torch_way() -> str:
        params, buffers = torch.func.stack_module_state([Net(p=0.5) for _ in range(3)])
        base = Net(p=0.5).to("meta")
        torch.func.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)))(params, buffers, x)
        return "works"

    def torchlift_way() -> str:
        torchlift.vmap(Net, variable_axes={"params": 0}, axis_size=3)(p=0.5)(x)
        return "a mask of its own for each member"

    return torch_way, torchlift_way


def stacked_initialisers() -> tuple[Callable[[], str], Callable[[], str]]:
    """xavier initialisation of 64 stacked 128 x 128 layers"""

    def torch_way() -> str:
        weight = torch.empty(64, 128, 128)
        nn.init.xavier_normal_(weight)
        return f"std {weight.std():.4f}, for {(2 / 256) ** 0.5:.4f}: fan-in is taken from the stack"

    def torchlift_way() -> str:
        stack = torchlift.vmap(nn.Linear, variable_axes={"params": 0}, axis_size=64)(128, 128)
        stack.apply(lambda m: nn.init.xavier_normal_(m.weight))
        return f"std {stack.weight.std():.4f}"

    return torch_way, torchlift_way


def remat_statistics() -> tuple[Callable[[], str], Callable[[], str]]:
    """batch-norm under rematerialisation"""
    x = torch.randn(16, 8, requires_grad=True)

    def torch_way() -> str:
        net = Net()
        checkpoint(net, x, use_reentrant=False).sum().backward()
        return f"num_batches_tracked is {net.norm.num_batches_tracked} after one step"

    def torchlift_way() -> str:
        net = torchlift.remat(Net)()
        net(x).sum().backward()
        return f"num_batches_tracked is {net.norm.num_batches_tracked} after one step"

    return torch_way, torchlift_way


def remat_under_grad() -> tuple[Callable[[], str], Callable[[], str]]:
    """rematerialisation under torch.func.grad"""
    x = torch.randn(4, 32)

    def torch_way() -> str:
        block = Block()
        torch.func.grad(lambda x: checkpoint(block, x, use_reentrant=False).sum())(x)
        return "works"

    def torchlift_way() -> str:
        block = torchlift.remat(Block)()
        expected = torch.func.grad(lambda x: Block.forward(block, x).sum())(x)
        error = (torch.func.grad(lambda x: block(x).sum())(x) - expected).abs().max()
        return f"the gradient, {error:.0e} from the one without"

    return torch_way, torchlift_way


def remat_under_vmap() -> tuple[Callable[[], str], Callable[[], str]]:
    """per-sample gradients (vmap of grad) with rematerialisation"""
    x = torch.randn(4, 32)

    def torch_way() -> str:
        block = Block()
        torch.func.vmap(torch.func.grad(lambda x: checkpoint(block, x, use_reentrant=False).sum()))(x)
        return "works"

    def torchlift_way() -> str:
        block = torchlift.remat(Block)()
        return f"gradients {tuple(torch.func.vmap(torch.func.grad(lambda x: block(x).sum()))(x).shape)}"

    return torch_way, torchlift_way


def functional_remat() -> tuple[Callable[[], str], Callable[[], str]]:
    """functional_call of a rematerialised module, backward afterwards"""
    x = torch.randn(4, 32)

    def loss_gap(call: Callable[[dict[str, Tensor]], Tensor], block: nn.Module) -> str:
        params = {name: (2 * p.detach()).requires_grad_() for name, p in block.named_parameters()}
        call(params).square().sum().backward()
        found = params["up.weight"].grad
        expected = {name: (2 * p.detach()).requires_grad_() for name, p in block.named_parameters()}
        torch.func.functional_call(Block(), expected, (x,)).square().sum().backward()
        error = (found - expected["up.weight"].grad).norm() / expected["up.weight"].grad.norm()
        return f"relative error of the gradient {error:.0e}" + (": wrong, silently" if error > 1e-3 else "")

    def torch_way() -> str:
        class Remat(Block):
            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(super().forward, x, use_reentrant=False)

        block = Remat()
        return loss_gap(lambda params: torch.func.functional_call(block, params, (x,)), block)

    def torchlift_way() -> str:
        block = torchlift.remat(Block)()
        return loss_gap(lambda params: torchlift.apply(block, {"params": params}, x), block)

    return torch_way, torchlift_way


def recurrent_ensemble() -> tuple[Callable[[], str], Callable[[], str]]:
    """an ensemble of nn.LSTM on a CPU"""
    x = torch.randn(3, 5, 2, 4)

    def torch_way() -> str:
        params, buffers = torch.func.stack_module_state([nn.LSTM(4, 4) for _ in range(3)])
        base = nn.LSTM(4, 4)
        torch.func.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)))(params, buffers, x)
        return "works"

    def torchlift_way() -> str:
        out, _ = torchlift.vmap(nn.LSTM, variable_axes={"params": 0}, axis_size=3)(4, 4)(x)
        return f"runs index by index, and says so: {tuple(out.shape)}"

    return torch_way, torchlift_way


def compile_time() -> tuple[Callable[[], str], Callable[[], str]]:
    """time to the first training step, compiled, 24 layers over 4 layers"""

    def first_step(model: Callable[[Tensor], Tensor]) -> float:
        torch._dynamo.reset()
        clear_cache()  # or the loop would run what it compiled for another depth
        start = time.perf_counter()
        model(torch.randn(8, 32, requires_grad=True)).sum().backward()
        return time.perf_counter() - start

    def ratio(make: Callable[[int], Callable[[Tensor], Tensor]]) -> str:
        first_step(make(2))  # what is paid once in a process
        short, deep = first_step(make(4)), first_step(make(24))
        return f"{deep / short:.1f}x ({short:.1f} s -> {deep:.1f} s)"

    def torch_way() -> str:
        return ratio(lambda n: torch.compile(nn.Sequential(*[Block() for _ in range(n)])))

    def torchlift_way() -> str:
        return ratio(lambda n: torchlift.scan_layers([Block() for _ in range(n)]))

    return torch_way, torchlift_way


ROWS = [
    ensemble_statistics,
    ensemble_dropout,
    stacked_initialisers,
    recurrent_ensemble,
    remat_statistics,
    remat_under_grad,
    remat_under_vmap,
    functional_remat,
    compile_time,
]


def outcome(way: Callable[[], str]) -> str:
    """What a way says of itself, or the error that it ended in."""
    torch.manual_seed(0)
    try:
        return way()
    except Exception as error:  # whatever torch raises is the result of the row
        return f"{type(error).__name__}: {str(error).split('. ')[0].splitlines()[0][:110]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    markdown = parser.parse_args().markdown
    if markdown:
        print("| | torch alone | torchlift |\n|---|---|---|")
    for row in ROWS:
        torch_way, torchlift_way = row()
        title, ours, theirs = row.__doc__, outcome(torchlift_way), outcome(torch_way)
        if markdown:
            print(f"| {title} | {theirs} | {ours} |")
        else:
            print(f"{title}\n    torch:     {theirs}\n    torchlift: {ours}")


if __name__ == "__main__":
    main()
