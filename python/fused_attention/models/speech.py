"""Transcription by Whisper: what is said in a recording, and when (Radford et al. 2022).

A recording of up to 30 seconds becomes a log-mel spectrum, the encoder's hidden states, and the
tokens that the decoder writes. The time of a token is read from the cross attention of the heads
that were found to follow the sound.
"""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import wrong_value
from .generate import generate
from .maps import attention_maps
from .pictures import View, alignment_plot
from .transformer import Transformer

RATE = 16000  # samples per second
SECONDS = 30.0  # of sound that the encoder takes at once
# <|startoftranscript|> <|en|> <|transcribe|> <|notimestamps|>, and <|endoftext|>
PROMPT, END = [50258, 50259, 50359, 50363], 50257


def read_wav(path: str | Path) -> Tensor:
    """Reads samples [T] in [-1, 1]. Raises OSError for a file that is not WAV, ArgumentValueError
    for one of another format or of more than 30 seconds."""
    try:
        with wave.open(str(path)) as file:
            kind = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            content = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise OSError(f"{path}: {error}") from None
    if kind != (1, 2, RATE):
        expected = f"one channel of 16 bits at {RATE} Hz"
        wrong_value("path", expected, f"{kind[0]} of {8 * kind[1]} at {kind[2]} in {path}")
    samples = torch.frombuffer(bytearray(content), dtype=torch.int16)
    if len(samples) > SECONDS * RATE:
        wrong_value("path", f"at most {SECONDS:g} seconds", f"{len(samples) / RATE:.1f} in {path}")
    return samples / 32768


def spectra(sounds: Sequence[Tensor]) -> Tensor:
    """Returns log-mel spectra [B, 80, 3000] of sounds, padded with silence."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor()
    samples = [sound.numpy() for sound in sounds]
    return extract(samples, sampling_rate=RATE, return_tensors="pt").input_features


@torch.no_grad()
def hear(
    model: Transformer, lists: dict[str, Any], sounds: Sequence[Tensor], **options: Any
) -> list[list[int]]:
    """Returns the tokens of the English speech in each sound; options are those of `generate`."""
    memory = model.encode(spectra(sounds))
    return generate(
        model,
        [PROMPT] * len(sounds),
        memory,
        end=END,
        forbidden=lists["suppress_ids"],
        forbidden_first=lists["suppress_ids_begin"],
        **{"max_new_tokens": 200, **options},
    )


def align_words(
    model: Transformer,
    tokenizer: Any,
    lists: dict[str, Any],
    sound: Tensor,
    tokens: Sequence[int],
    path: Path,
) -> list[float]:
    """Saves a plot of when each token was said, and returns the second at which each begins."""
    inputs = torch.tensor([[*PROMPT, *tokens]])
    maps = attention_maps(model, inputs, None, spectra([sound]))
    seconds = len(sound) / RATE
    frames = round(maps["decoder.blocks.0.cross_attention"].shape[3] * seconds / SECONDS)
    # The query that predicts a token is at the position before it.
    rows = range(len(PROMPT) - 1, len(PROMPT) - 1 + len(tokens))
    followed = [
        maps[f"decoder.blocks.{layer}.cross_attention"].rows(rows, [head])[0, 0, :, :frames]
        for layer, head in lists["alignment_heads"]
    ]
    weights = torch.stack(followed)
    weights = weights / weights.amax(-1, keepdim=True)
    names = [tokenizer.decode([token]) for token in tokens]
    view = View("Whisper's cross attention", weights, names, [""] * frames)
    return alignment_plot(view, seconds, path)
