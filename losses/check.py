"""Prove that an experiment's gradients are right, on a tiny model of the same structure.

    python -m losses.check +experiment=<any> [setting=<value>] ... [--json FILE]

Compared are loss and every parameter's gradient, the learned temperature and bias among them, in
float64: how the batch was cut into chunks, what was kept and what was replayed, over how many
processes it was spread and which formula was used must not show. docs/numerics.md says what each
row proves and where its bound comes from.
"""

import dataclasses
import importlib.util
import logging
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from conf.schema import TrainConfig
from losses import comparisons, comparisons_kernels, comparisons_rerank, tiny
from losses.comparisons import Row
from runtime.run_dir import write_json_atomic

HELP = """\
Prove that an experiment's gradients are right, on a tiny model of the same structure:

  python -m losses.check +experiment=<name> [group=<option>] [setting=<value>] ... [--json FILE]

Settings are those of train.py (python train.py --help). Nothing is downloaded: data are made up, a
guide or teacher is random, a base that is not on this machine is taken for a BERT.
Prints a table of differences. Exits 0 when all are within bounds, 1 when one is not, 2 when the
command cannot be run.

  --json FILE          write the table there too
  --config-dir FOLDER  where experiments of your own lie
"""


def check(c: TrainConfig, *, sizes: Sequence[int] = (2, 3)) -> tuple[str, list[Row]]:
    """What stands in for the experiment, and one row a comparison.

    sizes  numbers of processes to compare with one
    Raises ValueError where the model or the loss could not be built for training either.
    """
    of = comparisons_rerank if c.task == "rerank" else comparisons
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread wakes up for longer than such a model computes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, model = tiny.shrink(c, folder / "base")
        processes = comparisons.start_ranks(of.Subject, small, folder, sizes)
        kernels = comparisons_kernels.start(small.loss)
        try:
            subject = of.Subject(small)
            rows = [row for compare in of.COMPARISONS for row in compare(subject)]
            rows += comparisons_kernels.compare_kernels(kernels)
            rows += comparisons.compare_ranks(subject, processes, folder, sizes)
        finally:
            if kernels is not None:
                kernels.kill()
            for process in processes:
                process.kill()
                process.join()  # it may be writing to the folder that goes now
            torch.set_num_threads(threads)
    if c.task == "rerank":
        spec = subject.model.spec
        return f"{model}, {spec.head} head on {spec.pooling}; {c.loss.kind}", rows
    spec = subject.towers.spec
    return f"{model}, {spec.kind} tower, {spec.pooling} pooling; {c.loss.kind}", rows


def not_checked(c: TrainConfig) -> list[str]:
    """What of the experiment these comparisons do not run, and what does."""
    left = []
    if c.loss.backend == "triton":
        left.append(
            "loss.backend=triton: kernels have no float64; all but their own row ran in torch"
            " (`make gpu` compares them at size)"
        )
        if importlib.util.find_spec("triton") is None:
            left.append("loss.backend=triton: triton is not installed here, so they have no row")
    if c.runtime.compile:
        left.append("runtime.compile: models run as they are (tests/models/test_compile.py)")
    if c.runtime.device not in ("auto", "cpu"):
        left.append(f"runtime.device={c.runtime.device}: all of this ran on a CPU")
    return left


def table(rows: Sequence[Row]) -> str:
    wide = max(len(row.name) for row in rows)
    lines = [f"{'':4} {'comparison':{wide}}  {'largest':>9}  {'bound':>7}  what is compared"]
    for r in rows:
        sign = "ok" if r.ok else "FAIL"
        lines.append(f"{sign:4} {r.name:{wide}}  {r.difference:9.1e}  {r.bound:7.0e}  {r.what}")
    return "\n".join(lines) + "\n"


def as_json(
    experiment: str, model: str, rows: Sequence[Row], not_checked: Sequence[str] = ()
) -> dict:
    """The table for other programs; a difference that is no finite number is null."""
    comparisons = []
    for r in rows:
        row = dataclasses.asdict(r) | {"ok": r.ok}
        comparisons.append(
            row | {"difference": r.difference if math.isfinite(r.difference) else None}
        )
    return {
        "experiment": experiment,
        "model": model,
        "ok": all(r.ok for r in rows),
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "comparisons": comparisons,
        "not_checked": list(not_checked),
    }


def compose(args: list[str]) -> tuple[TrainConfig, str]:
    """The settings that train.py would have for these words, and the experiment's name.

    What only training needs (data.root, a guide) may be missing. Raises ValueError for what
    train.py refuses, with its message.
    """
    # Hydra is imported here, so that the processes of start_ranks need not wait for it
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from conf import cli

    try:
        flags, overrides, known = cli.split_args(args)
        if flags and flags[0].partition("=")[0] != "--config-dir":
            raise cli.UsageError(f"losses.check takes no {flags[0]}; see --help")
        extra = Path(known.config_dir).absolute() if known.config_dir else None
        groups = cli.group_options(TrainConfig, cli.CONF_DIR, extra)
        words = cli.prepare_overrides(overrides, TrainConfig, groups, "train.py", is_multirun=False)
        if extra is not None:
            words.append(f'hydra.searchpath=["file://{extra}"]')
        ConfigStore.instance().store(name="train_schema", node=TrainConfig)
        with initialize_config_dir(str(cli.CONF_DIR), version_base="1.3"):
            cfg = hydra_compose("train", overrides=words)
        if not cfg.data.sets and cfg.data.format != "toy":  # toy data lie nowhere
            cfg.data.root = "not needed here"
        for key in ("guide", "teacher"):
            if key in OmegaConf.missing_keys(cfg.loss) or cfg.loss[key] == "":
                cfg.loss[key] = "not needed here"
        c = cli.to_config(cfg, TrainConfig)
    except (cli.UsageError, HydraException, OmegaConfBaseException) as error:
        raise ValueError(cli._config_message(error)) from error
    names = [word.partition("=")[2] for word in words if word.startswith("+experiment=")]
    return c, names[-1] if names else "no experiment"


def main() -> None:
    args = sys.argv[1:]
    if {"-h", "--help"} & set(args):
        sys.stdout.write(HELP)
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ["HF_HUB_OFFLINE"] = "1"  # config.json is read where it is at hand, not downloaded
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("losses.check starts its own processes; start it without torchrun")
        args, json_file = _split_json(args)
        c, experiment = compose(args)
        model, rows = check(c)
        left = not_checked(c)
        notes = "".join(f"not checked: {note}\n" for note in left)
        sys.stdout.write(f"{experiment}: {model}\n\n{table(rows)}{notes}")
        if json_file is not None:
            write_json_atomic(json_file, as_json(experiment, model, rows, left))
    except (ValueError, OSError) as error:
        if os.environ.get("ROOK_TRACEBACK", "0") not in ("0", ""):
            raise
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None
    failed = [row.name for row in rows if not row.ok]
    if failed:
        sys.stderr.write(f"out of bounds: {', '.join(failed)}\n")
        raise SystemExit(1)


def _split_json(args: list[str]) -> tuple[list[str], Path | None]:
    """(the other words, FILE) of a command line with or without --json FILE."""
    words, file, rest = [], None, iter(args)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != "--json":
            words.append(word)
            continue
        value = value if equals else next(rest, "")
        if not value or not Path(value).absolute().parent.is_dir():
            raise ValueError(f"--json {value}: want a file in a folder that exists")
        file = Path(value)
    return words, file


if __name__ == "__main__":
    main()
