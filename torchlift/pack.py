"""The heart: collect, group, pure, publish.

Every transform is the same four steps. *Collect* finds the modules that a call can reach, and their variables.
*Group* sorts the variables by collection filters. *Pure* turns the call into a function of tensors without side
effect. *Publish* writes what changed back into the real modules. A transform says only how to call the pure function.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlift import _compat, _tree, rng
from torchlift._context import context, entered
from torchlift.changes import Change, Changeable, Meta, Update
from torchlift.collecting import RootPlace, same_role
from torchlift.containers import held_in
from torchlift.errors import (
    AliasError,
    PublishError,
    RandomnessError,
    TransformedMethodReturnValueError,
)
from torchlift.filters import matches
from torchlift.given import Given
from torchlift.named_axes import around
from torchlift.nodes import STORES, Memory, Node, same
from torchlift.variables import (
    AT,
    Capture,
    Variable,
    assign_collection,
    sow_at,
)

# How torch says that it cannot write under ``vmap`` into a tensor that is not mapped.
_WROTE_SHARED = ("vmap: inplace arithmetic", "which will be updated in place, were not batched", "vmap: aten::")
_TOO_SMALL = re.compile(r"output with shape \[([\d, ]*)\] doesn't match the broadcast shape \[\d+(?:, )?([\d, ]*)\]")


def _how_to_split(stream: str) -> str:
    return (
        f"the transform was not told how to treat it: add split_rngs={{{stream!r}: True}} for fresh draws at every "
        "index, False for the same draws at every index"
    )


_NOTHING = Meta((), ())


class Packed(Changeable):
    """A call, collected, with what a transform says about it; then a pure function; then its state, published.

    ``label`` is for errors; ``inside`` is the lifted class whose methods run unlifted in the body.
    """

    def __init__(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ):
        compiling = _compat.is_compiling()
        if compiling:
            _compat.leave_to_python()
        super().__init__(module, args, kwargs, label)
        self.fn, self.inside = fn, inside
        self.nested = AT in module.__dict__  # bound in an outer body: state is published there with its graph
        self.transformed = not self.nested and not compiling and _compat.functorch_active()
        # A graph recomputes no body in Python, so there a mesh is found where it is entered.
        axes = context.axes if compiling else around()
        self.context: dict[str, tuple[Any, ...]] = {"captures": context.captures, "axes": axes}
        self.refused: tuple[tuple[str, str], ...] = context.refused
        self._writable = [False] * len(self.entries)

    def beside(self, module: nn.Module, found: tuple[Memory, list[Node], list[Tensor]] | None = None) -> Packed:
        """The same call of another module, not bound where this one's is not; it may change the same collections.

        ``found`` is the module's tree, where it is known.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)  # as copy.copy does, which looks for ways to do it first
        if found is not None:
            other.roots, other._writable = [module], None  # as `allow` leaves it: found when asked for
            other._take_up(*found)
        elif _compat.is_compiling() and self.simple:
            other._collect_like(module, self)
        else:
            other._collect(module)
            other.allow(self._writable_collection, self._how_to_write)
        return other

    # Group -----------------------------------------------------------------------------------------------------------

    def group(self, role: Callable[[str], Any]) -> list[Any]:
        """The role of each entry, by its collection.

        Raises:
            AliasError: a tensor has paths whose collections have different axes.
        """
        known: dict[str, Any] = {}
        axis_of = lambda collection: role(collection).axis
        for entry in self.entries:
            if not same_role(entry, axis_of):
                asked = [(path, role(collection).axis) for path, collection in entry.paths]
                listed = ", ".join(f"{path!r} asks for axis {axis}" for path, axis in asked)
                raise AliasError(f"{self.label}: one tensor has several names: {listed}; give them the same axis")
            if entry.collection not in known:
                known[entry.collection] = role(entry.collection)
        roles = [known[entry.collection] for entry in self.entries]
        self.hidden = frozenset(i for i, r in enumerate(roles) if r.hidden)
        return roles

    def refuse(self, streams: Sequence[str], how_to: Callable[[str], str] = _how_to_split) -> None:
        """Says which random streams a body may not draw from, and what to add to be allowed."""
        told = tuple((s, f"{self.label}: drew from the random stream {s!r}; {how_to(s)}") for s in streams)
        self.refused = (*context.refused, *told)

    def snapshot(self, written: frozenset[int] | None = None) -> list[Tensor]:
        """The tensor of each entry; what publish may write into as a copy, for a pure call that runs again later.

        That is any buffer, unless it is known which ones are ``written``. Views of one tensor are written together:
        torch counts the writes into any of them as those of all.
        """
        tensors = list(self.tensors)
        if not self.buffers:
            return tensors
        together = {_compat.memory_of(self.tensors[index]) for index in written or ()}
        for index in self.buffers:
            if self.writable[index] and (
                written is None or (together and _compat.memory_of(tensors[index]) in together)
            ):
                tensors[index] = tensors[index].clone()
        return tensors

    def put_back(self, values: Sequence[Tensor]) -> None:
        """Makes the real modules hold the buffers that they held when ``values``, their snapshot, was taken."""
        unknown = _compat.functorch_active()
        for node in self.nodes:
            buffers = node.module.__dict__["_buffers"]
            found = {key: self.tensors[index] for store, key, index in node.tensors if store == "_buffers"}
            for key in [key for key in buffers if key not in found and buffers[key] is not None]:
                del buffers[key]
            buffers.update(found)
        with torch.no_grad():
            for index in self.buffers:
                if self.writable[index] and (unknown or not torch.equal(self.tensors[index], values[index])):
                    self.tensors[index].copy_(values[index])

    # Pure ------------------------------------------------------------------------------------------------------------

    def pure(
        self, tensors: Sequence[Tensor], leaves: Sequence[Any], attributes: Mapping[tuple[int, str], Any] | None = None,
        places: Sequence[RootPlace] | None = None,
    ) -> tuple[Any, Update]:  # fmt: skip
        """The call as a function of a tensor for each entry and a value for each leaf of its arguments.

        Without side effects, but for draws from random generators. ``attributes`` are plain attributes, by node and
        name, that differ from the modules' own; ``places`` are those of the roots, for profiler traces.
        """
        # NOTE [Buffers]. Buffers are bound as clones: in-place writes would reach the caller's storage through vmap and
        # grad. A parameter is bound as it is: twice the memory of a model is too much for a write that is an error in
        # torch, outside of no_grad, and right there. apply has promised to change nothing: there those of modules whose
        # code may write into them are clones, too.
        compiling = _compat.is_compiling()
        bound = list(tensors)
        copied = self.buffers if compiling else self.copied
        if copied:
            # Not as inference tensors: no one counts the writes into those.
            with _compat.normal_tensors():
                plain = not compiling and not _compat.functorch_active()
                for index in copied:
                    real = bound[index]
                    # Contiguous: batch_norm's vmap rule loses what it writes where the batch axis is not in front.
                    easy = plain and real.is_contiguous()  # said without its name, which takes as long as to clone
                    bound[index] = real.clone() if easy else real.clone(memory_format=torch.contiguous_format)
        # Elsewhere what is written into a parameter is in the real one, or no graph can hold it.
        all_of_them = not compiling and (self.isolated or _compat.is_tracing())
        watched = range(len(bound)) if all_of_them else self.buffers
        seen = bound if all_of_them else [bound[index] for index in watched]
        versions = _compat.versions(seen)
        shadows = self.shadows(bound, self.hidden, self.inside, places or self.places(outermost=False))
        for (at, key), value in (attributes or {}).items():
            shadows[at].__dict__[key] = value
        args, kwargs = self.arguments(shadows, bound, leaves)
        given = None if self.fillable is None else Given(args, kwargs, self.by_value, self.before)
        fields = dicts = [shadow.__dict__ for shadow in shadows]
        if not compiling:
            modules = [own["_modules"] for own in fields]
            dicts = [*fields, *modules, *[own[store] for own in fields for store in STORES]]
        before = [*map(dict.copy, dicts)]
        counts = None if compiling else _compat.dict_versions(dicts)
        held = [(at, key, value := shadows[at].__dict__.get(key), held_in(value)) for at, key in self.containers]
        frames = self.context["captures"]
        frame = Capture(_AnyOf(tuple([frame.filter for frame in frames]))) if frames else None
        drawn = self._draws_refused()
        try:
            axes = self.context["axes"]
            surrounded = frames or context.captures or self.refused or context.refused or axes or context.axes
            inner = {"captures": (frame,) if frames else (), "axes": axes, "refused": self.refused}
            fn = _compat.uncached(self.fn) if _compat.parametrizations_are_cached() else self.fn
            with entered(**inner) if surrounded else contextlib.nullcontext():
                out = fn(shadows[0], *args, **kwargs)
        except BaseException as error:  # also what ends a run so that another can start
            self._check_containers(held, shadows, error)
            if isinstance(error, RuntimeError):
                self._explain_write(error)
            raise
        if drawn is not None and rng.drew(drawn):
            rng.write_states(drawn)
            raise RandomnessError(dict(self.refused)[rng.DROPOUT])
        if not isinstance(out, Tensor):
            self._check_output(out)
        if given is not None:
            self._check_given(given, out, leaves)
        changes: list[Change] = []
        values: list[Tensor] = []
        # In most runs nothing is assigned, which is told by a look at what all modules hold. Dynamo knows no such look.
        untouched = counts is not None and counts == _compat.dict_versions(dicts)
        assigned = not untouched and (compiling or not same(dicts, before))
        now = _compat.versions(seen)
        counted = {index for index, old, new in zip(watched, versions, now) if old != new} if now != versions else set()
        if self.buffers and not compiling:
            counted |= self._uncounted(tensors, bound, counted)
        if assigned:
            for at, own in enumerate(fields):
                self._read_back(at, own, tensors, bound, counted, changes, values)
                self._check_attributes(self.nodes[at], own, before[at])
                if not compiling:
                    self._check_modules(self.nodes[at], own["_modules"], before[len(fields) + at])
        elif self.buffers:
            changes = [*self._read_written(tensors, bound, counted)]
            values = [bound[change.entry] for change in changes]
        if watched is not self.buffers and not counted.issubset(self.buffers):
            self._read_parameters(bound, counted, changes, values)
        if held:
            self._check_containers(held, shadows)
        sown = [] if frame is None else [(site, value) for site, values in frame.sown.items() for value in values]
        if not changes and not sown:
            return out, Update([], [], _NOTHING)
        return out, Update(values, [value for _, value in sown], Meta(tuple(changes), tuple(site for site, _ in sown)))

    def _draws_refused(self) -> rng.States | None:
        """Where the default generators stand, if the body may not draw from them."""
        if not self.refused or _compat.is_tracing() or all(stream != rng.DROPOUT for stream, _ in self.refused):
            return None
        return rng.default_states()

    def _check_output(self, out: Any) -> None:
        for leaf in _tree.flatten(out)[0]:
            if isinstance(leaf, (nn.Module, Variable)):
                raise TransformedMethodReturnValueError(
                    f"{self.label}: returned a {type(leaf).__name__}, expected tensors: a module or Variable means "
                    "nothing outside of the transform; return its tensors, or what you compute with it"
                )

    # Publish ---------------------------------------------------------------------------------------------------------

    def wrote_shared(self, error: RuntimeError) -> bool:
        """Whether torch says so that under ``vmap`` something was written into a buffer that is not mapped."""
        message = str(error)
        sizes = _TOO_SMALL.search(message)
        shapes = [str(list(self.tensors[index].shape))[1:-1] for index in self.buffers]
        small = sizes is not None and sizes[1] == sizes[2] and sizes[1] in shapes
        return small or any(part in message for part in _WROTE_SHARED)

    def _explain_write(self, error: RuntimeError) -> None:
        """batch_norm refuses to write statistics that lack the axis of an outer ``vmap``, before publish can."""
        if self.transformed and self.wrote_shared(error):
            if self.buffers and all(self.writable[index] for index in self.buffers):
                names = sorted({self.entries[index].collection for index in self.buffers})
                raise PublishError(
                    f"{self.label}: a variable of {names} was written under an outer torch.func.vmap without having "
                    "its axis; give it one, and take the new state as an output: torchlift.apply(module, "
                    f"{{{names[0]!r}: {{name: tensor}}}}, ..., mutable={names})"
                ) from error

    def publish(self, update: Update) -> None:
        """Writes new state into the real modules as the body did, and sows what was sown.

        NOTE [Publish]. What was written in place is copied into its own storage, so that optimizers, DDP and
        ``state_dict`` aliases keep holding it; what was rebound is rebound: copying it would break programs that
        plain torch runs ("modified by an inplace operation"). Detached, unless the module is itself bound in an outer
        body. All is checked before anything is written.
        """
        for change, value in zip(update.meta.changes, update.changed, strict=True):
            self._check_publishable(change, value)
        for change, value in zip(update.meta.changes, update.changed, strict=True):
            self._write(self.nodes[change.node].module, change, value if self.nested else value.detach())
        for site, value in zip(update.meta.sites, update.sown, strict=True):
            sow_at(self.module_at(site.root, site.path), site, value)

    def _check_publishable(self, change: Change, value: Tensor) -> None:
        owner = self.nodes[change.node].module
        level = -1 if change.entry < 0 else _compat.functorch_level(self.tensors[change.entry])
        if _compat.functorch_level(value) > level and AT not in owner.__dict__:
            raise PublishError(
                f"{self.label}: {self.nodes[change.node].dotted(change.key)!r} of collection {change.collection!r} "
                "changed under an outer torch.func transform, whose values cannot be written into the module; take "
                f"the new state as an output: torchlift.apply(module, {{}}, ..., mutable=[{change.collection!r}])"
            )

    def _write(self, owner: nn.Module, change: Change, value: Tensor) -> None:
        tensors = owner.__dict__[change.store]
        if change.how == "create" and change.key not in tensors:
            if change.store == "_parameters":
                parameter: Any = value if self.nested else nn.Parameter(value)  # bound ones may be any tensor
                owner.register_parameter(change.key, parameter)
            else:
                passing = change.key in owner._non_persistent_buffers_set  # which a body's modules have in common
                owner.register_buffer(change.key, value, persistent=not passing)
                assign_collection(owner, change.key, change.collection)
        elif change.how == "copy" or isinstance(tensors[change.key], nn.Parameter):
            target = tensors[change.key]
            if isinstance(owner, _compat.NormBase) and not _compat.is_tracing() and not self.nested:
                # As batch_norm writes: uncounted, for an earlier call that has saved them and awaits its backward.
                # What is traced knows no `data`, and would write into a constant.
                target = target.data
            with contextlib.nullcontext() if self.nested else torch.no_grad():
                (target if self.nested else _compat.writable(target)).copy_(value)
        else:
            tensors[change.key] = value


@dataclass(frozen=True)
class _AnyOf:
    """The filter of a body's own capture: whatever one of the captures around it asks for.

    Equal ones are told to be equal, and written alike: what is compiled for one serves the next call.
    """

    filters: tuple[Any, ...]

    def __contains__(self, name: str) -> bool:
        return any(matches(filter, name) for filter in self.filters)
