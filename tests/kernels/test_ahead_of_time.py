"""Every shipped tile compiles for its device without spills and uses its tensor cores. No GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AOT = Path(__file__).with_name("aot.py")
WORKERS = str(max(1, min(16, (os.cpu_count() or 2) - 2)))
SHARED_BYTES = {90: 227 * 1024, 80: 163 * 1024}  # what one program may take there


def compiled(*arguments: str) -> list[dict]:
    """In a process of its own: this one may interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(AOT), "--workers", WORKERS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict]) -> None:
    for row in rows:
        assert row["stack_bytes"] == 0, f"spills: {row}"
        assert row["shared_bytes"] <= SHARED_BYTES[row["arch"]], row
        if row["dtype"] != "fp32":  # float32 in full precision has no tensor-core form
            assert row["wgmma" if row["arch"] == 90 else "mma"] > 0, f"no tensor cores: {row}"


def test_one_dim_for_sm_90():
    """What costs registers is easily added: a mask kept through a loop cost 100 and spilled."""
    rows = compiled(
        "--arch", "90", "--dims", "one", "--options", "columns", "softplus", "--dtypes", "bf16"
    )
    check(rows)
    assert {row["kernel"] for row in rows} == {"sums", "planes", "exps"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["90", "80"])
def test_every_tile_with_all_options(arch):
    rows = compiled("--arch", arch, "--dtypes", "bf16", "fp32")
    assert {row["dims"] for row in rows} == {1, 5}
    rows += compiled("--arch", arch, "--dtypes", "tf32", "fp16", "--options", "columns")
    most = max(row["registers"] for row in rows)
    print(f"\ntriton {rows[0]['triton']}, sm_{arch}: {len(rows)} kernels, {most} registers at most")
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["90", "80"])
def test_other_numbers_of_dims_and_ragged_sizes(arch):
    """A kernel is compiled anew for three dims, and for sizes that 16 does not divide."""
    bf16 = ("--arch", arch, "--dtypes", "bf16")
    many = ("--dims", "many", "many both", "softplus")
    rows = compiled(*bf16, *many, "--ends", "128,384,768", "--options", "columns")
    assert {row["dims"] for row in rows} == {3}
    ragged = compiled(*bf16, "--ragged", "--options", "", "columns")
    assert all(row["is_ragged"] for row in ragged)
    check(rows + ragged)
