"""A judge of pairs: a cross-encoder trained on the rows of all folds but one, for data/validate.py.

Each of its pairs stands against passages that answer another query: the row's own negatives, then
random ones. The loss is binary cross-entropy in which a positive weighs as much as its negatives
together, so that its probability is that of a world where half of the pairs are right.

Shapes: P pairs of a step.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import ceil, inf
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from conf.schema import LossConfig, ModelConfig, OptimConfig, PrepareConfig, ValidateConfig
from data.batches import seeded
from data.cache import built_once, digest_of
from data.filters import pair_probabilities
from data.groups import GroupBatch
from data.pairs import PairTemplate, tokenise_plain
from data.records import Example, content_hash
from data.rows import Pair
from data.teacher import model_digest
from losses.grad_cache import train_step
from losses.rerank import RerankLoss
from models.build import build_reranker
from models.pretrained import resolve_base
from models.reranker import Reranker
from runtime.device import autocast_for, keep_freed_memory, pick_device, pick_precision
from runtime.memory import activation_budget_mib
from runtime.optim import build_optimizer, lr_at, set_lr

log = logging.getLogger(__name__)

VERSION = 1  # raise it when the same rows and settings would give other probabilities
_ORDER, _DRAW = 11, 12  # streams of random numbers
_NOT_IN_KEY = ("min_probability", "corrupt", "folds", "chunk_tokens")  # change no judge


def judged(
    c: PrepareConfig, fold: int, rows: Sequence[Example], asked: Sequence[Pair]
) -> np.ndarray:
    """Probability of each pair of `asked`, float64, by a judge trained on `rows`.

    fold  seeds the judge
    Kept in the cache by content of all that it depends on, so that a stage that was stopped trains
    no judge twice.
    """
    v, folder = c.validate, resolve_base(str(c.validate.base))
    settings = {k: x for k, x in asdict(v).items() if k not in _NOT_IN_KEY and k != "base"}
    texts = [[(e.query, e.positives, e.negatives) for e in rows]]
    texts.append([(p.query, p.passage) for p in asked])
    device = pick_device(c.device)
    precision = pick_precision(c.precision, device)
    key = digest_of(VERSION, model_digest(folder), settings, c.seed, fold, precision, texts)

    def build(target: Path) -> dict[str, int]:
        reranker = train_judge(c, rows, fold, device=device, precision=precision)
        found = pair_probabilities(reranker, asked, c, f"fold {fold + 1}: judging")
        np.save(target / "probability.npy", found)
        return {"pairs": len(asked)}

    place = Path(c.cache_dir) / f"judged-{key}"
    built_once(place, build, what=f"judgements of fold {fold + 1} of {v.folds}")
    return np.load(place / "probability.npy")


def fresh_judge(v: ValidateConfig) -> Reranker:
    """The untrained judge. Raises ValueError, in the names of validate's settings, where they do
    not fit the base."""
    try:
        return build_reranker(
            ModelConfig(
                base=str(v.base), pooling=v.pooling, max_pair_length=v.max_pair_length,
                freeze=v.freeze,
            )
        )  # fmt: skip
    except ValueError as error:
        ours = "|".join(f.name for f in fields(v))
        raise ValueError(re.sub(rf"\bmodel\.(?=({ours})\b)", "validate.", str(error))) from error


def train_judge(
    c: PrepareConfig, rows: Sequence[Example], fold: int, *, device: torch.device, precision: str
) -> Reranker:
    """The cross-encoder, in evaluation mode on `device`.

    The same rows, settings and thread count give the same weights.
    """
    v = c.validate
    keep_freed_memory()
    torch.manual_seed(c.seed * 1000 + fold)  # a fresh head is drawn from it
    reranker = fresh_judge(v).to(device)
    loss_fn = RerankLoss(
        LossConfig(kind="bce", temperature=1.0, positive_weight=float(v.num_negatives))
    )
    optim = OptimConfig(
        lr=v.lr, head_lr=v.head_lr, warmup=v.warmup, batch_size=v.batch_size, epochs=v.epochs
    )
    optimizer = build_optimizer(reranker, loss_fn, optim)
    lessons = Lessons(rows, reranker, v.num_negatives, v.batch_size, seed=c.seed, fold=fold)
    total = ceil(v.epochs * len(lessons.pairs) / v.batch_size)
    trained = [p for p in reranker.parameters() if p.requires_grad]
    budget_mib = activation_budget_mib("auto", device)
    bar = tqdm(range(total), desc=f"fold {fold + 1}: training", unit="step", leave=False)
    for step in bar:
        set_lr(optimizer, lr_at(step, total, optim))
        loss, _ = train_step(
            reranker, loss_fn, lessons.batch_at(step), seed=c.seed + 7919 * fold, step=step,
            chunk_tokens=v.chunk_tokens, device=device, autocast=autocast_for(precision, device),
            activation_budget_mib=budget_mib,
        )  # fmt: skip
        if not torch.isfinite(loss):
            raise ValueError(
                f"validate: the judge of fold {fold + 1} has loss {loss.item()} at step {step + 1};"
                " lower validate.lr"
            )
        clip_grad_norm_(trained, optim.max_grad_norm or inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return reranker.eval()


class Lessons:
    """Batches of a judge: a function of (seed, fold, step). Each positive of each row is a group
    with `num_negatives` passages that are no positive of its query."""

    def __init__(
        self,
        rows: Sequence[Example],
        reranker: Reranker,
        num_negatives: int,
        batch_size: int,
        *,
        seed: int,
        fold: int,
    ) -> None:
        self.num_negatives, self.batch_size, self.seed, self.fold = (
            num_negatives, batch_size, seed, fold,
        )  # fmt: skip
        passages: dict[int, str] = {}  # by content
        self.positives: dict[int, set[int]] = {}  # query -> passages, by content
        for e in rows:
            answers = self.positives.setdefault(content_hash(e.query), set())
            for text in e.positives:
                passages.setdefault(content_hash(text), text)
                answers.add(content_hash(text))
        self.pool = list(passages)  # what random negatives are drawn from
        self.pairs: list[tuple[str, int, list[int]]] = []  # query, positive, own negatives
        for e in rows:
            own = {content_hash(t): t for t in e.negatives}
            answers = self.positives[content_hash(e.query)]
            own = {key: text for key, text in own.items() if key not in answers}
            passages |= own
            self.pairs += [(e.query, content_hash(t), list(own)) for t in e.positives]
        spec = reranker.spec
        self.template, self.max_length = PairTemplate.of(reranker.tokenizer), spec.max_length
        queries = list(dict.fromkeys(e.query for e in rows))
        self.queries = self._tokenised(reranker, queries, queries, spec.query_prompt)
        self.passages = self._tokenised(reranker, passages, passages.values(), spec.passage_prompt)

    def _tokenised(self, reranker, keys, texts, prompt: str) -> Mapping:
        found = tokenise_plain(reranker.tokenizer, list(texts), prompt, self.max_length)
        return dict(zip(keys, found, strict=True))

    def batch_at(self, step: int) -> GroupBatch:
        """A stretch of the endless walk through permutations of the pairs."""
        place = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epoch_E, at_E = np.divmod(place, len(self.pairs))
        order = {
            e: seeded(self.seed, _ORDER, self.fold, e).permutation(len(self.pairs))
            for e in np.unique(epoch_E).tolist()
        }
        rng = seeded(self.seed, _DRAW, self.fold, step)
        tokens, types, group_P, label_P = [], [], [], []
        for group, (epoch, at) in enumerate(zip(epoch_E.tolist(), at_E.tolist(), strict=True)):
            query, positive, own = self.pairs[order[epoch][at]]
            negatives = self._negatives(query, own, rng)
            for key in (positive, *negatives):
                ids_T, types_T = self.template.join(
                    self.queries[query], self.passages[key], self.max_length
                )
                tokens.append(ids_T)
                types.append(types_T)
            group_P += [group] * (1 + len(negatives))
            label_P += [1.0] + [0.0] * len(negatives)
        return GroupBatch(
            pair_tokens=tokens, pair_types=types, group_P=np.array(group_P, np.int64),
            label_P=np.array(label_P, np.float32), score_P=None,
            num_examples=self.batch_size, num_examples_global=self.batch_size,
            num_pairs_global=len(tokens), example_ids=[],
        )  # fmt: skip

    def _negatives(self, query: str, own: list[int], rng: np.random.Generator) -> list[int]:
        """Own ones, drawn where there are too many, then random ones; distinct."""
        chosen = [own[i] for i in rng.permutation(len(own))[: self.num_negatives]]
        taken = {*chosen, *self.positives[content_hash(query)]}
        # a bounded number of draws: a query may have almost all passages as positives
        for key in rng.choice(len(self.pool), 4 * self.num_negatives + 8).tolist():
            if len(chosen) == self.num_negatives:
                break
            if self.pool[key] not in taken:
                chosen.append(self.pool[key])
                taken.add(self.pool[key])
        return chosen
