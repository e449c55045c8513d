"""What a user can get wrong: the exit status, and one line with what, where and how to mend it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import TINY, Done, Shell

from fastgpt.checkpoint import load_checkpoint
from fastgpt.tokenizer import Tokenizer


def only_line(done: Done) -> str:
    """The one line of the error; nothing looks like a crash."""
    assert "Traceback" not in done.out, done.out
    assert len(done.errors) == 1, done.out
    assert done.out.splitlines()[-1] == done.errors[0]
    return done.errors[0]


# Flags that cannot be used, and what the line must name.
USAGE = {
    "preset": (["--preset", "gpt5"], ["--preset gpt5", "no such preset"]),
    "heads": (["--n-head", 3], ["n_embd 32", "n_head 3"]),
    "kv heads": (["--n-head", 4, "--n-kv-head", 3], ["n_head 4", "n_kv_head 3"]),
    "steps": (["--steps", -5], ["--steps -5", "at least 1"]),
    "no steps": (["--steps", 0], ["--steps 0"]),
    "batch": (["--batch-tokens", 0], ["--batch-tokens 0"]),
    "stop": (["--stop-at", -1], ["--stop-at -1"]),
    "d_ff": (["--d-ff", -4], ["ff_dim is -4"]),
    "samples": (["--sample-tokens", 0], ["--sample-tokens 0"]),
    "momentum": (["--betas", 0.9, 2], ["betas", "2"]),
    "not a number": (["--grad-clip", "nan"], ["grad-clip", "nan"]),
    "negative window": (["--seq-len", -3], ["--seq-len -3"]),
    "vocabulary": (["--vocab-size", 10], ["vocab", "10"]),
    "huge": (["--vocab-size", 10**12, "--n-embd", 4096], ["parameters", "typo"]),
    "micro-batch": (["--micro-batch", 3], ["micro-batches of 3", "multiple of 3"]),
    "val fraction": (["--val-fraction", 2], ["val", "2"]),
    "device": (["--device", "tpu9"], ["--device tpu9"]),
    "kind of device": (["--device", "mps"], ["--device mps: only cpu and cuda"]),
    "seed": (["--seed", 10**22], ["--seed", "below 2**63"]),
    "learning rate": (["--lr", -1], ["--lr -1"]),
    "window": (["--seq-len", 64], ["seq", "64", "32"]),
    "no GPU": (["--device", "cuda"], ["--device cuda", "--device cpu"]),
    "kind of file": (["--data", "my.pdf"], ["my.pdf"]),
    "config": (["--config", "none.toml"], ["--config none.toml"]),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_named(case, shell: Shell, tmp_path, corpus):
    flags, named = USAGE[case]
    if case == "kind of file":
        (corpus / "my.pdf").write_bytes(b"%PDF")
    if case == "no GPU":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    arguments = ["--data", "my.txt", "--out", tmp_path / "run", "--steps", 4, *TINY, *flags]
    line = only_line(shell.pretrain(*arguments, expect=2))
    for part in named:
        assert part in line
    left = list((tmp_path / "run").iterdir()) if (tmp_path / "run").exists() else []
    assert left == [], "the same command, mended, must find an empty directory"


def test_an_unknown_flag_is_named(shell: Shell, tmp_path):
    done = shell.pretrain("--out", tmp_path / "run", "--batch-tokns", 4, expect=2)
    assert "--batch-tokns" in done.out
    assert "--batch-tokens" in done.out  # the suggestion
    assert not (tmp_path / "run").exists()


BAD_TOML = {
    "unknown key": ("[train]\nstpes = 4\n", ["[train]", "'stpes'", "'steps'"]),
    "unknown table": ("[mdel]\nn_layer = 1\n", ["'mdel'", "'model'"]),
    "type": ("[train]\nsteps = 'many'\n", ["steps", "'many'", "whole number"]),
    "syntax": ("[train\nsteps = 4\n", ["line 1"]),
    "choice": ("[optim]\noptimizer = 'sgd'\n", ["optimizer", "'sgd'", "'adamw'"]),
    "value": ("[train]\nsteps = -4\n", ["-4"]),
}


@pytest.mark.parametrize("case", BAD_TOML)
def test_a_bad_configuration_file_is_named(case, shell: Shell, tmp_path):
    text, named = BAD_TOML[case]
    (tmp_path / "x.toml").write_text(text)
    done = shell.pretrain(
        "--config", tmp_path / "x.toml", "--data", "my.txt", "--out", tmp_path / "run", expect=2
    )
    for part in named:
        assert part in only_line(done)


BAD_DATA: dict[str, tuple[str, bytes | None, list[str]]] = {
    "missing": ("none.txt", None, ["none.txt"]),
    "empty": ("a.txt", b"", ["a.txt", "empty"]),
    "blank": ("a.txt", b" \n\n", ["a.txt", "no documents"]),
    "encoding": ("a.txt", b"good\nbad \xff\xfe\n", ["a.txt:2", "byte 9", "UTF-8"]),
    "json": ("a.jsonl", b'{"text": "one"}\n{"text": "two"\n', ["a.jsonl:2", "JSON"]),
    "key": ("a.jsonl", b'{"text": "one"}\n{"body": "two"}\n', ["a.jsonl:2", "'text'"]),
    "gzip": ("a.jsonl.gz", b'{"text": "one"}\n', ["a.jsonl.gz"]),
    "short": ("a.txt", b"Only a few words are here.\n", ["seq", "33", "more text"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_with_its_place(case, shell: Shell, tmp_path):
    name, content, named = BAD_DATA[case]
    path, run = tmp_path / name, tmp_path / "run"
    if content is not None:
        path.write_bytes(content)
    arguments = ["--data", "my.txt", path, "--out", run, "--steps", 4, *TINY]
    if case in ("blank", "short"):
        arguments[1] = path
    line = only_line(shell.pretrain(*arguments, expect=3))
    for part in named:
        assert part in line
    assert not run.exists() or list(run.iterdir()) == []


@pytest.mark.parametrize("content", [None, "", "{}", '{"version": "1.0", "model": {"type": "x"}}'])
def test_a_tokenizer_that_cannot_be_read_is_named(content, shell: Shell, tmp_path):
    path, run = tmp_path / "mine.json", tmp_path / "run"
    if content is not None:
        path.write_text(content)
    arguments = ["--data", "my.txt", "--out", run, "--steps", 4, *TINY, "--tokenizer", path]
    assert str(path) in only_line(shell.pretrain(*arguments, expect=3))
    assert list(run.iterdir()) == []


def test_bad_documents_can_be_skipped(shell: Shell, tmp_path):
    path, run = tmp_path / "a.jsonl", tmp_path / "run"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"\n{"body": 3}\n')
    arguments = ["--data", "my.txt", path, "--out", run, "--steps", 2, *TINY]
    shell.pretrain(*arguments, "--on-bad-data", "skip")
    assert json.loads((run / "tokens" / "meta.json").read_text())["bad"] == 2


def test_a_directory_in_use_is_left_alone(shell: Shell, fresh):
    run = fresh()
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    done = shell.pretrain("--data", "my.txt", "--out", run, "--steps", 4, *TINY, expect=2)
    assert "not empty" in only_line(done)
    assert f"--resume {run}" in only_line(done)
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before


@pytest.mark.parametrize("what", ["missing", "empty", "a file"])
def test_resuming_what_is_no_run_is_an_error(what, shell: Shell, tmp_path):
    run = tmp_path / "run"
    if what == "empty":
        run.mkdir()
    if what == "a file":
        run.write_text("")
    done = shell.pretrain("--resume", run, expect=2)
    assert str(run) in only_line(done)


def test_stopping_behind_the_run_is_an_error(shell: Shell, fresh):
    done = shell.pretrain("--resume", fresh(), "--steps", 30, "--stop-at", 24, expect=2)
    assert "--stop-at 24" in only_line(done)
    assert "step 24" in only_line(done)


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over(shell: Shell, fresh):
    """The previous one is used, and the run ends as it would have."""
    run = fresh()
    shell.pretrain("--resume", run, "--steps", 30, "--stop-at", 26, expect=75)
    shutil.copytree(run, run.with_name("sound"))
    flip(run / "checkpoints" / "step_26" / "model.safetensors")
    done = shell.pretrain("--resume", run)
    assert "step_26: damaged: model.safetensors" in done.out
    assert "Traceback" not in done.out
    shell.pretrain("--resume", run.with_name("sound"))
    names = ["checkpoints/step_30/model.safetensors", "metrics.jsonl"]
    for name in names:
        assert (run / name).read_bytes() == (run.with_name("sound") / name).read_bytes()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "checkpoint": (
        lambda run: flip(run / "checkpoints" / "step_24" / "optimizer.safetensors"),
        "optimizer.safetensors does not match its hash",
    ),
    "state": (
        lambda run: (run / "checkpoints" / "step_24" / "state.json").unlink(),
        "state.json is missing",
    ),
    "tokens": (lambda run: flip(run / "tokens" / "train.bin"), "train.bin"),
    "validation tokens": (lambda run: flip(run / "tokens" / "val.bin", 0.3), "val.bin"),
    "short tokens": (
        lambda run: (run / "tokens" / "train.bin").write_bytes(
            (run / "tokens" / "train.bin").read_bytes()[:-9]
        ),
        "train.bin",
    ),
    "tokenizer": (
        lambda run: (run / "tokenizer.json").write_text("{"),
        "tokenizer.json",
    ),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json"),
    "foreign tokenizer": (
        lambda run: Tokenizer.train(["some other text, some other words"] * 9, 300).save(
            run / "tokenizer.json"
        ),
        "tokenizer",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_refused(case, shell: Shell, fresh):
    damage, named = DAMAGE[case]
    run = fresh()
    damage(run)
    done = shell.run("pretrain", "--resume", run, "--steps", 30)
    assert done.status == 3, done.out
    assert "Traceback" not in done.out
    assert len(done.errors) == 1
    assert named in done.errors[0]
    assert str(run) in done.errors[0]


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--n-embd", 64], 3, "wte.weight"),
        (["--val-fraction", 0.3], 2, "--val-fraction: a resumed run keeps its tokens"),
    ],
    ids=["model", "data"],
)
def test_what_a_resumed_run_cannot_change_is_refused(flags, code, named, shell: Shell, fresh):
    """The settings that the run can go on with are left as they were."""
    run = fresh()
    before = (run / "config.toml").read_bytes()
    done = shell.pretrain("--resume", run, "--steps", 30, *flags, expect=code)
    assert named in only_line(done)
    assert (run / "config.toml").read_bytes() == before


def test_other_text_does_not_change_a_resumed_run(shell: Shell, fresh):
    """What counts are the tokens the run has; its text may have moved since."""
    one, two = fresh("one"), fresh("two")
    shell.pretrain("--resume", one, "--steps", 30)
    moved = two / "config.toml"
    moved.write_text(moved.read_text().replace("my.txt", "gone.txt"))
    shell.pretrain("--resume", two, "--steps", 30)
    names = ["checkpoints/step_30/model.safetensors", "metrics.jsonl"]
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_diverged_run_ends_and_keeps_good_checkpoints(shell: Shell, tmp_path):
    """A learning rate of 1e30 has no finite loss; the steps without one move nothing."""
    run = tmp_path / "run"
    arguments = ["--data", "my.txt", "--out", run, "--steps", 40, *TINY, "--preset", "gpt2-small"]
    flags = ["--lr", 1e30, "--warmup", 0, "--save-every", 1, "--skip-budget", 4, "--keep-last", 0]
    line = only_line(shell.pretrain(*arguments, *flags, expect=4))
    assert "not finite" in line
    assert "4 steps in a row" in line
    log = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert log[0]["skipped"] == 0
    skipped = [record["step"] for record in log if record["skipped"]]
    good = load_checkpoint(run / "checkpoints", skipped[0] - 1).tensors["model"]
    last = load_checkpoint(run / "checkpoints").tensors["model"]
    assert all(tensor.equal(last[name]) for name, tensor in good.items())
    assert all(bool(tensor.isfinite().all()) for tensor in good.values())


def test_running_out_of_memory_is_one_line(shell: Shell, tmp_path):
    arguments = ["--data", "my.txt", "--out", tmp_path / "run", "--steps", 4, *TINY]
    sizes = ["--n-embd", 1 << 15, "--n-head", 8]
    done = shell.pretrain(*arguments, *sizes, expect=5, limits={"RLIMIT_AS": 8 << 30})
    assert "out of memory" in only_line(done)
    assert "--micro-batch" in only_line(done)


def test_a_full_disk_stops_a_run_before_it_starts(shell: Shell, tmp_path):
    arguments = ["--data", "my.txt", "--out", tmp_path / "run", "--steps", 4, *TINY]
    full = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 9, 123456)"
    done = shell.pretrain(*arguments, expect=2, before=full)
    assert "room for 2 more checkpoints" in only_line(done)
    assert "123 kB free" in only_line(done)
    assert "pretrain 1/4" not in done.out


def test_a_disk_that_fills_up_loses_nothing(shell: Shell, tmp_path):
    """Files of more than 120 kB cannot be written: training goes on, and the end is an error."""
    run = tmp_path / "run"
    arguments = ["--data", "my.txt", "--out", run, "--steps", 6, *TINY, "--save-every", 2]
    done = shell.pretrain(*arguments, expect=2, limits={"RLIMIT_FSIZE": 120_000})
    assert done.out.count("not saved") == 3, done.out
    assert done.out.count("training goes on") == 2
    assert len(done.errors) == 1
    assert f"--resume {run}" in done.errors[0]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6
    shell.pretrain("--resume", run)


GENERATE = {
    "no run": (["--run", "none", "--prompt", "a"], 2, "none"),
    "step": (["--prompt", "a", "--step", 7], 2, "no checkpoint of step 7"),
    "empty prompt": (["--prompt", ""], 2, "prompt is empty"),
    "long prompt": (["--prompt", "xyz " * 99], 2, "context is 32"),
    "temperature": (["--prompt", "a", "--temperature", -1], 2, "--temperature -1"),
    "top-p": (["--prompt", "a", "--top-p", 0], 2, "--top-p 0"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate_names_what_is_wrong(case, shell: Shell, base_run):
    arguments, status, named = GENERATE[case]
    given = [] if "--run" in arguments else ["--run", base_run[0]]
    done = shell.run("generate", *given, *arguments)
    assert done.status == status, done.out
    assert named in only_line(done)


def test_debug_shows_where_an_error_came_from(shell: Shell, tmp_path):
    done = shell.pretrain("--data", "none.txt", "--out", tmp_path / "run", "--debug", expect=3)
    assert "Traceback" in done.out
    assert len(done.errors) == 1
