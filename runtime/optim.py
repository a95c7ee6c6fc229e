"""AdamW with decay groups and layer-wise rates; the learning rate as a pure function of the
step."""

import math

import torch
from torch import nn

from conf.schema import OptimConfig


def lr_at(step: int, total_steps: int, c: OptimConfig) -> float:
    """Learning rate of a 0-based step.

    Warmup is linear over ceil(warmup) steps and reaches the peak on its last one; the decay reaches
    lr * min_lr_ratio one step after the last.
    """
    warmup = num_warmup_steps(total_steps, c)
    if step < warmup:
        return c.lr * (step + 1) / warmup
    if c.schedule == "constant":
        return c.lr
    done = (step - warmup) / max(1, total_steps - warmup)
    if c.schedule == "linear":
        factor = 1 - done
    else:
        factor = 0.5 * (1 + math.cos(math.pi * done))
    return c.lr * (c.min_lr_ratio + (1 - c.min_lr_ratio) * max(0.0, factor))


def num_warmup_steps(total_steps: int, c: OptimConfig) -> int:
    """optim.warmup below 1 is a share of all steps, 1 and above a number of steps."""
    return math.ceil(c.warmup * total_steps) if c.warmup < 1 else min(int(c.warmup), total_steps)


def decay_groups(model: nn.Module, loss_fn: nn.Module, c: OptimConfig) -> list[dict]:
    """Parameter groups with `lr_factor`: matrices decay; biases, norms and the loss's own
    parameters do not.

    With layer_decay < 1 a layer's rate falls by that factor for each layer above it, the
    embeddings' lowest (Clark et al. 2020, ELECTRA, appendix A). A reranker's head has a rate of its
    own where head_lr is set.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    depth = 1 + max((_layer_number(n) for n, _ in model.named_parameters()), default=0)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        words = name.split(".")
        is_above_layers = "encoder" not in words or "final_norm" in words
        factor = 1.0 if is_above_layers else c.layer_decay ** (depth - _layer_number(name))
        if words[0] == "head" and c.head_lr is not None:
            factor = c.head_lr / c.lr
        groups.setdefault((factor, parameter.ndim >= 2), []).append(parameter)
    result = [
        {"params": params, "lr_factor": factor, "weight_decay": c.weight_decay if decays else 0.0}
        for (factor, decays), params in groups.items()
    ]
    own = [p for p in loss_fn.parameters() if p.requires_grad]
    if own:
        result.append({"params": own, "lr_factor": c.temperature_lr / c.lr, "weight_decay": 0.0})
    return result


def _layer_number(name: str) -> int:
    """1-based layer of a parameter; 0 for embeddings and whatever else is not in a layer."""
    words = name.split(".")
    for at, word in enumerate(words[:-1]):
        if word in ("layers", "layer", "h") and words[at + 1].isdigit():
            return int(words[at + 1]) + 1
    return 0


def build_optimizer(model: nn.Module, loss_fn: nn.Module, c: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over everything that is not frozen; a loss with bounds
    keeps them after every step.

    Raises ValueError when nothing is left to train.
    """
    groups = decay_groups(model, loss_fn, c)
    if not groups:
        raise ValueError("every parameter is frozen; remove something from model.freeze")
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)
    if hasattr(loss_fn, "keep_bounds"):
        optimizer.register_step_post_hook(lambda *_: loss_fn.keep_bounds())
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
