"""Pairs equal those of transformers' tokenizers, cut as promised."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel

os.environ["HF_HUB_OFFLINE"] = "1"

from data.pairs import MIN_PASSAGE, PairTemplate, pack_pairs, tokenise_plain
from models.pretrained import load_tokenizer

FOLDERS = Path(os.environ.get("WEIGHTS_DIR", "artifacts/models"))
WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
IDS = {word: i for i, word in enumerate(SPECIAL + WORDS)}
CLS, SEP = ("[CLS]", 2), ("[SEP]", 3)
PROCESSORS = {
    "bert": processors.BertProcessing(SEP, CLS),
    "roberta": processors.RobertaProcessing(SEP, CLS),
    "template with types": processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[CLS, SEP]
    ),
    "nothing between": processors.TemplateProcessing(
        single="$A [SEP]", pair="$A:1 $B:0 [SEP]:1", special_tokens=[SEP]
    ),
    "none": None,
}
TEXTS = ["w1", "w2 w3 w4", " ".join(WORDS * 3), "w5 unknown W6", "w7 [SEP] w8", ""]


def word_tokenizer(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(WordLevel(IDS, unk_token="[UNK]"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if PROCESSORS[kind] is not None:
        tokenizer.post_processor = PROCESSORS[kind]
    return tokenizer


def assert_equal_to_transformers(tokenizer: Tokenizer, theirs, texts: list[str], length: int):
    template = PairTemplate.of(tokenizer)
    tokens = tokenise_plain(tokenizer, texts)
    room = length - template.num_special
    compared = 0
    for i, query in enumerate(texts):
        for j, passage in enumerate(texts):
            if len(tokens[i]) > room - min(len(tokens[j]), MIN_PASSAGE):
                continue  # the query is cut: transformers has nothing to compare with
            ids_T, types_T = template.join(tokens[i], tokens[j], length)
            want = theirs(  # as lists: an empty second text alone counts as none there
                [query], [passage], truncation="only_second", max_length=length,
                return_token_type_ids=True,
            )  # fmt: skip
            assert [ids_T.tolist()] == want["input_ids"], (query, passage)
            assert [types_T.tolist()] == want["token_type_ids"], (query, passage)
            assert ids_T.dtype == types_T.dtype == np.int32
            compared += 1
    assert compared > len(texts)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pairs_equal_those_of_transformers_for_each_post_processor(kind, tmp_path):
    """BERT marks the passage with types, RoBERTa with two separators: a model trained on one
    reads nonsense from the other."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = word_tokenizer(kind)
    theirs = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(kind), pad_token="[PAD]")
    for length in (24, 60, 500):
        assert_equal_to_transformers(tokenizer, theirs, TEXTS, length)


@pytest.mark.parametrize("name", ["all-mpnet-base-v2", "multilingual-e5-small-q4"])
def test_pairs_equal_those_of_real_tokenizers(name):
    """Metaspace and byte pieces: a text must tokenise alone as it does inside a pair."""
    from transformers import AutoTokenizer

    if not (FOLDERS / name / "tokenizer.json").is_file():
        pytest.skip(f"no folder {FOLDERS / name}; set WEIGHTS_DIR")
    texts = [
        "Where is the nearest library?",
        "  leading, trailing and\nbroken   space ",
        "\u0645\u0627 \u0647\u064a \u0639\u0627\u0635\u0645\u0629 \u0645\u0635\u0631\u061f",
        "Merhaba, bug\u00fcn hava nas\u0131l?",
        "a </s> inside",
        "a longer text " * 60,
        "",
    ]
    theirs = AutoTokenizer.from_pretrained(FOLDERS / name)
    for length in (32, 128):
        assert_equal_to_transformers(load_tokenizer(FOLDERS / name), theirs, texts, length)


def test_a_query_is_whole_unless_the_passage_would_have_less_than_its_sixteen_tokens(caplog):
    """Cut from the wrong side, a reranker would judge passages against half of a question."""
    template = PairTemplate([1], [2, 3], [4], types=[0, 0, 0, 1, 1])
    max_length = 40
    room = max_length - 4
    with caplog.at_level(logging.WARNING):
        for num_query in range(60):
            for num_passage in range(60):
                query, passage = np.arange(100, 100 + num_query), np.arange(200, 200 + num_passage)
                ids_T, types_T = template.join(query, passage, max_length)
                ids = ids_T.tolist()
                kept = [i for i in ids if 100 <= i < 200], [i for i in ids if i >= 200]
                assert kept[0] == query.tolist()[: len(kept[0])]  # the beginnings
                assert kept[1] == passage.tolist()[: len(kept[1])]
                assert ids == [1, *kept[0], 2, 3, *kept[1], 4]
                assert types_T.tolist() == [0] * (3 + len(kept[0])) + [1] * (1 + len(kept[1]))
                assert len(ids) == min(max_length, 4 + num_query + num_passage)  # no room is lost
                assert len(kept[1]) >= min(num_passage, 16)
                if num_query <= room - 16 or num_query + num_passage <= room:
                    assert len(kept[0]) == num_query
    assert len(caplog.records) == 1  # not once a pair
    assert "is cut to" in caplog.text


def test_a_length_without_room_is_an_error_that_names_the_setting():
    """Otherwise every query would be cut to nothing."""
    template = PairTemplate.of(word_tokenizer("bert"))
    with pytest.raises(ValueError, match=r"19 tokens leaves no room: 3 .* model\.max_pair_length"):
        template.join(np.arange(3), np.arange(3), 19)
    template.join(np.arange(3), np.arange(3), 20)


def test_plain_tokens_have_no_special_tokens_and_prompts_are_text():
    """A special token added here would stand twice in every pair."""
    tokenizer = word_tokenizer("bert")
    texts = TEXTS * 300  # more than one block
    tokens = tokenise_plain(tokenizer, texts, "w9 ", max_length=5)
    for text, ids_T in zip(texts, tokens, strict=True):
        want = tokenizer.encode("w9 " + text, add_special_tokens=False).ids[:5]
        assert ids_T.tolist() == want and ids_T.dtype == np.int32
    assert tokenise_plain(tokenizer, []) == []


def test_types_are_packed_only_where_there_are_any():
    """Without them the model adds one row for all tokens, which is faster."""
    for kind, has_types in (("bert", True), ("roberta", False)):
        template = PairTemplate.of(word_tokenizer(kind))
        pairs = [template.join(np.array([4, 5]), np.array([6] * n), 30) for n in (3, 1)]
        packed = pack_pairs(pairs)
        assert packed.ids_T.tolist() == [*pairs[0][0], *pairs[1][0]]
        assert packed.lengths == [len(ids_T) for ids_T, _ in pairs]
        if has_types:
            assert packed.types_T.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 2
        else:
            assert packed.types_T is None
