"""What is saved and restored: everything a resumed run needs to end as if it had never stopped.

Saved: weights, loss parameters, optimiser state, the number of finished steps, best metric and
early-stopping count, CPU thread count. Not saved, because they are functions of (seed, step):
batches, sampled negatives, dropout masks, the learning rate.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from runtime.run_dir import fsync_dir

log = logging.getLogger(__name__)

_FORMAT = 1


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def saved_steps(run_dir: Path) -> list[int]:
    """Finished steps of the complete checkpoints, ascending."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted(int(f.name.removeprefix("step_")) for f in folders if (f / "state.pt").is_file())


def save(
    run_dir: Path,
    step: int,
    towers: nn.Module,
    loss_fn: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict,
    *,
    keep: int,
) -> Path:
    """Write checkpoints/step_<step>/ so that it is there whole or not at all; drop all but the
    `keep` newest and best. Raises OSError, and leaves nothing half-written, where the disk is full.

    progress  plain values of the loop: best_value, best_step, bad_evaluations; owed, the step's row
              where a signal came before its evaluation
    """
    folder = checkpoint_dir(run_dir, step)
    state = {
        "format": _FORMAT,
        "step": step,
        "towers": towers.state_dict(),
        "loss": loss_fn.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": dict(progress),
        "threads": torch.get_num_threads(),
    }
    if not (folder / "state.pt").is_file():
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            with open(temporary / "state.pt", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            fsync_dir(temporary)
            os.replace(temporary, folder)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            _raise_unwritten(run_dir, step, error)
        fsync_dir(folder.parent)
    if progress["best_step"] == step:
        point_best(run_dir, progress)
    _prune(run_dir, keep, progress["best_step"])
    return folder


def _raise_unwritten(run_dir: Path, step: int, error: Exception) -> NoReturn:
    """Raise OSError with what the disk said; `error` itself where it was not the disk."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__  # torch.save makes a RuntimeError about positions of it
    if cause is None:
        raise error
    steps = saved_steps(run_dir)
    raise OSError(
        f"checkpoint of step {step} cannot be written to {checkpoint_dir(run_dir, step)}"
        f" ({cause.strerror or cause}); free space and go on with resume=true; last good:"
        f" {checkpoint_dir(run_dir, steps[-1]).name if steps else 'none'}"
    ) from error


def _prune(run_dir: Path, keep: int, best_step: int | None) -> None:
    for step in saved_steps(run_dir)[:-keep]:
        if step != best_step:
            shutil.rmtree(checkpoint_dir(run_dir, step), ignore_errors=True)


def point_best(run_dir: Path, progress: dict) -> None:
    """Move the link checkpoints/best, atomically, to the best checkpoint, which is whole."""
    folder = checkpoint_dir(run_dir, progress["best_step"])
    temporary = folder.with_name(f".best.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, folder.with_name("best"))
    fsync_dir(folder.parent)


def resume(
    run_dir: Path, towers: nn.Module, loss_fn: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict]:
    """Restore the newest readable checkpoint in place: (finished steps, progress); (0, a fresh
    progress) when there is none.

    A damaged checkpoint is named in the log and the one before it is used.
    """
    _clear_leftovers(run_dir)
    for step in reversed(saved_steps(run_dir)):
        state = _read(checkpoint_dir(run_dir, step))
        if state is None:
            shutil.rmtree(checkpoint_dir(run_dir, step), ignore_errors=True)
            continue
        towers.load_state_dict(state["towers"])
        loss_fn.load_state_dict(state["loss"])
        optimizer.load_state_dict(state["optimizer"])
        if state["threads"] != torch.get_num_threads():
            log.warning(
                "the run so far used %d CPU threads, this process uses %d: results stay correct"
                " but not bit for bit"
                " equal; set runtime.threads=%d for that",
                state["threads"],
                torch.get_num_threads(),
                state["threads"],
            )
        return state["step"], state["progress"]
    return 0, {"best_value": None, "best_step": None, "bad_evaluations": 0}


def load_best(run_dir: Path, towers: nn.Module, loss_fn: nn.Module, step: int) -> None:
    """Restore the weights of checkpoints/step_<step>. Raises ValueError when they cannot be
    read."""
    state = _read(checkpoint_dir(run_dir, step))
    if state is None:
        raise ValueError(
            f"{checkpoint_dir(run_dir, step)}: the best checkpoint cannot be read; train again"
            f" with name="
        )
    towers.load_state_dict(state["towers"])
    loss_fn.load_state_dict(state["loss"])


def _read(folder: Path) -> dict | None:
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own: zip, pickle and OS errors
        log.warning("%s is damaged and left out (%s)", folder / "state.pt", error)
        return None
    if state.get("format") != _FORMAT:
        raise ValueError(
            f"{folder}: checkpoint format {state.get('format')}, this version reads {_FORMAT};"
            f" use name="
        )
    return state


def _clear_leftovers(run_dir: Path) -> None:
    """Remove what a kill left half-written."""
    for folder in (run_dir / "checkpoints").glob(".step_*"):
        shutil.rmtree(folder, ignore_errors=True)
    for link in (run_dir / "checkpoints").glob(".best.*"):
        link.unlink(missing_ok=True)
