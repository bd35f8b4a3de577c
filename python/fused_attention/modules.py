"""MultiheadAttention: torch.nn's layer with its attention computed by `attention`, and the encoder
and decoder layers of torch.nn around it.

    heads = attention(q W_q, k W_k, v W_v) per head;  output = concat(heads) W_o

Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2. Parameters, arguments, masks and
errors are those of torch.nn.MultiheadAttention, with five differences. Padding and causality reach
the kernel as options of their own, so no [N·H, L, S] mask is made and memory is linear in L.
is_causal needs no mask. Dropout runs inside the kernel. Returned weights are computed tile by tile
(`attention_weights.py`). A sample without a visible key gives 0 in every mode, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .attention_weights import attention_with_weights
from .call.explain import Explanation, explain, explain_with_weights
from .call.problem import (
    DTYPES,
    check_tensor,
    has_autocast,
    shape_of,
)
from .errors import ArgumentTypeError, ArgumentValueError, describe_error
from .nested import any_nested, check_same_sequences, nest, options_of, pack, pad, unpad
from .operators._torch import looks_at_sizes, transform_is_active


class ModuleArgumentError(ArgumentValueError, AssertionError):
    """A wrong argument of a module: the original raises AssertionError or RuntimeError."""


def _wrong(name: str, expected: str, got: Any, hint: str = "") -> NoReturn:
    raise ModuleArgumentError(describe_error(name, expected, got, hint))


def _keep_fast_path_away(module: nn.Module, args: Any) -> None:
    """A forward pre-hook whose presence alone makes nn.TransformerEncoderLayer call the module.

    In evaluation the layer hands the parameters of its attention to one native operator and never
    calls the module, provided that batch_first, _qkv_same_embed_dim, in_proj_bias and num_heads
    have certain values and no submodule has a hook. Other code relies on those attributes, so they
    must stay correct; a hook disturbs nobody.
    """


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: same constructor, parameters, state dict, call and errors.

    Differences, all on purpose: memory linear in the lengths with every mask, with dropout, in
    training and in evaluation; is_causal=True needs no attn_mask; a sample whose keys are all
    padding gives weights 0 and output out_proj.bias in every mode; key_padding_mask and attn_mask
    may be of different dtypes; and the bits of dropout are those of `attention` (torch.manual_seed
    decides). torch.jit.script is not supported.

    The output projection is a call of out_proj, whereas the original reads out_proj.weight: hooks,
    pruning and parametrizations of out_proj take effect, and any module that maps [..., embed_dim]
    may replace it (LoRA, quantized layers). The in-projection has no module of its own; each of its
    parameters is read once per call, so pruning and parametrizations take effect there too.

    nn.TransformerEncoderLayer calls the module in evaluation too (see `_keep_fast_path_away`). An
    nn.TransformerEncoder that was built around this module by hand still makes nested tensors of
    padded batches in evaluation, and so takes every nonzero value of a floating padding mask for
    padding: build it with enable_nested_tensor=False, or pass it to `replace_multihead_attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self.register_forward_pre_hook(_keep_fast_path_away)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> MultiheadAttention:
        """Returns the same layer, with the very parameters, mode and hooks of `module`.

        Raises ArgumentTypeError for any other class, subclasses included, which may compute
        something else.
        """
        if type(module) is not nn.MultiheadAttention:
            name = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ArgumentTypeError(describe_error("module", "a torch.nn.MultiheadAttention", name))
        new = cls.__new__(cls)
        new.__dict__ = {
            name: x.copy() if isinstance(x, (dict, set)) else x
            for name, x in module.__dict__.items()
        }
        new.register_forward_pre_hook(_keep_fast_path_away)
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (output, weights), as the original does; weights is None unless need_weights.

        query [L, N, E], key [S, N, kdim], value [S, N, vdim], with batch_first [N, L, E] and so on,
        unbatched [L, E] and so on. output is shaped as query.

        key_padding_mask: [N, S] (unbatched [S]). bool: True = padding. Floating: added to the
            scores of a key.
        attn_mask: [L, S] or [N·num_heads, L, S]. bool: True = hidden. Floating: added to the
            scores; differentiable.
        need_weights: also return them, after dropout: [N, L, S] (unbatched [L, S]), averaged over
            the heads; with average_attn_weights=False [N, num_heads, L, S]. Differentiable once.
        is_causal: query i sees keys j <= i (top-left, as in scaled_dot_product_attention, also if
            L != S). The original demands attn_mask beside it; here attn_mask may be None. If given,
            is_causal promises that it is the causal mask, and it is not read unless it requires a
            gradient or extra keys follow (add_bias_kv, add_zero_attn). Extra keys are seen by every
            query; for them alone a mask [L, S] is made.

        Two floating masks are added into one of [N, L, S], or of attn_mask's size if that is
        larger, unless the padding can be seen to hold only 0 and -inf (on a CPU, not compiled,
        without gradient). A boolean attn_mask is inverted into a copy of its own size; nothing else
        grows with L·S.

        Nested tensors [N, *, E] need batch_first and no masks; is_causal is served. Jagged ones are
        not padded with need_weights=False, and output has the ragged size of query, so that it can
        be added to it. Returned weights are padded with 0.

        Raises ModuleArgumentError, which is both an AssertionError and a RuntimeError; the original
        raises one or the other.
        """
        if any_nested(query, key, value):
            masked = key_padding_mask is not None or attn_mask is not None
            return self._attend_nested(
                query, key, value, masked, is_causal, need_weights, average_attn_weights
            )
        call = self._prepare(query, key, value, key_padding_mask, attn_mask, is_causal)
        out, weights = self._attend(*call, need_weights, average_attn_weights)
        if weights is not None and query.dim() == 2:
            weights = weights.squeeze(0)
        return self._project_output(out, query), weights

    def explain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Explanation:
        """Returns how a call with these arguments is served: `explain` of the attention inside.

        The projections are computed, the attention is not. Raises as the call does.
        """
        q, k, v, options = self._prepare(query, key, value, key_padding_mask, attn_mask, is_causal)
        if need_weights:
            return explain_with_weights(q, k, v, average=average_attn_weights, **options)
        return explain(q, k, v, **options)

    # -- Parts of a call --------------------------------------------------------------------

    def _prepare(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Returns q, k and v of the heads, [N, H, L or S, D], and the options of `attention`."""
        weights, bias = self._in_projection()
        N, L, S = self._check(query, key, value, key_padding_mask, attn_mask, weights[0])
        q, k, v = (self._heads(x) for x in self._project(query, key, value, weights, bias))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.view(N, S)
        extra = 0  # keys that every query sees
        bias_k, bias_v = self.bias_k, self.bias_v
        if bias_k is not None and bias_v is not None:
            shape = (N, self.num_heads, 1, self.head_dim)
            bias_k, bias_v = (
                x.to(k.dtype).view(1, *shape[1:]).expand(shape) for x in (bias_k, bias_v)
            )
            k, v = torch.cat([k, bias_k], 2), torch.cat([v, bias_v], 2)
            extra += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        if is_causal and extra and attn_mask is None:
            attn_mask = torch.ones(L, S, dtype=torch.bool, device=query.device).triu(1)
        causal = is_causal and not extra and (attn_mask is None or not attn_mask.requires_grad)
        if causal:
            attn_mask = None
        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, (0, extra)) if extra else attn_mask
            # [1, 1, L, S] or [N, H, L, S]
            heads = (1, 1) if attn_mask.dim() == 2 else (N, self.num_heads)
            attn_mask = attn_mask.reshape(*heads, L, S + extra)
        if key_padding_mask is not None and extra:
            key_padding_mask = F.pad(key_padding_mask, (0, extra))
        options = _masks(attn_mask, key_padding_mask)
        options["causal"] = "top_left" if causal else False
        options["dropout_p"] = float(self.dropout) if self.training else 0.0
        return q, k, v, options

    @looks_at_sizes
    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        parameter: Tensor,
    ) -> tuple[int, int, int]:
        """Returns N, L and S; raises unless the arguments fit together.

        parameter: a weight of the in-projection, whose dtype and device the inputs must have.
        out_proj may be any module, so its parameters are not compared.
        """
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_tensor(name, x)
        rank = query.dim()
        if rank not in (2, 3):
            _wrong("query", "2 (unbatched) or 3 dimensions", f"{rank}: {shape_of(query)}")
        if not key.dim() == value.dim() == rank:
            ranks = f"{rank}-D but found {key.dim()}-D and {value.dim()}-D tensors respectively"
            name = "value" if key.dim() == rank else "key"
            raise ModuleArgumentError(f"{name}: expected `key` and `value` to be {ranks}")
        if query.shape[-1] != self.embed_dim:
            _wrong("query", f"[..., embed_dim = {self.embed_dim}]", shape_of(query))
        if key.shape[-1] != self.kdim:
            _wrong("key", f"[..., kdim = {self.kdim}]", shape_of(key))
        if value.shape[:-1] != key.shape[:-1] or value.shape[-1] != self.vdim:
            expected = f"[..., vdim = {self.vdim}], the rest as key {shape_of(key)}"
            _wrong("value", expected, shape_of(value))
        sequence, batch = (1, 0) if self.batch_first and rank == 3 else (0, 1)
        N, L, S = query.shape[batch] if rank == 3 else 1, query.shape[sequence], key.shape[sequence]
        if rank == 3 and key.shape[batch] != N:
            _wrong("key", f"batch size {N}, as query {shape_of(query)}", shape_of(key))
        for name, mask, ranks, shapes in (
            ("key_padding_mask", key_padding_mask, f"`None` or {rank - 1}-D", ((S,), (N, S))),
            ("attn_mask", attn_mask, "`None`, 2-D or 3-D", ((L, S), (N * self.num_heads, L, S))),
        ):
            if mask is None:
                continue
            check_tensor(name, mask)
            if mask.dtype != torch.bool and mask.dtype not in DTYPES:
                hint = "Hugging Face's attention_mask, 1 for a token, is attention_mask == 0"
                _wrong(name, "dtype bool (True = hidden) or floating (added)", mask.dtype, hint)
            if mask.device != query.device:
                _wrong(name, f"device {query.device}, as query has", mask.device)
            if f"{mask.dim()}-D" not in ranks:
                found = f"`{name}` to be {ranks} but found {mask.dim()}-D tensor instead"
                raise ModuleArgumentError(f"{name}: expected {found}: {shape_of(mask)}")
            if mask.shape not in shapes:
                shape = shapes[mask.dim() - len(shapes[0])]
                found = f"{shape} but got {shape_of(mask)}"
                raise ModuleArgumentError(f"{name}: Expected `{name}` shape to be {found}")
        device, dtype = parameter.device, parameter.dtype
        autocast = has_autocast(device.type) and torch.is_autocast_enabled(device.type)
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.device != device:
                _wrong(name, f"device {device}, as the parameters have", x.device)
            if x.dtype != dtype and not autocast:
                _wrong(name, f"dtype {dtype}, as the parameters have", x.dtype)
        if self.training and not 0.0 <= self.dropout <= 1.0:
            _wrong("dropout", "a probability in [0, 1]", self.dropout)
        return N, L, S

    def _in_projection(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Returns the weights, (W_qkv,) or (W_q, W_k, W_v), and the bias [3 * E] or None.

        A call reads each parameter here and only once: a parametrized one is computed anew at every
        read, and spectral_norm updates its state at every read in training.
        """
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None:
            return (weight,), bias
        return (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight), bias

    def _project(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weights: tuple[Tensor, ...],
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q, k, v [..., E], views of as few products as the inputs allow."""
        E = self.embed_dim
        if len(weights) == 1:
            (weight,) = weights
            if query is key and key is value:
                q, k, v = F.linear(query, weight, bias).unflatten(-1, (3, E)).unbind(-2)
                return q, k, v
            if key is value:
                w_q, w_kv = weight.split([E, 2 * E])
                b_q, b_kv = (None, None) if bias is None else bias.split([E, 2 * E])
                k, v = F.linear(key, w_kv, b_kv).unflatten(-1, (2, E)).unbind(-2)
                return F.linear(query, w_q, b_q), k, v
            weights = weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (
            F.linear(*inputs) for inputs in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        """Returns a view [N, H, S, D] of x, which is [S, N, E], [N, S, E] or [S, E]."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any],
        need_weights: bool,
        average_attn_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the output of the heads, [N, H, L, D], and weights [N, L, S] or [N, H, L, S]."""
        if not need_weights:
            return attention(q, k, v, **options), None
        return attention_with_weights(q, k, v, **options, average=average_attn_weights)

    def _project_output(self, out: Tensor, query: Tensor) -> Tensor:
        """Returns out_proj of the heads [N, H, L, D], with the dimensions in the order of query."""
        if query.dim() == 2:
            out = out.squeeze(0).transpose(0, 1)
        else:
            out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        return self.out_proj(out.flatten(-2))

    def _attend_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masked: bool,
        is_causal: bool,
        need_weights: bool,
        average_attn_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends within packed sequences; within padded ones for weights and extra keys."""
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not (x.is_nested and x.dim() == 3 and self.batch_first) or masked:
                kind = "a nested one" if x.is_nested else "a dense one"
                _wrong(
                    name,
                    "all three nested [N, *, E], batch_first and no masks, or dense tensors",
                    kind + " with masks" * masked,
                    "pad it with to_padded_tensor() and pass key_padding_mask",
                )
        packs = {id(x): pack("query, key or value", x, 1) for x in (query, key, value)}
        of_query, of_key, of_value = (packs[id(x)] for x in (query, key, value))
        if len(of_key.offsets) != len(of_query.offsets):
            _wrong("key", f"batch size {query.size(0)}, as query", key.size(0))
        check_same_sequences("value", of_value, "key", of_key)
        rows = of_query.rows, of_key.rows, of_value.rows
        if not (need_weights or self.bias_k is not None or self.add_zero_attn):
            weights, bias = self._in_projection()
            self._check(*rows, None, None, weights[0])
            heads = (self.num_heads, self.head_dim)
            q, k, v = (x.unflatten(-1, heads) for x in self._project(*rows, weights, bias))
            causal = "top_left" if is_causal else False
            dropout_p = float(self.dropout) if self.training else 0.0
            sequences = options_of(of_query, of_key)
            out = attention(q, k, v, causal=causal, dropout_p=dropout_p, **sequences)
            return nest(self.out_proj(out.flatten(-2)), of_query), None
        dense = {id(x): pad(x) for x in packs.values()}
        (q, q_rows), (k, k_rows), (v, _) = (dense[id(x)] for x in (of_query, of_key, of_value))
        call = self._prepare(q, k, v, k_rows < 0, None, is_causal)
        out, returned = self._attend(*call, need_weights, average_attn_weights)
        if returned is not None:
            beyond = q_rows < 0 if average_attn_weights else q_rows.unsqueeze(1) < 0
            returned = returned.masked_fill(beyond.unsqueeze(-1), 0.0)
        out = unpad(out.transpose(1, 2).flatten(-2), q_rows, len(of_query.rows))
        return nest(self.out_proj(out), of_query), returned


def _masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> dict[str, Any]:
    """Turns attn_mask [N or 1, H or 1, L, S] and key_padding_mask [N, S] into options."""
    mask = bias = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            mask = ~attn_mask
        else:
            bias = attn_mask
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        added, key_padding_mask = key_padding_mask, _as_padding(key_padding_mask)
        if key_padding_mask is None:
            added = added[:, None, None, :]
            bias = added if bias is None else bias + added
    return {"mask": mask, "bias": bias, "key_padding_mask": key_padding_mask}


def _as_padding(added: Tensor) -> Tensor | None:
    """Returns a floating mask as a boolean one, or None unless it is seen to hold only 0 and -inf.

    nn.TransformerEncoderLayer makes such masks of boolean ones.
    """
    if torch.compiler.is_compiling() or transform_is_active():
        return None
    if added.device.type != "cpu" or added.requires_grad:
        return None
    hidden = added == float("-inf")
    return hidden if bool((hidden | (added == 0)).all()) else None


def replace_multihead_attention(model: nn.Module) -> nn.Module:
    """Replaces every torch.nn.MultiheadAttention in `model`, in place, by `MultiheadAttention`.

    Parameters stay the same objects (an optimizer that has them keeps working), and so do state
    dicts. Subclasses are left alone, parametrized modules among them. Returns model, or its
    replacement if it is itself an nn.MultiheadAttention.

    Every nn.TransformerEncoder in `model` that holds a `MultiheadAttention`, replaced now or
    before, stops making nested tensors of padded batches in evaluation: its enable_nested_tensor
    and use_nested_tensor become False. The nested path takes every nonzero value of a floating
    src_key_padding_mask for padding, and fails if no value is 0. Without that path, evaluation
    gives the result of training without dropout, also in the rows of padding, where the nested path
    gives 0. An encoder that is built later around a replaced nn.TransformerEncoderLayer makes no
    nested tensors either, and warns of that unless it is given enable_nested_tensor=False. Pass the
    whole model: an encoder cannot be reached from one of its layers.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(describe_error("model", "a torch.nn.Module", type(model).__name__))
    replaced: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if type(child) is nn.MultiheadAttention:
                if child not in replaced:
                    replaced[child] = MultiheadAttention.from_torch(child)
                setattr(parent, name, replaced[child])
    _disable_native_paths(model)
    return MultiheadAttention.from_torch(model) if type(model) is nn.MultiheadAttention else model


def _disable_native_paths(model: nn.Module) -> None:
    """Makes PyTorch's encoders in `model` call the `MultiheadAttention` inside, on dense tensors.

    nn.TransformerEncoder.forward reads use_nested_tensor; forwards written for earlier versions
    read enable_nested_tensor, an argument of the constructor. The constructor of a later encoder
    derives use_nested_tensor from attributes of its layer. Of these, only activation_relu_or_gelu
    is used by nothing but the native path; 0 says that the layer has no such path.
    """
    for parent in model.modules():
        if not isinstance(parent, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            continue
        if not any(isinstance(child, MultiheadAttention) for child in parent.modules()):
            continue
        if isinstance(parent, nn.TransformerEncoder):
            parent.enable_nested_tensor = parent.use_nested_tensor = False
        else:
            parent.activation_relu_or_gelu = 0


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer`: same constructor, parameters, state dict and call.

    self_attn is a `MultiheadAttention`.
    Differences, all on purpose: is_causal=True without src_mask is causal; evaluation never takes
    PyTorch's native path, and so gives the result of training without dropout, whatever a floating
    src_key_padding_mask holds; a jagged nested src needs no padding, in training too. An
    nn.TransformerEncoder built around the layer makes no nested tensors; pass it
    enable_nested_tensor=False, or it warns of that.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        replace_multihead_attention(self)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer`: same constructor, parameters, state dict and call.

    self_attn and multihead_attn are `MultiheadAttention`s. Differences, on purpose: tgt_is_causal
    without tgt_mask and memory_is_causal without memory_mask are causal (top-left); tgt and memory
    may be jagged nested tensors.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        replace_multihead_attention(self)
