"""Exact nearest-neighbour search: every dimension and storage precision, one total order.

Shapes: Q queries, N documents, D embedding width, d kept components, K hits a query.

The order of hits is trec_eval's: float32 score descending, then document id descending by its
UTF-8 bytes. Documents are walked in descending-id order, so that "the earlier column" is the
tie-break everywhere: a stable sort keeps it within a block, a stable merge between blocks.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PRECISIONS = ("fp32", "bf16", "int8", "binary")

QUERY_BLOCK = 256
DOC_BLOCK = 16384


@dataclass(frozen=True)
class Hits:
    """The best documents of each query, best first; ids are those the searcher was given.

    scores_QK      float32; -inf where a query has fewer than K hits
    docs_QK        int64 index into doc_ids; -1 where there is no hit
    bytes_per_doc  size of a stored document vector (0 for an index that stores none)
    """

    query_ids: list[str]
    doc_ids: list[str]
    scores_QK: np.ndarray
    docs_QK: np.ndarray
    bytes_per_doc: float = 0.0

    def of(self, row: int) -> list[tuple[str, float]]:
        """(document id, score) of the hits of query number `row`, best first."""
        found = self.docs_QK[row] >= 0
        ids = [self.doc_ids[i] for i in self.docs_QK[row][found].tolist()]
        return list(zip(ids, self.scores_QK[row][found].tolist(), strict=True))

    def ids_by_query(self, first: int | None = None) -> dict[str, list[str]]:
        """query id -> ids of its first hits (all of them by default), best first."""
        return {
            query_id: [self.doc_ids[n] for n in self.docs_QK[row, :first].tolist() if n >= 0]
            for row, query_id in enumerate(self.query_ids)
        }


def descending_ids(doc_ids: Sequence[str]) -> np.ndarray:
    """Document numbers by id, descending by bytes. Code-point order of str is UTF-8 byte order."""
    order_N = np.array(
        sorted(range(len(doc_ids)), key=doc_ids.__getitem__, reverse=True), dtype=np.int64
    )
    for a, b in zip(order_N[:-1].tolist(), order_N[1:].tolist(), strict=True):
        if doc_ids[a] == doc_ids[b]:
            raise ValueError(
                f"document id {doc_ids[a]!r} occurs twice (documents {min(a, b)} and {max(a, b)});"
                " ids must be distinct"
            )
    return order_N


def bytes_per_doc(dim: int, precision: str) -> int:
    """Bytes of one stored vector. int8 also keeps 4 bytes a dimension once for the whole index."""
    return {"fp32": 4 * dim, "bf16": 2 * dim, "int8": dim, "binary": math.ceil(dim / 8)}[precision]


class StoredDocs:
    """Document vectors as an index would hold them, decoded to float32 a block at a time.

    fp32    the first `dim` components, divided by their norm
    bf16    those, rounded to bfloat16 (to nearest, even)
    int8    those as round(127 x / m), m the largest |x| of the dimension over all documents;
            decoded code * m / 127
    binary  one bit a dimension, 1 where x >= 0; decoded +-1 / sqrt(dim), so that vectors keep unit
            length

    Queries stay float32 in all four. At the full width vectors are taken as they come: encode()
    made them unit length where the model is meant to, and a second division would only move the
    last bits.
    """

    def __init__(
        self,
        p_ND: Tensor,
        order_N: np.ndarray,
        dim: int,
        precision: str,
        block: int,
        ids: Sequence[str],
    ) -> None:
        self.ids = ids  # in the order of p_ND, to name a broken vector
        self.p_ND, self.dim, self.precision, self.block = p_ND, dim, precision, block
        self.order_N = torch.from_numpy(order_N).to(p_ND.device)
        self.codes_ND: Tensor | None = None  # in descending-id order; fp32 needs no copy
        self.scale_D: Tensor | None = None
        if precision == "fp32" or len(order_N) == 0:
            return
        if precision == "int8":
            most_D = torch.zeros(dim, device=p_ND.device)
            for _, x_MD in self._floats():
                most_D = torch.maximum(most_D, x_MD.abs().amax(dim=0))
            self.scale_D = torch.where(most_D > 0, most_D / 127, torch.ones_like(most_D))
        self.codes_ND = torch.cat([self._code(x_MD) for _, x_MD in self._floats()])

    def _floats(self) -> Iterator[tuple[int, Tensor]]:
        for low in range(0, len(self.order_N), self.block):
            rows_M = self.order_N[low : low + self.block]
            found_MD = self.p_ND[rows_M].float()
            # here, not on decoded codes: those hide it, and one NaN is in every scale of int8
            _reject_nonfinite(found_MD, "document", lambda row, of=rows_M: self.ids[int(of[row])])
            yield low, truncate(found_MD, self.dim)

    def _code(self, x_MD: Tensor) -> Tensor:
        if self.precision == "bf16":
            return x_MD.bfloat16()
        if self.precision == "int8":
            return (x_MD / self.scale_D).round().clamp(-127, 127).to(torch.int8)
        return torch.from_numpy(np.packbits((x_MD >= 0).cpu().numpy(), axis=1)).to(x_MD.device)

    def _decode(self, code_MD: Tensor) -> Tensor:
        if self.precision == "bf16":
            return code_MD.float()
        if self.precision == "int8":
            return code_MD.float() * self.scale_D
        bits_MD = np.unpackbits(code_MD.cpu().numpy(), axis=1, count=self.dim)
        signs_MD = torch.from_numpy(bits_MD).to(code_MD.device).float().mul_(2).sub_(1)
        return signs_MD / math.sqrt(self.dim)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(number of the first document in descending-id order, its block of float32 vectors)."""
        if self.codes_ND is None:
            yield from self._floats()
            return
        for low in range(0, len(self.order_N), self.block):
            yield low, self._decode(self.codes_ND[low : low + self.block])


def truncate(x_ND: Tensor, dim: int) -> Tensor:
    """First `dim` components at unit length; unchanged at the full width. A zero vector stays
    zero."""
    if dim == x_ND.shape[1]:
        return x_ND
    x_Nd = x_ND[:, :dim].contiguous()
    return x_Nd / torch.linalg.vector_norm(x_Nd, dim=1, keepdim=True).clamp_min(1e-30)


def top_k_in_order(scores_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(scores, columns) of the k greatest of each row, descending; of equals the lower column
    first.

    torch.topk picks any of the scores tied across the k boundary, so rows that have such a tie are
    sorted whole.
    """
    k = min(k, scores_QN.shape[1])
    top_QK, columns_QK = torch.topk(scores_QN, k, dim=1)
    last_Q1 = top_QK[:, -1:]
    tied_outside_Q = (scores_QN == last_Q1).sum(dim=1) > (top_QK == last_Q1).sum(dim=1)
    rows = (tied_outside_Q & (last_Q1[:, 0] > -torch.inf)).nonzero()[:, 0]
    if len(rows):
        columns_QK[rows] = torch.sort(scores_QN[rows], dim=1, descending=True, stable=True).indices[
            :, :k
        ]
    columns_QK = columns_QK.sort(dim=1).values
    scores_QK, by_QK = torch.sort(
        scores_QN.gather(1, columns_QK), dim=1, descending=True, stable=True
    )
    return scores_QK, columns_QK.gather(1, by_QK)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32, no bf16 passes, no autocast: a score is the float32 product whatever else is on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _as_tensor(x: np.ndarray | Tensor, what: str, rows: int) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
    if x.ndim != 2 or x.shape[0] != rows:
        raise ValueError(
            f"search: {what} have shape {tuple(x.shape)}; want ({rows}, D), one row an id"
        )
    return x


def _reject_nonfinite(x_MD: Tensor, what: str, id_of: Callable[[int], str]) -> None:
    bad = (~torch.isfinite(x_MD).all(dim=1)).nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"search: the embedding of {what} {id_of(int(bad[0]))!r} holds NaN or infinity"
            f" ({len(bad)} such {what}s in this block); the model's weights or the text are broken"
        )


def search(
    q_QD: np.ndarray | Tensor,
    p_ND: np.ndarray | Tensor,
    doc_ids: Sequence[str],
    query_ids: Sequence[str],
    *,
    k: int,
    dim: int | None = None,
    precision: str = "fp32",
    block: int = DOC_BLOCK,
    query_block: int = QUERY_BLOCK,
    device: str | torch.device | None = None,
    order_N: np.ndarray | None = None,
    shares_ids: bool = False,
) -> Hits:
    """The k best documents of each query by float32 inner product, exactly, in the one total order.

    q_QD, p_ND   embeddings, unit length (any float dtype); numpy, or tensors on any device
    dim          first components used, renormalised; None: all
    precision    of the stored documents: fp32 | bf16 | int8 | binary (see StoredDocs)
    block        documents scored at once; memory is block * (D + query_block) floats and Q * k hits
    device       where to score; None: where p_ND is
    order_N      descending_ids(doc_ids), when the caller has it already
    shares_ids   as in RetrievalSet: a document whose id is the query's own is dropped, as BEIR
                 does, and the k hits are k others
    Raises ValueError when shapes disagree, dim is not in [1, D], ids repeat or an embedding is not
    finite.

    The same call gives the same bits on the same machine, thread count and torch. Every product has
    one shape, (query_block, d) x (d, block), short blocks being padded with zeros: so a query's
    hits do not depend on the other queries asked, and equal vectors have equal scores.
    """
    p_ND = _as_tensor(p_ND, "documents", len(doc_ids))
    q_QD = _as_tensor(q_QD, "queries", len(query_ids))
    if p_ND.shape[1] != q_QD.shape[1]:
        raise ValueError(
            f"search: queries have {q_QD.shape[1]} components, documents {p_ND.shape[1]}; they must"
            " agree"
        )
    width = p_ND.shape[1]
    dim = width if dim is None else dim
    if not 1 <= dim <= width:
        raise ValueError(
            f"dim ({dim}) must be in [1, {width}], the width of the model's embeddings"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision ({precision!r}) must be one of {', '.join(PRECISIONS)}")
    if k < 1:
        raise ValueError(f"k ({k}) must be >= 1")

    num_docs, num_queries = len(doc_ids), len(query_ids)
    order_N = descending_ids(doc_ids) if order_N is None else order_N
    device = p_ND.device if device is None else torch.device(device)
    block = min(block, max(256, math.ceil(num_docs / 256) * 256))
    place = {doc_ids[n]: at for at, n in enumerate(order_N.tolist())}
    own_place_Q = [place.get(query_id, -1) if shares_ids else -1 for query_id in query_ids]

    best_QK = torch.full((num_queries, k), -torch.inf)
    place_QK = torch.full((num_queries, k), -1, dtype=torch.int64)
    with _full_float32():
        stored = StoredDocs(p_ND, order_N, dim, precision, block, doc_ids)
        for doc_low, found_MD in stored.blocks():
            size = len(found_MD)
            docs_MD = torch.zeros((block, dim), device=device)
            docs_MD[:size] = found_MD.to(device)
            for low in range(0, num_queries, query_block):
                high = min(low + query_block, num_queries)
                asked_BD = torch.zeros((query_block, width), device=device)
                asked_BD[: high - low] = q_QD[low:high].to(device).float()
                ids = query_ids[low:high]
                _reject_nonfinite(asked_BD[: high - low], "query", ids.__getitem__)
                scores_BM = (truncate(asked_BD, dim) @ docs_MD.T)[: high - low, :size]
                for row in range(low, high):
                    if doc_low <= own_place_Q[row] < doc_low + size:
                        scores_BM[row - low, own_place_Q[row] - doc_low] = -torch.inf
                score_BK, column_BK = top_k_in_order(scores_BM, k)
                both_BK = torch.cat([best_QK[low:high], score_BK.cpu()], dim=1)
                places_BK = torch.cat([place_QK[low:high], column_BK.cpu() + doc_low], dim=1)
                # the running hits stand first and have greater ids: a stable sort keeps the order
                both_BK, by_BK = torch.sort(both_BK, dim=1, descending=True, stable=True)
                best_QK[low:high] = both_BK[:, :k]
                place_QK[low:high] = places_BK.gather(1, by_BK)[:, :k]

    docs_QK = np.full((num_queries, k), -1, dtype=np.int64)
    hit_QK = (best_QK > -torch.inf).numpy()
    docs_QK[hit_QK] = order_N[place_QK.numpy()[hit_QK]]
    return Hits(
        list(query_ids), list(doc_ids), best_QK.numpy(), docs_QK, bytes_per_doc(dim, precision)
    )
