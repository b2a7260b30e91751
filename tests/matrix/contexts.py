"""The contexts of the matrix: each runs a lifted module and its twin in one, and compares all that came of it."""

import threading
from contextlib import nullcontext

import torch
from torch.func import grad, vmap

import torchlift
from torchlift.engine.run import last_report

from .build import Lifted, Twin, arguments, compare, gradients, loss, outputs, tensors, tree_of
from .modules import FUSE, Burnt

ENGINE = {"backend": "aot_eager"}


def _forget(*parameters):
    for parameter in parameters:
        parameter.grad = None


def _backward(built, args, out):
    _forget(*built.extra)
    loss(out).backward()
    return gradients(built, args)


def _run(built, call=None, capture=True):
    """One call with backward: the outputs, gradients, state, sown values and what is drawn next."""
    args = arguments(built.transform.shapes)
    torch.manual_seed(2)
    applied = built.transform.applied and isinstance(built, Lifted)
    with torchlift.capture("intermediates") if capture else nullcontext({}) as sown:
        if applied:
            before = _snapshot(built.module)
            out, state, values = built.apply(args, {}) if call is None else call(*args)
            assert _snapshot(built.module) == before
            sown = tree_of(values) if capture else {}
        elif built.transform.applied:
            out, state = built.apply(args)
        else:
            out = (call or built)(*args)
            state = built.state
    drawn = torch.rand(2)
    found = outputs(out, {key: value.detach().clone() for key, value in state.items()})
    found |= _backward(built, args, out)
    return found | {"drawn after": drawn} | _sown(built, sown)


def _sown(built, store):
    """Sown values, those of a loop stacked."""
    values = [value for named in store.get("intermediates", {}).values() for value in named]
    if not values:
        return {}
    return {"sown": torch.stack(values).reshape(-1, *values[0].shape[-2:])}


def eager(cell):
    twin = Twin(cell.transform, cell.module)
    rest = torch.get_rng_state()
    lifted = Lifted(cell.transform, cell.module, cell.form)
    if not cell.transform.tied:
        assert torch.equal(torch.get_rng_state(), rest), "construction drew otherwise than the loop of constructors"
    for _ in range(2):  # the second call starts from the state that the first one left
        compare(_run(lifted), _run(twin), cell.transform.bitwise)


def compiled(cell):
    lifted, twin = Lifted(cell.transform, cell.module, cell.form, ENGINE), Twin(cell.transform, cell.module)
    call = (lambda *args: lifted.apply(args, {})) if cell.transform.applied else lifted
    got = _run(lifted, torch.compile(call, fullgraph=True, backend="aot_eager"), capture=False)
    compare(got, _run(twin, capture=False), False)


def engine(cell):
    lifted = Lifted(cell.transform, cell.module, cell.form, ENGINE)
    got = _run(lifted)
    assert cell.module.hooked or last_report().path == "compiled", last_report().reason
    compare(got, _run(Twin(cell.transform, cell.module)), False)


def outer_grad(cell):
    lifted, twin = Lifted(cell.transform, cell.module, cell.form), Twin(cell.transform, cell.module)
    args, twin_args = arguments(cell.transform.shapes), arguments(cell.transform.shapes)
    trained = {key: p.detach() for key, p in lifted.params.items() if p.requires_grad}

    def f(params, args):
        out, state, _ = lifted.apply(args, tree_of(params))
        return loss(out), (tensors(out), state)

    torch.manual_seed(2)
    (param_grads, arg_grads), (out, state) = grad(f, argnums=(0, 1), has_aux=True)(trained, [a.detach() for a in args])
    got = outputs(out, state)
    torch.manual_seed(2)
    want_out, want_state = twin.apply(twin_args)
    want = outputs(want_out, want_state) | _backward(twin, twin_args, want_out)
    for (_, name), value in param_grads.items():
        got[f"grad of {name}"] = value
    got |= {f"grad of argument {at}": value for at, value in enumerate(arg_grads)}
    got |= {name: None for name in want if name.startswith("grad") and name not in got and want[name] is None}
    if lifted.extra:  # a tensor of the surroundings: its gradient is ordinary autograd's
        wanted = [want[f"grad of extra {at}"] for at in range(len(lifted.extra))]
        _forget(*lifted.extra)
        loss(out).backward()
        got |= {f"grad of extra {at}": p.grad for at, p in enumerate(lifted.extra)}
        want |= {f"grad of extra {at}": value for at, value in enumerate(wanted)}
    compare(got, want, False)


def _over_rows(cell, twin, args):
    """The twin of an outer vmap: a loop over rows, or torch's own where masks are drawn for all rows at once."""
    if cell.module.draws:
        return vmap(lambda *args: tensors(twin(*args)), randomness="different")(*args), {}
    rows = [twin.apply([arg[row] for arg in args]) for row in range(args[0].shape[0])]
    out = [torch.stack(column) for column in zip(*(tensors(out) for out, _ in rows))]
    return out, {key: torch.stack([state[key] for _, state in rows]) for key in rows[0][1]}


def outer_vmap(cell, direct=False):
    lifted, twin = Lifted(cell.transform, cell.module, cell.form), Twin(cell.transform, cell.module)
    args, twin_args = arguments(cell.transform.shapes, batch=(2,)), arguments(cell.transform.shapes, batch=(2,))
    state = {key: value.expand(2, *value.shape).clone() for key, value in lifted.state.items()}

    def f(args, state):
        out, state, _ = lifted.apply(args, tree_of(state))
        return tensors(out), state

    torch.manual_seed(2)
    if direct:
        out, updated = vmap(lambda *args: tensors(lifted(*args)), randomness="different")(*args), {}
    else:
        out, updated = vmap(f, randomness="different")(args, state)
    got = outputs(out, updated) | _backward(lifted, args, out)
    torch.manual_seed(2)
    out, updated = _over_rows(cell, twin, twin_args)
    compare(got, outputs(out, {} if direct else updated) | _backward(twin, twin_args, out), False)


def outer_vmap_direct(cell):
    outer_vmap(cell, direct=True)


def threads(cell):
    lifted, twin = Lifted(cell.transform, cell.module, cell.form), Twin(cell.transform, cell.module)
    if cell.module.draws:  # threads share torch's generators, here and in a plain loop
        lifted.eval(), twin.eval()
    args = [arguments(cell.transform.shapes, seed) for seed in range(2)]
    want = []
    for one in args:
        out, state = twin.apply(one)
        want.append(outputs(out, state) | {"grad": torch.autograd.grad(loss(out), one[0])[0]})
    before = _snapshot(lifted.module)
    barrier = threading.Barrier(2)
    found = {}

    def work(number):
        try:
            barrier.wait()
            for _ in range(3):
                out, state, _ = lifted.apply(args[number], {})
                found[number] = outputs(out, state) | {"grad": torch.autograd.grad(loss(out), args[number][0])[0]}
        except BaseException as error:
            found[number] = error

    both = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for number in range(2):
        if isinstance(found[number], BaseException):
            raise found[number]
        compare(found[number], want[number], cell.transform.bitwise)
    assert _snapshot(lifted.module) == before


def raises(cell):
    lifted, twin = Lifted(cell.transform, cell.module, cell.form), Twin(cell.transform, cell.module)
    before = _snapshot(lifted.module)
    for stage in {0, cell.transform.calls - 1}:
        FUSE.left = stage
        try:
            with torchlift.capture("intermediates") as sown:
                _run(lifted)
            raise AssertionError("the forward that fails was not called")
        except Burnt:
            pass
        finally:
            FUSE.left = None
        assert not sown
        assert _snapshot(lifted.module) == before
    compare(_run(lifted), _run(twin), cell.transform.bitwise)


def _snapshot(module):
    """All that a call could leave on a module: which tensors it holds, what is in them, and every other attribute."""
    return [
        (path, key, id(value), value._version, value.grad, value.tolist())
        if isinstance(value, torch.Tensor)
        else (path, key, id(value))
        for path, owner in module.named_modules()
        for fields in (owner.__dict__, owner._parameters, owner._buffers, owner._modules)
        for key, value in fields.items()
    ]


CONTEXTS = {
    "eager": eager,
    "func.grad outside": outer_grad,
    "func.vmap outside": outer_vmap_direct,
    "func.vmap outside, through apply": outer_vmap,
    "compiled": compiled,
    "engine": engine,
    "two threads": threads,
    "raise midway": raises,
}
