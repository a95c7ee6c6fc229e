"""Small random models, saved by transformers itself, for the tests beside this file."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel

WORDS = (
    "a the of to and in is for query passage : ? how what read file open close path word text long"
    " short river stone tree light dark one two three four five six seven eight nine ten"
).split()
TEXTS = [
    "what is the path of a file ?",
    "stone",
    "The RIVER is long and dark , two unknown words here",
    "how to open a file " * 9,
    "one two three four five six seven eight",
]
KINDS = ("bert", "xlm-roberta", "mpnet", "modernbert")
_SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "initializer_range": 0.3,  # far from 0, so that a swapped matrix or a wrong order shows
}


def save_tokenizer(folder: Path, *, roberta: bool = False) -> int:
    """A word tokenizer that truncates and pads, as files on the hub do; returns its size."""
    special = ["<s>", "<pad>", "</s>", "<unk>"] if roberta else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pad, unk, cls, sep = (special[i] for i in ((1, 3, 0, 2) if roberta else (0, 1, 2, 3)))
    vocab = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=unk))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    second = f"{sep} $B" if roberta else f"$B:1 {sep}:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} {second}" + (f" {sep}" if roberta else ""),
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=7, pad_id=vocab[pad], pad_token=pad)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": pad, "unk_token": unk, "cls_token": cls, "sep_token": sep}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 48, **names}
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["model_input_names"] += [] if roberta else ["token_type_ids"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocab)


def hf_config(kind: str, vocab_size: int, num_layers: int = 3) -> transformers.PretrainedConfig:
    sizes = _SIZES | {"vocab_size": vocab_size, "num_hidden_layers": num_layers}
    if kind == "modernbert":
        special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2}
        return transformers.ModernBertConfig(
            **sizes, **special, sep_token_id=3, local_attention=8, max_position_embeddings=64,
            global_attn_every_n_layers=2,
        )  # fmt: skip
    sizes["max_position_embeddings"] = 66
    if kind == "bert":
        return transformers.BertConfig(**sizes)
    if kind == "xlm-roberta":
        return transformers.XLMRobertaConfig(**sizes, type_vocab_size=1, layer_norm_eps=1e-5)
    if kind == "mpnet":
        return transformers.MPNetConfig(**sizes, layer_norm_eps=1e-5)
    raise ValueError(kind)


def save_model(
    folder: Path,
    kind: str,
    *,
    head: str = "",
    num_layers: int = 3,
    seed: int = 0,
    settings: dict | None = None,
    **save_options,
) -> Path:
    """Folder of a random model of `kind` with its tokenizer; head="ForMaskedLM" saves one.

    settings  more keys of config.json
    """
    vocab_size = save_tokenizer(folder, roberta=kind in ("xlm-roberta", "mpnet"))
    config = hf_config(kind, vocab_size, num_layers)
    for key, value in (settings or {}).items():
        setattr(config, key, value)
    bare = {
        "bert": "Bert",
        "xlm-roberta": "XLMRoberta",
        "mpnet": "MPNet",
        "modernbert": "ModernBert",
    }
    torch.manual_seed(seed)
    model = getattr(transformers, bare[kind] + (head or "Model"))(config)
    with torch.no_grad():  # norms and biases start at 1 and 0, where a mix-up would not show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save_options)
    return folder
