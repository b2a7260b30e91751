"""The twins of `scenarios_autodiff`."""

import torch
from torch import nn
from torch.utils._pytree import tree_map

import torchlift
from torchlift import custom_vjp, grad, jvp, remat, scan, value_and_grad, vjp, vmap

from .torch_side import Block, Cell, Constant, Counter, Layer, N, Pair, steps

SEPARATE = dict(variable_axes={"params": 0}, split_rngs={"params": True})


def call(m, *args):
    return m(*args)


def total(m, x):
    return (m(x) ** 2).sum()


def product(m, x, y):
    return (m(x) * y).sum()


def sine_cotangent(m, x):
    y, backward = vjp(call, m, x)
    return y, backward(torch.sin(y))


def own_cotangent(m, x):
    y, backward = vjp(call, m, x)
    return y, backward(y)


def vjp_layer():
    return Layer(), sine_cotangent


def vjp_two_inputs():
    def fn(m, x, y):
        out, backward = vjp(lambda m, x, y: {"s": m(x) + y, "p": m(y) * x}, m, x, y)
        return out, backward({"s": out["p"], "p": out["s"]})

    return Layer(), fn


def vjp_has_aux():
    def fn(m, x):
        y, backward, aux = vjp(lambda m, x: (m(x), {"twice": 2 * x}), m, x, has_aux=True)
        return y, backward(y), aux

    return Layer(), fn


def vjp_batch_stats():
    return Block(), sine_cotangent


def vjp_variables_two_collections():
    def fn(m, x):
        y, backward = vjp(call, m, x, vjp_variables=["params", "const"])
        return y, backward(y)

    return Constant(), fn


def vjp_variables_other_collection():
    def fn(m, x):
        y, backward = vjp(call, m, x, vjp_variables="const")
        return y, backward(y)

    return Constant(), fn


def vjp_variables_none():
    def fn(m, x):
        y, backward = vjp(call, m, x, vjp_variables=False)
        return y, backward(y)[1]

    return Layer(), fn


def vjp_called_twice():
    def fn(m, x):
        y, backward = vjp(call, m, x)
        return backward(y), backward(2 * torch.cos(y))

    return Layer(), fn


def vjp_multi_scope():
    """The roots come module first here, argument first in Flax."""

    def fn(m, x):
        y, backward = vjp(lambda a, b, x: b(a(x)), m.first, m.second, x, multi_scope=True)
        variables, *inputs = backward(y)
        return y, variables[::-1], inputs[-1]

    return Pair(Layer(), Layer()), fn


def vjp_in_vmap():
    return Layer(), vmap(own_cotangent, **SEPARATE)


def vjp_reduce_axes():
    def body(m, x):
        y, backward = vjp(call, m, x, reduce_axes=("batch",))
        variables, x_grad = backward(y)
        return y, variables, x_grad

    return Layer(), vmap(body, variable_axes={"params": None}, axis_name="batch")


def vjp_of_scan():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = scan(steps(Layer), length=N, compile=False, **SEPARATE)()

        def forward(self, x):
            return self.layers(x, None)[0]

    return Stack(), own_cotangent


def vjp_of_remat():
    def fn(m, x):
        y, backward = vjp(remat(call), m, x)
        return y, backward(y)

    return Block(), fn


def push_forward(m, x, t):
    return jvp(call, m, (x,), (t,), {})


def jvp_inputs():
    return Layer(), push_forward


def jvp_variables():
    def fn(m, x, t):
        return jvp(call, m, (x,), (t,), tree_map(torch.cos, torchlift.variables(m, "params")))

    return Layer(), fn


def jvp_batch_stats():
    return Block(), push_forward


def jvp_of_grad():
    return Layer(), lambda m, x, t: jvp(lambda m, x: grad(total, m, x)[0], m, (x,), (t,), {})


def jvp_in_vmap():
    return Layer(), vmap(push_forward, **SEPARATE)


def grad_one_input():
    return Layer(), lambda m, x: grad(total, m, x)


def grad_two_inputs():
    return Layer(), lambda m, x, y: grad(product, m, x, y)


def grad_pytree_input():
    def fn(m, x, y):
        return grad(lambda m, c: product(m, c["x"], c["y"]), m, {"x": x, "y": y})

    return Layer(), fn


def grad_has_aux():
    return Layer(), lambda m, x: grad(lambda m, x: (total(m, x), m(x)), m, x, has_aux=True)


def grad_counter():
    return Counter(), lambda m, x: grad(total, m, x)


def grad_of_grad():
    def slope(m, x):
        return (grad(total, m, x)[0] ** 2).sum()

    return Layer(), lambda m, x: grad(slope, m, x)


def grad_in_vmap():
    return Layer(), vmap(lambda m, x: grad(total, m, x), **SEPARATE)


def grad_through_scan():
    time = scan(Cell, variable_broadcast="params", split_rngs={"params": False}, compile=False)
    return time(), lambda m, h, x: grad(lambda m, h, x: (m(h, x)[1] ** 2).sum(), m, h, x)


def value_and_grad_two_inputs():
    return Layer(), lambda m, x, y: value_and_grad(product, m, x, y)


def value_and_grad_has_aux():
    return Layer(), lambda m, x: value_and_grad(lambda m, x: (total(m, x), {"y": m(x)}), m, x, has_aux=True)


def value_and_grad_batch_stats():
    return Block(), lambda m, x: value_and_grad(total, m, x)


def with_backward(backward):
    """`call` with a backward function of its own, which is given the true one."""
    return custom_vjp(call, forward_fn=lambda m, x: vjp(call, m, x), backward_fn=backward)


def signs(vjp_fn, y_t):
    params_t, *inputs_t = vjp_fn(y_t)
    return tree_map(torch.sign, params_t), *inputs_t


def custom_vjp_sign():
    return Layer(), with_backward(signs)


def custom_vjp_clip():
    def clip(vjp_fn, y_t):
        params_t, x_t = vjp_fn(y_t)
        return params_t, x_t.clamp(-0.1, 0.1)

    fn = with_backward(clip)
    return Layer(), lambda m, x: fn(m, x) ** 2


def custom_vjp_nondiff_argnums():
    def scaled(m, factor, x):
        return m(x) * factor

    def forward(m, factor, x):
        y, vjp_fn = vjp(call, m, x)
        return y * factor, vjp_fn

    def backward(factor, vjp_fn, y_t):
        return vjp_fn(y_t * factor**2)

    fn = custom_vjp(scaled, forward_fn=forward, backward_fn=backward, nondiff_argnums=(1,))
    return Layer(), lambda m, x: fn(m, 3.0, x)


def custom_vjp_residuals():
    def forward(m, x, y):
        return product(m, x, y), {"x": x, "y": y, "variables": torchlift.variables(m, "params")}

    def backward(res, out_t):
        params_t = tree_map(torch.zeros_like, res["variables"])
        return params_t, out_t * torch.sin(res["y"]), out_t * res["x"]

    return Layer(), custom_vjp(product, forward_fn=forward, backward_fn=backward)


def custom_vjp_state():
    def double(vjp_fn, y_t):
        params_t, x_t = vjp_fn(y_t)
        return params_t, 2 * x_t

    return Counter(), with_backward(double)


def custom_vjp_in_vmap():
    return Layer(), vmap(with_backward(signs), **SEPARATE)
