"""One training step over a batch of any size: encode in chunks, loss on embeddings alone, gradients
chunk by chunk.

Source: Gao et al. 2021 (GradCache), sec. 3; the graphs of all chunks are kept here, so that nothing
is encoded twice.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from data.batches import Batch, chunks
from losses.infonce import Targets
from models.towers import Towers
from models.transformer import Packed, pack


def seed_chunk(seed: int, step: int, rank: int, chunk: int) -> None:
    """Seed torch for one chunk: dropout masks depend on these four numbers and on nothing that ran
    before."""
    state = np.random.SeedSequence([seed, step, rank, chunk]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state >> np.uint64(1)))


def pieces(
    batch: Batch, chunk_tokens: int, device: torch.device
) -> Iterator[tuple[str, np.ndarray, Packed]]:
    """(side, which texts, their pack) for every chunk of a batch, longest texts first."""
    for side in ("query", "passage"):
        texts = batch.query_tokens if side == "query" else batch.passage_tokens
        skip = batch.query_prompt_tokens_B if side == "query" else batch.passage_prompt_tokens_N
        for rows in chunks(np.array([len(t) for t in texts]), chunk_tokens):
            some_skip = skip[rows] if skip.any() else None
            yield side, rows, pack([texts[i] for i in rows], device, skip=some_skip)


def targets_on(batch: Batch, device: torch.device) -> Targets:
    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Targets(
        pair_query_P=tensor(batch.pair_query_P),
        pair_passage_P=tensor(batch.pair_passage_P),
        pair_weight_P=tensor(batch.pair_weight_P),
        relatives_BK=tensor(batch.relatives_BK),
        num_examples=batch.num_examples_global,
    )


def train_step(
    towers: Towers,
    loss_fn: nn.Module,
    batch: Batch,
    *,
    seed: int,
    step: int,
    chunk_tokens: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of one batch: gradients are added to the parameters' .grad.

    autocast  makes the context for the encoder (the loss always runs in float32)
    Returns the loss in nats (a mean over the examples of all ranks) and the loss function's own
    numbers, on the device: reading them is a sync.
    """
    # 1. encode every chunk, keeping its graph
    parts: dict[str, list[Tensor]] = {"query": [], "passage": []}
    rows: dict[str, list[np.ndarray]] = {"query": [], "passage": []}
    with autocast():
        for number, (side, some_rows, packed) in enumerate(pieces(batch, chunk_tokens, device)):
            seed_chunk(seed, step, 0, number)
            parts[side].append(
                towers.encode_query(packed) if side == "query" else towers.encode_passage(packed)
            )
            rows[side].append(some_rows)

    # 2. the loss and its gradient, on embeddings alone
    leaves = {}
    for side in parts:
        order = torch.from_numpy(np.argsort(np.concatenate(rows[side]), kind="stable")).to(device)
        leaves[side] = torch.cat([part.detach() for part in parts[side]])[order].requires_grad_()
    loss, numbers = loss_fn(leaves["query"], leaves["passage"], targets_on(batch, device))
    loss.backward()

    # 3. push the embedding gradients into each chunk; its graph is freed as it goes
    for side in parts:
        while parts[side]:
            part, some_rows = parts[side].pop(), rows[side].pop()
            if part.requires_grad:
                part.backward(leaves[side].grad[torch.from_numpy(some_rows).to(device)])
    return loss.detach(), numbers
