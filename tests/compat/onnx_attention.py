"""ONNX's operator Attention, opsets 23 to 25, said with `attention`, and its backend test vectors.

`translate` is the dictionary between the two. Each output of each test of the onnx package
(`test_attention_*`) is one test here, compared by the rule of onnx's own runner.
"""

import math
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx.backend.test.case.node import collect_testcases

from fused_attention import attention
from fused_attention.attention_weights import attention_with_weights

WEIGHTS = 3  # the qk_matmul_output_mode for the weights after softmax


class Call(NamedTuple):
    """A call of `attention`; `key` and `value` are also the outputs present_key, present_value."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keys: int  # how many keys to pass: no query sees the others
    dtype: torch.dtype  # to compute in; results have that of the inputs
    options: dict


def translate(
    Q,
    K,
    V,
    attn_mask=None,
    past_key=None,
    past_value=None,
    nonpad_kv_seqlen=None,
    *,
    is_causal=0,
    scale=None,
    softcap=0.0,
    q_num_heads=None,
    kv_num_heads=None,
    softmax_precision=None,
    left_window_size=-1,
    right_window_size=-1,
    qk_matmul_output_mode=0,
):
    """Returns the `Call` that computes what the operator does.

    Inputs [B, S, H · D] are views of [B, H, S, D]. nonpad_kv_seqlen is seqused_k. A query i stands
    at the position of key i + past, where past is the length of past_key, nonpad_kv_seqlen - Sq, or
    0: causal and the windows are measured from there. A softmax is computed in float32, or more
    precisely if softmax_precision is DOUBLE: then all of attention is. The mode of qk_matmul_output
    changes nothing about the call.
    """
    dtype = torch.float64 if softmax_precision == onnx.TensorProto.DOUBLE else Q.dtype
    if Q.dim() == 3:
        Q = Q.unflatten(-1, (q_num_heads, -1)).transpose(1, 2)
        K, V = (x.unflatten(-1, (kv_num_heads, -1)).transpose(1, 2) for x in (K, V))
    past = 0
    if past_key is not None:
        past = past_key.shape[2]
        K, V = torch.cat((past_key, K), 2), torch.cat((past_value, V), 2)
    options = {"scale": scale, "softcap": softcap}
    left, right = left_window_size, 0 if is_causal else right_window_size
    keys = K.shape[2]
    if nonpad_kv_seqlen is not None:
        options["seqused_k"] = nonpad_kv_seqlen.int()
        options["diagonal"] = "bottom_right"
    elif past_key is None:
        options["diagonal"] = "top_left"
    else:  # the diagonal ends at the last key if there are Sq new ones
        options["diagonal"] = "bottom_right"
        if right >= 0:
            keys = min(keys, past + Q.shape[2] + right)
        ahead = keys - Q.shape[2] - past
        left, right = moved(left, ahead), moved(right, -ahead)
    options["window_size"] = (left, right)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        padding = (0, K.shape[2] - attn_mask.shape[-1])
        attn_mask = F.pad(attn_mask, padding, value=False if is_bool else -math.inf)
        options["mask" if is_bool else "bias"] = attn_mask[..., :keys]
    return Call(Q, K, V, keys, dtype, options)


def moved(limit, steps):
    """Returns a limit of a window, -1 for none, measured from a diagonal `steps` further right."""
    if limit >= 0 > limit + steps:
        raise NotImplementedError("window: attention() has no windows that exclude the diagonal")
    return limit if limit < 0 else limit + steps


def attend(inputs, attributes, outputs):
    """Returns the operator's outputs of these names: Y, present_key, present_value and
    qk_matmul_output."""
    call = translate(*inputs, **attributes)
    results = {"present_key": call.key, "present_value": call.value}
    key, value = (x[:, :, : call.keys] for x in (call.key, call.value))
    tensors = [x.to(call.dtype) for x in (call.query, key, value)]
    if "qk_matmul_output" in outputs:
        if attributes.get("qk_matmul_output_mode", 0) != WEIGHTS:
            raise NotImplementedError("qk_matmul_output: scores before softmax are never made")
        weights = attention_with_weights(*tensors, average=False, **call.options)[1]
        results["qk_matmul_output"] = F.pad(weights, (0, call.key.shape[2] - call.keys))
    if "Y" in outputs:
        out = attention(*tensors, **call.options)
        is_3d = inputs[0].dim() == 3
        results["Y"] = out.transpose(1, 2).flatten(2) if is_3d else out
    return [results[name].to(inputs[0].dtype) for name in outputs]


# -- Test vectors ------------------------------------------------------------------------


def cases():
    """Yields (case, name of an output). Left out are the copies of each case in which Attention is
    spelled out in other operators."""
    for case in collect_testcases("Attention"):
        (node, *rest) = case.model.graph.node
        if node.op_type == "Attention" and not rest:
            for name in node.output:
                if name:
                    yield pytest.param(case, name, id=f"{case.name}-{name}")


def as_tensor(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.parametrize("case, output", cases())
def test_attention(case, output):
    (node,) = case.model.graph.node
    attributes = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
    ((given, expected),) = case.data_sets
    given, expected = iter(given), iter(expected)
    inputs = [as_tensor(next(given)) if name else None for name in node.input]
    wanted = {name: as_tensor(next(expected)) for name in node.output if name}[output]
    (result,) = attend(inputs, attributes, [output])
    assert result.shape == wanted.shape and result.dtype == wanted.dtype
    rtol = 2**-6 if wanted.dtype == torch.bfloat16 else case.rtol
    np.testing.assert_allclose(
        result.double().numpy(), wanted.double().numpy(), rtol=rtol, atol=case.atol
    )
