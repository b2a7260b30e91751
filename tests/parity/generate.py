"""Run every scenario in Flax and write the expected numbers.

    cd tests && python -m parity.generate [name ...]

With names, only those scenarios run, and nothing is written: their records are printed.
"""

import importlib
import inspect
import sys

from .flax_side import record
from .store import HERE, save

FILES = {
    "expected_lifting.npz": ["vmap", "scan", "remat"],
    "expected_family.npz": ["jit", "variables", "autodiff", "control", "collectives", "metadata"],
}


def scenarios(topic):
    """The functions of one scenario file, in order of appearance: those that take `draw` alone."""
    found = vars(importlib.import_module(f"{__package__}.scenarios_{topic}"))
    return {name: value for name, value in found.items() if _is_scenario(name, value)}


def _is_scenario(name, value):
    takes = list(inspect.signature(value).parameters) if inspect.isfunction(value) else []
    return takes == ["draw"] and not name.startswith("_")


def main(names):
    for file, topics in FILES.items():
        found = {name: run for topic in topics for name, run in scenarios(topic).items()}
        if names:
            for name in found.keys() & set(names):
                print(name, record(name, found[name]))
            continue
        save(file, {name: record(name, run) for name, run in found.items()})
        print(f"{file}: {len(found)} scenarios, {(HERE / file).stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
