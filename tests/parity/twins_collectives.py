"""The twins of `scenarios_collectives`."""

import torch

from torchlift import all_gather, axis_index, grad, pmax, pmean, pmin, psum, vmap

from .torch_side import Layer, N, Norm

SHARED = dict(variable_axes={"params": None}, axis_name="batch")


def mapped(body):
    return Layer(), vmap(body, **SHARED)


def collective_psum():
    return mapped(lambda m, x: m(x) * psum(m(x) ** 2, "batch"))


def collective_pmean():
    return mapped(lambda m, x: m(x) - pmean(m(x), "batch"))


def collective_pmax():
    return mapped(lambda m, x: m(x) - pmax(m(x).detach(), "batch"))


def collective_pmin():
    return mapped(lambda m, x: m(x) - pmin(m(x).detach(), "batch"))


def collective_all_gather():
    return mapped(lambda m, x: all_gather(m(x), "batch") * m(x))


def collective_all_gather_axis_one():
    return mapped(lambda m, x: all_gather(m(x), "batch", axis=1))


def collective_axis_index():
    return mapped(lambda m, x: m(x) * (1.0 + axis_index("batch")))


def collective_pytree():
    return mapped(lambda m, x: psum({"a": m(x), "b": (x,)}, "batch"))


def collective_separate_params():
    body = lambda m, x: m(pmean(m(x), "batch"))
    return Layer(), vmap(body, variable_axes={"params": 0}, axis_name="batch")


def collective_nested_axes():
    body = lambda m, x: (psum(m(x), ("batch", "model")), psum(m(x), "batch"))
    return mapped(vmap(body, **{**SHARED, "axis_name": "model"}))


def collective_through_grad():
    return mapped(lambda m, x: grad(lambda m, x: (m(x) * psum(m(x), "batch")).sum(), m, x)[0])


def collective_sync_batch_norm():
    class Synced(Norm):
        def forward(self, x):
            mean = pmean(x.mean(0), "batch")
            var = pmean((x**2).mean(0), "batch") - mean**2
            self.mean = 0.9 * self.mean + 0.1 * mean
            self.var = 0.9 * self.var + 0.1 * var
            return (x - mean) / torch.sqrt(var + 1e-5) * self.scale

    return vmap(Synced, variable_axes={"params": None, "batch_stats": None}, axis_size=N, axis_name="batch")()


def collective_softmax():
    def body(m, x):
        z = torch.exp(m(x))
        return z / psum(z, "batch")

    return mapped(body)
