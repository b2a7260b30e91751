"""Every error and warning that torchlift raises by name.

Each error is a :class:`TorchliftError` and the builtin that fits it, so that code which does not know torchlift
can still catch it. A message names the transform, the module path, the argument or collection, what was got, what
was expected, and the fix.
"""

import difflib
import os
import sys
import warnings
from collections.abc import Iterable


class TorchliftError(Exception):
    """Base of all torchlift errors.

    Example:
        >>> issubclass(torchlift.FilterError, torchlift.TorchliftError)
        True
    """


class TransformTargetError(TorchliftError, TypeError):
    """A transform was given something that it cannot lift, such as a module instance."""


class FunctionTargetError(TransformTargetError, ValueError):
    """A transform that calls a function with a module was given a class or a module for the function."""


class TransformedMethodReturnValueError(TorchliftError, ValueError):
    """A lifted function returned a module or a :class:`torchlift.Variable`."""


class FilterError(TorchliftError, TypeError):
    """A collection filter is not True, False, a name, a collection of names, or a ``DenyList``."""


class ArgumentError(TorchliftError, ValueError):
    """An argument of a transform fits no argument of the function, or a call's argument does not fit the transform."""


class AxisError(TorchliftError, ValueError):
    """Axes or sizes disagree, are missing, or do not exist."""


class AxisNameError(TorchliftError, NameError):
    """No axis of that name is mapped around the call."""


class AliasError(AxisError):
    """One tensor is reached by paths that ask for different axes."""


class CarryError(TorchliftError, ValueError):
    """A loop body returned a carry whose structure, shape or dtype differs from the one it received."""


class DifferentiationError(TorchliftError, ValueError):
    """What is differentiated is no scalar, or a cotangent or tangent is not like what it belongs to."""


class BranchError(TorchliftError, ValueError):
    """The branches of a ``cond`` or ``switch`` return different things, or cannot be chosen between."""


class IterationError(TorchliftError, ValueError):
    """The iterations of a loop return values that cannot be stacked: other structures, shapes, or plain values."""


class OptionError(TorchliftError, ValueError):
    """An option of a loop or of its compilation has a value that it cannot have."""


class ModifyCollectionError(TorchliftError, RuntimeError):
    """A body changed a variable of a collection that is read-only there."""


class MetadataError(TorchliftError, ValueError):
    """Axis metadata does not fit its parameter, or a transform has no name for the axis it adds."""


class DonatedTensorError(TorchliftError, RuntimeError):
    """A tensor that was donated to a ``jit`` call was used again, or may not be donated."""


class PublishError(TorchliftError, RuntimeError):
    """New state cannot be written into the module from inside an outer ``torch.func`` transform."""


class PlainAttributeError(TorchliftError, RuntimeError):
    """A body assigned a tensor to a plain attribute, where it would outlive the transform that made it."""


class ClosureError(TorchliftError, RuntimeError):
    """A tensor reached a body by a closure, through which its gradient would be lost."""


class RandomnessError(TorchliftError, RuntimeError):
    """A body drew from a random stream that it was not given, or asked for one that has no seed."""


class VariableNameError(TorchliftError, KeyError):
    """A collection or variable name is unknown, or taken."""

    def __str__(self) -> str:  # KeyError would print the repr, with its newlines escaped
        return str(self.args[0]) if self.args else ""


class LayerMismatchError(TorchliftError, ValueError):
    """Modules that are to be stacked or run as one are not of equal structure."""


class StackedModuleError(TorchliftError, RuntimeError):
    """A module that holds several stacked ones was called as if it were one."""


class StateDictError(TorchliftError, ValueError):
    """A state dict has not the layout that was asked for."""


class UnsupportedError(TorchliftError, RuntimeError):
    """A combination that torch cannot express; the message says the way round."""


class TorchliftWarning(UserWarning):
    """Something that torchlift noticed and that does not stop the call."""


class TorchliftCompileWarning(TorchliftWarning):
    """A body lost its compiled path and runs as the plain loop; the message says why."""


_SKIPPED = (os.path.dirname(__file__), os.path.dirname(warnings.__file__) + os.sep + "contextlib.py")


def likely(name: object, names: Iterable[str]) -> str | None:
    """Which of ``names`` is meant by one that none of them is: a close match, if there is any."""
    return next(iter(difflib.get_close_matches(str(name), names, 1, cutoff=0.8)), None)


def warn(message: str, category: type[Warning]) -> None:
    """Warns at the user's line: the nearest frame that is neither in this package nor in torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_SKIPPED) and f"{os.sep}torch{os.sep}" not in name:
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
