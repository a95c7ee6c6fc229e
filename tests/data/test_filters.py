"""Filters of (query, passage) pairs: rules in four languages, near duplicates, models, stages."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conf.schema import FilterConfig, PartsConfig, PrepareConfig, TripletsConfig
from data import filters, near
from data.filters import (
    RULES,
    dissimilar,
    filter_file,
    near_duplicates,
    pair_probabilities,
    similar_queries,
)
from data.formats import SourceConfig, read_examples
from data.languages import (
    check_script,
    comparable,
    is_question,
    language_share,
    script_share,
    words,
)
from data.near import grouped, near_sets, shingle_set, similarity
from data.rows import Pair
from data.triplets import split_file, triplets_file

DATASETS = Path(os.environ.get("DATASETS_DIR", Path(__file__).parents[3] / "shared/datasets"))

# Persian: "kitab-ha" with the zero-width non-joiner, with a space, and as one word
BOOKS = "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627"
BOOKS_SPACED, BOOKS_JOINED = BOOKS.replace("\u200c", " "), BOOKS.replace("\u200c", "")
PERSIAN = "\u0627\u06cc\u0646 \u06cc\u06a9 \u0645\u062a\u0646"
PERSIAN += " \u0641\u0627\u0631\u0633\u06cc \u0627\u0633\u062a"
ARABIC = (
    "\u0647\u0630\u0627 \u0646\u0635 \u0639\u0631\u0628\u064a \u0641\u064a"
    " \u0627\u0644\u0645\u062f\u064a\u0646\u0629 \u0627\u0644\u0643\u0628\u064a\u0631\u0629"
)  # fmt: skip
TURKISH = "Bu k\u0131sa metin T\u00fcrk\u00e7e ve \u00e7ok a\u00e7\u0131k"
ENGLISH = "This is a short text which was written in English"


def pair(query="What is the tallest tree?", passage="A coast redwood is the tallest tree.", **more):
    return Pair(query, passage, **more)


def why(rule: str, some: Pair, **settings) -> str | None:
    return RULES[rule](some, FilterConfig(**settings))


# -- letters and words --------------------------------------------------------------------------


def test_a_zero_width_non_joiner_neither_parts_a_word_nor_two_texts():
    """Persian is typed with it, with a space and without: counts and comparisons must not follow
    the typing."""
    assert words(BOOKS) == [BOOKS_JOINED] and len(words(BOOKS_SPACED)) == 2
    assert comparable(BOOKS) == comparable(BOOKS_SPACED) == comparable(BOOKS_JOINED)


def test_comparable_is_blind_to_case_marks_forms_and_digits():
    """Arabic with and without vowel marks, Turkish capitals, Persian digits, full-width letters."""
    marked, bare = "\u0643\u0650\u062a\u0627\u0628\u064c", "\u06a9\u062a\u0627\u0628"
    assert comparable(marked) == comparable(bare)
    assert comparable("I\u015eIK \u0130ZM\u0130R") == comparable("\u0131\u015f\u0131k izmir")
    assert (
        comparable("\u06f1\u06f9\u06f7\u06f9") == comparable("\u0661\u0669\u0667\u0669") == "1979"
    )
    assert comparable("\uff21\uff22-c") == "abc"


def test_words_of_scripts_without_spaces_are_counted():
    """One run of Chinese is not one word, or every length rule would drop it."""
    assert len(words("\u5317\u4eac\u662f\u9996\u90fd\u3002")) == 5
    assert words("- a, (b) ...") == ["a,", "(b)"]


@pytest.mark.parametrize(
    ("text", "language"), [(PERSIAN, "fa"), (ARABIC, "ar"), (TURKISH, "tr"), (ENGLISH, "en")]
)
def test_languages_are_told_apart(text, language):
    """Also those that share a script."""
    assert language_share(text, language) == 1
    for other in {"fa", "ar", "tr", "en"} - {language}:
        assert language_share(text, other) < 0.7, other
    assert script_share(text, "Arabic") == (language in ("fa", "ar"))


@pytest.mark.skipif(not DATASETS.is_dir(), reason=f"no data sets in {DATASETS}")
@pytest.mark.parametrize(
    ("name", "language", "other"),
    [
        ("fa_pquad", "fa", "ar"), ("ar_arcd_aqad", "ar", "fa"), ("tr_thquad", "tr", "en"),
        ("en_fever", "en", "tr"),
    ],
)  # fmt: skip
def test_shares_of_real_passages(name, language, other):
    """The threshold of conf/schema.py, .7: real text is above it, that of the neighbour below."""
    with open(DATASETS / name / "corpus.jsonl", encoding="utf-8") as f:
        texts = [json.loads(line)["text"] for line, _ in zip(f, range(500), strict=False)]
    limit = FilterConfig().min_language_share
    assert np.mean([language_share(t, language) >= limit for t in texts]) > 0.97
    assert np.mean([language_share(t, other) >= limit for t in texts]) < 0.6


def test_questions_of_four_languages():
    asked = [
        "how many legs has a spider", "T\u00fcrkiye'nin ba\u015fkenti neresi?",
        "bu \u015fehir nerede",
        "\u067e\u0627\u06cc\u062a\u062e\u062a \u0627\u06cc\u0631\u0627\u0646"
        " \u06a9\u062c\u0627\u0633\u062a",
        "\u0645\u0627 \u0647\u064a \u0639\u0627\u0635\u0645\u0629"
        " \u0645\u0635\u0631", "\u0643\u0645\u061f",
    ]  # fmt: skip
    assert all(map(is_question, asked))
    assert not any(map(is_question, [ENGLISH, TURKISH, PERSIAN, ARABIC, "...", ""]))


# -- rules --------------------------------------------------------------------------------------


def test_default_rules_keep_ordinary_pairs():
    """Defaults are for what nobody wants; each rule sees an ordinary pair of each language."""
    c = FilterConfig()
    for text in (PERSIAN, ARABIC, TURKISH, ENGLISH):
        assert [
            name for name, rule in RULES.items() if rule(pair(text, f"{text}. {text}"), c)
        ] == []


@pytest.mark.parametrize(
    ("rule", "some", "settings", "reason"),
    [
        ("length", pair("tree"), {}, "words of the query: 1, want 2 to 200"),
        ("length", pair(), {"passage_words": [8, 9]}, "words of the passage: 7"),
        ("length", pair(), {"query_chars": [30, 99]}, "characters of the query: 25"),
        ("length", pair(), {"passage_chars": [1, 9]}, "characters of the passage: 36"),
        ("length", pair(), {"length_ratio": [0, 0.5]}, "words of query/passage: 0.714"),
        ("script", pair(PERSIAN), {"script": "Arabic"}, "share of Arabic letters: 0"),
        ("language", pair(ARABIC, ARABIC), {"language": "fa"}, "share of words of fa: 0"),
        ("question", pair(ENGLISH), {"question": "only"}, "no question"),
        ("question", pair(), {"question": "never"}, "a question"),
        ("answer", pair(answers=("oak",)), {}, "not in the passage: oak"),
        ("answer", pair(answers=()), {}, "no answer"),
        ("overlap", pair(), {"overlap": [0.9, 1]}, "shared words: 0.8, want 0.9 to 1"),
        ("copy", pair("A  coast redwood", "a coast red-wood!"), {}, "the query is the passage"),
        ("characters", pair(passage="a | b | c | d"), {}, "symbols in the passage: 0.43"),
        ("characters", pair("1234 5678 ab"), {"max_digit_share": 0.5}, "digits in the query: 0.80"),
        ("repetition", pair(passage="buy it now " * 6), {}, "repeated three-word sequences: 0.812"),
        ("boilerplate", pair(passage="2019. All rights   reserved"), {}, "'all rights reserved'"),
        ("boilerplate", pair(passage="Oku: devam"), {"boilerplate_phrases": ["oku devam"]}, "oku"),
    ],
)  # fmt: skip
def test_rules_say_why(rule, some, settings, reason):
    found = why(rule, some, **settings)
    assert found is not None and reason in found


@pytest.mark.parametrize(
    ("rule", "some", "settings"),
    [
        ("length", pair(), {"query_words": [5, 5], "passage_words": [7, 7]}),
        ("length", pair(), {"query_chars": [25, 25], "passage_chars": [36, 36]}),
        ("script", pair(PERSIAN, PERSIAN + " (RAM)"), {"script": "Arabic"}),
        ("answer", pair(answers=("oak", "Coast Red\u00adwood")), {}),
        ("answer", pair(passage=BOOKS_SPACED, answers=(BOOKS,)), {}),
        ("overlap", pair(), {"overlap": [0.8, 0.8]}),
        ("copy", pair("a b", "a b"), {"copies": True}),
        ("characters", pair(passage="c\u0327a va \u0643\u0650\u062a\u0627\u0628\u064c"), {}),
        ("repetition", pair(passage="buy it now " * 3), {}),
        ("boilerplate", pair(passage="all rights reserved"), {"boilerplate": True}),
    ],
)
def test_rules_keep_what_is_on_the_bound_or_allowed(rule, some, settings):
    """Bounds are inclusive; marks are no symbols; short texts may repeat themselves."""
    assert why(rule, some, **settings) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"query_words": [5]}, r"filter.query_words \(\[5\]\) must be \[low, high\]"),
        ({"overlap": [0.9, 0.1]}, r"filter.overlap \(\[0.9, 0.1\]\) must be"),
        ({"near_duplicate": 0.0}, r"filter.near_duplicate \(0.0\) must be in \(0, 1\]"),
        ({"min_similarity": 0.5}, "filter.min_similarity needs filter.model"),
        ({"query_tokens": [1, 9]}, "need filter.tokenizer"),
        ({"min_probability": 0.5}, r"filter\.min_probability \(0\.5\) is not read"),
        ({"model": "m"}, r"filter\.model \(m\) filters nothing without filter\.min_similarity"),
        ({"tokenizer": "m"}, r"filter\.tokenizer \(m\) counts nothing without filter\.query_tok"),
        ({"min_language_share": 0.9, "script": "Arabic"}, r"share \(0\.9\) .* filter\.language"),
        ({"min_script_share": 0.9, "language": "fa"}, r"share \(0\.9\) .* filter\.script"),
        ({"language": "de"}, r"filter.language \('de'\) must be one of en, tr, ar, fa"),
    ],
)
def test_settings_that_cannot_be_meant_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        FilterConfig(**settings)


# -- pairs together -----------------------------------------------------------------------------

SENTENCE = "The heart pumps blood through the vessels of the body at every moment of the day."


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.8, 1.0])
def test_near_texts_are_those_of_all_pairs_compared(threshold, monkeypatch):
    """Rare shingles propose, sets decide: against every pair compared. A text whose only match
    shares few, common ones is what a prefix that is one too short leaves out."""
    monkeypatch.setattr(near, "COMMON", 0)
    monkeypatch.setattr(near, "BLOCK_TEXTS", 16)
    rng = np.random.default_rng(3)
    texts = []
    for n in range(120):
        letters = list(SENTENCE if n % 3 else f"{SENTENCE} {SENTENCE[::-1]}")
        for at in rng.integers(0, len(letters), n % 40):
            letters[at] = "xyz"[at % 3]
        texts.append("".join(letters)[n % 7 : 40 + n])
    # two of three windows shared, the rarest not: .5 exactly
    texts += ["", "?", "!!", *texts[:5], texts[7].upper(), "abcdefg", "bcdefgh"]
    group_P, distinct = grouped(texts)
    near_G = near_sets(distinct, threshold)
    sets = [set(shingle_set(t).tolist()) for t in texts]
    num_near = 0
    for i, one in enumerate(sets):
        for j, other in enumerate(sets[:i]):
            is_near = len(one & other) / len(one | other) >= threshold
            num_near += is_near and one != other
            assert (group_P[i] == group_P[j]) == (one == other)
            assert (group_P[j] in (group_P[i], *near_G[group_P[i]])) == is_near
            assert (group_P[i] in (group_P[j], *near_G[group_P[j]])) == is_near
    assert num_near > 10 or threshold == 1.0


def test_equal_pairs_are_dropped_however_many_share_a_query():
    """Copies of later pairs of one query lay beyond the first partners that were compared once."""
    pairs = [pair("How much blood does the heart pump?", f"answer {n} of many") for n in range(60)]
    dropped = near_duplicates([*pairs, *pairs], FilterConfig(near_duplicate=1.0))
    assert list(dropped) == list(range(60, 120))


@pytest.mark.parametrize("near_query", [None, 0.6])
def test_near_duplicates_against_a_plain_loop(near_query):
    """Low limits, where a sketch of the texts found half of the pairs."""
    rng = np.random.default_rng(5)
    told = ["".join(rng.choice(list("abcdefgh"), 5).tolist()) for _ in range(24)]
    pairs = [
        pair(*(" ".join(told[low : low + 4 + n % 5]) for low in rng.integers(0, 20, 2).tolist()))
        for n in range(150)
    ]
    c = FilterConfig(near_duplicate=0.3, near_query=near_query)
    dropped: set[int] = set()
    sets = [[set(shingle_set(t).tolist()) for t in (p.query, p.passage)] for p in pairs]
    for i, (query, passage) in enumerate(sets):
        for other_query, other_passage in (sets[e] for e in range(i) if e not in dropped):
            by_query, by_passage = (
                len(a & b) / len(a | b) for a, b in ((query, other_query), (passage, other_passage))
            )
            if min(by_query, by_passage) >= 0.3 or by_query >= (near_query or 2):
                dropped.add(i)
                break
    assert 20 < len(dropped) < 140
    assert set(near_duplicates(pairs, c)) == dropped


def test_near_duplicates_are_dropped_against_pairs_that_stay():
    """A second pair on one passage stays, the same question on another passage too."""
    question = "How much blood does the heart pump through the body in a minute of rest?"
    other = "Rivers carry water from the mountains down to the sea all through the year."
    pairs = [
        pair(question, SENTENCE), pair("What is a vessel of the body?", SENTENCE),
        pair(question, other), pair(question.upper(), SENTENCE.replace("day", "day!")),
        pair(question + " Please.", SENTENCE),
    ]  # fmt: skip
    assert list(near_duplicates(pairs, FilterConfig(near_duplicate=0.8))) == [3, 4]
    assert list(near_duplicates(pairs, FilterConfig(near_duplicate=0.99))) == [3]
    queries = near_duplicates(pairs, FilterConfig(near_duplicate=None, near_query=0.8))
    assert list(queries) == [2, 3, 4]
    assert not near_duplicates(pairs, FilterConfig(near_duplicate=None))


def test_a_pair_near_a_dropped_one_alone_stays():
    """a - b - c: b is near a, c near b and not near a. With b gone nothing speaks against c."""
    queries = [f"{SENTENCE} {more}" for more in ("", "Plasma too.", "Plasma too. Lymph not.")]
    shingles = [shingle_set(q) for q in queries]
    near = [similarity(shingles[i], shingles[j]) for i, j in ((0, 1), (1, 2), (0, 2))]
    limit = (max(near[0], near[1]) + min(near)) / 2
    assert near[2] < limit < min(near[:2])
    pairs = [pair(q, SENTENCE) for q in queries]
    assert list(near_duplicates(pairs, FilterConfig(near_duplicate=limit))) == [1]


def test_similar_queries_against_a_plain_loop(monkeypatch):
    """Blocks and the rule "earlier and still there"."""
    monkeypatch.setattr(filters, "BLOCK_TEXTS", 7)
    x_PD = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    x_PD /= np.linalg.norm(x_PD, axis=1, keepdims=True)
    dropped: set[int] = set()
    for p in range(40):
        if any(float(x_PD[p] @ x_PD[e]) >= 0.9 for e in range(p) if e not in dropped):
            dropped.add(p)
    assert 5 < len(dropped) < 35
    assert set(similar_queries(x_PD, 0.9)) == dropped


def test_dissimilar_pairs_are_named_with_their_cosine():
    q_PD, p_PD = np.eye(3, 2, dtype=np.float32), np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    q_PD[2] = (0.8, 0.6)
    assert dissimilar(q_PD, p_PD, 0.7) == {2: "cosine 0.600, want 0.7"}


# -- the stage ----------------------------------------------------------------------------------


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def settings(tmp_path, source, **filter_settings) -> PrepareConfig:
    return PrepareConfig(
        data=str(source), out=str(tmp_path), filter=FilterConfig(**filter_settings), device="cpu",
        precision="fp32", cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def test_stage_keeps_the_positives_that_pass_and_counts_the_rest(tmp_path):
    """A row keeps its negatives and loses one positive with its id and score; a row without any
    positive left is gone; each pair counts where it fails first."""
    source = write(
        tmp_path / "data.jsonl",
        [
            {"query_id": "a", "query": "two words", "positive": ["no", "It is a good text."],
             "positive_ids": ["q", "p"], "positive_scores": [0.25, 0.5], "negative": ["Bad text."]},
            {"query_id": "b", "query": "word", "positive": ["no"]},
            {"query_id": "c", "query": "two words", "positive": ["It is a good text."]},
        ],
    )  # fmt: skip
    report = filter_file(settings(tmp_path, source), source, tmp_path / "filter.jsonl")
    assert read(tmp_path / "filter.jsonl") == [
        {"query_id": "a", "query": "two words", "positive": ["It is a good text."],
         "negative": ["Bad text."], "positive_ids": ["p"], "positive_scores": [0.5]},
    ]  # fmt: skip
    assert (report["in"], report["out"]) == (3, 1)
    assert report["counts"] == {
        "pairs": 4, "kept": 1, "dropped by length": 2, "dropped by near duplicate": 1,
    }  # fmt: skip
    assert len(report["examples"]["dropped by length"]) == 2
    (example,) = read_examples(SourceConfig(root=str(tmp_path / "filter.jsonl")), None)
    assert example.positives == ["It is a good text."] and example.positive_ids == ["p"]


def test_report_shows_ten_dropped_pairs_that_are_not_the_first(tmp_path):
    rows = [{"query": f"q{n}", "positive": f"passage number {n} is here"} for n in range(50)]
    rows.append({"query": "two words", "positive": "a passage that stays"})
    source = write(tmp_path / "data.jsonl", rows)
    report = filter_file(settings(tmp_path, source), source, tmp_path / "filter.jsonl")
    shown = report["examples"]["dropped by length"]
    assert len(shown) == 10 and any(f"'q{n}'" in line for line in shown for n in range(25, 50))


def test_answers_come_from_a_column_of_the_data(tmp_path):
    source = write(
        tmp_path / "data.jsonl",
        [
            {"query": "which tree is it", "positive": "An OAK, of course.", "answers": ["oak"]},
            {"query": "which tree was it", "positive": "That was not said.", "answers": "oak"},
        ],
    )  # fmt: skip
    c = settings(tmp_path, source, answer_column="answers")
    report = filter_file(c, source, tmp_path / "filter.jsonl")
    assert report["counts"]["dropped by answer"] == 1 and report["out"] == 1
    with pytest.raises(ValueError, match=r"filter.answer_column=span: 2 of 2 rows have no such"):
        filter_file(settings(tmp_path, source, answer_column="span"), source, tmp_path / "f.jsonl")


def test_nothing_left_is_an_error_that_names_what_dropped_it(tmp_path):
    source = write(tmp_path / "data.jsonl", [{"query": "a b", "positive": "c d e"}])
    c = settings(tmp_path, source, passage_words=[9, 99])
    with pytest.raises(ValueError, match=r"none of 1 pairs .* dropped by length 1"):
        filter_file(c, source, tmp_path / "filter.jsonl")
    assert not (tmp_path / "filter.jsonl").exists()


def test_models_filter_what_the_rules_left(tmp_path, tiny_base):
    """Cosines are those of encode(), probabilities those of score_pairs; each model sees the pairs
    that are left, and its verdicts land on the right rows."""
    from evals.encode import encode
    from models.pretrained import load_towers

    rows = [{"query": f"query about {w}", "positive": f"a text about {w} and {w[::-1]}"}
            for w in ("stone", "rain", "x", "glass", "iron", "wood")]  # fmt: skip
    rows[2]["positive"] = "no"
    source = write(tmp_path / "data.jsonl", rows)
    towers = load_towers(str(tiny_base))
    q_PD, p_PD = (encode(towers, [r[k] for r in rows], side, precision="fp32")
                  for k, side in (("query", "query"), ("positive", "passage")))  # fmt: skip
    cosine_P = (q_PD * p_PD).sum(1)
    left = [0, 1, 3, 4, 5]
    limit = float(np.median(cosine_P[left]))
    c = settings(tmp_path, source, model=str(tiny_base), min_similarity=limit, near_duplicate=None)
    report = filter_file(c, source, tmp_path / "filter.jsonl")
    expected = [rows[p]["query"] for p in left if cosine_P[p] >= limit - 1e-6]
    assert [r["query"] for r in read(tmp_path / "filter.jsonl")] == expected
    assert report["counts"]["dropped by similarity"] == 5 - len(expected)


def test_cross_encoder_filters_by_calibrated_probability(tmp_path, tiny_base):
    """sigmoid(logit / temperature + bias), as the reranker was calibrated."""
    import torch

    from evals.rerank import score_pairs
    from models.reranker import load_reranker

    torch.manual_seed(0)
    reranker = load_reranker(str(tiny_base))
    with torch.no_grad():
        reranker.head.out.weight.normal_(std=1.0)
    reranker.spec.temperature, reranker.spec.bias = 2.0, 0.5
    pairs = [pair(f"query {w}", f"text {w[::-1]}") for w in ("stone", "rain", "glass")]
    c = settings(tmp_path, tmp_path)
    found = pair_probabilities(reranker, pairs, c)
    logit_P = [
        score_pairs(reranker, [p.query], [p.passage], [(0, 0)], precision="fp32")[0] for p in pairs
    ]
    expected = [1 / (1 + np.exp(-x / 2.0 - 0.5)) for x in logit_P]
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # one pair at a time in float32


def test_tokens_are_counted_without_special_ones(tmp_path, tiny_base):
    """The tiny tokenizer knows single characters: tokens are letters."""
    source = write(
        tmp_path / "data.jsonl",
        [{"query": "ab cd", "positive": "abc de"}, {"query": "abc de", "positive": "abc def g"}],
    )
    c = settings(tmp_path, source, tokenizer=str(tiny_base), query_tokens=[4, 4],
                 near_duplicate=None, passage_words=[1, 9])  # fmt: skip
    report = filter_file(c, source, tmp_path / "filter.jsonl")
    assert report["counts"]["dropped by tokens"] == 1
    assert [r["query"] for r in read(tmp_path / "filter.jsonl")] == ["ab cd"]


def test_every_filter_is_a_pure_function(tmp_path):
    """The same pairs in another order get the same verdicts (near duplicates look at what came
    before, and are left out)."""
    c = replace(
        settings(tmp_path, tmp_path), filter=FilterConfig(near_duplicate=None, language="en")
    )
    pairs = [pair(), pair("x"), pair(ARABIC), pair(passage="no"), pair("A b", "a-b")]
    once = {name: rule(pairs) for name, rule in filters.filters(c)}
    again = {name: rule(pairs[::-1]) for name, rule in filters.filters(c)}
    assert once == {name: {4 - n: w for n, w in found.items()} for name, found in again.items()}


# -- triplets and split -------------------------------------------------------------------------


def test_triplets_are_positives_times_first_negatives(tmp_path):
    source = write(
        tmp_path / "mine.jsonl",
        [
            {"query_id": "a", "query": "q", "positive": ["p1", "p2"], "positive_ids": ["1", "2"],
             "negative": ["n1", "n2", "n3"], "negative_ids": ["7", "8", "9"], "mined": []},
            {"query_id": "b", "query": "r", "positive": ["p3"], "positive_ids": ["3"],
             "negative": [], "negative_ids": []},
        ],
    )  # fmt: skip
    c = replace(settings(tmp_path, source), triplets=TripletsConfig(max_negatives=2))
    report = triplets_file(c, source, tmp_path / "triplets.jsonl")
    found = [(r["query"], r["positive"], r["negative"], r["negative_ids"])
             for r in read(tmp_path / "triplets.jsonl")]  # fmt: skip
    assert found == [
        ("q", ["p1"], ["n1"], ["7"]), ("q", ["p1"], ["n2"], ["8"]),
        ("q", ["p2"], ["n1"], ["7"]), ("q", ["p2"], ["n2"], ["8"]),
    ]  # fmt: skip
    assert report["counts"] == {"triplets": 4, "pairs without a negative": 1}
    assert len(list(read_examples(SourceConfig(root=str(tmp_path / "triplets.jsonl")), None))) == 4
    alone = write(tmp_path / "alone.jsonl", [{"query": "q", "positive": "p"}])
    with pytest.raises(ValueError, match=r"none of 1 rows .* has a negative; mine some first"):
        triplets_file(c, alone, tmp_path / "t.jsonl")


def test_split_parts_share_no_query_and_no_positive(tmp_path):
    """Triplets of one query must not be in two parts: 60 rows of 20 queries; and the folder is one
    that the readers take."""
    rows = [{"query": f"query {n // 3}", "positive": f"passage {n // 6}", "negative": "x"}
            for n in range(60)]  # fmt: skip
    source = write(tmp_path / "triplets.jsonl", rows)
    c = replace(settings(tmp_path, source), parts=PartsConfig(dev_fraction=0.1))
    report = split_file(c, source, tmp_path / "split.jsonl")
    parts = {s: list(read_examples(SourceConfig(root=str(tmp_path / "split")), s))
             for s in ("train", "dev")}  # fmt: skip
    assert {s: len(e) for s, e in parts.items()} == {"train": 54, "dev": 6}
    for of in (lambda e: e.query, lambda e: e.positives[0]):
        assert not {of(e) for e in parts["train"]} & {of(e) for e in parts["dev"]}
    assert not (tmp_path / "split/test.jsonl").exists()
    assert report["leakage"]["pairs"]["train/dev"]["exact_queries"] == 0
    assert [r["split"] for r in read(tmp_path / "split.jsonl")].count("dev") == 6


def test_a_bare_encoder_is_no_cross_encoder(tmp_path, tiny_base):
    """Its head would be drawn at random. Said before the data are read."""
    source = tmp_path / "nowhere.jsonl"
    with pytest.raises(ValueError, match=r"filter\.reranker"):
        filter_file(settings(tmp_path, source, reranker=str(tiny_base)), source, tmp_path / "out")


def test_a_script_that_does_not_exist_is_named_before_the_data_are_read(tmp_path, monkeypatch):
    """A mistyped script would drop every pair, and the limits would be blamed."""
    monkeypatch.setattr(filters, "read_source", lambda *a: pytest.fail("the data were read"))
    c = settings(tmp_path, tmp_path / "none.jsonl", script="Arabik")
    with pytest.raises(ValueError, match=r"filter.script \(Arabik\) is no script.*mean Arabic"):
        filter_file(c, tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    for name in ("Latin", "arabic", "CYRILLIC", "Cjk", "Hangul", "Devanagari", "Thai"):
        check_script(name, "filter.script")
