"""Texts as token ids: tokenised once ever, kept in a memory-mapped file under a digest of
everything they depend on.

Shapes: T tokens of a text, n texts.
"""

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from data.cache import built_once, digest_of

log = logging.getLogger(__name__)

STORE_VERSION = 1  # raise it when the same inputs would give other tokens or files
BLOCK_TEXTS = 1024  # tokenised at once: bounds the memory of encodings
_PROBES = ("a", "1", ".", "the", "\u0627", "\u4e00")

Tokenise = Callable[[Tokenizer, Sequence[str], str, int], list[np.ndarray]]


def special_ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer puts before and after every text.

    Raises ValueError for a tokenizer that finds no token in any of a few texts.
    """
    for probe in _PROBES:
        encoding = tokenizer.encode(probe)
        is_text = [i for i, is_special in enumerate(encoding.special_tokens_mask) if not is_special]
        if is_text:
            return encoding.ids[: is_text[0]], encoding.ids[is_text[-1] + 1 :]
    raise ValueError(
        f"the tokenizer finds no token in any of {_PROBES}; is its tokenizer.json whole?"
    )


def tokenise(
    tokenizer: Tokenizer, texts: Sequence[str], prompt: str, max_length: int
) -> list[np.ndarray]:
    """int32 ids (T,) of each prompt + text with special tokens, T <= max_length; equal to
    tokenizers' own truncation.

    tokenizer   with truncation and padding off
    prompt      put before the raw text, as sentence-transformers does; "" for none
    max_length  tokens, prompt and special tokens included; the text's end is cut, the closing
                special tokens stay
    Raises ValueError when max_length leaves no room for text, when a text has no token, and when
    the tokenizer truncates or pads by itself.
    """
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        raise ValueError(
            f"the tokenizer truncates ({tokenizer.truncation}) or pads ({tokenizer.padding}) by"
            " itself; call its no_truncation() and no_padding(): files on the hub may carry both"
        )
    front, back = special_ends(tokenizer)
    num_special = len(front) + len(back)
    if max_length <= num_special:
        raise ValueError(
            f"a maximum length of {max_length} tokens leaves no room for text:"
            f" {num_special} are special"
        )
    tail = np.array(back, np.int32)
    tokens = []
    for start in range(0, len(texts), BLOCK_TEXTS):
        block = [prompt + t for t in texts[start : start + BLOCK_TEXTS]]
        for text, encoding in zip(block, tokenizer.encode_batch_fast(block), strict=True):
            ids_T = np.array(encoding.ids, np.int32)
            if len(ids_T) > max_length:
                ids_T = np.concatenate([ids_T[: max_length - len(tail)], tail])
            if not len(ids_T):
                raise ValueError(
                    f"the tokenizer finds no token in {text[:60]!r}; leave that text out"
                )
            tokens.append(ids_T)
    return tokens


def num_prompt_tokens(tokenizer: Tokenizer, prompt: str, max_length: int | None = None) -> int:
    """Leading tokens that pooling leaves out where prompts do not count: the prompt and the opening
    special tokens.

    As sentence-transformers counts them: the prompt tokenised alone, less the closing special
    tokens. 0 without a prompt.
    """
    if not prompt:
        return 0
    num_tokens = len(tokenizer.encode(prompt).ids)
    if max_length is not None:
        num_tokens = min(num_tokens, max_length)
    return num_tokens - len(special_ends(tokenizer)[1])


class TokenStore:
    """Token ids of n texts, memory-mapped; store[i] is int32 (T,).

    length_n           tokens of each text, int32
    num_prompt_tokens  of each text, see the function of that name
    """

    def __init__(self, folder: Path, *, dtype: str, num_prompt_tokens: int) -> None:
        self.folder = folder
        self.num_prompt_tokens = num_prompt_tokens
        self._offsets = np.load(folder / "offsets.npy")
        path = folder / "tokens.bin"
        # an empty file cannot be mapped
        tokens = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
        self._tokens = tokens.view(np.ndarray)  # slices of a memmap object cost five times as much
        self.length_n = np.diff(self._offsets).astype(np.int32)

    def __len__(self) -> int:
        return len(self.length_n)

    def __getitem__(self, i: int) -> np.ndarray:
        return self._tokens[self._offsets[i] : self._offsets[i + 1]].astype(np.int32)

    def take(self, index: np.ndarray) -> list[np.ndarray]:
        """[store[i] for i in index], faster."""
        starts = self._offsets[index]
        lengths = self._offsets[np.asarray(index) + 1] - starts
        ends = np.cumsum(lengths)
        # one gather and as many views: a copy a text would cost ten times as much
        at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
        tokens = self._tokens[at].astype(np.int32)
        bounds = [0, *ends.tolist()]
        return [tokens[i:j] for i, j in pairwise(bounds)]


def open_token_store(
    texts: Callable[[], Iterable[str]],
    *,
    num_texts: int,
    texts_digest: str,
    tokenizer: Tokenizer,
    prompt: str,
    max_length: int,
    cache_dir: str | Path,
    vocab_size: int | None = None,
    what: str = "texts",
    tokenise_with: Tokenise | None = None,
) -> TokenStore:
    """The texts as tokens, from cache_dir or made now; `texts` is only called to make them.

    texts         gives the texts as a stream; what is held at once is a block of them and 8 bytes a
                  text
    texts_digest  of all texts in order: names the store, with tokenizer, prompt and max_length
    vocab_size    rows of the model's embedding table; None: not checked
    what          for the log and the progress bar
    tokenise_with takes the place of tokenise: data.pairs.tokenise_plain adds no special tokens
    Raises ValueError for a token id at or above vocab_size, and as tokenise does.
    """
    tokenizer_json = tokenizer.to_str().encode()
    key = digest_of(
        STORE_VERSION,
        texts_digest,
        num_texts,
        blake2b(tokenizer_json, digest_size=16).hexdigest(),
        prompt,
        max_length,
        *([tokenise_with.__name__] if tokenise_with is not None else []),
    )
    folder = Path(cache_dir) / f"tokens-{key}"
    dtype = "<u2" if tokenizer.get_vocab_size(with_added_tokens=True) <= 1 << 16 else "<i4"

    def build(temporary: Path) -> dict:
        return _build(
            temporary,
            texts(),
            tokenizer,
            prompt,
            max_length,
            num_texts=num_texts,
            dtype=dtype,
            what=what,
            tokenise_with=tokenise_with or tokenise,
        )

    info = built_once(folder, build, what=f"tokens of {num_texts:,} {what}")
    if vocab_size is not None and info["largest_id"] >= vocab_size:
        token = tokenizer.id_to_token(info["largest_id"])
        raise ValueError(
            f"the tokenizer makes id {info['largest_id']} ({token!r}) of the {what}, but the model"
            f" has {vocab_size} token embeddings: tokenizer.json belongs to another model"
        )
    return TokenStore(folder, dtype=info["dtype"], num_prompt_tokens=info["num_prompt_tokens"])


def _build(
    folder: Path,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    prompt: str,
    max_length: int,
    *,
    num_texts: int,
    dtype: str,
    what: str,
    tokenise_with: Tokenise,
) -> dict:
    offsets = array("q", [0])
    largest_id = -1
    num_cut = 0
    with open(folder / "tokens.bin", "wb", buffering=1 << 20) as f:
        bar = tqdm(total=num_texts, desc=f"tokenise {what}", unit="text", leave=False, delay=2)
        with bar:
            for block in _blocks(texts, BLOCK_TEXTS):
                for ids_T in tokenise_with(tokenizer, block, prompt, max_length):
                    largest_id = max(largest_id, int(ids_T.max(initial=-1)))
                    num_cut += len(ids_T) == max_length
                    f.write(ids_T.astype(dtype).tobytes())
                    offsets.append(offsets[-1] + len(ids_T))
                bar.update(len(block))
    assert len(offsets) - 1 == num_texts, (len(offsets) - 1, num_texts)
    assert dtype != "<u2" or largest_id < 1 << 16, largest_id
    np.save(folder / "offsets.npy", np.array(offsets, np.int64))
    log.info(
        "tokenised %s %s: %s tokens, %s at the maximum of %d",
        f"{num_texts:,}",
        what,
        f"{offsets[-1]:,}",
        f"{num_cut:,}",
        max_length,
    )
    return {
        "version": STORE_VERSION,
        "dtype": dtype,
        "num_texts": num_texts,
        "num_tokens": offsets[-1],
        "num_at_max_length": num_cut,
        "largest_id": largest_id,
        "prompt": prompt,
        "max_length": max_length,
        "num_prompt_tokens": num_prompt_tokens(tokenizer, prompt, max_length),
    }


def _blocks(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    texts = iter(texts)
    while block := list(islice(texts, size)):
        yield block
