"""The data model: a module's parameters and buffers as named variables in collections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchlift import _compat
from torchlift._context import context, entered
from torchlift.errors import UnsupportedError, VariableNameError
from torchlift.filters import Filter, check, matches

PARAMS, BATCH_STATS, BUFFERS = "params", "batch_stats", "buffers"
COLLECTIONS = "_torchlift_collections"  # in a module's __dict__: {buffer name: collection}, for those the user chose
# In the __dict__ of a module bound in a body: the index of its root and its dotted path in there; then of that root the
# place in the outermost body, if one is nested in another.
AT = "_torchlift_at"
ATTRIBUTE = "attribute"  # the store, and the collection, of a tensor that is kept in a plain attribute

WRAPPED = "_orig_mod"  # what a module that torch.compile returned calls the one that it was given


def outer_place(module: nn.Module) -> tuple[int, str, nn.Module]:
    """Of a bound module: the number of a root of the outermost body, the path from it, and that root, a real module."""
    _, path, (number, base, root) = module.__dict__[AT]
    return number, f"{base}.{path}" if base and path else base or path, root


def collection_of(module: nn.Module, store: str, key: str) -> str:
    """The collection of ``module``'s own tensor ``key``, which lies in ``store`` (``_parameters`` or ``_buffers``)."""
    if store == "_parameters":
        return PARAMS
    chosen = module.__dict__.get(COLLECTIONS)
    if chosen is not None and key in chosen:
        return chosen[key]
    return BATCH_STATS if isinstance(module, _compat.NormBase) else BUFFERS


def assign_collection(module: nn.Module, key: str, collection: str) -> None:
    """Notes that ``module``'s own buffer ``key`` belongs to ``collection``."""
    # A new dict, not an entry in the old one: modules bound in a body share theirs with the module they stand for.
    module.__dict__[COLLECTIONS] = {**module.__dict__.get(COLLECTIONS, {}), key: collection}


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, before ``torch.nn.utils.parametrize`` gave it one of its own."""
    return type(module).__mro__[1] if "parametrizations" in module.__dict__["_modules"] else type(module)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """``(store, key, tensor)`` of a module's own parameters and buffers."""
    for store in ("_parameters", "_buffers"):
        for key, tensor in module.__dict__[store].items():
            if tensor is not None:
                yield store, key, tensor


def variables(module: nn.Module, filter: Filter = True) -> dict[str, dict[str, Tensor]]:
    """The variables of a module, by collection and dotted name.

    Parameters are in ``params``; the statistics of torch's normalisation layers in ``batch_stats``; every other
    buffer, persistent or not, in ``buffers``, unless :func:`variable` or :func:`set_collection` put it elsewhere.

    Args:
        module: the module; nothing in it is changed.
        filter: the collections wanted: True, a name, names, or ``DenyList``.

    Returns:
        ``{collection: {dotted_name: tensor}}``: the module's own tensors, not copies, named as ``named_parameters``
        names them. A tensor that has several names is there once, under the first.

    Raises:
        FilterError: ``filter`` is no filter.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> {c: sorted(names) for c, names in torchlift.variables(net, torchlift.DenyList("params")).items()}
        {'batch_stats': ['1.num_batches_tracked', '1.running_mean', '1.running_var']}
    """
    check(filter, "variables(filter=)")
    found: dict[str, dict[str, Tensor]] = {}
    seen: set[Tensor] = set()
    for path, owner in module.named_modules():
        for store, key, tensor in own_tensors(owner):
            collection = collection_of(owner, store, key)
            if tensor not in seen and matches(filter, collection):
                seen.add(tensor)
                found.setdefault(collection, {})[f"{path}.{key}" if path else key] = tensor
    return found


class Variable:
    """A reference to one variable of one module, which may be passed to lifted functions.

    Args:
        module: the module that owns the variable.
        collection: its collection.
        name: its name in that module.

    Raises:
        VariableNameError: the module has no such variable.

    Example:
        >>> count = torchlift.variable(torch.nn.Linear(2, 2), "state", "count", lambda: torch.zeros(()))
        >>> count.value = count.value + 1
        >>> count
        Variable(collection='state', name='count', value=tensor(1.))
    """

    __slots__ = ("collection", "module", "name")

    def __init__(self, module: nn.Module, collection: str, name: str):
        self.module, self.collection, self.name = module, collection, name
        self._store()

    def _store(self) -> dict[str, Any]:
        for store in ("_parameters", "_buffers"):
            tensors = self.module.__dict__[store]
            if tensors.get(self.name) is not None and collection_of(self.module, store, self.name) == self.collection:
                return tensors
        known = variables(self.module).get(self.collection, {})
        raise VariableNameError(
            f"{type(self.module).__name__} has no variable {self.name!r} in collection {self.collection!r}, "
            f"only {sorted(known)}; declare it with torchlift.variable(module, collection, name, init_fn)"
        )

    @property
    def value(self) -> Tensor:
        """The tensor."""
        return self._store()[self.name]

    @value.setter
    def value(self, value: Tensor) -> None:
        self._set(value)

    def _set(self, value: Tensor) -> None:
        store = self._store()
        value = torch.as_tensor(value)
        if isinstance(store[self.name], nn.Parameter) and AT not in self.module.__dict__:
            # Rebinding would leave the optimizer with a tensor that the module no longer uses. In a body it is seen,
            # and published into the parameter.
            with torch.no_grad():
                _compat.writable(store[self.name]).copy_(value)
        else:
            store[self.name] = value

    if not _compat.TRACES_SETTERS:

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "value":
                self._set(value)
            else:
                object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Variable(collection={self.collection!r}, name={self.name!r}, value={self.value!r})"


def variable(
    module: nn.Module, collection: str, name: str, init_fn: Callable[..., Any] | None = None, *init_args: Any
) -> Variable:
    """Declares a variable of a module in a collection of any name, or fetches it if it is there.

    Call it in ``__init__``, or in ``forward`` as flax modules do. The variable is a buffer (a parameter for the
    collection ``params``): it moves with ``.to()``, is saved in ``state_dict`` and read as ``module.name``.

    Args:
        module: the module that owns it.
        collection: any name.
        name: an attribute name, without dots.
        init_fn: called with ``init_args`` for the first value, a tensor or a number, where it is not yet there.
        *init_args: for ``init_fn``.

    Returns:
        A :class:`Variable`, whose ``value`` is read and set.

    Raises:
        VariableNameError: the name is taken by something else, or is not there and no ``init_fn`` was given.

    Example:
        >>> class Counter(torch.nn.Module):
        ...     def forward(self, x):
        ...         calls = torchlift.variable(self, "state", "calls", lambda: torch.tensor(0))
        ...         calls.value = calls.value + 1
        ...         return x
        >>> counter = Counter()
        >>> _ = counter(1), counter(2)
        >>> torchlift.variables(counter)
        {'state': {'calls': tensor(2)}}
    """
    store = "_parameters" if collection == PARAMS else "_buffers"
    if module.__dict__[store].get(name) is not None:
        if collection_of(module, store, name) == collection:
            return Variable(module, collection, name)
    if hasattr(module, name) or "." in name:
        raise VariableNameError(
            f"{type(module).__name__}: variable {name!r} of collection {collection!r} cannot be declared: the name "
            + ("has a dot in it" if "." in name else "is taken by another attribute; choose another name")
        )
    if init_fn is None:
        raise VariableNameError(
            f"{type(module).__name__} has no variable {name!r} in collection {collection!r}: pass init_fn to declare it"
        )
    value = torch.as_tensor(init_fn(*init_args))
    if collection == PARAMS:
        module.register_parameter(name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
    else:
        module.register_buffer(name, value)
        assign_collection(module, name, collection)
    return Variable(module, collection, name)


def set_collection(module: nn.Module, collection: str, *buffer_names: str) -> nn.Module:
    """Puts buffers of a module into a collection of any name.

    Args:
        module: the module.
        collection: the collection's name; not ``params``, which is for parameters.
        *buffer_names: names of buffers, dotted for those of submodules; any of several that a buffer has.

    Returns:
        ``module``.

    Raises:
        VariableNameError: there is no such buffer, or the collection is ``params``.

    Example:
        >>> norm = torchlift.set_collection(torch.nn.BatchNorm1d(2), "ema", "running_mean", "running_var")
        >>> sorted(torchlift.variables(norm, "ema")["ema"])
        ['running_mean', 'running_var']
    """
    known = [name for name, _ in module.named_buffers(remove_duplicate=False)]
    for name in buffer_names:
        if name not in known or collection == PARAMS:
            raise VariableNameError(
                f"set_collection({type(module).__name__}, {collection!r}): "
                + (
                    f"{name!r} is no buffer; the buffers are {known}"
                    if name not in known
                    else "'params' holds parameters only; make it an nn.Parameter"
                )
            )
    for name in buffer_names:
        path, _, key = name.rpartition(".")
        assign_collection(module.get_submodule(path), key, collection)
    return module


class Site(NamedTuple):
    """Where a value was sown: the owner's root (an index, in a body), its path in there, collection and name."""

    root: int
    path: str
    collection: str
    name: str

    @property
    def dotted_name(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


class Capture:
    """One request for sown values: which collections, and what came so far."""

    def __init__(self, filter: Any):  # a Filter, or anything else that names can be asked to be in
        self.filter = filter
        self.sown: dict[Site, tuple[Any, ...]] = {}
        # Only capture() sets these: how many modules are being called, and where those in the outermost lie.
        self.depth = 0
        self.located: list[tuple[str, nn.Module]] = []
        self.store: dict[str, dict[str, tuple[Any, ...]]] = {}

    def add(self, module: nn.Module, collection: str, name: str, value: Any, path: str = "") -> None:
        """``path`` is the module's where no module around it is being called."""
        site = Site(*(self._locate(module) or (0, path)), collection, name)
        self.sown[site] = (*self.sown.get(site, ()), value)
        self.store.setdefault(collection, {})[site.dotted_name] = self.sown[site]

    def _locate(self, module: nn.Module) -> tuple[int, str] | None:
        if AT in module.__dict__:
            return module.__dict__[AT][:2]
        for path, candidate in self.located if self.depth else ():
            if candidate is module:
                return 0, path
        return None

    def enter(self, module: nn.Module) -> None:
        """NOTE [Wrapped]. What torch.compile returned is a module around the one it was given: it has no part in names,
        and Dynamo, tracing the one inside, cannot look at it."""
        if self.depth == 0:
            places = [place for place in module.named_modules() if WRAPPED not in place[1]._modules]
            self.located = [(".".join([n for n in path.split(".") if n != WRAPPED]), m) for path, m in places]
        self.depth += 1


def sow(module: nn.Module, collection: str, name: str, value: Any) -> None:
    """Hands out an intermediate value to whoever captures its collection.

    Costs nothing and keeps nothing unless :func:`capture` or ``apply(mutable=)`` asks for the collection. Inside
    ``vmap`` and ``scan`` the values of all indices come out stacked, on axis 0 unless ``variable_axes`` tells another.

    Args:
        module: the module that sows; its path becomes part of the name.
        collection: any name; ``intermediates`` by custom.
        name: the value's name; values sown again under it are appended.
        value: a tensor.

    Example:
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         torchlift.sow(self, "intermediates", "double", 2 * x)
        ...         return x
        >>> with torchlift.capture("intermediates") as store:
        ...     _ = Net()(torch.ones(2))
        >>> store
        {'intermediates': {'double': (tensor([2., 2.]),)}}
    """
    for frame in context.captures:
        if matches(frame.filter, collection):
            frame.add(module, collection, name, value)


def sow_at(module: nn.Module, site: Site, value: Any) -> None:
    """Sows what a body sowed at ``site``, in the module that it stands for."""
    for frame in context.captures:
        if matches(frame.filter, site.collection):
            frame.add(module, site.collection, site.name, value, site.path)


@contextmanager
def capture(*collections: str) -> Iterator[dict[str, dict[str, tuple[Any, ...]]]]:
    """Keeps what modules :func:`sow` while the block runs.

    Args:
        *collections: the collections to keep; all of them if none is named.

    Yields:
        ``{collection: {dotted_name: tuple of values}}``, filled as values come. Names are relative to the outermost
        module that was called.

    Example:
        >>> with torchlift.capture("intermediates") as store:
        ...     _ = torch.nn.Linear(2, 2)(torch.ones(1, 2))
        >>> store
        {}
    """
    if _compat.is_compiling():
        raise UnsupportedError(
            "capture: opened in code that torch.compile traces, which cannot see the hooks that it needs; open it "
            "around the compiled call, or take the values as outputs: torchlift.apply(module, {}, ..., mutable=[...])"
        )
    check(collections or True, "capture()")
    frame = Capture(collections or True)

    def enter(module: nn.Module, args: Any) -> None:
        if frame in context.captures:  # hooks are global: another thread's modules are none of ours
            frame.enter(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if frame in context.captures and frame.depth:
            frame.depth -= 1

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with entered(captures=(*context.captures, frame)):
            yield frame.store
    finally:
        for handle in handles:
            handle.remove()


# Tensors that wait for their shape -----------------------------------------------------------------------------------


class _Buffer(nn.parameter.UninitializedBuffer):
    """One that can be copied, as an uninitialised parameter can."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = uninitialised_like(self)
        return memo[id(self)]


UninitializedTensor = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer, _Buffer)


def uninitialised_like(tensor: torch.Tensor) -> Any:
    """A parameter or buffer of the device and dtype of ``tensor`` that waits for its shape."""
    kind: Any = nn.UninitializedParameter if isinstance(tensor, nn.Parameter) else _Buffer
    return kind(tensor.requires_grad, device=tensor.device, dtype=tensor.dtype)
