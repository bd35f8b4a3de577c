"""ONNX Runtime as a peer, where `onnx` and `onnxruntime` are installed.

It has two operators, Microsoft's MultiHeadAttention and the standard's Attention (opset 23); the
one that is faster for the case is measured.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..foreign import NotOffered
from .shapes import Case, Inputs

Forward = Callable[[], Tensor]


def onnx_runtime(case: Case, inputs: Inputs) -> Forward:
    """Runs the forward in float32 and float16, without a window or a mask beside causal."""
    if not (importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime")):
        raise NotOffered("onnx and onnxruntime are not installed")
    if inputs.query.device.type != "cpu":
        raise NotOffered("CPU only")
    if case.backward or case.dropout_p or case.window_size != (-1, -1):
        raise NotOffered("no backward, dropout or window")
    if case.causal and (inputs.mask is not None or inputs.bias is not None):
        raise NotOffered("no mask beside causal")
    candidates = [make(case, inputs) for make in (_attention, _multi_head_attention)]
    calls = [call for call in candidates if call is not None]
    if not calls:
        raise NotOffered(f"no kernel for {str(inputs.query.dtype).removeprefix('torch.')}")
    return min(calls, key=_seconds)


def _seconds(call: Forward) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _attention(case: Case, inputs: Inputs) -> Forward | None:
    """The standard's operator takes [B, H, S, D], any number of key heads, and a mask."""
    operands = {"Q": inputs.query, "K": inputs.key, "V": inputs.value}
    mask = inputs.bias if inputs.mask is None else inputs.mask
    if inputs.bias is not None and inputs.mask is not None:
        mask = inputs.bias.masked_fill(~inputs.mask, -math.inf)
    if mask is not None:
        shape = (case.B, case.Hq, case.Sq, case.Sk)
        operands["attn_mask"] = mask.expand(shape).contiguous()
    out = torch.empty(case.B, case.Hq, case.Sq, inputs.value.shape[-1], dtype=inputs.query.dtype)
    attributes = {"is_causal": int(case.causal)}
    return _session("Attention", "", operands, attributes, out, lambda: out)


def _multi_head_attention(case: Case, inputs: Inputs) -> Forward | None:
    """Microsoft's operator takes [B, S, H * D], with one key head for each query head."""
    if inputs.mask is not None or inputs.bias is not None or case.Hq != case.Hkv:
        return None
    names = ("query", "key", "value")
    tensors = (inputs.query, inputs.key, inputs.value)
    operands = {
        name: x.transpose(1, 2).flatten(2).contiguous()
        for name, x in zip(names, tensors, strict=True)
    }
    Dv = inputs.value.shape[-1]
    out = torch.empty(case.B, case.Sq, case.Hq * Dv, dtype=inputs.query.dtype)
    attributes = {"num_heads": case.Hq, "unidirectional": int(case.causal)}
    result = out.view(case.B, case.Sq, case.Hq, Dv).transpose(1, 2)
    return _session(
        "MultiHeadAttention", "com.microsoft", operands, attributes, out, lambda: result
    )


def _session(
    operator: str,
    domain: str,
    operands: dict[str, Tensor],
    attributes: dict[str, Any],
    out: Tensor,
    result: Forward,
) -> Forward | None:
    """Returns a call of one node on memory bound beforehand, or None if it has no kernel."""
    import onnxruntime
    from onnx import TensorProto, helper

    types = {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.bool: TensorProto.BOOL,
    }
    if any(x.dtype not in types for x in operands.values()):
        return None
    described = [helper.make_tensor_value_info(n, types[x.dtype], x.shape)
                 for n, x in operands.items()]  # fmt: skip
    output = helper.make_tensor_value_info("Y", types[out.dtype], out.shape)
    node = helper.make_node(operator, list(operands), ["Y"], domain=domain, **attributes)
    graph = helper.make_graph([node], "attention", described, [output])
    opsets = [helper.make_opsetid("", 23)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    # Its threads would spin during the next peer's call.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception:  # its own exceptions have no common base
        return None
    binding = session.io_binding()
    for name, x in operands.items():
        binding.bind_input(name, "cpu", 0, _element(types[x.dtype]), tuple(x.shape), x.data_ptr())
    binding.bind_output("Y", "cpu", 0, _element(types[out.dtype]), tuple(out.shape), out.data_ptr())
    kept = operands  # the session holds addresses only

    def forward() -> Tensor:
        assert kept
        session.run_with_iobinding(binding)
        return result()

    return forward


def _element(type_: int) -> Any:
    from onnx import helper

    return helper.tensor_dtype_to_np_dtype(type_)
