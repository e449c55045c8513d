"""Precedence, TOML both ways, and what a user sees: one line, an exit code, help at once."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import cli
from fastgpt.config import ModelConfig, PretrainConfig
from fastgpt.errors import DataError, DivergedError, Preempted, UsageError
from fastgpt.presets import PRESETS


@pytest.fixture
def toml(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "x.toml"
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def parse(*argv: str) -> PretrainConfig:
    return cli.parse(PretrainConfig, argv)


def test_default_then_preset_then_file_then_flags(toml):
    file = toml("""
        preset = "gpt2-medium"
        [train]
        steps = 11
        seed = 12
        [optim]
        lr = 1
    """)
    config = parse("--config", file, "--seed", "13")
    assert config.train.log_every == PretrainConfig().train.log_every  # default
    assert config.model.n_layer == 24  # preset, named in the file
    assert config.optim.weight_decay == 0.1
    assert config.train.steps == 11  # file over preset
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.train.seed == 13  # flag over file
    over = parse("--config", file, "--preset", "gpt2-small", "--n-layer", "3")
    assert (over.preset, over.model.n_embd, over.model.n_layer) == ("gpt2-small", 768, 3)


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset", "gpt2-small", "--preset=gpt2-large"],
        ["--preset=gpt2-small", "--preset", "gpt2-large"],
    ],
)
def test_the_last_of_repeated_flags_counts(flags):
    config = parse(*flags, "--steps", "3", "--steps", "4")
    assert (config.preset, config.model.n_embd, config.train.steps) == ("gpt2-large", 1280, 4)


def test_lists_and_options_that_may_be_none():
    config = parse("--data", "a.txt", "b", "--n-kv-head", "2", "--betas", "0.8", "0.9")
    assert config.data.data == (Path("a.txt"), Path("b"))
    assert (config.model.n_kv_head, config.optim.betas) == (2, (0.8, 0.9))
    assert parse("--preset", "gpt3-small", "--window", "None").model.window is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 1", "unknown key 'stepz'; did you mean 'stop_at'|unknown key 'stepz'"),
        ("[train]\nstep = 1", r"x.toml: \[train\]: unknown key 'step'; did you mean 'steps'"),
        ("[train]\nqqq = 1", "unknown key 'qqq'; known: out, steps"),
        ("train = 3", "'train' must be a table, not 3"),
        ("[train]\nsteps = 'x'", r"\[train\]: steps is 'x'; it must be a whole number"),
        ("[train]\nsteps = 1.0", "steps is 1.0; it must be a whole number"),
        ("[train]\nsteps = true", "steps is True; it must be a whole number"),
        ("[train]\ncompile = 1", "compile is 1; it must be true or false"),
        ("[train]\nout = 1", "out is 1; it must be a path"),
        ("[train]\nmicro_batch = 'x'", "micro_batch is 'x'; it must be a whole number"),
        ("[train]\ndtype = 'fp8'", "dtype is 'fp8'; one of 'auto', 'bfloat16', 'float32'"),
        ("[optim]\nlr = '1'", "lr is '1'; it must be a number"),
        ("[optim]\nbetas = [0.9]", r"betas is \[0.9\]; it must be a list of 2"),
        ("[optim]\nbetas = [0.9, 'x']", "betas is 'x'; it must be a number"),
        ("[data]\ndata = 'a.txt'", "data is 'a.txt'; it must be a list"),
        ("[data]\ndata = [1]", "data is 1; it must be a path"),
        ("preset = 3", "--preset 3: no such preset"),
        ("a = 1\nb = c", r"--config .*x.toml: not valid TOML: .*line 2"),
    ],
)
def test_bad_files_are_named_with_the_key(toml, text, message):
    with pytest.raises(UsageError, match=message):
        parse("--config", toml(text))


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(UsageError, match=r"--config .*none\.toml: No such file"):
        parse("--config", str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match=r"--config .*: Is a directory"):
        parse("--config", str(tmp_path))
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(UsageError, match="not valid TOML"):
        parse("--config", str(tmp_path / "latin.toml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_its_own_toml(name, tmp_path):
    config = cli.from_tree(PretrainConfig, PRESETS[name] | {"preset": name}, name)
    path = tmp_path / "config.toml"
    path.write_text(cli.to_toml(cli.to_tree(config)))
    assert cli.from_tree(PretrainConfig, cli.read_toml(path, "--config"), name) == config


def test_resume_alone_takes_everything_from_the_run(tmp_path):
    config = parse(
        "--preset", "gpt2-small", "--steps", "7", "--data", "a.txt", "--mask-documents",
        "--lr", "1e-05", "--n-kv-head", "3", "--stop-at", "3", "--debug",
    )  # fmt: skip
    (tmp_path / "config.toml").write_text(cli.to_toml(cli.to_tree(config)))
    resumed = parse("--resume", str(tmp_path))
    parts = ("preset", "data", "train", "model", "optim")
    assert all(getattr(resumed, part) == getattr(config, part) for part in parts)
    # Options of that invocation are not options of the run.
    assert (resumed.stop_at, resumed.debug, resumed.resume) == (None, False, tmp_path)
    assert parse("--resume", str(tmp_path), "--steps", "9").train.steps == 9


def test_resume_refuses_what_it_would_ignore(tmp_path):
    (tmp_path / "config.toml").write_text("")
    for flag in ("--config", "--preset"):
        with pytest.raises(UsageError, match=f"{flag} gpt2-small: a resumed run keeps its own"):
            parse("--resume", str(tmp_path), flag, "gpt2-small")
    with pytest.raises(UsageError, match=r"--resume .*none/config\.toml: No such file"):
        parse("--resume", str(tmp_path / "none"))


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.one_of(
            st.booleans(),
            st.integers(-(2**63), 2**63 - 1),
            st.floats(allow_nan=False),
            st.text(st.characters(exclude_categories=["Cs"])),
            st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
        ),
    )
)
def test_toml_reads_back(tree):
    back = tomllib.loads(cli.to_toml(tree | {"table": tree}))
    assert back == tree | {"table": tree}
    assert {k: type(v) for k, v in back["table"].items()} == {k: type(v) for k, v in tree.items()}


def test_from_tree_builds_one_part():
    tree = cli.to_tree(ModelConfig(n_layer=3, window=4))
    assert "head_dim" not in tree
    assert cli.from_tree(ModelConfig, tree, "here") == ModelConfig(n_layer=3, window=4)


class Unlike(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("--x 1: no"), 2, "fastgpt: --x 1: no\n"),
        (DataError("a.txt:3: no"), 3, "fastgpt: a.txt:3: no\n"),
        (DivergedError("step 3"), 4, "fastgpt: step 3\n"),
        (Preempted("stopped"), 75, "fastgpt: stopped\n"),
        (KeyboardInterrupt(), 130, "fastgpt: interrupted\n"),
        (MemoryError(), 5, "fastgpt: out of memory: lower --micro-batch"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 5, "fastgpt: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "fastgpt: out of memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("debug", [False, True])
def test_errors_are_one_line_and_an_exit_code(error, code, line, debug, capsys, monkeypatch):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["x", "--debug"] if debug else ["x"])
    assert cli.command(main)() == code
    written = capsys.readouterr().err
    assert ("Traceback" in written) == debug
    last = written.splitlines(keepends=True)[-1]
    assert last.startswith(line)
    assert debug or written == last


def test_other_errors_are_bugs_and_keep_their_traceback():
    def main(argv):
        raise Unlike("our mistake")

    with pytest.raises(Unlike):
        cli.command(main)()
    assert cli.command(lambda argv: None)() == 0


def test_preemption_is_said_once(capsys, monkeypatch):
    def main(argv):
        raise Preempted("stopped")

    monkeypatch.setenv("RANK", "1")
    assert cli.command(main)() == 75
    assert capsys.readouterr().err == ""


def run(*args: str, **options) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *args], env=env, capture_output=True, text=True, **options
    )


HELP = """
import runpy, sys
sys.argv = ["x", "--help"]
try:
    runpy.run_module("fastgpt.{stage}", run_name="__main__", alter_sys=True)
except SystemExit as end:
    loaded = {{"torch", "numpy", "triton", "matplotlib"}} & set(sys.modules)
    sys.exit(f"imported {{loaded}}" if loaded else end.code)
"""


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("pretrain", ["--preset", "--batch-tokens", "--n-kv-head", "gpt3-175b", "--muon-lr"]),
        ("generate", ["--run", "--prompt", "--top-p"]),
        ("sft", ["--init", "--lora-rank", "--epochs"]),
        ("reward", ["--init", "--margin"]),
        ("ppo", ["--reward-fn", "--algorithm", "--kl-target", "--gae-lambda"]),
        ("dpo", ["--init", "--beta"]),
        ("evaluate", ["--judge", "--few-shot"]),
        ("pipeline", ["--price-per-hour", "--held-out"]),
    ],
)
def test_help_needs_no_torch(stage, flags):
    result = run("-c", HELP.format(stage=stage))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: python -m fastgpt.{stage} ")
    assert max(map(len, result.stdout.splitlines())) <= 100
    for flag in flags:
        assert flag in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["pretrain", "--stepz", "3"], 2, "--stepz"),
        (["pretrain", "--steps", "x"], 2, "--steps"),
        (["pretrain", "--steps", "0"], 2, "--steps 0: it must be at least 1"),
        (["generate"], 2, "--run"),
        (["generate", "--run", "x", "--top-p", "2"], 2, "--top-p 2.0 is out of range"),
        (["generate", "--run", "x", "--stop", ""], 2, "--stop"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_exit_with_2(args, code, words):
    result = run("-m", f"fastgpt.{args[0]}", *args[1:])
    assert result.returncode == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "fastgpt.pretrain", "--help"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=env)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, b"")


def test_a_terminal_without_a_letter_shows_another(monkeypatch):
    """Samples may hold any; the run is done, and must not end in a traceback."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.command(lambda argv: print("caf\u00e9 \u0436"))() == 0
    out.flush()
    assert out.buffer.getvalue() == "caf\u00e9 ?\n".encode("latin-1")


@pytest.mark.parametrize("line", ['data = "corpus.txt"', "data = [1]"])
def test_data_that_is_no_table_is_named(toml, line):
    with pytest.raises(UsageError, match="'data' must be a table"):
        parse("--config", toml(line))
