"""Lifted transforms for PyTorch: vmap, scan, remat and their family, for stateful modules.

An ``nn.Module`` class, method or function goes in, and one of the same kind comes out, with its parameters, buffers,
batch statistics and random draws taken care of.
"""

from torchlift.applying import apply
from torchlift.axes import all_gather, axis_index, pmax, pmean, pmin, psum
from torchlift.engine.policies import checkpoint_name, checkpoint_policies
from torchlift.engine.remat import is_recomputing
from torchlift.errors import (
    AliasError,
    ArgumentError,
    AxisError,
    AxisNameError,
    BranchError,
    CarryError,
    ClosureError,
    DifferentiationError,
    DonatedTensorError,
    FilterError,
    FunctionTargetError,
    IterationError,
    LayerMismatchError,
    MetadataError,
    ModifyCollectionError,
    OptionError,
    PlainAttributeError,
    PublishError,
    RandomnessError,
    StackedModuleError,
    StateDictError,
    TorchliftCompileWarning,
    TorchliftError,
    TorchliftWarning,
    TransformedMethodReturnValueError,
    TransformTargetError,
    UnsupportedError,
    VariableNameError,
)
from torchlift.explaining import explain
from torchlift.filters import DenyList, In, Out
from torchlift.metadata import PARTITION_NAME, AxisMetadata, Partitioned, axis_metadata, with_partitioning
from torchlift.norm import sync_batch_norm
from torchlift.rng import make_rng, seed_rngs
from torchlift.scan_layers import scan_layers
from torchlift.sharding import shard
from torchlift.stacking import stack_modules, unstack_modules
from torchlift.state_dict import stack_state_dict, unstack_state_dict
from torchlift.transforms.autodiff import grad, jvp, value_and_grad, vjp
from torchlift.transforms.control_flow import cond, switch
from torchlift.transforms.custom_vjp import custom_vjp
from torchlift.transforms.jit import jit
from torchlift.transforms.lengths import broadcast
from torchlift.transforms.map_variables import map_variables
from torchlift.transforms.metadata_axis import add_metadata_axis
from torchlift.transforms.profiling import disable_named_call, enable_named_call, named_call, override_named_call
from torchlift.transforms.remat import checkpoint, remat
from torchlift.transforms.scan import remat_scan, scan
from torchlift.transforms.vmap import vmap
from torchlift.transforms.while_loop import while_loop
from torchlift.variables import Variable, capture, set_collection, sow, variable, variables

__version__ = "0.1.0"

__all__ = [
    "PARTITION_NAME",
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
