"""The analyser on small strings in each language, the formula by hand, the published baselines."""

import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest

from data.beir import read_beir
from data.records import RetrievalSet
from evals.bm25 import analyse, bm25_hits, guess_language
from evals.metrics import evaluate_hits

DATASETS = Path(__file__).parents[3] / "shared" / "datasets"

ALEF, BEH, TEH, DAL, REH, SEEN, FEH, LAM, MEEM, NOON, HEH, WAW = (
    "\u0627 \u0628 \u062a \u062f \u0631 \u0633 \u0641 \u0644 \u0645 \u0646 \u0647 \u0648".split()
)
YEH, KAF = "\u064a", "\u0643"


def test_english_drops_stop_words_and_plurals():
    text = "The queries of \ufb01sh and Classes; the glass, gas_es don't"
    assert analyse(text, "en")[:8] == "query fish classe glass gas_e don t gas".split()


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        (
            "\u0130stanbul \u0130STANBUL i\u0307stanbul",
            ["istan"] * 3,
        ),  # dotted capital, combining dot
        ("ISPARTA \u0131sparta", ["\u0131spar"] * 2),  # capital I is dotless in Turkish
        ("kitaplar\u0131m\u0131z kitapl\u0131k", ["kitap"] * 2),  # the first five letters
        ("T\u00fcrkiye'nin", ["t\u00fcrki", "nin"]),
    ],
)
def test_turkish_lowers_both_letters_i_and_keeps_five_letters(text, terms):
    """str.lower gives two characters for the dotted capital and the wrong letter for the other."""
    assert analyse(text, "tr") == terms


def test_dotted_capital_outside_turkish_becomes_a_plain_i():
    assert analyse("\u0130stanbul", "en") == analyse("Istanbul", "en") == ["istanbul"]


def test_arabic_marks_variants_and_article():
    """A token pattern of letters alone cuts a vowelled word at every mark."""
    plain = KAF + TEH + ALEF + BEH  # kitab
    vowelled = KAF + "\u0650" + TEH + "\u064e" + ALEF + BEH + "\u064c"
    stretched = KAF + "\u0640\u0640" + TEH + ALEF + BEH
    article = ALEF + LAM + plain
    with_article = WAW + ALEF + LAM + plain
    text = " ".join([plain, vowelled, stretched, article, with_article])
    assert analyse(text, "ar") == [plain] * 5
    hamza = "\u0623" + HEH + LAM  # alef with hamza above
    assert analyse(hamza, "ar") == [ALEF + HEH + LAM]
    teh_marbuta = MEEM + DAL + REH + SEEN + "\u0629"
    assert analyse(teh_marbuta, "ar") == [MEEM + DAL + REH + SEEN + HEH]
    assert analyse(ALEF + LAM + DAL, "ar") == [ALEF + LAM + DAL]  # too short to have an article


def test_persian_letters_and_non_joiner():
    """Persian yeh and kaf have code points of their own; the non-joiner parts stem and suffix."""
    books_arabic = KAF + TEH + ALEF + BEH
    books = "\u06a9" + TEH + ALEF + BEH + "\u200c" + HEH + ALEF + "\u06cc"
    assert analyse(books, "fa") == [books_arabic, HEH + ALEF + YEH]
    assert analyse(books, "ar")[0] == books_arabic + HEH + ALEF + YEH


def test_digits_of_any_script_are_the_same():
    assert (
        analyse("\u06f1\u06f2\u06f3 \u0661\u0662\u0663 \uff11\uff12\uff13 123", "fa") == ["123"] * 4
    )


def test_vowel_signs_stay_inside_words_and_unspaced_scripts_become_pairs():
    r"""\w does not match the vowel signs of Devanagari: a word would fall apart at each."""
    assert analyse("\u0939\u093f\u0928\u094d\u0926\u0940 x", "other") == [
        "\u0939\u093f\u0928\u094d\u0926\u0940", "x",
    ]  # fmt: skip
    assert analyse("\u6771\u4eac\u90fdBM25", "other") == ["\u6771\u4eac", "\u4eac\u90fd", "bm25"]
    assert analyse("\u6771", "other") == ["\u6771"]


def test_identifiers_count_whole_and_in_parts():
    """A docstring says "read a csv file", the code read_csv: without parts BM25 finds nothing."""
    assert analyse("def read_csv(HTTPServer, maxLen):", "en") == (
        "def read_csv httpserver maxlen read csv http server max len".split()
    )
    assert analyse("__init__", "en") == ["__init__", "init"]
    assert analyse("NASA 2x iPhone", "other") == ["nasa", "2x", "iphone", "i", "phone"]


@pytest.mark.parametrize("text", ["", " \n", "...", "\u200c\u200d", "\u0640"])
def test_nothing_gives_no_terms(text):
    assert analyse(text, "fa") == []


def test_language_is_guessed_from_letters():
    english = "What is the capital of France and how many people live in it?"
    assert guess_language([english]) == "en"
    assert guess_language(["for x in range(3):\n    if x is not None and x in y: return x"]) == "en"
    assert (
        guess_language(
            ["\u0130stanbul'da ya\u015fayan ki\u015filerin say\u0131s\u0131 ka\u00e7t\u0131r"]
        )
        == "tr"
    )
    arabic = f"{ALEF}{LAM}{KAF}{TEH}{ALEF}{BEH} {YEH}{WAW}{MEEM} {FEH}{YEH}"
    assert guess_language([arabic]) == "ar"
    assert guess_language([arabic.replace(KAF, "\u06a9") + " \u06af\u0641\u062a"]) == "fa"
    assert guess_language(["Wie viele Einwohner hat die Hauptstadt von Frankreich"]) == "other"
    assert guess_language(["\u041c\u043e\u0441\u043a\u0432\u0430"]) == "other"
    assert guess_language([]) == guess_language(["123 ..."]) == "other"


def small_set() -> RetrievalSet:
    docs = {
        "d1": "red fish blue fish", "d2": "blue whale", "d10": "whale blue",
        "d3": "one red red fox",
        "d4": "nothing here", "q1": "red whale", "d5": "",
    }  # fmt: skip
    queries = {"q1": "red whale", "q2": "blue blue fish", "q3": "unheard words", "q4": ""}
    return RetrievalSet(
        "small", list(docs), list(docs.values()), list(queries), list(queries.values()), {},
        shares_ids=True,
    )  # fmt: skip


def test_scores_are_lucenes_formula_in_the_total_order():
    """idf ln(1 + (N - n + .5) / (n + .5)), weight tf / (tf + k1 (1 - b + b length / mean)).

    A word that stands twice in the query counts twice.
    """
    data = small_set()
    docs = [text.split() for text in data.doc_texts]
    mean = sum(map(len, docs)) / len(docs)
    hits = bm25_hits(data, 10, language="other")
    for row, query in enumerate(data.query_texts):
        scored = []
        for doc_id, words in zip(data.doc_ids, docs, strict=True):
            score = 0.0
            for word in query.split():
                n = sum(word in other for other in docs)
                tf = Counter(words)[word]
                idf = math.log(1 + (len(docs) - n + 0.5) / (n + 0.5))
                score += idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * len(words) / mean))
            if score > 0 and doc_id != data.query_ids[row]:
                scored.append((round(score, 5), doc_id.encode()))
        expected = [doc_id.decode() for _, doc_id in sorted(scored, reverse=True)]
        found = hits.of(row)
        assert [doc_id for doc_id, _ in found] == expected
        assert [s for _, s in found] == pytest.approx(
            [s for s, _ in sorted(scored, reverse=True)], abs=2e-5
        )
    assert [d for d, _ in hits.of(1)][:3] == ["d1", "d2", "d10"]  # d2 and d10 tie: d2 by bytes
    assert hits.of(2) == hits.of(3) == []


def test_block_of_queries_changes_nothing_and_empty_corpora_work():
    data = small_set()
    whole, single = bm25_hits(data, 3), bm25_hits(data, 3, query_block=1)
    assert whole.scores_QK.tobytes() == single.scores_QK.tobytes()
    assert whole.docs_QK.tobytes() == single.docs_QK.tobytes()
    blank = RetrievalSet("blank", ["a"], [" "], ["q"], ["word"], {})
    assert bm25_hits(blank, 5).of(0) == []
    with pytest.raises(ValueError, match="language \\('de'\\) must be one of"):
        bm25_hits(data, 3, language="de")


QUICK = [
    ("tr_turhistquad_mteb", "test"), ("ar_arcd_aqad", "dev"), ("fa_farstail", "test"),
    ("en_npl", "test"), ("ray_docs", "dev"),
]  # fmt: skip
SLOW = [
    ("ar_arcd_aqad", "test"), ("en_fever", "dev"), ("en_fever", "test"), ("en_scifact", "dev"),
    ("en_scifact", "test"), ("fa_farstail", "dev"), ("fa_pquad", "dev"), ("fa_pquad", "test"),
    ("fa_pquad", "test_science"), ("ray_docs", "test"), ("tr_thquad", "dev"), ("tr_thquad", "test"),
]  # fmt: skip
ALL = os.environ.get("ROOK_ALL_BM25") == "1"
unless_all = pytest.mark.skipif(not ALL, reason="a minute in all; set ROOK_ALL_BM25=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "split"), [*QUICK, *(pytest.param(*pair, marks=unless_all) for pair in SLOW)]
)
def test_baselines_are_met(name, split):
    """Within .01 of the recorded nDCG@10, in every language: the row must be a fair rival."""
    if not (DATASETS / name).is_dir():
        pytest.skip(f"text sets are not at hand ({DATASETS})")
    baselines = json.loads((DATASETS / "bm25_baselines.json").read_text(encoding="utf-8"))
    data = read_beir(DATASETS / name, split)
    found = evaluate_hits(bm25_hits(data, 100), data.qrels).means["ndcg@10"]
    assert abs(found - baselines[name]["bm25"][split]["ndcg10"]) <= 0.01
