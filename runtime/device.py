"""Which device and precision to compute with; what must be set before the first large
allocation."""

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def pick_device(name: str) -> torch.device:
    """The torch device for auto | cpu | cuda | mps; under torchrun, CUDA means this rank's card.

    Raises ValueError when the named device is not there.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if has["cuda"] else "mps" if has["mps"] else "cpu"
    if not has.get(name, False):
        raise ValueError(f"device {name} is not available here; use device=auto or device=cpu")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware; emulated, they are 10 to 50 times slower than
    float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    return False


def pick_precision(name: str, device: torch.device) -> str:
    """fp32 or bf16 for auto | fp32 | bf16."""
    return ("bf16" if has_fast_bf16(device) else "fp32") if name == "auto" else name


def tokens_at_once(precision: str, device: torch.device) -> int:
    """Tokens to encode at once where no graph is kept: what a CPU's cache holds (in bf16 twice as
    many), or what fills a GPU."""
    if device.type != "cpu":
        return 65536
    return 8192 if precision == "bf16" else 4096


def autocast_for(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Makes the context an encoder runs in: bf16 autocast over float32 weights, or nothing."""
    if precision == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext


def keep_freed_memory() -> None:
    """Let glibc keep large freed buffers for the next operation instead of returning them to the
    system.

    By default every large tensor is mapped and unmapped anew, and the page faults cost more than
    the arithmetic of element-wise layers (docs/numerics.md has the measurement). No effect on
    results; nothing but Linux has it. torch is asked for huge pages too, which it does once, at its
    first allocation: call this before there is a tensor.
    """
    if not sys.platform.startswith("linux"):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's allocator: 2 MiB and more
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):  # musl and others: correct, only slower
        log.info("this C library has no mallopt: element-wise layers will be slower")
