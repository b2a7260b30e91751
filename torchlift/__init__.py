"""Lifted transforms for torch modules."""

from torchlift.errors import *  # noqa
from torchlift.filters import DenyList, In, Out
from torchlift.rng import make_rng, seed_rngs
from torchlift.stacking import stack_modules, unstack_modules
from torchlift.transforms.scan import broadcast, remat_scan, scan
from torchlift.transforms.vmap import vmap
from torchlift.variables import Variable, capture, set_collection, sow, variable, variables
from torchlift.applying import apply
from torchlift.engine.policies import checkpoint_name, checkpoint_policies
from torchlift.engine.remat import is_recomputing
from torchlift.transforms.autodiff import grad, jvp, value_and_grad, vjp
from torchlift.transforms.remat import checkpoint, remat
from torchlift.scan_layers import ScanLayers, scan_layers
from torchlift.state_dict import stack_state_dict, unstack_state_dict
from torchlift.axes import all_gather, axis_index, pmax, pmean, pmin, psum
from torchlift.norm import sync_batch_norm
