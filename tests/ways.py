"""Every transform as a way to call a body once, for tests of what they have in common."""

import pytest
import torch
from torch import nn

from torchlift import apply, remat, remat_scan, scan, variable, vmap

AOT = {"backend": "aot_eager"}
SIZE = 3


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def clone(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# Every transform as a way to call ``body(module, x)`` once, with the leading axis that some need put on and taken off.
WAYS = {
    "vmap": lambda body, **kw: (
        lambda m, x: vmap(body, variable_axes={"state": None, "batch_stats": None}, **kw)(m, x[None])[0]
    ),
    "remat": lambda body: remat(body),
    "scan": lambda body: (
        lambda m, x: scan(lambda m, c, x: (c, body(m, x)), variable_carry=("state", "batch_stats"), compile=False)(
            m, 0, x[None]
        )[1][0]
    ),
    "scan aot": lambda body: (
        lambda m, x: scan(lambda m, c, x: (c, body(m, x)), variable_carry=("state", "batch_stats"), compile=AOT)(
            m, 0, x[None]
        )[1][0]
    ),
    "remat_scan": lambda body: remat_scan(
        body, lengths=(1, 1), variable_axes={}, variable_carry=("state", "batch_stats"), compile=False
    ),
    "remat of remat": lambda body: remat(remat(body)),
    "vmap of remat": lambda body: WAYS["vmap"](remat(body)),
    "remat of scan": lambda body: remat(WAYS["scan"](body)),
}
EAGER = [name for name in WAYS if "aot" not in name]
every_way = pytest.mark.parametrize("way", WAYS)
every_eager_way = pytest.mark.parametrize("way", EAGER)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)
        variable(self, "state", "total", torch.zeros, SIZE)
        variable(self, "state", "last", torch.zeros, SIZE)
        self.steps, self.history = 0, []

    def forward(self, x):
        self.total += self.linear.bias.detach()
        self.last = 2 * self.linear.bias
        return self.linear(x).tanh()


# The same where the state is read-only, and what the error says.
NOT_MUTABLE = {
    "vmap": (
        lambda body: vmap(body),
        r"vmap\(body\): changed 'total' of collection 'state', .*variable_axes=\{'state': 0",
    ),
    "remat": (lambda body: remat(body, variables="params"), r"remat\(body, .*'total' .*; add 'state' to variables="),
    "scan": (
        lambda body: lambda m, x: scan(body, length=1, compile=False)(m, x),
        r"scan\(body, .*'total' .*'state', which is read-only there; give it an axis, .*, or carry it",
    ),
    "remat_scan": (
        lambda body: remat_scan(body, lengths=(1,), variable_axes={}, split_rngs={}, compile=False),
        "remat_scan.*'total' of collection 'state'",
    ),
    "apply": (
        lambda body: lambda m, x: apply(m, {}, x, method=body),
        r"apply\(Net\): changed 'total' .*mutable=\['state'\]",
    ),
}
