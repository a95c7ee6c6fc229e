"""The directory of a run: its path, its lock, and what is written before the first step."""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader

from conf.schema import known_keys

log = logging.getLogger(__name__)

# Settings that hold a path or a hub id: left out of directory names unless a sweep varies them.
PATH_KEYS = (
    "model.base",
    "data.root",
    "data.texts",
    "data.cache_dir",
    "loss.guide",
    "loss.teacher",
    "runs_dir",
    "model",
    "data",
    "against",
    "first_stage",
    "also",
    "texts",
    "out",
)
# Settings (and whole sections) that must not change results: a resumed run may change them.
FREE_KEYS = (
    "resume",
    "runs_dir",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "examples_shown",
    "data.cache_dir",
    "runtime",
    "wandb",
)
# Have a place of their own in the path of a run, or none; a folder of another kind has no such
# places.
OWN_PART = ("name", "seed", "runs_dir", "resume")
LOCK_NAME = ".lock"
MAX_PART = 80  # bytes of the <overrides> part; most file systems take 255
MAX_DIFF = 200_000  # characters of the uncommitted changes kept in env.json

_locks: dict[Path, int] = {}  # run directory -> open descriptor of its lock file


# ------------------------------------------------------------------------------------ atomic writes


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write a file that is either the old one or the new one, whole, even when the machine stops in
    between.
    """
    _write_atomic(path, [content])


def write_lines_atomic(path: Path, lines: Iterable[str]) -> int:
    """write_bytes_atomic for lines that come one by one, each with its end; how many there were."""
    return _write_atomic(path, (line.encode("utf-8") for line in lines))


def _write_atomic(path: Path, parts: Iterable[bytes]) -> int:
    path, num_parts = Path(path), 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            for part in parts:
                f.write(part)
                num_parts += 1
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)
    return num_parts


def write_text_atomic(path: Path, text: str) -> None:
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: Path, value: Any) -> None:
    """JSON with two-space indent; NaN and infinities are refused (ValueError), because other
    readers do so too.
    """
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def fsync_dir(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------------------- path


def run_path(
    c: Any, overrides: Sequence[str], *, swept: Collection[str] = (), cls: type | None = None
) -> Path:
    """<runs_dir>/<name>/<overrides>/seed<k>.

    c          config with name, seed and runs_dir; without them only the <overrides> part is
               returned
    overrides  words of the command line, e.g. "optim.lr=1e-4", "+experiment=toy"
    swept      keys that differ between the arms of a sweep: always in the name
    cls        the config dataclass, where c is not one
    """
    part = overrides_part(overrides, cls or type(c), name=getattr(c, "name", ""), swept=swept)
    if not hasattr(c, "runs_dir"):
        return Path(part)
    return Path(c.runs_dir) / c.name / part / f"seed{c.seed}"


def overrides_part(
    overrides: Sequence[str], cls: type, *, name: str = "", swept: Collection[str] = ()
) -> str:
    """The <overrides> folder: 'lr-1e-4+batch_size-128', or 'default' where nothing that matters was
    typed.

    Left out unless swept: paths, settings that cannot change results, the experiment. A setting is
    named by its last part where that is unique in `cls`.
    """
    own_part = OWN_PART if "runs_dir" in cls.__dataclass_fields__ else ()
    leaves = [key.split(".")[-1] for key in known_keys(cls)]
    words, raw = [], []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in own_part or key.split(".")[0].split("/")[0] == "hydra":
            continue
        if key not in swept and (key == "experiment" or _is_path(key, cls) or is_free(key)):
            continue
        if (key == "experiment" and value == name) or (key == "data" and value == "local"):
            continue  # the folder above says it; the default, typed in every documented command
        if (
            key == "data.sets"
            and re.fullmatch(r"\{[^{}]*(\{\}[^{}]*)*\}", value)
            and ":{}" in value
        ):
            continue  # made by conf/cli.py to hold data.sets.<name>.<setting>
        value = _unquote(value) if value[:1] in "\"'" else _canonical_number(value)
        leaf = key.split(".")[-1]
        label = key if leaves.count(leaf) > 1 else leaf
        value = "none" if override.startswith("~") else value
        words.append(f"{_safe(label)}-{_safe_value(value, is_path=_is_path(key, cls))}")
        raw.append(f"{key}={value}")
    words.sort()  # the order of typing does not matter
    part = "+".join(words) or "default"
    if len(part.encode()) <= MAX_PART:
        return part
    digest = hashlib.sha256("\n".join(sorted(raw)).encode()).hexdigest()[:8]
    return part.encode()[: MAX_PART - 9].decode(errors="ignore") + "-" + digest


def _is_path(key: str, cls: type) -> bool:
    if key in ("model", "data"):
        return cls.__dataclass_fields__[key].type is str  # evaluate.py's; train.py has groups there
    return key in PATH_KEYS or bool(re.fullmatch(r"data\.sets\.[^.]+\.(root|texts)", key))


def is_free(key: str) -> bool:
    """Whether a setting may differ between the parts of one resumed run."""
    return any(key == free or key.startswith((f"{free}.", f"{free}@")) for free in FREE_KEYS)


def _unquote(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1].replace("\\" + value[0], value[0])
    return value


def _canonical_number(value: str) -> str:
    """1e-4 and 0.0001 are one setting; Hydra tells a sweep's arm the second for the first."""
    for kind in (int, float):
        try:
            return repr(kind(value))
        except ValueError:
            continue
    return value


def _safe(text: str) -> str:
    """Letters and digits of any script and . _ - survive; everything else becomes _."""
    return re.sub(r"[^\w.-]", "_", text)


def _safe_value(value: str, *, is_path: bool) -> str:
    """A value as part of a folder name; a tail of its hash where something was lost."""
    shown = Path(value).name if is_path else value
    if re.fullmatch(r"\[[-\w., ]*\]", shown):  # a list of plain values: 384_128
        return re.sub(r"[,\s]+", "_", shown.strip("[] "))
    safe = _safe(shown)
    return safe if safe == value else f"{safe}-{hashlib.sha256(value.encode()).hexdigest()[:6]}"


# ------------------------------------------------------------------------------------------ prepare


def prepare_run_dir(c: Any, overrides: Sequence[str] = (), *, swept: Collection[str] = ()) -> Path:
    """Create and lock the directory of this run and write config.yaml, overrides.txt and env.json.

    A finished directory is left as it is (is_finished() says so) when c.resume is true.
    Under torchrun only rank 0 touches the disk; the other ranks get the same path.
    Raises ValueError when the directory holds a result and c.resume is false, holds checkpoints and
    c.resume is false, belongs to a run with other settings, is in use by another process, or cannot
    be written. Warns where c.resume, outside a sweep, finds unfinished runs beside it, none here.
    """
    run_dir = run_path(c, overrides, swept=swept)
    if os.environ.get("RANK", "0") != "0":
        return run_dir
    if c.resume and not swept and not (run_dir / "config.yaml").exists():
        _tell_of_runs_beside(run_dir, c)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _lock(run_dir)
    except OSError as error:
        raise ValueError(
            f"run directory {run_dir} cannot be made: {error.strerror};"
            " choose another runs_dir= or name="
        ) from None
    try:
        _check_and_write(run_dir, c, overrides)
    except BaseException:
        release_run_dir(run_dir)
        raise
    return run_dir


def _check_and_write(run_dir: Path, c: Any, overrides: Sequence[str]) -> None:
    checkpoint = last_checkpoint_name(run_dir)
    if is_finished(run_dir):
        if not c.resume:
            raise ValueError(
                f"{run_dir} already holds result.json; add resume=true to see its result"
                " or change name="
            )
        _check_same_settings(run_dir, c)
        return
    if checkpoint and not c.resume:
        raise ValueError(
            f"{run_dir} holds an unfinished run (last checkpoint {checkpoint}); add resume=true"
            " to continue it, change name=, or delete the folder"
        )
    if checkpoint:
        _check_same_settings(run_dir, c)
    else:
        if c.resume:
            log.info("%s holds no checkpoint: starting from the beginning", run_dir)
        if (run_dir / "config.yaml").exists():  # ours: an attempt that ended before a checkpoint
            for path in run_dir.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK_NAME:
                    path.unlink()
    for path in run_dir.glob(".*.tmp"):  # writes that a kill cut short
        path.unlink()
    (run_dir / "error.txt").unlink(missing_ok=True)
    write_text_atomic(run_dir / "config.yaml", config_yaml(c))
    write_text_atomic(run_dir / "overrides.txt", "".join(f"{o}\n" for o in overrides))
    env = environment(c)
    if checkpoint:
        env["continues"] = {"checkpoint": checkpoint, "earlier": _read_json(run_dir / "env.json")}
    write_json_atomic(run_dir / "env.json", env)


def _tell_of_runs_beside(run_dir: Path, c: Any) -> None:
    """Warn where other settings of this name and seed have begun and not ended: the settings are
    part of the path, and one typed otherwise trains from the beginning. No error: jobs of a cluster
    that differ in a setting all pass resume=true."""
    found = []
    for other in sorted(run_dir.parent.parent.glob(f"*/{run_dir.name}")):
        checkpoint = last_checkpoint_name(other)
        if checkpoint is None or is_finished(other) or _is_in_use(other):
            continue
        found.append(f"  {other} ({checkpoint})")
        differing = _differing(other, c)
        found += [f"    {key}: {old!r} there, {new!r} now" for key, old, new in differing]
    if found:
        log.warning(
            "%s holds no checkpoint to resume and starts from the beginning; unfinished runs beside"
            " it do:\n%s\nto continue one, stop this and give its command again (its"
            " overrides.txt) with resume=true", run_dir, "\n".join(found),
        )  # fmt: skip


def is_finished(run_dir: Path) -> bool:
    return (Path(run_dir) / "result.json").is_file()


def last_checkpoint_name(run_dir: Path) -> str | None:
    """Name of the newest whole checkpoint under checkpoints/ (step_<n>), or None."""
    folder = Path(run_dir) / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    steps = [name for name in names if re.fullmatch(r"step_\d+", name)]
    return max(steps, key=lambda name: int(name.removeprefix("step_")), default=None)


def print_finished(run_dir: Path) -> None:
    """Show the result of a finished run: its report, else result.json."""
    if os.environ.get("RANK", "0") != "0":
        return
    report = Path(run_dir) / "report.md"
    source = report if report.is_file() else Path(run_dir) / "result.json"
    sys.stdout.write(source.read_text(encoding="utf-8").rstrip() + "\n")
    sys.stdout.write(f"\n{run_dir} is finished; a new run needs another name= or seed=\n")


# --------------------------------------------------------------------------------------------- lock


def _lock(run_dir: Path) -> None:
    """Hold run_dir/.lock until release_run_dir() or the end of the process, however it ends."""
    key = run_dir.resolve()
    if key in _locks:
        raise ValueError(f"{run_dir} is in use by this process already; change name=")
    descriptor = os.open(run_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # lockf, not flock: the lock must not outlive a killed run in a worker that it has forked
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise ValueError(
            f"{run_dir} is in use by another process; wait for it, or change name= or seed="
        ) from None
    except OSError as error:
        log.warning("%s is not locked (%s): do not start it twice at once", run_dir, error.strerror)
    _locks[key] = descriptor


def _is_in_use(run_dir: Path) -> bool:
    """Whether a process, be it this one, holds the lock."""
    if run_dir.resolve() in _locks:
        return True
    try:
        with open(run_dir / LOCK_NAME, "rb+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def release_run_dir(run_dir: Path) -> None:
    """Give up the lock; nothing happens where this process holds none."""
    descriptor = _locks.pop(Path(run_dir).resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------- settings


def config_yaml(c: Any) -> str:
    """All settings as YAML that reads back to the same values (a name such as 1e3 stays text)."""
    return yaml.dump(  # type: ignore[call-overload]
        asdict(c),
        Dumper=get_omega_conf_dumper(),
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
    )


def read_config(run_dir: Path) -> dict[str, Any]:
    """config.yaml of a run as plain nested values.

    Raises ValueError where there is none or it is not YAML.
    """
    path = Path(run_dir) / "config.yaml"
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=get_yaml_loader())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; {run_dir} is not a run directory") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected settings, found {type(content).__name__}")
    return content


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def check_same_data(run_dir: Path, digest: str) -> None:
    """Note in data.json what the data of a run are, by content; raise ValueError where a resumed
    run would train on others."""
    path = Path(run_dir) / "data.json"
    before = _read_json(path).get("digest") if path.is_file() else None
    if before is not None and before != digest:
        raise ValueError(
            f"{run_dir} cannot be resumed: its data changed since it began (content {before[:12]}"
            f" in {path}, {digest[:12]} now); bring the files back, or train anew with name="
        )
    write_json_atomic(path, {"digest": digest})


def _check_same_settings(run_dir: Path, c: Any) -> None:
    """Raise ValueError listing the result-relevant settings that differ from config.yaml."""
    differing = [
        f"  {key}: {old!r} in {run_dir / 'config.yaml'}, {new!r} now"
        for key, old, new in _differing(run_dir, c)
    ]
    if differing:
        raise ValueError(
            f"{run_dir} cannot be resumed with other settings:\n"
            + "\n".join(differing)
            + "\ngive the same settings, or change name= to start a new run"
        )


def _differing(run_dir: Path, c: Any) -> list[tuple[str, Any, Any]]:
    """(setting, in config.yaml, now) of the result-relevant settings that differ."""
    before, now = _flatten(read_config(run_dir)), _flatten(asdict(c))
    default = _flatten(asdict(type(c)()))
    differing = []
    for key in sorted(before.keys() | now.keys()):
        if is_free(key):
            continue
        # a setting that one side does not know (older code, a mapping's key) counts as its default
        # there
        old, new = before.get(key, default.get(key)), now.get(key, default.get(key))
        if old != new and not (old in (None, {}) and new in (None, {})):
            differing.append((key, old, new))
    return differing


# -------------------------------------------------------------------------------------- environment

PACKAGES = (
    "torch numpy transformers tokenizers safetensors hydra-core wandb triton scipy ir-measures"
    " bm25s pyarrow datasets sentence-transformers"
).split()


def environment(c: Any = None) -> dict[str, Any]:
    """What a reader needs to repeat the run: code, versions, device, threads; no host name."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    env = {
        "git": _git_state(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "packages": versions,
        "device": None,
        "threads": None,
    }
    torch = sys.modules.get("torch")  # what the job uses; not imported for this alone
    if torch is not None:
        env["threads"] = torch.get_num_threads()
        env["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if c is not None and hasattr(c, "runtime"):
        env["runtime"] = asdict(c.runtime)
    return env


def _git_state() -> dict[str, Any] | None:
    """Commit and uncommitted changes of the code beside this file; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *args],
                capture_output=True,
                timeout=20,
                check=True,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.decode("utf-8", errors="replace")

    status = git("status", "--porcelain")
    if status is None:
        return None
    commit = git("rev-parse", "HEAD")
    diff = git("diff", "HEAD") or ""
    return {
        "commit": commit.strip() if commit else None,
        "is_dirty": bool(status.strip()),
        "untracked": [line[3:] for line in status.splitlines() if line.startswith("??")][:100],
        "diff": diff[:MAX_DIFF],
        "diff_is_cut": len(diff) > MAX_DIFF,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
