"""Embeddings of texts by a model that is not trained: computed once, then memory-mapped. Of all
training texts by a guide or teacher, and of a corpus that is searched (data/candidates.py).

The model is used as its own folder says: its tokenizer, prompts, maximum lengths and pooling, not
those of the model that is trained. What it made is found again by content, so that a checkpoint
trained anew in the same folder is never answered with the embeddings of the old one.
"""

# Shapes: n texts of one side of a data set, A queries and N passages of a batch over all ranks,
# E embedding of the guide

import hashlib
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.batches import Batch
from data.cache import built_once, digest_of
from data.datasets import Data
from evals.encode import encode
from models.pretrained import load_towers, read_modules, resolve_base
from models.towers import Towers
from runtime.device import pick_precision

log = logging.getLogger(__name__)

GUIDE_VERSION = 1  # raise it when the same model and texts would give other numbers or files
BLOCK_TEXTS = 4096  # encoded at once: bounds the memory of texts, tokens and embeddings
# A larger file holds float16: a cosine moves by 1e-5, half the reading is worth it
FLOAT32_BYTES = 4 << 30
# lies beside weights without being read: a model card written anew makes no other model
_NO_MODEL = frozenset(".md .onnx .h5 .msgpack .ot .gguf .png".split())


class GuideEmbeddings:
    """Unit-norm embeddings of every text that batches can hold.

    width  E
    """

    def __init__(self, queries: "_Side", passages: "_Side") -> None:
        self._queries, self._passages = queries, passages
        self.width = passages.width

    def lookup(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """(guide_query_AE, guide_passage_NE), float32: of all ranks' queries and passages, in the
        batch's order.
        """
        return self._queries.take(batch.query_numbers_A), self._passages.take(
            batch.passage_numbers_N
        )


def open_guide(
    model: str,
    data: Data,
    *,
    cache_dir: str | Path,
    device: torch.device | str,
    precision: str,
) -> GuideEmbeddings:
    """The embeddings of data.train by a model, from cache_dir or made now.

    model      model folder, hub id or run directory of ours
    device     where texts are encoded; the model leaves it before this returns
    precision  auto | fp32 | bf16 of the encoder; what fp32 made never serves bf16, nor the reverse
    Raises ValueError when the model cannot be had or read, when it cannot encode a text, and when
    the disk is too small.
    """
    try:
        return _open_guide(model, data, Path(cache_dir), torch.device(device), precision)
    except ValueError as error:
        raise ValueError(f"guide model {model!r} (loss.guide, loss.teacher): {error}") from error


def _open_guide(
    model: str, data: Data, cache_dir: Path, device: torch.device, precision: str
) -> GuideEmbeddings:
    folder = resolve_base(model)
    guide = Encoder(folder, device, precision)
    used = dict(zip(("query", "passage"), data.train.texts_used(), strict=True))
    sides = {}
    try:
        for side, number_n in used.items():
            parts, base = [], 0
            for s in data.train.sets:
                if side == "query":
                    texts, digest, what = s.query_texts, s.query_digest, "queries"
                else:
                    texts, digest, what = s.passage_texts, s.passage_digest, "passages"
                size = len(s.queries if side == "query" else s.passages)
                assert len(texts) == size, f"{len(texts)} texts of {size} {what}"
                low, high = np.searchsorted(number_n, (base, base + size))
                row_n = number_n[low:high] - base
                base += size
                name = f"{what} of {s.name}" if s.name else what
                parts.append(guide.embeddings(texts, digest, row_n, side, cache_dir, name))
            sides[side] = _Side(number_n, parts)
    finally:
        guide.close()
    return GuideEmbeddings(sides["query"], sides["passage"])


def model_digest(folder: Path) -> str:
    """Hex sha256 of all that the towers of a model folder are made of: weights, tokenizers and
    settings (prompts, lengths, pooling), as files.
    """
    sides = read_modules(folder)
    folders = {folder, *(m.folder for modules in sides.values() for m in modules)}
    folders = {f for f in folders if f.is_dir()}  # git keeps no empty one, such as Normalize's
    names: list[Any] = [
        [(m.kind, os.path.relpath(m.folder, folder)) for m in modules] for modules in sides.values()
    ]
    for path in sorted(p for f in folders for p in f.iterdir() if p.is_file()):
        if path.suffix.lower() in _NO_MODEL or path.name.startswith("."):
            continue
        with open(path, "rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        names.append((os.path.relpath(path, folder), sha256))
    return hashlib.sha256(repr(names).encode()).hexdigest()


class Encoder:
    """A model that is loaded when the first text must be encoded.

    folder     of the model, see models.pretrained.resolve_base
    precision  auto | fp32 | bf16
    name       of its part in the run, for messages and cache folders
    is_unit    whether embeddings get unit length where the model does not give them that
    digest     of `folder` before anything was read from it
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        precision: str,
        *,
        name: str = "guide",
        is_unit: bool = True,
        batch_tokens: int = 0,
    ) -> None:
        self.folder, self.device, self.name, self.is_unit = folder, device, name, is_unit
        self.digest = model_digest(folder)
        self.precision = pick_precision(precision, device)
        self.batch_tokens = batch_tokens
        self._towers: Towers | None = None

    def towers(self) -> Towers:
        if self._towers is None:
            towers = load_towers(self.folder)
            if model_digest(self.folder) != self.digest:
                raise ValueError(f"{self.folder} changed while it was read; start again")
            self._towers = towers.to(self.device)
        return self._towers

    def close(self) -> None:
        was_loaded, self._towers = self._towers is not None, None
        if was_loaded and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def embeddings(
        self,
        texts: Any,
        texts_digest: str,
        row_n: np.ndarray,
        side: str,
        cache_dir: Path,
        what: str,
    ) -> np.ndarray:
        """Embeddings of texts[row_n], float32 or float16 (n, E), memory-mapped."""
        if not len(row_n):
            return np.zeros((0, 0), np.float32)
        is_all = len(row_n) == len(texts)
        key = digest_of(
            GUIDE_VERSION,
            self.digest,
            self.precision,
            side,
            texts_digest,
            None if is_all else hashlib.sha256(row_n.tobytes()).hexdigest(),
            *(() if self.is_unit else ("as the model gives them",)),
        )
        folder = cache_dir / f"{self.name}-{key}"
        built_once(
            folder,
            lambda temporary: _encode(temporary, self, texts, row_n, side, what),
            what=f"{self.name}'s embeddings of {len(row_n):,} {what}",
        )
        return np.load(folder / "embeddings.npy", mmap_mode="r").view(np.ndarray)


def _encode(
    folder: Path, guide: Encoder, texts: Any, row_n: np.ndarray, side: str, what: str
) -> dict[str, Any]:
    towers = guide.towers()
    shape = (len(row_n), towers.width)
    dtype = np.dtype("<f4" if 4 * shape[0] * shape[1] <= FLOAT32_BYTES else "<f2")
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"embeddings of {shape[0]:,} {what} need {num_bytes / 1e9:.1f} GB under"
            f" data.cache_dir, where {free / 1e9:.1f} GB are free; set data.cache_dir to a larger"
            " disk or lower data.max_examples (in prepare.py: set cache_dir)"
        )
    bar = tqdm(total=shape[0], desc=f"{guide.name}: {what}", unit="text", leave=False, delay=2)
    # written, not mapped: a full disk is then an error, and not the end of the process
    with open(folder / "embeddings.npy", "wb") as f, bar:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(f, header)
        for start in range(0, shape[0], BLOCK_TEXTS):
            block = [texts[i] for i in row_n[start : start + BLOCK_TEXTS].tolist()]
            x_nE = encode(
                towers, block, side, precision=guide.precision, batch_tokens=guide.batch_tokens
            )
            is_bad_n = ~np.isfinite(x_nE).all(1)
            if is_bad_n.any():
                text = block[int(np.argmax(is_bad_n))]
                raise ValueError(
                    f"the embedding of {text[:60]!r} is not finite; use precision=fp32"
                )
            x_nE = _unit(x_nE) if guide.is_unit else x_nE
            f.write(x_nE.astype(dtype).tobytes())
            bar.update(len(block))
    return {
        "model": str(guide.folder),
        "model_sha256": guide.digest,
        "spec": asdict(towers.spec),
        "precision": guide.precision,
        "side": side,
        "shape": list(shape),
        "dtype": dtype.str,
    }


@dataclass
class _Side:
    """Queries or passages of all data sets.

    number_n  in the TrainStore, ascending
    parts     embeddings of each data set; end to end they are those of number_n
    """

    number_n: np.ndarray
    parts: list[np.ndarray]

    def __post_init__(self) -> None:
        self._ends = np.cumsum([len(p) for p in self.parts])
        assert self._ends[-1] == len(self.number_n), (self._ends, len(self.number_n))

    @property
    def width(self) -> int:
        return max(p.shape[1] for p in self.parts)

    def take(self, wanted: np.ndarray | None) -> np.ndarray:
        assert wanted is not None, "the batch has no numbers: it was not made by a TrainStore"
        row = np.searchsorted(self.number_n, wanted)
        assert np.array_equal(self.number_n[np.minimum(row, len(self.number_n) - 1)], wanted)
        part = np.searchsorted(self._ends, row, side="right")
        out_nE = np.empty((len(wanted), self.width), np.float32)
        for d, embeddings in enumerate(self.parts):
            mine = np.flatnonzero(part == d)
            if not len(mine):
                continue
            some_nE = embeddings[row[mine] - (self._ends[d] - len(embeddings))]
            is_rounded = embeddings.dtype != np.float32
            out_nE[mine] = _unit(some_nE.astype(np.float32)) if is_rounded else some_nE
        return out_nE


def _unit(x_nE: np.ndarray) -> np.ndarray:
    norm_n = np.linalg.norm(x_nE, axis=1, keepdims=True)
    return x_nE / np.maximum(norm_n, np.finfo(np.float32).tiny)
