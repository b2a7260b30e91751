"""scan_layers: a ModuleList that runs its layers through one compiled body."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from torchlift import _compat, _tree, fingerprint, rng
from torchlift.alike import check_alike, common_attribute
from torchlift.changes import Update
from torchlift.engine.capture import CaptureError
from torchlift.engine.compiled import environment
from torchlift.engine.handles import Row
from torchlift.engine.loop import Body
from torchlift.engine.opaque import ON_CARRY, ON_WRITES, opaque_run
from torchlift.engine.roster import Enrolled
from torchlift.engine.run import Report, record, run
from torchlift.engine.spans import iteration
from torchlift.engine.trees import Parts, Template, split
from torchlift.enrolling import enrolment, sees, sees_attributes
from torchlift.errors import (
    CarryError,
    OptionError,
    TorchliftCompileWarning,
    UnsupportedError,
    warn,
)
from torchlift.given import FilledError
from torchlift.layer_calls import LayersCall, call_layer, carried_by
from torchlift.scanned import Scanned, scanned_places
from torchlift.stacking import check_initialised, listed, located
from torchlift.transforms.compiling import Static, constant, fleshed, out_of_graph, register, skeleton, static_of, token
from torchlift.transforms.options import check_compile, check_count, check_lengths, check_remat, check_unroll
from torchlift.transforms.profiling import traced_names, traced_names_within
from torchlift.variables import Variable
from torchlift.written import Written


class ScanLayers(nn.ModuleList):
    """What :func:`scan_layers` returns."""

    def __init__(
        self, layers: Iterable[nn.Module], *, remat: bool = False, policy: Callable[..., Any] | None = None,
        every: int = 1, lengths: Sequence[int] | None = None, compile: bool | dict[str, Any] = True,
        unroll: int | str = 1, scanned_attributes: Sequence[str] = (),
    ):  # fmt: skip
        check_remat(remat, policy, "scan_layers")
        check_count(every, "scan_layers: every")
        check_compile(compile, "scan_layers: compile=")
        check_unroll(unroll, "scan_layers: unroll")
        if lengths is not None:
            check_lengths(lengths, "scan_layers: lengths")
        if isinstance(scanned_attributes, str):
            raise OptionError(
                f"scan_layers: scanned_attributes is {scanned_attributes!r}, expected a list of names: "
                f"[{scanned_attributes!r}]"
            )
        super().__init__(layers)
        self.remat, self.policy, self.every, self.lengths = remat, policy, every, lengths
        self.compile_options, self.unroll, self.scanned_attributes = compile, unroll, tuple(scanned_attributes)
        self.check()

    def settings(self) -> dict[str, Any]:
        """The arguments that it was made with, but for the layers."""
        return {
            "remat": self.remat, "policy": self.policy, "every": self.every, "lengths": self.lengths,
            "compile": self.compile_options, "unroll": self.unroll, "scanned_attributes": self.scanned_attributes,
        }  # fmt: skip

    def __getitem__(self, index: Any) -> Any:
        """A layer; for a slice, layers that run the same way, but for ``lengths``, which say how many there are."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        some = ScanLayers((), **{**self.settings(), "lengths": None, "remat": self.remat or self.lengths is not None})
        return some.extend(list(self)[index])  # which agree already: models slice their layers in each forward

    def __getattr__(self, name: str) -> Any:
        """What a module has; besides, as it may stand for a layer, the plain attributes that all layers have alike.

        No private ones: those mark what some library has done to a module.
        """
        own = () if name.startswith("_") else (self._parameters, self._buffers, self._modules)
        if not own or not len(self) or any(name in store for store in own):
            return super().__getattr__(name)
        return common_attribute(self.label, list(self), name)

    def kind(self) -> str:
        """What its layers are."""
        return type(self[0]).__name__ if len(self) else ""

    @property
    def label(self) -> str:
        """How errors name it."""
        return f"scan_layers({self.kind()})"

    def check(self) -> None:
        """Refuses layers that differ in more than their tensors' values and ``scanned_attributes``."""
        for index, layer in enumerate(self):
            for name, *_, tensor in located(layer):
                check_initialised(tensor, f"{self.label}: {name!r} of layer {index}")
        check_alike(self.label, list(self), self.scanned_attributes)

    @_compat.outside_of_graphs
    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the layers in order on ``x``; extra arguments go to every layer."""
        if not len(self):
            return x
        compiling = _compat.is_compiling() and self.compile_options is not False
        if compiling and (out := self._run_enrolled(x, args, kwargs)) is not None:
            return out[0]
        call = _Call(self, x, args, kwargs)
        reason, unexpected = call.why_plain()
        if reason is None:
            out = call.run()
            return out_of_graph(ScanLayers.forward, self, x, *args, **kwargs) if out is None else out[0]
        if not _compat.is_compiling():
            record(Report(self.label, "plain", reason))
            if unexpected and self.compile_options is not False:
                warn(f"{self.label} runs layer by layer: {reason}", TorchliftCompileWarning)
        return call.plain()

    @property
    def enrolment(self) -> tuple[Any, ...]:
        """What a graph of torch.compile that runs the layers reads of them at each call."""
        return enrolment(self, list(self), call_layer, self.scanned_attributes)

    sees = sees  # asked by the trace, which knows the layers by what holds them

    def _run_enrolled(self, x: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        """While Dynamo traces: the call, in a graph that does not hold the layers; None where it must."""
        read = _compat.read_at_each_call(self)
        known = read is not None and read[0]
        if not (known and (key := _compat.ask(self, "_enrol", skeleton(x), skeleton(args), skeleton(kwargs)))):
            return None
        carry = _tree.flatten(x)[0]
        consts = [constant(leaf) for leaf in _tree.flatten((args, kwargs))[0]]
        carry, ys = opaque_run(
            key, consts, carry, Enrolled(read[1:]), len(self), compile=self.compile_options,
            names=traced_names_within(self), **self.options(),
        )  # fmt: skip
        if not ys:
            return None
        (extras, static), state = ys[0]
        _compat.require_apart(self, bool(state))
        if state:
            torch.ops.torchlift.roster_write(read[1], [stack.detach() for stack in state.values()], list(state))
        extras = [stack[-1] if isinstance(stack, torch.Tensor) else stack for stack in extras]
        return (_tree.unflatten([*carry, *extras], static_of(static).out),)

    def _enrol(self, x: Any, args: Any, kwargs: Any) -> str:
        """As :func:`_register`, for layers that the graph does not hold."""

        def make(layers: Any) -> _Call:
            call = _Call(layers, fleshed(x), fleshed(args), fleshed(kwargs))
            call.scan(all_given=False)
            return call

        try:
            call = make(self)
            leaves = call.packed[0].leaves
            if call.attributes or any(isinstance(leaf, (nn.Module, Variable)) for leaf in leaves):
                return ""
            call.check_hidden()
            row = Row.of(call.parts([(packed.tensors, []) for packed in call.packed]))
            key = fingerprint.digest((call.key(), self.policy, row.metas, sorted(call.shared)))
        except UnsupportedError:  # who traces the layers will say so
            return ""
        label = self.label
        return register(key, [self], lambda layers: Body(make(layers).enrolled_body, key, label), self.policy, row)

    def options(self) -> dict[str, Any]:
        """How the engine is to run the loop."""
        remat = (self.policy or True) if self.remat or self.policy or self.lengths or self.every > 1 else None
        return {"unroll": self.unroll, "remat": remat, "lengths": self.lengths, "every": self.every}


# In which surroundings the first layer carries on something else than it is given.
_changing: weakref.WeakKeyDictionary[ScanLayers, set[Hashable]] = weakref.WeakKeyDictionary()


@functools.cache
def _template(tensors: int) -> Template:
    """That of what a layer without scanned attributes is given."""
    return split(([torch.empty(0)] * tensors, []))[1]


class _Call(LayersCall):
    """One call of the layers, through one compiled body where that serves."""

    def run(self, carried: bool = False) -> tuple[Any] | None:
        """What comes out, through the engine; None where a graph of torch.compile would have to break.

        ``carried`` says that the first layer has a layer before it, which is not among these.
        """
        layers, first = self.layers, self.packed[0]
        changing = None if carried or _compat.is_compiling() else _changing.get(layers)
        if changing and self.surroundings() in changing:
            return self.first_apart()
        if _compat.is_compiling():
            self.attributes = scanned_places(first, layers.scanned_attributes)
        else:
            self.scan(all_given=layers.compile_options is False)
        found: Any
        options = layers.options()
        consts = [constant(leaf) for leaf in first.leaves[len(self.carry) :]]
        states = None if _compat.is_compiling() else (rng.default_states(), rng.positions())
        try:
            if _compat.is_compiling():
                trees = (skeleton(self.x), skeleton(self.args), skeleton(self.kwargs))
                key = _register(layers.settings(), _compat.wrote(sees_attributes, *layers), *trees, *layers)
                if not key:
                    return None if self.gathers else (self.plain(),)
                xs = self.xs()
                carry, found = opaque_run(
                    key, consts, self.carry, xs, len(xs), compile=layers.compile_options,
                    names=traced_names(*[packed.roots for packed in self.packed]), **options,
                )  # fmt: skip
                if not found and carry == ON_WRITES and self.remat is None:
                    return (self.plain(),)
                if not found:
                    return self.first_apart() if carry == ON_CARRY and not carried and len(layers) > 1 else None
            else:
                compile, key = layers.compile_options, layers.label
                self.check_hidden()
                written = Written(None)
                if compile is not False:
                    key = self.key()
                    if not _compat.is_tracing():
                        written = Written((key, torch.is_grad_enabled(), self.kinds()))
                    if written.known:
                        written.require_apart(self.shared)
                xs = self.xs(written.known)
                xs = xs if compile is False else self.parts(xs)
                carry, found = run(
                    Body(self.body, key, layers.label, self.names), consts, self.carry, xs, len(xs),
                    compile=compile, **options,
                )  # fmt: skip
                self.scanned.require_unread()
                distinct = {id(y): y for y in found}.values()  # of layers that change nothing there are few
                written.note(change.entry for y in distinct for change in static_of(y[3]).meta.changes)
                if written.known:
                    written.require_apart(self.shared)
        except Exception as error:
            again = not _compat.is_compiling() and self.scanned.learn()  # whatever the body made of a ReadError
            if not again and not isinstance(error, (CarryError, UnsupportedError)):
                raise
            if states is not None:  # what the first layers drew is drawn again
                rng.write_states(states[0])
                rng.rewind(states[1])
            if again:
                return self.run(carried)
            if isinstance(error, CarryError) and not carried and len(layers) > 1:
                _changing.setdefault(layers, set()).add(self.surroundings())
                return self.first_apart()
            filled = isinstance(error, FilledError)
            # With one layer nothing is lost, nor where all that was asked for is a plain loop.
            if not (filled and layers.compile_options is False or isinstance(error, CarryError) and len(layers) == 1):
                warn(f"{layers.label} runs layer by layer: {error}", TorchliftCompileWarning)
            if filled:
                self.learn(str(error))
            record(Report(layers.label, "plain", str(error)))
            return (self.plain(),)
        for packed, (_, changed, sown, static) in zip(self.packed, found, strict=True):
            if changed or sown:
                told = static_of(static)
                packed.publish(Update(changed, _tree.unflatten(sown, told.sown), told.meta))
        extras, _, _, static = found[-1]
        return (_tree.unflatten([*carry, *extras], static_of(static).out),)

    def surroundings(self) -> Hashable:
        """What decides, for given layers, whether the first one carries on what is like that which it is given."""
        return environment(self.layers.label), tuple([getattr(leaf, "dtype", None) for leaf in self.carry])

    def first_apart(self) -> tuple[Any] | None:
        """What comes out, the first layer in Python and the others through the engine.

        NOTE [First layer]. Under autocast a layer may be given float32 and return bfloat16, as all others then do.
        """

        def run() -> tuple[Any]:
            _, x = self.call_one(self.packed[0], self.x)
            rest = _Call(self.layers[1:], x, self.args, self.kwargs)
            out = rest.run(carried=True)
            return (
                (out_of_graph(ScanLayers.forward, rest.layers, x, *self.args, **self.kwargs),) if out is None else out
            )

        return self.undone_if_raised(run)

    def scan(self, all_given: bool) -> None:
        """Decides which of the scanned attributes are given to the layers."""
        self.scanned = Scanned(self.packed, self.layers.scanned_attributes, all_given)
        self.attributes = self.scanned.given

    def xs(self, written: frozenset[int] | None = None) -> list[Any]:
        """The tensors and the scanned attributes of each layer.

        Of the buffers that may be ``written`` copies: autograd keeps the inputs of every layer for backward.
        """
        return [
            (packed.snapshot(written), [packed.nodes[at].module.__dict__[key] for at, key in self.attributes])
            for packed in self.packed
        ]

    def kinds(self) -> Any:
        """What the arguments and scanned attributes are, but for the values of tensors."""
        found = [packed.nodes[at].module.__dict__[key] for packed in self.packed for at, key in self.attributes]
        tensors = [(leaf.shape, leaf.dtype) for leaf in self.packed[0].leaves if isinstance(leaf, torch.Tensor)]
        others = [leaf for leaf in self.packed[0].leaves if not isinstance(leaf, torch.Tensor)]
        return tuple(tensors), fingerprint.of_value([*found, *others]) if found or others else None

    def parts(self, xs: list[Any]) -> list[Parts]:
        """The layers' tensors as the engine takes them apart: layers of one key have one template."""
        if self.attributes:
            return [Parts(*split(x)) for x in xs]
        template = _template(len(xs[0][0]))
        return [Parts(tensors, template) for tensors, _ in xs]

    def key(self) -> Any:
        """What the compiled body depends on; all layers agree in it, or are refused."""
        skip = self.layers.scanned_attributes
        first, *others = self.packed
        own = fingerprint.of_modules(first, skip)
        if self.forest is None or self.forest.agreed.get(skip) != own:
            if not all(fingerprint.has_key(packed, own, skip) for packed in others):
                self.layers.check()
                raise UnsupportedError("some layers tie tensors or submodules that others do not")
            if self.forest is not None:
                self.forest.agreed[skip] = own
        return fingerprint.of_packed(first, skip)

    def check_hidden(self) -> None:
        """Refuses layers that hold tensors or modules of their own where those of no other can take their place."""
        first = fingerprint.hidden(self.packed[0])
        for index, packed in enumerate(self.packed):
            others = fingerprint.hidden(packed)
            if len(others) != len(first) or any(a is not b for a, b in zip(others, first)):
                raise UnsupportedError(
                    f"layer {index} keeps a tensor or module of its own in an object with other fields, where that of "
                    "another layer cannot be bound; keep it in the module, or in a list, dict or dataclass there"
                )

    def body(self, consts: Any, carry: Any, x: Any) -> Any:
        """One layer, with the tensors and scanned attributes in ``x``."""
        first = self.packed[0]
        tensors, values = x
        own = {**self.scanned.unread, **dict(zip(self.attributes, values, strict=True))}
        at = iteration()
        places = first.places(outermost=True) if at is None else self.packed[at].places(outermost=False)
        out, update = first.pure(tensors, [*carry, *consts], own, places)
        leaves, spec = _tree.flatten(out)  # of a tuple, those of its first element come first
        count = len(self.carry)
        if _tree.flatten(carried_by(out, self.carry_spec))[1] != self.carry_spec:
            raise CarryError(f"{self.layers.label}: a layer returned another structure than it was given")
        sown, sown_spec = _tree.flatten(update.sown)
        changed = update.changed if first.nested else [value.detach() for value in update.changed]
        return leaves[:count], (leaves[count:], changed, sown, token(Static(spec, sown_spec, update.meta)))

    def enrolled_body(self, consts: Any, carry: Any, x: Any) -> Any:
        """The same, of layers whose tensors are those of a roster: a new value is written where the old one was."""
        carry, (extras, changed, sown, static) = self.body(consts, carry, x)
        self.scanned.require_unread()
        changes = static_of(static).meta.changes
        if sown or any(change.how != "copy" or change.entry in self.shared for change in changes):
            raise CaptureError("a layer changes its state in other ways than to write into buffers of its own")
        return carry, ((extras, static), {change.entry: new for change, new in zip(changes, changed, strict=True)})


@torch.compiler.assume_constant_result
def _register(settings: dict[str, Any], wrote: bool, x: Any, args: Any, kwargs: Any, *modules: nn.Module) -> str:
    """Called while Dynamo traces, with the real layers: the key of their body in a graph around it.

    It is empty if it cannot be told what the body depends on. What holds the layers may have been made in the code
    that Dynamo traces, and is made again here.
    """

    def make(*modules: nn.Module) -> _Call:
        call = _Call(ScanLayers(modules, **settings), fleshed(x), fleshed(args), fleshed(kwargs))
        call.scan(all_given=True)
        return call

    call, policy = make(*modules), settings["policy"]
    label = call.layers.label
    # As everywhere in torch.compile, hooks are taken to be those that there are when it traces.
    if call.has_hooks or call.shared:
        return ""
    try:
        if wrote:
            raise UnsupportedError("the code around sets attributes of the layers; set them outside of torch.compile")
        call.check_hidden()
        key = fingerprint.digest((call.key(), policy))
    except UnsupportedError as error:
        warn(f"{label} runs layer by layer: {error}", TorchliftCompileWarning)
        return ""
    return register(key, modules, lambda *modules: Body(make(*modules).body, key, label), policy)


@_compat.outside_of_graphs
def scan_layers(
    layers: Iterable[nn.Module],
    *,
    remat: bool = False,
    policy: Callable[..., Any] | None = None,
    every: int = 1,
    lengths: Sequence[int] | None = None,
    compile: bool | dict[str, Any] = True,
    unroll: int | str = 1,
    scanned_attributes: Sequence[str] = (),
) -> ScanLayers:
    """Runs layers of equal structure through one compiled body, whatever the depth.

    The result *is* a ``ModuleList`` with the given layers in it: the same ``state_dict`` keys, the same parameters for
    optimizers, hooks and sharding. Its ``forward(x, *args, **kwargs)`` calls them in order; extra arguments go to every
    layer. A layer that returns a tuple carries its first element on, or all of it if it is built as what the layer was
    given, and the whole returns what the last one returned.

    Args:
        layers: modules that differ in the values of their tensors and in nothing else.
        remat: compute intermediate values again in backward; keep only what is carried between layers.
        policy: what is kept all the same; see ``torchlift.checkpoint_policies``. Implies ``remat``.
        every: keep the carry only before every that many layers. More than 1 implies ``remat``.
        lengths: a nest of loops, as in ``remat_scan``; the product is the number of layers. Implies ``remat``.
        compile: True for Inductor, False for a plain Python loop, or options of ``torch.compile``.
        unroll: how many layers make one compiled graph and one autograd node. ``"auto"``: of small layers four, or the
            largest divisor of the depth below; the step is faster, the first one takes longer. ``remat=True`` has one.
        scanned_attributes: plain attributes, of the layers or of any submodule, that may differ. There is one graph
            for each combination of the values of those that the layers read.

    Returns:
        A ``ModuleList`` that can be called.

    Raises:
        TransformTargetError: what is given are no modules.
        LayerMismatchError: a layer differs from the first; the message says in what. OptionError: an option is none.
        UnsupportedError: a layer is one of torch's lazy modules that has not been called yet.

    Example:
        >>> blocks = torchlift.scan_layers([torch.nn.Linear(4, 4) for _ in range(6)], compile=False)
        >>> blocks(torch.ones(2, 4)).shape, list(blocks.state_dict())[:2]
        (torch.Size([2, 4]), ['0.weight', '0.bias'])
    """
    return ScanLayers(
        listed("scan_layers", layers), remat=remat, policy=policy, every=every, lengths=lengths, compile=compile,
        unroll=unroll, scanned_attributes=scanned_attributes,
    )  # fmt: skip
