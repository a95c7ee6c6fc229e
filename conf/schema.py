"""Every setting of train.py and evaluate.py: type, unit, legal range. Values live in the YAML files
beside this one.

Sections in TrainConfig are ordered by their effect: model, loss, data and optim may change results;
runtime and wandb must not.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

MISSING: Any = "???"  # what omegaconf calls MISSING; it need not be there for a loss or a model


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{key} ({value!r}) must be one of {', '.join(allowed)}")


@dataclass
class ProjectionConfig:
    """A Dense layer after pooling; dim 0 means none, with init=shared the width of the base."""

    dim: int = 0
    bias: bool = True
    activation: str = "identity"  # identity | tanh | gelu | relu
    # random | shared: a rotation that puts first what queries and their passages have in common:
    # the first dims of a base that never learned Matryoshka are worth more before a single step
    init: str = "random"
    init_pairs: int = 1024  # training pairs that init=shared is computed from

    @property
    def is_wanted(self) -> bool:
        return self.dim > 0 or self.init != "random"

    def __post_init__(self) -> None:
        _one_of("model.projection.init", self.init, ("random", "shared"))
        _require(
            self.init == "random" or self.activation == "identity",
            f"model.projection.init={self.init} needs model.projection.activation=identity, got"
            f" {self.activation}",
        )
        _require(
            self.init_pairs > 0, f"model.projection.init_pairs ({self.init_pairs}) must be > 0"
        )
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
    max_pair_length: int | None = None  # task=rerank: tokens of query and passage together
    num_labels: int = 1  # task=rerank: outputs of the head; above 1 for loss.kind=cross_entropy
    num_layers: int | None = None  # the first n layers of the base are kept; None: all
    dropout: float | None = None  # hidden states; None: as config.json of the base says
    attention_dropout: float = 0.0  # above 0, CUDA leaves its fast kernel
    freeze: list[str] = field(
        default_factory=list
    )  # query_tower | passage_tower | embeddings | layers:<n>

    def __post_init__(self) -> None:
        if self.towers is not None:
            _one_of("model.towers", self.towers, ("single", "dual"))
        if self.pooling is not None:
            _one_of("model.pooling", self.pooling, ("mean", "cls", "last", "max"))
        _one_of("model.adapter", self.adapter, ("auto", "packed", "automodel"))
        for key, least in (
            ("max_query_length", 3),
            ("max_passage_length", 3),
            ("max_pair_length", 32),
        ):
            value = getattr(self, key)
            _require(
                value is None or value >= least, f"model.{key} ({value}) must be >= {least} tokens"
            )
        _require(self.num_labels >= 1, f"model.num_labels ({self.num_labels}) must be >= 1")
        _require(
            self.num_layers is None or self.num_layers >= 1,
            f"model.num_layers ({self.num_layers}) must be >= 1; null: all",
        )
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


CONTRASTIVE_LOSSES = ("infonce", "sigmoid")
SCORE_LOSSES = ("margin_mse", "kl")  # of a reranker, or of a retriever that learns its scores
KERNEL_PATHS = ("auto", "fused", "chunk", "eform", "dense")  # as PATHS of kernels/infonce_triton.py
RERANK_LOSSES = (
    "bce", "softmax", "listmle", "ranknet", "lambdarank", "lambdaloss", "margin_mse", "kl",
    "cross_entropy",
)  # fmt: skip


@dataclass
class LossConfig:
    """A contrastive loss (losses/infonce.py has the equations), or, for task=rerank, one of
    losses/rerank.py: its keys are temperature (divides the logits), positive_weight, no_answer,
    teacher_temperature and teacher_weight. Two of those, margin_mse and kl, also teach a retriever
    a reranker's scores (losses/distill.py).

    A pair's contrastive loss is softplus(log sum exp(z of negatives) - z of the positive), with z =
    cosine / temperature. The keys below the temperature say which negatives, and what else is
    added.
    """

    # retrieval: infonce | sigmoid (SigLIP: each cell by itself); rerank: bce | softmax (listwise) |
    # listmle | ranknet | lambdarank | lambdaloss (NDCG-Loss2++) | margin_mse | kl (both to the
    # data's scores) | cross_entropy
    kind: str = "infonce"
    temperature: float = 0.05
    learn_temperature: bool = False
    temperature_min: float = 0.005  # bounds of a learned temperature
    temperature_max: float = 1.0
    positive_weight: float = 1.0  # kind=bce: weight of a positive pair
    # kind=softmax: "none of these answers" is one more choice, of logit 0, and the right one for a
    # group without positives
    no_answer: bool = False
    sigmoid_bias: float = -10.0  # start of the learned bias of kind=sigmoid
    symmetric: float = 0.0  # weight of the passage-to-query direction, in [0, 1]
    # what a pair is told from, in one softmax: query_passage (always), query_query,
    # passage_passage, passage_query; Qwen3 has the first three, GTE all four
    negatives: list[str] = field(default_factory=lambda: ["query_passage"])
    # false negatives: left out where the cosine exceeds the positive's + margin, or ratio * the
    # positive's, or either; the positive is always exempt
    false_negative_margin: float | None = None
    false_negative_ratio: float | None = None
    guide: str | None = None  # model (folder, hub id, run) whose cosines are compared; null: own
    label_smoothing: float = 0.0
    hardness: float = 0.0  # added to a negative's score, times its cosine (no gradient)
    debias: float = 0.0  # assumed share of false negatives among the negatives
    teacher: str | None = None  # model whose in-batch similarities are soft labels
    # null: 0.05 for the cosines of loss.teacher, 1 for kind=kl; beside labels it has to be named
    teacher_temperature: float | None = None
    # share of KL(teacher || model), 1: nothing else; task=rerank: of the data's scores, beside the
    # labels
    teacher_weight: float = 0.0
    dims: list[int] = field(default_factory=list)  # Matryoshka; empty: the full dimension alone
    dim_weights: list[float] = field(default_factory=list)  # one a dim; empty: all 1
    dims_per_step: int = 0  # a seeded sample of the dims each step; 0: all
    # auto (today: torch) | torch (chunks) | triton (kernels/, on CUDA) | dense (one matrix)
    backend: str = "auto"
    # of backend=triton: auto (by size and loss) | fused | dense | chunk, eform (rows alone);
    # kernels/README.md says what they cost
    path: str = "auto"

    @property
    def query_negatives(self) -> bool:
        return "query_query" in self.negatives

    @property
    def teacher_divisor(self) -> float:
        """What divides a teacher's scores: teacher_temperature, or its default."""
        if self.teacher_temperature is not None:
            return self.teacher_temperature
        return 1.0 if self.kind in RERANK_LOSSES else 0.05

    @property
    def learns_scores(self) -> bool:
        """Whether the data must have a teacher's scores."""
        is_beside_labels = self.kind in RERANK_LOSSES and self.teacher_weight > 0
        return self.kind in SCORE_LOSSES or is_beside_labels

    def __post_init__(self) -> None:
        _one_of("loss.kind", self.kind, CONTRASTIVE_LOSSES + RERANK_LOSSES)
        _one_of("loss.backend", self.backend, ("auto", "torch", "triton", "dense"))
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
        _require(
            not self.learn_temperature
            or self.temperature_min <= self.temperature <= self.temperature_max,
            f"loss.temperature ({self.temperature}) must lie between loss.temperature_min"
            f" ({self.temperature_min}) and loss.temperature_max ({self.temperature_max}) to be"
            f" learned",
        )
        _require(0 <= self.symmetric <= 1, f"loss.symmetric ({self.symmetric}) must be in [0, 1]")
        self._check_negatives()
        self._check_teacher()
        self._check_dims()
        self._check_path()
        if self.kind == "sigmoid":
            self._check_sigmoid()
        else:
            self._refuse(("sigmoid_bias",), "loss.kind=sigmoid")
        if self.kind in RERANK_LOSSES:
            self._check_rerank()
        if self.kind != "bce":
            self._refuse(("positive_weight",), "loss.kind=bce")
        if self.kind != "softmax":
            self._refuse(("no_answer",), "loss.kind=softmax")
        if self.kind not in SCORE_LOSSES and not self.teacher_weight:
            self._refuse(("teacher_temperature",), "a loss with a teacher (loss.teacher_weight)")

    def _check_negatives(self) -> None:
        known = ("query_passage", "query_query", "passage_passage", "passage_query")
        for name in self.negatives:
            _one_of("loss.negatives", name, known)
        _require(
            "query_passage" in self.negatives and len(set(self.negatives)) == len(self.negatives),
            f"loss.negatives ({self.negatives}) must hold query_passage, and each kind once",
        )
        margin, ratio = self.false_negative_margin, self.false_negative_ratio
        _require(
            margin is None or -2 <= margin <= 2,
            f"loss.false_negative_margin ({margin}) is a difference of cosines, in [-2, 2]; null:"
            f" none",
        )
        _require(
            ratio is None or 0 < ratio <= 2,
            f"loss.false_negative_ratio ({ratio}) must be in (0, 2]; null: none",
        )
        _require(
            self.guide is None or margin is not None or ratio is not None,
            "loss.guide needs loss.false_negative_margin (GISTEmbed: 0.0) or"
            " loss.false_negative_ratio",
        )
        for key, top in (("label_smoothing", 1), ("debias", 1), ("hardness", math.inf)):
            value = getattr(self, key)
            _require(0 <= value < top, f"loss.{key} ({value}) must be in [0, {top})")
        _require(
            not (self.label_smoothing and (self.hardness or self.debias)),
            "loss.label_smoothing has no published form together with loss.hardness or loss.debias;"
            " set one of them to 0",
        )

    def _check_teacher(self) -> None:
        for key in ("guide", "teacher"):
            _require(
                getattr(self, key) != "",
                f"loss.{key} is empty: name a model, loss.{key}=<folder, hub id or run>",
            )
        _require(
            0 <= self.teacher_weight <= 1,
            f"loss.teacher_weight ({self.teacher_weight}) must be in [0, 1]",
        )
        _require(
            self.teacher_temperature is None or self.teacher_temperature > 0,
            f"loss.teacher_temperature ({self.teacher_temperature}) must be > 0",
        )
        _require(
            (self.teacher is not None) == (self.teacher_weight > 0) or self.kind in RERANK_LOSSES,
            f"loss.teacher ({self.teacher}) and loss.teacher_weight ({self.teacher_weight}) go"
            f" together: name a model and a weight in (0, 1], or neither",
        )
        _require(
            self.guide is None or self.teacher is None or self.guide == self.teacher,
            f"loss.guide ({self.guide}) and loss.teacher ({self.teacher}) must be the same model",
        )
        if self.kind == "infonce" and self.teacher_weight == 1:
            keys = tuple(key for key in _SOFTMAX_KEYS if key != "teacher")
            owner = "the pairs' loss, which loss.teacher_weight=1 gives no share; set it below 1"
            self._refuse(keys, owner)

    def _check_dims(self) -> None:
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
        _require(
            0 <= self.dims_per_step <= len(self.dims),
            f"loss.dims_per_step ({self.dims_per_step}) must be from 0 (all) to the number of"
            f" loss.dims ({len(self.dims)})",
        )

    def _check_path(self) -> None:
        _one_of("loss.path", self.path, KERNEL_PATHS)
        if self.path == "auto":
            return
        _require(
            self.backend == "triton",
            f"loss.path ({self.path}) is a way of loss.backend=triton, not of {self.backend};"
            f" set loss.path=auto",
        )
        by_score = self.false_negative_margin is not None or self.false_negative_ratio is not None
        torch_alone = [
            name
            for name, is_set in (
                ("loss.guide", self.guide is not None),
                ("loss.label_smoothing", self.label_smoothing and by_score),
                ("loss.debias", self.debias and by_score),
            )
            if is_set
        ]
        _require(
            not torch_alone,
            f"loss.path ({self.path}): no kernel has what {', '.join(torch_alone)} asks for (here"
            f" with limits by score); set loss.path=auto",
        )
        has_columns = self.symmetric > 0 or "passage_query" in self.negatives
        _require(
            self.path in ("fused", "dense") or not (has_columns or self.kind == "sigmoid"),
            f"loss.path ({self.path}) has sums of rows alone; loss.symmetric, passage_query"
            f" negatives and loss.kind=sigmoid need others: take fused, dense or auto",
        )

    def _check_sigmoid(self) -> None:
        self._refuse(_SOFTMAX_KEYS, "loss.kind=infonce; the sigmoid loss looks at each cell alone")

    def _check_rerank(self) -> None:
        keys = (*_SOFTMAX_KEYS, "learn_temperature", "path")
        if self.kind not in SCORE_LOSSES:
            keys += ("dims", "dim_weights", "dims_per_step")
        self._refuse(keys, f"a contrastive loss, not to loss.kind={self.kind}")
        if self.kind in (*SCORE_LOSSES, "cross_entropy"):
            self._refuse(("teacher_weight",), f"losses of grades, not to loss.kind={self.kind}")
        _require(
            not self.teacher_weight or self.teacher_temperature is not None,
            f"loss.teacher_weight ({self.teacher_weight}) beside labels needs"
            " loss.teacher_temperature, which depends on the teacher: 1 for a cross-encoder's"
            " logits, 0.01 to 0.05 for a retriever's cosines",
        )
        _require(
            self.positive_weight > 0, f"loss.positive_weight ({self.positive_weight}) must be > 0"
        )

    def _refuse(self, keys: tuple[str, ...], owner: str) -> None:
        """Raise ValueError where one of `keys` is set, though it belongs to `owner`."""
        for one in fields(self):
            key, is_made = one.name, callable(one.default_factory)
            default = one.default_factory() if is_made else one.default
            _require(
                key not in keys or getattr(self, key) == default,
                f"loss.{key} ({getattr(self, key)}) belongs to {owner}",
            )


_SOFTMAX_KEYS = (
    "symmetric", "negatives", "label_smoothing", "hardness", "debias", "guide", "teacher",
    "false_negative_margin", "false_negative_ratio",
)  # fmt: skip


# format -> settings that examples made by a module of ours have no use for
_OF_ROWS = ("columns", "filter", "train_split", "dev_split", "test_split", "texts")
UNREAD = {"toy": ("root", *_OF_ROWS), "pydocs": _OF_ROWS}


@dataclass
class SourceConfig:
    """One data set: where it lies and how to read it."""

    root: str | None = None  # file or folder; a hub id for format=hub
    format: str = (
        "auto"  # auto (by content) | beir | jsonl | tsv | csv | parquet | hub | pydocs | toy
    )
    revision: str | None = None  # format=hub: commit, branch or tag; None: the newest
    columns: dict[str, str] = field(
        default_factory=dict
    )  # ours: theirs, e.g. {query: premise, positive: hypothesis}
    filter: dict[str, Any] = field(
        default_factory=dict
    )  # keep rows whose column equals the value, e.g. {label: 0}
    train_split: str = "train"
    dev_split: str = "dev"
    test_split: str = "test"
    texts: str | None = None  # BEIR folder that holds the texts of rows of ids
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
        _require(
            self.revision is None or self.format == "hub",
            f"data.revision ({self.revision}) is of a hub data set, got data.format={self.format};"
            " add data.format=hub, or leave it out",
        )
        of_rows = UNREAD.get(self.format, ())
        unread = [
            f.name
            for f in fields(SourceConfig)
            if f.name in of_rows and getattr(self, f.name) != getattr(SourceConfig(), f.name)
        ]
        _require(
            not unread,
            f"data.format={self.format} makes its examples and splits itself, got beside it"
            f" {', '.join(f'data.{name}' for name in unread)}, which it would not read; leave"
            f" {'them' if len(unread) > 1 else 'it'} out, or give data of your own as data=local"
            " data.root=<file or folder>",
        )


@dataclass
class StageConfig:
    """Steps of a curriculum. None: as the data settings of the same name say."""

    steps: int = MISSING  # how many, after those of the stages before
    max_negatives: int | None = None
    random_negatives: int | None = None
    max_train_length: int | None = None

    def check(self, name: str) -> None:
        """Raise ValueError for an illegal value; name is how the command line calls this stage."""
        least = {
            "steps": 1, "max_negatives": 0, "random_negatives": 0, "max_train_length": 3,
        }  # fmt: skip
        for key, low in least.items():
            value = getattr(self, key)
            _require(value is None or value >= low, f"{name}.{key} ({value}) must be >= {low}")


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
    random_negatives: int = 0  # task=rerank: random training passages added to each group
    # task=rerank: what the first steps do otherwise, stage by stage, for example
    # data.curriculum='[{steps: 120, max_negatives: 0, random_negatives: 5, max_train_length: 96}]'
    curriculum: list[StageConfig] = field(default_factory=list)
    # used where the data has no split of its own; held-out rows are kept in memory, others stream
    dev_fraction: float = 0.1
    test_fraction: float = 0.1
    max_held_out: int | None = 10_000  # rows of dev, and of test, at most; null: no limit
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
            self.random_negatives >= 0,
            f"data.random_negatives ({self.random_negatives}) must be >= 0",
        )
        for number, stage in enumerate(self.curriculum):
            stage.check(f"data.curriculum[{number}]")
        _require(
            0 <= self.dev_fraction < 1
            and 0 <= self.test_fraction < 1
            and self.dev_fraction + self.test_fraction < 1,
            f"data.dev_fraction ({self.dev_fraction}) + data.test_fraction ({self.test_fraction})"
            f" must be < 1",
        )
        # toy data stand in for those of any experiment, some of which set a fraction
        fractions = [
            f"data.{key}"
            for key in ("dev_fraction", "test_fraction")
            if self.format == "pydocs" and getattr(self, key) != getattr(DataConfig, key)
        ]
        _require(
            not fractions,
            f"data.format=pydocs is split by module, got {' and '.join(fractions)}, which it would"
            " not read; leave out what sets it",
        )
        _require(
            self.max_held_out is None or self.max_held_out > 0,
            f"data.max_held_out ({self.max_held_out}) must be > 0 rows, or null for no limit; to"
            " hold out none set data.dev_fraction=0 data.test_fraction=0",
        )
        _require(
            not (self.sets and self.root),
            "set data.root for one data set or data.sets for several, not both",
        )
        if self.sets:
            unread = [
                f.name
                for f in fields(SourceConfig)
                if getattr(self, f.name) != getattr(SourceConfig(), f.name)
            ]
            _require(
                not unread,
                f"data.sets names data sets with settings of their own, got beside it"
                f" {', '.join(f'data.{name}' for name in unread)}, which none of them would read;"
                f" set data.sets.<name>.{unread[0] if unread else ''} for each",
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
    temperature_lr: float = 1e-3  # lr of a learned temperature, and of the bias of kind=sigmoid
    head_lr: float | None = None  # lr of a reranker's head; null: lr

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
            self.head_lr is None or self.head_lr > 0,
            f"optim.head_lr ({self.head_lr}) must be > 0, or null for optim.lr",
        )
        _require(
            0 <= self.min_lr_ratio <= 1,
            f"optim.min_lr_ratio ({self.min_lr_ratio}) must be in [0, 1]",
        )
        _require(
            0 < self.layer_decay <= 1, f"optim.layer_decay ({self.layer_decay}) must be in (0, 1]"
        )
        _one_of("optim.schedule", self.schedule, ("constant", "linear", "cosine"))
        _require(
            self.schedule != "constant" or self.min_lr_ratio == 0,
            f"optim.min_lr_ratio ({self.min_lr_ratio}) is not read by optim.schedule=constant; take"
            " linear or cosine",
        )


@dataclass
class RuntimeConfig:
    """How the work is done. Must not change results (beyond the rounding of `precision`)."""

    device: str = "auto"  # auto | cpu | cuda | mps
    # auto | fp32 | bf16 (autocast over fp32 weights); auto: bf16 where the hardware has it
    precision: str = "auto"
    chunk_tokens: int = 4096  # tokens encoded at once; a CPU likes chunks that fit its cache
    # MiB of autograd graphs kept between a step's two passes; what does not fit is encoded twice.
    # auto: a fixed share of the device's total memory (runtime/memory.py)
    activation_budget_mib: int | float | str | None = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    threads: int = 0  # CPU threads; 0: as torch chooses

    def __post_init__(self) -> None:
        _one_of("runtime.device", self.device, ("auto", "cpu", "cuda", "mps"))
        _one_of("runtime.precision", self.precision, ("auto", "fp32", "bf16"))
        _require(self.chunk_tokens > 0, f"runtime.chunk_tokens ({self.chunk_tokens}) must be > 0")
        budget = self.activation_budget_mib
        is_number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
        _require(
            0 <= budget < math.inf if is_number else budget in ("auto", None),
            f"runtime.activation_budget_mib ({budget}) must be MiB, >= 0 and finite, or auto: a"
            " share of the device's memory",
        )
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
class MineConfig:
    """Which passages become a query's hard negatives (data/negatives.py). Limits look at the
    model's score where a model is set, else at that of the one source.
    """

    # model (nearest passages by its cosine) | bm25 | run (mine.run); of several the candidates are
    # taken in turns, best first
    sources: list[str] = field(default_factory=lambda: ["model"])
    model: str | None = None  # run directory, model folder or hub id
    run: str | None = None  # TREC run file with the ids of the data
    corpus: str | None = None  # more passages to choose from: BEIR folder, or rows of any kind
    num_negatives: int = 3  # a query
    # rank in each source, from 1, the query's positives left out
    first_rank: int = 1
    last_rank: int = 50
    # false negatives: left out above positive - margin, above positive - (1 - fraction) *
    # |positive|; the positive is the lowest-scored one of the query. NV-Retriever: fraction 0.95
    margin: float | None = None
    fraction: float | None = 0.95
    max_score: float | None = None
    min_score: float | None = None
    near_duplicate: float | None = 0.8  # left out: this similar to an answer (data/near.py)
    choice: str = "top"  # top | sample (seeded, each candidate equally likely)
    keep_own: bool = True  # the data's own negatives come first, beside the mined ones
    reranker: str | None = None  # cross-encoder: its scores are written beside the passages, ...
    # ... and a negative of a higher probability is left out, the data's own included
    veto_above: float | None = 0.5

    def __post_init__(self) -> None:
        for name in self.sources:
            _one_of("mine.sources", name, ("model", "bm25", "run"))
        _require(
            bool(self.sources) and len(set(self.sources)) == len(self.sources),
            f"mine.sources ({self.sources}) must name one or more of model, bm25, run, each once",
        )
        _require(
            self.run is None or "run" in self.sources,
            f"mine.run ({self.run}) is not read: mine.sources ({self.sources}) has no run; add it,"
            " e.g. 'mine.sources=[run]'",
        )
        limits = [k for k in ("margin", "max_score", "min_score") if getattr(self, k) is not None]
        _require(
            len(self.sources) == 1 or self.model is not None or not limits,
            f"mine.{limits[0] if limits else ''} needs one scale of scores: set mine.model, or one"
            f" of mine.sources ({self.sources})",
        )
        _require(self.num_negatives >= 1, f"mine.num_negatives ({self.num_negatives}) must be >= 1")
        _require(
            1 <= self.first_rank <= self.last_rank,
            f"mine.first_rank ({self.first_rank}) and mine.last_rank ({self.last_rank}) must"
            " satisfy 1 <= first <= last",
        )
        _require(
            self.fraction is None or 0 < self.fraction <= 2,
            f"mine.fraction ({self.fraction}) must be in (0, 2]; null: none; 0.95 is common",
        )
        _require(
            self.near_duplicate is None or 0 < self.near_duplicate <= 1,
            f"mine.near_duplicate ({self.near_duplicate}) must be in (0, 1]; null: none",
        )
        _require(
            self.min_score is None or self.max_score is None or self.min_score <= self.max_score,
            f"mine.min_score ({self.min_score}) must be <= mine.max_score ({self.max_score})",
        )
        _require(
            self.reranker is not None or self.veto_above in (None, type(self).veto_above),
            f"mine.veto_above ({self.veto_above}) is not read without"
            " mine.reranker=<cross-encoder>",
        )
        _require(
            self.veto_above is None or 0 <= self.veto_above <= 1,
            f"mine.veto_above ({self.veto_above}) is a probability, in [0, 1]; null: no veto",
        )
        _one_of("mine.choice", self.choice, ("top", "sample"))


@dataclass
class TrainConfig:
    name: str = "run"  # runs/<name>/<overrides>/seed<k>/
    seed: int = 0
    task: str = "retrieval"  # retrieval | rerank
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
    # ANCE: every mine_every steps the model mines negatives anew among the training passages, by
    # the limits of mine (its sources, models and corpus are not used); 0: never
    mine_every: int = 0
    mine: MineConfig = field(default_factory=MineConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        _one_of("task", self.task, ("retrieval", "rerank"))
        is_rerank = self.task == "rerank"
        fitting = RERANK_LOSSES if is_rerank else CONTRASTIVE_LOSSES + SCORE_LOSSES
        _require(
            self.loss.kind in fitting,
            f"loss.kind={self.loss.kind} does not fit task={self.task}; use one of"
            f" {', '.join(fitting)}",
        )
        _require(
            not (self.mine_every and (self.loss.guide or self.loss.teacher)),
            f"mine_every ({self.mine_every}) brings passages that loss.guide and loss.teacher have"
            " not encoded; set one of them only",
        )
        _require(
            not self.mine_every or not (is_rerank or self.loss.learns_scores),
            f"mine_every ({self.mine_every}) mines by a retriever's own embeddings; with"
            f" task={self.task} loss.kind={self.loss.kind} set it to 0",
        )
        changed = [
            f.name
            for f in fields(self.mine)
            if getattr(self.mine, f.name) != getattr(MineConfig(), f.name)
        ]
        of_prepare = ("sources", "model", "run", "corpus", "reranker")
        unread = [key for key in changed if key in of_prepare]
        _require(
            not unread,
            f"mine.{unread[0] if unread else ''} is not read by train.py, where the model mines by"
            " itself among the training passages (mine_every); mine with prepare.py instead",
        )
        _require(
            not changed or self.mine_every != 0,
            f"mine.{changed[0] if changed else ''} is not read without mine_every=<steps>: with 0,"
            " no negatives are mined while the model is trained",
        )
        for name, source in (self.data.sets or {"": self.data}).items():
            key = f"data.sets.{name}" if name else "data"
            _require(
                is_rerank or self.loss.learns_scores or source.texts is None,
                f"{key}.texts={source.texts} is for task=rerank and losses of a teacher's scores;"
                f" a retriever trains on the BEIR folder itself, {key}.root={source.texts}",
            )
        for key in ("random_negatives", "curriculum"):
            value = getattr(self.data, key)
            _require(
                is_rerank or not value, f"data.{key} ({value}) is of groups, which task=rerank has"
            )
        _require(all(d > 0 for d in self.dims), f"dims ({self.dims}) must be positive")
        for key, dims in (("dims", self.dims), ("loss.dims", self.loss.dims)):
            _require(
                not (is_rerank and dims), f"{key} ({dims}) are a retriever's; a reranker has none"
            )
        _require(
            is_rerank or self.optim.head_lr is None,
            f"optim.head_lr ({self.optim.head_lr}) is of a reranker's head (task=rerank)",
        )
        _require(
            self.loss.learn_temperature
            or self.loss.kind == "sigmoid"  # its bias is learned
            or self.optim.temperature_lr == OptimConfig().temperature_lr,
            f"optim.temperature_lr ({self.optim.temperature_lr}) is not read where the loss learns"
            " nothing of its own; set loss.learn_temperature=true",
        )
        _require(
            (self.model.num_labels > 1) == (self.loss.kind == "cross_entropy"),
            f"model.num_labels ({self.model.num_labels}) above 1 and loss.kind=cross_entropy go"
            f" together, got loss.kind={self.loss.kind}",
        )
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
        for key in ("eval_every", "save_every", "early_stopping", "examples_shown", "mine_every"):
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
    model: str = MISSING  # run directory, model folder or hub id; bm25, random, or a run file
    data: str = MISSING  # BEIR folder, or anything data.formats reads
    split: str = "test"
    dims: list[int] = field(default_factory=list)  # empty: the full dimension
    precision: Any = "fp32"  # of stored document vectors: fp32 | bf16 | int8 | binary, or a list
    against: str | None = None  # another model, or an eval.json
    # what puts candidates in order (a cross-encoder, or any model where one of these is set)
    first_stage: str | None = None  # bm25 | retriever | run file; data: the data's own candidates
    rerank_k: int = 100  # of the first stage's documents
    also: list[str] = field(
        default_factory=list
    )  # beside the model: bm25 | random | retriever | cross-encoder | eval.json
    # bm25 | retriever | cross-encoder whose scores of the same candidates are averaged with the
    # model's, standardised by query: one more row (evals/fusion.py)
    fuse: str | None = None
    fuse_weight: float | None = None  # the model's share, in [0, 1]; null: the best on split dev
    texts: str | None = None  # BEIR folder that holds the texts, where data= is rows of ids
    latency_queries: int = 20  # timed one at a time, for a cross-encoder
    out: str | None = None  # folder for eval.json and run.trec
    bm25: bool = True
    top_k: int = 100
    seed: int = 0  # of the bootstrap
    # put before texts by retrievers whose folder names none, such as the hub's E5: "query: "
    query_prompt: str | None = None
    passage_prompt: str | None = None
    encode_precision: str = "auto"  # auto | fp32 | bf16, of the encoder
    batch_tokens: int = 0  # tokens encoded at once; 0: chosen by device
    device: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: str = "error"  # error | skip (counted, and listed in out=/bad_rows.jsonl)

    @property
    def precisions(self) -> list[str]:
        return self.precision if isinstance(self.precision, list) else [self.precision]

    def __post_init__(self) -> None:
        _one_of("on_bad_row", self.on_bad_row, ("error", "skip"))
        for precision in self.precisions:
            _one_of("precision", precision, ("fp32", "bf16", "int8", "binary"))
        _require(
            0 < len(self.precisions) == len(set(self.precisions)),
            f"precision ({self.precision}) must be one, or a list of different ones",
        )
        if len(self.precisions) == 1:  # a list of one is one: the same eval.json
            self.precision = self.precisions[0]
        _one_of("encode_precision", self.encode_precision, ("auto", "fp32", "bf16"))
        _one_of("device", self.device, ("auto", "cpu", "cuda", "mps"))
        _require(self.top_k >= 10, f"top_k ({self.top_k}) must be >= 10")
        _require(all(d > 0 for d in self.dims), f"dims ({self.dims}) must be positive")
        _require(self.rerank_k >= 1, f"rerank_k ({self.rerank_k}) must be >= 1")
        _require(
            self.fuse_weight is None or (self.fuse is not None and 0 <= self.fuse_weight <= 1),
            f"fuse_weight ({self.fuse_weight}) must be in [0, 1], and goes with fuse=<model>",
        )
        _require(
            self.fuse is None or self.fuse != self.model,
            f"fuse ({self.fuse}) is the model itself: name another",
        )
        _require(
            self.latency_queries >= 0, f"latency_queries ({self.latency_queries}) must be >= 0"
        )


@dataclass
class FilterConfig:
    """Which (query, passage) pairs stay (data/filters.py). Bounds are [low, high], both allowed;
    [] and null: not asked.
    """

    query_words: list[int] = field(default_factory=lambda: [2, 200])
    passage_words: list[int] = field(default_factory=lambda: [3, 5000])
    query_chars: list[int] = field(default_factory=list)
    passage_chars: list[int] = field(default_factory=list)
    query_tokens: list[int] = field(default_factory=list)
    passage_tokens: list[int] = field(default_factory=list)
    tokenizer: str | None = None  # model (folder, hub id, run) that counts the tokens
    length_ratio: list[float] = field(default_factory=list)  # words of the query / of the passage
    overlap: list[float] = field(default_factory=list)  # share of the query's words in the passage
    script: str | None = None  # as Unicode names it: Latin, Arabic, Cyrillic, Cjk
    min_script_share: float = 0.7  # of the letters of each text
    language: str | None = None  # en | tr | ar | fa
    min_language_share: float = 0.7  # of the words of each text
    question: str = "any"  # any | only (the query asks) | never
    answer_column: str | None = None  # of the data: a text, or several, one of them in the passage
    copies: bool = False  # keep pairs whose query is the passage
    max_symbol_share: float | None = 0.3  # of the characters: no letter, mark, digit, space
    max_digit_share: float | None = None  # of letters and digits
    max_repeated_share: float | None = 0.5  # of three-word sequences that came before in the text
    boilerplate: bool = False  # keep texts with phrases of web pages around the text
    boilerplate_phrases: list[str] = field(default_factory=list)  # more of them
    near_duplicate: float | None = 0.9  # both texts this similar to those of an earlier pair
    near_query: float | None = None  # the query this similar to that of an earlier pair
    # models: a bi-encoder for the two cosines, a cross-encoder for the probability
    model: str | None = None
    min_similarity: float | None = None  # of query and passage
    max_query_similarity: float | None = None  # of the query and an earlier pair's
    reranker: str | None = None
    min_probability: float = 0.85

    def __post_init__(self) -> None:
        for f in fields(self):
            bounds = getattr(self, f.name)
            if not isinstance(bounds, list) or f.name == "boilerplate_phrases":
                continue
            ok = not bounds or (len(bounds) == 2 and 0 <= bounds[0] <= bounds[1])
            _require(
                ok, f"filter.{f.name} ({bounds}) must be [low, high] with 0 <= low <= high, or []"
            )
        for key in (
            "min_script_share", "min_language_share", "max_symbol_share", "max_digit_share",
            "max_repeated_share", "near_duplicate", "near_query", "min_probability",
        ):  # fmt: skip
            value = getattr(self, key)
            least = key.startswith("near_")  # everything is similar by 0
            _require(
                value is None or (0 < value <= 1 if least else 0 <= value <= 1),
                f"filter.{key} ({value}) must be in {'(' if least else '['}0, 1]",
            )
        for key in ("min_similarity", "max_query_similarity"):
            value = getattr(self, key)
            _require(
                value is None or -1 <= value <= 1,
                f"filter.{key} ({value}) is a cosine, in [-1, 1]; null: not asked",
            )
            _require(
                value is None or self.model is not None,
                f"filter.{key} needs filter.model=<folder, hub id or run>",
            )
        _require(
            self.model is None
            or self.min_similarity is not None
            or self.max_query_similarity is not None,
            f"filter.model ({self.model}) filters nothing without filter.min_similarity or"
            " filter.max_query_similarity, a cosine",
        )
        _require(
            self.tokenizer is not None or not (self.query_tokens or self.passage_tokens),
            "filter.query_tokens and filter.passage_tokens need filter.tokenizer=<model>",
        )
        _require(
            self.tokenizer is None or bool(self.query_tokens or self.passage_tokens),
            f"filter.tokenizer ({self.tokenizer}) counts nothing without filter.query_tokens or"
            " filter.passage_tokens, [low, high]",
        )
        for key, needed, example in (
            ("min_script_share", "script", "Latin"), ("min_language_share", "language", "en"),
        ):  # fmt: skip
            share = getattr(self, key)
            _require(
                getattr(self, needed) is not None or share == getattr(type(self), key),
                f"filter.{key} ({share}) is not read without filter.{needed}, e.g. {example}",
            )
        _require(
            self.reranker is not None or self.min_probability == type(self).min_probability,
            f"filter.min_probability ({self.min_probability}) is not read without"
            " filter.reranker=<cross-encoder>; the limit of stage validate is"
            " validate.min_probability",
        )
        _one_of("filter.question", self.question, ("any", "only", "never"))
        if self.language is not None:
            _one_of("filter.language", self.language, ("en", "tr", "ar", "fa"))


@dataclass
class ValidateConfig:
    """Out-of-fold validation: a cross-encoder trained on the pairs of the other folds judges each
    fold's (data/validate.py).
    """

    base: str | None = None  # what the judges start from: encoder folder, hub id or run
    pooling: str | None = None  # mean | cls; null: as the base
    max_pair_length: int | None = 256  # tokens of query and passage together
    freeze: list[str] = field(default_factory=list)  # embeddings | layers:<n>
    folds: int = 5
    num_negatives: int = 4  # a pair and step: own ones first, then random passages
    epochs: float = 2.0
    batch_size: int = 16  # pairs a step, each with its negatives
    lr: float = 5e-5
    head_lr: float = 1e-3
    warmup: float = 0.1  # share of the steps
    chunk_tokens: int = 4096  # trained at once; does not change the result
    min_probability: float = 0.85  # pairs below are dropped
    # share of the pairs whose passage is replaced, on record, by another one before the judges are
    # trained: the report then says what share of good and of bad pairs is kept
    corrupt: float = 0.0

    def __post_init__(self) -> None:
        if self.pooling is not None:
            _one_of("validate.pooling", self.pooling, ("mean", "cls"))
        _require(
            self.max_pair_length is None or self.max_pair_length >= 32,
            f"validate.max_pair_length ({self.max_pair_length}) must be >= 32 tokens",
        )
        _require(self.folds >= 2, f"validate.folds ({self.folds}) must be >= 2")
        for key in ("num_negatives", "batch_size", "chunk_tokens"):
            _require(getattr(self, key) >= 1, f"validate.{key} ({getattr(self, key)}) must be >= 1")
        for key in ("epochs", "lr", "head_lr"):
            _require(getattr(self, key) > 0, f"validate.{key} ({getattr(self, key)}) must be > 0")
        _require(0 <= self.warmup < 1, f"validate.warmup ({self.warmup}) must be in [0, 1)")
        _require(
            0 <= self.min_probability <= 1,
            f"validate.min_probability ({self.min_probability}) must be in [0, 1]",
        )
        _require(0 <= self.corrupt < 1, f"validate.corrupt ({self.corrupt}) must be in [0, 1)")


@dataclass
class ScoreConfig:
    """Whose scores are written beside the passages of each row (data/score.py)."""

    model: str | None = None  # the teacher: cross-encoder or retriever; run, folder or hub id
    texts: str | None = None  # BEIR folder with the texts of data's ids, as data.texts of train.py
    scale: float = 1.0  # times every score: margin_mse learns differences of cosines as they are

    def __post_init__(self) -> None:
        _require(self.scale > 0, f"score.scale ({self.scale}) must be > 0")


@dataclass
class TripletsConfig:
    """Rows of one query, one positive, one negative (data/triplets.py)."""

    max_negatives: int = 1  # triplets a positive, with the first negatives of its row

    def __post_init__(self) -> None:
        _require(
            self.max_negatives >= 1, f"triplets.max_negatives ({self.max_negatives}) must be >= 1"
        )


@dataclass
class PartsConfig:
    """Stage split: shares of the rows held out; rows that share a text stay together."""

    dev_fraction: float = 0.1
    test_fraction: float = 0.0

    def __post_init__(self) -> None:
        dev, test = self.dev_fraction, self.test_fraction
        _require(
            0 <= dev < 1 and 0 <= test < 1 and dev + test < 1,
            f"parts.dev_fraction ({dev}) and parts.test_fraction ({test}) must be in [0, 1),"
            " together below 1",
        )


@dataclass
class PrepareConfig:
    """Settings of prepare.py: what its stages share, then a section a stage."""

    stages: list[str] = field(default_factory=list)  # in order; prepare.STAGES has them
    data: str = MISSING  # BEIR folder, or anything data.formats reads
    out: str = MISSING  # folder for <stage>.jsonl, report.json and report.md
    split: str = "train"  # of data; a file of rows alone has none
    columns: dict[str, str] = field(default_factory=dict)  # of data, as data.columns of train.py
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"  # auto | fp32 | bf16, of every model
    batch_tokens: int = 0  # tokens encoded at once; 0: chosen by device
    cache_dir: str = "artifacts/cache"
    mine: MineConfig = field(default_factory=MineConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    triplets: TripletsConfig = field(default_factory=TripletsConfig)
    parts: PartsConfig = field(default_factory=PartsConfig)  # of the stage split

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        _one_of("device", self.device, ("auto", "cpu", "cuda", "mps"))
        _require(self.seed >= 0, f"seed ({self.seed}) must be >= 0")
        _require(self.batch_tokens >= 0, f"batch_tokens ({self.batch_tokens}) must be >= 0")


def known_keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of every setting under dataclass `cls`; a mapping counts as one name."""
    keys = []
    hints = get_type_hints(cls)
    for f in fields(cls):
        kind = hints[f.name]
        keys += known_keys(kind, f"{prefix}{f.name}.") if is_dataclass(kind) else [prefix + f.name]
    return keys
