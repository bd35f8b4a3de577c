"""The arguments of the operators, from `testing.Inputs`."""

from fused_attention.call.problem import causal_number
from fused_attention.tools import testing


def arguments(inputs: testing.Inputs, precision: int = 0):
    """Returns the numbers and options that attention_forward and attention_backward both take."""
    tensors, options = inputs.tensors, inputs.options
    scale = options["scale"]
    numbers = (
        tensors["query"].shape[-1] ** -0.5 if scale is None else scale,
        causal_number(options["causal"], False, options.get("diagonal")),
        *options["window_size"],
        precision,
    )
    rest = (
        *(options.get("mask"), tensors.get("bias"), options.get("key_padding_mask")),
        *(options.get("alibi_slopes"), tensors.get("sinks"), options.get("philox")),
        *(options["softcap"], options["dropout_p"]),
    )
    return *numbers, *rest
