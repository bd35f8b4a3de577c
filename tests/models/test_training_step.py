"""Trains in two processes under DistributedDataParallel, and with layers whose activations are
computed again in the backward, with the same dropout."""

import copy
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from selection import quick
from training_step import loss_of, make_batch, make_model, train, worker


@pytest.mark.parametrize("dropout", quick([0.0, 0.5], 0.0))
def test_two_processes_train_one_model(dropout):
    """Without dropout, they train as one process does on the whole batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (port, dropout, results), nprocs=2)
        first, second = (
            {name: torch.from_numpy(x) for name, x in results[rank].items()} for rank in range(2)
        )
    alone = train(make_model(dropout), make_batch(), 0)
    before = dict(make_model(dropout).named_parameters())
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
        if dropout == 0:
            torch.testing.assert_close(x, alone[name], atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(first[name], x) for name, x in before.items())


class Checkpointed(nn.Module):
    """Calls a layer so that its activations are computed again in the backward."""

    def __init__(self, layer, use_reentrant):
        super().__init__()
        self.layer, self.use_reentrant = layer, use_reentrant

    def forward(self, *inputs, **options):
        def call(*inputs):
            return self.layer(*inputs, **options)

        return checkpoint(call, *inputs, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_training_is_the_same(use_reentrant):
    plain = make_model(0.5)
    again = copy.deepcopy(plain)
    again.encoder.layers[0].self_attn = Checkpointed(
        again.encoder.layers[0].self_attn, use_reentrant
    )
    decoder = again.decoder.layers[0]
    decoder.multihead_attn = Checkpointed(decoder.multihead_attn, use_reentrant)
    # nn.TransformerEncoderLayer reads batch_first.
    again.encoder.layers[0].self_attn.batch_first = True
    source, target, *rest = make_batch()
    batch = (source.requires_grad_(), target.requires_grad_(), *rest)
    results = []
    for model in (plain, again):
        torch.manual_seed(5)
        loss = loss_of(model, *batch)
        torch.rand(7)  # other code draws between forward and backward
        loss.backward()
        gradients = {name.replace(".layer.", "."): x.grad for name, x in model.named_parameters()}
        results.append((loss, gradients))
    (loss, gradients), (loss_again, gradients_again) = results
    assert torch.equal(loss, loss_again)
    for name, x in gradients.items():
        # Not to the bit: reentrant checkpointing adds up what flows into x in another order.
        torch.testing.assert_close(x, gradients_again[name])
    torch.manual_seed(6)
    assert not torch.equal(loss_of(plain, *batch), loss)
