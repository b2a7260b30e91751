"""Weight normalisation: a direction and a length are stored, the layer sees their product. No hook, no layer code."""

import torch
from torch import Tensor, nn

from torchlift import map_variables


def length(v: Tensor) -> Tensor:
    return v.norm(dim=1, keepdim=True)


def joined(tree):
    params = tree["params"]
    return {"params": {"weight": params["g"] * params["v"] / length(params["v"]), "bias": params["bias"]}}


def parted(tree):
    params = tree["params"]
    return {"params": {"g": length(params["weight"]), "v": params["weight"], "bias": params["bias"]}}


NormedLinear = map_variables(nn.Linear, "params", joined, parted, init=True)


def main() -> nn.Module:
    torch.manual_seed(0)
    layer = NormedLinear(4, 3)
    print({name: tuple(p.shape) for name, p in layer.named_parameters()})
    layer(torch.randn(8, 4)).square().mean().backward()
    assert layer.v.grad is not None
    print(
        "a direction's gradient is at right angles to it:", (layer.v.grad * layer.v).sum(1).detach().abs().max() < 1e-6
    )
    return layer


if __name__ == "__main__":
    main()
