"""Texts -> embeddings: tokenised, sorted by length, packed, encoded once.

Shapes: n texts, D embedding.
"""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from data.batches import chunks
from data.tokens import num_prompt_tokens, tokenise
from models.towers import Towers
from models.transformer import pack, ready_to_encode
from runtime.device import autocast_for, pick_precision, tokens_at_once


@torch.no_grad()
def encode(
    towers: Towers,
    texts: Sequence[str],
    side: str,
    *,
    precision: str = "auto",
    batch_tokens: int = 0,
    progress: str = "",
    prompt: str | None = None,
) -> np.ndarray:
    """Embeddings of texts, (n, D) float32, in the order given.

    side          query | passage: chooses tower, prompt and maximum length
    precision     auto (bf16 where the hardware has it) | fp32 | bf16
    batch_tokens  tokens encoded at once; 0: what fits a CPU's cache, or fills a GPU
    progress      label of a progress bar; empty for none
    prompt        instead of the model's own
    """
    if not len(texts):
        return np.zeros((0, towers.width), np.float32)
    own_prompt, max_length = towers.spec.side(side)
    prompt = own_prompt if prompt is None else prompt
    tokenizer = towers.tokenizer(side)
    tokens = tokenise(tokenizer, texts, prompt, max_length)
    skip = 0 if towers.spec.prompt_in_pooling else num_prompt_tokens(tokenizer, prompt)
    tower = towers.tower(side)
    device = next(tower.parameters()).device
    precision = pick_precision(precision, device)
    batch_tokens = batch_tokens or tokens_at_once(precision, device)
    autocast = autocast_for(precision, device)
    was_training = tower.training
    tower.eval()
    out_nD = np.empty((len(texts), towers.width), np.float32)
    with (
        tqdm(
            total=len(texts), desc=progress, unit="text", disable=not progress, leave=False
        ) as bar,
        autocast(),
        ready_to_encode(tower),
    ):
        for rows in chunks(np.array([len(t) for t in tokens]), batch_tokens):
            skips = np.full(len(rows), skip) if skip else None
            packed = pack([tokens[i] for i in rows], device, skip=skips)
            out_nD[rows] = tower(packed).float().cpu().numpy()
            bar.update(len(rows))
    tower.train(was_training)
    return out_nD
