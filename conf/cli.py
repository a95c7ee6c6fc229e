"""From the words of the command line to a checked config dataclass and a run directory.

`main(TrainConfig, "train", train)` is the last line of train.py. Hydra composes the YAML files and
runs multirun; what is added here: a mistyped setting is an error, ordinary paths need no quoting,
and what a user can cause ends in a message instead of a traceback.
"""

import argparse
import contextlib
import difflib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import known_keys
from runtime.run_dir import (
    PATH_KEYS,
    is_finished,
    prepare_run_dir,
    print_finished,
    release_run_dir,
    run_path,
    write_text_atomic,
)
from runtime.track import close_open_trackers

log = logging.getLogger(__name__)

CONF_DIR = Path(__file__).resolve().parent

# What to type where a setting without a default is missing.
EXAMPLES = {
    "model.base": "model=custom model.base=<folder or hub id>",
    "data.root": "data=local data.root=my_pairs.jsonl, or without files of your own data=pydocs",
    "model": "model=runs/quickstart/default/seed0, or a model folder or hub id",
    "data": "data=<BEIR folder, or a file of pairs>",
    "out": "out=<folder>",
}
SELF_CONTAINED = ("pydocs", "toy")  # data formats that need no data.root
DELTA_GROUPS = ("experiment", "dataset")  # typed with a +: files of differences to the defaults
GROUP_PATH_KEY = {"model": "model.base", "data": "data.root"}  # what `model=<path>` probably means

USAGE_ERROR, JOB_ERROR = 2, 1  # exit codes


class UsageError(Exception):
    """What was typed cannot be run; shown as it is, without a traceback."""


# Errors that a user, a file or the numbers can cause: shown as a message. Any other is a fault of
# ours: a traceback.
EXPECTED = (UsageError, ValueError, OSError, FloatingPointError)


class JobFailed(Exception):
    """A run ended in an error that has been shown and written to error.txt already."""

    def __init__(self, summary: str, exit_code: int) -> None:
        # both in args: a launcher may pickle this between processes
        super().__init__(summary, exit_code)
        self.summary, self.exit_code = summary, exit_code

    def __str__(self) -> str:
        return self.summary


def main(config_cls: type, config_name: str, fn: Callable[[Any, Path | None], Any]) -> None:
    """Compose the config from sys.argv, prepare the run directory and call fn(config, run_dir).

    config_cls   dataclass of the settings; its __post_init__ raises ValueError for illegal values
    config_name  YAML file in conf/, or in conf/<config_name>/ where that holds one
    fn           the job. run_dir is the prepared directory when config_cls has `runs_dir`; else the
                 folder named by `out` (not created; one sub-folder an arm under multirun), or None.
    Leaves through SystemExit when anything failed: 2 for a command that cannot be run, 1 for a job
    that failed.
    """
    conf_dir = config_dir(config_name)
    program = Path(sys.argv[0]).name
    set_up_logging()
    args = sys.argv[1:]
    if any(a in ("-h", "--help") for a in args):
        if _rank() == 0:
            sys.stdout.write(help_text(config_cls, config_name, conf_dir, program))
        return
    hydra_argv, hydra_full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    failures: list[JobFailed] = []
    try:
        flags, overrides, known = split_args(args)
        is_multirun = known.multirun
        conf_dir = Path(known.config_path).absolute() if known.config_path else conf_dir
        groups = group_options(
            config_cls, conf_dir, Path(known.config_dir) if known.config_dir else None
        )
        overrides = prepare_overrides(
            overrides, config_cls, groups, program, is_multirun=is_multirun
        )
        job = _job(
            config_cls, fn, swept_keys(overrides) if is_multirun else None, failures, os.getpid()
        )
        ConfigStore.instance().store(name=f"{config_name}_schema", node=config_cls)
        sys.argv = [sys.argv[0], *flags, *overrides]
        # exceptions come to us instead of being printed by Hydra
        os.environ["HYDRA_FULL_ERROR"] = "1"
        hydra.main(config_path=str(conf_dir), config_name=config_name, version_base="1.3")(job)()
    except JobFailed as failure:  # raised by a launcher that runs jobs in other processes
        failures.append(failure)
    except (UsageError, HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        if _wants_traceback():
            raise
        if _rank() == 0:  # under torchrun all ranks have read the same command
            sys.stderr.write(f"{_config_message(error)}\n")
        _wait_for_ranks()
        raise SystemExit(USAGE_ERROR) from None
    except KeyboardInterrupt:
        if _rank() == 0:
            sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
    finally:
        sys.argv = hydra_argv
        if hydra_full_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = hydra_full_error
    if failures:
        if is_multirun and _rank() == 0:
            lines = "\n".join(f"  {failure}" for failure in failures)
            sys.stderr.write(f"\nruns of this sweep that failed: {len(failures)}\n{lines}\n")
        _wait_for_ranks()
        raise SystemExit(failures[0].exit_code)


def config_dir(config_name: str) -> Path:
    """conf/<config_name>/ where that folder holds <config_name>.yaml, else conf/."""
    own = CONF_DIR / config_name
    return own if (own / f"{config_name}.yaml").is_file() else CONF_DIR


def set_up_logging() -> None:
    """Log lines go to stderr: stdout holds tables alone. Ranks other than 0 only warn."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.INFO if _rank() == 0 else logging.WARNING)


def _rank() -> int:
    """This process among those that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


# ------------------------------------------------------------------------------------------ one job


def _job(
    config_cls: type, fn: Callable, swept: set[str] | None, failures: list[JobFailed], main_pid: int
) -> Callable[[DictConfig], None]:
    """The function Hydra calls once a run.

    swept     keys that differ between the arms of a sweep; None outside multirun
    failures  takes the failures of this process, so that a failing arm does not stop the others; in
              any other process (a launcher's worker) JobFailed is raised instead
    """

    def job(cfg: DictConfig) -> None:
        # unresolved: an override that holds ${...} is wanted as it was typed
        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        c, run_dir = None, None
        is_ours = False  # the directory is prepared and locked by this run
        try:
            c = to_config(cfg, config_cls)
            if hasattr(c, "runs_dir"):
                run_dir, has_finished = _prepare(c, overrides, swept or ())
                is_ours = True
                if has_finished:
                    print_finished(run_dir)
                    return
                log.info("run directory: %s", run_dir)
            elif getattr(c, "out", None):
                run_dir = Path(c.out)
                if swept:
                    run_dir /= run_path(c, overrides, swept=swept).name
            fn(c, run_dir)
        except Exception as error:
            is_usage = not is_ours and isinstance(error, ValueError | UsageError)
            message = str(error) if isinstance(error, EXPECTED) else ""
            first_line = (message or repr(error)).splitlines()[0]
            if not _is_said_elsewhere(error, c):
                if is_ours or swept is not None:
                    where = (
                        run_dir if is_ours else _arm_dir(cfg, config_cls, overrides, swept or set())
                    )
                    if where is not None:
                        _write_error(where, message or repr(error), error)
                        message += (
                            f"\n(traceback in {where / 'error.txt'})" if message and is_ours else ""
                        )
                sys.stderr.write(f"rank {_rank()}: " if _world() > 1 else "")
                if message and not _wants_traceback():
                    sys.stderr.write(f"{message}\n")
                else:
                    traceback.print_exc()
            typed = " ".join(o for o in overrides if not o.startswith("++data.sets={"))
            failure = JobFailed(f"{typed}: {first_line}", USAGE_ERROR if is_usage else JOB_ERROR)
            if os.getpid() != main_pid:
                raise failure from None
            if _world() > 1 and c is not None and not getattr(error, "is_shared", False):
                _leave(failure.exit_code)
            failures.append(failure)
        finally:
            close_open_trackers()  # of a run that did not come to its end
            if is_ours:
                release_run_dir(run_dir)

    return job


def to_config(cfg: DictConfig, config_cls: type) -> Any:
    """The plain dataclass of a composed config.

    Raises ValueError for an illegal value (from its __post_init__) and UsageError for a missing
    one.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UsageError(
                "\n".join(
                    f"{key} is not set; for example {EXAMPLES.get(key, f'{key}=...')}"
                    for key in missing
                )
            )
        c = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UsageError(_config_message(error)) from None
    assert isinstance(c, config_cls)
    data = getattr(c, "data", None)
    if is_dataclass(data) and not data.root and not data.sets and data.format not in SELF_CONTAINED:
        raise UsageError(f"data.root is not set; for example {EXAMPLES['data.root']}")
    for name, source in data.sets.items() if is_dataclass(data) else ():
        if not source.root and source.format not in SELF_CONTAINED:
            raise UsageError(
                f"data.sets.{name}.root is not set; for example"
                f" data.sets.{name}.root=my_pairs.jsonl"
            )
    return c


def _arm_dir(
    cfg: DictConfig, config_cls: type, overrides: list[str], swept: set[str]
) -> Path | None:
    """Where a sweep's arm that failed before its directory was prepared may leave error.txt."""
    names = {f.name for f in fields(config_cls)}
    if "runs_dir" not in names:
        return None
    path = run_path(cfg, overrides, swept=swept, cls=config_cls)
    return None if is_finished(path) or (path / "checkpoints").exists() else path


def _prepare(c: Any, overrides: list[str], swept: set[str] | tuple) -> tuple[Path, bool]:
    """(run directory, whether all there is to do is to show its result).

    Under torchrun rank 0 alone prepares it, and every rank learns how that went.
    """

    def prepare() -> tuple[Path, bool]:
        run_dir = prepare_run_dir(c, overrides, swept=swept)
        return run_dir, c.resume and is_finished(run_dir)

    if _world() == 1:
        return prepare()
    from runtime.distributed import init_ranks  # torch: --help need not wait for it

    return init_ranks(c.runtime.device).on_main(prepare)


def _is_said_elsewhere(error: Exception, c: Any) -> bool:
    """Whether another rank says what is wrong: settings fail alike on all of them."""
    return getattr(error, "is_said_elsewhere", False) or (c is None and _rank() > 0)


def _wait_for_ranks() -> None:
    """Leave with an error only when all are ready to: torchrun ends the others when the first has
    left, be it in the middle of what they say."""
    if _world() > 1:
        from runtime.distributed import init_ranks

        sys.stderr.flush()
        with contextlib.suppress(ValueError, OSError, RuntimeError):  # there is no telling whom
            init_ranks("cpu").gather_objects(None)


def _leave(exit_code: int) -> None:
    """End this process at once: other ranks wait for it in a collective, and torchrun, which ends
    them, only sees that it is gone. What is usually done at exit might wait for them in turn."""
    close_open_trackers()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _write_error(folder: Path, message: str, error: Exception) -> None:
    if isinstance(error, ConnectionError) and (folder / "error.txt").exists():
        return  # another rank has ended and left its reason there
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / "error.txt", f"{message}\n\n{traceback.format_exc()}")
    except OSError as error:
        log.warning("error.txt could not be written: %s", error)


def _wants_traceback() -> bool:
    return os.environ.get("ROOK_TRACEBACK", "0") not in ("0", "")


def _config_message(error: Exception) -> str:
    """Hydra's and OmegaConf's messages: what, where, and what is usually wrong."""
    text = str(error).rstrip()
    cause = str(error.__cause__ or "").strip()
    if cause and cause not in text:
        text += f"\n{cause}"
    if re.search(r"Key 'experiment' (not|is not) in", text):
        text += "\nis `# @package _global_` the first line of the experiment file?"
    return text


# ------------------------------------------------------------------------ words of the command line


def split_args(args: list[str]) -> tuple[list[str], list[str], argparse.Namespace]:
    """(flags, overrides, parsed flags): given to Hydra in this order, `a=1 -m b=2` works."""
    namespace, unknown = get_args_parser().parse_known_args(args)
    overrides, flags = [], []
    # argparse stops filling its list at the first flag: later key=value words land in `unknown`
    loose = [*namespace.overrides, *(u for u in unknown if not u.startswith("-"))]
    bad = [u for u in unknown if u.startswith("-")]
    if bad:
        raise UsageError(
            f"unknown option {bad[0]}; settings are written key=value without dashes,"
            " e.g. optim.lr=1e-4"
        )
    for arg in args:
        if arg in loose:
            loose.remove(arg)
            overrides.append(arg)
        else:
            flags.append(arg)
    return flags, overrides, namespace


def prepare_overrides(
    args: list[str], cls: type, groups: dict[str, list[str]], program: str, *, is_multirun: bool
) -> list[str]:
    """Overrides that Hydra can parse and that name existing settings only.

    Free-text values (every setting of type str: paths, names, prompts) are quoted, so Arabic,
    spaces, `=`, `,`, `~`, `#`, `(` and names such as 1e3 need no quoting by the user. Under
    multirun a comma separates choices of such a setting, unless the whole value is an existing path
    or is quoted by the user. New keys of a mapping (data.columns.query=...) get the `++` that Hydra
    asks for.
    Raises UsageError for a word that names no setting, with the nearest names.
    """
    prepared = []
    # names under data.sets: Hydra makes no element of a typed mapping by itself
    new_sets: dict[str, None] = {}
    for arg in args:
        match = re.match(r"(\+\+|\+|~)?([^=]*)(=)?(.*)", arg, re.DOTALL)
        assert match is not None
        prefix, key, equals, value = match.groups(default="")
        if not equals and prefix != "~":
            raise UsageError(
                f"'{arg}' is not a setting; write key=value, e.g. optim.lr=1e-4"
                f" (see {program} --help)"
            )
        group = key.split("@")[0]
        if group.split(".")[0] == "hydra" or group.startswith("hydra/"):
            prepared.append(arg)
            continue
        if group in groups:
            _check_group_value(group, value, groups[group], arg, is_multirun=is_multirun)
            prepared.append(arg)
            continue
        kind = setting_type(cls, key)
        if kind is None:
            raise UsageError(_unknown_setting(key, arg, cls, groups, program))
        in_mapping = _is_in_mapping(cls, key)
        if prefix == "~":
            if not in_mapping:
                raise UsageError(
                    f"'{arg}': a setting cannot be removed; give it a value, or null where that is"
                    " legal"
                )
        else:
            if in_mapping:
                prefix = prefix or "++"
                if re.fullmatch(r"data\.sets\.[^.]+\..+", key):
                    new_sets[key.split(".")[2]] = None
            if kind is str or set(get_args(kind)) == {str, NoneType}:
                value = quote_value(
                    value,
                    is_optional=NoneType in get_args(kind),
                    is_path=_is_path_key(key),
                    is_multirun=is_multirun,
                )
            elif get_origin(kind) is dict and not prefix and value not in ("", "null"):
                prefix = "++"  # its keys are new to Hydra, as one alone would be
            elif kind is Any and not _parses(f"{key}={value}"):
                value = _quoted(value)
            elif get_origin(kind) is list:
                value = _list_value(key, value, kind, is_multirun=is_multirun)
        word = f"{prefix}{key}{equals}{value}"
        if not _parses(word):
            raise UsageError(
                f"cannot read '{arg}': a list is written '{key}=[a,b]', a mapping '{key}={{a: b}}',"
                f" each in single quotes for the shell; text with special characters"
                f" '{key}=\"...\"'"
            )
        prepared.append(word)
    if new_sets:
        prepared.insert(0, "++data.sets={" + ",".join(f"{name}:{{}}" for name in new_sets) + "}")
    return prepared


def quote_value(value: str, *, is_optional: bool, is_path: bool, is_multirun: bool) -> str:
    """`value` of a free-text setting, quoted for Hydra's grammar unless the user did so or it is
    null or empty.
    """
    if not value or (len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"):
        return value
    if is_optional and value.lower() == "null":
        return value
    if is_path and value.startswith("~/") and not os.path.exists(value):
        value = os.path.expanduser(value)  # shells leave the ~ of key=~/x alone
    if is_multirun and not os.path.exists(value):
        if re.match(r"(choice|sort|shuffle|glob|range)\(", value):
            return value
        if "," in value:
            rules = {"is_optional": is_optional, "is_path": is_path, "is_multirun": True}
            return ",".join(quote_value(part.strip(), **rules) for part in _split_choices(value))
    return _quoted(value)


def _list_value(key: str, value: str, kind: Any, *, is_multirun: bool) -> str:
    """`value` of a list, with quotes around the texts that Hydra's grammar would not take.

    Raises UsageError for a value without brackets, which Hydra takes for choices of a sweep, or for
    an int.
    """
    if not value.startswith(("[", "${")) and not (is_multirun and "(" in value):
        raise UsageError(
            f"{key} is a list, found '{value}'; write '{key}=[{value}]', in single quotes for the"
            " shell"
        )
    if get_args(kind) != (str,) or not re.fullmatch(r"\[[^\[\]]+\]", value):
        return value
    parts = [part.strip() for part in _split_choices(value[1:-1])]
    plain = re.compile(r"""[A-Za-z_/.][-\w./:]*|".*"|'.*'|""", re.ASCII)
    return f"[{','.join(p if plain.fullmatch(p) else _quoted(p) for p in parts)}]"


def _quoted(value: str) -> str:
    return QuotedString(text=value, quote=Quote.double).with_quotes()


def _split_choices(value: str) -> list[str]:
    """Cut at the commas outside quotes."""
    return re.findall(r"""(?:"[^"]*"|'[^']*'|[^,])+""", value)


def _is_path_key(key: str) -> bool:
    return key in PATH_KEYS or bool(re.fullmatch(r"data\.sets\.[^.]+\.(root|texts)", key))


def _parses(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def swept_keys(overrides: list[str]) -> set[str]:
    """Keys of the overrides that hold several choices."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {o.key_or_group for o in parsed if o.is_sweep_override()}


def setting_type(cls: type, key: str) -> Any:
    """Declared type of the dotted setting `key` under dataclass `cls`, inside mappings too; None if
    there is none.
    """
    kind: Any = cls
    for part in key.split("."):
        if is_dataclass(kind):
            kind = get_type_hints(kind).get(part)
        elif get_origin(kind) is dict and part:
            kind = get_args(kind)[1]
        else:
            return None
        if kind is None:
            return None
    return kind


def _is_in_mapping(cls: type, key: str) -> bool:
    parts = key.split(".")
    return any(
        get_origin(setting_type(cls, ".".join(parts[:n]))) is dict for n in range(1, len(parts))
    )


def group_options(cls: type, conf_dir: Path, extra_dir: Path | None = None) -> dict[str, list[str]]:
    """Config groups and their options, in the order of the settings; folders of other programs are
    left out.

    extra_dir  what --config-dir names: more options, or files in place of ours
    """
    groups = {}
    for name in (*DELTA_GROUPS, *(f.name for f in fields(cls))):
        folders = [
            folder / name for folder in (conf_dir, extra_dir) if folder and (folder / name).is_dir()
        ]
        if folders:
            groups[name] = sorted({f.stem for folder in folders for f in folder.glob("*.yaml")})
    return groups


def _check_group_value(
    group: str, value: str, options: list[str], arg: str, *, is_multirun: bool
) -> None:
    """Raise UsageError where `value` is no option of the group; Hydra's own syntax (quotes,
    functions) is let pass.
    """
    choices = value.split(",") if is_multirun and "(" not in value else [value]
    for choice in choices:
        choice = choice.strip()
        if (
            choice in options
            or choice in ("", "null")
            or choice[0] in "\"'[{$"
            or (is_multirun and "(" in choice)
        ):
            continue
        near = difflib.get_close_matches(choice, options, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        text = f"no option '{choice}' in group '{group}' (in '{arg}'){hint}"
        text += f"\noptions: {', '.join(options)}"
        if group in GROUP_PATH_KEY and not near:
            own = "local" if group == "data" else "custom"
            text += f"\nfor a path or hub id: {group}={own} {GROUP_PATH_KEY[group]}={choice}"
        raise UsageError(text)


def _unknown_setting(
    key: str, arg: str, cls: type, groups: dict[str, list[str]], program: str
) -> str:
    if key in (*DELTA_GROUPS, "evaluate", "prepare"):
        return f"'{arg}': {program} takes no '{key}'"
    keys = known_keys(cls) + ([] if "." in key else [*groups])
    prefix = re.match(r"data\.sets\.[^.]+\.", key)
    if prefix:
        from conf.schema import SourceConfig

        keys += [prefix.group(0) + name for name in known_keys(SourceConfig)]
    leaf = key.split(".")[-1]
    same_leaf = [k for k in keys if k.split(".")[-1] == leaf]
    near = list(dict.fromkeys([*same_leaf, *difflib.get_close_matches(key, keys, n=3)]))[:3]
    if not near:
        leaves = {k.split(".")[-1]: k for k in keys}
        near = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=3)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"no setting named '{key}' (in '{arg}'){hint}\nall settings: python {program} --cfg job"


# --------------------------------------------------------------------------------------------- help


def headline(path: Path) -> str:
    """First sentence of a YAML file's leading comments, without `Question:` and without the package
    line.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ").strip()
        if text and not text.startswith("@package"):
            return text.removeprefix("Question:").strip()
    return ""


def list_experiments(conf_dir: Path = CONF_DIR) -> list[str]:
    """Names that +experiment= takes."""
    return sorted(f.stem for f in (conf_dir / "experiment").glob("*.yaml"))


def task_of(experiment: str, conf_dir: Path = CONF_DIR) -> str:
    """retrieval | rerank, as the experiment's file says."""
    return OmegaConf.load(conf_dir / "experiment" / f"{experiment}.yaml").get("task", "retrieval")


def help_text(cls: type, config_name: str, conf_dir: Path, program: str) -> str:
    """What --help prints."""
    text = HELP.get(config_name, "Use: python {program} key=value ...\n").format(program=program)
    for group, options in group_options(cls, conf_dir).items():
        plus = "+" if group in DELTA_GROUPS else ""
        title = f"{group.capitalize()}s" if plus else f"Options of {group}"
        folder = Path(os.path.relpath(conf_dir / group, CONF_DIR.parent)).as_posix()
        text += f"\n{title} ({plus}{group}=<name>, files in {folder}/):\n"
        for option in options:
            text += f"  {option:16} {headline(conf_dir / group / f'{option}.yaml')}\n"
    text += (
        f"\nEvery setting and its value:    python {program} --cfg job\n"
        "What each means, legal ranges:  conf/schema.py\n"
        "Several values, one run each:   add -m, e.g. -m optim.lr=1e-5,1e-4\n"
        "Traceback of an error:          ROOK_TRACEBACK=1 (or error.txt in the run directory)\n"
    )
    return text


HELP = {
    "train": """\
Train a text retriever: python {program} [+experiment=<name>] [group=<option>] [setting=<value>] ...

  python {program} +experiment=quickstart
      learn from the Python code on this machine
  python {program} data=local data.root=my_pairs.jsonl name=mine
      your own (query, positive[, negative ...]) rows
  python {program} data=local data.root=my_pairs.jsonl model=e5_small optim.epochs=3
      another model, another setting
  python {program} ... resume=true
      go on with a run that was stopped
  python {program} -m ... seed=0,1,2 optim.lr=1e-5,1e-4
      a sweep: one run a combination

Everything a run leaves is in runs/<name>/<overrides>/seed<k>/ (report.md, export/, result.json).
""",
    "evaluate": """\
Evaluate a model on a test set: python {program} model=<model> data=<test set> [setting=<value>] ...

  python {program} model=runs/mine/default/seed0 data=my_beir_folder
      a run, a model folder or a hub id, on a BEIR folder or a file of pairs
  python {program} model=all-MiniLM-L6-v2 data=my_beir_folder split=dev 'dims=[384,128]'
      another split; several dimensions from one encoding
  python {program} model=runs/mine/default/seed0 data=my_beir_folder against=bm25 out=eval/mine
      paired differences to another model or eval.json; files in eval/mine

  python {program} model=<cross-encoder> data=my_beir_folder first_stage=bm25 rerank_k=100
      before and after reranking what BM25, a retriever or a run file finds
  python {program} model=<cross-encoder> data=rows.jsonl texts=my_beir_folder 'also=[bm25,random]'
      several models side by side on the candidates that labelled rows bring

  split=test|dev|...   'dims=[...]'   precision=fp32|bf16|int8|binary   bm25=true|false
  'precision=[fp32,int8,binary]'   several from one encoding, in rows "dim 384, int8"; in eval.json
      under "384 int8", in out= as run_384_int8.trec (run.trec is the first)
  on_bad_row=skip   leaves rows out that cannot be read; listed in out=, as bad_rows.jsonl
""",
    "prepare": """\
Make a training set: python {program} 'stages=[<stage>,...]' data=<data> out=<folder>

  python {program} 'stages=[mine]' data=my_beir_folder out=mined mine.model=runs/mine/default/seed0
      hard negatives: the nearest passages by a model, 5% below the positive
  python {program} 'stages=[mine]' data=my_pairs.jsonl out=mined 'mine.sources=[bm25]'
      from BM25
  python {program} ... 'mine.sources=[model,bm25]' mine.reranker=runs/reranker/default/seed0
      from both; what a cross-encoder takes for an answer is left out

Each stage writes out/<stage>.jsonl for the next one and for train.py (data=local data.root=...).
The same command again goes on where it was stopped. What was kept and dropped: out/report.md.
""",
}
