"""The operators torch.ops.fused_attention.*: handles, shapes for tracing, rules for torch.vmap, the
state of dropout, and which library serves them on a GPU."""

from . import fake, gpu, vmap, writes  # noqa: F401  # they register
from .arguments import Arguments as Arguments
from .dropout import philox_state as philox_state
from .handles import OPERATORS as OPERATORS
from .handles import Operators as Operators
from .handles import arguments as arguments
from .handles import backward as backward
from .handles import backward_jvp as backward_jvp
from .handles import check_sequences as check_sequences
from .handles import dropout_keep_mask as dropout_keep_mask
from .handles import forward as forward
from .handles import forward_plain as forward_plain
from .handles import forward_plain_lse as forward_plain_lse
from .handles import jvp as jvp
from .handles import softmax_backward as softmax_backward
from .handles import softmax_forward as softmax_forward
from .handles import statistics as statistics
from .handles import weights as weights
from .traced import define_traced as define_traced
from .writes import kv_cache_append as kv_cache_append
from .writes import softmax_in_place as softmax_in_place
