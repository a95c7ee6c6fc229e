"""Every setting of train.py and evaluate.py: type, unit, legal range. Values live in the YAML files
beside this one.

Sections in TrainConfig are ordered by their effect: model, loss, data and optim may change results;
runtime and wandb must not.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import MISSING


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{key} ({value!r}) must be one of {', '.join(allowed)}")


@dataclass
class ProjectionConfig:
    """A Dense layer after pooling; dim 0 means none."""

    dim: int = 0
    bias: bool = True
    activation: str = "identity"  # identity | tanh | gelu | relu

    def __post_init__(self) -> None:
        _require(
            self.dim >= 0, f"model.projection.dim ({self.dim}) must be >= 0; 0 means no projection"
        )
        _one_of(
            "model.projection.activation", self.activation, ("identity", "tanh", "gelu", "relu")
        )


@dataclass
class ModelConfig:
    """What is trained. A None means: as the base folder says, and the usual default where it says
    nothing."""

    base: str = MISSING  # folder, hub id, or a run directory of ours
    revision: str | None = None  # hub revision
    towers: str | None = None  # single | dual (None: as the base, else single)
    adapter: str = "auto"  # auto | packed (our encoder) | automodel (transformers' AutoModel)
    pooling: str | None = None  # mean | cls | last | max
    normalize: bool = True  # unit-length embeddings
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    query_prompt: str | None = None  # text put before every query; "" for none
    passage_prompt: str | None = None
    prompt_in_pooling: bool | None = None  # whether prompt tokens count in pooling
    max_query_length: int | None = None  # tokens, prompt and special tokens included
    max_passage_length: int | None = None
    dropout: float | None = None  # hidden states; None: as config.json of the base says
    attention_dropout: float = 0.0  # above 0 leaves the fast attention paths
    freeze: list[str] = field(
        default_factory=list
    )  # query_tower | passage_tower | embeddings | layers:<n>

    def __post_init__(self) -> None:
        if self.towers is not None:
            _one_of("model.towers", self.towers, ("single", "dual"))
        if self.pooling is not None:
            _one_of("model.pooling", self.pooling, ("mean", "cls", "last", "max"))
        _one_of("model.adapter", self.adapter, ("auto", "packed", "automodel"))
        for key in ("max_query_length", "max_passage_length"):
            value = getattr(self, key)
            _require(value is None or value >= 3, f"model.{key} ({value}) must be >= 3 tokens")
        for key in ("dropout", "attention_dropout"):
            value = getattr(self, key)
            _require(value is None or 0 <= value < 1, f"model.{key} ({value}) must be in [0, 1)")
        for part in self.freeze:
            name, _, count = part.partition(":")
            ok = (not count and name in ("query_tower", "passage_tower", "embeddings")) or (
                name == "layers" and count.isdigit()
            )
            _require(
                ok,
                f"model.freeze entry {part!r} is unknown; use query_tower, passage_tower,"
                f" embeddings"
                " or layers:<n> (the first n layers)",
            )


@dataclass
class LossConfig:
    """InfoNCE (losses/infonce.py)."""

    kind: str = "infonce"
    temperature: float = 0.05
    learn_temperature: bool = False
    temperature_min: float = 0.005  # bounds of a learned temperature
    temperature_max: float = 1.0
    symmetric: float = 0.0  # weight of the passage-to-query direction, in [0, 1]
    dims: list[int] = field(default_factory=list)  # Matryoshka; empty: the full dimension alone
    dim_weights: list[float] = field(default_factory=list)  # one a dim; empty: all 1

    def __post_init__(self) -> None:
        _one_of("loss.kind", self.kind, ("infonce",))
        _require(
            self.temperature > 0,
            f"loss.temperature ({self.temperature}) must be > 0; common values are 0.01 to 0.1"
            f" (conf/loss/infonce.yaml)",
        )
        _require(
            0 < self.temperature_min <= self.temperature_max,
            f"loss.temperature_min ({self.temperature_min}) and loss.temperature_max"
            f" ({self.temperature_max})"
            " must satisfy 0 < min <= max",
        )
        _require(0 <= self.symmetric <= 1, f"loss.symmetric ({self.symmetric}) must be in [0, 1]")
        _require(
            all(d > 0 for d in self.dims) and len(set(self.dims)) == len(self.dims),
            f"loss.dims ({self.dims}) must be distinct positive numbers",
        )
        _require(
            not self.dim_weights or len(self.dim_weights) == len(self.dims),
            f"loss.dim_weights has {len(self.dim_weights)} entries, loss.dims {len(self.dims)};"
            f" give one weight a dim",
        )
        _require(
            all(w > 0 for w in self.dim_weights),
            f"loss.dim_weights ({self.dim_weights}) must be > 0",
        )


@dataclass
class SourceConfig:
    """One data set: where it lies and how to read it."""

    root: str | None = None  # file or folder; a hub id for format=hub
    format: str = (
        "auto"  # auto (by content) | beir | jsonl | tsv | csv | parquet | hub | pydocs | toy
    )
    columns: dict[str, str] = field(
        default_factory=dict
    )  # ours: theirs, e.g. {query: premise, positive: hypothesis}
    filter: dict[str, Any] = field(
        default_factory=dict
    )  # keep rows whose column equals the value, e.g. {label: 0}
    train_split: str = "train"
    dev_split: str = "dev"
    test_split: str = "test"
    weight: float = 1.0  # share among several data sets, before data.mix_temperature
    query_prompt: str | None = None  # overrides model.query_prompt for this data set
    passage_prompt: str | None = None

    def __post_init__(self) -> None:
        _one_of(
            "data.format",
            self.format,
            ("auto", "beir", "jsonl", "tsv", "csv", "parquet", "hub", "pydocs", "toy"),
        )
        _require(self.weight > 0, f"data weight ({self.weight}) must be > 0")


@dataclass
class DataConfig(SourceConfig):
    """The data of a run: one source (the fields of SourceConfig), or several under `sets`."""

    sets: dict[str, SourceConfig] = field(
        default_factory=dict
    )  # name -> source; then root stays empty
    mix: str = "mixed"  # mixed (a batch draws from all sets) | one (each batch from one set)
    mix_temperature: float = (
        1.0  # set shares are proportional to (weight * size) ** (1 / mix_temperature)
    )
    max_examples: int | None = None  # the first n training examples after a seeded shuffle
    max_negatives: int | None = None  # own negatives a query and step, sampled; None: all
    dev_fraction: float = 0.1  # used where the data has no split of its own
    test_fraction: float = 0.1
    split_seed: int = 0
    eval_corpus: str = (
        "split"  # passages searched where the data has no corpus: split (held-out) | all
    )
    max_eval_queries: int | None = None  # dev queries used during training
    max_train_length: int | None = None  # tokens a text in training; None: model.max_*_length
    on_bad_row: str = "error"  # error | skip (counted and listed in a file)
    cache_dir: str = "artifacts/cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("data.mix", self.mix, ("mixed", "one"))
        _one_of("data.eval_corpus", self.eval_corpus, ("split", "all"))
        _one_of("data.on_bad_row", self.on_bad_row, ("error", "skip"))
        _require(
            self.mix_temperature > 0, f"data.mix_temperature ({self.mix_temperature}) must be > 0"
        )
        _require(
            self.max_train_length is None or self.max_train_length >= 3,
            f"data.max_train_length ({self.max_train_length}) must be >= 3 tokens, or null",
        )
        for key in ("max_examples", "max_eval_queries"):
            value = getattr(self, key)
            _require(
                value is None or value > 0, f"data.{key} ({value}) must be > 0, or null for all"
            )
        _require(
            self.max_negatives is None or self.max_negatives >= 0,
            f"data.max_negatives ({self.max_negatives}) must be >= 0, or null for all",
        )
        _require(
            0 <= self.dev_fraction < 1
            and 0 <= self.test_fraction < 1
            and self.dev_fraction + self.test_fraction < 1,
            f"data.dev_fraction ({self.dev_fraction}) + data.test_fraction ({self.test_fraction})"
            f" must be < 1",
        )
        _require(
            not (self.sets and self.root),
            "set data.root for one data set or data.sets for several, not both",
        )


@dataclass
class OptimConfig:
    """AdamW and its schedule. A step is one optimiser step over the global batch."""

    batch_size: int = 64  # queries a step, over all ranks
    epochs: float = 1.0
    steps: int | None = None  # overrides epochs
    lr: float = 2e-5  # peak, a step
    weight_decay: float = 0.01  # matrices only: biases, norms and temperature are not decayed
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    schedule: str = "linear"  # constant | linear | cosine (decay to lr * min_lr_ratio)
    warmup: float = 0.1  # below 1: share of all steps; 1 and above: steps
    min_lr_ratio: float = 0.0
    layer_decay: float = 1.0  # lr factor a layer, from the top down; 1: none
    temperature_lr: float = 1e-3  # lr of a learned temperature

    def __post_init__(self) -> None:
        _require(self.batch_size > 0, f"optim.batch_size ({self.batch_size}) must be > 0")
        _require(
            self.steps is None or self.steps > 0, f"optim.steps ({self.steps}) must be > 0, or null"
        )
        _require(self.epochs > 0, f"optim.epochs ({self.epochs}) must be > 0")
        for key in ("lr", "eps", "temperature_lr"):
            _require(getattr(self, key) > 0, f"optim.{key} ({getattr(self, key)}) must be > 0")
        for key in ("weight_decay", "max_grad_norm", "warmup"):
            _require(getattr(self, key) >= 0, f"optim.{key} ({getattr(self, key)}) must be >= 0")
        for key in ("beta1", "beta2"):
            _require(
                0 <= getattr(self, key) < 1, f"optim.{key} ({getattr(self, key)}) must be in [0, 1)"
            )
        _require(
            0 <= self.min_lr_ratio <= 1,
            f"optim.min_lr_ratio ({self.min_lr_ratio}) must be in [0, 1]",
        )
        _require(
            0 < self.layer_decay <= 1, f"optim.layer_decay ({self.layer_decay}) must be in (0, 1]"
        )
        _one_of("optim.schedule", self.schedule, ("constant", "linear", "cosine"))


@dataclass
class RuntimeConfig:
    """How the work is done. Must not change results (beyond the rounding of `precision`)."""

    device: str = "auto"  # auto | cpu | cuda | mps
    # auto | fp32 | bf16 (autocast over fp32 weights); auto: bf16 where the hardware has it
    precision: str = "auto"
    chunk_tokens: int = 4096  # tokens encoded at once; a CPU likes chunks that fit its cache
    activation_checkpointing: bool = False
    compile: bool = False
    threads: int = 0  # CPU threads; 0: as torch chooses

    def __post_init__(self) -> None:
        _one_of("runtime.device", self.device, ("auto", "cpu", "cuda", "mps"))
        _one_of("runtime.precision", self.precision, ("auto", "fp32", "bf16"))
        _require(self.chunk_tokens > 0, f"runtime.chunk_tokens ({self.chunk_tokens}) must be > 0")
        _require(self.threads >= 0, f"runtime.threads ({self.threads}) must be >= 0")


@dataclass
class WandbConfig:
    mode: str = "offline"  # offline | online | disabled
    project: str = "rook"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _one_of("wandb.mode", self.mode, ("offline", "online", "disabled"))


@dataclass
class TrainConfig:
    name: str = "run"  # runs/<name>/<overrides>/seed<k>/
    seed: int = 0
    task: str = "retrieval"
    resume: bool = False
    runs_dir: str = "runs"
    dims: list[int] = field(
        default_factory=list
    )  # evaluated; empty: loss.dims, else the full dimension
    log_every: int = 10  # steps
    eval_every: int = 0  # steps; 0: at the end alone
    save_every: int = 0  # steps; 0: at the end alone
    keep_checkpoints: int = 2
    best_metric: str = "ndcg@10"
    early_stopping: int = 0  # evaluations without a better best_metric before stopping; 0: never
    examples_shown: int = 3  # queries shown before and after
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        _one_of("task", self.task, ("retrieval",))
        _require(
            self.name not in ("", ".", "..")
            and not set(self.name) & {"/", "\0", "\n"}
            and len(self.name.encode()) <= 200,
            f"name ({self.name!r}) must be the name of one folder: not empty, without / and at"
            f" most 200 bytes;"
            " runs_dir= says where it lies",
        )
        _require(self.seed >= 0, f"seed ({self.seed}) must be >= 0")
        _require(self.log_every > 0, f"log_every ({self.log_every}) must be > 0")
        for key in ("eval_every", "save_every", "early_stopping", "examples_shown"):
            _require(getattr(self, key) >= 0, f"{key} ({getattr(self, key)}) must be >= 0")
        _require(
            self.keep_checkpoints >= 1, f"keep_checkpoints ({self.keep_checkpoints}) must be >= 1"
        )
        _require(
            not self.early_stopping or self.eval_every > 0,
            f"early_stopping ({self.early_stopping}) needs eval_every > 0, got {self.eval_every}",
        )


@dataclass
class EvaluateConfig:
    model: str = MISSING  # run directory, model folder or hub id; bm25 for BM25 alone
    data: str = MISSING  # BEIR folder, or anything data.formats reads
    split: str = "test"
    dims: list[int] = field(default_factory=list)  # empty: the full dimension
    precision: str = "fp32"  # of the stored document vectors: fp32 | bf16 | int8 | binary
    against: str | None = None  # another model, or an eval.json
    out: str | None = None  # folder for eval.json and run.trec
    bm25: bool = True
    top_k: int = 100
    seed: int = 0  # of the bootstrap
    encode_precision: str = "auto"  # auto | fp32 | bf16, of the encoder
    batch_tokens: int = 0  # tokens encoded at once; 0: chosen by device
    device: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, ("fp32", "bf16", "int8", "binary"))
        _one_of("encode_precision", self.encode_precision, ("auto", "fp32", "bf16"))
        _one_of("device", self.device, ("auto", "cpu", "cuda", "mps"))
        _require(self.top_k >= 10, f"top_k ({self.top_k}) must be >= 10")
        _require(all(d > 0 for d in self.dims), f"dims ({self.dims}) must be positive")


def known_keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of every setting under dataclass `cls`; a mapping counts as one name."""
    keys = []
    hints = get_type_hints(cls)
    for f in fields(cls):
        kind = hints[f.name]
        keys += known_keys(kind, f"{prefix}{f.name}.") if is_dataclass(kind) else [prefix + f.name]
    return keys
