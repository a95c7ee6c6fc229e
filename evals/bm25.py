"""BM25 as the row that every retrieval table carries: bm25s for the index, an analyser of ours for
the words.

bm25s' own token pattern cuts Arabic words at vowel marks, drops one-letter words and lower-cases
Turkish I wrongly. The analyser here is small on purpose, one light rule a language:

all      NFKC, casefold, invisible characters out, any digits as 0-9; words are runs of letters,
         marks and digits; Chinese, Japanese and Thai runs become overlapping pairs of characters
         an identifier counts as itself and as its parts: read_csv, read, csv
English  plural -s (the S stemmer) and the 33 stop words of Lucene
Turkish  dotted and dotless i lowered apart; the first five letters of a word (F5)
Arabic   vowel marks and tatweel out, alef, yeh, kaf, teh marbuta unified; the article (with wa,
         bi, ka, fa, li) cut
Persian  the same letters; the zero-width non-joiner parts a word from its suffix

Sources: Robertson and Zaragoza 2009 (BM25); Harman 1991 (S stemmer); Can et al. 2008 (F5); Larkey
et al. 2007 (light10, of which the article rule is the first step).
"""

import functools
import logging
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from evals.search import Hits, descending_ids, top_k_in_order

if TYPE_CHECKING:
    from data.records import RetrievalSet

log = logging.getLogger(__name__)

K1, B = 0.9, 0.4
LANGUAGES = ("en", "tr", "ar", "fa", "other")

ENGLISH_STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then"
    " there these they this to was will with".split()
)

# Quranic signs, vowel marks, superscript alef; tatweel; soft hyphen, zero-width space and joiner,
# BOM
_UNSEEN = re.compile(
    "[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed\u0640"
    "\u00ad\u200b\u200d\ufeff]"
)
_NON_JOINER = "\u200c"
_ARABIC_LETTERS = str.maketrans(
    {
        # alef with madda, hamza above, hamza below, wasla
        **dict.fromkeys("\u0622\u0623\u0625\u0671", "\u0627"),
        # alef maksura, Persian yeh, Urdu yeh, yeh with hamza
        **dict.fromkeys("\u0649\u06cc\u06d2\u0626", "\u064a"),
        # teh marbuta and the forms of heh
        **dict.fromkeys("\u0629\u06c0\u06c1\u06be\u06d5", "\u0647"),
        "\u06a9": "\u0643",  # Persian kaf
        "\u0624": "\u0648",  # waw hamza
    }
)
_ARTICLES = (  # wal, bal, kal, fal, al, lil
    "\u0648\u0627\u0644 \u0628\u0627\u0644 \u0643\u0627\u0644 \u0641\u0627\u0644"
    " \u0627\u0644 \u0644\u0644"
).split()

_SAMPLE_CHARS = 400_000  # of the texts, for guess_language


_WORD = re.compile(r"\w+")
# inside snake_case, camelCase, HTTPServer
_JOINT = re.compile(r"_+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@functools.cache
def _tables() -> tuple[frozenset[str], re.Pattern, re.Pattern, dict[int, str]]:
    """(marks, a word with marks, a run written without spaces, digits of any script -> ASCII).

    \\w knows letters and digits, not the vowel signs of Hindi or Thai; a pattern that does is
    three times slower.
    """
    marks = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] == "M"]
    marked_word = re.compile(f"[\\w{''.join(map(re.escape, marks))}]+")
    unspaced = (
        "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f\U00020000-\U0003134f"
    )
    digits = {
        i: str(unicodedata.digit(chr(i)))
        for i in range(128, sys.maxunicode + 1)
        if unicodedata.category(chr(i)) == "Nd"
    }
    return frozenset(marks), marked_word, re.compile(f"[{unspaced}]+"), digits


def guess_language(texts: Iterable[str]) -> str:
    """en | tr | ar | fa | other, from the letters of the first texts; the same texts give the same
    answer.

    Arabic script is Persian where peh, tcheh, zheh, gaf or the Persian forms of kaf and yeh are
    over 1% of it. Latin script is Turkish where dotless i, g with breve and s with cedilla are
    over 1% of it, else English where English stop words are over 5% of the words (code counts:
    for, if, in, is, not). Anything else is other: its words are normalised and left whole.
    """
    taken, size = [], 0
    for text in texts:
        taken.append(text[:2000])
        size += len(taken[-1])
        if size >= _SAMPLE_CHARS:
            break
    sample = unicodedata.normalize("NFKC", "\n".join(taken))
    count = Counter(sample)
    arabic = sum(n for c, n in count.items() if "\u0620" <= c <= "\u06d3")
    latin = sum(n for c, n in count.items() if c.isalpha() and c < "\u0250")
    letters = sum(n for c, n in count.items() if c.isalpha())
    if arabic > letters / 2:
        persian = sum(count[c] for c in "\u067e\u0686\u0698\u06af\u06a9\u06cc")
        return "fa" if persian > arabic / 100 else "ar"
    if letters and latin > letters / 2:
        if sum(count[c] for c in "\u0131\u011f\u011e\u015f\u015e\u0130") > latin / 100:
            return "tr"
        words = re.findall(r"[^\W\d_]+", sample.casefold())
        if sum(word in ENGLISH_STOP_WORDS for word in words) > len(words) / 20:
            return "en"
    return "other"


def analyse(text: str, language: str) -> list[str]:
    """Index terms of a text; `language` as guess_language gives it. Parts of identifiers come
    last.
    """
    marks, marked_word, unspaced, digits = _tables()
    text = unicodedata.normalize("NFKC", text)
    if _JOINT.search(text):
        joined = [_JOINT.sub(" ", word) for word in _WORD.findall(text) if _JOINT.search(word)]
        text = "\n".join([text, *joined])
    if language == "tr":
        text = text.replace("\u0130", "i").replace("I", "\u0131")
    # elsewhere a capital dotted I folds to i and a combining dot, which no one types
    text = text.casefold().replace("i\u0307", "i")
    if not text.isascii():
        text = _UNSEEN.sub("", text).translate(_ARABIC_LETTERS).translate(digits)
        text = text.replace(_NON_JOINER, " " if language == "fa" else "")
    pattern = _WORD if text.isascii() or marks.isdisjoint(text) else marked_word
    terms = []
    for word in pattern.findall(text):
        if word.isascii() or not unspaced.search(word):
            term = _stem(word, language)
            if term:
                terms.append(term)
        else:
            terms += _pairs(word, unspaced)
    return terms


def _stem(word: str, language: str) -> str:
    """The index term of a normalised word; "" for a stop word."""
    if language == "en":
        return "" if word in ENGLISH_STOP_WORDS else _without_plural(word)
    if language == "tr":
        return word[:5]
    if language == "ar":
        for article in _ARTICLES:
            if word.startswith(article) and len(word) >= len(article) + 3:
                return word[len(article) :]
    return word


def _without_plural(word: str) -> str:
    if len(word) > 3:
        if word.endswith("ies") and not word.endswith(("eies", "aies")):
            return word[:-3] + "y"
        if word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
            return word[:-1]
        if word.endswith("s") and not word.endswith(("us", "ss")):
            return word[:-1]
    return word


def _pairs(word: str, unspaced: re.Pattern) -> list[str]:
    """Overlapping character pairs of the runs written without spaces; what lies between them stays
    whole.
    """
    terms, end = [], 0
    for run in unspaced.finditer(word):
        if run.start() > end:
            terms.append(word[end : run.start()])
        chars = run.group()
        terms += [chars[i : i + 2] for i in range(max(1, len(chars) - 1))]
        end = run.end()
    return terms + ([word[end:]] if end < len(word) else [])


class Bm25:
    """An index of documents (Lucene's form, k1 0.9, b 0.4).

    language  of the analyser; None: guessed from the documents and queries, and logged
    Raises ValueError for an unknown language and for ids that repeat.
    """

    def __init__(self, data: "RetrievalSet", language: str | None = None) -> None:
        import bm25s
        import scipy.sparse as sp

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG on import
        if language is None:
            language = guess_language([*data.doc_texts[:2000], *data.query_texts[:200]])
            log.info("BM25: analyser for %s (guessed from the letters)", language)
        if language not in LANGUAGES:
            raise ValueError(f"language ({language!r}) must be one of {', '.join(LANGUAGES)}")
        self.language = language
        self.order_N = descending_ids(data.doc_ids)
        self.vocabulary: dict[str, int] = {}
        terms_of_docs = [
            [
                self.vocabulary.setdefault(term, len(self.vocabulary))
                for term in analyse(data.doc_texts[n], language)
            ]
            for n in self.order_N.tolist()
        ]
        shape = (len(self.order_N), len(self.vocabulary))
        self.weights_NV = sp.csc_matrix(shape, dtype=np.float32)
        if self.vocabulary:
            index = bm25s.BM25(k1=K1, b=B, method="lucene")
            index.index(
                (terms_of_docs, self.vocabulary), create_empty_token=False, show_progress=False
            )
            self.weights_NV = sp.csc_matrix(
                (index.scores["data"], index.scores["indices"], index.scores["indptr"]), shape
            )

    def pair_scores(self, queries: Sequence[str], docs: Sequence[int]) -> np.ndarray:
        """float32 scores of (query, number of a document) pairs; 0 where no word is shared."""
        place_N = np.argsort(self.order_N)
        asked_PV = _query_counts(queries, self.vocabulary, self.language)
        found_PV = self.weights_NV.tocsr()[place_N[np.asarray(docs, np.int64)]]
        return np.asarray(asked_PV.multiply(found_PV).sum(axis=1), np.float32).ravel()


def bm25_hits(
    data: "RetrievalSet",
    k: int,
    *,
    language: str | None = None,
    query_block: int = 64,
    index: Bm25 | None = None,
) -> Hits:
    """The k best documents of each query by BM25 in the total order of evals/search.py.

    language  as in Bm25
    index     of data's documents, when the caller has it already
    Of a set whose ids are shared a query's own document is left out.
    Documents without a word of the query are no hits. A query word counts as often as it stands in
    the query. Memory: the index, and query_block * N floats.
    """
    import torch

    index = Bm25(data, language) if index is None else index
    order_N = index.order_N
    num_queries = len(data.query_ids)
    scores_QK = np.full((num_queries, k), -np.inf, dtype=np.float32)
    docs_QK = np.full((num_queries, k), -1, dtype=np.int64)
    if index.vocabulary and num_queries:
        weights_VN = index.weights_NV.T.tocsr()
        asked_QV = _query_counts(data.query_texts, index.vocabulary, index.language)
        place = {data.doc_ids[n]: at for at, n in enumerate(order_N.tolist())}
        for low in range(0, num_queries, query_block):
            scores_BN = torch.from_numpy((asked_QV[low : low + query_block] @ weights_VN).toarray())
            scores_BN[scores_BN <= 0] = -torch.inf
            for row, query_id in enumerate(data.query_ids[low : low + query_block]):
                if data.shares_ids and query_id in place:  # the query itself is no answer
                    scores_BN[row, place[query_id]] = -torch.inf
            best_BK, column_BK = top_k_in_order(scores_BN, k)
            rows, found = slice(low, low + len(best_BK)), best_BK.shape[1]
            scores_QK[rows, :found] = best_BK.numpy()
            docs_QK[rows, :found] = order_N[column_BK.numpy()]
        docs_QK[np.isneginf(scores_QK)] = -1
    return Hits(list(data.query_ids), list(data.doc_ids), scores_QK, docs_QK)


def _query_counts(texts: Sequence[str], vocabulary: dict[str, int], language: str):
    """Queries as a sparse matrix: how often each query holds each term (terms of no document left
    out).
    """
    import scipy.sparse as sp

    rows, columns, counts = [], [], []
    for row, text in enumerate(texts):
        for term, count in Counter(analyse(text, language)).items():
            if term in vocabulary:
                rows.append(row)
                columns.append(vocabulary[term])
                counts.append(count)
    return sp.csr_matrix(
        (np.array(counts, dtype=np.float32), (rows, columns)), shape=(len(texts), len(vocabulary))
    )
