"""A small made-up retrieval set: seconds to learn, no files. For tests and for trying things out.

Each topic has a few words in two invented languages. A passage uses its topic's words in the first,
a query in the second, with a few words common to both: words alone find some answers, learned
translations the rest.
"""

import random

from data.records import Example

TOY_VERSION = 1  # raise it when the same seed would give other texts
SIZES = {"train": 480, "dev": 60, "test": 60}
_NUM_TOPICS, _WORDS_A_TOPIC = 60, 5
_SYLLABLES = (
    tuple(c + v for c in "bdfgklmn" for v in "aeo"),
    tuple(c + v for c in "prstvzjh" for v in "iuy"),
)
_FILLERS = ("the", "of", "and", "is", "a", "to", "in", "for", "with", "on")


def toy_examples(split: str, *, seed: int = 0) -> list[Example]:
    """The examples of train, dev or test, always the same for one seed; texts of different splits
    differ.

    Some training queries have two positives, some a negative.
    """
    if split not in SIZES:
        raise ValueError(f"data.format=toy has splits {', '.join(SIZES)}, not {split!r}")
    rng = random.Random(f"rook toy {seed}")
    words = [_words(rng, syllables, _NUM_TOPICS * _WORDS_A_TOPIC) for syllables in _SYLLABLES]
    topics = [
        [tuple(w[t * _WORDS_A_TOPIC + i] for w in words) for i in range(_WORDS_A_TOPIC)]
        for t in range(_NUM_TOPICS)
    ]
    seen: set[str] = set()
    by_split = {
        s: [_example(rng, s, n, topics, seen) for n in range(size)] for s, size in SIZES.items()
    }
    return by_split[split]


def _words(rng: random.Random, syllables: tuple[str, ...], num: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < num:
        words["".join(rng.choice(syllables) for _ in range(rng.choice((2, 3))))] = None
    return list(words)


def _example(rng: random.Random, split: str, number: int, topics: list, seen: set[str]) -> Example:
    one, two = rng.sample(range(len(topics)), 2)
    asked = rng.sample(topics[one], 2) + rng.sample(topics[two], 2)
    query = _distinct(seen, lambda: _sentence(rng, [w[1] for w in asked[:3]] + [asked[3][0]], 2))

    def passage() -> str:
        others = [w[0] for t in (one, two) for w in rng.sample(topics[t], 2)]
        return _sentence(rng, [w[0] for w in asked] + others, 8)

    is_train = split == "train"
    positives = [_distinct(seen, passage) for _ in range(2 if is_train and number % 8 == 0 else 1)]
    negatives = []
    if is_train and number % 4 == 1:
        three = rng.choice([t for t in range(len(topics)) if t not in (one, two)])
        half = [w[0] for w in topics[one]] + [w[0] for w in topics[three]]
        negatives = [_distinct(seen, lambda: _sentence(rng, half, 8))]
    return Example(
        query=query,
        positives=positives,
        negatives=negatives,
        where=f"toy/{split}:{number + 1}",
        id=f"{split}-{number}",
    )


def _distinct(seen: set[str], make) -> str:
    text = make()
    while text in seen:
        text = make()
    seen.add(text)
    return text


def _sentence(rng: random.Random, words: list[str], num_fillers: int) -> str:
    words = words + rng.choices(_FILLERS, k=num_fillers)
    rng.shuffle(words)
    return " ".join(words)
