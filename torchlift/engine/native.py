"""Which graphs are called from C++.

NOTE [Called from C++]. Inductor can write the code that calls the kernels of a graph in C++ as well (``cpp_wrapper``).
A layer of twelve products and as many kernels is then called in a twentieth less time, and is one program to build
where each kernel was one. But what such code calls through torch's C interface may fail unheard: ``scatter_add`` of an
index out of range returns, where the loop in Python raises. And operators without a C interface are called through
Python after all, with a line in the log. So it serves only graphs on a CPU whose every operator either becomes a kernel
of Inductor's own or has a C interface and cannot fail but by its shapes. Which becomes a kernel may depend on dtypes:
``2 ** integers`` does not, and was wrong. Inductor stops where it would call such an operator, and Python calls all.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from torchlift import _compat

_SUMS = "sum mean prod amax amin max min any all argmax argmin var var_mean"
_MADE = "full full_like zeros zeros_like ones ones_like empty empty_like scalar_tensor arange new_zeros new_ones iota"
_MOVED = "_to_copy _unsafe_view copy cat select_scatter slice_scatter constant_pad_nd fill masked_fill"
_PICKED = "gather index embedding rev _assert_tensor_metadata"
# What C++ calls beside the kernels.
CALLED = frozenset(
    "mm addmm bmm baddbmm convolution convolution_backward native_dropout"
    " _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward".split()
)
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
_KNOWN = CALLED | frozenset(" ".join([_SUMS, _MADE, _MOVED, _PICKED]).split())
_ON_SIZES = frozenset({operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod})


def is_native(graph: torch.fx.GraphModule) -> bool:
    """Whether what calls the kernels of ``graph`` may be C++."""
    return all(_is_native(node) for node in graph.graph.nodes)


def _is_native(node: torch.fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return _fits(node.meta.get("val"))
    if node.op != "call_function":
        return False
    op: Any = node.target
    if op in _ON_SIZES:
        return True
    if getattr(op, "namespace", None) not in ("aten", "prims"):
        return False
    name = op.overloadpacket.__name__
    known = torch.Tag.pointwise in op.tags or op.is_view or name in _KNOWN or name.startswith("sym_")
    lowered = name in CALLED or not _compat.is_inductor_fallback(op)
    if name in _PRODUCTS and len({arg.meta["val"].dtype for arg in node.args if isinstance(arg, torch.fx.Node)}) > 1:
        return False  # an error, of which C++ would tell no more than that there is one
    return known and lowered and _fits(node.meta.get("val"))


def _fits(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.device.type == "cpu" and not value.is_complex()
    return not isinstance(value, tuple | list) or all(map(_fits, value))
