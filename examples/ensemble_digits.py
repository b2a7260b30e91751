"""Train an ensemble of networks as one, and compare with the Python loop over them.

    python examples/ensemble_digits.py --members 32

One lifted class is all that changes: `vmap(Net, variable_axes={"params": 0}, axis_size=32)`. State
follows params, so every member also gets batch statistics and dropout draws of its own.

Shapes in comments: E members of the ensemble, B batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlift


class Net(nn.Module):
    """A small classifier: nothing in it knows that there will be many of it."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(64, width)
        self.norm1 = nn.BatchNorm1d(width)
        self.hidden2 = nn.Linear(width, width)
        self.norm2 = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:  # B 64 -> B 10
        x = self.drop(F.relu(self.norm1(self.hidden1(x))))
        x = self.drop(F.relu(self.norm2(self.hidden2(x))))
        return self.head(x)


class Loop(nn.ModuleList):
    """The same ensemble as a Python loop."""

    def forward(self, x: Tensor) -> Tensor:  # B 64 -> E B 10
        return torch.stack([net(x) for net in self])


@dataclass(frozen=True)
class Digits:
    train_x: Tensor  # (images, 64), from 0 to 1
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls) -> Digits:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            sys.exit("the digits come with scikit-learn: pip install scikit-learn")
        x, y = load_digits(return_X_y=True)
        return cls.split(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))

    @classmethod
    def synthetic(cls, images: int) -> Digits:
        """Ten random prototypes and noise, for where scikit-learn is not installed."""
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(10, (images,), generator=generator)
        x = torch.rand(10, 64, generator=generator)[y] + 0.3 * torch.randn(images, 64, generator=generator)
        return cls.split(x, y)

    @classmethod
    def split(cls, x: Tensor, y: Tensor) -> Digits:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        train, test = order[len(x) // 5 :], order[: len(x) // 5]
        return cls(x[train], y[train], x[test], y[test])

    def to(self, like: Tensor) -> Digits:
        at = like.device
        return Digits(self.train_x.to(like), self.train_y.to(at), self.test_x.to(like), self.test_y.to(at))


@dataclass(frozen=True)
class Report:
    logits: Tensor  # E images 10, on the test images
    accuracy: Tensor  # E
    ensemble: float  # accuracy of the averaged probabilities
    seconds: float  # of a median epoch, so that other work of the machine does not count

    def __str__(self) -> str:
        a = self.accuracy * 100
        return (
            f"members {a.mean():.2f} +- {a.std():.2f} %  (from {a.min():.2f} to {a.max():.2f})"
            f"   ensemble {100 * self.ensemble:.2f} %   {self.seconds:.3f} s an epoch"
        )


def fit(model: nn.Module, data: Digits, args: argparse.Namespace) -> Report:
    """Train `model`, which maps B 64 to E B 10; every member sees the same batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    clock = [time.perf_counter()]
    for _ in range(args.epochs):
        order = torch.randperm(len(data.train_x), generator=generator)
        for rows in order[: len(order) // args.batch * args.batch].split(args.batch):
            logits = model(data.train_x[rows])  # E B 10
            target = data.train_y[rows].expand(len(logits), -1)  # E B
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
            optimizer.zero_grad()
            (loss * args.members).backward()  # a sum over members: each has its own gradient
            optimizer.step()
        clock.append(time.perf_counter())
    model.eval()
    with torch.no_grad():
        logits = model(data.test_x)  # E images 10
    accuracy = (logits.argmax(-1) == data.test_y).double().mean(-1)
    ensemble = (logits.softmax(-1).mean(0).argmax(-1) == data.test_y).double().mean().item()
    return Report(logits, accuracy, ensemble, statistics.median(b - a for a, b in pairwise(clock)))


def main(argv: Sequence[str] | None = None, data: Digits | None = None) -> tuple[Report, Report]:
    """Reports of the lifted ensemble and of the loop, trained from the same weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=15)
    for name, default in {"batch": 64, "width": 64, "dropout": 0.2, "lr": 2e-3, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    like = torch.empty(0, dtype=getattr(torch, args.dtype), device=args.device)
    data = (data or Digits.load()).to(like)
    Ensemble = torchlift.vmap(Net, variable_axes={"params": 0}, in_axes=None, axis_size=args.members)
    torch.manual_seed(args.seed)
    lifted = fit(Ensemble(args.width, args.dropout).to(like), data, args)
    print(f"vmap  {lifted}")
    torch.manual_seed(args.seed)
    loop = fit(Loop(Net(args.width, args.dropout) for _ in range(args.members)).to(like), data, args)
    print(f"loop  {loop}\n{loop.seconds / lifted.seconds:.1f} times as fast as the loop")
    return lifted, loop


if __name__ == "__main__":
    main()
