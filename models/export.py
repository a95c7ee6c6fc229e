"""Towers -> a folder that sentence-transformers and transformers load, with a model card.

models/export_reranker.py does it for cross-encoders, with the same parts.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from data.tokens import special_ends
from models.pretrained import (
    ACTIVATION_CLASSES,
    LAYOUTS,
    POOLINGS,
    Source,
    hub_base,
    name_map,
)
from models.reranker import Reranker
from models.towers import Projection, Tower, Towers, TowerSpec
from models.transformer import Encoder

log = logging.getLogger(__name__)

# Class paths that every sentence-transformers since version 2 (Router: 5) resolves.
_MODULES = "sentence_transformers.models."
ACTIVATION_PATHS = {
    "identity": "torch.nn.modules.linear.Identity",
    "tanh": "torch.nn.modules.activation.Tanh",
    "gelu": "torch.nn.modules.activation.GELU",
    "relu": "torch.nn.modules.activation.ReLU",
}
assert ACTIVATION_PATHS.keys() == set(ACTIVATION_CLASSES.values())


def export(towers: Towers, out: Path, card: dict[str, Any]) -> None:
    """Write `towers` as a sentence-transformers folder; load_towers reads it back bit for bit.

    out   replaced as a whole where it exists, and only once everything is written
    card  what the model card says, every key optional: name, data (text), settings (name -> value),
          result (result.json as a dict), limits (list of text), license, language
    A dual tower becomes a Router with routes query and document, one folder a module. Weights are
    float32. One tower with two maximum lengths: the larger is the folder's, and encode_query and
    encode_document of sentence-transformers 6 apply their own.
    """
    out = Path(out)
    write_folder(out, lambda temporary: _write(towers, temporary, card, name=out.name))


def write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Replace `out` by what `write` puts into an empty folder, once that is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{out.name}.tmp-*"):  # of a run that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        write(temporary)
        _replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("exported to %s", out)


def _write(towers: Towers, out: Path, card: dict[str, Any], *, name: str) -> None:
    spec = towers.spec
    lengths = {"query": spec.max_query_length, "document": spec.max_passage_length}
    if towers.is_dual:
        _write_router(towers, out, lengths)
        modules = [("Router", "")]
    else:
        write_transformer(towers.passage, towers.tokenizer_passage, out, lengths)
        modules = [
            ("Transformer", ""),
            *_write_head(towers.passage, out, spec.prompt_in_pooling),
        ]
    write_modules(modules, out)
    settings = {
        "__version__": {"transformers": version("transformers"), "pytorch": version("torch")},
        "prompts": {"query": spec.query_prompt, "document": spec.passage_prompt} | _named(spec),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine" if spec.normalize else "dot",
        "rook": {"dims": list(spec.dims), "base": spec.base},
    }
    write_json(out / "config_sentence_transformers.json", settings)
    (out / "README.md").write_text(model_card(towers, card, name=name), encoding="utf-8")


def _named(spec: TowerSpec) -> dict[str, str]:
    """Prompts of the data sets trained on, where they differ, under names for prompt_name=."""
    pairs = spec.set_prompts.items()
    return {f"{name}-query": query for name, (query, _) in pairs} | {
        f"{name}-document": passage for name, (_, passage) in pairs
    }


def write_modules(modules: list[tuple[str, str]], out: Path) -> None:
    """modules.json of (class, folder name) in order."""
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": _MODULES + kind}
        for i, (kind, path) in enumerate(modules)
    ]
    write_json(out / "modules.json", entries)


def _replace(temporary: Path, out: Path) -> None:
    """Put a finished folder in the place of `out`, which is never half written.

    A kill between the two renames leaves the old folder beside it, under a name with a dot.
    """
    for path in temporary.rglob("*"):
        if path.is_file():
            with open(path, "rb") as f:
                os.fsync(f.fileno())
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- modules ------------------------------------------------------------------------------------


def _write_router(towers: Towers, out: Path, lengths: dict[str, int]) -> None:
    types, structure = {}, {}
    for route, side in (("query", "query"), ("document", "passage")):
        tower = towers.tower(side)
        folder = out / f"{route}_0_Transformer"
        folder.mkdir()
        write_transformer(tower, towers.tokenizer(side), folder, {route: lengths[route]})
        modules = _write_head(tower, out, towers.spec.prompt_in_pooling, prefix=f"{route}_")
        structure[route] = [folder.name, *(path for _, path in modules)]
        types[folder.name] = _MODULES + "Transformer"
        types |= {path: _MODULES + kind for kind, path in modules}
    parameters = {"default_route": "document", "allow_empty_key": True}
    config = {"types": types, "structure": structure, "parameters": parameters}
    write_json(out / "router_config.json", config)


def _write_head(
    tower: Tower, out: Path, prompt_in_pooling: bool, prefix: str = ""
) -> list[tuple[str, str]]:
    """Pooling, Dense and Normalize as (class, folder name) in order."""
    modules: list[tuple[str, str]] = []

    def folder(kind: str) -> Path:
        modules.append((kind, f"{prefix}{len(modules) + 1}_{kind}"))
        path = out / modules[-1][1]
        path.mkdir()
        return path

    write_pooling(tower.pooling, tower.encoder.width, folder("Pooling"), prompt_in_pooling)
    for projection in tower.projections:
        _write_dense(projection, folder("Dense"))
    if tower.normalize:
        folder("Normalize")
    return modules


def write_pooling(how: str, width: int, folder: Path, prompt_in_pooling: bool = True) -> None:
    mode = {ours: theirs for theirs, ours in POOLINGS.items()}[how]
    flags = {
        "cls": "cls_token",
        "mean": "mean_tokens",
        "max": "max_tokens",
        "lasttoken": "lasttoken",
    }
    pooling = {"word_embedding_dimension": width}
    # one boolean a mode: the form that every version reads
    pooling |= {f"pooling_mode_{flag}": flag == flags[mode] for flag in flags.values()}
    pooling |= {"pooling_mode_mean_sqrt_len_tokens": False, "include_prompt": prompt_in_pooling}
    write_json(folder / "config.json", pooling)


def _write_dense(projection: Projection, folder: Path) -> None:
    linear = projection.linear
    config = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "activation_function": ACTIVATION_PATHS[projection.activation],
    }
    write_json(folder / "config.json", config)
    save_tensors(projection.state_dict(), folder / "model.safetensors")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # clones: parts of qkv share memory, which safetensors refuses
    plain = {
        k: t.detach().to("cpu", torch.float32, copy=True).contiguous() for k, t in tensors.items()
    }
    save_file(plain, path, metadata={"format": "pt"})


def write_transformer(
    tower: Tower | Reranker,
    tokenizer: Tokenizer,
    folder: Path,
    lengths: dict[str, int],
    *,
    has_types: bool = False,
    tensors: dict[str, Tensor] | None = None,
    config: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Weights, config.json, tokenizer and sentence_bert_config.json of one encoder.

    lengths    maximum tokens by route; both routes for a single tower
    has_types  whether the model reads token types
    tensors    what model.safetensors holds; None: those of transformers' bare class
    config     keys put over those of config.json
    settings   more keys of sentence_bert_config.json
    """
    source, encoder = tower.source, tower.encoder
    longest = max(lengths.values())
    if isinstance(encoder, Encoder):
        values = {k: v for k, v in source.config.items() if k not in ("torch_dtype", "auto_map")}
        values |= {"architectures": [LAYOUTS[values["model_type"]][2]], "dtype": "float32"}
        write_json(folder / "config.json", values | (config or {}))
        if tensors is None:
            tensors = hf_tensors(encoder) | source.pooler
        save_tensors(tensors, folder / "model.safetensors")
    else:
        encoder.model.save_pretrained(folder)
    write_tokenizer(tokenizer, source, folder, longest, has_types=has_types)
    values = {"max_seq_length": longest, "do_lower_case": False}  # tokenizer.json does it
    if len(set(lengths.values())) > 1:  # older sentence-transformers refuse keys they do not know
        values |= {f"{route}_length": length for route, length in lengths.items()}
    write_json(folder / "sentence_bert_config.json", values | (settings or {}))


def hf_tensors(encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's weights under the names of transformers' bare class; q, k and v apart again."""
    names = name_map(encoder.config.layout, len(encoder.layers))
    return {
        key: part
        for ours, tensor in encoder.named_parameters()
        for key, part in zip(names[ours], tensor.detach().chunk(len(names[ours])), strict=True)
    }


def write_tokenizer(
    tokenizer: Tokenizer, source: Source, folder: Path, max_length: int, *, has_types: bool = False
) -> None:
    """tokenizer.json as we use it, and a tokenizer_config.json that makes transformers obey it.

    transformers 5 rebuilds normaliser and pre-tokeniser of classes such as BertTokenizer from
    tokenizer_config.json, whatever tokenizer.json says; the generic class reads the file.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    dropped = ("tokenizer_class", "auto_map", "max_length", "stride", "pad_to_multiple_of")
    dropped += (
        "truncation_strategy",
        "truncation_side",
        "tokenizer_file",
        "name_or_path",
        "backend",
    )
    config = source.special_tokens | source.tokenizer_config
    config = {k: v for k, v in config.items() if k not in dropped}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["model_input_names"] += ["token_type_ids"] if has_types else []
    # sentence-transformers tells a prompt's length by these: all special tokens must be named
    front, back = special_ends(tokenizer)
    known = {_text(config.get(k)) for k in config if k.endswith("_token")}
    for key, ids in (("cls_token", front[:1]), ("sep_token", back[-1:])):
        token = tokenizer.id_to_token(ids[0]) if ids else None
        if token is not None and token not in known:
            config[key] = token
    if config.get("pad_token") is None:
        config["pad_token"] = tokenizer.id_to_token(source.config.get("pad_token_id") or 0)
    write_json(folder / "tokenizer_config.json", config)


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


# ---- model card ---------------------------------------------------------------------------------


def model_card(towers: Towers, card: dict[str, Any], *, name: str = "model") -> str:
    """README.md of an export: YAML header, then base, data, settings, results, use and limits."""
    spec = towers.spec
    result = card.get("result") or {}
    header: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
    }
    if base := hub_base(spec.base):  # the hub takes ids alone, no folder names
        header["base_model"] = base
    for key in ("license", "language"):
        if card.get(key):
            header[key] = card[key]
    header["tags"] = ["sentence-transformers", "feature-extraction", "dense-retrieval", "rook"]
    if metrics := _shown_metrics(result):
        header["metrics"] = metrics
    kind = "two encoders, one for queries and one for passages" if towers.is_dual else "one encoder"
    title = card.get("name") or name
    lines = ["---", *yaml_header(header), "---", "", f"# {title}", ""]
    lines += [
        f"A dense text retriever ({kind}, {towers.width} dimensions), made from `{spec.base}`.",
        "",
    ]
    if card.get("data"):
        lines += ["## Data", "", str(card["data"]), ""]
    lines += ["## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {cell(k)} | {cell(v)} |" for k, v in _settings(towers, card).items()]
    if table := result_table(result):
        lines += ["", "## Results", "", *table]
    lines += ["", "## Use", "", *_usage(towers, name), "", "## Limits", ""]
    lines += [f"- {text}" for text in [*_limits(towers), *card.get("limits", [])]]
    return "\n".join(lines) + "\n"


def _settings(towers: Towers, card: dict[str, Any]) -> dict[str, Any]:
    spec = towers.spec
    return {
        "pooling": spec.pooling + ("" if spec.prompt_in_pooling else ", prompt tokens left out"),
        "normalised": spec.normalize,
        "query prompt": repr(spec.query_prompt) if spec.query_prompt else "none",
        "passage prompt": repr(spec.passage_prompt) if spec.passage_prompt else "none",
        **{
            f"prompts of {name}": f"{query!r} and {passage!r}"
            for name, (query, passage) in spec.set_prompts.items()
        },
        "longest query": f"{spec.max_query_length} tokens",
        "longest passage": f"{spec.max_passage_length} tokens",
        "trained dimensions": ", ".join(map(str, spec.dims)) or str(towers.width),
        **card.get("settings", {}),
    }


CARD_METRICS = ("ndcg@10", "mrr@10", "recall@100", "accuracy@1")


def _shown_metrics(result: dict[str, Any]) -> list[str]:
    tuned = (result.get("metrics") or {}).get("tuned") or {}
    names = {name for values in tuned.values() for name in values}
    return [m for m in CARD_METRICS if m in names] or sorted(names)


def result_table(result: dict[str, Any]) -> list[str]:
    """Markdown table of result.json: BM25, base, tuned and gain, by metric and dimension."""
    metrics = result.get("metrics") or {}
    tuned, base = metrics.get("tuned") or {}, metrics.get("base") or {}
    bm25, delta = metrics.get("bm25") or {}, result.get("delta") or {}

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    rows = []
    for metric in _shown_metrics(result):
        for dim in sorted((d for d in tuned if metric in tuned[d]), key=int, reverse=True):
            values = (bm25.get(metric), base.get(dim, {}).get(metric), tuned[dim][metric])
            cells = [metric, dim, *map(share, values), "", "", ""]
            if gain := delta.get(dim, {}).get(metric):
                low, high = gain["ci95"]
                cells[5] = f"{gain['diff']:+.4f} [{low:+.4f}, {high:+.4f}]"
                cells[6:] = [f"{gain['p']:.2g}", str(gain["n"])]
            rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return []
    head = "| metric | dimensions | BM25 | base | tuned | gain [95% interval] | p | queries |"
    return [head, "|---|---|---|---|---|---|---|---|", *rows]


def _usage(towers: Towers, name: str) -> list[str]:
    spec = towers.spec
    dim = min(spec.dims, default=towers.width)
    lines = [
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{name}")  # path of this folder',
        'queries = model.encode_query(["how do I read a file?"])',
        'passages = model.encode_document(["Open it with open(path) and call read()."])',
        "scores = model.similarity(queries, passages)",
        "```",
        "",
    ]
    if dim < towers.width:
        lines += [
            f"Shorter vectors: cut to {dim} dimensions and normalise again:",
            "",
            "```python",
            f"queries = model.encode_query(texts, truncate_dim={dim}, normalize_embeddings=True)",
            "```",
            "",
        ]
    lines += [
        "On a BEIR folder: `python evaluate.py model=<this folder> data=<folder>` (Rook).",
        "",
    ]
    if spec.query_prompt or spec.passage_prompt:
        lines += ["`encode_query` and `encode_document` add the prompts; plain `encode` adds none."]
    if spec.set_prompts:
        lines += [
            "It was trained with a prompt for each data set; ask for one by name, for example"
            f' `model.encode_query(texts, prompt_name="{next(iter(spec.set_prompts))}-query")`.'
        ]
    if towers.is_dual:
        lines += [
            "The folder holds a Router with routes `query` and `document`. Plain `encode` takes the"
            " document side: use `encode_query` for queries. Each route's `*_0_Transformer` folder"
            " loads in transformers by itself."
        ]
    elif spec.max_query_length != spec.max_passage_length:
        lines += [
            f"Queries are cut at {spec.max_query_length} tokens and passages at"
            f" {spec.max_passage_length}: `encode_query` and `encode_document` do so from"
            " sentence-transformers 6 on, which this folder needs; plain `encode` cuts at"
            f" {max(spec.max_query_length, spec.max_passage_length)}."
        ]
    return [line for i, line in enumerate(lines) if line or i + 1 < len(lines)]


def _limits(towers: Towers) -> list[str]:
    spec = towers.spec
    return [
        f"Queries beyond {spec.max_query_length} tokens and passages beyond"
        f" {spec.max_passage_length} are cut.",
        "Measured on its own test data, if at all: other domains may gain less or lose.",
    ]


def cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def yaml_header(values: dict[str, Any]) -> list[str]:
    """The header: scalars and lists of scalars, every string quoted as JSON, which YAML reads."""
    lines = []
    for key, value in values.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(v, ensure_ascii=False)}" for v in value)]
        else:
            lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}")
    return lines
