"""What both sides share: tree helpers, the loss, and the file of expected numbers.

Nothing here imports jax or torch.

A record is `{kind: {path: array or str}}`; its kinds are `arg`, `variable`, `out`, `grad`,
`arg_grad` and `updated`. A file holds one vector of numbers and a JSON index that says where
each array lies in it and what shape it has.
"""

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def leaves(tree, path=""):
    """`[(path, leaf), ...]` with dict keys sorted and `None` left out."""
    if tree is None:
        return []
    if isinstance(tree, dict):
        items = sorted(tree.items())
    elif isinstance(tree, (list, tuple)):
        items = list(enumerate(tree))
    else:
        return [(path, tree)]
    return [pair for key, value in items for pair in leaves(value, f"{path}.{key}" if path else str(key))]


def nest(flat):
    """`{'a.b': x}` -> `{'a': {'b': x}}`."""
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def cotangent(position, shape):
    """The fixed weights of the `position`-th output in the loss `sum(out * cotangent)`."""
    return np.cos(np.arange(np.prod(shape, dtype=int)) + position).reshape(shape)


def generator(name):
    """The source of a scenario's inputs and weights; its name is the seed."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def save(file, records):
    index, numbers, offset = {}, [], 0
    for name, record in records.items():
        index[name] = {}
        for kind, entries in record.items():
            index[name][kind] = {}
            for path, value in entries.items():
                if isinstance(value, str):
                    index[name][kind][path] = value
                    continue
                value = np.asarray(value)
                index[name][kind][path] = [offset, list(value.shape), value.dtype.kind]
                numbers.append(value.astype(np.float64).ravel())
                offset += value.size
    index = np.frombuffer(json.dumps(index).encode(), np.uint8)
    np.savez_compressed(HERE / file, index=index, numbers=np.concatenate(numbers))


def load(file):
    with np.load(HERE / file) as stored:
        index, numbers = json.loads(stored["index"].tobytes()), stored["numbers"]

    def read(entry):
        if isinstance(entry, str):
            return entry
        offset, shape, kind = entry
        dtype = {"f": np.float64, "i": np.int64, "b": np.bool_}[kind]
        return numbers[offset : offset + int(np.prod(shape, dtype=int))].reshape(shape).astype(dtype)

    return {
        name: {kind: {path: read(entry) for path, entry in entries.items()} for kind, entries in record.items()}
        for name, record in index.items()
    }
