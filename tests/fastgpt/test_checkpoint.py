"""Round trips, damage and hostile content; crashes are in test_checkpoint_crash.py."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import checkpoint as ckpt
from fastgpt.checkpoint import load_checkpoint, save_checkpoint
from fastgpt.errors import DataError, UsageError
from fastgpt.manifest import FileEntry, manifest_bytes
from fastgpt.tensorfile import TensorInfo, file_bytes, file_chunks, header_bytes, read_header

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(5, 7, generator=generator)
    return {
        "model": {"weight": weight, "half": weight.bfloat16(), "empty": torch.empty(0, 3)},
        "optimizer": {"step": torch.tensor(step), "momentum": weight * 0.5},
    }


def save(root: Path, step: int, keep_last: int = 0) -> Path:
    state = {"step": step, "rng": [step, 0.1 + step]}
    return save_checkpoint(root, step, tensors_of(step), state, keep_last=keep_last)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_holds(loaded: ckpt.Checkpoint, step: int) -> None:
    assert loaded.step == step
    assert loaded.state == {"step": step, "rng": [step, 0.1 + step]}
    assert loaded.tensors.keys() == tensors_of(step).keys()
    for stem, named in tensors_of(step).items():
        assert loaded.tensors[stem].keys() == named.keys()
        for name, tensor in named.items():
            got = loaded.tensors[stem][name]
            assert (got.dtype, got.shape, raw(got)) == (tensor.dtype, tensor.shape, raw(tensor))


@pytest.fixture(autouse=True)
def no_sync(monkeypatch) -> None:
    """What reaches the platters cannot be seen here, and a busy disk makes it slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "run" / "checkpoints"
    for step in (10, 20):
        save(root, step)
    return root


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_and_shape_comes_back_byte_for_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    high = (
        2 if dtype == torch.bool else 256
    )  # every byte pattern: NaNs with payload, infinities, -0
    data = torch.randint(0, high, (6 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    grid = data.view(dtype).reshape(2, 3)
    named = {"grid": grid, "scalar": grid[0, 0], "empty": grid[:0], "transposed": grid.T}
    save_checkpoint(tmp_path, 0, {"model": named}, {}, keep_last=1)
    for tensors in (
        load_checkpoint(tmp_path).tensors["model"],
        load_file(tmp_path / "step_0" / "model.safetensors"),  # the library, without our reader
    ):
        for name, tensor in named.items():
            assert tensors[name].dtype == dtype
            assert tensors[name].shape == tensor.shape
            assert raw(tensors[name]) == raw(tensor), name


def test_our_writer_gives_the_bytes_of_the_library(tmp_path: Path) -> None:
    named = {
        "b": torch.randn(3, 5),
        "a": torch.arange(4),
        "ü": torch.randn(2).bfloat16(),
        "s": torch.tensor(1.5),
    }
    save_file(named, tmp_path / "theirs", metadata={"format": "pt"})
    ours = b"".join(bytes(chunk) for chunk in file_chunks(named))
    assert ours == (tmp_path / "theirs").read_bytes()
    assert file_bytes(named) == len(ours)


def test_large_tensors_are_written_in_pieces(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fastgpt.tensorfile._CHUNK_BYTES", 64)
    tensor = torch.arange(1001, dtype=torch.int16)
    assert max(len(chunk) for chunk in list(file_chunks({"x": tensor}))[1:]) == 64
    save_checkpoint(tmp_path, 1, {"model": {"x": tensor}}, {}, keep_last=1)
    assert torch.equal(load_checkpoint(tmp_path).tensors["model"]["x"], tensor)


def test_shared_and_strided_tensors_are_written_in_full(tmp_path: Path) -> None:
    table = torch.randn(4, 6, requires_grad=True)
    named = {
        "embedding": table,
        "head": table,
        "rows": table[1:3],
        "expanded": table[:1].expand(3, 6),
    }
    save_checkpoint(tmp_path, 1, {"model": named}, {}, keep_last=1)
    loaded = load_checkpoint(tmp_path).tensors["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in named.items())
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_loaded_tensors_do_not_depend_on_the_file(root: Path) -> None:
    loaded = load_checkpoint(root)
    path = loaded.path / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert_holds(loaded, 20)


def test_state_floats_are_exact(tmp_path: Path) -> None:
    values = [0.1, 1e-310, 1 / 3, float("inf"), 2**63, -0.0, "ü\ud800", None, True]
    save_checkpoint(tmp_path, 1, {}, {"values": values}, keep_last=1)
    assert load_checkpoint(tmp_path).state["values"] == values


def test_step_and_only(root: Path) -> None:
    assert_holds(load_checkpoint(root, 10), 10)
    assert load_checkpoint(root, only=["model"]).tensors.keys() == {"model"}
    (root / "step_20" / "optimizer.safetensors").write_bytes(b"")
    assert load_checkpoint(root, only=["model"]).step == 20
    with pytest.raises(UsageError, match=r"no checkpoint of step 15; it has 10, 20"):
        load_checkpoint(root, 15)
    with pytest.raises(DataError, match=r"holds no ema\.safetensors"):
        load_checkpoint(root, 20, only=["ema"])
    with pytest.raises(UsageError, match="no checkpoint was saved"):
        load_checkpoint(root / "nowhere")


def test_find_and_read_header(root: Path) -> None:
    path = ckpt.find_checkpoint(root)
    assert path == root / "step_20"
    assert read_header(path / "model.safetensors") == {
        "weight": TensorInfo("F32", (5, 7)),
        "half": TensorInfo("BF16", (5, 7)),
        "empty": TensorInfo("F32", (0, 3)),
    }
    for content in (
        b"",
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        b"\2" + b"\0" * 7 + b"{",
    ):
        (path / "model.safetensors").write_bytes(content)
        with pytest.raises(DataError, match=r"model\.safetensors"):
            read_header(path / "model.safetensors")
    huge = b'{"x":{"dtype":"F32","shape":[1000000000000,1000],"data_offsets":[0,4]}}'
    (path / "huge").write_bytes(len(huge).to_bytes(8, "little") + huge + b"\0\0\0\0")
    with pytest.raises(DataError, match="huge"):
        read_header(path / "huge")


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found_before_use(root: Path, name: str) -> None:
    path = root / "step_20" / name
    good = path.read_bytes()
    bits = range(8 * len(good))
    for bit in random.Random(name).sample(bits, 60) if len(bits) > 400 else bits:
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=rf"step_20: damaged: {name}"):
            assert_holds(load_checkpoint(root), 10)
    path.write_bytes(good)
    assert_holds(load_checkpoint(root), 20)


def test_every_flipped_bit_in_latest_is_found(root: Path) -> None:
    save(root, 60)  # one flipped bit turns "step_60" into "step_20", which exists
    good = (root / "latest").read_bytes()
    for bit in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        (root / "latest").write_bytes(damaged)
        with pytest.warns(UserWarning, match="latest: damaged"):
            assert_holds(load_checkpoint(root), 60)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncate", "append", "empty", "delete", "directory", "fifo"])
def test_damaged_files_are_named_and_the_previous_step_is_used(
    root: Path, name: str, damage: str
) -> None:
    path = root / "step_20" / name
    good = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage == "fifo":
        os.mkfifo(path)
    elif damage != "delete":
        path.write_bytes({"truncate": good[:-1], "append": good + b"\0", "empty": b""}[damage])
    with pytest.warns(UserWarning, match=rf"step_20: damaged: {name}"):
        assert_holds(load_checkpoint(root), 10)
    with pytest.raises(DataError, match=rf"step_20: damaged: {name}"):
        load_checkpoint(root, 20)


def test_exchanged_files_are_found(root: Path) -> None:
    newest, older = root / "step_20", root / "step_10"
    for one, other in [
        (newest / "model.safetensors", newest / "optimizer.safetensors"),
        (newest / "model.safetensors", older / "model.safetensors"),
        (newest / "manifest.json", older / "manifest.json"),
        (newest, older),
    ]:
        swap(one, other)
        with pytest.raises(DataError, match=r"step_20: damaged"):
            load_checkpoint(root, 20)
        swap(one, other)
    assert_holds(load_checkpoint(root), 20)


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_no_good_checkpoint_left_names_each(root: Path) -> None:
    (root / "step_20" / "state.json").unlink()
    (root / "step_10" / "model.safetensors").write_bytes(b"x")
    pattern = (
        r"step_20: damaged: state\.json is missing; .*step_10: damaged: model\.safetensors has 1"
    )
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(DataError, match=pattern) as error,
    ):
        load_checkpoint(root)
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    "content", [None, b"", b"step_10\n", b"step_999 0\n", b"\xff\xfe", b"../../x"]
)
def test_unusable_latest_means_the_newest_good_one(root: Path, content: bytes | None) -> None:
    (root / "latest").unlink()
    if content is not None:
        (root / "latest").write_bytes(content)
    with pytest.warns(UserWarning, match="latest"):
        assert_holds(load_checkpoint(root), 20)


def test_latest_decides_over_a_higher_number(root: Path) -> None:
    save(root, 15)  # the run was resumed at 10: step 20 belongs to the abandoned branch
    assert_holds(load_checkpoint(root), 15)
    (root / "step_15" / "state.json").unlink()
    with pytest.warns(UserWarning, match="step_15"):
        assert_holds(load_checkpoint(root), 10)


def test_the_step_before_a_missing_latest_is_used(root: Path) -> None:
    save(root, 15)
    shutil.rmtree(root / "step_15")
    with pytest.warns(UserWarning, match="step_15, which `latest` names, is missing"):
        assert_holds(load_checkpoint(root), 10)


def test_names_that_are_not_checkpoints_are_left_alone(root: Path) -> None:
    for name in ("step_010", "step_-5", "step_30.bak", "notes", "step_"):
        (root / name).mkdir()
    assert ckpt.list_steps(root) == [10, 20]
    save(root, 30, keep_last=1)
    assert (root / "step_30.bak").is_dir()
    assert (root / "notes").is_dir()


def test_keep_last(root: Path) -> None:
    save(root, 30, keep_last=2)
    assert ckpt.list_steps(root) == [20, 30]
    save(root, 25, keep_last=2)  # after a resume at 20
    assert ckpt.list_steps(root) == [20, 25]
    save(root, 40, keep_last=1)
    assert ckpt.list_steps(root) == [40]
    assert_holds(load_checkpoint(root), 40)


def test_an_incomplete_checkpoint_does_not_displace_a_good_one(root: Path) -> None:
    (root / "step_20" / "model.safetensors").write_bytes(b"short")
    save(root, 30, keep_last=2)
    assert ckpt.list_steps(root) == [10, 30]


def test_saving_an_existing_step_replaces_it(root: Path) -> None:
    (root / "step_20" / "model.safetensors").write_bytes(b"damaged")
    (root / "step_20" / "stale.safetensors").write_bytes(b"of an older format")
    save(root, 20, keep_last=2)
    assert_holds(load_checkpoint(root), 20)
    assert sorted(os.listdir(root / "step_20")) == sorted(FILES)
    assert sorted(os.listdir(root)) == ["latest", "step_10", "step_20"]


def test_bad_arguments_touch_nothing(root: Path) -> None:
    before = sorted(os.listdir(root))
    sparse = torch.eye(2).to_sparse()
    for stem, named in [
        ("../model", {}),
        ("a/b", {}),
        (".hidden", {}),
        ("", {}),
        ("model", {"x": sparse}),
        ("model", {"x": torch.empty(2, device="meta")}),
        ("model", {"x": torch.zeros(1, dtype=torch.complex64)}),
        ("model", {"__metadata__": torch.zeros(1)}),
    ]:
        with pytest.raises(ValueError, match=r"stem|tensor"):
            save_checkpoint(root, 30, {stem: named}, {}, keep_last=1)
    with pytest.raises(ValueError, match="step"):
        save(root, -1)
    with pytest.raises(TypeError):
        save_checkpoint(root, 30, {}, {"x": object()}, keep_last=1)
    assert sorted(os.listdir(root)) == before


def test_links_that_leave_the_run_are_refused(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(root / "step_20", outside)
    model = root / "step_20" / "model.safetensors"
    model.unlink()
    model.symlink_to(outside / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.safetensors is a link to outside"):
        load_checkpoint(root, 20)
    shutil.rmtree(root / "step_20")
    (root / "step_20").symlink_to(outside)
    with pytest.raises(DataError, match=r"manifest\.json is a link to outside"):
        load_checkpoint(root, 20)


def test_a_linked_run_directory_works(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root.parent)
    assert_holds(load_checkpoint(tmp_path / "link" / "checkpoints"), 20)
    save(tmp_path / "link" / "checkpoints", 30)
    assert_holds(load_checkpoint(root), 30)


@pytest.mark.parametrize("name", ["../step_10/state.json", "/etc/passwd", "a\0b", "."])
def test_a_forged_manifest_cannot_name_other_places(root: Path, name: str) -> None:
    path = root / "step_20"
    files = {"state.json": FileEntry(1, "0" * 64), name: FileEntry(1, "0" * 64)}
    (path / "manifest.json").write_bytes(manifest_bytes(20, files))
    with pytest.raises(DataError, match="unsafe path"):
        load_checkpoint(root, 20)


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b"{}", b"null", b'{"version":9,"step":20,"files":{}}', b"\xff"]
)
def test_hostile_manifests_are_only_damage(root: Path, content: bytes) -> None:
    (root / "step_20" / "manifest.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"manifest\.json"):
        assert_holds(load_checkpoint(root), 10)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("PWNED",)


def test_pickles_are_never_executed(root: Path, tmp_path: Path, monkeypatch) -> None:
    """Hostile content under a manifest that fits it: hashes do not help, only never unpickling."""
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    torch.save({"x": Bomb()}, tmp_path / "bomb.pt")
    for hostile in (bomb, (tmp_path / "bomb.pt").read_bytes()):
        for name in FILES[:3]:
            path = save(root, 20)
            (path / "extra.pt").write_bytes(hostile)
            (path / ".metadata").write_bytes(hostile)
            (path / name).write_bytes(hostile)
            entries = {
                n: ckpt.write_file(root / ("x" + n), [(path / n).read_bytes()]) for n in FILES[:3]
            }
            for n in FILES[:3]:
                (root / ("x" + n)).unlink()
            (path / "manifest.json").write_bytes(manifest_bytes(20, entries))
            with pytest.warns(UserWarning, match="step_20: damaged"):
                assert_holds(load_checkpoint(root), 10)
    assert not (tmp_path / "PWNED").exists()
    pickle.loads(bomb)  # the bomb does work
    assert (tmp_path / "PWNED").exists()


def test_required_bytes_and_space(root: Path, monkeypatch) -> None:
    state = {"step": 20, "rng": [20, 20.1]}
    need = ckpt.required_bytes(tensors_of(20), state)
    used = sum(file.stat().st_size for file in (root / "step_20").iterdir())
    assert used <= need <= used + 100
    usage = shutil.disk_usage(root)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fresh = root / "a" / "b"
    ckpt.check_space(fresh, 5_000_000)
    pattern = r"2 more checkpoints of 5 MB is needed, 10 MB in all, but the disk has 10 MB free"
    with pytest.raises(UsageError, match=pattern):
        ckpt.check_space(fresh, 5_000_001)
    assert not fresh.exists()
    ckpt.check_space(root, 10_000_000)  # two exist: room for one more is enough
    with pytest.raises(UsageError, match="1 more checkpoint of"):
        ckpt.check_space(root, 10_000_001)


def test_random_state_round_trip() -> None:
    random.seed(3)
    torch.manual_seed(4)
    random.gauss(0, 1)  # leaves a cached second value in the state
    torch.randn(3)
    state = json.loads(json.dumps(ckpt.rng_state()))
    expected = [random.gauss(0, 1), random.random(), torch.randn(5), torch.randperm(9)]
    random.seed(99)
    torch.manual_seed(99)
    ckpt.set_rng_state(state)
    again = [random.gauss(0, 1), random.random(), torch.randn(5), torch.randperm(9)]
    assert expected[:2] == again[:2]
    assert torch.equal(expected[2], again[2])
    assert torch.equal(expected[3], again[3])


def test_header_is_aligned() -> None:
    assert all(len(header_bytes({"x" * n: torch.zeros(1)})) % 8 == 0 for n in range(1, 9))
