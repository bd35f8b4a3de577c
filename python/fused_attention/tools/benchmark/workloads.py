"""What is measured besides attention itself: masked softmax, layers, training steps, whole models.

A workload gives a call for each way to compute it. The parameters of models are random, since
pre-trained ones would not change the work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import (
    MultiheadAttention,
    attention,
    masked_softmax,
    masked_softmax_,
    replace_multihead_attention,
)
from ... import operators as ops
from ... import scaled_dot_product_attention as our_sdpa
from ...models.attend import IMPLEMENTATIONS, Padded
from ...models.pretrained import SoundFront
from ...models.training import token_loss
from ...models.transformer import Config, Transformer
from .peers import OURS
from .trial import Call, Judgement, Trial, judge


def warmed(call: Call) -> tuple[Call, None]:
    """Runs a call whose result is not judged."""
    call()
    return call, None


# -- Masked softmax ------------------------------------------------------------------------

SOFTMAX_SHAPES = ((32, 32, 128, 128), (2, 8, 1024, 1024), (1, 4, 1024, 4096), (1, 8, 64, 32768))
SOFTMAX_SCALE = 0.125


def softmax_calls(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, dict[str, Call]]:
    """Returns calls by what they compute and by peer; "ceiling" moves the same bytes.

    A boolean mask [B, 1, M, N] hides a fifth. "backward" runs what autograd would, without a graph.
    """
    x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    mask = torch.rand(shape[0], 1, *shape[2:]) > 0.2
    mask[..., 0] = True  # no fully masked row, which would be NaN in PyTorch
    weights = torch.softmax(x.masked_fill(~mask, -torch.inf) * SOFTMAX_SCALE, -1)
    in_place, target = x.clone(), torch.empty_like(x)

    def pytorch_backward() -> Tensor:
        ds = torch._softmax_backward_data(grad, weights, -1, dtype)
        return (ds * SOFTMAX_SCALE).masked_fill(~mask, 0.0)

    def pytorch_forward() -> Tensor:
        return torch.softmax(x.masked_fill(~mask, -torch.inf) * SOFTMAX_SCALE, -1)

    return {
        "forward": {
            OURS: lambda: masked_softmax(x, mask, scale=SOFTMAX_SCALE),
            "PyTorch": pytorch_forward,
            "ceiling": lambda: x.clone(),
        },
        "in place": {
            OURS: lambda: masked_softmax_(in_place, mask, scale=SOFTMAX_SCALE),
            "ceiling": lambda: target.copy_(x),
        },
        "backward": {
            OURS: lambda: ops.softmax_backward(grad, weights, SOFTMAX_SCALE, 0),
            "PyTorch": pytorch_backward,
            "ceiling": lambda: grad + weights,
        },
    }


def softmax_trial(shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Trial:
    """Measures one of the calls; the result of "forward" is judged on its first rows."""
    torch.manual_seed(0)
    calls = softmax_calls(shape, dtype)[what]
    trial = Trial(dtype, ceiling=calls.pop("ceiling"))
    if what == "forward":
        torch.manual_seed(0)
        x, _ = (torch.randn(shape).to(dtype)[:1, :1, :256] for _ in range(2))
        mask = (torch.rand(shape[0], 1, *shape[2:]) > 0.2)[:1, :, :256]
        mask[..., 0] = True
        logits = x.double().masked_fill(~mask, -torch.inf) * SOFTMAX_SCALE
        want, naive = logits.softmax(-1), logits.float().softmax(-1).to(dtype)

    def make(call: Callable[[], Any]) -> tuple[Call, Judgement | None]:
        out = call()
        if what != "forward":
            return call, None
        return call, judge(out[:1, :1, :256], want, (naive,))

    for peer, call in calls.items():
        trial.add(peer, lambda call=call: make(call))  # type: ignore[misc]
    return trial


# -- Training steps of nn.Transformer ------------------------------------------------------

WIDTH, TOKENS = 256, 4096
TRAINING_LENGTHS = (40, 128, 512, 1024, 2048)
TRAINING_SETTINGS = {  # (with dropout and padding, with autocast)
    "plain float32": (False, False),
    "dropout and padding, float32": (True, False),
    "dropout and padding, bfloat16 autocast": (True, True),
}
PYTORCH_MODULES = "torch.nn"


def training_steps(length: int, regular: bool, autocast: bool) -> dict[str, Call]:
    """Returns a training step with PyTorch's attention and with ours, on the same batch.

    nn.Transformer has 3 + 3 layers of width 256 (4 heads of 64, feed-forward 1024) and about 4096
    tokens a batch on either side. The decoder is causal. regular: dropout 0.1, and a quarter of
    every other sequence is padding. Ours is the same model after `replace_multihead_attention`.
    """
    torch.manual_seed(0)
    batch = max(2, TOKENS // length)
    theirs = nn.Transformer(
        WIDTH, 4, 3, 3, 4 * WIDTH, dropout=0.1 if regular else 0.0, batch_first=True
    )
    ours = copy.deepcopy(theirs)
    replace_multihead_attention(ours)
    source, target, wanted = (torch.randn(batch, length, WIDTH) for _ in range(3))
    masks: dict[str, Any] = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(length)}
    masks["tgt_is_causal"] = True
    if regular:
        used = torch.tensor([length, length - length // 4] * batch)[:batch]
        padding = torch.arange(length) >= used.unsqueeze(1)
        padding = torch.zeros(padding.shape).masked_fill(padding, float("-inf"))
        for name in ("src", "tgt", "memory"):
            masks[f"{name}_key_padding_mask"] = padding

    def step_of(model: nn.Module) -> Call:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step() -> None:
            context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
            with context:
                loss = F.mse_loss(model(source, target, **masks).float(), wanted)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {PYTORCH_MODULES: step_of(theirs), OURS: step_of(ours)}


def counted_flops(call: Call) -> float:
    """Returns the operations of the matrix products of a call that runs PyTorch's own operators."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def training_trial(length: int, regular: bool, autocast: bool) -> Trial:
    """Measures a training step; its products are counted in the step of torch.nn."""
    steps = training_steps(length, regular, autocast)
    trial = Trial(torch.bfloat16 if autocast else torch.float32)
    trial.flops = counted_flops(steps[PYTORCH_MODULES])
    for peer in (OURS, PYTORCH_MODULES):
        trial.add(peer, partial(warmed, steps[peer]))
    return trial


# -- Whole models --------------------------------------------------------------------------

WHISPER = Config(
    51865,
    encoder_layers=6,
    decoder_layers=1,
    dim=512,
    heads=8,
    hidden=2048,
    activation="gelu",
    positions="learned",
    max_positions=448,
    max_source_positions=1500,
)
SMOLLM2 = Config(
    49152,
    encoder_layers=0,
    decoder_layers=30,
    dim=576,
    heads=9,
    kv_heads=3,
    hidden=1536,
    activation="swiglu",
    norm="rms",
    positions="rotary",
    max_positions=8192,
    bias=False,
    scale_embedding=False,
)


@dataclass(frozen=True)
class Model:
    """One case of a model: `make` returns the model, and a call of it."""

    name: str
    tokens: int  # tokens that one call reads or writes
    make: Callable[[], tuple[Transformer, Call]]


def whisper_encoder() -> tuple[Transformer, Call]:
    model = Transformer(WHISPER, front=SoundFront(80, 512)).eval()
    spectrum = torch.randn(1, 80, 3000)
    return model, torch.inference_mode()(lambda: model.encode(spectrum).hidden)


def prefill(length: int) -> tuple[Transformer, Call]:
    model = Transformer(SMOLLM2).eval()
    tokens = torch.randint(0, SMOLLM2.vocab_size, (1, length))

    def call() -> object:
        return model.step(tokens, model.start(None, 1, length))

    return model, call


def generation(length: int, count: int) -> tuple[Transformer, Call]:
    model = Transformer(SMOLLM2).eval()
    cache = model.start(None, 1, length + count)
    model.step(torch.randint(0, SMOLLM2.vocab_size, (1, length)), cache)
    lengths, longest = cache.lengths, cache.longest

    def call() -> object:
        cache.lengths, cache.longest = lengths, longest
        for _ in range(count):
            logits = model.step(torch.zeros(1, 1, dtype=torch.long), cache)
        return logits

    return model, call


def model_training(batch: int, seqlen: int, target: int) -> tuple[Transformer, Call]:
    model = Transformer(Config(8000)).train()
    source = torch.randint(4, 8000, (batch, seqlen))
    tokens = torch.randint(4, 8000, (batch, target + 1))

    def call() -> object:
        model.zero_grad()
        loss = token_loss(model(tokens[:, :-1], None, source), tokens[:, 1:], Padded())
        loss.backward()
        return loss

    return model, call


def _model_training(batch: int, seqlen: int, target: int) -> Model:
    def make() -> tuple[Transformer, Call]:
        return model_training(batch, seqlen, target)

    return Model(f"training, {batch} × {seqlen}", batch * (seqlen + target), make)


# The first two take little time and are the quick ones.
MODELS = [
    _model_training(8, 40, 40),
    _model_training(1, 512, 128),
    Model("Whisper base, encoder", 1500, whisper_encoder),
    Model("SmolLM2, reads 2048", 2048, lambda: prefill(2048)),
    Model("SmolLM2, writes 16 after 2048", 16, lambda: generation(2048, 16)),
    *(_model_training(*sizes) for sizes in ((64, 40, 40), (8, 512, 128), (4, 1024, 128))),
    _model_training(2, 2048, 128),
]


def model_calls(case: Model) -> dict[str, Call]:
    """Returns the call with each way to compute attention."""
    torch.manual_seed(0)
    model, call = case.make()

    def with_attention(implementation: str) -> Call:
        def run() -> object:
            model.use_attention(implementation)
            return call()

        return run

    return {name: with_attention(name) for name in IMPLEMENTATIONS}


def model_trial(case: Model) -> Trial:
    """Measures a model; its products are counted with naive attention."""
    calls = model_calls(case)
    trial = Trial(torch.float32, counted_flops(calls["naive"]))
    names = {"fused": OURS, "sdpa": "PyTorch SDPA", "naive": "naive maths"}
    for name, call in calls.items():
        trial.add(names[name], partial(warmed, call))
    return trial


# -- The overhead of a call ----------------------------------------------------------------

REPEATS = 100  # calls per timing, so that the cost of the clock is negligible


def repeated(call: Call) -> Call:
    def run() -> None:
        for _ in range(REPEATS):
            call()

    return run


def surfaces(grad: bool) -> dict[str, tuple[Call, Call | None]]:
    """Returns calls of 1 x 1 x 1 x 8 by name: ours, and PyTorch's equivalent or None."""
    q, k, v, scores = (torch.randn(1, 1, 1, 8).requires_grad_(grad) for _ in range(4))
    packed = torch.randn(1, 1, 8).requires_grad_(grad)
    offset = torch.tensor([0, 1], dtype=torch.int32)
    mask, bias = torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1, 1)
    tokens = torch.randn(1, 1, 8)
    modules = (MultiheadAttention, nn.MultiheadAttention)
    layers = [module(8, 1, batch_first=True) for module in modules]
    for layer in layers:
        layer.requires_grad_(grad).train(grad)

    def theirs(**options: Any) -> Call:
        function = F.scaled_dot_product_attention
        return lambda: function(q, k, v, **options)

    def sdpa(**options: Any) -> tuple[Call, Call]:
        return (lambda: our_sdpa(q, k, v, **options)), theirs(**options)

    def ours(**options: Any) -> Call:
        return lambda: attention(q, k, v, **options)

    def of_layer(layer: Any) -> Call:
        return lambda: layer(tokens, tokens, tokens, need_weights=False)

    return {
        "scaled_dot_product_attention": sdpa(),
        "scaled_dot_product_attention, mask": sdpa(attn_mask=mask),
        "scaled_dot_product_attention, dropout": sdpa(dropout_p=0.1),
        "attention": (ours(), theirs()),
        "attention, bias": (ours(bias=bias), theirs(attn_mask=bias)),
        "attention, dropout": (ours(dropout_p=0.1), theirs(dropout_p=0.1)),
        "attention, causal and window": (ours(causal="top_left", window_size=(3, 0)), None),
        "attention, softcap": (ours(softcap=3.0), None),
        "attention, return_lse": (ours(return_lse=True), None),
        "attention, packed": (
            lambda: attention(packed, packed, packed, cu_seqlens_q=offset, cu_seqlens_k=offset),
            None,
        ),
        "masked_softmax": (lambda: masked_softmax(scores), lambda: torch.softmax(scores, -1)),
        "MultiheadAttention": (of_layer(layers[0]), of_layer(layers[1])),
    }


def surface_trial(name: str, grad: bool) -> Trial:
    """Measures 100 calls of a surface; the ceiling is the cheapest operator, a view."""
    ours, theirs = surfaces(grad)[name]
    x = torch.randn(1, 1, 1, 8)
    trial = Trial(torch.float32, ceiling=repeated(lambda: x.view(8)))
    for peer, call in ((OURS, ours), ("PyTorch", theirs)):
        if call is not None:
            trial.add(peer, partial(warmed, repeated(call)))
    return trial
