"""Reranker -> a folder that sentence-transformers' CrossEncoder and, where it has the head,
transformers load, with a model card.

A head of transformers' own form is stored as its class for sequence classification; a linear one as
Transformer + Pooling + Dense. Scores are calibrated logits: the calibration is folded into the last
layer, and the activation is Identity, so that nobody applies a sigmoid unasked.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.pairs import PairTemplate
from models.export import (
    ACTIVATION_PATHS,
    cell,
    hf_tensors,
    save_tensors,
    write_folder,
    write_json,
    write_modules,
    write_pooling,
    write_transformer,
    yaml_header,
)
from models.pretrained import LAYOUTS, hub_base
from models.reranker import HEADS, Reranker, head_parameters

IDENTITY = ACTIVATION_PATHS["identity"]
CARD_METRICS = ("mrr", "map", "ndcg@10")


def export_reranker(reranker: Reranker, out: Path, card: Mapping[str, Any]) -> None:
    """Write `reranker` as a CrossEncoder folder; load_reranker reads it back with equal scores.

    out   replaced as a whole where it exists, and only once everything is written
    card  what the model card says, every key optional: name, data (text), settings (name -> value),
          result (result.json as a dict), limits (list of text), license, language
    Scores of the folder are logits / spec.temperature + spec.bias; read back, they are calibrated
    as they stand. Weights are float32. The query prompt becomes the folder's default prompt, which
    CrossEncoder applies; for a passage prompt it has no place, so users must add that themselves:
    the card says so.
    """
    out = Path(out)
    write_folder(out, lambda temporary: _write(reranker, temporary, card, name=out.name))


def _write(reranker: Reranker, out: Path, card: Mapping[str, Any], *, name: str) -> None:
    spec = reranker.spec
    if HEADS[spec.head]:
        _write_classifier(reranker, out)
        modules = [("Transformer", "")]
    else:
        _write_pooled(reranker, out)
        modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")]
    write_modules(modules, out)
    settings = {
        "model_type": "CrossEncoder",
        "__version__": {"transformers": version("transformers"), "pytorch": version("torch")},
        "prompts": {"query": spec.query_prompt} if spec.query_prompt else {},
        "default_prompt_name": "query" if spec.query_prompt else None,
        "activation_fn": IDENTITY,
        "rook": {
            "base": spec.base,
            "passage_prompt": spec.passage_prompt,
            "folded_temperature": spec.temperature,
            "folded_bias": spec.bias,
        },
    }
    write_json(out / "config_sentence_transformers.json", settings)
    text = reranker_card(reranker, card, name=name)
    (out / "README.md").write_text(text, encoding="utf-8")


def _folded(reranker: Reranker) -> dict[str, Tensor]:
    """Parameters of the last layer with the calibration (in float64, rounded once)."""
    spec, out = reranker.spec, reranker.head.out
    tensors = {"weight": out.weight.detach().double() / spec.temperature}
    if out.bias is not None or spec.bias:
        bias_L = torch.zeros(spec.num_labels) if out.bias is None else out.bias.detach()
        tensors["bias"] = bias_L.double() / spec.temperature + spec.bias
    return {kind: tensor.to(torch.float32) for kind, tensor in tensors.items()}


def _options(reranker: Reranker) -> dict[str, Any]:
    template = PairTemplate.of(reranker.tokenizer)
    return {"lengths": {"pair": reranker.spec.max_length}, "has_types": any(template.types)}


def _write_classifier(reranker: Reranker, out: Path) -> None:
    """transformers' class for sequence classification."""
    spec, config = reranker.spec, reranker.source.config
    _, prefix, bare_class = LAYOUTS[config["model_type"]]
    tensors = {prefix + key: tensor for key, tensor in hf_tensors(reranker.encoder).items()}
    for key, parameter in head_parameters(reranker.head, spec.head).items():
        # BERT's pooler is part of its encoder
        tensors[prefix + key if key.startswith("pooler.") else key] = parameter
    last = HEADS[spec.head]["out"]
    tensors |= {f"{last}.{kind}": tensor for kind, tensor in _folded(reranker).items()}
    labels = [f"LABEL_{i}" for i in range(spec.num_labels)]
    if len(config.get("id2label") or ()) == spec.num_labels:
        labels = list(config["id2label"].values())
    values = {
        "architectures": [bare_class.replace("Model", "ForSequenceClassification")],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        # read by every CrossEncoder since 4.0; older ones read the second
        "sentence_transformers": {"activation_fn": IDENTITY},
        "sbert_ce_default_activation_function": IDENTITY,
    }
    if spec.head == "modernbert":
        values["classifier_pooling"] = spec.pooling
    settings = {
        "transformer_task": "sequence-classification",
        "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
        "module_output_name": "scores",
    }
    write_transformer(
        reranker, reranker.tokenizer, out, tensors=tensors, config=values, settings=settings,
        **_options(reranker),
    )  # fmt: skip


def _write_pooled(reranker: Reranker, out: Path) -> None:
    """Transformer + Pooling + Dense, which CrossEncoder reads since sentence-transformers 5.4."""
    write_transformer(reranker, reranker.tokenizer, out, **_options(reranker))
    (out / "1_Pooling").mkdir()
    write_pooling(reranker.pooling, reranker.encoder.width, out / "1_Pooling")
    (out / "2_Dense").mkdir()
    linear, folded = reranker.head.out, _folded(reranker)
    config = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": "bias" in folded,
        "activation_function": IDENTITY,
        "module_input_name": "sentence_embedding",
        "module_output_name": "scores",
    }
    write_json(out / "2_Dense" / "config.json", config)
    tensors = {f"linear.{kind}": tensor for kind, tensor in folded.items()}
    save_tensors(tensors, out / "2_Dense" / "model.safetensors")


# ---- model card ---------------------------------------------------------------------------------


def reranker_card(reranker: Reranker, card: Mapping[str, Any], *, name: str = "model") -> str:
    """README.md of an export: YAML header, then base, data, settings, results, use and limits."""
    spec, result = reranker.spec, card.get("result") or {}
    header: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "text-ranking",
    }
    if base := hub_base(spec.base):  # the hub takes ids alone, no folder names
        header["base_model"] = base
    for key in ("license", "language"):
        if card.get(key):
            header[key] = card[key]
    header["tags"] = ["sentence-transformers", "cross-encoder", "reranker", "rook"]
    if metrics := _metric_names(result):
        header["metrics"] = metrics
    outputs = "one logit" if spec.num_labels == 1 else f"{spec.num_labels} logits"
    lines = ["---", *yaml_header(header), "---", "", f"# {card.get('name') or name}", ""]
    lines += [
        f"A cross-encoder made from `{spec.base}`: it reads a query and a passage together and"
        f" gives {outputs}.",
        "",
    ]
    if card.get("data"):
        lines += ["## Data", "", str(card["data"]), ""]
    lines += ["## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {cell(k)} | {cell(v)} |" for k, v in _settings(reranker, card).items()]
    if table := rerank_table(result):
        lines += ["", "## Results", "", *table]
    lines += ["", "## Use", "", *_usage(reranker, name), "", "## Limits", ""]
    lines += [f"- {text}" for text in [*_limits(reranker), *card.get("limits", [])]]
    return "\n".join(lines) + "\n"


def _settings(reranker: Reranker, card: Mapping[str, Any]) -> dict[str, Any]:
    spec = reranker.spec
    return {
        "head": f"{spec.head} on {spec.pooling} pooling",
        "labels": spec.num_labels,
        "calibration": _calibration(reranker, card.get("result") or {}),
        "query prompt": repr(spec.query_prompt) if spec.query_prompt else "none",
        "passage prompt": repr(spec.passage_prompt) if spec.passage_prompt else "none",
        **{
            f"prompts of {name}": f"{query!r} and {passage!r}"
            for name, (query, passage) in spec.set_prompts.items()
        },
        "longest pair": f"{spec.max_length} tokens",
        **card.get("settings", {}),
    }


def _metric_names(result: Mapping[str, Any]) -> list[str]:
    tuned = (result.get("metrics") or {}).get("tuned") or {}
    return [m for m in CARD_METRICS if m in tuned]


def rerank_table(result: Mapping[str, Any]) -> list[str]:
    """Markdown of result.json: a row a system, a column a metric; then tuned against the others."""
    names = _metric_names(result)
    if not names:
        return []
    lines = [f"| system | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for system, values in result["metrics"].items():
        shares = [f"{values[m]:.4f}" if values.get(m) is not None else "" for m in names]
        lines.append(f"| {cell(system)} | {' | '.join(shares)} |")
    gains = []
    for other, by_metric in (result.get("delta_of") or {"base": result.get("delta") or {}}).items():
        for metric in names:
            if gain := by_metric.get(metric):
                low, high = gain["ci95"]
                interval = f"{gain['diff']:+.4f} [{low:+.4f}, {high:+.4f}]"
                cells = [cell(other), metric, interval, f"{gain['p']:.2g}", str(gain["n"])]
                gains.append(f"| {' | '.join(cells)} |")
    if not gains:
        return lines
    head = "| tuned against | metric | gain [95% interval] | p | queries |"
    return [*lines, "", head, "|---|---|---|---|---|", *gains]


def _calibration(reranker: Reranker, result: Mapping[str, Any]) -> str:
    found = result.get("calibration")
    spec = reranker.spec
    folded = f"logit / {spec.temperature:.4g} {spec.bias:+.4g}, in the last layer"
    what = "sigmoid" if spec.num_labels == 1 else "softmax"
    if not found:
        is_raw = (spec.temperature, spec.bias) == (1, 0)
        return f"none: the {what} of a score is no probability" if is_raw else folded
    return (
        f"{folded}; expected calibration error of the {what} on {found['pairs']} dev pairs"
        f" {found['ece_before']:.3f} before, {found['ece_after']:.3f} after"
    )


def _usage(reranker: Reranker, name: str) -> list[str]:
    spec = reranker.spec
    passage = json.dumps(spec.passage_prompt + "Open it with open(path).", ensure_ascii=False)
    lines = [
        "```python",
        "from sentence_transformers import CrossEncoder",
        "",
        f'model = CrossEncoder("{name}")  # path of this folder',
        f'scores = model.predict([("how do I read a file?", {passage})])',
        "```",
        "",
    ]
    if spec.num_labels == 1:
        lines += [
            "Scores are logits, higher is more relevant; `activation_fn=torch.nn.Sigmoid()` in"
            " `predict` maps them into (0, 1): a probability as far as the calibration above goes."
        ]
    else:
        lines += [
            f"Scores are {spec.num_labels} logits a pair; for probabilities pass"
            " `apply_softmax=True` to `predict`."
        ]
    if spec.query_prompt:
        lines += ["The query prompt is added by `predict`; do not add it yourself."]
    if spec.passage_prompt:
        lines += [
            f"Put {json.dumps(spec.passage_prompt, ensure_ascii=False)} before every passage, as"
            " above: CrossEncoder has no prompt for passages."
        ]
    if spec.set_prompts:
        lines += [
            "It was trained and calibrated with the prompts of each data set, in the table above,"
            " and none of them is added: put those of the nearest set before both texts."
        ]
    if HEADS[spec.head]:
        lines += ["transformers loads it with `AutoModelForSequenceClassification`."]
    else:
        lines += [
            "The folder is Transformer + Pooling + Dense, which CrossEncoder reads from"
            " sentence-transformers 5.4 on; no class of transformers has that head."
        ]
    return [
        *lines,
        "",
        "Reranking in Rook: `python evaluate.py model=<this folder> data=<folder>`.",
    ]


def _limits(reranker: Reranker) -> list[str]:
    return [
        f"Pairs beyond {reranker.spec.max_length} tokens are cut at the passage's end;"
        " sentence-transformers also cuts a query that fills more than half of them.",
        "Measured on its own test data, if at all: other domains may gain less or lose.",
    ]
