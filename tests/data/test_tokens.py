"""Our truncation is tokenizers' own; the store holds exactly those ids and notices any change."""

import json
import logging
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from data import tokens
from data.tokens import TokenStore, num_prompt_tokens, open_token_store, special_ends, tokenise

WORDS = (
    "the cat sat on a mat while \u00e9clair na\u00efve stra\u00dfe \u0645\u0631\u062d\u0628\u0627"
    " \u0633\u0644\u0627\u0645 def return self.value += 10 \u4e2d\u6587 Istanbul \u0130zmir x"
).split()


def corpus(num: int, *, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.choice((1, 2, 9, 40, 200)))) for _ in range(num)]
    special = [
        "[SEP] in the text </s> [CLS]",
        "\ttabs\n\nand lines ",
        "  two  spaces",
        "\U0001f600?",
    ]
    return texts + special


def bert() -> Tokenizer:
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer(lowercase=True)
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    t.train_from_iterator(corpus(50, seed=1), trainers.WordPieceTrainer(special_tokens=names))
    t.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return t


def xlmr() -> Tokenizer:
    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.NFKC()
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=names, unk_token="<unk>")
    t.train_from_iterator(corpus(50, seed=2), trainer)
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return t


def roberta() -> Tokenizer:
    t = byte_level(["<s>", "<pad>", "</s>"])
    t.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return t


def modernbert() -> Tokenizer:
    t = byte_level(["[CLS]", "[PAD]", "[SEP]"])
    t.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    return t


def gpt() -> Tokenizer:
    t = byte_level([])
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    return t


def front_only() -> Tokenizer:
    """Two opening specials and none at the end, behind a sequence of processors."""
    t = byte_level(["<|begin|>", "<|kind|>"])
    template = processors.TemplateProcessing(
        single="<|begin|> <|kind|> $A", special_tokens=[("<|begin|>", 0), ("<|kind|>", 1)]
    )
    t.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return t


def byte_level(names: list[str]) -> Tokenizer:
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    t.train_from_iterator(corpus(50, seed=3), trainer)
    return t


KINDS = [bert, xlmr, roberta, modernbert, gpt, front_only]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", "query: ", "\u0633\u0624\u0627\u0644: "])
def test_cut_ids_equal_the_tokenizers_own_truncation(kind, prompt):
    """The closing special tokens must survive the cut, and the text lose exactly as many tokens."""
    tokenizer = kind()
    texts = corpus(60, seed=4)
    front, back = special_ends(tokenizer)
    for max_length in (len(front) + len(back) + 1, 5, 17, 64, 10_000):
        own = Tokenizer.from_str(tokenizer.to_str())
        own.enable_truncation(max_length)
        wanted = [own.encode(prompt + t).ids for t in texts]
        found = tokenise(tokenizer, texts, prompt, max_length)
        assert [f.tolist() for f in found] == wanted
        assert all(f.dtype == np.int32 for f in found)
    assert max(map(len, wanted)) > 64


def test_texts_over_a_block_keep_their_order(monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK_TEXTS", 7)
    tokenizer, texts = bert(), corpus(60, seed=5)
    wanted = [tokenizer.encode(t).ids for t in texts]
    assert [f.tolist() for f in tokenise(tokenizer, texts, "", 10_000)] == wanted


@pytest.mark.parametrize("switch", ["enable_truncation", "enable_padding"])
def test_a_tokenizer_that_cuts_or_pads_by_itself_is_refused(switch):
    """tokenizer.json files on the hub carry truncation 128 and padding 128."""
    tokenizer = bert()
    tokenizer.enable_truncation(
        128
    ) if switch == "enable_truncation" else tokenizer.enable_padding()
    with pytest.raises(ValueError, match=r"by itself; call its no_truncation\(\)"):
        tokenise(tokenizer, ["a"], "", 16)


def test_a_length_without_room_for_text_is_refused():
    with pytest.raises(ValueError, match="maximum length of 2 tokens leaves no room for text: 2"):
        tokenise(bert(), ["a"], "", 2)


def test_a_text_without_tokens_is_refused():
    """Without special tokens an empty text would be a sequence of length 0: nothing to pool."""
    with pytest.raises(ValueError, match="no token in ''"):
        tokenise(gpt(), ["a", ""], "", 16)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_tokens_are_counted_as_sentence_transformers_does(kind):
    """Its rule: length of the prompt tokenised alone, less one if the last token is special."""
    tokenizer = kind()
    specials = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    for prompt in ("query: ", "the cat", "search_document: "):
        encoding = tokenizer.encode(prompt)
        wanted = len(encoding.ids) - (encoding.tokens[-1] in specials)
        assert num_prompt_tokens(tokenizer, prompt) == wanted
        # and these really are the first tokens of a prompted text, where no merge crosses the seam
        with_text = tokenise(tokenizer, ["\u4e2d"], prompt, 100)[0]
        assert with_text[: wanted - 1].tolist() == encoding.ids[: wanted - 1]
    assert num_prompt_tokens(tokenizer, "") == 0


# -- the store ----------------------------------------------------------------------------------


def open_store(cache_dir: Path, texts, tokenizer, **changes) -> TokenStore:
    settings = dict(
        num_texts=len(texts),
        texts_digest="t1",
        prompt="query: ",
        max_length=24,
        cache_dir=cache_dir,
    )
    return open_token_store(lambda: iter(texts), tokenizer=tokenizer, **{**settings, **changes})


def test_the_store_gives_back_every_text(tmp_path):
    tokenizer, texts = modernbert(), corpus(3000, seed=6)
    store = open_store(tmp_path, texts, tokenizer)
    wanted = [t.tolist() for t in tokenise(tokenizer, texts, "query: ", 24)]
    assert [store[i].tolist() for i in range(len(store))] == wanted
    assert store.length_n.tolist() == [len(w) for w in wanted]
    index = np.array([5, 0, 2999, 5])
    taken = store.take(index)
    assert [t.tolist() for t in taken] == [wanted[i] for i in index]
    assert all(t.dtype == np.int32 for t in taken)
    assert store.num_prompt_tokens == num_prompt_tokens(tokenizer, "query: ")
    size = (store.folder / "tokens.bin").stat().st_size
    assert size == 2 * sum(map(len, wanted)), "two bytes a token where the vocabulary allows"


def test_large_vocabularies_take_four_bytes(tmp_path):
    vocab = {f"w{i}": i for i in range(70_000)}
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 70_000, **vocab}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    store = open_store(tmp_path, ["w69999 w1", "w65536"], tokenizer, prompt="")
    assert [store[0].tolist(), store[1].tolist()] == [[69_999, 1], [65_536]]


def test_texts_are_tokenised_once_ever(tmp_path, monkeypatch):
    tokenizer, texts = bert(), corpus(40, seed=7)
    first = open_store(tmp_path, texts, tokenizer)
    monkeypatch.setattr(tokens, "tokenise", lambda *a: pytest.fail("tokenised again"))
    again = open_store(tmp_path, texts, Tokenizer.from_str(tokenizer.to_str()))
    assert again.folder == first.folder
    assert [again[i].tolist() for i in range(44)] == [first[i].tolist() for i in range(44)]


def test_whatever_tokens_depend_on_names_another_store(tmp_path):
    """sentence-transformers' mining cache forgot the checkpoint in its key."""
    texts = corpus(20, seed=8)
    tokenizer = bert()
    changed = json.loads(tokenizer.to_str())
    changed["normalizer"]["lowercase"] = False
    stores = [
        open_store(tmp_path, texts, tokenizer),
        open_store(tmp_path, texts, tokenizer, prompt=""),
        open_store(tmp_path, texts, tokenizer, max_length=25),
        open_store(tmp_path, texts, tokenizer, texts_digest="t2"),
        open_store(tmp_path, texts, Tokenizer.from_str(json.dumps(changed))),
    ]
    assert len({s.folder for s in stores}) == 5


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy"])
def test_a_damaged_store_is_made_again_with_a_word(tmp_path, name, caplog):
    tokenizer, texts = bert(), corpus(40, seed=9)
    store = open_store(tmp_path, texts, tokenizer)
    before = [store[i].tolist() for i in range(44)]
    path = store.folder / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    again = open_store(tmp_path, texts, tokenizer)
    assert [again[i].tolist() for i in range(44)] == before
    assert f"damaged ({name}: the checksum differs); building the tokens of 44 texts" in caplog.text


def test_ids_beyond_the_model_are_refused(tmp_path):
    """Such an id reads past the embedding table: a crash on CPU, garbage or worse on a GPU."""
    tokenizer, texts = bert(), corpus(20, seed=10)
    largest = max(max(tokenizer.encode("query: " + t).ids[:24]) for t in texts)
    open_store(tmp_path, texts, tokenizer, vocab_size=largest + 1)
    for cache_dir in (tmp_path, tmp_path / "new"):
        with pytest.raises(
            ValueError, match=f"makes id {largest} .* has {largest} token embeddings"
        ):
            open_store(cache_dir, texts, tokenizer, vocab_size=largest)


class Text(str):
    """A str that weak references can point to."""


def test_texts_are_streamed(tmp_path, monkeypatch, caplog):
    """Data may be larger than memory: only a block of texts may be alive at any time."""
    monkeypatch.setattr(tokens, "BLOCK_TEXTS", 16)
    caplog.set_level(logging.INFO)
    alive, most = weakref.WeakSet(), 0

    def texts():
        nonlocal most
        for i in range(500):
            text = Text(f"the cat {i}")
            alive.add(text)
            most = max(most, sum(1 for _ in alive))
            yield text

    open_token_store(
        texts, num_texts=500, texts_digest="s", tokenizer=bert(), prompt="", max_length=9,
        cache_dir=tmp_path,
    )  # fmt: skip
    assert most <= 2 * 16 + 1
    assert "tokenised 500 texts" in caplog.text
