"""The command line: every way to mistype a setting ends in a message, and ordinary values
survive.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conf.cli import CONF_DIR, help_text, list_experiments, main, quote_value
from conf.schema import EvaluateConfig, PrepareConfig, SourceConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run main() in this process from an empty folder: (exit code, calls of the job, stdout,
    stderr).
    """
    monkeypatch.chdir(tmp_path)

    def run(*args, cls=TrainConfig, job=None):
        calls = []

        def record(c, run_dir):
            calls.append((c, run_dir))
            if job is not None:
                job(c, run_dir)

        name = cls.__name__.removesuffix("Config").lower()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
        code = 0
        try:
            main(cls, name, record)
        except SystemExit as error:
            code = error.code
        out = capfd.readouterr()
        return code, calls, out.out, out.err

    return run


MISTYPED = [
    (["optim.lrr=1"], "no setting named 'optim.lrr'.*did you mean optim.lr"),
    (["+optim.lrr=1"], "no setting named 'optim.lrr'.*did you mean optim.lr"),
    (["++optim.lrr=1"], "no setting named 'optim.lrr'.*did you mean optim.lr"),
    (["~optim.lrr"], "no setting named 'optim.lrr'.*did you mean optim.lr"),
    (["lr=1"], "no setting named 'lr'.*optim.lr"),
    (["batch_size=1"], "optim.batch_size"),
    (["optimm=adamw"], "did you mean optim"),
    (["hydr.verbose=true"], "no setting named"),
    (["loss.dims.0=3"], "no setting named 'loss.dims.0'"),
    (["data.sets.a.roof=x"], "did you mean data.sets.a.root"),
    (["~optim.lr"], "cannot be removed"),
    (["optim.lr=fast"], "'fast' of type 'str' could not be converted to Float"),
    (["optim.lr=-1"], r"^optim.lr \(-1.0\) must be > 0$"),
    (["loss.temperature=-0.05"], "must be > 0; common values"),
    (["model.pooling=middle"], "must be one of mean, cls, last, max"),
    (["+experiment=typo"], "no option 'typo' in group 'experiment'.*options: .*quickstart"),
    (["+experiment=quickstrat"], "did you mean quickstart"),
    (["optim=typo"], "no option 'typo' in group 'optim'.*options: adamw"),
    (["experiment=toy"], r"\+experiment=toy"),
    (["data=pairs.jsonl"], "data=local data.root=pairs.jsonl"),
    (["model=my/folder"], "model=custom model.base=my/folder"),
    (["model=custom"], "model.base is not set; for example model=custom model.base="),
    (["data=local"], "data.root is not set; for example data=local data.root="),
    (["data.sets.a.format=jsonl"], "data.sets.a.root is not set"),
    (["resume"], "'resume' is not a setting; write key=value"),
    (["--lr=1"], "unknown option --lr=1; settings are written key=value"),
    (["optim.lr=["], r"cannot read 'optim.lr=\['"),
    (["optim.lr=1e-4,1e-3"], "--multirun"),
    (["name=a/b"], "must be the name of one folder"),
    (["name="], "must be the name of one folder"),
    (["model.query_prompt=${nope}"], "nope"),
]


@pytest.mark.parametrize("args, wanted", MISTYPED, ids=[" ".join(a) for a, _ in MISTYPED])
def test_mistyped_setting_is_an_error_with_the_remedy(run, args, wanted, tmp_path):
    """Hydra accepts `+optim.lrr=1` and drops it; argparse and OmegaConf end in tracebacks."""
    has_data = any(a.startswith(("data", "experiment")) for a in args)
    code, calls, _, err = run(*args, *([] if has_data else ["data=toy"]))
    assert code == 2 and calls == []
    assert re.search(wanted, err, re.DOTALL | re.MULTILINE), err
    assert "Traceback" not in err and "Error executing" not in err
    assert not (tmp_path / "runs").exists(), "a command that cannot be run leaves nothing behind"


def test_experiment_file_with_unknown_key_names_file_key_and_class(run, tmp_path):
    """Plain YAML would take `lrr:` without a word."""
    (tmp_path / "more/experiment").mkdir(parents=True)
    path = tmp_path / "more/experiment/mine.yaml"
    path.write_text("# @package _global_\noptim:\n  lrr: 1\n")
    code, calls, _, err = run("--config-dir", "more", "+experiment=mine", "data=toy")
    assert code == 2 and not calls
    assert "experiment/mine" in err and "'lrr'" in err and "OptimConfig" in err


def test_experiment_file_without_package_line_is_an_error(run, tmp_path):
    """Without `# @package _global_` plain Hydra puts the file under `experiment` and nothing
    changes.
    """
    (tmp_path / "more/experiment").mkdir(parents=True)
    path = tmp_path / "more/experiment/mine.yaml"
    path.write_text("optim:\n  lr: 1\n")
    code, calls, _, err = run("--config-dir", "more", "+experiment=mine", "data=toy")
    assert code == 2 and not calls
    assert "Key 'experiment' not in 'TrainConfig'" in err and "@package _global_" in err
    path.write_text("# @package _global_\n# Question: ?\noptim:\n  lr: 1\n")
    code, calls, _, _ = run("--config-dir", "more", "+experiment=mine", "data=toy")
    assert code == 0 and calls[0][0].optim.lr == 1


@pytest.mark.parametrize("value, found", [("auto", "auto"), ("12", 12), ("0.5", 0.5)])
def test_a_setting_that_is_a_number_or_a_word(run, value, found):
    """A number in quotes would be a word."""
    code, calls, _, err = run(f"runtime.activation_budget_mib={value}", "data=toy")
    assert code == 0, err
    assert calls[0][0].runtime.activation_budget_mib == found
    code, calls, _, err = run("runtime.activation_budget_mib=some", "data=toy")
    assert code == 2 and "runtime.activation_budget_mib (some) must be MiB" in err


AWKWARD = [
    "\u0628\u064a\u0627\u0646\u0627\u062a \u0627\u0644\u062a\u062f\u0631\u064a\u0628",
    "a=b", "a,b", "~x", "#1", "(1)", "1e3", "null_", "a b", "it's", 'q"q',
    "back\\", "a:b", "[x]", "{x}", "$x", "true", "007", "a'b\"c\\", "query: "]  # fmt: skip


@pytest.mark.parametrize("value", AWKWARD)
def test_awkward_names_paths_and_prompts_arrive_as_typed(run, value):
    """Hydra's grammar rejects most of these and reads 1e3, true and 007 as something else."""
    code, calls, _, err = run(
        f"name={value}", f"data.cache_dir=dir/{value}/x", f"model.query_prompt={value}",
        f"data.sets.s.columns.query={value}", f"data.sets.s.root={value}",
    )  # fmt: skip
    assert code == 0, err
    c, run_dir = calls[0]
    assert c.name == c.model.query_prompt == c.data.sets["s"].columns["query"] == value
    assert c.data.sets["s"].root == value
    assert run_dir == Path("runs") / value / run_dir.parts[2] / "seed0" and run_dir.is_dir()
    assert c.data.cache_dir == f"dir/{value}/x"


def test_null_and_the_users_own_quotes_keep_their_meaning(run):
    """Quoting everything would make the word 'null' of every null."""
    _, calls, _, _ = run("data=toy", "model.query_prompt=null", "model.passage_prompt='p: '")
    assert calls[0][0].model.query_prompt is None and calls[0][0].model.passage_prompt == "p: "


def test_keys_under_mappings_need_no_plus(run):
    """Hydra refuses a key that a mapping does not hold yet, and typed elements it cannot make."""
    code, calls, _, err = run(
        "data.filter.label=0", "data.filter.kind=a(b=c", "data.columns.query=premise",
        "data.root=x",
    )  # fmt: skip
    assert code == 0, err
    data = calls[0][0].data
    assert data.filter == {"label": 0, "kind": "a(b=c"} and data.columns == {"query": "premise"}
    code, calls, _, err = run(
        "data.sets.a.root=x y", "data.sets.a.weight=2", "+data.sets.b.root=z",
        "data.sets.b.columns.positive=p", "name=sets",
    )  # fmt: skip
    assert code == 0, err
    data = calls[0][0].data
    assert data.sets["a"] == SourceConfig(root="x y", weight=2.0)
    assert data.sets["b"] == SourceConfig(root="z", columns={"positive": "p"})


def test_a_mapping_can_be_written_whole(run):
    """As the messages about missing columns tell a user to write it."""
    code, calls, _, err = run(
        "data.columns={query: premise, positive: hypothesis}",
        "data.filter={label: 0}",
        "data.root=x",
    )
    assert code == 0, err
    data = calls[0][0].data
    assert data.columns == {"query": "premise", "positive": "hypothesis"}
    assert data.filter == {"label": 0}


def test_settings_of_one_data_set_beside_several_are_refused(run):
    """Nothing would read them: the sets have their own."""
    code, _, _, err = run("data.sets.a.root=x", "data.columns.query=q", "data.query_prompt=p")
    assert code == 2
    assert "got beside it data.columns, data.query_prompt, which none of them would read" in err
    assert "set data.sets.<name>.columns" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["+experiment=toy", "data.root=x.jsonl"], "data.root, which it would not read; leave it"),
        (["data=toy", "data.texts=x", "data.dev_split=v"], "data.dev_split, data.texts, which"),
        (["data=pydocs", "data.columns.query=q", "data.filter.a=1"], "data.columns, data.filter,"),
        (["data=pydocs", "data.test_split=gold"], "beside it data.test_split, which"),
        (["data.sets.a.format=toy", "data.sets.a.root=x"], "beside it data.root, which"),
        (["data=pydocs", "data.dev_fraction=0"], "split by module, got data.dev_fraction, which"),
    ],
)
def test_settings_that_made_data_would_not_read_are_refused(run, args, words):
    """A run on generated examples was reported with the user's own file as its root."""
    code, calls, _, err = run(*args)
    assert code == 2 and not calls and words in err, err
    assert run("data=pydocs", "data.root=x")[0] == run("data=toy")[0] == 0


def test_job_gets_plain_dataclasses(run):
    """A DictConfig past main would answer a mistyped attribute with None."""
    _, calls, _, _ = run("data=local", "data.root=x", "loss.dims=[8,4]", "data.columns.query=q")

    def walk(value):
        assert type(value).__module__.split(".")[0] in ("builtins", "conf"), type(value)
        if dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                walk(getattr(value, f.name))

    walk(calls[0][0])
    assert type(calls[0][0]) is TrainConfig and calls[0][0].loss.dims == [8, 4]


def test_no_dict_config_and_no_torch_are_needed_for_help(tmp_path):
    """--help must answer at once, from any folder, without the second that torch takes."""
    code = (
        "import sys; from conf.cli import main; from conf.schema import TrainConfig\n"
        "sys.argv = ['train.py', '--help']; main(TrainConfig, 'train', None)\n"
        "assert 'torch' not in sys.modules and 'wandb' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for word in ("+experiment=quickstart", "data=local data.root=", "resume=true", "--cfg job"):
        assert word in done.stdout


def test_help_lists_every_option_and_experiment_with_a_headline():
    """A new YAML file without a first comment would be an empty line in --help."""
    text = help_text(TrainConfig, "train", CONF_DIR, "train.py")
    for path in CONF_DIR.glob("*/*.yaml"):
        if path.parent.name in ("evaluate", "prepare"):
            continue
        lines = [line for line in text.splitlines() if line.split()[:1] == [path.stem]]
        assert any(len(line.split()) > 2 for line in lines), f"{path} has no headline"
    assert "model=" in help_text(EvaluateConfig, "evaluate", CONF_DIR / "evaluate", "evaluate.py")
    text = help_text(PrepareConfig, "prepare", CONF_DIR / "prepare", "prepare.py")
    assert "(+dataset=<name>, files in conf/prepare/dataset/)" in text


def test_cfg_job_prints_every_setting_and_runs_nothing(run):
    code, calls, out, _ = run("--cfg", "job", "+experiment=quickstart")
    assert code == 0 and not calls
    assert "temperature: 0.05" in out and "name: quickstart" in out


@pytest.mark.slow
def test_sweep_arms_are_kept_apart_and_a_failing_arm_stops_no_other(run, tmp_path):
    """One directory for all arms loses all but the last; Hydra raises the first arm's error
    only.
    """

    def job(c, run_dir):
        if c.optim.lr == 0.5 and c.seed == 1:
            raise ValueError("lr is too high: 0.5")
        (run_dir / "result.json").write_text("{}")

    args = ["-m", "data=toy", "seed=0,1", "optim.lr=1e-4,-1,0.5"]
    code, calls, _, err = run(*args, job=job)
    assert code != 0
    assert sorted(str(d) for _, d in calls) == [
        f"runs/run/data-toy+lr-{lr}/seed{seed}" for lr in ("0.0001", "0.5") for seed in (0, 1)
    ]
    assert "runs of this sweep that failed: 3" in err and "Traceback" not in err
    errors = sorted(str(p.relative_to(tmp_path / "runs/run")) for p in tmp_path.rglob("error.txt"))
    assert errors == [
        "data-toy+lr--1/seed0/error.txt",
        "data-toy+lr--1/seed1/error.txt",
        "data-toy+lr-0.5/seed1/error.txt",
    ]
    content = (tmp_path / "runs/run/data-toy+lr-0.5/seed1/error.txt").read_text()
    assert content.startswith("lr is too high: 0.5") and "Traceback" in content

    code, calls, out, _ = run("data=toy", "seed=0", "optim.lr=1e-4", "resume=true")
    assert code == 0 and not calls and "is finished" in out, "the arm's directory by one command"


def test_sweep_over_paths_and_result_neutral_settings_has_a_directory_each(run, tmp_path):
    """Neither is in the name of a plain run; two arms would meet."""
    (tmp_path / "a,b").mkdir()
    args = ["-m", "data=local", "runtime.threads=1,2", "model.base=m/x,n/x", "name=s"]
    code, calls, _, err = run(*args, "data.root=a,b")
    assert code == 0, err
    assert len({d for _, d in calls}) == 4
    assert {c.model.base for c, _ in calls} == {"m/x", "n/x"}
    assert {c.data.root for c, _ in calls} == {"a,b"}, "an existing path with a comma is one value"


def test_one_sweep_directory_is_accepted_by_evaluate(run, tmp_path):
    """`=` or `,` in a directory name would break model=<dir>."""
    _, calls, _, _ = run(
        "-m", "data=toy", "name=\u0628\u062d\u062b 1", "optim.lr=1e-4,1e-5", "loss.dims=[8,4]"
    )
    run_dir = calls[1][1]
    assert run_dir.is_dir() and "=" not in str(run_dir) and "," not in str(run_dir)
    code, calls, _, err = run(f"model={run_dir}", "data=x=1,y", cls=EvaluateConfig)
    assert code == 0, err
    assert calls[0][0].model == str(run_dir) and calls[0][0].data == "x=1,y"
    assert calls[0][1] is None


def test_evaluate_sweep_gives_each_arm_a_folder_under_out(run):
    _, calls, _, _ = run("-m", "model=m/x,n/x", "data=d", "out=o", cls=EvaluateConfig)
    folders = {str(d) for _, d in calls}
    assert len(folders) == 2 and all(f.startswith("o/model-x-") for f in folders)


@pytest.mark.parametrize(
    "cls, stages", [(EvaluateConfig, ["model=m"]), (PrepareConfig, ["stages=[mine]"])]
)
def test_a_sweep_over_seed_gives_each_arm_a_folder_under_out(run, cls, stages):
    """These folders have no part seed<k>: all arms would write into one, and the last be left."""
    code, calls, _, err = run("-m", *stages, "data=d", "out=o", "seed=0,1", cls=cls)
    assert code == 0, err
    assert len({d for _, d in calls}) == 2
    assert all(f"seed-{c.seed}" in d.name.split("+") for c, d in calls)


def test_errors_of_the_job_keep_their_traceback_where_it_belongs(run, tmp_path):
    """ValueError is the user's: a message.

    Anything else is ours: a traceback. Both leave error.txt.
    """

    def user(c, run_dir):
        raise ValueError("data/train.tsv:3: expected 3 fields, found 2")

    def fault(c, run_dir):
        raise KeyError("weight")

    code, _, _, err = run("data=toy", job=user)
    assert code == 1 and "Traceback" not in err and "train.tsv:3" in err and "error.txt" in err
    error_txt = tmp_path / "runs/run/data-toy/seed0/error.txt"
    assert "Traceback" in error_txt.read_text()
    code, _, _, err = run("data=toy", job=fault)
    assert code == 1 and "Traceback" in err and "KeyError: 'weight'" in err
    assert "KeyError" in error_txt.read_text()
    assert run("data=toy")[0] == 0 and not error_txt.exists(), "a new attempt starts clean"


def test_a_refused_start_writes_nothing_into_the_finished_run(run, tmp_path):
    """error.txt beside somebody's result.json would say that the finished run failed."""
    run("data=toy", job=lambda c, d: (d / "result.json").write_text("{}"))
    before = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    code, calls, _, err = run("data=toy")
    assert code == 2 and not calls
    assert "already holds result.json" in err and "resume=true" in err and "name=" in err
    code, calls, _, err = run("data=toy", "resume=true", "+experiment=quickstart", "name=run")
    assert code == 2 and "optim.lr: 2e-05" in err and "0.0006 now" in err
    after = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    assert after == before


def test_lists_of_names_stay_lists(run):
    """Quoted like a name, `[a,b]` would become one text; a colon is part of layers:<n>."""
    code, calls, _, err = run("data=toy", "model.freeze=[embeddings,layers:2]", "loss.dims=[]")
    assert code == 0, err
    assert calls[0][0].model.freeze == ["embeddings", "layers:2"] and calls[0][0].loss.dims == []
    code, calls, _, err = run("data=toy", "model.freeze=[]", "name=other")
    assert code == 0 and calls[0][0].model.freeze == [], err


def test_flags_may_stand_anywhere(run):
    """argparse stops collecting settings at the first flag."""
    code, calls, _, err = run("data=toy", "-m", "seed=0,1")
    assert code == 0, err
    assert [c.seed for c, _ in calls] == [0, 1]


@pytest.mark.slow
def test_whole_program_exit_codes_and_paths_relative_to_where_they_are_typed(tmp_path):
    """What a shell sees: Hydra changes folders in some settings and swallows exit codes in
    others.
    """
    script = tmp_path / "train.py"
    script.write_text(
        "from conf.cli import main\nfrom conf.schema import TrainConfig\n"
        "def train(c, run_dir):\n    print(open(c.data.root).read())\n"
        "if __name__ == '__main__':\n    main(TrainConfig, 'train', train)\n"
    )
    folder = tmp_path / "\u0645\u062c\u0644\u062f (1)"
    folder.mkdir()
    (folder / "a=b.txt").write_text("found it")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def shell(*args):
        return subprocess.run(
            [sys.executable, str(script), *args],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
        )

    done = shell("data.root=a=b.txt")
    assert done.returncode == 0 and "found it" in done.stdout, done.stderr
    assert (folder / "runs/run/default/seed0/config.yaml").is_file()
    assert shell("optim.lr=-1", "data.root=a=b.txt").returncode == 2
    done = shell("-m", "data.root=a=b.txt,missing", "name=s")
    assert done.returncode == 1 and "found it" in done.stdout and "missing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("value", AWKWARD)
def test_quoting_reads_back(value):
    """Against Hydra's own parser, not against our idea of it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    word = quote_value(value, is_optional=True, is_path=False, is_multirun=False)
    assert OverridesParser.create().parse_override(f"k={word}").value() == value


def test_experiments_are_listed():
    assert {"quickstart", "toy", "ray_docs", "ray_docs_minilm", "fever_dpr"} <= set(
        list_experiments()
    )
