"""What a policy keeps and what it computes again: bytes held after the forward, operators run in the backward."""

import pytest
import torch
from torch import func
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from torchlift.engine.policies import checkpoint_name, checkpoint_policies
from torchlift.engine.remat import checkpointed, inline_remat
from torchlift.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("float64")
aten = torch.ops.aten


class Watch(TorchDispatchMode):
    """Every operator that runs, and every storage that one returns."""

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __init__(self):
        super().__init__()
        self.ops, self.storages = [], {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.ops.append(op)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                self.storages[ref.cdata] = ref, tensor.untyped_storage().nbytes()
        return out

    def count(self, *ops):
        return sum(op in ops for op in self.ops)


def saved_bytes(fn, *args):
    """(result, bytes that ``fn(*args)`` made and that live on, without those of the arguments and the result)."""
    with Watch() as watch:
        out = fn(*args)
    own = {StorageWeakRef(t.untyped_storage()).cdata for t in (*args, *tree_leaves(out)) if isinstance(t, torch.Tensor)}
    return out, sum(size for ref, size in watch.storages.values() if ref.cdata not in own and not ref.expired())


STEPS, ROWS, WIDTH = 4, 32, 64
UNIT = ROWS * WIDTH * 8  # one activation


def body(w, x):
    for _ in range(STEPS):
        h = checkpoint_name(x @ w, "h")
        x = torch.tanh(torch.sin(h)) + x
    return x.sum()


@pytest.fixture
def wx(float64):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(WIDTH, WIDTH, generator=generator) / 8
    x = torch.randn(ROWS, WIDTH, generator=generator)
    return w.requires_grad_(), x.requires_grad_()


policies = checkpoint_policies
HOST = {"offload_src": "device", "offload_dst": "pinned_host"}


def mm_only(ctx, op, *args, **kwargs):
    return op is aten.mm.default


# (policy, activations kept, products and sines run in backward in each step)
KEPT = {
    "plain": ("plain", 3 * STEPS - 1, 2, 0),  # x, h and the result of tanh; the first x is the argument
    "default": (None, 0, 3, 1),
    "nothing": (policies.nothing_saveable, 0, 3, 1),
    "everything": (policies.everything_saveable, 3 * STEPS - 1, 2, 0),
    "dots": (policies.dots_saveable, STEPS, 2, 1),
    "checkpoint_dots": (policies.checkpoint_dots, STEPS, 2, 1),
    "no batch": (policies.dots_with_no_batch_dims_saveable, STEPS, 2, 1),
    "own": (mm_only, STEPS, 2, 1),
    "h": (policies.save_only_these_names("h"), STEPS, 2, 1),
    "other": (policies.save_only_these_names("other"), 0, 3, 1),
    "all names but h": (policies.save_any_names_but_these("h"), 0, 3, 1),
    "all names but another": (policies.save_any_names_but_these("other"), STEPS, 2, 1),
    "everything but h": (policies.save_anything_except_these_names("h"), 3 * STEPS, 3, 0),
    "either": (policies.save_from_both_policies(policies.nothing_saveable, policies.dots_saveable), STEPS, 2, 1),
    "offload dots": (policies.offload_dot_with_no_batch_dims("device", "pinned_host"), STEPS, 2, 1),
}


@pytest.mark.parametrize("name", KEPT)
def test_bytes_and_operators(name, wx):
    policy, kept, products, sines = KEPT[name]
    expected = torch.autograd.grad(body(*wx), wx)
    out, held = saved_bytes(body if policy == "plain" else checkpointed(body, policy), *wx)
    assert held == kept * UNIT
    with Watch() as watch:
        first = torch.autograd.grad(out, wx, retain_graph=True)
    assert watch.count(aten.mm.default) == products * STEPS
    assert watch.count(aten.sin.default) == sines * STEPS
    for got in (first, torch.autograd.grad(out, wx)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_offload_by_name(wx):
    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["h"], **HOST
    )
    out = checkpointed(body, policy)(*wx)
    with Watch() as watch:
        got = torch.autograd.grad(out, wx)
    assert watch.count(aten.mm.default) == 2 * STEPS
    assert watch.count(aten.clone.default) == STEPS  # brought back
    assert all(torch.equal(a, b) for a, b in zip(got, torch.autograd.grad(body(*wx), wx)))


def test_inside_transforms_the_memory_is_the_arguments(wx):
    w, x = (t.detach() for t in wx)

    def held(run):
        (_, pull), size = saved_bytes(lambda w, x: func.vjp(run, w, x), w, x)
        return size

    assert held(body) >= 3 * STEPS * UNIT - UNIT
    assert held(checkpointed(body)) <= UNIT


def equal_gradients(fn, policy, *args):
    outcomes = []
    for run in (fn, checkpointed(fn, policy)):
        torch.manual_seed(0)
        outcomes.append(torch.autograd.grad(run(*args), args))
    return all(torch.equal(a, b) for a, b in zip(*outcomes))


def test_what_is_written_to_is_not_kept(wx):
    fn = lambda w, x: ((x @ w).relu_() @ w).sin_().sum()  # noqa: E731
    assert equal_gradients(fn, policies.dots_saveable, *wx)
    fn = lambda w, x: (checkpoint_name((x @ w).relu_(), "a") @ w).sum()  # noqa: E731
    assert equal_gradients(fn, policies.save_only_these_names("a"), *wx)


def test_random_draws_are_repeated_not_kept(wx):
    def fn(w, x):
        return (F.dropout(x @ w, 0.5) * F.dropout(x, 0.3) * torch.rand(WIDTH)).sum()

    assert equal_gradients(fn, policies.save_anything_except_these_names(), *wx)
    assert equal_gradients(fn, lambda ctx, op, *args, **kwargs: "drop" in str(op) or "bernoulli" in str(op), *wx)


def test_a_named_view_keeps_what_it_is_a_view_of(wx):
    def fn(w, x):
        h = checkpoint_name((x @ w).view(2, -1, WIDTH).transpose(0, 1), "a")
        return h.sin().sum()

    policy = policies.save_only_these_names("a")
    assert equal_gradients(fn, policy, *wx)
    out, held = saved_bytes(checkpointed(fn, policy), *wx)
    assert held == UNIT
    with Watch() as watch:
        torch.autograd.grad(out, wx)
    assert watch.count(aten.mm.default) == 2


def test_named_attention_is_not_repeated(wx):
    def fn(w, x):
        q = (x @ w).view(1, 2, ROWS // 2, WIDTH)
        return checkpoint_name(F.scaled_dot_product_attention(q, q, q), "context").sin().sum()

    policy = policies.save_only_these_names("context")
    assert equal_gradients(fn, policy, *wx)
    out = checkpointed(fn, policy)(*wx)
    with Watch() as watch:
        torch.autograd.grad(out, wx)
    assert not watch.count(aten._scaled_dot_product_flash_attention_for_cpu.default)


def test_two_backwards_over_one_region_without_retain_graph(wx):
    fn = lambda w, x: ((x @ w).sin().sum(), (x @ w).cos().sum())  # noqa: E731
    expected = [torch.autograd.grad(out, wx[0])[0] for out in fn(*wx)]
    outs = checkpointed(fn, policies.dots_saveable)(*wx)
    assert [torch.equal(torch.autograd.grad(out, wx[0])[0], e) for out, e in zip(outs, expected)] == [True, True]


def test_dots():
    a, one = torch.ones(4, 2, 2), torch.ones(1, 2, 2)
    yes, no_batch = policies.dots_saveable, policies.dots_with_no_batch_dims_saveable
    assert yes(None, aten.bmm.default, a, a) and not no_batch(None, aten.bmm.default, a, a)
    assert no_batch(None, aten.bmm.default, one, one) and no_batch(None, aten.baddbmm.default, one, one, one)
    assert not yes(None, aten.convolution.default) and not yes(None, aten.sin.default, a)


def test_either_policy():
    both = policies.save_from_both_policies
    name = torch.ops.torchlift.checkpoint_name.default
    one = both(policies.save_anything_except_these_names("a"), policies.save_only_these_names("a"))
    assert one(None, name, torch.ones(1), "a") is CheckpointPolicy.MUST_SAVE
    one = both(policies.nothing_saveable, policies.offload_dot_with_no_batch_dims("device", "pinned_host"))
    assert one(None, aten.mm.default, torch.ones(1, 1), torch.ones(1, 1)) is CheckpointPolicy.MUST_CPU_OFFLOAD


def test_refusals():
    with pytest.raises(UnsupportedError, match="offload from 'device' to 'disk', expected .*'pinned_host'"):
        policies.offload_dot_with_no_batch_dims("device", "disk")
    with pytest.raises(UnsupportedError, match=r"\['b'\] are in names_which_can_be_saved and in"):
        policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["a", "b"], names_which_can_be_offloaded=["b"], **HOST
        )


def test_checkpoint_name_takes_trees():
    tree = {"a": torch.ones(2), "b": (3, None)}
    assert checkpoint_name(tree, "t") is tree


# --- graphs -------------------------------------------------------------------------------------------------------

# The activations that compiled code keeps; None where the partitioner decides.
COMPILED = {
    "plain": None,
    "default": 0,
    "dots": STEPS,
    "h": STEPS,
    "other": 0,
    "offload dots": STEPS,
}


def check_compiled(call, wx, backend, kept=None):
    expected = body(*wx)
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    compiled(*wx).backward()  # compile first: what the compiler makes is not what the call keeps
    out, held = saved_bytes(compiled, *wx)
    assert kept is None or held == kept * UNIT
    got = torch.autograd.grad(out, wx)
    for a, b in zip((out, *got), (expected, *torch.autograd.grad(expected, wx))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, wx):
    call = body if name == "plain" else checkpointed(body, KEPT[name][0])
    check_compiled(lambda w, x: call(w, x) * 1, wx, "aot_eager", COMPILED[name])


def test_compiled_where_region_and_policy_are_made_inside(wx):
    def call(w, x):
        policy = policies.save_from_both_policies(policies.nothing_saveable, policies.save_only_these_names("h"))
        return checkpointed(body, policy)(w, x)

    check_compiled(call, wx, "aot_eager", STEPS)


def test_compiled_by_inductor(wx):
    check_compiled(checkpointed(body, policies.save_only_these_names("h")), wx, "inductor", STEPS)


TRANSFORMED = {
    "grad": lambda f, w, x: func.grad(f)(w, x),
    "vmap": lambda f, w, x: func.vmap(f, (None, 0))(w, x),
    "vmap of grad": lambda f, w, x: func.vmap(func.grad(f), (None, 0))(w, x),
    "jvp": lambda f, w, x: func.jvp(lambda w: f(w, x), (w,), (w,))[1],
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_compiled_inside_a_transform(name, wx):
    w, x = (t.detach() for t in wx)
    run, call = TRANSFORMED[name], checkpointed(body, policies.save_only_these_names("h"))
    got = torch.compile(lambda w, x: run(call, w, x), backend="aot_eager", fullgraph=True)(w, x)
    torch.testing.assert_close(got, run(body, w, x), rtol=1e-12, atol=1e-12)


def test_inline_remat(wx):
    seen = []

    class Annotate:
        def __init__(self, policy):
            self.policy = policy

        def __enter__(self):
            seen.append(self.policy)

        def __exit__(self, *error):
            seen.append("end")

    with inline_remat(Annotate):
        out = checkpointed(body, policies.dots_saveable)(*wx)
    assert seen == [policies.dots_saveable, "end"]
    with inline_remat():
        _, held = saved_bytes(checkpointed(body), *wx)
    assert held == (3 * STEPS - 1) * UNIT
    assert torch.equal(checkpointed(body)(*wx), out)


def test_a_name_is_an_operator_in_a_graph(wx):
    from torch.fx.experimental.proxy_tensor import make_fx

    w, x = (t.detach() for t in wx)
    with inline_remat():
        graph = make_fx(lambda w, x: checkpointed(body)(w, x))(w, x)
    names = [n for n in graph.graph.nodes if n.target is torch.ops.torchlift.checkpoint_name.default]
    assert [n.args[1] for n in names] == ["h"] * STEPS
    assert torch.equal(graph(w, x), body(w, x))
