"""The packed encoder against transformers, on ragged batches: hidden states and parameter
gradients."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from models import attention
from models.attention import (
    DRAWN_TOGETHER,
    ENOUGH,
    Drawn,
    GroupedAttention,
    length_groups,
    length_multiple,
)
from models.pretrained import load_encoder
from models.towers import pool
from models.transformer import (
    Dropout,
    GeluDown,
    Linear,
    pack,
    ready_to_encode,
    relative_bucket,
)

LENGTHS = [61, 37, 37, 20, 5, 5, 5, 1]
BOUND = 2e-5  # the issue's; fp32 sums of a few hundred terms differ by a few 1e-6 at most


def save_tiny(layout: str, folder) -> None:
    """A small random model of each layout, saved by transformers itself."""
    import transformers as hf

    common = dict(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=80,
    )
    torch.manual_seed(0)
    model = {
        "bert": lambda: hf.BertModel(hf.BertConfig(**common), add_pooling_layer=False),
        "xlm-roberta": lambda: hf.XLMRobertaModel(
            hf.XLMRobertaConfig(**common, pad_token_id=1), add_pooling_layer=False
        ),
        "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**common), add_pooling_layer=False),
        "modernbert": lambda: hf.ModernBertModel(
            hf.ModernBertConfig(
                **common,
                local_attention=16,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=1,
                cls_token_id=2,
                sep_token_id=1,
            )
        ),
    }[layout]()
    with torch.no_grad():  # the usual initial spread of .02 would leave attention uniform
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embeddings" not in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)


def random_texts(vocab: int = 99) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, vocab, n) for n in LENGTHS]


def hf_hidden(model, texts) -> torch.Tensor:
    """Hidden states of the real tokens, packed, from a padded batch."""
    pad = model.config.pad_token_id or 0
    ids = torch.full((len(texts), max(map(len, texts))), pad)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.from_numpy(text)
        mask[row, : len(text)] = 1
    return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]


@pytest.mark.parametrize("layout", ["bert", "xlm-roberta", "mpnet", "modernbert"])
@pytest.mark.parametrize("way", ["grouped", "padded"])
def test_hidden_states_and_gradients_equal_transformers(layout, way, tmp_path, monkeypatch):
    """A wrong position offset, window, bias bucket or fused-qkv order shows here and nowhere
    earlier."""
    from transformers import AutoModel

    save_tiny(layout, tmp_path)
    theirs = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ours = load_encoder(tmp_path)[0].eval()
    monkeypatch.setattr("models.attention.choose_attention", lambda *a, **k: way)
    texts = random_texts()
    hidden_TC, expected_TC = ours(pack(texts)), hf_hidden(theirs, texts)
    assert (hidden_TC - expected_TC).abs().max() <= BOUND

    weight_TC = torch.randn(expected_TC.shape, generator=torch.Generator().manual_seed(1)) / 10
    (hidden_TC * weight_TC).sum().backward()
    (expected_TC * weight_TC).sum().backward()
    theirs_by_size = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        reference = _matching_gradient(name, theirs_by_size)
        if reference is not None:
            error = (parameter.grad - reference).abs().max() / max(1.0, reference.abs().max())
            assert error <= BOUND, name
            compared += 1
    assert compared == len(list(ours.parameters()))


def _matching_gradient(name: str, theirs: dict) -> torch.Tensor | None:
    """The gradient of transformers' weight(s) behind one of our names; spelled out here, not read
    from our map."""
    words = name.split(".")
    if words[0] == "embeddings":
        keys = {
            "word": ("word_embeddings", "tok_embeddings"),
            "position": ("position_embeddings",),
            "token_type": ("token_type_embeddings",),
            "norm": ("LayerNorm", "norm"),
        }[words[1]]
        return next(
            theirs[f"embeddings.{k}.{words[2]}"].grad
            for k in keys
            if f"embeddings.{k}.{words[2]}" in theirs
        )
    if words[0] == "relative_bias":
        return theirs["encoder.relative_attention_bias.weight"].grad
    if words[0] == "final_norm":
        return theirs["final_norm.weight"].grad
    number, part, kind = words[1], ".".join(words[2:-1]), words[-1]
    modern = {
        "attention.qkv": "attn.Wqkv",
        "attention.out": "attn.Wo",
        "mlp.up": "mlp.Wi",
        "mlp.down": "mlp.Wo",
        "attention_norm": "attn_norm",
        "mlp_norm": "mlp_norm",
    }
    if f"layers.{number}.{modern[part]}.{kind}" in theirs:
        return theirs[f"layers.{number}.{modern[part]}.{kind}"].grad
    layer = f"encoder.layer.{number}"
    if part == "attention.qkv":
        for names in (
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        ):
            if f"{layer}.{names[0]}.{kind}" in theirs:
                return torch.cat([theirs[f"{layer}.{n}.{kind}"].grad for n in names])
    choices = {
        "attention.out": ("attention.output.dense", "attention.attn.o"),
        "attention_norm": ("attention.output.LayerNorm", "attention.LayerNorm"),
        "mlp.up": ("intermediate.dense",),
        "mlp.down": ("output.dense",),
        "mlp_norm": ("output.LayerNorm",),
    }[part]
    return next(
        theirs[f"{layer}.{c}.{kind}"].grad for c in choices if f"{layer}.{c}.{kind}" in theirs
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("multiple", [1, 4])  # 4: rectangles with padding
@pytest.mark.parametrize("half_window", [0, 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_grouped_attention_gradient_equals_finite_differences(
    half_window, with_bias, multiple, dropout
):
    """The backward is written by hand: finite differences in float64 are the judge, bias, window,
    padding and dropout included."""
    lengths = [7, 7, 5, 4, 1]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(
        sum(lengths), 3, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True
    )
    bias = None
    if with_bias:
        bias = torch.randn(2, 7, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    groups = length_groups(lengths, multiple)

    def attention(qkv, bias):
        torch.manual_seed(3)  # the same masks each time
        return GroupedAttention.apply(qkv, bias, groups, half_window, dropout)

    assert gradcheck(attention, (qkv, bias))


@pytest.mark.parametrize("half_window", [0, 3])
@pytest.mark.parametrize("lengths", [[7, 7, 5, 4, 1], [3, 8, 8, 6, 2, 9]])
def test_padded_groups_equal_one_text_at_a_time(lengths, half_window):
    """Padding must add nothing, whatever the order of the lengths: each text's own softmax, written
    out in float64, is the judge."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 3, dtype=torch.float64, generator=generator)
    expected = []
    for part in qkv.split(lengths):
        q, k, v = part.permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / 3**0.5
        at = torch.arange(len(part))
        if half_window:
            scores[:, (at[:, None] - at).abs() > half_window] = -torch.inf
        expected.append((scores.softmax(-1) @ v).transpose(0, 1))
    bias = torch.zeros(2, 12, 12, dtype=torch.float64)
    for multiple in (1, 4):
        for some_bias in (None, bias):  # the fused kernel, and plain products
            groups = length_groups(lengths, multiple)
            found = GroupedAttention.apply(qkv, some_bias, groups, half_window)
            torch.testing.assert_close(found, torch.cat(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [(), ("forward",), ("forward", "backward")])
@pytest.mark.parametrize("half_window", [0, 3])
def test_bf16_attention_rounds_once_or_twice(fused, half_window, monkeypatch):
    """Which directions the fused kernel takes depends on the processor: every choice, on padded
    groups, against float64 from the same rounded numbers."""
    monkeypatch.setattr(attention, "_fused", lambda *_: fused)
    lengths = [40, 40, 37, 20, 5, 1]
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 32).bfloat16().requires_grad_()
    grad = torch.randn(sum(lengths), 2, 32).bfloat16()
    exact = qkv.detach().double().requires_grad_()
    parts = []
    for part in exact.split(lengths):
        q, k, v = part.permute(1, 2, 0, 3)
        scores = q @ k.mT / 32**0.5
        at = torch.arange(len(part))
        if half_window:
            scores = scores.masked_fill((at[:, None] - at).abs() > half_window, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    out = GroupedAttention.apply(qkv, None, length_groups(lengths, 32), half_window)
    out.backward(grad)
    torch.cat(parts).backward(grad.double())
    for found, expected in ((out.detach(), torch.cat(parts).detach()), (qkv.grad, exact.grad)):
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 2**-7, error  # bf16 rounds to 2**-9; three roundings between in and out


def test_attention_dropout_drops_its_share_and_keeps_the_mean():
    """With equal scores and values of one, an output is the share of its row that was kept, scaled:
    1 on average, and it varies as a binomial's mean does."""
    length, p = 64, 0.3
    qkv = torch.zeros(10 * length, 3, 4, 2)
    qkv[:, 2] = 1
    torch.manual_seed(0)
    out = GroupedAttention.apply(qkv, None, length_groups([length] * 10), 0, p)[..., 0]
    expected_std = (p / (1 - p) / length) ** 0.5
    assert out.mean().item() == pytest.approx(1, abs=5 * expected_std / out.numel() ** 0.5)
    assert out.std().item() == pytest.approx(expected_std, rel=0.1)  # 2,560 rows: 1.4% rounding
    assert len({tuple(row) for row in out.T.tolist()}) == 4  # every head has masks of its own


def test_groups_are_filled_up_to_their_area():
    """One group a multiple; a new one where the scores of the next text would not fit."""
    groups = length_groups([256, 250, 230, 64, 40, 33, 32, 5], 32)
    assert [(g.first, g.length, g.lengths) for g in groups] == [
        (0, 256, [256, 250]),
        (506, 256, [230]),
        (736, 64, [64, 40, 33]),
        (873, 32, [32, 5]),
    ]


def test_lengths_of_many_texts_get_groups_of_their_own():
    """Neither padding nor a kernel call for a few texts; lengths outside that multiple are padded
    as ever."""
    lengths = [40, 34, *[20] * ENOUGH, *[18] * ENOUGH]
    groups = length_groups(lengths, 32)
    assert [(g.first, g.length, g.count) for g in groups] == [
        (0, 64, 2),
        (74, 20, ENOUGH),
        (74 + 20 * ENOUGH, 18, ENOUGH),
    ]
    assert length_groups(lengths[:-1], 32)[1].length == 32


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_that_is_ready_rounds_as_bf16_does(bias):
    """Blocked weights are another kernel: float64 is the judge. The block ends with the weights of
    before, also after an error, and what is learned afterwards is seen."""
    torch.manual_seed(0)
    layer = Linear(40, 24, bias=bias)
    x = torch.randn(70, 40)
    weight, x_rounded = layer.weight.detach().bfloat16().double(), x.bfloat16().double()
    exact = x_rounded @ weight.T + (layer.bias.detach().bfloat16().double() if bias else 0)
    keys = set(layer.state_dict())
    bf16 = partial(torch.autocast, "cpu", torch.bfloat16)  # one anew: it keeps what it has cast
    with torch.no_grad():
        with pytest.raises(KeyError), bf16(), ready_to_encode(layer):
            found = layer(x)
            assert set(layer.state_dict()) == keys and found.dtype == torch.bfloat16
            raise KeyError
        assert layer.ready is None
        layer.weight.mul_(2)
        with bf16(), ready_to_encode(layer):
            doubled = layer(x)
    for one, other in ((found, exact), (doubled, 2 * exact - (layer.bias if bias else 0))):
        # at most three roundings to 8 bits: of the product, of the bias, of their sum
        assert (one.double() - other).abs().max() < 3 * 2**-9 * other.abs().max()
    with torch.no_grad(), ready_to_encode(layer):
        assert layer.ready is None and layer(x).dtype == torch.float32  # no autocast: nothing done


def test_gelu_down_gradient_equals_autograd():
    """The activation is computed again in a backward written by hand: autograd's own is the
    judge."""
    generator = torch.Generator().manual_seed(0)
    up, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((6, 5), (3, 5), (3,))
    )
    assert gradcheck(GeluDown.apply, (up, weight, bias))
    ours = torch.autograd.grad(GeluDown.apply(up, weight, bias).sin().sum(), (up, weight, bias))
    plain = F.linear(F.gelu(up), weight, bias).sin().sum()
    for g, e in zip(ours, torch.autograd.grad(plain, (up, weight, bias)), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-14)


def test_bf16_attention_stays_within_rounding_of_float64():
    """The bf16 path is another piece of code (plain bmm): its error must be that of bf16, about
    2^-8, no more."""
    lengths = [40, 35, 33, 9, 9, 3]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 8, dtype=torch.float64, generator=generator)
    groups = length_groups(lengths, length_multiple(torch.bfloat16))
    exact = GroupedAttention.apply(qkv, None, groups, 0)
    rounded = GroupedAttention.apply(qkv.bfloat16(), None, groups, 0).double()
    assert (rounded - exact).abs().max() < 3 * 2**-8 * exact.abs().max()


def test_no_text_sees_another(tmp_path):
    """Packing must be invisible: a text alone and the same text among others give the same hidden
    states."""
    save_tiny("bert", tmp_path)
    encoder = load_encoder(tmp_path)[0].eval()
    texts = random_texts()
    together = encoder(pack(texts)).split(LENGTHS)
    for text, hidden in zip(texts, together, strict=True):
        torch.testing.assert_close(encoder(pack([text])), hidden, rtol=0, atol=2e-6)


def test_activation_checkpointing_changes_nothing(tmp_path):
    """Recomputed layers must draw the same dropout masks and give the same gradients, bit for
    bit."""
    save_tiny("bert", tmp_path)
    gradients = []
    for checkpointing in (False, True):
        encoder = load_encoder(tmp_path)[0].train()
        for module in encoder.modules():
            if isinstance(module, Dropout):
                module.p = 0.3
        encoder.activation_checkpointing = checkpointing
        torch.manual_seed(3)
        encoder(pack(random_texts())).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_stated_share_and_mean(p, dtype):
    """Seven-bit draws and a random cut: the share kept, the scale and the gradient must be those of
    dropout."""
    torch.manual_seed(0)
    layer = Dropout(p).train()
    x = torch.ones(1001, 999, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    kept = (y != 0).double().mean().item()
    # neighbours share a cut, a step of 1 / 128 or none, which varies as the share of a step does
    step = (p * 128) % 1
    variance = p * (1 - p) / x.numel() + step * (1 - step) / 128**2 * DRAWN_TOGETHER / x.numel()
    assert abs(kept - (1 - p)) < 5 * variance**0.5  # five standard errors
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p), dtype=dtype))
    assert torch.equal(x.grad, y.detach())
    assert layer.eval()(x) is x


def test_dropout_masks_are_independent_and_repeat():
    """One draw gives the same mask again; another number or another draw agrees with it where
    chance does, and so do its own neighbours."""
    torch.manual_seed(0)
    first, second, shape = Drawn(0.5), Drawn(0.5), torch.Size([300, 512])
    mask = first.mask(shape, 1)
    assert torch.equal(mask, first.mask(shape, 1))
    others = [first.mask(shape, 2), second.mask(shape, 1), mask.roll(1, 0), mask.roll(1, 1)]
    others += [mask.roll(DRAWN_TOGETHER, 1), mask.roll(8, 1)]
    for other in others:
        same = (mask == other).double().mean().item()
        assert abs(same - 0.5) < 5 * 0.5 / mask.numel() ** 0.5


def test_relative_bucket_equals_transformers():
    """Bucket edges are where an off-by-one hides: all distances up to beyond the maximum."""
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    distance = torch.arange(-600, 601)
    theirs = MPNetEncoder.relative_position_bucket(distance, num_buckets=32)
    assert torch.equal(relative_bucket(distance, 32, 128), theirs)


def test_a_text_longer_than_the_positions_is_refused(tmp_path):
    """Otherwise an index error from deep inside an embedding, or on CUDA a device assert."""
    save_tiny("bert", tmp_path)
    with pytest.raises(ValueError, match="81 tokens exceeds the model's 80 positions"):
        load_encoder(tmp_path)[0](pack([np.ones(81, dtype=np.int64)]))


@pytest.mark.parametrize("how", ["mean", "cls", "last", "max"])
def test_pooling_equals_a_loop(how):
    """Segment sums over a packed vector against one text at a time, prompt tokens left out."""
    packed = pack(random_texts(), skip=np.array([3, 0, 2, 1, 0, 4, 5, 0]))
    hidden_TC = torch.randn(sum(LENGTHS), 6, generator=torch.Generator().manual_seed(0))
    parts = hidden_TC.split(LENGTHS)
    skips = packed.skip_S.tolist()
    for row, (part, skip) in enumerate(zip(parts, skips, strict=True)):
        kept = part[skip:]
        if how == "mean":
            expected = kept.sum(0) / max(1, len(kept))
        else:
            expected = {"cls": kept[0] if len(kept) else part[0], "last": part[-1]}.get(how)
            if how == "max":
                if not len(kept):
                    continue
                expected = kept.max(0).values
        torch.testing.assert_close(pool(hidden_TC, packed, how)[row], expected)


def test_choice_of_attention():
    """One table: dropout and bias leave the fast paths, and only CUDA in 16 bit takes varlen."""
    choose = attention.choose_attention
    assert choose("cpu", torch.float32, bias=False, dropout=0.0) == "grouped"
    assert choose("cpu", torch.float32, bias=True, dropout=0.0) == "grouped"
    assert choose("cpu", torch.float32, bias=False, dropout=0.1) == "grouped"
    assert choose("cuda", torch.bfloat16, bias=False, dropout=0.1) == "padded"
    assert choose("cuda", torch.bfloat16, bias=False, dropout=0.0) == "varlen"
    assert choose("cuda", torch.bfloat16, bias=True, dropout=0.0) == "padded"
    assert choose("cuda", torch.float32, bias=False, dropout=0.0) == "padded"
