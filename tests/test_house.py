"""The rules of the house, checked on the source text. Edit the tables when the house changes."""

import ast
import graphlib
import inspect
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import torchlift

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "torchlift"
TESTS = ROOT / "tests"

# A file imports only from rows above its own; in a folder (a row with a `*`) also from its neighbours, without cycles.
ROWS = [
    ["errors.py", "_context.py"],
    ["_compat.py", "unread.py"],
    ["_tree.py"],
    ["filters.py", "named_axes.py", "contents.py"],
    ["engine/*"],
    ["variables.py", "rng.py"],
    ["groups.py", "nodes.py", "misspelt.py"],
    ["references.py", "given.py"],
    ["code.py", "digests.py"],
    ["collecting.py", "unseen.py"],
    ["containers.py"],
    ["changes.py"],
    ["pack.py"],
    ["fingerprint.py", "metadata.py", "applying.py", "written.py"],
    ["alike.py", "scanned.py", "stacking.py"],
    ["enrolling.py"],
    ["stacked_classes.py"],
    ["lifting.py", "axes.py"],
    ["norm.py", "sharding.py", "state_dict.py", "explaining.py"],
    ["transforms/*"],
    ["layer_calls.py"],
    ["scan_layers.py"],
    ["__init__.py"],
]
# The engine works on pytrees and knows no module: for it, only these stand above.
ENGINE_IMPORTS = {"errors.py", "_compat.py", "_tree.py"}

MAX_LINES = 450
LONGER = {"_compat.py": 1330}  # the one file that may import private torch: two of them would not be one

PUBLIC_NAMES = [
    "AliasError",
    "ArgumentError",
    "AxisError",
    "AxisMetadata",
    "AxisNameError",
    "BranchError",
    "CarryError",
    "ClosureError",
    "DenyList",
    "DifferentiationError",
    "DonatedTensorError",
    "FilterError",
    "FunctionTargetError",
    "In",
    "IterationError",
    "LayerMismatchError",
    "MetadataError",
    "ModifyCollectionError",
    "OptionError",
    "Out",
    "PARTITION_NAME",
    "Partitioned",
    "PlainAttributeError",
    "PublishError",
    "RandomnessError",
    "StackedModuleError",
    "StateDictError",
    "TorchliftCompileWarning",
    "TorchliftError",
    "TorchliftWarning",
    "TransformTargetError",
    "TransformedMethodReturnValueError",
    "UnsupportedError",
    "Variable",
    "VariableNameError",
    "add_metadata_axis",
    "all_gather",
    "apply",
    "axis_index",
    "axis_metadata",
    "broadcast",
    "capture",
    "checkpoint",
    "checkpoint_name",
    "checkpoint_policies",
    "cond",
    "custom_vjp",
    "disable_named_call",
    "enable_named_call",
    "explain",
    "grad",
    "is_recomputing",
    "jit",
    "jvp",
    "make_rng",
    "map_variables",
    "named_call",
    "override_named_call",
    "pmax",
    "pmean",
    "pmin",
    "psum",
    "remat",
    "remat_scan",
    "scan",
    "scan_layers",
    "seed_rngs",
    "set_collection",
    "shard",
    "sow",
    "stack_modules",
    "stack_state_dict",
    "switch",
    "sync_batch_norm",
    "unstack_modules",
    "unstack_state_dict",
    "value_and_grad",
    "variable",
    "variables",
    "vjp",
    "vmap",
    "while_loop",
    "with_partitioning",
]

# Argument names of flax.linen.transforms, in its order; ours may go on after them. `*x` as in a signature.
_REMAT = "target variables rngs concrete prevent_cse static_argnums policy methods"
REFERENCE_ARGUMENTS = {
    "add_metadata_axis": "target variable_axes metadata_params",
    "checkpoint": _REMAT,
    "cond": "pred true_fun false_fun mdl *operands variables rngs",
    "custom_vjp": "fn forward_fn backward_fn grad_vars nondiff_argnums",
    "grad": "fn mdl *primals has_aux reduce_axes variables rngs",
    "jit": "target variables rngs static_argnums donate_argnums device backend methods",
    "jvp": "fn mdl primals tangents variable_tangents variables rngs",
    "map_variables": "target mapped_collections trans_in_fn trans_out_fn init mutable rngs variables methods",
    "named_call": "class_fn force",
    "remat": _REMAT,
    "remat_scan": "target lengths policy variable_broadcast variable_carry variable_axes split_rngs",
    "scan": "target variable_axes variable_broadcast variable_carry split_rngs in_axes out_axes length reverse unroll"
    " data_transform metadata_params methods",
    "switch": "index branches mdl *operands variables rngs",
    "value_and_grad": "fn mdl *primals has_aux reduce_axes variables rngs",
    "vjp": "fn mdl *primals has_aux reduce_axes vjp_variables variables rngs multi_scope",
    "vmap": "target variable_axes split_rngs in_axes out_axes axis_size axis_name spmd_axis_name metadata_params"
    " methods",
    "while_loop": "cond_fn body_fn mdl init carry_variables broadcast_variables split_rngs",
}


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


FILES = sorted(_name(path) for path in PACKAGE.rglob("*.py"))


def _parse(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text())


def _file_of(module: str) -> str | None:
    """`torchlift.engine.loop` -> `engine/loop.py`; None for what is no module of the package."""
    top, *rest = module.split(".")
    path = PACKAGE.joinpath(*rest)
    candidates = [path / "__init__.py", path.with_suffix(".py")] if rest else [PACKAGE / "__init__.py"]
    return next((_name(c) for c in candidates if top == "torchlift" and c.is_file()), None)


def _imported(tree: ast.Module, name: str = "__init__.py") -> Iterator[str]:
    """The dotted names that a file imports, at any depth; relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["torchlift", *name.split("/")[:-1]]
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, node.module] if node.module else base)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _imported_files(name: str) -> set[str]:
    found = (_file_of(dotted) or _file_of(dotted.rpartition(".")[0]) for dotted in _imported(_parse(name), name))
    return {file for file in found if file is not None}


def _row(name: str) -> int | None:
    return next((i for i, row in enumerate(ROWS) if any(fnmatchcase(name, entry) for entry in row)), None)


@pytest.mark.parametrize("name", FILES)
def test_imports_only_from_rows_above(name):
    row = _row(name)
    assert row is not None, f"{name} stands in no row: add it to ROWS"
    folder = name.partition("/")[0] + "/" if "/" in name else None
    for other in _imported_files(name):
        if folder is not None and other.startswith(folder):
            continue
        assert (_row(other) or 0) < row, f"{name} imports {other}, which does not stand in a row above it"
        assert folder != "engine/" or other in ENGINE_IMPORTS, f"{name} imports {other}: the engine knows only pytrees"


def test_no_import_cycles():
    # A folder's `__init__` re-exports its files, which find each other by their own names.
    graph = {name: _imported_files(name) for name in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", sorted([*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")]), ids=lambda p: p.name)
def test_no_file_is_too_long(path):
    lines = len(path.read_text().splitlines())
    most = LONGER.get(path.name, MAX_LINES)
    assert lines <= most, f"{path.name} has {lines} lines, expected at most {most}: split it"


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("__init__.py")])
def test_init_has_no_code(name):
    for node in _parse(name).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = [ast.unparse(target) for target in node.targets] if isinstance(node, ast.Assign) else []
        assert docstring or isinstance(node, ast.Import | ast.ImportFrom) or names in (["__all__"], ["__version__"]), (
            f"{name}:{node.lineno}: `{ast.unparse(node)}` is code; it belongs in a module"
        )


def test_public_names_are_frozen():
    listed, exported = set(PUBLIC_NAMES), set(torchlift.__all__) - {"__version__"}
    assert not exported - listed, f"exported but not listed here: {sorted(exported - listed)}"
    assert not listed - exported, f"listed here but not exported: {sorted(listed - exported)}"
    assert PUBLIC_NAMES == sorted(PUBLIC_NAMES)
    assert len(torchlift.__all__) == len(set(torchlift.__all__))


def test_version_is_one():
    assert torchlift.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def _is_private(dotted: str) -> bool:
    """`torch._C`, `torch.utils._pytree`, `torch.fx.experimental.x`; not `torch.__version__`, `torch._check`."""
    top, *rest = dotted.split(".")
    if dotted.startswith(("torch._assert", "torch._check")) or top not in ("torch", "functorch"):
        return False
    hidden = any(part.startswith("_") and not part.startswith("__") for part in rest)
    return hidden or top == "functorch" or f"{dotted}.".startswith("torch.fx.experimental.")


def _torch_names(name: str) -> Iterator[tuple[int, str]]:
    """Every dotted name in a file, aliases resolved: imported, used as an attribute, or spelled as a string."""
    tree = _parse(name)
    aliases = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, dotted) for dotted in _imported(ast.Module([node], []), name))
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            aliases |= {alias.asname: prefix + alias.name for alias in node.names if alias.asname}
            if prefix:
                aliases |= {alias.name: prefix + alias.name for alias in node.names if not alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            if head in aliases and all(part.isidentifier() for part in rest.split(".")):
                yield node.lineno, f"{aliases[head]}.{rest}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if "." in node.value and all(part.isidentifier() for part in node.value.split(".")):
                yield node.lineno, node.value


@pytest.mark.parametrize("name", [name for name in FILES if name != "_compat.py"])
def test_private_torch_only_in_compat(name):
    private = sorted({f"{name}:{line}: {dotted}" for line, dotted in _torch_names(name) if _is_private(dotted)})
    assert not private, f"private torch is used outside _compat.py: {private}"


@pytest.mark.parametrize("name", sorted(torchlift.__all__))
def test_public_names_are_documented(name):
    value = getattr(torchlift, name)
    if not (inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value)):
        return  # a constant
    doc = value.__doc__ or ""
    assert doc.strip(), f"torchlift.{name} has no docstring"
    if not (inspect.isclass(value) and issubclass(value, BaseException)):
        assert ">>>" in doc, f"the docstring of torchlift.{name} shows no example (>>>)"


def _names_in(node: ast.AST) -> set[str]:
    """Plain and attribute names: {'errors', 'AxisError'} for `errors.AxisError`."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return found | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def _own_errors() -> set[str]:
    return {node.name for node in ast.walk(_parse("errors.py")) if isinstance(node, ast.ClassDef)}


def _raises_calls() -> Iterator[tuple[Path, ast.Module, ast.Call]]:
    for path in sorted(TESTS.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("raises") and node.args:
                yield path, tree, node


def test_raised_errors_are_tested_by_message():
    own, matched = _own_errors(), set()
    for path, tree, call in _raises_calls():
        names = _names_in(call.args[0])
        if any(keyword.arg == "match" for keyword in call.keywords):
            # A parametrized test (`pytest.raises(error, match=match)`) names its classes elsewhere in its file.
            matched |= _names_in(tree) if all(name.islower() for name in names) else names
        else:
            assert not names & own, f"{path.name}:{call.lineno}: pytest.raises({', '.join(names & own)}) has no match="
    for name in FILES:
        for node in ast.walk(_parse(name)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                untested = _names_in(node.exc.func) & own - matched
                assert not untested, f"{name}:{node.lineno}: no pytest.raises({', '.join(untested)}, match=...)"


@pytest.mark.parametrize("name", sorted(set(REFERENCE_ARGUMENTS) & set(torchlift.__all__)))
def test_arguments_follow_the_reference(name):
    spelled: list[str] = []
    for parameter in inspect.signature(getattr(torchlift, name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in spelled):
            spelled.append("*")
        spelled.append(f"*{parameter.name}" if parameter.kind is parameter.VAR_POSITIONAL else parameter.name)
    expected = REFERENCE_ARGUMENTS[name].split()
    assert spelled[: len(expected)] == expected, f"{name}: the reference's arguments come first, in its order"
