"""all-MiniLM-L6-v2, a real pre-trained sentence encoder: fetched, loaded, run.

BERT with 6 layers, 12 heads of 32, 22.7 M parameters; a sentence's embedding is the mean of its
last hidden states, normalised (Reimers & Gurevych 2019, Sentence-BERT, section 3).
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attention.models.fetch import fetch as fetch_source

CACHE = Path(__file__).resolve().parent.parent / ".cache"

# Twelve pairs of sentences that say about the same.
SENTENCES = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The train to the coast leaves at seven in the morning.",
    "You can take the 7 am train if you want to get to the seaside.",
    "She has been learning to play the violin since she was five years old.",
    "As a small child she began taking violin lessons.",
    "The storm tore the roof off the old barn during the night.",
    "Strong winds destroyed the top of a farm building last night.",
    "Please restart the computer after you have installed the update.",
    "The machine has to be rebooted once the new version is in place.",
    "The recipe needs two eggs, a cup of flour and a pinch of salt.",
    "For this dish you mix flour with eggs and add a little salt.",
    "The court ruled that the contract was not valid.",
    "According to the judges, the agreement could not be enforced.",
    "Bees tell each other where flowers are by dancing.",
    "Honeybees use movement to communicate the location of food.",
    "The museum is closed on Mondays.",
    "You cannot visit the exhibition on the first day of the week.",
    "Their striker scored twice in the last ten minutes of the match.",
    "Two late goals by the forward decided the game.",
    "Interest rates are expected to fall next year.",
    "Economists think that borrowing money will become cheaper soon.",
    "The spacecraft sent back the first pictures of the far side of the moon.",
    "Images of the hidden half of the moon were transmitted by a probe.",
]


def fetch() -> Path:
    """Returns the directory of the model, downloaded once. Raises OSError if that fails."""
    return fetch_source("minilm", CACHE)


class Encoder:
    """Turns sentences into embeddings with Hugging Face's BERT, which calls PyTorch's SDPA."""

    def __init__(self, directory: Path) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModel.from_pretrained(directory, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def __call__(self, sentences: list[str]) -> Tensor:
        """Returns embeddings [len(sentences), 384], each row of length 1."""
        batch = self.tokenizer(sentences, padding=True, return_tensors="pt")
        hidden = self.model(**batch).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@contextlib.contextmanager
def sdpa_calls() -> Iterator[list[tuple[tuple, dict]]]:
    """Records the calls of `F.scaled_dot_product_attention` inside, also while it is patched."""
    calls: list[tuple[tuple, dict]] = []
    function = F.scaled_dot_product_attention

    def recorded(*args, **kwargs) -> Tensor:
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    F.scaled_dot_product_attention = recorded
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = function
