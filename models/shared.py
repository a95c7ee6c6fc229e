"""A rotation of embeddings that puts first what queries and their passages have in common.

Shapes: P pairs, D embedding.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from data.batches import Batch
from losses.grad_cache import empty_embeddings, on, pieces
from models.build import distinct, set_linear
from models.towers import Towers
from models.transformer import ready_to_encode

log = logging.getLogger(__name__)


def shared_directions(query_PD: Tensor, passage_PD: Tensor) -> Tensor:
    """(D, D) orthogonal, float32: the rows are directions, the ones that pairs share most first.

    Eigenvectors of the symmetric part of the cross-covariance of queries and their passages (the
    inter-battery factors of Tucker 1958, with one map for both sides). All of them together change
    no similarity; no other d orthonormal directions keep more of that covariance than the first d.
    Signs are such that the largest entry of a direction is positive.
    """
    query_PD, passage_PD = (x.double() - x.double().mean(0) for x in (query_PD, passage_PD))
    cross_DD = query_PD.T @ passage_PD
    _, direction_DK = torch.linalg.eigh(cross_DD + cross_DD.T)  # in ascending order
    direction_KD = direction_DK.flip(1).T
    largest_K1 = direction_KD.gather(1, direction_KD.abs().argmax(1, keepdim=True))
    return (direction_KD * largest_K1.sign()).float()


@torch.no_grad()
def start_from_shared(
    towers: Towers,
    batches: Iterator[Batch],
    num_pairs: int,
    *,
    chunk_tokens: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> int:
    """Set the last projection of each tower to the shared directions of the first `num_pairs` pairs
    of `batches`, or of all there are. Returns how many were used.

    The projections must be the identity before (ModelConfig.projection.init=shared).
    """
    was_training = towers.training
    towers.eval()
    pairs: list[tuple[Tensor, Tensor]] = []
    count = 0
    with autocast(), ready_to_encode(towers):
        for batch in batches:
            query_BD = empty_embeddings(towers, len(batch.query_tokens), device)
            passage_ND = empty_embeddings(towers, len(batch.passage_tokens), device)
            side_of = {"query": query_BD, "passage": passage_ND}
            for side, rows, packed in pieces(batch, chunk_tokens, device):
                side_of[side][on(device, rows)] = towers.encode(side, packed)
            at_P = on(device, batch.pair_passage_P - batch.passage_offset)
            pairs.append((query_BD[on(device, batch.pair_query_P)], passage_ND[at_P]))
            count += len(at_P)
            if count >= num_pairs:
                break
    query_PD, passage_PD = (torch.cat(x)[:num_pairs].cpu() for x in zip(*pairs, strict=True))
    weight_DD = shared_directions(query_PD, passage_PD)
    for tower in distinct(towers):
        set_linear(tower.projections[-1].linear, weight_DD)
    towers.train(was_training)
    log.info("projection: the directions that %d pairs share, first to last", len(query_PD))
    return len(query_PD)
