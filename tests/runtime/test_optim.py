"""Schedules and parameter groups."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from conf.schema import LossConfig, ModelConfig, OptimConfig, TrainConfig
from losses.build import build_loss
from losses.infonce import InfoNCE
from models.build import build_model
from runtime.optim import build_optimizer, decay_groups, lr_at, num_warmup_steps, set_lr


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_equals_transformers_after_warmup(schedule):
    """The decay from peak to zero against transformers' scheduler objects (its warmup begins at 0,
    ours at lr / n)."""
    c = OptimConfig(lr=1.0, schedule=schedule, warmup=5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[
        schedule
    ]
    theirs: LambdaLR = make(optimizer, 5, 40)
    for step in range(40):
        if step >= 5:
            assert lr_at(step, 40, c) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_warmup_is_a_share_or_a_number_of_steps():
    """0.1 and 10 mean different things; one warmup step is the peak at once."""
    assert num_warmup_steps(95, OptimConfig(warmup=0.1)) == 10
    assert num_warmup_steps(95, OptimConfig(warmup=10)) == 10
    assert num_warmup_steps(5, OptimConfig(warmup=10)) == 5
    c = OptimConfig(lr=2.0, warmup=4, schedule="constant")
    assert [lr_at(s, 100, c) for s in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    floor = OptimConfig(lr=2.0, warmup=0, schedule="linear", min_lr_ratio=0.5)
    assert lr_at(99, 100, floor) == pytest.approx(1.01)


def test_only_matrices_decay_and_everything_is_in_one_group(tiny_base):
    """Decay on a bias, a norm or the temperature, or a parameter in two groups, trains something
    else."""
    towers = build_model(ModelConfig(base=str(tiny_base)), dims=[])
    loss_fn = InfoNCE(LossConfig(learn_temperature=True))
    optimizer = build_optimizer(towers, loss_fn, OptimConfig(weight_decay=0.1))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    names = [*towers.named_parameters(), *loss_fn.named_parameters()]
    assert len(decays) == sum(len(g["params"]) for g in optimizer.param_groups) == len(names)
    for name, parameter in names:
        is_matrix = parameter.ndim == 2
        assert decays[id(parameter)] == (0.1 if is_matrix else 0.0), name


def test_layer_decay_falls_from_the_top_down(tiny_base):
    """Top layer x 0.5, the one below x 0.25, embeddings x 0.125; what lies above the layers keeps
    the full rate."""
    c = ModelConfig(base=str(tiny_base))
    c.projection.dim = 8
    towers = build_model(c, dims=[])
    factor = {
        id(p): g["lr_factor"]
        for g in decay_groups(towers, InfoNCE(LossConfig()), OptimConfig(layer_decay=0.5))
        for p in g["params"]
    }
    of = {name.replace("query.", "", 1): factor[id(p)] for name, p in towers.named_parameters()}
    assert of["projections.0.linear.weight"] == 1.0
    assert of["encoder.layers.1.mlp.up.weight"] == 0.5
    assert of["encoder.layers.0.mlp.up.weight"] == 0.25
    assert of["encoder.embeddings.word.weight"] == 0.125


def test_temperature_has_a_rate_of_its_own_and_follows_the_schedule(tiny_base):
    """The temperature's rate is a setting; the schedule scales it with the others."""
    loss_fn = InfoNCE(LossConfig(learn_temperature=True))
    c = OptimConfig(lr=1e-4, temperature_lr=1e-2)
    optimizer = build_optimizer(build_model(ModelConfig(base=str(tiny_base)), dims=[]), loss_fn, c)
    set_lr(optimizer, 0.5e-4)
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.5e-2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-4)


def test_rates_that_nothing_would_read_are_refused():
    """They named the run's folder and changed nothing in it."""
    with pytest.raises(ValueError, match=r"min_lr_ratio \(0\.1\) is not read by .*=constant"):
        OptimConfig(schedule="constant", min_lr_ratio=0.1)
    optim = OptimConfig(temperature_lr=1e-2)
    with pytest.raises(ValueError, match=r"temperature_lr \(0\.01\) is not read .*learn_temp"):
        TrainConfig(optim=optim)
    assert not list(build_loss(LossConfig()).parameters())
    for loss in (LossConfig(learn_temperature=True), LossConfig(kind="sigmoid")):
        assert list(build_loss(loss).parameters())
        assert TrainConfig(optim=optim, loss=loss).optim.temperature_lr == 1e-2


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("bound", [0.05, 0.2])
def test_a_temperature_at_its_bound_can_come_back(kind, bound, tiny_base):
    """Steps that push outwards end at the bound; the first ones that pull inwards move it. Past a
    bound there would be no gradient, and no way back."""
    c = LossConfig(kind=kind, learn_temperature=True, temperature_min=0.05, temperature_max=0.2,
                   temperature=bound)  # fmt: skip
    loss_fn = build_loss(c)
    model = build_model(ModelConfig(base=str(tiny_base)), dims=[])
    c = OptimConfig(temperature_lr=0.1)
    optimizer = build_optimizer(model, loss_fn, c)
    set_lr(optimizer, c.lr)

    def push(direction: float) -> float:
        optimizer.zero_grad()
        (-direction * loss_fn.temperature).backward()  # against the gradient: towards direction
        assert loss_fn.log_temperature.grad != 0
        optimizer.step()
        return loss_fn.temperature.item()

    out = 1.0 if bound == 0.2 else -1.0
    assert [push(out) for _ in range(3)] == [pytest.approx(bound)] * 3
    moved = [push(-out) for _ in range(12)][-1]
    assert 0.05 <= moved <= 0.2 and (moved - bound) * out < -0.01


def test_nothing_left_to_train_is_refused(tiny_base):
    """Everything frozen: AdamW's own message would not name the setting."""
    c = ModelConfig(base=str(tiny_base), towers="dual", freeze=["query_tower", "passage_tower"])
    with pytest.raises(ValueError, match=r"model\.freeze"):
        build_optimizer(build_model(c, dims=[]), InfoNCE(LossConfig()), OptimConfig())
