"""Content keys: what a compiled body depends on besides its tensors, as one hashable value.

NOTE [Content]. A graph that was captured without guards is right only while everything that Python read in capture is
still as it was. So the key holds the classes of the modules, their plain attributes, the body's code, closure and
defaults, and what all that code reads of globals: by value, never by a small integer id, which goes stale when an
object dies. The same goes for the methods of the classes, and for what is in the registries that they name, which are
small. Not read, for there is too much of it or no name leads there: the environment of the process, what
``globals()[name]`` gives, the classes of objects, the modules in closures of methods, and long containers of functions.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import functools
import types
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchlift import _tree
from torchlift.code import function_in, in_closure, names_in, of_library, spaces_of
from torchlift.digests import Key
from torchlift.digests import digest as digest  # part of what this module offers
from torchlift.errors import UnsupportedError
from torchlift.nodes import ATOMS, COMPILED, INTERNALS, LONG, SCALARS, Node
from torchlift.pack import Packed
from torchlift.references import in_cell
from torchlift.rng import is_apart
from torchlift.variables import Variable, class_of

# Arguments that are told by what they are, or are inputs.
_FUNCTIONS = (type, types.FunctionType, types.MethodType, functools.partial)
_TOLD = (*ATOMS, *_FUNCTIONS, enum.Enum, Tensor, nn.Module, Variable)
_BARE = frozenset((list, tuple, dict, set, frozenset))
_DEPTH = 64  # values in one another
_DEEP = 8  # of objects in one another that a name leads to
_CONTENT = object()  # beside the names of attributes
_MOST = 10_000  # of one value: what is read at each call must be small


def of_packed(packed: Packed, skip: Sequence[str] = ()) -> Hashable:
    """The key of a packed call: its function, its modules, how its arguments are built, and where its tensors go.

    ``skip`` names plain attributes that are not part of it.

    Raises:
        UnsupportedError: the body is one that no key tells.
    """
    if packed.unseen[2]:
        raise UnsupportedError(
            "the body seeds a generator, or sets its state, which a graph does not repeat; draw with "
            "generator=torchlift.make_rng(name), or before the loop"
        )
    captures = tuple(repr(frame.filter) for frame in packed.context["captures"])
    classes = dict.fromkeys(class_of(node.module) for node in packed.nodes)
    contents = tuple([of_class(cls) for cls in classes if not of_library(cls)])
    # Of a class of torch's own a method that was replaced.
    known = [cls.forward for cls in classes if of_library(cls)]
    contents += tuple([_outline(forward) for forward in known if not of_library(function_in(forward) or type(forward))])
    axes = tuple((axis.name, axis.size, axis.group) for axis in packed.context["axes"])
    beside = _tree.beside_fields(packed.spec)
    built = (_tree.form(packed.spec), of_value(beside) if beside else None)
    key = Key((of_value(packed.fn), of_modules(packed, skip), contents, packed.inside, captures, axes, built))
    if packed.memory is None:
        return key
    last: Key | None = packed.memory.keys.get((_CONTENT, *skip))  # which has its hash
    if last == key:
        return last
    packed.memory.keys[_CONTENT, *skip] = key
    return key


def of_modules(packed: Packed, skip: Sequence[str] = ()) -> tuple[Hashable, ...]:
    """The part of the key that differs between calls of one function with several modules of the same classes."""
    known = {} if packed.memory is None else packed.memory.keys
    nodes = known.get(tuple(skip))
    if nodes is None:
        nodes = known[tuple(skip)] = tuple(_of_node(node, skip) for node in packed.nodes)
    return (nodes, tuple(packed.writable), packed.hidden)


def has_key(packed: Packed, key: tuple[Hashable, ...], skip: Sequence[str]) -> bool:
    """Whether ``key`` is what :func:`of_modules` gives of a call."""
    if of_modules(packed, skip) != key:
        return False
    if packed.memory is not None:
        packed.memory.keys[tuple(skip)] = key[0]  # the very same: the next comparison is one of identity
    return True


def of_module(module: nn.Module) -> dict[str, Hashable]:
    """The plain attributes of one module by name, without those that hold tensors or modules."""
    return {
        key: _of_atom(value) if type(value) in SCALARS else _Reader(module).read(value)
        for key, value in module.__dict__.items()
        if key not in INTERNALS and not isinstance(value, (Tensor, nn.Module))
    }


def _of_node(node: Node, skip: Sequence[str]) -> Hashable:
    return (
        class_of(node.module),
        node.path,
        tuple(node.tensors),
        tuple(node.children),
        tuple((k, v) for k, v in of_module(node.module).items() if k not in skip and node.dotted(k) not in skip),
    )


def hidden(packed: Packed) -> list[Any]:
    """The tensors and modules in objects that plain attributes hold: no others are bound in their place."""
    if packed.memory is not None:  # what is remembered has none
        return []
    reader = _Reader()
    for node in packed.nodes:
        reader.all(value for key, value in node.module.__dict__.items() if key not in INTERNALS)
    return reader.hidden


def held(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the values that plain attributes of modules and of their submodules hold, however deep."""
    reader = _Reader()
    for inner in dict.fromkeys(inner for module in modules for inner in module.modules()):
        for key, value in inner.__dict__.items():
            if key not in INTERNALS:
                with contextlib.suppress(UnsupportedError):  # it is not compiled either
                    reader.read(value)
    return set(reader.known)


def opaques(leaves: Iterable[Any]) -> list[Any]:
    """Those that are objects with content of their own, which their identity does not tell."""
    others = [leaf for leaf in leaves if not isinstance(leaf, _TOLD)]
    return [x for x in others if hasattr(x, "__dict__") or isinstance(x, Iterator) or _slots_of(x, type(x))]


def opaque(leaves: Iterable[Any]) -> str | None:
    """Why compiled code cannot have these as arguments, if it cannot: there are :func:`opaques` among them.

    What a body puts into one of these (into a cache of keys and values) is a tracer.
    """
    for leaf in opaques(leaves):
        return (
            f"an argument is a {type(leaf).__name__}, whose content compiled code would not see change; pass "
            "tensors and numbers, or a dict, tuple or dataclass of them"
        )
    return None


def _of_atom(value: Any) -> Hashable:
    if type(value) is slice:  # before Python 3.12 they have no hash
        return (slice, of_value((value.start, value.stop, value.step)))
    return (type(value), value if value and value == value else repr(value))


def of_value(value: Any) -> Hashable:
    """A hashable stand-in for a value, equal for equal content."""
    return _Reader().read(value)


class _Reader:
    """Reads a value once, however often it occurs in what is read, and whatever refers back to itself."""

    def __init__(self, owner: nn.Module | None = None):
        self.owner = owner  # whose attribute it is
        self.known: dict[int, tuple[Any, Hashable]] = {}  # with the values, whose ids are taken while they live
        self.path: dict[int, int] = {}  # what is being read, outermost first
        self.objects = 0  # how many of those are objects with fields
        self.hidden: list[Any] = []  # the tensors and modules met there

    def read(self, value: Any) -> Hashable:
        kind = type(value)
        if kind in ATOMS:
            return _of_atom(value)
        if isinstance(value, (Tensor, nn.Module)):
            if self.objects:
                self.hidden.append(value)
            return f"{kind.__module__}.{kind.__qualname__}"  # tensors are inputs, modules have nodes of their own
        if isinstance(value, type):
            return value
        at = id(value)
        if at in self.known:
            return self.known[at][1]
        if at in self.path:
            return ("itself", self.path[at])
        if len(self.path) == _DEPTH or len(self.known) == _MOST:
            raise UnsupportedError(
                f"a plain value of type {kind.__name__} holds too much to see it change at each call"
            )
        self.path[at] = len(self.path)
        try:
            self.known[at] = value, self._content(value, kind)
        finally:
            del self.path[at]
        return self.known[at][1]

    def all(self, values: Iterable[Any]) -> tuple[Hashable, ...]:
        return tuple([self.read(value) for value in values])

    def _beside(self, value: Any, kind: type) -> tuple[Hashable, ...]:
        """What an instance of a subclass of list, dict or set has besides its items."""
        if kind in _BARE:
            return ()
        known = value if isinstance(value, Mapping) else {}  # a model output has its items as attributes too
        fields = {name: field for name, field in getattr(value, "__dict__", {}).items() if name not in known}
        self.objects += 1
        content = self.all((*fields.values(), getattr(value, "default_factory", None)))
        self.objects -= 1
        return (tuple(fields), content)

    def _content(self, value: Any, kind: type) -> Hashable:
        if is_apart(value):
            raise UnsupportedError(
                f"a plain value is, or draws from, a {kind.__name__}, whose numbers a graph would repeat; draw with "
                "torch, as torch.rand(()) does"
            )
        if isinstance(value, (list, tuple)):
            return (kind, self.all(value), *self._beside(value, kind))
        if isinstance(value, Mapping):
            return (kind, self.all(value), self.all(value.values()), *self._beside(value, kind))
        if isinstance(value, (set, frozenset)):
            return (kind, frozenset(self.all(value)), *self._beside(value, kind))
        if isinstance(value, functools.partial):
            return ("partial", self.all((value.func, value.args, value.keywords)))
        if isinstance(value, weakref.ref):  # torch's recurrent layers have some to their weights
            target = value()
            read = (
                _plain_of([target], _names_of(self.owner))
                if self.owner is not None and isinstance(target, nn.Module)
                else []
            )
            return ("weak", self.read(target), *read)
        if isinstance(value, types.MethodType):
            return ("method", self.all((value.__func__, value.__self__)))
        if isinstance(value, types.FunctionType):
            if COMPILED in value.__dict__:  # by torch.compile, whose wrapper tells nothing
                return ("compiled", self.read(value.__dict__[COMPILED]))
            parts = (value.__defaults__, value.__kwdefaults__, *map(in_cell, value.__closure__ or ()))
            read = _of_modules_in(value)
            return ("function", value.__code__, self.all(parts), *_values(_names_read([value])), *read)
        if kind.__module__.partition(".")[0] == "logging":  # a logger leads to all others there are
            return (kind, value)
        fields = getattr(value, "__dict__", None) or _slots_of(value, kind)
        if fields and kind.__module__ != "builtins":
            self.objects += not _tree.is_node(value)
            content = self.all(fields.values())
            self.objects -= not _tree.is_node(value)
            return (kind, tuple(fields), content)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject and value.size <= _MOST:
            return (kind, value.dtype.str, value.shape, value.tobytes())
        try:
            hash(value), value == value
        except Exception:  # whatever a class of the user's raises there
            raise UnsupportedError(f"a plain value of type {kind.__name__} cannot be compared by content") from None
        return (kind, value)


def _slots_of(value: Any, kind: type) -> dict[str, Any]:
    """What an object without a ``__dict__`` holds, if it is told from others by its address alone."""
    if any("__eq__" in vars(base) for base in kind.__mro__[:-1]):
        return {}
    names = [name for base in kind.__mro__ for name in vars(base).get("__slots__", ())]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _of_modules_in(fn: types.FunctionType) -> list[Hashable]:
    """The plain attributes that a function may read of modules that it knows of: it names them.

    Those are no nodes of the call, unless they are arguments as well.
    """
    names = names_in(fn.__code__)
    known = [*map(in_cell, fn.__closure__ or ()), *(fn.__defaults__ or ()), *map(fn.__globals__.get, names)]
    return _plain_of([value for value in known if isinstance(value, nn.Module)], names)


def _names_of(module: nn.Module) -> list[str]:
    """The names in the methods of a module."""
    own = [value for base in type(module).__mro__ if not of_library(base) for value in vars(base).values()]
    return list(dict.fromkeys(name for fn in map(function_in, own) if fn is not None for name in names_in(fn.__code__)))


def _plain_of(todo: list[nn.Module], names: Sequence[str]) -> list[Hashable]:
    """The plain attributes of these names that modules have, and the submodules that have such a name."""
    found: list[Hashable] = []
    for module in todo:  # which grows
        own = {name: module.__dict__[name] for name in names if name in module.__dict__}
        found += [(name, _of_atom(value)) for name, value in own.items() if type(value) in SCALARS]
        todo += [child for name in names if isinstance(child := module._modules.get(name), nn.Module)]
    return found


# Code ----------------------------------------------------------------------------------------------------------------

_Names = list[tuple["Mapping[str, Any] | _Members", str]]  # namespaces of modules and classes, and a name in each
_PARTIAL = functools.partial
# What has an outline beside plain values and functions; a module such as math has many of these that never change.
_READ_IN_PLACE = (types.BuiltinFunctionType, contextvars.ContextVar)
# For each class its members, the names that its methods read, and what these are.
_classes: weakref.WeakKeyDictionary[type, tuple[Any, _Names, Any]] = weakref.WeakKeyDictionary()


def of_class(cls: type) -> Hashable:
    """What a class holds, and what its methods, and the functions that they call, read of globals.

    NOTE [Classes]. A class may be changed where its instances are not: an attribute of it, a method, a global that a
    method names, the code of a helper. So all of it is compared at each call, which takes a few microseconds, and what
    to compare is found anew where something differs. Nothing here keeps a class alive: functions stand for their code.
    """
    own = [item for base in cls.__mro__ if not of_library(base) for item in vars(base).items()]
    members = [(name, _outline(value)) for name, value in own if not name.startswith("__") or callable(value)]
    known = _classes.get(cls)
    if known is None or known[0] != members or _values(known[1]) != known[2]:
        names = _names_read([value for _, value in own])
        known = _classes[cls] = (members, names, _values(names))
    return (*members, *known[2])


def reads_any(modules: Iterable[nn.Module], names: set[str]) -> bool:
    """Whether methods of modules, or what these call, read a global of one of these names."""
    classes = {class_of(inner) for module in modules for inner in module.modules()}
    members = [value for cls in classes for base in cls.__mro__ for value in vars(base).values()]
    return any(name in names for _, name in _names_read(members))


def _values(names: _Names) -> list[Hashable]:
    return [(name, _outline(space.get(name))) for space, name in names]


class _Members:
    """The members of a class that a global name leads to, which is looked up anew each time."""

    def __init__(self, space: Mapping[str, Any], name: str):
        self.space, self.name = space, name

    def get(self, key: str) -> Any:
        bases = getattr(self.space.get(self.name), "__mro__", ())
        return next((vars(base)[key] for base in bases if key in vars(base)), None)


def _outline(value: Any, seen: set[int] | None = None) -> Hashable:
    """A value if it is plain; of a function, or method of any kind, its code, and what its cells and defaults hold.

    A small container, a registry say, is read as far as it can be. What has neither code nor content is its type.
    """
    kind = type(value)
    if kind in SCALARS:
        return _of_atom(value)
    fn = value if kind is types.FunctionType else function_in(value) if kind is not _PARTIAL else None
    if fn is not None:
        code, known = fn.__code__, [*(fn.__defaults__ or ())]
        if fn.__kwdefaults__:
            known += fn.__kwdefaults__.values()
        if fn.__closure__:  # what ``super()`` needs is no content, and leads back to the class
            known += [in_cell(c) for c, name in zip(fn.__closure__, code.co_freevars) if name != "__class__"]
        if not known or not (seen := _unseen(fn, seen)):
            return code
        return (code, *[_outline(item, seen) for item in known])
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return value.__qualname__
    if kind is contextvars.ContextVar:
        return _outline(value.get(None), seen)
    if _is_plain(value):
        with contextlib.suppress(UnsupportedError):
            return of_value(value)
    inner = _inside(value)
    if inner and (seen := _unseen(value, seen)):
        keys = tuple([key for key in value if type(key) in SCALARS]) if isinstance(value, dict) else ()
        return (kind.__qualname__, keys, *[_outline(item, seen) for item in inner])
    return kind.__qualname__


def _unseen(value: Any, seen: set[int] | None) -> set[int] | None:
    """What an outline has come to with ``value``; None if it was there: functions refer to one another in circles."""
    if seen is None:
        return {id(value)}
    if id(value) in seen or len(seen) == LONG:
        return None
    seen.add(id(value))
    return seen


def _inside(value: Any) -> Sequence[Any]:
    """What is in a small list, tuple or dict, or in a partial."""
    if type(value) is _PARTIAL:
        return [value.func, *value.args, *value.keywords, *value.keywords.values()]
    if not isinstance(value, (list, tuple, dict)) or len(value) > LONG:
        return ()
    return list(value.values()) if isinstance(value, dict) else value


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether all there is to ``value`` are plain values, in containers and in objects of the user's classes."""
    if type(value) in ATOMS or isinstance(value, (enum.Enum, np.generic)):
        return True
    if isinstance(value, (list, tuple, dict)):
        inner = value.values() if isinstance(value, dict) else value
    elif isinstance(value, np.ndarray):
        return value.size <= _MOST and not value.dtype.hasobject
    elif isinstance(value, (nn.Module, type)) or of_library(type(value)) or not hasattr(value, "__dict__"):
        return False
    else:
        inner = vars(value).values()
    return depth < _DEEP and len(inner) <= LONG and all(_is_plain(item, depth + 1) for item in inner)


def _names_read(values: list[Any]) -> _Names:
    """The globals that functions among ``values`` read, those that have an outline, and what these read."""
    found: dict[tuple[Any, ...], tuple[Any, str]] = {}
    seen: set[types.FunctionType] = set()
    todo = [fn for value in values for fn in _functions_in(value)]
    while todo:
        fn = todo.pop()
        if fn in seen or of_library(fn):
            continue
        seen.add(fn)
        todo += in_closure(fn)
        names = names_in(fn.__code__)
        for space in spaces_of(fn, names):
            for name in names:
                if name not in space:
                    continue
                value = space[name]
                inner = _functions_in(value)
                in_place = space is fn.__globals__ and any(
                    isinstance(v, _READ_IN_PLACE) for v in (value, *_inside(value))
                )
                if inner or in_place or _is_plain(value):
                    found[id(space), name] = space, name
                    todo += inner
                elif isinstance(value, type) and not of_library(value):  # a flag, or a place for functions
                    members = _Members(space, name)
                    for own in names:
                        member = members.get(own)
                        if member is not None and own not in vars(object):
                            found[id(space), name, own] = members, own
                            todo += _functions_in(member)
    return list(found.values())


def _functions_in(value: Any, depth: int = 3) -> list[types.FunctionType]:
    """The functions in a value, or in a small container such as a registry."""
    fn = function_in(value)
    found = [] if fn is None else [fn]
    return found + [fn for item in _inside(value) for fn in _functions_in(item, depth - 1)] if depth else found
