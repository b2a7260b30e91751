"""A dense layer in which output i depends on inputs up to i: the weight is masked, and so is its gradient."""

import torch
from torch import Tensor, nn

from torchlift import map_variables


def causal(tree):
    """Biases are left alone, weights keep their lower triangle."""
    return {"params": {name: p.tril() if p.ndim == 2 else p for name, p in tree["params"].items()}}


CausalLinear = map_variables(nn.Linear, "params", causal)


def main() -> Tensor:
    torch.manual_seed(0)
    layer = nn.Sequential(CausalLinear(6, 6), nn.Tanh(), CausalLinear(6, 6))
    depends = torch.func.jacrev(layer)(torch.randn(6)) != 0
    print("output depends on input:", *depends.int().tolist(), sep="\n")
    return depends


if __name__ == "__main__":
    main()
