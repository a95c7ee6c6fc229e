"""One training step over a batch of any size: the exact gradient of the whole, in bounded memory.

Shapes: B queries and n passages of this rank, A queries and N passages of all ranks, D embedding, E
guide embedding; P pairs of this rank, L logits a pair.

The same for a retriever, whose batch has queries and passages, and for a reranker, whose batch has
pairs in groups and whose "embeddings" are logits.

1. Encode in chunks. The graphs of the first chunks are kept, as many as the activation budget
   allows; the other chunks are encoded without a graph.
2. The loss and its gradient, on embeddings alone; negatives come from all ranks.
3. Push the embedding gradients into the kept chunks, which frees them, then encode each other chunk
   again, with its own seed and now with a graph, and push into that.

A batch that fits is encoded once, as without any caching. Under several ranks the gradients are
summed by one all-reduce at the end, and no rank waits for another's chunks.

Source: Gao et al. 2021 (GradCache), sec. 3.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from data.batches import Batch, chunks
from data.groups import GroupBatch
from data.pairs import pack_pairs
from losses.infonce import Targets
from losses.rerank import GroupTargets
from models.reranker import Reranker
from models.towers import Towers
from models.transformer import Packed, pack
from runtime.distributed import SINGLE, Ranks

# Rows of a table whose gradient is sparse while chunks are encoded: smaller ones are cheap, and
# positions are read again and again.
LARGE_TABLE = 4096


class Guide(Protocol):
    def lookup(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """(guide_query_AE, guide_passage_NE) of a batch's texts, unit-norm float32."""


def seed_chunk(seed: int, step: int, rank: int, chunk: int) -> None:
    """Seed torch for one chunk: dropout masks depend on these four numbers and on nothing that ran
    before."""
    state = np.random.SeedSequence([seed, step, rank, chunk]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state >> np.uint64(1)))


def texts_of(batch: Batch | GroupBatch, side: str) -> list[np.ndarray]:
    """Token ids of the texts of one side."""
    if isinstance(batch, GroupBatch):
        return batch.pair_tokens
    return batch.query_tokens if side == "query" else batch.passage_tokens


def sides_of(batch: Batch | GroupBatch) -> tuple[str, ...]:
    return ("pair",) if isinstance(batch, GroupBatch) else ("query", "passage")


def pieces(
    batch: Batch | GroupBatch, chunk_tokens: int, device: torch.device
) -> Iterator[tuple[str, np.ndarray, Packed]]:
    """(side, which texts, their pack) for every chunk of a batch, longest texts first; a side
    without texts has no chunk."""
    for side in sides_of(batch):
        lengths = np.array([len(t) for t in texts_of(batch, side)])
        for rows in chunks(lengths, chunk_tokens):
            yield side, rows, packed_rows(batch, side, rows, device)


def packed_rows(
    batch: Batch | GroupBatch, side: str, rows: np.ndarray, device: torch.device
) -> Packed:
    """Texts of one side of a batch, by number, laid end to end."""
    if isinstance(batch, GroupBatch):
        return pack_pairs([(batch.pair_tokens[i], batch.pair_types[i]) for i in rows], device)
    texts = texts_of(batch, side)
    skip = batch.query_prompt_tokens_B if side == "query" else batch.passage_prompt_tokens_N
    return pack([texts[i] for i in rows], device, skip=skip[rows] if skip.any() else None)


def targets_on(
    batch: Batch, device: torch.device, *, step: int = 0, guide: Guide | None = None
) -> Targets:
    """What answers what, as tensors. step and guide are for losses that ask for them."""

    def tensor(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else on(device, array)

    guide_query_AE, guide_passage_NE = (None, None) if guide is None else guide.lookup(batch)
    scored = batch.scored
    return Targets(
        pair_query_P=tensor(batch.pair_query_P),
        pair_passage_P=tensor(batch.pair_passage_P),
        pair_weight_P=tensor(batch.pair_weight_P),
        relatives_BK=tensor(batch.relatives_BK),
        num_examples=batch.num_examples_global,
        step=step,
        query_offset=batch.query_offset,
        num_queries=batch.num_queries_global,
        query_relatives_BK=tensor(batch.query_relatives_BK),
        guide_query_AE=tensor(guide_query_AE),
        guide_passage_NE=tensor(guide_passage_NE),
        scored=None
        if scored is None
        else GroupTargets(
            group_P=on(device, scored.query_P),
            label_P=on(device, scored.label_P),
            score_P=on(device, scored.score_P),
            num_groups_global=batch.num_queries_global,
            num_pairs_global=0,  # for means over pairs, which no retriever's loss here is
            step=step,
        ),
        scored_passage_P=None if scored is None else on(device, scored.passage_P),
    )


def group_targets_on(batch: GroupBatch, device: torch.device, *, step: int = 0) -> GroupTargets:
    """Which pairs form a group and what they are worth, as tensors."""
    return GroupTargets(
        group_P=on(device, batch.group_P),
        label_P=on(device, batch.label_P),
        score_P=None if batch.score_P is None else on(device, batch.score_P),
        num_groups_global=batch.num_examples_global,
        num_pairs_global=batch.num_pairs_global,
        step=step,
        num_positives_global=batch.num_positives_global,
        num_many_global=batch.num_many_global,
    )


def train_step(
    model: Towers | Reranker,
    loss_fn: nn.Module,
    batch: Batch | GroupBatch,
    *,
    seed: int,
    step: int,
    chunk_tokens: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    activation_budget_mib: float = math.inf,
    ranks: Ranks = SINGLE,
    guide: Guide | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of one batch: gradients are added to the parameters' .grad.

    loss_fn    (q_BD, p_ND, targets, ranks), for a reranker (logits_PL, targets, ranks) -> this
               rank's share of the loss and of its numbers; on every rank, with or without texts,
               from the same collectives
    batch      this rank's part; a rank may have no queries, no passages, or neither
    step       0-based; with seed, rank and a chunk's number it seeds the chunk's dropout
    autocast   makes the context for the encoder (the loss always runs in float32)
    activation_budget_mib  MiB of kept graphs; 0: every chunk that trains is encoded twice
    guide      embeddings of a guide or teacher model, for losses that use one
    Returns the loss in nats (a mean over the examples of all ranks) and the loss function's own
    numbers, summed over ranks, with replayed_share: tokens encoded twice / tokens of all ranks.
    They stay on the device: reading them is a sync. Under several ranks .grad must be None before
    the step, and is the gradient of the global loss, the same on every rank, after it.
    """

    tables = large_tables(model)

    def encode(number: int, side: str, packed: Packed) -> Tensor:
        seed_chunk(seed, step, ranks.rank, number)
        with autocast(), sparse_gradients(tables):
            return model.encode(side, packed)

    if ranks.size > 1:  # what was there would be summed over ranks again
        assert all(p.grad is None for m in (model, loss_fn) for p in m.parameters())

    # 1. encode every chunk, keeping graphs while there is room
    trains = {
        side: any(p.requires_grad for p in model.tower(side).parameters()) for side in model.sides
    }
    leaves = {
        side: empty_embeddings(model, len(texts_of(batch, side)), device).requires_grad_(is_trained)
        for side, is_trained in trains.items()
    }
    kept: list[tuple[str, np.ndarray, Tensor]] = []
    to_replay: list[tuple[int, str, np.ndarray]] = []
    meter = GraphMeter(model, activation_budget_mib * 2**20)
    replayed_tokens = 0
    # one context around all chunks: autocast keeps its copies of the weights until it ends. A copy
    # made without a graph would cut the weight off, so that no graph may come after one left out.
    with autocast():
        for number, (side, rows, packed) in enumerate(pieces(batch, chunk_tokens, device)):
            num_tokens = sum(packed.lengths)
            with meter.graph_if_room(num_tokens, wanted=trains[side]):
                part = encode(number, side, packed)
            with torch.no_grad():
                leaves[side][on(device, rows)] = part
            if trains[side] and meter.has_room:
                kept.append((side, rows, part))
            elif trains[side]:
                to_replay.append((number, side, rows))
                replayed_tokens += num_tokens
            del part  # a graph that does not fit goes before the next chunk comes

    # 2. the loss and its gradient, on embeddings alone
    if isinstance(batch, GroupBatch):
        group_targets = group_targets_on(batch, device, step=step)
        loss, numbers = loss_fn(leaves["pair"], group_targets, ranks)
    else:
        candidates_ND = ranks.gather_rows(leaves["passage"])
        targets = targets_on(batch, device, step=step, guide=guide)
        loss, numbers = loss_fn(leaves["query"], candidates_ND, targets, ranks)
        del candidates_ND, targets
    loss.backward()

    # 3. push the embedding gradients into each chunk; its graph is freed as it goes
    def push(side: str, rows: np.ndarray, part: Tensor) -> None:
        if part.requires_grad and leaves[side].grad is not None:
            part.backward(leaves[side].grad[on(device, rows)])

    with dense_sums(tables):
        while kept:
            push(*kept.pop())
        for number, side, rows in to_replay:
            push(side, rows, encode(number, side, packed_rows(batch, side, rows, device)))

    # all ranks: one sum of everything
    tokens = {"replayed_tokens": replayed_tokens, "tokens": batch.num_tokens}
    numbers = numbers | {k: torch.tensor(float(v), device=device) for k, v in tokens.items()}
    loss, numbers = sum_over_ranks(model, loss_fn, loss.detach(), numbers, ranks)
    numbers["replayed_share"] = numbers.pop("replayed_tokens") / numbers.pop("tokens").clamp(min=1)
    return loss, numbers


def large_tables(model: nn.Module) -> list[nn.Embedding]:
    """Embeddings whose gradient a chunk should add as the rows that it read, not as a matrix of the
    whole vocabulary. On CUDA the matrix costs less than a sparse tensor does."""
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.Embedding)
        and m.weight.device.type == "cpu"
        and m.num_embeddings > LARGE_TABLE
    ]


@contextmanager
def sparse_gradients(tables: list[nn.Embedding]) -> Iterator[None]:
    """What is looked up within adds a sparse tensor to its table's gradient."""
    for table in tables:
        table.sparse = True
    try:
        yield
    finally:
        for table in tables:
            table.sparse = False


@contextmanager
def dense_sums(tables: list[nn.Embedding]) -> Iterator[None]:
    """What arrives at a table as a sparse tensor is added to a dense gradient: a sum of sparse
    tensors would keep the rows of all of them, and copy all of them for each."""

    def densify(weight: Tensor) -> None:
        if weight.grad.is_sparse:
            weight.grad = weight.grad.to_dense()

    hooks = [
        table.weight.register_post_accumulate_grad_hook(densify)
        for table in tables
        if table.weight.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def sum_over_ranks(
    model: nn.Module, loss_fn: nn.Module, loss: Tensor, numbers: dict[str, Tensor], ranks: Ranks
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, numbers) summed over ranks, and each .grad with them, in one all-reduce.

    Everything travels in one flat buffer; each gradient is freed when it is copied there, and is a
    part of the buffer afterwards. A parameter without a gradient on any rank keeps none.
    """
    if ranks.size == 1:
        return loss, numbers
    trained = [p for m in (model, loss_fn) for p in m.parameters() if p.requires_grad]
    has_grad = [p.grad is not None for p in trained]
    names = sorted(numbers)
    scalars = [loss, *(numbers[name] for name in names)]
    dtype = torch.float32
    for x in (*trained, *scalars):
        dtype = torch.promote_types(dtype, x.dtype)
    sizes = [*(p.numel() for p in trained), len(scalars), len(trained)]
    flat = torch.zeros(sum(sizes), dtype=dtype, device=loss.device)
    *parts, sums, counts = flat.split(sizes)
    for p, part in zip(trained, parts, strict=True):
        if p.grad is not None:
            part.copy_(p.grad.flatten())
            p.grad = None
    sums.copy_(torch.stack([x.to(dtype) for x in scalars]))
    counts.copy_(torch.tensor(has_grad))
    ranks.all_reduce_sum(flat)
    # read only where needed: it is a sync
    somewhere = has_grad if all(has_grad) else counts.tolist()
    for p, part, is_there in zip(trained, parts, somewhere, strict=True):
        if is_there:
            p.grad = part.view_as(p).to(p.dtype)
    loss, *values = (total.to(x.dtype) for total, x in zip(sums, scalars, strict=True))
    return loss, dict(zip(names, values, strict=True))


def empty_embeddings(model: Towers | Reranker, count: int, device: torch.device) -> Tensor:
    """Room for `count` embeddings (count, D), or logits (count, L), in the type they come in."""
    dtype = torch.promote_types(
        next(model.tower(model.sides[-1]).parameters()).dtype, torch.float32
    )
    return torch.empty(count, model.width, dtype=dtype, device=device)


def on(device: torch.device, array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


class GraphMeter:
    """Decides which chunks keep their autograd graph, by what the graphs keep alive.

    Counted are the bytes of distinct storages among saved tensors; parameters and buffers are there
    anyway. A chunk is expected to cost what the one before it did, by token; the first is tried.
    Autocast's copies of weights are kept for all chunks and belong to no token. Once a chunk does
    not fit, no later one is kept. So the choice is a function of the batch, the
    model and the budget, never of what else is in memory.
    """

    def __init__(self, module: nn.Module, budget_bytes: float):
        self.budget, self.bytes, self.bytes_per_token = budget_bytes, 0, 0.0
        self.bytes_of_copies = 0
        self.has_room = budget_bytes > 0
        own = [*module.parameters(), *module.buffers()]
        self.seen = {x.untyped_storage().data_ptr() for x in own}

    @contextmanager
    def graph_if_room(self, num_tokens: int, *, wanted: bool) -> Iterator[None]:
        """The context of one chunk's forward: with a graph that is measured, or without one.

        has_room says afterwards whether a graph that was wanted is there and fits.
        """
        if wanted and self.bytes + self.bytes_per_token * num_tokens > self.budget:
            self.has_room = False
        if not (wanted and self.has_room):
            with torch.no_grad():
                yield
            return
        before = self.bytes - self.bytes_of_copies
        with saved_tensors_hooks(self._count, lambda saved: saved):
            yield
        self.bytes_per_token = (self.bytes - self.bytes_of_copies - before) / num_tokens
        self.has_room = self.bytes <= self.budget

    def _count(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
            if is_copy_of_weight(saved):
                self.bytes_of_copies += storage.nbytes()
        return saved.detach()  # an output kept as it is would keep its own graph alive for ever


def is_copy_of_weight(x: Tensor) -> bool:
    """Whether x is one parameter in another type or shape: nothing else was used to make it."""
    node = x.grad_fn
    while node is not None:
        if (parameter := getattr(node, "variable", None)) is not None:
            return x.numel() == parameter.numel()
        nodes = [n for n, _ in node.next_functions if n is not None]
        node = nodes[0] if len(nodes) == 1 else None
    return False
