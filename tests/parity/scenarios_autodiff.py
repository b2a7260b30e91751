"""Flax scenarios of `vjp`, `jvp`, `grad`, `value_and_grad` and `custom_vjp`.

Their outputs hold gradients, so that the gradients of a record are second derivatives.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from .flax_side import Block, Case, Cell, Constant, Counter, D, Layer, N, Pair, steps

SEPARATE = dict(variable_axes={"params": 0}, split_rngs={"params": True})


def call(m, *args):
    return m(*args)


def total(m, x):
    return (m(x) ** 2).sum()


def product(m, x, y):
    return (m(x) * y).sum()


def case(module, args, fn):
    return Case(module, args, fn, init=lambda m, x, *rest: m(x))


def vjp_layer(draw):
    def fn(m, x):
        y, backward = nn.vjp(call, m, x)
        return y, backward(jnp.sin(y))

    return case(Layer(), [draw(2, D)], fn)


def vjp_two_inputs(draw):
    def fn(m, x, y):
        out, backward = nn.vjp(lambda m, x, y: {"s": m(x) + y, "p": m(y) * x}, m, x, y)
        return out, backward({"s": out["p"], "p": out["s"]})

    return case(Layer(), [draw(2, D), draw(2, D)], fn)


def vjp_has_aux(draw):
    def fn(m, x):
        y, backward, aux = nn.vjp(lambda m, x: (m(x), {"twice": 2 * x}), m, x, has_aux=True)
        return y, backward(y), aux

    return case(Layer(), [draw(2, D)], fn)


def vjp_batch_stats(draw):
    def fn(m, x):
        y, backward = nn.vjp(call, m, x)
        return y, backward(jnp.sin(y))

    return case(Block(), [draw(5, D)], fn)


def vjp_variables_two_collections(draw):
    def fn(m, x):
        y, backward = nn.vjp(call, m, x, vjp_variables=["params", "const"])
        return y, backward(y)

    return case(Constant(), [draw(2, D)], fn)


def vjp_variables_other_collection(draw):
    def fn(m, x):
        y, backward = nn.vjp(call, m, x, vjp_variables="const")
        return y, backward(y)

    return case(Constant(), [draw(2, D)], fn)


def vjp_variables_none(draw):
    def fn(m, x):
        y, backward = nn.vjp(call, m, x, vjp_variables=False)
        return y, backward(y)[1]

    return case(Layer(), [draw(2, D)], fn)


def vjp_called_twice(draw):
    def fn(m, x):
        y, backward = nn.vjp(call, m, x)
        return backward(y), backward(2 * jnp.cos(y))

    return case(Layer(), [draw(2, D)], fn)


def vjp_multi_scope(draw):
    """The cotangents of two roots: here in the order (argument, module)."""

    def fn(m, x):
        y, backward = nn.vjp(lambda a, b, x: b(a(x)), m.first, m.second, x, multi_scope=True)
        variables, *inputs = backward(y)
        return y, list(variables), inputs[-1]

    return case(Pair(Layer(), Layer()), [draw(2, D)], fn)


def vjp_in_vmap(draw):
    def fn(m, x):
        y, backward = nn.vjp(call, m, x)
        return y, backward(y)

    return Case(Layer(), [draw(N, 2, D)], nn.vmap(fn, **SEPARATE), init=nn.vmap(call, **SEPARATE))


def vjp_reduce_axes(draw):
    """`reduce_axes=('batch',)`: the cotangents of what is shared are summed over the axis.

    JAX dropped the argument; the sum it stood for is written out here.
    """

    def body(m, x):
        y, backward = nn.vjp(call, m, x)
        variables, x_grad = backward(y)
        return y, jax.lax.psum(variables, "batch"), x_grad

    shared = dict(variable_axes={"params": None}, split_rngs={"params": False}, axis_name="batch")
    return Case(Layer(), [draw(N, 2, D)], nn.vmap(body, **shared), init=nn.vmap(call, **shared))


def vjp_of_scan(draw):
    class Stack(nn.Module):
        def setup(self):
            self.layers = nn.scan(steps(Layer), length=N, **SEPARATE)()

        def __call__(self, x):
            return self.layers(x, None)[0]

    def fn(m, x):
        y, backward = nn.vjp(call, m, x)
        return y, backward(y)

    return case(Stack(), [draw(2, D)], fn)


def vjp_of_remat(draw):
    def fn(m, x):
        y, backward = nn.vjp(nn.remat(call), m, x)
        return y, backward(y)

    return case(Block(), [draw(5, D)], fn)


def jvp_inputs(draw):
    fn = lambda m, x, t: nn.jvp(call, m, (x,), (t,), {})
    return case(Layer(), [draw(2, D), draw(2, D)], fn)


def jvp_variables(draw):
    def fn(m, x, t):
        return nn.jvp(call, m, (x,), (t,), {"params": jax.tree.map(jnp.cos, m.variables["params"])})

    return case(Layer(), [draw(2, D), draw(2, D)], fn)


def jvp_batch_stats(draw):
    fn = lambda m, x, t: nn.jvp(call, m, (x,), (t,), {})
    return case(Block(), [draw(5, D), draw(5, D)], fn)


def jvp_of_grad(draw):
    """A Hessian times a vector."""
    fn = lambda m, x, t: nn.jvp(lambda m, x: nn.grad(total, m, x)[0], m, (x,), (t,), {})
    return case(Layer(), [draw(2, D), draw(2, D)], fn)


def jvp_in_vmap(draw):
    fn = nn.vmap(lambda m, x, t: nn.jvp(call, m, (x,), (t,), {}), **SEPARATE)
    return Case(Layer(), [draw(N, 2, D), draw(N, 2, D)], fn, init=lambda m, x, t: nn.vmap(call, **SEPARATE)(m, x))


def grad_one_input(draw):
    return case(Layer(), [draw(2, D)], lambda m, x: nn.grad(total, m, x))


def grad_two_inputs(draw):
    return case(Layer(), [draw(2, D), draw(2, D)], lambda m, x, y: nn.grad(product, m, x, y))


def grad_pytree_input(draw):
    fn = lambda m, x, y: nn.grad(lambda m, c: product(m, c["x"], c["y"]), m, {"x": x, "y": y})
    return case(Layer(), [draw(2, D), draw(2, D)], fn)


def grad_has_aux(draw):
    fn = lambda m, x: nn.grad(lambda m, x: (total(m, x), m(x)), m, x, has_aux=True)
    return case(Layer(), [draw(2, D)], fn)


def grad_counter(draw):
    return case(Counter(), [draw(2, D)], lambda m, x: nn.grad(total, m, x))


def grad_of_grad(draw):
    def slope(m, x):
        return (nn.grad(total, m, x)[0] ** 2).sum()

    return case(Layer(), [draw(2, D)], lambda m, x: nn.grad(slope, m, x))


def grad_in_vmap(draw):
    fn = nn.vmap(lambda m, x: nn.grad(total, m, x), **SEPARATE)
    return Case(Layer(), [draw(N, 2, D)], fn, init=nn.vmap(call, **SEPARATE))


def grad_through_scan(draw):
    time = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False})

    def fn(m, h, x):
        return nn.grad(lambda m, h, x: (m(h, x)[1] ** 2).sum(), m, h, x)

    return Case(time(), [draw(2, D), draw(5, 2, D)], fn, init=call)


def value_and_grad_two_inputs(draw):
    return case(Layer(), [draw(2, D), draw(2, D)], lambda m, x, y: nn.value_and_grad(product, m, x, y))


def value_and_grad_has_aux(draw):
    fn = lambda m, x: nn.value_and_grad(lambda m, x: (total(m, x), {"y": m(x)}), m, x, has_aux=True)
    return case(Layer(), [draw(2, D)], fn)


def value_and_grad_batch_stats(draw):
    return case(Block(), [draw(5, D)], lambda m, x: nn.value_and_grad(total, m, x))


def custom_vjp_sign(draw):
    def backward(vjp_fn, y_t):
        params_t, *inputs_t = vjp_fn(y_t)
        return jax.tree.map(jnp.sign, params_t), *inputs_t

    fn = nn.custom_vjp(call, forward_fn=lambda m, x: nn.vjp(call, m, x), backward_fn=backward)
    return case(Layer(), [draw(2, D)], fn)


def custom_vjp_clip(draw):
    """Clip the gradient of the inputs, keep that of the parameters."""

    def backward(vjp_fn, y_t):
        params_t, x_t = vjp_fn(y_t)
        return params_t, jnp.clip(x_t, -0.1, 0.1)

    fn = nn.custom_vjp(call, forward_fn=lambda m, x: nn.vjp(call, m, x), backward_fn=backward)
    return case(Layer(), [draw(2, D)], lambda m, x: fn(m, x) ** 2)


def custom_vjp_nondiff_argnums(draw):
    """A static factor, counted as argument 1, comes first in `backward_fn`."""

    def scaled(m, factor, x):
        return m(x) * factor

    def forward(m, factor, x):
        y, vjp_fn = nn.vjp(lambda m, x: m(x), m, x)
        return y * factor, vjp_fn

    def backward(factor, vjp_fn, y_t):
        return vjp_fn(y_t * factor**2)

    fn = nn.custom_vjp(scaled, forward_fn=forward, backward_fn=backward, nondiff_argnums=(1,))
    return case(Layer(), [draw(2, D)], lambda m, x: fn(m, 3.0, x))


def custom_vjp_residuals(draw):
    """Residuals that are tensors, two inputs, and zeros for the parameters."""

    def forward(m, x, y):
        return product(m, x, y), {"x": x, "y": y, "params": m.variables["params"]}

    def backward(res, out_t):
        params_t = {"params": jax.tree.map(jnp.zeros_like, res["params"])}
        return params_t, out_t * jnp.sin(res["y"]), out_t * res["x"]

    fn = nn.custom_vjp(product, forward_fn=forward, backward_fn=backward)
    return case(Layer(), [draw(2, D), draw(2, D)], fn)


def custom_vjp_state(draw):
    """State changed by the forward function is kept."""

    def backward(vjp_fn, y_t):
        params_t, x_t = vjp_fn(y_t)
        return params_t, 2 * x_t

    fn = nn.custom_vjp(call, forward_fn=lambda m, x: nn.vjp(call, m, x), backward_fn=backward)
    return case(Counter(), [draw(2, D)], fn)


def custom_vjp_in_vmap(draw):
    def backward(vjp_fn, y_t):
        params_t, *inputs_t = vjp_fn(y_t)
        return jax.tree.map(jnp.sign, params_t), *inputs_t

    fn = nn.custom_vjp(call, forward_fn=lambda m, x: nn.vjp(call, m, x), backward_fn=backward)
    return Case(Layer(), [draw(N, 2, D)], nn.vmap(fn, **SEPARATE), init=nn.vmap(call, **SEPARATE))
