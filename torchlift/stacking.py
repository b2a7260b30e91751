"""Several modules of one structure held as one, with their variables stacked; and taken apart again."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torchlift import metadata, references
from torchlift.collecting import idle_in_bodies
from torchlift.errors import (
    AxisError,
    LayerMismatchError,
    StackedModuleError,
    TransformTargetError,
    UnsupportedError,
)
from torchlift.groups import Groups
from torchlift.nodes import ATOMS, INTERNALS
from torchlift.variables import AT, WRAPPED, UninitializedTensor, class_of, collection_of, own_tensors

PENDING = "_torchlift_pending"  # in the __dict__ of a stack whose size is not known yet: the constructor's arguments


@dataclass(frozen=True)
class Stacking:
    """How the instances of a lifted class are stacked: an axis for each collection, and the sizes if they are told.

    ``metadata_params`` are for the axis metadata of what is stacked; ``loops``: the axis is that of a loop.
    """

    groups: Groups
    sizes: tuple[int, ...] | None
    metadata_params: Mapping[Any, Any] = field(default_factory=lambda: {metadata.PARTITION_NAME: None})
    loops: bool = False

    @property
    def label(self) -> str:
        return self.groups.label

    def axis(self, module: nn.Module, store: str, key: str) -> int | None:
        return self.groups.role(collection_of(module, store, key)).axis

    @property
    def levels(self) -> int:
        return 1 if self.sizes is None else len(self.sizes)

    def change_metadata(self, change: Callable[..., None], module: nn.Module) -> None:
        """Adds the stacked axes to the metadata of one module, or removes them; its tensors are not stacked."""

        def place(owner: nn.Module, key: str) -> int | None:
            store = "_parameters" if key in owner.__dict__["_parameters"] else "_buffers"
            axis = self.axis(owner, store, key)
            return axis if axis is None or axis >= 0 else axis % (owner.__dict__[store][key].ndim + 1)

        change(self.label, module, place, self.metadata_params, self.levels)


def located(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, str, Tensor]]:
    """``(dotted name, owner, store, key, tensor)`` of every tensor of a module, each name of a tied one included."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for store, key, tensor in own_tensors(owner):
            yield (f"{path}.{key}" if path else key), owner, store, key, tensor


# Stack ---------------------------------------------------------------------------------------------------------------


def fill(stack: nn.Module, modules: Iterator[nn.Module], sizes: tuple[int, ...], how: Stacking) -> None:
    """Makes ``stack`` hold ``modules``, each of which is dropped as soon as it was copied in.

    NOTE [Construction]. Each index is built by the user's own ``__init__``, so that fan-in and initialisers are
    those of one layer, and copied straight into the stacked tensors: peak memory is the stack plus one layer.
    """
    first = next(modules)
    references.become(stack, first)
    how.change_metadata(metadata.added, first)
    slots = _make_stacks(first, sizes, how)
    for index in range(1, math.prod(sizes)):
        module = next(modules)
        _copy_in(slots, module, index, sizes, how)
        if (other := _other_setting(first, module)) is not None:
            raise LayerMismatchError(f"{how.label}: module {index}: {other} as in module 0: a stack has one for all")
        del module


def _other_setting(first: nn.Module, module: nn.Module) -> str | None:
    """The class, or the plain attribute, in which ``module`` differs from ``first``, both of equal structure."""
    others = dict(module.named_modules(remove_duplicate=False))
    for path, expected in first.named_modules(remove_duplicate=False):
        other = others.get(path)
        if other is None or class_of(other) is not class_of(expected):
            return f"{path!r} is a {type(other).__name__}, expected a {type(expected).__name__}"
        for key, value in expected.__dict__.items():
            got = other.__dict__.get(key)
            if (
                key not in INTERNALS
                and _is_setting(value)
                and _is_setting(got)
                and _code_or_value(got) != _code_or_value(value)
            ):
                return f"{f'{path}.{key}' if path else key!r} is {got!r}, expected {value!r}"
    return None


def _is_setting(value: Any) -> bool:
    """Whether the content of a plain attribute can be compared: of a number, a name, a function."""
    if isinstance(value, (tuple, list)):
        return all(_is_setting(item) for item in value)
    return type(value) in ATOMS or isinstance(value, (types.FunctionType, types.BuiltinFunctionType))


def _code_or_value(value: Any) -> Any:
    return (
        [_code_or_value(item) for item in value]
        if isinstance(value, (tuple, list))
        else getattr(value, "__code__", value)
    )


def listed(label: str, modules: Any) -> list[nn.Module]:
    """The modules in ``modules``, which may be any iterable."""
    if not isinstance(modules, Iterable):
        raise TransformTargetError(f"{label}: got {type(modules).__name__}, expected several modules, in a list")
    given = list(modules)
    for index, module in enumerate(given):
        if not isinstance(module, nn.Module):
            got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
            raise TransformTargetError(f"{label}: module {index} is {got}, expected an nn.Module")
        if WRAPPED in module._modules:
            raise TransformTargetError(
                f"{label}: module {index} is what torch.compile returned, expected the module that it was given; loops "
                "are compiled anyway, and what lifts can be given to torch.compile"
            )
    return given


def check_classes(label: str, modules: Sequence[nn.Module], cls: type[nn.Module]) -> None:
    """A subclass will not do: a stack has the methods of one class."""
    for index, module in enumerate(modules):
        got = class_of(module)
        if got is not cls:
            end = ", whose methods the stack has; lift or stack its own class" if issubclass(got, cls) else ""
            raise LayerMismatchError(f"{label}: module {index} is a {got.__name__}, expected a {cls.__name__}{end}")


def check_initialised(tensor: Tensor, where: str) -> None:
    """torch's lazy modules cannot be stacked before they know their shapes."""
    if isinstance(tensor, UninitializedTensor):
        raise UnsupportedError(
            f"{where} is not initialised yet, expected a tensor with a shape: give the sizes to a module that is not "
            "lazy, or call a lazy one once before it is stacked or run as a layer"
        )


def _make_stacks(first: nn.Module, sizes: tuple[int, ...], how: Stacking) -> list[tuple[str, nn.Module, str, str]]:
    """Puts stacks in the place of the tensors of ``first``, which it lets go of, and says where they are."""
    slots = []
    stacks: dict[Tensor, Tensor] = {}
    for name, owner, store, key, tensor in list(located(first)):
        check_initialised(tensor, f"{how.label}: {name!r}")
        if tensor not in stacks:
            stacks[tensor] = _stack_like(tensor, how.axis(owner, store, key), sizes, f"{how.label}: {name!r}")
        owner.__dict__[store][key] = stacks[tensor]
        slots.append((name, owner, store, key))
    _replace_in_lists(first, stacks)
    return slots


def _stack_like(tensor: Tensor, axis: int | None, sizes: tuple[int, ...], where: str) -> Tensor:
    """A stack for tensors like this one, with this one in its first place."""
    if axis is None:
        return tensor
    at = _position(axis, tensor.ndim + 1, where)
    new = tensor.new_empty((*tensor.shape[:at], *sizes, *tensor.shape[at:]))
    if math.prod(sizes):
        _select(new, at, 0, sizes).copy_(tensor.detach())
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _position(axis: int, ndim: int, where: str) -> int:
    """``axis``, which counts in a tensor of ``ndim`` dimensions, as a number from 0 on."""
    if not -ndim <= axis < ndim:
        raise AxisError(f"{where} has {ndim - 1} dimensions, so its stack has axes {-ndim} to {ndim - 1}, got {axis}")
    return axis % ndim


def _select(stack: Tensor, axis: int, index: int, sizes: tuple[int, ...]) -> Tensor:
    """The view of a stack at a flat ``index`` over ``sizes``, which lie from ``axis`` on; that is not negative."""
    view = stack.detach()
    for at, size in enumerate(sizes):
        view = view.select(axis, index // math.prod(sizes[at + 1 :]) % size)
    return view


def _copy_in(slots: Sequence[Any], module: nn.Module, index: int, sizes: tuple[int, ...], how: Stacking) -> None:
    others = list(located(module))
    if [s[0] for s in slots] != [o[0] for o in others]:
        raise LayerMismatchError(
            f"{how.label}: module {index} has variables {[o[0] for o in others]}, expected those of module 0: "
            f"{[s[0] for s in slots]}"
        )
    for (name, owner, store, key), (*_, other) in zip(slots, others):
        stack = owner.__dict__[store][key]
        axis = how.axis(owner, store, key)
        where = f"{how.label}: {name!r} of module {index}"
        if stack.requires_grad != other.requires_grad:
            raise LayerMismatchError(
                f"{where} has requires_grad={other.requires_grad}, expected {stack.requires_grad} as in module 0: a "
                "stack is frozen as a whole"
            )
        if axis is None:
            if other is not stack and not _equal(stack, other):
                collection = collection_of(owner, store, key)
                raise AxisError(
                    f"{where} differs from that of module 0, expected equal values: {collection!r} is shared there; "
                    f"give it an axis: variable_axes={{{collection!r}: 0}}"
                    + (
                        " and split_rngs={'params': True}, or share the draws: split_rngs={'params': False}"
                        if collection == "params"
                        else ""
                    )
                )
            continue
        at = axis % (other.ndim + 1)
        place = _select(stack, at, index, sizes)
        if place.shape != other.shape or place.dtype != other.dtype:
            raise LayerMismatchError(
                f"{where} is {tuple(other.shape)} {other.dtype}, expected {tuple(place.shape)} {place.dtype} as in "
                "module 0"
            )
        place.copy_(other.detach())


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or (a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()))


def _replace_in_lists(module: nn.Module, stacks: dict[Tensor, Tensor]) -> None:
    """Plain lists of a module's own tensors (``nn.LSTM`` keeps one) hold the stacks too."""
    for owner in module.modules():
        for value in owner.__dict__.values():
            if type(value) is list:
                value[:] = [stacks.get(item, item) if isinstance(item, Tensor) else item for item in value]


def copied(module: nn.Module) -> nn.Module:
    """A deep copy. Derived attributes (weight norm) are no leaves, which deepcopy refuses to copy."""
    attributes = [value for owner in module.modules() for value in owner.__dict__.values()]
    return references.copied(module, {id(v): v for v in attributes if isinstance(v, Tensor) and not v.is_leaf})


# Take apart ----------------------------------------------------------------------------------------------------------


def module_at(stack: nn.Module, base: type[nn.Module], index: int, how: Stacking, share: bool) -> nn.Module:
    """Module ``index`` of a stack: with its own tensors, or with views of the stack (``share``)."""
    sizes = sizes_of(stack, how)
    module = base.__new__(base)
    memo: dict[int, Any] = {id(stack): module}
    for _, owner, store, key, tensor in located(stack):
        if id(tensor) in memo:
            continue
        axis = how.axis(owner, store, key)
        view = tensor.detach() if axis is None else _select(tensor, axis % (tensor.ndim - len(sizes) + 1), index, sizes)
        view = view if share else view.clone()
        memo[id(tensor)] = nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view
    for owner in stack.modules():  # derived attributes (weight norm) are no leaves, which deepcopy refuses to copy
        memo.update({id(v): v for v in owner.__dict__.values() if isinstance(v, Tensor) and id(v) not in memo})
    object.__setattr__(module, "__dict__", copy.deepcopy(stack.__dict__, memo))
    references.relink(module, memo)
    how.change_metadata(metadata.removed, module)
    return module


def is_pending(module: nn.Module) -> bool:
    """Whether ``module`` is a stack that waits for its size."""
    return PENDING in module.__dict__


def sizes_of(stack: nn.Module, how: Stacking) -> tuple[int, ...]:
    """The sizes of a stack, read off its tensors: how many modules there are on each stacked axis."""
    if is_pending(stack):
        raise AxisError(
            f"{how.label}: the size is not known yet: call the module or load_state_dict first, or give the size where "
            "the class is lifted"
        )
    levels = how.levels
    for _, owner, store, key, tensor in located(stack):
        axis = how.axis(owner, store, key)
        if axis is not None:
            at = axis % (tensor.ndim - levels + 1)
            return tuple(tensor.shape[at : at + levels])
    if how.sizes is None:
        raise AxisError(f"{how.label}: nothing in the module has a stacked axis, and no size was given")
    return how.sizes


def map_indices(stack: nn.Module, base: type[nn.Module], how: Stacking, fn: Callable[[Any], Any]) -> None:
    """Runs ``fn`` on each module of a stack, on views, and brings back what it rebound."""
    sizes = sizes_of(stack, how)
    for index in range(math.prod(sizes)):
        module = module_at(stack, base, index, how, share=True)
        before = {name: (tensor, tensor.data_ptr()) for name, *_, tensor in located(module)}
        fn(module)
        places = {name: (owner, store, key) for name, owner, store, key, _ in located(stack)}
        for name, *_, tensor in located(module):
            old, address = before.get(name, (None, 0))
            if tensor is not old or tensor.data_ptr() != address:  # the latter where `.data` was set
                owner, store, key = places[name]
                whole = owner.__dict__[store][key]
                axis = how.axis(owner, store, key)
                place = (
                    whole.detach()
                    if axis is None
                    else _select(whole, axis % (whole.ndim - len(sizes) + 1), index, sizes)
                )
                place.copy_(tensor.detach())


# Stacks for the function forms ---------------------------------------------------------------------------------------


def stack_modules(modules: Iterable[nn.Module], axis: int = 0) -> nn.Module:
    """One module of the same class that holds several, for the function forms of ``vmap`` and ``scan``.

    Args:
        modules: modules of one class and equal structure; their tensors are copied.
        axis: the axis of every parameter and buffer on which they are stacked.

    Returns:
        A module of their class with stacked tensors. It cannot be called directly: its class's ``forward`` knows
        nothing of the axis.

    Raises:
        TransformTargetError: what is given are no modules.
        LayerMismatchError: the modules differ in class, names, shapes, dtypes or ``requires_grad``.
        AxisError: there are no modules.

    Example:
        >>> layers = [torch.nn.Linear(2, 2) for _ in range(3)]
        >>> stack = torchlift.stack_modules(layers)
        >>> both = torchlift.vmap(lambda layer, x: layer(x), variable_axes={"params": 0}, in_axes=None)
        >>> both(stack, torch.ones(2)).shape
        torch.Size([3, 2])
    """
    given = listed("stack_modules", modules)
    if not given:
        raise AxisError("stack_modules: got no modules, expected at least one")
    check_classes("stack_modules", given, class_of(given[0]))
    stack = copy.copy(given[0])
    how = Stacking(Groups("stack_modules", {True: axis}), (len(given),))
    fill(stack, iter([copied(given[0]), *given[1:]]), (len(given),), how)
    stack.__dict__["_torchlift_stack"] = how
    stack.register_forward_pre_hook(_refuse_call)
    return stack


@idle_in_bodies
def _refuse_call(module: nn.Module, args: Any) -> None:
    if AT not in module.__dict__:
        raise StackedModuleError(
            f"stack_modules: a stack of {type(module).__name__} was called directly; call it through "
            "torchlift.vmap(fn, variable_axes={True: 0})(stack, ...) or torchlift.scan, or take it apart with "
            "unstack_modules"
        )


def unstack_modules(stack: nn.Module) -> list[nn.Module]:
    """The modules that :func:`stack_modules` put together.

    Args:
        stack: what ``stack_modules`` returned.

    Returns:
        The modules in order, each with tensors of its own.

    Raises:
        StackedModuleError: ``stack`` did not come from ``stack_modules``.

    Example:
        >>> layers = [torch.nn.Linear(2, 2) for _ in range(3)]
        >>> again = torchlift.unstack_modules(torchlift.stack_modules(layers))
        >>> all(torch.equal(a.weight, b.weight) for a, b in zip(layers, again))
        True
    """
    how = getattr(stack, "_torchlift_stack", None)
    if how is None:
        raise StackedModuleError(
            f"unstack_modules: got a {type(stack).__name__}, expected what stack_modules returned; an instance of a "
            "lifted class has to_modules()"
        )
    modules = []
    for index in range(math.prod(sizes_of(stack, how))):
        module = module_at(stack, type(stack), index, how, share=False)
        del module.__dict__["_torchlift_stack"]
        hooks = module.__dict__["_forward_pre_hooks"]
        module.__dict__["_forward_pre_hooks"] = type(hooks)((k, h) for k, h in hooks.items() if h is not _refuse_call)
        modules.append(module)
    return modules
