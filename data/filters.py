"""Which (query, passage) pairs are worth training on: rules about texts, near duplicates, models.

Stage `filter` of prepare.py. A rule is a pure function (pair, settings) -> why the pair is dropped,
or None; RULES has them by the name that the report uses. The cheap ones come first and a pair is
counted where it fails first: rules, near duplicates, similarity, cross-encoder. Letters and words
are those of data/languages.py, so that Persian, Arabic, Turkish and English count alike.

Shapes: P pairs.
"""

import logging
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from conf.schema import FilterConfig, PrepareConfig
from data.languages import (
    comparable,
    is_question,
    language_share,
    plain,
    script_share,
    words,
)
from data.near import grouped, near_sets
from data.rows import (
    Pair,
    keep_pairs,
    pairs_of,
    read_answers,
    read_source,
    report_of,
    row_of,
    write_rows,
)
from data.stages import check_stage

log = logging.getLogger(__name__)

MIN_REPEATED_WORDS = 12  # shorter texts may repeat themselves
BLOCK_TEXTS = 512  # queries compared with all earlier ones at once

# phrases that only surround the text of a web page; compared by letters and digits alone
BOILERPLATE = (
    "all rights reserved", "accept cookies", "cookie policy", "enable javascript",
    "subscribe to our newsletter", "share on facebook", "lorem ipsum",
    "t\u00fcm haklar\u0131 sakl\u0131d\u0131r", "\u00e7erez politikas\u0131",
    # Persian: all rights of this site; sign up for the newsletter. Arabic: all rights reserved
    "\u062a\u0645\u0627\u0645 \u062d\u0642\u0648\u0642 \u0627\u06cc\u0646 \u0633\u0627\u06cc\u062a",
    "\u062f\u0631 \u062e\u0628\u0631\u0646\u0627\u0645\u0647 \u0639\u0636\u0648"
    " \u0634\u0648\u06cc\u062f",
    "\u062c\u0645\u064a\u0639 \u0627\u0644\u062d\u0642\u0648\u0642"
    " \u0645\u062d\u0641\u0648\u0638\u0629",
)  # fmt: skip


# ------------------------------------------------------------------------------------------- rules


def _bounded(value: float, bounds: Sequence[float], what: str) -> str | None:
    if not bounds or bounds[0] <= value <= bounds[1]:
        return None
    return f"{what} {value:.3g}, want {bounds[0]:g} to {bounds[1]:g}"


def length(pair: Pair, c: FilterConfig) -> str | None:
    """Words and characters of both texts, and words of the query to words of the passage."""
    num = {"query": len(words(pair.query)), "passage": len(words(pair.passage))}
    return (
        _bounded(num["query"], c.query_words, "words of the query:")
        or _bounded(num["passage"], c.passage_words, "words of the passage:")
        or _bounded(len(plain(pair.query)), c.query_chars, "characters of the query:")
        or _bounded(len(plain(pair.passage)), c.passage_chars, "characters of the passage:")
        or _bounded(
            num["query"] / max(1, num["passage"]), c.length_ratio, "words of query/passage:"
        )
    )


def tokens(pair: Pair, c: FilterConfig, count: Callable[[str], int]) -> str | None:
    """count  tokens of a text, special ones left out"""
    return _bounded(count(pair.query), c.query_tokens, "tokens of the query:") or _bounded(
        count(pair.passage), c.passage_tokens, "tokens of the passage:"
    )


def script(pair: Pair, c: FilterConfig) -> str | None:
    if c.script is None:
        return None
    share = min(script_share(text, c.script) for text in (pair.query, pair.passage))
    return _bounded(share, (c.min_script_share, 1), f"share of {c.script} letters:")


def language(pair: Pair, c: FilterConfig) -> str | None:
    if c.language is None:
        return None
    share = min(language_share(text, c.language) for text in (pair.query, pair.passage))
    return _bounded(share, (c.min_language_share, 1), f"share of words of {c.language}:")


def question(pair: Pair, c: FilterConfig) -> str | None:
    if c.question == "any" or is_question(pair.query) == (c.question == "only"):
        return None
    return "no question" if c.question == "only" else "a question"


def answer(pair: Pair, c: FilterConfig) -> str | None:
    """One of the answers stands in the passage, whatever its case, marks and spaces."""
    if pair.answers is None:
        return None
    passage, found = comparable(pair.passage), [comparable(a) for a in pair.answers]
    if any(a and a in passage for a in found):
        return None
    return f"not in the passage: {' | '.join(pair.answers)[:100] or 'no answer'}"


def overlap(pair: Pair, c: FilterConfig) -> str | None:
    """Share of the query's distinct words that the passage has too."""
    if not c.overlap:
        return None
    asked, there = ({comparable(w) for w in words(t)} for t in (pair.query, pair.passage))
    return _bounded(len(asked & there) / max(1, len(asked)), c.overlap, "shared words:")


def copy(pair: Pair, c: FilterConfig) -> str | None:
    if c.copies or comparable(pair.query) != comparable(pair.passage):
        return None
    return "the query is the passage"


def characters(pair: Pair, c: FilterConfig) -> str | None:
    """Share of symbols and of digits, in each text."""
    for what, text in (("query", pair.query), ("passage", pair.passage)):
        seen = [ch for ch in plain(text) if not ch.isspace()]
        written = [ch for ch in seen if ch.isalnum()]
        # a mark that is no letter of its own (vowel signs) is neither letter nor symbol
        symbols = sum(not ch.isalnum() and unicodedata.category(ch)[0] != "M" for ch in seen) / max(
            1, len(seen)
        )
        digits = sum(ch.isdigit() for ch in written) / max(1, len(written))
        for name, share, limit in (
            ("symbols", symbols, c.max_symbol_share),
            ("digits", digits, c.max_digit_share),
        ):
            if limit is not None and share > limit:
                return f"share of {name} in the {what}: {share:.2f}, want at most {limit:g}"
    return None


def repetition(pair: Pair, c: FilterConfig) -> str | None:
    """Share of the passage's three-word sequences that stood in it before (Rae et al. 2021, A1)."""
    found = words(pair.passage)
    if c.max_repeated_share is None or len(found) < MIN_REPEATED_WORDS:
        return None
    triples = list(zip(found, found[1:], found[2:], strict=False))
    share = 1 - len(set(triples)) / len(triples)
    return _bounded(share, (0, c.max_repeated_share), "repeated three-word sequences:")


def boilerplate(pair: Pair, c: FilterConfig) -> str | None:
    if c.boilerplate:
        return None
    texts = comparable(pair.query), comparable(pair.passage)
    for phrase in (*BOILERPLATE, *c.boilerplate_phrases):
        key = comparable(phrase)
        if key and any(key in text for text in texts):
            return f"a phrase of web pages: {phrase!r}"
    return None


RULES: dict[str, Callable[[Pair, FilterConfig], str | None]] = {
    "length": length, "script": script, "language": language, "question": question,
    "answer": answer, "overlap": overlap, "copy": copy, "characters": characters,
    "repetition": repetition, "boilerplate": boilerplate,
}  # fmt: skip


# ------------------------------------------------------------- filters that look at pairs together


def near_duplicates(pairs: Sequence[Pair], c: FilterConfig) -> dict[int, str]:
    """Pairs near an earlier one that stays: number -> why. What "near" means: data/near.py."""
    queries = [pair.query for pair in pairs]
    query_P, sets = grouped(queries)
    by_both = by_query = passage_P = near_passages = None
    if c.near_duplicate is not None:
        by_both = near_sets(sets, c.near_duplicate)
        passage_P, near_passages = _near_passages(pairs, query_P, by_both, c.near_duplicate)
    if c.near_query is not None:
        by_query = near_sets(sets, c.near_query)
    dropped: dict[int, str] = {}
    # query or passage, by number -> its pairs that stay
    of_query: dict[int, list[int]] = {}
    of_passage: dict[int, list[int]] = {}
    for p, query in enumerate(query_P):
        found: dict[str, list[int]] = {}
        if by_both is not None:
            asked, passage = {query, *by_both[query]}, passage_P[p]
            some = (passage, *near_passages[passage])
            found["query and passage"] = [
                e for n in some for e in of_passage.get(n, ()) if query_P[e] in asked
            ]
        if by_query is not None:
            some = (query, *by_query[query])
            found["query"] = [e for n in some for e in of_query.get(n, ())]
        what = next((what for what, earlier in found.items() if earlier), None)
        if what is not None:
            dropped[p] = f"{what} nearly as in: {queries[min(found[what])][:200]!r}"
            continue
        of_query.setdefault(query, []).append(p)
        if passage_P is not None:
            of_passage.setdefault(passage_P[p], []).append(p)
    return dropped


def _near_passages(
    pairs: Sequence[Pair], query_P: list[int], near_queries: list[list[int]], least: float
) -> tuple[list[int], list[list[int]]]:
    """(passage of each pair by number, the passages near each).

    Compared are those whose queries hang together by nearness, a connected component at a time:
    others are in no pair of near pairs, and all at once would not fit into memory.
    """
    one = np.repeat(np.arange(len(near_queries)), [len(some) for some in near_queries])
    other = np.array([n for some in near_queries for n in some], np.int64)
    graph = coo_matrix((np.ones(len(one)), (one, other)), (len(near_queries),) * 2)
    label_G = connected_components(graph, directed=False)[1].tolist()
    components: dict[int, list[int]] = {}
    for p, query in enumerate(query_P):
        components.setdefault(label_G[query], []).append(p)
    passage_P, near = [0] * len(pairs), []
    for some in components.values():
        first = len(near)
        if len(some) == 1:
            numbers, others_of = [0], [[]]
        else:
            numbers, sets = grouped([pairs[p].passage for p in some])
            others_of = near_sets(sets, least)
        for p, number in zip(some, numbers, strict=True):
            passage_P[p] = first + number
        near += [[first + n for n in others] for others in others_of]
    return passage_P, near


def dissimilar(q_PD: np.ndarray, p_PD: np.ndarray, least: float) -> dict[int, str]:
    """Pairs whose unit-norm embeddings have a cosine below `least`."""
    cosine_P = (q_PD * p_PD).sum(1)
    return {int(p): f"cosine {cosine_P[p]:.3f}, want {least:g}" for p in np.flatnonzero(
        cosine_P < least)}  # fmt: skip


def similar_queries(q_PD: np.ndarray, most: float) -> dict[int, str]:
    """Pairs whose query has a cosine of `most` or above with that of an earlier pair that stays."""
    dropped: dict[int, str] = {}
    for low in range(0, len(q_PD), BLOCK_TEXTS):
        block_BD = q_PD[low : low + BLOCK_TEXTS]
        cosine_BP = block_BD @ q_PD[: low + len(block_BD)].T
        for b, cosine_P in enumerate(cosine_BP):
            near = np.flatnonzero(cosine_P[: low + b] >= most)
            first = next((int(e) for e in near if int(e) not in dropped), None)
            if first is not None:
                dropped[low + b] = f"cosine {cosine_P[first]:.3f} with the query of pair {first}"
    return dropped


# ------------------------------------------------------------------------------------------ a stage


def filter_file(c: PrepareConfig, source: Path, target: Path) -> dict[str, Any]:
    """Stage `filter` of prepare.py: the rows of `source` with those of their positives that pass.

    Raises ValueError for anything wrong with the data or the models, and where nothing is left.
    """
    f = c.filter
    check_stage(c, "filter")
    examples = read_source(c, source)
    answers = read_answers(examples, f.answer_column) if f.answer_column else None
    pairs = pairs_of(examples, answers)
    dropped: list[tuple[str, str] | None] = [None] * len(pairs)
    for name, rule in filters(c):
        left = [p for p, verdict in enumerate(dropped) if verdict is None]
        for n, why in rule([pairs[p] for p in left]).items():
            dropped[left[n]] = (name, why)
    kept = keep_pairs(examples, pairs, [verdict is None for verdict in dropped])
    report = report_of(examples, pairs, dropped, len(kept))
    if not kept:
        raise ValueError(
            f"filter: none of {len(pairs)} pairs of {source} is left"
            f" ({'; '.join(f'{what} {n}' for what, n in report['counts'].items())}); relax the"
            " settings under filter.*"
        )
    write_rows(target, map(row_of, kept))
    log.info("filter: %s", "; ".join(f"{what} {n:,}" for what, n in report["counts"].items()))
    return report


Filter = Callable[[list[Pair]], dict[int, str]]  # pairs -> why some are dropped, by number


def filters(c: PrepareConfig) -> Iterator[tuple[str, Filter]]:
    """What the settings ask for, the cheap ones first; each sees the pairs that the others left."""
    f = c.filter

    def each(rule: Callable[[Pair], str | None]) -> Filter:
        return lambda pairs: {
            n: why for n, pair in enumerate(pairs) if (why := rule(pair)) is not None
        }

    for name, rule in RULES.items():
        yield name, each(partial(rule, c=f))
    if f.query_tokens or f.passage_tokens:
        yield "tokens", each(partial(tokens, c=f, count=_token_counter(str(f.tokenizer))))
    if f.near_duplicate is not None or f.near_query is not None:
        yield "near duplicate", partial(near_duplicates, c=f)
    if f.min_similarity is not None or f.max_query_similarity is not None:
        embed = _embedder(c)
        if f.min_similarity is not None:
            yield "similarity", lambda pairs: dissimilar(*embed(pairs), f.min_similarity)
        if f.max_query_similarity is not None:
            yield (
                "similar query",
                lambda pairs: similar_queries(embed(pairs)[0], f.max_query_similarity),
            )
    if f.reranker is not None:
        yield "cross-encoder", partial(_unlikely, c=c)


def _token_counter(model: str) -> Callable[[str], int]:
    from models.pretrained import load_tokenizer, read_modules, resolve_base

    tokenizer = load_tokenizer(read_modules(resolve_base(model))["passage"][0].folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _embedder(c: PrepareConfig) -> Callable[[list[Pair]], tuple[np.ndarray, np.ndarray]]:
    """pairs -> unit-norm (q_PD, p_PD) by filter.model; each distinct text is encoded once."""
    from evals.encode import encode
    from models.pretrained import load_towers
    from runtime.device import pick_device

    towers = load_towers(str(c.filter.model)).to(pick_device(c.device))
    known: dict[tuple[str, str], np.ndarray] = {}

    def embed_side(texts: list[str], side: str) -> np.ndarray:
        new = [t for t in dict.fromkeys(texts) if (side, t) not in known]
        x_nD = encode(
            towers, new, side, precision=c.precision, batch_tokens=c.batch_tokens,
            progress=f"filter: {side} texts",
        )  # fmt: skip
        x_nD = x_nD / np.maximum(np.linalg.norm(x_nD, axis=1, keepdims=True), 1e-12)
        known.update({(side, t): x_D for t, x_D in zip(new, x_nD, strict=True)})
        return np.array([known[side, t] for t in texts]).reshape(len(texts), towers.width)

    def embed(pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
        return (
            embed_side([pair.query for pair in pairs], "query"),
            embed_side([pair.passage for pair in pairs], "passage"),
        )

    return embed


def _unlikely(pairs: list[Pair], c: PrepareConfig) -> dict[int, str]:
    """Pairs that filter.reranker gives a probability below filter.min_probability."""
    from models.reranker import load_reranker
    from runtime.device import pick_device

    reranker = load_reranker(str(c.filter.reranker)).to(pick_device(c.device))
    probability_P = pair_probabilities(reranker, pairs, c, "filter: cross-encoder")
    least = c.filter.min_probability
    return {int(p): f"probability {probability_P[p]:.3f}, want {least:g}" for p in np.flatnonzero(
        probability_P < least)}  # fmt: skip


def pair_probabilities(
    reranker: Any, pairs: Sequence[Pair], c: PrepareConfig, progress: str = ""
) -> np.ndarray:
    """(P,) calibrated probability that each passage answers its query."""
    from evals.rerank import score_pairs

    number_P = np.arange(len(pairs))
    score_P = score_pairs(
        reranker, [p.query for p in pairs], [p.passage for p in pairs],
        np.stack([number_P, number_P], axis=1), precision=c.precision,
        batch_tokens=c.batch_tokens, progress=progress,
    )  # fmt: skip
    return reranker.spec.probability(score_P)
