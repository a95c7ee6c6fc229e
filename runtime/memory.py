"""How much memory there is in all: never how much happens to be free, which would make a run
depend on its neighbours."""

import logging
import math
import os
from pathlib import Path

import torch

log = logging.getLogger(__name__)

# Share of the device that kept autograd graphs may take under activation_budget_mib=auto. The rest
# is for weights, gradients, optimiser state and the chunk at work; a CPU's memory also holds the
# data, the evaluation and other programs.
GRAPH_SHARE = {"cpu": 0.25, "cuda": 0.5, "mps": 0.25}


def activation_budget_mib(setting: float | str | None, device: torch.device) -> float:
    """MiB of autograd graphs that a training step may keep on this process's device.

    setting  runtime.activation_budget_mib; "auto" or None: a fixed share of the device's total
             memory, on a CPU divided among the processes of this machine
    """
    if setting not in ("auto", None):
        log.info("activation budget: %g MiB", setting)
        return setting
    total_mib, share = total_memory_mib(device), GRAPH_SHARE[device.type]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type != "cuda" else 1
    budget = float(math.floor(share * total_mib / processes))
    log.info(
        "activation budget: %.0f MiB (%g of %.0f MiB%s)",
        budget,
        share,
        total_mib,
        f", {processes} processes" if processes > 1 else "",
    )
    return budget


def total_memory_mib(device: torch.device) -> float:
    """A card's memory; for a CPU the machine's, or the cgroup's limit where that is lower."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**20
    if device.type == "mps":
        return torch.mps.recommended_max_memory() / 2**20
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *cgroup_limits()]) / 2**20


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), own: Path | None = None) -> list[int]:
    """Bytes that the control groups of this process allow (v2 and v1), each level of the tree.

    root  where cgroups are mounted
    own   /proc/self/cgroup: lines "<number>:<controllers>:<path>"; controllers are empty in v2
    """
    try:
        lines = (own or Path("/proc/self/cgroup")).read_text().splitlines()
    except OSError:  # not Linux
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / path.strip("/")
        # inside a container the path may be the host's: then its own limit is at the mount's root
        for level in (folder, *folder.parents):
            try:
                limits.append(int((level / name).read_text()))
            except (OSError, ValueError):  # no such level, or "max"
                pass
            if level == base:
                break
    return limits
