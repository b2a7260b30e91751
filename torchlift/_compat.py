"""The only file that imports private parts of torch, with a guard where releases differ."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import itertools
import os
import re
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

try:
    from torch.distributed.device_mesh import _mesh_resources
except ImportError:  # a build without torch.distributed
    _mesh_resources = None  # type: ignore[assignment]


_HOOKS = [
    getattr(nn_module, f"_global_{kind}_hooks") for kind in ("forward_pre", "forward", "backward_pre", "backward")
]


def has_global_hooks() -> bool:
    """Whether any hooks are called for all modules, beside those of ``torchlift.capture``, which tell only names."""
    if not any(_HOOKS):
        return False
    found = [hook for hooks in _HOOKS for hook in list(hooks.values())]  # other threads add and remove some
    return any(not (getattr(hook, "__module__", None) or "").startswith("torchlift.") for hook in found)


def parametrizations_are_cached() -> bool:
    """Whether ``torch.nn.utils.parametrize.cached()`` is in effect."""
    return parametrize._cache_enabled > 0


def uncached(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` without that cache, which is by the address of a module: those that bodies run on come and go."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before = parametrize._cache_enabled
        parametrize._cache_enabled -= before
        try:
            return fn(*args, **kwargs)
        finally:
            parametrize._cache_enabled += before  # it is a count of all threads

    return run


def functorch_active() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, jvp, functionalize) is in effect."""
    # Not peek_interpreter_stack: in Dynamo's eyes that is never None.
    return torch._C._are_functorch_transforms_active()


def forward_ad_active() -> bool:
    """Whether a level of ``torch.autograd.forward_ad`` is open."""
    return torch.autograd.forward_ad._current_level >= 0


def run_on_fakes(fn: Callable[..., Any], *trees: Any) -> Any:
    """``fn`` of trees of tensors without storage: shapes and dtypes come out, nothing is computed or drawn."""
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
    mode.only_shapes = True
    fakes = pytree.tree_map_only(torch.Tensor, lambda t: t if is_fake(t) else mode.from_tensor(t.detach()), trees)
    with mode, torch.no_grad():
        return fn(*fakes)


def are_only_shapes_wanted() -> bool:
    """Whether this code runs in :func:`run_on_fakes`, and no graph is made of it."""
    return not is_compiling() and getattr(_fake_mode(), "only_shapes", False)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a fake tensor (shape, dtype and device without data)."""
    return isinstance(tensor, torch._subclasses.FakeTensor)


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` belongs to a capture: a fake one, or AOTAutograd's wrapper around one."""
    return is_fake(tensor) or isinstance(tensor, torch._subclasses.functional_tensor.FunctionalTensor)


# Dynamo of torch 2.11 does not walk the __dict__ of a module, nor give one to a function that it calls at trace time,
# and takes no notice of the setter of a property. That of 2.12 lets a checkpoint or a loop set nothing around it, even
# for a while, as entering a body does. (Versions are compared here, not text.)
TRACES_SETTERS = torch.__version__ >= "2.12"
TRACES_MODULES = torch.__version__ >= "2.13"
NOT_TRACED = (
    "torch.compile before torch 2.13 cannot trace a lifted module; leave out fullgraph=True, so that it runs between "
    "two graphs and compiles its own loops, or use torch 2.13"
)


def outside_of_graphs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, which works on lifted modules: no graph of ``torch.compile`` holds it where Dynamo cannot trace it."""
    return fn if TRACES_MODULES else torch.compiler.disable(fn, reason=NOT_TRACED)


# NOTE [Broken graphs]. Where a graph breaks in a user's body, Dynamo goes on in Python, and compiles by itself every
# function that is called from there: ours too, once for each module that they see, until its limit. So it is told to
# leave them alone where it does not meet them in a trace. What a user calls is as it was, and what runs loops, which
# leaves the trace by itself.
_MET = ("engine", "lifting", "scan_layers", "layer_calls", "enrolling", "transforms")
_INNER = ("torchlift.transforms.vmap", "torchlift.transforms.map_variables")


def leave_to_python() -> None:
    """While Dynamo traces: has it compile none of the package's inner functions by themselves."""
    if not _left:
        public = sys.modules["torchlift"].__all__
        others = tuple(f"torchlift.{name}" for name in _MET)
        names = [name for name in sys.modules if name.startswith("torchlift.") and not name.startswith(others)]
        for module in map(sys.modules.__getitem__, [*names, *_INNER]):
            values = [value for name, value in vars(module).items() if name not in public]
            own = [value for value in values if getattr(value, "__module__", None) == module.__name__]
            _leave([*own, *(member for value in own if isinstance(value, type) for member in vars(value).values())])
        _left.append(True)


leave_to_python._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo calls it, rather than trace it
_left: list[bool] = []
_FOLDER = __file__.removesuffix("_compat.py")


def _leave(functions: list[Any]) -> None:
    from torch._C._dynamo.eval_frame import set_code_exec_strategy
    from torch._dynamo.types import FrameAction, FrameExecStrategy

    strategy = FrameExecStrategy(FrameAction.SKIP, FrameAction.DEFAULT)
    for function in functions:
        code = getattr(getattr(function, "fget", function), "__code__", None)
        # That of a decorator may be all the process's.
        codes = [code] if code is not None and code.co_filename.startswith(_FOLDER) else []
        for code in codes:  # which grows: functions in functions
            set_code_exec_strategy(code, strategy)
            codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]


NormBase = torch.nn.modules.batchnorm._NormBase
BatchNorm = torch.nn.modules.batchnorm._BatchNorm


# --- the engine: what is in effect around a call ------------------------------------------------------------------


def dispatch_modes_active() -> bool:
    """Whether a ``TorchDispatchMode`` sees every operator (its author would not see those inside a graph)."""
    return torch._C._len_torch_dispatch_stack() > 0


def function_modes() -> list[Any]:
    """The ``TorchFunctionMode`` stack, but for the default device."""
    if not torch._C._len_torch_function_stack():
        return []
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]


def compiler_forbidden() -> str | None:
    """Why ``torch.compile`` is switched off in this process, or None."""
    from torch._dynamo import config, eval_frame

    stance = _stance_outside[0] if _stance_outside else eval_frame._stance
    if stance.stance == "force_eager":
        return "torch.compiler.set_stance('force_eager')"
    if config.disable:
        return "torch.compile is disabled (TORCH_COMPILE_DISABLE)"
    return None


def saved_tensor_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The innermost pack and unpack of ``torch.autograd.graph.saved_tensors_hooks``, if any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


@contextlib.contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """A block in which nothing that autograd saves is given to the hooks around it: a capture is none of theirs."""
    popped = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        popped.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(popped):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def backward_keeps_graph() -> bool:
    """Inside a backward: whether it was called with ``retain_graph=True``."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


# --- the engine: graphs -------------------------------------------------------------------------------------------


def new_fake_mode(symbolic: bool) -> FakeTensorMode:
    """A fake tensor mode; ``symbolic`` ones can stand for many sizes.

    NOTE [python dispatcher]: static captures carry no ``ShapeEnv``, so that torch does not trace through its Python
    dispatcher.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv() if symbolic else None, allow_non_fake_inputs=True)


def to_fake(mode: FakeTensorMode, like: torch.Tensor, dynamic_dims: frozenset[int], name: str) -> torch.Tensor:
    """A fake of the size, stride, dtype and device of ``like``, the given dimensions symbolic."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    # A fresh tensor: ``like`` may be a view, and its base would be drawn into the fake.
    blank = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=like.device)
    if mode.shape_env is None:
        return mode.from_tensor(blank)
    sizes = [DimDynamic.DYNAMIC if d in dynamic_dims else DimDynamic.STATIC for d in range(like.ndim)]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(blank, symbolic_context=context, source=ConstantSource(name))


def guards_of(mode: FakeTensorMode, fakes: list[torch.Tensor]) -> str | None:
    """The conditions on sizes under which a capture with ``fakes`` holds, for :func:`guards_hold`."""
    from torch._dynamo.source import LocalSource

    # Static sizes too: a symbolic size that tracing fixed after all counts as static.
    env: Any = mode.shape_env
    if not env:
        return None
    # Each in brackets, for some are ``a or b``: env.produce_guards_expression would join them with a bare "and".
    sources = [LocalSource(f"t{i}") for i in range(len(fakes))]
    return " and ".join(f"({guard})" for guard in env.produce_guards(fakes, sources, ignore_static=False)) or None


def guards_hold(mode: FakeTensorMode, guards: str | None, tensors: list[torch.Tensor]) -> bool:
    """Whether ``tensors`` meet ``guards``, wherever in their storage they begin."""
    if not guards:
        return True
    blanks = [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta") for t in tensors]
    env: Any = mode.shape_env
    return env.evaluate_guards_expression(guards, blanks)


_stance_outside: list[Any] = []  # what the stance was before a capture changed it


@contextlib.contextmanager
def dynamo_off() -> Iterator[None]:
    """Functions under ``torch.compile`` run as they are: a capture traces through them, and waits for no compiler.

    The stance is one for all threads. Another thread that calls a compiled function meanwhile runs it in eager, and
    :func:`compiler_forbidden` tells it what the user's stance is.
    """
    from torch._dynamo import eval_frame

    before = eval_frame._stance
    _stance_outside.append(before)
    eval_frame._stance = eval_frame.DynamoStance("force_eager")
    try:
        yield
    finally:
        eval_frame._stance = before
        _stance_outside.pop()


def autocast_off() -> Any:
    """A block without autocast, of any device."""
    return torch._C._DisableAutocast()


def size_hint(size: int | torch.SymInt) -> int:
    """The size as it was when captured; to ask a symbolic size itself would fix it."""
    return size if isinstance(size, int) else size.node.hint


def joint_graph(fn: Callable[..., Any], fakes: list[torch.Tensor], train: bool, inductor: bool) -> torch.fx.GraphModule:
    """``fn(*fakes) -> list`` as a graph of ATen operators: ``(outputs, gradients)`` if ``train``, else the outputs."""
    from torch._functorch import config
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._inductor.decomposition import select_decomp_table

    decompositions = select_decomp_table() if inductor else {}
    # Backward runs outside of the autocast region, as eager's does.
    with config.patch(backward_pass_autocast="off"), torch.fx.traceback.preserve_node_meta():
        graph: Any = aot_export_joint_simple(fn, tuple(fakes), trace_joint=train, decompositions=decompositions)
    return graph


def partition(
    joint: torch.fx.GraphModule, fakes: list[Any], outputs: int, inductor: bool, held: list[int]
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Cuts a joint graph in a forward and a backward, minimising what passes between them; inputs ``held`` are free."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import partition_fn

    cut: Any = partition_fn if inductor and fakes else min_cut_rematerialization_partition
    return cut(joint, fakes, num_fwd_outputs=outputs, static_lifetime_input_indices=held)


def marked(mark: int) -> contextlib.AbstractContextManager[None]:
    """A block of a function that :func:`joint_graph` captures, whose nodes :func:`mark_of` tells from others."""
    return torch.fx.traceback.annotate({"torchlift": mark})


def mark_of(node: torch.fx.Node) -> int | None:
    """The mark of the block that ``node`` was captured in."""
    return node.meta.get("custom", {}).get("torchlift")


@contextlib.contextmanager
def checkpoints_seen(enter: Callable[[Any], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """In this block and thread ``torch.utils.checkpoint`` is ``enter(policy)`` around its function, and no more.

    A capture meets no hooks of saved tensors: what such a function computes would be kept like everything else.
    """
    from torch.utils import checkpoint

    thread, begin = threading.get_ident(), checkpoint._checkpoint_without_reentrant_generator

    def around(fn: Any, preserve: bool, context_fn: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        policy: Any = None
        if getattr(context_fn, "func", None) is checkpoint.create_selective_checkpoint_contexts:
            policy = (*context_fn.args, *context_fn.keywords.values())[0]  # a function, or operators to keep
        if isinstance(policy, (list, tuple)):
            policy = functools.partial(_is_among, frozenset(policy))
        if threading.get_ident() != thread or (policy is None and context_fn is not checkpoint.noop_context_fn):
            yield from begin(fn, preserve, context_fn, *args, **kwargs)
        else:
            with enter(policy):
                yield

    with patch.object(checkpoint, "_checkpoint_without_reentrant_generator", around):
        yield


def _is_among(kept: frozenset[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
    return op in kept


class Inductor:
    """What Inductor needs around it while the graphs of one capture are traced, partitioned and compiled."""

    def __init__(self, mode: FakeTensorMode, options: dict[str, Any]) -> None:
        self.mode, self.options = mode, options

    def __enter__(self) -> Inductor:
        from torch._guards import TracingContext, tracing

        with warnings.catch_warnings():  # of what torch deprecates and uses: nothing would compile with -W error
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch._inductor import compile_fx as compile_fx
        from torch._inductor import config
        from torch._inductor.codecache import CppWrapperCodeCache
        from torch._inductor.cpu_vec_isa import VecISA
        from torch._inductor.virtualized import V

        self.stack = contextlib.ExitStack()
        self.stack.enter_context(V.set_fake_mode(self.mode))
        self.stack.enter_context(tracing(TracingContext(self.mode)))
        optimism = _optimism()
        self.stack.enter_context(config.patch(optimism | self.options))
        if self.mode.shape_env is not None:
            # Its cache keeps guards on sizes that are inputs of the graph. Here sizes come with the tensors alone, and
            # what it found would be a program for other sizes, which nothing tells from these.
            self.stack.enter_context(config.patch({"fx_graph_cache": False, "fx_graph_remote_cache": False}))
            self.stack.enter_context(_convolutions_of_any_size())
        if optimism:
            self.stack.enter_context(patch.object(VecISA, "check_build", lambda self, code: True))
        # The program of the forward is built while Inductor turns to the backward.
        self.thread, self.load = threading.get_ident(), CppWrapperCodeCache.load_pybinding
        self.stack.enter_context(patch.object(CppWrapperCodeCache, "load_pybinding", self._build))
        self.builders = self.stack.enter_context(ThreadPoolExecutor(2))
        self.builds: list[tuple[Future[Any], list[Any]]] = []
        self.drivers: list[Any] = []
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()
        _programs().built.set()

    def _build(self, *args: Any, **options: Any) -> Callable[..., Any]:
        if threading.get_ident() != self.thread:  # what others compile
            return self.load(*args, **options)
        for driver in self.drivers:
            if driver.name in options["main_code"]:
                options |= {"main_code": driver(options["main_code"]), "num_outputs": driver.count}

        def build() -> Any:
            return _built(*args, **options)

        program: list[Any] = []
        self.builds.append((self.builders.submit(contextvars.copy_context().run, build), program))
        return lambda inputs: program[0](inputs)

    def in_parts(self, driver: Any) -> contextlib.AbstractContextManager[Any]:
        """Where a graph becomes a program of one thread; ``driver`` makes it one of several before it is built."""
        from torch._inductor import config

        self.drivers.append(driver)
        return config.patch({"cpp.threads": 1})

    def finish(self) -> None:
        """Waits for all that is built, and raises what went wrong."""
        for future, program in self.builds:
            program.append(future.result())

    def forward(
        self,
        graph: torch.fx.GraphModule,
        inputs: list[Any],
        visible: int,
        train: bool,
        last: Any,
        native: frozenset[str] | None,
    ) -> tuple[Callable[[list[Any]], Any], list[Any] | None]:
        """The compiled graph, called with a list that it empties, and its outputs' strides where they are known.

        ``last``, if given, puts the kernels in another order; it has its ``content``, to be cached by. ``native`` are
        the operators that C++ may call beside the kernels; None: Python calls everything.
        """
        from torch._guards import TracingContext
        from torch._inductor import config
        from torch._inductor.fx_passes.joint_graph import joint_graph_passes

        if not train and self.options.get("use_joint_graph_passes", True):
            graph = joint_graph_passes(graph)
        output = next(iter(reversed(graph.graph.nodes)))
        output.meta["user_visible_output_idxs"] = list(range(visible))
        # To save memory Inductor would order them once more.
        order = {} if last is None else {**_passes(last), "reorder_for_peak_memory": False}
        with TracingContext.report_output_strides() as strides, torch.no_grad(), autocast_off():
            with config.patch(order):
                compiled = _inductor_compile(graph, inputs, native, is_inference=not train)
        return compiled, strides

    def backward(
        self, graph: torch.fx.GraphModule, inputs: list[Any], native: frozenset[str] | None
    ) -> Callable[[list[Any]], Any]:
        output = next(iter(reversed(graph.graph.nodes)))
        nodes = output.args[0]
        output.meta["user_visible_output_idxs"] = [i for i, n in enumerate(nodes) if isinstance(n, torch.fx.Node)]
        with torch.no_grad(), autocast_off():
            return _inductor_compile(graph, inputs, native, is_backward=True)


@contextlib.contextmanager
def _convolutions_of_any_size() -> Iterator[None]:
    """Before Inductor calls torch for the backward of a convolution, it would make the sizes of the input constants."""
    from torch._inductor.kernel import conv
    from torch._inductor.lowering import lowerings

    op = torch.ops.aten.convolution_backward.default
    before = lowerings.get(op)
    called = getattr(conv, "aten_convolution_backward_fallback", before)  # not there before torch 2.13
    try:  # that key alone: others may add lowerings meanwhile
        if called is not None:
            lowerings[op] = called
        yield
    finally:
        if before is not None:
            lowerings[op] = before


def _inductor_compile(
    graph: torch.fx.GraphModule, inputs: list[Any], native: frozenset[str] | None, **kind: Any
) -> Callable[[list[Any]], Any]:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner, get_cpp_wrapper_config
    from torch._inductor.ir import FallbackKernel

    if native is None and not config.cpp_wrapper:
        return _boxed(compile_fx_inner(graph, inputs, **kind))
    thread, create = threading.get_ident(), FallbackKernel.create

    def create_known(op: Any, *args: Any, **kwargs: Any) -> Any:
        known = native is None or op.overloadpacket.__name__ in native or threading.get_ident() != thread
        if not known:  # for some dtypes operators have no kernel that have one for others
            raise NotImplementedError(f"{op} is called through torch's C interface")
        return create(op, *args, **kwargs)

    # As an option alone it does nothing.
    with config.patch(get_cpp_wrapper_config() | {"cpp_wrapper": True}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUTLASS backend")  # torch 2.12 tells of it even on a CPU
        with patch.object(FallbackKernel, "create", create_known):
            compiled: Any = compile_fx_inner(graph, inputs, cpp_wrapper=True, **kind)
    # Around it are a range for profiles and what tunes the kernels of GPUs: 5 us. A graph without operators has none.
    called = None if native is None else getattr(compiled, "current_callable", None)
    return called or _boxed(compiled)


def is_inductor_fallback(op: Any) -> bool:
    """Whether Inductor calls ``op`` as torch has it, for want of a kernel of its own."""
    from torch._inductor.lowering import fallbacks

    return op in fallbacks


def _passes(last: Any) -> dict[str, Any]:
    """The options that have Inductor call ``last``; that of torch before 2.13 has no way to tell one from another."""
    from torch._inductor import custom_graph_pass

    base = getattr(custom_graph_pass, "CustomSchedulerPass", None)
    if base is None:
        return {"_post_fusion_custom_pass": last, "fx_graph_cache": False}
    members = {"__call__": lambda self, kernels: last(kernels), "uuid": lambda self: last.content}
    return {"_post_fusion_custom_pass": type("Pass", (base,), members)()}


# NOTE [Instruction sets]. Before its first kernel Inductor builds and loads a program for each set of instructions that
# a processor has, to know whether the C++ compiler can use it: 7 s on a new machine. A compiler that builds torch's
# headers can. So compiled loops take it that it can, and have it asked only when a kernel could not be built.
_doubted = False


def _optimism() -> dict[str, Any]:
    from torch._inductor import config

    return {} if _doubted or config.cpp.vec_isa_ok is not None else {"cpp.vec_isa_ok": True}


def doubt_processor(error: Exception) -> bool:
    """Whether ``error`` may come of instructions that were not asked for; from now on they are."""
    from torch._inductor import cpu_vec_isa, exc

    global _doubted
    cause = getattr(error, "inner_exception", error)
    if not _optimism() or not isinstance(cause, exc.CppCompileError | ImportError | OSError):
        return False
    _doubted = True
    for asked in (cpu_vec_isa.valid_vec_isa_list, *(type(isa).__bool__ for isa in cpu_vec_isa.supported_vec_isa_list)):
        getattr(asked, "cache_clear", lambda: None)()
    for isa in cpu_vec_isa.supported_vec_isa_list:  # and the further sets that it was taken to have
        for name in [name for name in vars(isa) if name.startswith("_is_")]:
            delattr(isa, name)
    return True


# NOTE [Headers]. Half of the 2.8 s that a program of C++ takes to compile are torch's headers. Inductor precompiles a
# part of them, and has the first program on a machine wait 4 s for that. Here every header that programs include is
# precompiled, which leaves 1.4 s, but only after the first programs, which are built without. The compiler writes the
# file in place, and makes no use, and no mention, of one that is unfinished, as a process leaves it that is killed: it
# is removed. Programs of other flags than the first have headers made for these, and do wait.
_HEADERS = ("torch/csrc/inductor/cpp_wrapper/cpu.h", "torch/csrc/inductor/cpp_prefix.h", "c10/core/InferenceMode.h")


@functools.cache
def _programs() -> Any:
    """Inductor's cache of C++ programs, which has them compiled with ``headers`` once they are precompiled."""
    from torch._inductor.codecache import CppWrapperCodeCache

    class Programs(CppWrapperCodeCache):
        headers: str | None = None
        search: threading.Thread | None = None  # for the headers
        known = threading.Event()  # whether there are any from before
        built = threading.Event()  # the first programs

        @classmethod
        def _get_uncompiled_header(cls, device: str) -> str | None:
            return cls.headers if device == "cpu" else super()._get_uncompiled_header(device)

    return Programs


def _built(*args: Any, **options: Any) -> Any:
    """A program; with headers where there are any."""
    from torch._inductor.exc import CppCompileError

    programs = _programs()
    while programs.search is not None and programs.search.is_alive() and not programs.known.wait(1.0):
        pass  # a forked child has the event, but not the thread
    try:
        return programs.load_pybinding_async(*args, **options)()
    except CppCompileError as error:
        used = re.search(r"-include (\S+)", " ".join(error.cmd))
        if used is None:
            raise
    without: Any = type("Without", (programs,), {"headers": None, "cache": {}})
    program = without.load_pybinding_async(*args, **options)()
    programs.headers = None  # they were all that was wrong
    Path(f"{used[1]}.gch").unlink(missing_ok=True)
    return program


def _precompile_headers() -> None:
    """Has programs use the precompiled headers, which are made after the first programs where there are none."""
    from torch._inductor import codecache
    from torch.utils._filelock import FileLock

    programs, thread, compile_cpp = _programs(), threading.get_ident(), codecache._worker_compile_cpp

    def compile_whole(lock: str, builders: Any) -> None:
        file = Path(builders[0].get_target_file_path())
        if threading.get_ident() == thread and not _is_whole(file):
            programs.known.set()
            programs.built.wait()
            if sys.platform == "linux":  # where a thread has a priority of its own, and its children inherit it
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
            with FileLock(lock, timeout=codecache.LOCK_TIMEOUT):  # of a process that is making them
                if not _is_whole(file):
                    file.unlink(missing_ok=True)
        compile_cpp(lock, builders)

    used: Any = type("Used", (programs,), {"headers": ">\n#include <".join(_HEADERS)})
    try:
        with patch.object(codecache, "_worker_compile_cpp", compile_whole):
            used.load_pybinding_async([], "void inductor_entry_impl();", num_outputs=1)
        programs.headers = used.headers
    finally:
        programs.known.set()


def _is_whole(file: Path) -> bool:
    """Whether a precompiled header is there and finished; GCC writes its first bytes anew at the end."""
    if not file.exists():
        return False
    with file.open("rb") as opened:
        return opened.read(8) not in (b"", b"gpcWrite")


@functools.cache
def prepare_compiler(native: bool) -> None:
    """Looks for precompiled headers of C++ while a body is captured, and has them made where there are none."""
    from torch._inductor import codecache

    def prepare() -> None:
        with contextlib.suppress(Exception):  # that there is no compiler, say: who compiles will hear of it
            if native:
                _precompile_headers()
            else:
                codecache.CppPythonBindingsCodeCache.load_pybinding_async([], 'extern "C" void kernel() {}')

    thread = threading.Thread(target=contextvars.copy_context().run, args=(prepare,), daemon=True)
    if native:
        _programs().search = thread
    thread.start()


def inductor_mode_options(mode: str | None) -> dict[str, Any]:
    """The Inductor configuration that ``torch.compile(mode=...)`` stands for."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode)) if mode else {}


def registered_backend(name: str) -> Callable[..., Any]:
    """The ``torch.compile`` backend of that name."""
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)


def apply_node(function: type[torch.autograd.Function], given: tuple[Any, ...], tensors: list[torch.Tensor]) -> Any:
    """``function.apply(*given, *tensors)``, which in 10 us looks for transforms of ``torch.func``: there is none."""
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):  # by one that has ended
        return function.apply(*given, *tensors)
    return super(torch.autograd.Function, function).apply(*given, *tensors)  # type: ignore[misc]


def _boxed(compiled: Any) -> Callable[[list[Any]], Any]:
    if getattr(compiled, "_boxed_call", False):
        return compiled
    return lambda inputs: compiled(*inputs)


def is_compiling() -> bool:
    """Whether Dynamo is tracing this code."""
    return torch.compiler.is_dynamo_compiling()


def is_exporting() -> bool:
    """Whether ``torch.export`` traces: torch 2.11 has Dynamo take ``torch.compiler.is_exporting()`` for True."""
    return torch.compiler._is_exporting_flag


def is_tracing() -> bool:
    """Whether operators are being recorded or run on fake tensors, by Dynamo or otherwise, rather than computed."""
    if is_compiling() or torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None:
        return True
    return _fake_mode() is not None


def _fake_mode() -> Any:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def is_recording() -> bool:
    """Whether operators are being recorded in a graph, by other means than Dynamo."""
    return not is_compiling() and torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None


def functorch_level(tensor: torch.Tensor) -> int:
    """The level of the ``torch.func`` transform that wraps ``tensor``; -1 if none does."""
    if is_compiling():  # Dynamo knows of no levels, only whether a vmap wraps a tensor
        return 1 if torch._C._functorch.is_batchedtensor(tensor) else -1
    return torch._C._functorch.maybe_get_level(tensor)


def version(tensor: torch.Tensor) -> int:
    """How often ``tensor`` was written in place: not a wrapper that vmap makes, but what it wraps."""
    return versions([tensor])[0]


def versions(tensors: list[torch.Tensor]) -> list[int]:
    """The :func:`version` of each tensor, at a third of the time."""
    if is_compiling():
        return [0] * len(tensors)
    if not functorch_active():
        try:  # noqa: SIM105 - suppress takes as long as five versions
            return [tensor._version for tensor in tensors]
        except RuntimeError:  # an inference tensor has none
            pass
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    found = [plain(tensor) if wrapped(tensor) else tensor for tensor in tensors]
    return [-1 if tensor.is_inference() else tensor._version for tensor in found]


def dict_versions(dicts: list[dict[str, Any]]) -> list[int] | None:
    """Of each dict a number that is another one after each change of it; None from Python 3.12 on, which has none."""
    if sys.version_info >= (3, 12):
        return None
    return [*map(torch._C._dynamo.guards.dict_version, dicts)]


def tensor_guards(tensors: list[torch.Tensor]) -> Callable[..., bool]:
    """Whether as many others are like these: class, kind, dtype, device, size, strides and ``requires_grad``.

    No tensor may be there twice, and none may be nested, at which the process ends.
    """
    from torch._C._dynamo.guards import TensorGuards

    sizes: Any = [list(t.size()) for t in tensors]
    strides: Any = [list(t.stride()) for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


# --- the engine: rematerialisation --------------------------------------------------------------------------------


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """What is left of ``tensor`` without the wrappers of ``torch.func`` transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a ``torch.func`` transform put a wrapper around ``tensor``."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_tracked(tensor: torch.Tensor) -> bool:
    """Whether autograd, or a reverse-mode transform of ``torch.func``, may ask for a gradient of ``tensor``."""
    if is_compiling():  # what wraps a tensor is not known while Dynamo traces
        return functorch_active() or tensor.requires_grad
    while is_wrapped(tensor):
        if tensor.requires_grad:
            return True
        tensor = unwrapped_once(tensor)
    return tensor.requires_grad


def alive(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` without the wrapper of a ``torch.func`` transform that has ended, which another would stumble over."""
    return tensor if is_compiling() else torch._C._functorch.unwrap_if_dead(tensor)


def unwrapped_once(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` without the wrapper of the innermost ``torch.func`` transform around it."""
    return torch._C._functorch.get_unwrapped(tensor)


def without_ended(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` without the wrappers of ``torch.func`` transforms that have ended.

    Operators look through one such wrapper, but not through two.
    """
    while is_wrapped(tensor) and torch._C._functorch.maybe_get_level(tensor) == -2:
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def functorch_depth() -> int:
    """How many ``torch.func`` transforms are in effect; the level of the innermost."""
    return torch._C._functorch.maybe_current_level() or 0


def batched_marker() -> torch.Tensor | None:
    """A tensor that every ``vmap`` in effect maps, or None where there is none."""
    from torch._C._functorch import TransformType, _add_batch_dim
    from torch._functorch import pyfunctorch

    maps = [i for i in pyfunctorch.retrieve_all_functorch_interpreters() if i.key() == TransformType.Vmap]
    if not maps:
        return None
    with pyfunctorch.temporarily_clear_interpreter_stack():
        marker = torch.zeros([i.batch_size() for i in maps], dtype=torch.uint8)  # type: ignore[attr-defined]
    for interpreter in maps:  # outermost first, as wrappers nest
        marker = _add_batch_dim(marker, 0, interpreter.level())
    return marker


def tracked_alias(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.detach()`` that shares the count of in-place writes inside of a dispatch mode too."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def no_dispatch_modes() -> Any:
    """A context in which no ``TorchDispatchMode`` sees what runs."""
    return torch.utils._python_dispatch._disable_current_modes()


@functools.cache
def makes_fresh_results(op: Any) -> bool:
    """Whether an operator's results are new tensors: it returns no view and writes into nothing."""
    if not isinstance(op, torch._ops.OpOverload):
        return True  # a higher-order operator
    if writes_in_place(op) or op.namespace == "prim":
        return False
    returns = op._schema.returns
    return any("Tensor" in str(r.type) for r in returns) and all(r.alias_info is None for r in returns)


@functools.cache
def writes_in_place(op: Any) -> bool:
    """Whether an operator writes into an argument."""
    return isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable


def inductor_copies(op: Any) -> None:
    """Makes Inductor, where it is in use, take ``op(x, ...)`` for a copy of ``x``, which fuses with its neighbours."""
    if "torch._inductor.compile_fx" in sys.modules:
        from torch._inductor.lowering import clone, lowerings, register_lowering

        # Where it met the operator before, Inductor has already put an opaque call of it there.
        if getattr(lowerings.get(op), "__name__", "") != "copy_of_first":

            def copy_of_first(x: Any, *rest: Any) -> Any:
                return clone(x)

            register_lowering(op, type_promotion_kind=None)(copy_of_first)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.t() + bias`` of float32 by oneDNN; ``weight`` may lie in memory as it likes."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def inductor_products(op: Any) -> None:
    """Makes Inductor call :func:`onednn_linear` for ``op(a, b, bias)``, which is ``a @ b + bias``.

    Its own lowering of oneDNN's operator would first copy a weight that is transposed.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import lowerings, register_lowering

    if op in lowerings:
        return

    def product(a: Any, b: Any, bias: Any) -> Any:
        x = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(a))
        weight = lowerings[torch.ops.aten.permute.default](b, [1, 0])
        return pytree.tree_map(
            ir.TensorBox.create,
            ir.FallbackKernel.create(torch.ops.mkldnn._linear_pointwise.default, x, weight, bias, "none", [], ""),
        )

    register_lowering(op, type_promotion_kind=None)(product)


# --- collectives --------------------------------------------------------------------------------------------------


def mesh_dimensions() -> list[tuple[str, int, int, str]]:
    """Of the device mesh that this thread entered: each dimension's name, size, this process's number, and group."""
    stack = () if _mesh_resources is None else _mesh_resources.mesh_stack
    if not stack:
        return []
    mesh = stack[-1]
    names = mesh.mesh_dim_names or ()
    return [
        (name, mesh.size(at), mesh.get_local_rank(name), mesh.get_group(name).group_name)
        for at, name in enumerate(names)
    ]


def all_reduce(x: torch.Tensor, kind: str, group: str) -> torch.Tensor:
    """The ``"sum"``, ``"max"`` or ``"min"`` over the processes of a group, by an operator that graphs can hold."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), kind, group))


def all_gather(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    """What the ``size`` processes of a group have, stacked on a new first dimension."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(x.unsqueeze(0).contiguous(), size, group))


def kept_in_graphs(*functions: Callable[..., Any]) -> Callable[[], bool]:
    """What Dynamo has to call before it meets ``functions``, to put them into its graph without looking inside.

    Not done here and now: it imports Dynamo, which takes a second.
    """

    def allow() -> bool:
        import torch._dynamo

        for function in functions:
            torch._dynamo.allow_in_graph(function)
        return True

    allow._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo calls it, rather than trace it
    return allow


def vmap_of_lists(
    fn: Callable[[list[torch.Tensor]], list[torch.Tensor]], tensors: list[torch.Tensor], dims: list[int | None],
    size: int, randomness: str,
) -> list[torch.Tensor]:  # fmt: skip
    """``torch.func.vmap`` of a function of a list, that returns one; with the new axis in front.

    It walks through every tree several times, which takes as long as the mapped call of a small module.
    """
    from torch._functorch import vmap as functorch

    functorch.lazy_load_decompositions()
    # What torch's vmap calls looks each time for an export, which takes longer than what it does then.
    calls: Any = functorch if is_exporting() else torch._C._functorch
    level = calls._vmap_increment_nesting(size, randomness)
    try:
        rows = [t if d is None else calls._add_batch_dim(t, d % t.ndim, level) for t, d in zip(tensors, dims)]
        return [calls._remove_batch_dim(out, level, size, 0) for out in fn(rows)]
    finally:
        calls._vmap_decrement_nesting()


# --- rows of mapped axes ------------------------------------------------------------------------------------------


class MappedAxis(NamedTuple):
    """One ``vmap`` in effect. ``marker``, the number of the row, is a tensor that it maps, and no other."""

    level: int
    size: int
    randomness: str
    marker: torch.Tensor


def levels_of(tensor: torch.Tensor) -> list[int]:
    """The levels of all ``torch.func`` transforms that wrap ``tensor``, innermost first."""
    levels = []
    while is_wrapped(tensor):
        levels.append(torch._C._functorch.maybe_get_level(tensor))
        tensor = unwrapped_once(tensor)
    return levels


def mapped_levels(tensor: torch.Tensor) -> list[int]:
    """Those of :func:`levels_of` that are ``vmap``."""
    levels = []
    while is_wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            levels.append(torch._C._functorch.maybe_get_level(tensor))
        tensor = unwrapped_once(tensor)
    return levels


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether any ``vmap`` maps ``tensor``. That of ``is_grads_batched`` is another than that of ``torch.func``."""
    return torch._C._dispatch_keys(tensor).has(_OLD_VMAP) or len(mapped_levels(tensor)) > 0


_OLD_VMAP = torch._C._dispatch_key_parse("Batched")


def mapped_axes(tensor: torch.Tensor) -> list[MappedAxis]:
    """Each ``vmap`` that maps ``tensor``, outermost first."""
    from torch._C._functorch import TransformType, _add_batch_dim
    from torch._functorch import pyfunctorch

    levels = mapped_levels(tensor)
    found = []
    i: Any
    for i in pyfunctorch.retrieve_all_functorch_interpreters():
        if i.key() == TransformType.Vmap and i.level() in levels:
            with pyfunctorch.temporarily_clear_interpreter_stack():
                numbers = torch.arange(i.batch_size())
            marker = _add_batch_dim(numbers, 0, i.level())
            found.append(MappedAxis(i.level(), i.batch_size(), i.randomness(), marker))
    return found


# --- jit ----------------------------------------------------------------------------------------------------------


_compiled_apart = itertools.count()
_NO_LIMIT = 1 << 30
_one_at_a_time = threading.RLock()


def compile_apart(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` of a copy of ``fn`` with a cache of its own, that has no limit.

    Dynamo keeps what it compiled by code object, stops after eight, and takes a number that differs between functions
    of one name for an argument that varies. The copy has a code object and a name of its own.
    """
    code = fn.__code__.replace(co_name=f"{fn.__name__}_{next(_compiled_apart)}")
    copy = types.FunctionType(code, fn.__globals__, code.co_name, fn.__defaults__, fn.__closure__)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _NO_LIMIT
        return torch.compile(copy, **options)
    compiled: Any = torch.compile(copy, **options)

    # torch 2.11, where the limit is one for all, and no thread may call what is compiled while another one traces.
    def run(*args: Any) -> Any:
        with _one_at_a_time, torch._dynamo.config.patch(recompile_limit=_NO_LIMIT):
            return compiled(*args)

    return run


def capture_errors() -> tuple[type[BaseException], ...]:
    """What ``torch.compile(fullgraph=True)`` raises for a body that it cannot capture, or not once more."""
    dynamo = sys.modules.get("torch._dynamo")
    return () if dynamo is None else (dynamo.exc.Unsupported, dynamo.exc.UserError, dynamo.exc.FailOnRecompileLimitHit)


def comes_from_the_body(error: BaseException) -> bool:
    """Whether Dynamo gave up since the body itself raises."""
    from torch._dynamo.exc import ObservedException

    return isinstance(error.__cause__, ObservedException)


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """What to write into for ``tensor``, an input of a graph or a leaf, to be changed.

    NOTE [Scalars]. AOTAutograd (torch 2.13) takes an input of float64 without dimensions for a Python float and loses
    what is written into it, but not what is written into another tensor of the same memory.
    """
    return tensor.detach() if is_compiling() and tensor.ndim == 0 and tensor.dtype == torch.float64 else tensor


def memory_of(tensor: torch.Tensor) -> int:
    """What tells the memory that a tensor has, with others or alone, from all other."""
    plain_one = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return id(tensor) if not plain_one or functorch_active() or is_fake(tensor) else tensor.untyped_storage()._cdata


def all_equal(stack: torch.Tensor) -> bool:
    """Whether all slices of ``stack`` along axis 0 are equal; nan equals nan."""
    stack = plain(stack)
    return bool(((stack == stack[:1]) | ((stack != stack) & (stack[:1] != stack[:1]))).all())


def normal_tensors() -> contextlib.AbstractContextManager[Any]:
    """A block in which new tensors are no inference tensors."""
    if not is_compiling() and torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return contextlib.nullcontext()


# --- profiling ----------------------------------------------------------------------------------------------------


def is_profiling() -> bool:
    """Whether a profiler runs."""
    return torch.autograd._profiler_enabled()


def kept_in_order(*ops: Any) -> Callable[[], bool]:
    """What Dynamo has to call before it meets ``ops``, which return nothing, for compilers to keep them, in order."""

    def keep() -> bool:
        from torch._higher_order_ops import effects

        for op in ops:
            effects._register_effectful_op(op, effects._EffectType.ORDERED)
            torch.fx.node.has_side_effect(op)
        return True

    keep._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo calls it, rather than trace it
    return keep


def kept_in_loops(ops: tuple[Any, ...], number: Callable[..., None], order: Callable[..., Any]) -> Callable[[], bool]:
    """As :func:`kept_in_order`, for what torch's ``while_loop`` is given to run; False if Dynamo traces nothing such.

    At the end of the trace ``number`` gets the graph; ``order`` puts the kernels that Inductor makes in their order.
    """

    def keep() -> bool:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        if not traced_within("while_loop"):
            return False
        for op in ops:
            torch.fx.node.has_side_effect(op)
        output = InstructionTranslator.current_tx().output
        if number not in output.register_finalizer_fns:
            output.add_graph_finalizer(number)
        _inductor_orders(ops, order)
        return True

    keep._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo calls it, rather than trace it
    return keep


def _inductor_orders(ops: tuple[Any, ...], order: Callable[..., Any]) -> None:
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    def schedule(graph: Any, plainly: Callable[[], None]) -> None:
        # Last: which kernels Inductor fuses depends on how far they are from each other.
        graph.operations.sort(key=lambda operation: getattr(operation, "op_overload", None) in ops)
        plainly()
        graph.scheduler.nodes = order(graph.scheduler.nodes)

    def lower(op: Any, *args: Any) -> Any:
        graph: Any = V.graph
        if "_update_scheduler" not in vars(graph):  # once for all ``ops`` in it
            graph._update_scheduler = functools.partial(schedule, graph, graph._update_scheduler)
        return ir.FallbackKernel.create(op, *args)

    for op in ops:
        if op not in lowering.lowerings:
            lowering.register_lowering(op, type_promotion_kind=None)(functools.partial(lower, op))


# --- derivatives --------------------------------------------------------------------------------------------------


OpOverload = torch._ops.OpOverload
foreach_add_ = torch._foreach_add_  # private by name, and what every optimizer of torch is built on
foreach_copy_ = torch._foreach_copy_


def traced_within(operator: str) -> bool:
    """Whether Dynamo traces a function that this higher-order operator gets."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    while tracer is not None:
        if getattr(tracer.source_target, "_name", None) == operator:
            return True
        tracer = tracer.parent
    return False


traced_within._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo calls it, rather than trace it


def was_written_in_trace(tensor: torch.Tensor) -> bool:
    """While Dynamo traces: whether ``tensor``, a fresh clone, was written. Its fake tensors count writes."""
    torch._dynamo.comptime.comptime(_look_for_writes)
    return _writes_seen()


_seen = [False]  # what was looked for last; Dynamo traces one frame at a time


def _look_for_writes(trace: Any) -> None:
    _seen[0] = version(trace.get_local("tensor").as_fake()) > 0


def _writes_seen() -> bool:
    return _seen[0]


_writes_seen._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo calls it, rather than trace it


# --- layers that no graph holds: what only a trace of Dynamo can tell -------------------------------------------------


def read_at_each_call(owner: torch.nn.Module) -> Any:
    """While Dynamo traces: ``owner.enrolment``, which the graph reads again, and compares, at each call; or None.

    It is a property, which Dynamo would trace. It is None where what is read then would not be what this trace has: it
    wrote what ``owner.sees``, or made ``owner``, or is an export, whose graph reads nothing but its arguments.
    """
    found = None
    torch._dynamo.comptime.comptime(_read_at_each_call)
    return found


def mark_static(tensor: torch.Tensor) -> None:
    """``torch._dynamo.mark_static``, which marks nothing while Dynamo traces: then it asks the trace."""
    marked: Any = tensor
    marked._dynamo_static_indices, marked._has_dynamo_dim_marking = set(range(tensor.ndim)), True


def ask(owner: torch.nn.Module, question: str, *args: Any) -> Any:
    """While Dynamo traces: what the method ``question`` of the real ``owner`` says of constants; None if they are none.

    As ``torch.compiler.assume_constant_result``, which would bind the graph to this very object.
    """
    answer = None
    torch._dynamo.comptime.comptime(_ask)
    return answer


def _ask(trace: Any) -> None:
    from torch._dynamo.variables import ConstantVariable

    tx = trace._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    owner, question = tx.symbolic_locals["owner"].realize().value, trace.get_local("question").as_python_constant()
    args = trace.get_local("args")
    if args.is_python_constant():
        answer = getattr(owner, question)(*args.as_python_constant())
        tx.symbolic_locals["answer"] = ConstantVariable.create(answer)


def require_apart(owner: torch.nn.Module, writes: bool) -> None:
    """While Dynamo traces: makes it trace anew, with :func:`read_at_each_call` None, if the graph writes ``owner``.

    An operator that ``writes`` its buffers does so unseen: there, if the graph holds them at all, or other layers do.
    """
    torch._dynamo.comptime.comptime(_require_apart)


_written_by_graphs: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def _read_at_each_call(trace: Any) -> None:
    from torch._C._dynamo.eval_frame import set_code_exec_strategy
    from torch._dynamo.source import AttrSource
    from torch._dynamo.types import FrameAction, FrameExecStrategy
    from torch._dynamo.variables.builder import VariableBuilder

    tx = trace._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    variable = tx.symbolic_locals["owner"].realize()
    if variable.source is None or tx.export or variable.value in _written_by_graphs:
        return
    if any(variable.value.sees(*written) for written in _written(tx.output.side_effects)):
        return
    # Read where a graph begins, with Dynamo at work: it is not to compile what computes it.
    code = type(variable.value).enrolment.fget.__code__
    set_code_exec_strategy(code, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))
    source = AttrSource(variable.source, "enrolment")
    tx.symbolic_locals["found"] = VariableBuilder(tx, source)(variable.value.enrolment)


def _written(side_effects: Any) -> Iterator[tuple[Any, set[str]]]:
    """What the trace has written so far of what is older than it: objects (None for globals), and the names in them."""
    from torch._dynamo.variables import NewGlobalVariable
    from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting

    existing = (AttributeMutationExisting, ValueMutationExisting)
    older = dict(zip(map(id, side_effects.keepalive), side_effects.keepalive))
    for at, variable in side_effects.id_to_variable.items():
        if isinstance(variable.mutation_type, existing) and side_effects.is_modified(variable):
            value = None if isinstance(variable, NewGlobalVariable) else older.get(at)
            yield value, set(side_effects.store_attr_mutations.get(variable, ()))


def wrote(sees: Callable[..., bool], *modules: torch.nn.Module) -> bool:
    """While Dynamo traces: whether it wrote what ``sees(modules, written, names)`` says that the real modules see."""
    found = False
    torch._dynamo.comptime.comptime(_wrote)
    return found


def _wrote(trace: Any) -> None:
    from torch._dynamo.variables import ConstantVariable

    tx = trace._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    modules = [getattr(v.realize(), "value", None) for v in tx.symbolic_locals["modules"].items]
    real = [module for module in modules if isinstance(module, torch.nn.Module)]  # others are made in the trace
    sees = trace.get_local("sees").as_python_constant()
    if any(sees(real, *written) for written in _written(tx.output.side_effects)):
        tx.symbolic_locals["found"] = ConstantVariable.create(True)


def _require_apart(trace: Any) -> None:
    from torch._dynamo.exc import RestartAnalysis

    tx = trace._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    owner = tx.symbolic_locals["owner"].realize().value
    storages = {tensor.untyped_storage()._cdata for tensor in (*owner.parameters(), *owner.buffers())}
    writes = trace.get_local("writes").as_python_constant()
    buffers = {tensor.untyped_storage()._cdata for tensor in owner.buffers()} if writes else set()

    def start_again() -> None:
        _written_by_graphs.add(owner)
        tx.speculation_log.clear()
        raise RestartAnalysis(restart_reason="a tensor of layers is written in the graph that runs them")

    if writes and tx.output.current_tracer.parent is not None:  # a checkpoint, which would write once more, or a loop
        start_again()

    def look(graph: torch.fx.GraphModule) -> None:
        """Fake tensors count writes; at the end of the trace, for those that come after the layers ran."""
        tensors = [a for a in tx.output.graphargs if isinstance(a.example, torch.Tensor)]
        given = [a for a in tensors if a.example.untyped_storage()._cdata in storages]
        # Writes by way of ``.data``, or a new ``.data``, are counted elsewhere.
        hidden = ("_get_data_attr", "_lower_version_count_by_1", "set_", "detach_")
        uncounted = any(getattr(node.target, "__name__", node.target) in hidden for node in graph.graph.nodes)
        others = {getattr(fn, "owner", owner) for fn in tx.output.register_finalizer_fns} - {owner}
        held = {a.example.untyped_storage()._cdata for a in given}
        held |= {tensor.untyped_storage()._cdata for other in others for tensor in other.buffers()}
        if held & buffers or any(uncounted or argument.fake_tensor._version for argument in given):
            start_again()

    look.owner = owner  # type: ignore[attr-defined]
    tx.output.add_graph_finalizer(look)
