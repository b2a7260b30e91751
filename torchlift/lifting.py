"""Lifting forms: how a transform meets a class, a partial of one, a function, a method, or a decorator."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import typing
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from torchlift import _compat, rng, stacked_classes, stacking
from torchlift.collecting import INSIDE, Collected
from torchlift.errors import TransformTargetError
from torchlift.misspelt import Named, named, warn_misspelt

Target = Any  # a module class, a functools.partial of one, or a function whose first argument is a module


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A transform with its arguments. A subclass is a row of fields and :meth:`call`.

    ``call`` runs ``fn(module, *args, **kwargs)`` under the transform; ``label`` names it in errors, ``inside`` is the
    lifted class of ``module``, if it was lifted with its class.
    """

    def call(
        self, fn: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, label: str, inside: type | None = None
    ) -> Any:
        raise AssertionError("a transform says how to call")  # pragma: no cover

    @property
    def name(self) -> str:
        return type(self).__name__.lower().strip("_")

    def stacking(self, base: type[nn.Module]) -> stacking.Stacking | None:
        """How instances of ``base``, lifted, are stacked; None where nothing is."""
        return None

    def members(self, base: type[nn.Module]) -> dict[str, Any]:
        """What the lifted class has of its own, besides its lifted methods."""
        how = self.stacking(base)
        return {} if how is None else stacked_classes.members(base, how)

    def named(self, *arguments: str) -> Named:
        """The names in those of its arguments that tell what happens to collections, or to streams."""
        if _compat.is_compiling():  # Dynamo would trace it for nothing, since what looks for them does not run there
            return ()
        return named({name: getattr(self, name) for name in arguments if hasattr(self, name)})

    def label(self, target: Any) -> str:
        """How errors name this use of the transform: ``scan(Block, length=12)``."""
        if _compat.is_compiling():  # lifted in code that Dynamo traces, which knows neither names nor reprs
            return self.name
        given = [
            f"{f.name}={value!r}" for f in fields(self) if f.repr and (value := getattr(self, f.name)) != f.default
        ]
        given = [text for text in given if not text.endswith("={}")]
        return f"{self.name}({', '.join([_name_of(target), *given])})"


@_compat.outside_of_graphs
def lift(make: Callable[..., Transform], target: Target, arguments: dict[str, Any], methods: Any = None) -> Any:
    """Applies the transform that ``make(**arguments)`` builds to any target."""
    name = make.__name__.lower().strip("_")
    if target is None:
        return functools.partial(lift, make, arguments=arguments, methods=methods)
    target = _without_parameters(target)
    instance = target.func if isinstance(target, functools.partial) else target
    if isinstance(instance, nn.Module):
        cls = type(instance).__name__
        raise TransformTargetError(
            f"{name}: got an instance of {cls}, expected its class or a function; write {name}({cls}, ...)(...) for a "
            f"new module, {name}(lambda m, *args: m(*args), ...)(module, ...) for one call of this module"
        )
    if isinstance(target, functools.partial) and is_module_class(_without_parameters(target.func)):
        lifted = lift(make, target.func, arguments, methods)
        return functools.partial(lifted, *target.args, **target.keywords)
    if is_module_class(target):
        return lift_class(make, target, arguments, methods)
    if isinstance(target, type) or not callable(target) or typing.get_origin(target) is not None:
        raise TransformTargetError(
            f"{name}: got {target!r}, expected an nn.Module subclass, a functools.partial of one, or a function whose "
            "first argument is a module"
        )
    return lift_function(make(**arguments), target)


def is_module_class(target: Any) -> bool:
    return isinstance(target, type) and issubclass(target, nn.Module)


def _without_parameters(target: Any) -> Any:
    """The class of a generic module class with parameters, ``Stack[int]``, which is none itself; others as they are."""
    origin = typing.get_origin(target)
    return origin if is_module_class(origin) else target


def _name_of(target: Any) -> str:
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or type(target).__name__
    return name.rpartition("<locals>.")[2]


# Functions -----------------------------------------------------------------------------------------------------------


def lift_function(transform: Transform, target: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the same signature; a bound method of a module gives one without the module."""
    if isinstance(target, types.MethodType) and isinstance(target.__self__, nn.Module):
        lifted = lift_function(transform, target.__func__)
        return functools.wraps(target)(functools.partial(lifted, target.__self__))

    label = transform.label(target)
    look = _lookout(transform, label)
    found = _found_by_name(transform)
    # Dynamo knows no __dict__ of a partial; there is hardly ever anything in it.
    updated = () if isinstance(target, functools.partial) else functools.WRAPPER_UPDATES

    @functools.wraps(target, updated=updated)
    def lifted_function(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(module, nn.Module):
            raise TransformTargetError(
                f"{label}: the first argument is a {type(module).__name__}, expected an nn.Module: "
                "a lifted function has the module as its first argument"
            )
        out = found().call(target, module, args, kwargs, label)
        if not _compat.is_compiling():
            look(module, args, kwargs)
        return out

    return lifted_function


# NOTE [Found by name]. Dynamo wraps what it finds in a global, but not what a function has in a closure that it met on
# a bound module, which it made itself. So it gets there by a name, which is an attribute of a function, where it tells
# no fingerprint from another: what counts there is what the transform is.
# Those that are gone are dropped when the next one is made: not whenever the garbage collector likes, since Dynamo may
# be walking the dict.
_transforms: dict[str, weakref.ref[Transform]] = {}
_gone: list[str] = []


def _found_by_name(transform: Transform) -> Callable[[], Any]:
    """A function that returns ``transform``, which lives as long as it does, also in code that Dynamo traces."""
    held = lambda: transform
    if _compat.is_compiling():  # it was made in that code
        return held
    with contextlib.suppress(IndexError):  # another thread may have dropped the last one
        while _gone:
            _transforms.pop(_gone.pop(), None)
    held.__name__ = name = uuid.uuid4().hex  # another process, which was sent the function, has names of its own
    _transforms[name] = weakref.ref(transform)
    weakref.finalize(transform, _gone.append, name)
    return lambda: _look_up(held) if _compat.is_compiling() else held()


def _look_up(held: Callable[[], Transform]) -> Any:
    found = _transforms.get(held.__name__)
    return held() if found is None else found()


def _lookout(transform: Transform, label: str) -> Callable[..., None]:
    """What looks, after a call, for misspelt names among the arguments of the transform."""
    collections = transform.named("variable_axes", "variable_broadcast", "variable_carry", "mapped_collections")
    streams = transform.named("split_rngs")

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        if collections:
            found = lambda: (entry.collection for entry in Collected(module, args, kwargs, label).entries)
            warn_misspelt(module, label, collections, found)
        if streams:
            warn_misspelt(module, label, streams, lambda: (rng.PARAMS, rng.DROPOUT, *rng.positions()))

    return look


# Classes -------------------------------------------------------------------------------------------------------------

_lifted_classes: weakref.WeakKeyDictionary[type, dict[Any, weakref.ref[type]]] = weakref.WeakKeyDictionary()


def lift_class(
    make: Callable[..., Transform], base: type[nn.Module], arguments: dict[str, Any], methods: Any
) -> type[nn.Module]:
    """A subclass of ``base`` whose ``methods`` run under the transform; the same one for the same arguments."""
    key = (make, _freeze(arguments), _freeze(methods))
    known = _lifted_classes.setdefault(base, {})
    cls = known[key]() if key in known else None
    if cls is None:
        cls = _new_class(make, base, arguments, methods)
        known[key] = weakref.ref(cls)
    return cls


def _new_class(
    make: Callable[..., Transform], base: type[nn.Module], arguments: dict[str, Any], methods: Any
) -> type[nn.Module]:
    methods_and_own = _normalise(make, base, arguments, methods)
    per_method = {method: make(**{**arguments, **own}) for method, own in methods_and_own.items()}
    transforms = list(per_method.values())
    namespace: dict[str, Any] = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__reduce_ex__": _reduce,
        "_torchlift_recipe": _Recipe(make, base, arguments, methods),
    }
    namespace.update(transforms[0].members(base))
    name = f"{transforms[0].name.title().replace('_', '')}{base.__name__}"
    cls = types.new_class(name, (base,), exec_body=lambda body: body.update(namespace))
    for method, transform in per_method.items():
        setattr(cls, method, _lifted_method(transform, cls, base, method))
    return cls


def _normalise(
    make: Callable[..., Transform], base: type, arguments: Mapping[str, Any], methods: Any
) -> Mapping[str, dict[str, Any]]:
    """The arguments of each method that are its own."""
    name = make.__name__.lower().strip("_")
    if methods is None:
        methods = ["forward"]
    if not isinstance(methods, (list, tuple, dict)) or not methods:
        raise TransformTargetError(
            f"{name}({base.__name__}): methods is {methods!r}, expected None, a list of method names, or a dict of "
            "method names to arguments"
        )
    found = dict(methods) if isinstance(methods, dict) else {method: {} for method in methods}
    for method, own in found.items():
        fn = inspect.getattr_static(base, method, None) if isinstance(method, str) else None
        if not callable(fn) or isinstance(fn, (staticmethod, type)):
            raise TransformTargetError(f"{name}({base.__name__}): there is no method {method!r} to lift")
        if not isinstance(own, Mapping) or not set(own) <= set(arguments):
            raise TransformTargetError(
                f"{name}({base.__name__}): methods[{method!r}] is {own!r}, expected a dict with some of "
                f"{list(arguments)}"
            )
    return found


def _lifted_method(transform: Transform, cls: type, base: type, method: str) -> Callable[..., Any]:
    fn = inspect.getattr_static(base, method)
    label = transform.label(base)
    look = _lookout(transform, label)
    found = _found_by_name(transform)

    @functools.wraps(fn)
    def lifted(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        # NOTE [Inside]. In a body the shadow of `self` has the lifted class, so that isinstance, properties and
        # overrides hold; marked, its lifted methods are the plain ones there, or they would lift themselves forever.
        if cls in self.__dict__.get(INSIDE, ()):
            return fn(self, *args, **kwargs)
        out = found().call(fn, self, args, kwargs, label, cls)
        if not _compat.is_compiling():
            look(self, args, kwargs)
        return out

    return lifted


def _freeze(value: Any) -> Any:
    """A hashable key for an argument; what has no value of its own (functions, devices) counts by identity."""
    if isinstance(value, Mapping):
        return ("dict", tuple((_freeze(k), _freeze(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, tuple(_freeze(v) for v in value))
    if isinstance(value, (set, frozenset)):
        return ("set", frozenset(_freeze(v) for v in value))
    try:
        hash(value)
    except TypeError:
        return ("id", id(value))
    return (type(value).__name__, value)  # the type too: 0 == False, 1 == True


# Pickling ------------------------------------------------------------------------------------------------------------


class _Recipe:
    """How a lifted class was made. One object for a class, also when an instance is deep-copied."""

    def __init__(self, make: Callable[..., Transform], base: type[nn.Module], arguments: dict[str, Any], methods: Any):
        self.make, self.base, self.arguments, self.methods = make, base, arguments, methods

    def __deepcopy__(self, memo: Any) -> _Recipe:
        return self

    def __reduce__(self) -> Any:
        return _Recipe, (self.make, _recipe(self.base), self.arguments, self.methods)

    def lifted(self) -> type[nn.Module]:
        base = self.base.lifted() if isinstance(self.base, _Recipe) else self.base
        return lift_class(self.make, base, self.arguments, self.methods)


def _recipe(cls: type[nn.Module]) -> Any:
    return cls.__dict__.get("_torchlift_recipe", cls)


def _reduce(self: nn.Module, protocol: int) -> Any:
    """NOTE [Pickle]. A lifted class is found in no module; it is lifted again from its base when unpickled."""
    if "_torchlift_recipe" not in type(self).__dict__:  # a user's own subclass, which is found by its name
        return object.__reduce_ex__(self, protocol)
    return _rebuild, (_recipe(type(self)),), self.__getstate__()


def _rebuild(recipe: _Recipe) -> nn.Module:
    cls = recipe.lifted()
    return cls.__new__(cls)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """An argument that may be one item or several, as a tuple."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
