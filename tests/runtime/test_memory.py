"""The default activation budget: a share of what the machine has, never of what is free."""

import os
from pathlib import Path

import pytest
import torch

from runtime import memory
from runtime.memory import activation_budget_mib, cgroup_limits, total_memory_mib

CPU = torch.device("cpu")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_cgroup_limits_of_each_level_count(tmp_path):
    """A container's limit may stand at its own level, at one above, or (v1) in another tree."""
    own = tmp_path / "self"
    own.write_text("4:memory:/jobs/mine\n0::/slice/unit\n2:cpu:/other\n")
    root = write(
        tmp_path / "cgroup",
        {
            "memory.max": "max\n",
            "slice/memory.max": "3000\n",
            "slice/unit/memory.max": "5000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/jobs/mine/memory.limit_in_bytes": "4000\n",
            "memory/jobs/other/memory.limit_in_bytes": "1\n",
        },
    )
    assert sorted(cgroup_limits(root, own)) == [3000, 4000, 5000, 9223372036854771712]


def test_a_path_of_the_host_falls_back_to_the_mount(tmp_path):
    """Inside a container /proc/self/cgroup may name a path that is not mounted there."""
    own = tmp_path / "self"
    own.write_text("0::/docker/abc\n")
    assert cgroup_limits(write(tmp_path / "cgroup", {"memory.max": "700\n"}), own) == [700]
    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "missing") == []


def test_the_budget_is_the_setting_or_a_fixed_share(monkeypatch):
    """The same machine must give the same budget whatever else runs there; processes that share the
    machine share it."""
    physical_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    assert 0 < total_memory_mib(CPU) <= physical_mib
    monkeypatch.setattr(memory, "total_memory_mib", lambda device: 10_000.0)
    assert activation_budget_mib(0.0, CPU) == 0 and activation_budget_mib(12.5, CPU) == 12.5
    assert activation_budget_mib("auto", CPU) == 2500
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert activation_budget_mib(None, CPU) == 625
    assert activation_budget_mib(None, torch.device("cuda", 0)) == 5000  # a card each


def test_the_smaller_of_machine_and_cgroup_counts(monkeypatch):
    """In a container of 1 GiB on a machine of 500 the machine's memory is no help."""
    monkeypatch.setattr(memory, "cgroup_limits", lambda: [2**30, 2**60])
    assert total_memory_mib(CPU) == pytest.approx(1024)
