"""Any transformers architecture behind our Encoder's interface: pad, call AutoModel, pack again."""

# Shapes: T tokens of all sequences together, S sequences, L longest sequence, C hidden

import inspect
import logging
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from models.transformer import Packed

log = logging.getLogger(__name__)

# Names under which configs keep dropout of hidden states and of attention probabilities.
HIDDEN_DROPOUT = (
    "hidden_dropout_prob",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "dropout",
    "dropout_rate",
)
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


# Stored beside an encoder and not needed: what transformers' classes with a head put on top of
# their base model, by the first part of the name ...
HEADS = frozenset(
    "answer_head classification_head classifier cls contact_head decoder dense"
    " discriminator_predictions embed_out entity_predictions final_logits_bias generator_lm_head"
    " generator_predictions head lm_head lm_loss lm_predictions logits_proj mask_predictions"
    " mlm_head mtp output_projection pooler pre_classifier pred_layer predictions"
    " projection_head qa_classifier qa_outputs score sequence_summary sop_classifier"
    " splinter_qass vocab_layer_norm vocab_projector vocab_transform".split()
)
# ... and what older versions stored: positions, causal masks, rotary angles, DeBERTa's config, and
# the share of its generator in embeddings of which `weight` is the sum.
BUFFERS = re.compile(
    r"^config$|(^|\.)(position_ids|token_type_ids|inv_freq|cos_cached|sin_cached"
    r"|embed_positions\.weights|(word|position)_embeddings\._weight"
    r"|(attn|attention)\.(bias|masked_bias))$"
)


class AutoEncoder(nn.Module):
    """forward(packed) -> hidden_TC, computed by transformers on a padded rectangle.

    padding_side  left | right, as the tokenizer says; but for rounding, results do not depend on it
    """

    def __init__(self, model: PreTrainedModel, *, padding_side: str = "right"):
        super().__init__()
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side ({padding_side!r}) must be left or right")
        self.model = model
        self.padding_side = padding_side
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._position_offset = _position_offset(model)
        self._checkpoints = False

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dropout: float | None,
        attention_dropout: float,
        padding_side: str = "right",
    ) -> "AutoEncoder":
        """AutoModel of a folder in float32; the encoder alone where the model has a decoder too.

        dropout, attention_dropout  as in ModelConfig
        Raises ValueError when transformers cannot load the folder, when weights are missing from
        it, and when it holds some, beside heads and buffers, that the model has no place for.
        """
        transformers_logging.disable_progress_bar()

        def call(load, *args, **options):
            try:
                options |= {"local_files_only": True, "trust_remote_code": False}
                return load(folder, *args, **options)
            except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
                reason = str(error).strip().split("\n")[0]
                if "trust_remote_code" in str(error):  # its advice is a setting that we do not have
                    reason = "the model needs custom code, which is not run; name another model"
                raise ValueError(f"{folder}: transformers cannot load it: {reason}") from error

        config = call(AutoConfig.from_pretrained)
        _set_known(config, ATTENTION_DROPOUT, attention_dropout)
        if dropout is not None and not _set_known(config, HIDDEN_DROPOUT, dropout):
            raise ValueError(
                f"model.dropout ({dropout}): {config.model_type} has no hidden dropout"
            )
        auto = AutoModelForTextEncoding if _is_encoder_alone(config) else AutoModel
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        model, info = call(auto.from_pretrained, **options)
        missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
        if missing:
            raise ValueError(f"{folder}: {_first_five(missing, 'missing weights')}")
        _reject_unexpected(folder, model, info["unexpected_keys"])
        return cls(model, padding_side=padding_side)

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def max_positions(self) -> int | None:
        """Longest sequence in tokens; None when the architecture has no limit."""
        rows = getattr(self.model.config, "max_position_embeddings", None)
        return None if rows is None or rows < 0 else rows - self._position_offset

    @property
    def embeddings(self) -> nn.Module:
        return getattr(self.model, "embeddings", None) or self.model.get_input_embeddings()

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, from the input up."""
        count = self.model.config.num_hidden_layers
        found = [
            m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == count
        ]
        if not found:
            raise ValueError(
                f"model.freeze: found no list of {count} layers in {type(self.model).__name__}"
            )
        return found[0]

    @property
    def activation_checkpointing(self) -> bool:
        return self._checkpoints

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        elif self._checkpoints:
            self.model.gradient_checkpointing_disable()
        self._checkpoints = on

    def forward(self, packed: Packed) -> Tensor:
        length_S = torch.tensor(packed.lengths, device=packed.ids_T.device)
        longest = max(packed.lengths)
        if self.max_positions is not None and longest > self.max_positions:
            raise ValueError(
                f"a text of {longest} tokens exceeds the model's {self.max_positions} positions;"
                " lower model.max_query_length or model.max_passage_length"
            )
        column_T = packed.position_T
        if self.padding_side == "left":
            column_T = column_T + (longest - length_S)[packed.segment_T]
        place = (packed.segment_T, column_T)
        shape = (len(packed.lengths), longest)
        pad_id = self.model.config.pad_token_id  # any id will do: the mask hides it
        ids_SL = packed.ids_T.new_full(shape, 0 if pad_id is None else pad_id).index_put_(
            place, packed.ids_T
        )
        mask_SL = torch.zeros_like(ids_SL).index_put_(place, torch.ones_like(packed.ids_T))
        more = {}
        if packed.types_T is not None:
            more["token_type_ids"] = torch.zeros_like(ids_SL).index_put_(place, packed.types_T)
        if (
            self.padding_side == "left" and self._takes_positions
        ):  # else position 0 would be padding
            more["position_ids"] = torch.zeros_like(ids_SL).index_put_(
                place, packed.position_T + self._position_offset
            )
        if "use_cache" in self.model.config.to_dict():
            more["use_cache"] = False
        hidden_SLC = self.model(input_ids=ids_SL, attention_mask=mask_SL, **more).last_hidden_state
        return hidden_SLC[place]


def _is_encoder_alone(config) -> bool:
    """Whether the encoder is to be taken out of an architecture that has a decoder too: the folder
    holds both, or was saved from the encoder alone, as T5EncoderModel is."""
    if config.is_encoder_decoder:
        return True
    encoder = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type, "")
    return encoder.endswith("EncoderModel") and encoder in (config.architectures or [])


def _reject_unexpected(folder: Path, model: PreTrainedModel, keys: Iterable[str]) -> None:
    """ValueError that names stored weights without a place in `model`: results would be wrong."""
    parts = {name for name, _ in model.named_children()} - {"pooler"}
    unknown, known = [], []
    for key in sorted(keys):
        first = key.removeprefix(f"{model.base_model_prefix}.").split(".")[0]
        is_head = first in HEADS and first not in parts  # OPT's body is called decoder
        (known if is_head or BUFFERS.search(key) else unknown).append(key)
    if unknown:
        raise ValueError(
            f"{folder}: {_first_five(unknown, 'unexpected weights')}: {type(model).__name__} of"
            f" transformers {version('transformers')} with this config.json does not use them, so"
            " its results would not be the stored model's. Correct config.json; or, where they are"
            " not needed, AutoModel.from_pretrained(...).save_pretrained(<new folder>) drops them"
        )
    if known:
        log.info("%s: stored weights not needed: %s", folder, ", ".join(known))


def _first_five(keys: list[str], what: str) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{len(keys)} {what}: {', '.join(keys[:5])}{more}"


def _position_offset(model: nn.Module) -> int:
    """First position id: RoBERTa's relatives keep the rows up to padding_idx for padding."""
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(
            getattr(module, "position_embeddings", None), nn.Embedding
        ):
            return padding + 1
    return 0


def _set_known(config, names: tuple[str, ...], value: float) -> bool:
    found = [n for n in names if hasattr(config, n)]
    for name in found:
        setattr(config, name, value)
    return bool(found)
