"""A query and a passage as one token sequence, for cross-encoders: special tokens, types and
truncation.

Texts are tokenised once, without special tokens (`tokenise_plain`), and joined whenever a pair is
needed: a query meets many passages, and in training other ones each time.

Shapes: T tokens of a pair, S pairs.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from data.tokens import BLOCK_TEXTS

if TYPE_CHECKING:  # this folder does without torch; only pack_pairs needs it
    import torch

    from models.transformer import Packed

log = logging.getLogger(__name__)

MIN_PASSAGE = 16  # tokens that a long query leaves to its passage
_PROBES = ("a", "1", ".", "the", "\u0627", "\u4e00")

# Token ids and token types of one pair, int32 (T,) each.
Pair = tuple[np.ndarray, np.ndarray]


class PairTemplate:
    """What a tokenizer puts before, between and after the two texts of a pair, with token types.

    front, middle, back   special token ids, int32; [CLS] | [SEP] | [SEP] for BERT
    types                 token types of front, query, middle, passage and back
    """

    def __init__(
        self, front: Sequence[int], middle: Sequence[int], back: Sequence[int], types: list[int]
    ):
        self.front, self.middle, self.back = (
            np.array(ids, np.int32) for ids in (front, middle, back)
        )
        self.types = types
        self._said = False

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "PairTemplate":
        """As the tokenizer's own post-processor joins two texts.

        Raises ValueError for a tokenizer that finds no token in any of a few texts.
        """
        for probe in _PROBES:
            encoding = tokenizer.encode(probe, probe, add_special_tokens=True)
            sides = encoding.sequence_ids
            if 0 in sides and 1 in sides:
                break
        else:
            raise ValueError(
                f"the tokenizer finds no token in any of {_PROBES}; is its tokenizer.json whole?"
            )
        ids, types = encoding.ids, encoding.type_ids
        first, query_end = sides.index(0), len(sides) - sides[::-1].index(0)
        second, end = sides.index(1), len(sides) - sides[::-1].index(1)
        parts = (ids[:first], ids[query_end:second], ids[end:])
        # a part without tokens has no type: that of its neighbour is never used
        at = (0, first, min(query_end, second - 1), second, min(end, len(ids) - 1))
        return cls(*parts, types=[types[i] for i in at])

    @property
    def num_special(self) -> int:
        return len(self.front) + len(self.middle) + len(self.back)

    def check_room(self, prompts: Sequence[np.ndarray], lengths: Mapping[str, int]) -> None:
        """Raise ValueError for a length of a pair that prompts and special tokens fill.

        prompts  ids of the query's and the passage's
        lengths  setting -> its tokens of a pair
        """
        num_fixed = self.num_special + sum(map(len, prompts))
        for setting, length in lengths.items():
            if num_fixed + MIN_PASSAGE >= length:
                raise ValueError(
                    f"{setting} ({length}) must be > {num_fixed + MIN_PASSAGE}: prompts and special"
                    f" tokens take {num_fixed} tokens of a pair, and a passage needs {MIN_PASSAGE};"
                    " raise it or shorten model.query_prompt or model.passage_prompt"
                )

    def join(self, query_ids: np.ndarray, passage_ids: np.ndarray, max_length: int) -> Pair:
        """Ids and types of one pair, int32 (T,) each, T <= max_length.

        query_ids, passage_ids  without special tokens
        max_length              tokens of the pair, special tokens included
        The passage's end is cut, as truncation="only_second" of transformers does it. A query
        that would leave it fewer than 16 tokens is cut too, which the log says once.
        Raises ValueError when max_length leaves no room for a query beside those.
        """
        room = max_length - self.num_special
        if room <= MIN_PASSAGE:
            raise ValueError(
                f"a pair of {max_length} tokens leaves no room: {self.num_special} are special and"
                f" {MIN_PASSAGE} the passage's; raise model.max_pair_length"
            )
        longest_query = room - min(len(passage_ids), MIN_PASSAGE)
        if len(query_ids) > longest_query:
            if not self._said:
                self._said = True
                log.warning(
                    "a query of %d tokens is cut to %d, so that its passage has %d of the pair's"
                    " %d; raise model.max_pair_length where it matters (said once)",
                    len(query_ids), longest_query, room - longest_query, max_length,
                )  # fmt: skip
            query_ids = query_ids[:longest_query]
        passage_ids = passage_ids[: room - len(query_ids)]
        parts = (self.front, query_ids, self.middle, passage_ids, self.back)
        ids_T = np.concatenate(parts, dtype=np.int32)
        if not any(self.types):
            return ids_T, np.zeros(len(ids_T), np.int32)
        return ids_T, np.repeat(np.array(self.types, np.int32), [len(p) for p in parts])


def tokenise_plain(
    tokenizer: Tokenizer, texts: Sequence[str], prompt: str = "", max_length: int | None = None
) -> list[np.ndarray]:
    """int32 ids (T,) of each prompt + text without special tokens, for PairTemplate.join.

    max_length  tokens kept of each text: those of a whole pair are always enough; None: all
    A text may have no token.
    """
    tokens = []
    for start in range(0, len(texts), BLOCK_TEXTS):
        block = [prompt + text for text in texts[start : start + BLOCK_TEXTS]]
        for encoding in tokenizer.encode_batch_fast(block, add_special_tokens=False):
            tokens.append(np.array(encoding.ids[:max_length], np.int32))
    return tokens


def pack_pairs(pairs: Sequence[Pair], device: "torch.device | str" = "cpu") -> "Packed":
    """Pairs laid end to end on `device` in the order given; sort them by length for speed.

    types_T is set only where some type is not 0.
    """
    import torch

    from models.transformer import pack

    packed = pack([ids_T for ids_T, _ in pairs], device)
    if any(types_T.any() for _, types_T in pairs):
        types = np.concatenate([types_T for _, types_T in pairs]).astype(np.int64)
        packed.types_T = torch.from_numpy(types).to(device)
    return packed
