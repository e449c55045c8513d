"""Every public kernel against PyTorch (and liger-kernel): ``pytest bench/bench_kernels.py``.

A case is timed only after its results and gradients passed the error rule: at most twice
(gradients: three times) PyTorch's own error against float64. Then ours and its peers take turns,
round by round, on inputs that rotate through more memory than the L2 cache holds, so that drift
meets all alike; what counts is the median of a round and its spread. How to read it: README.md.

FASTGPT_BENCH_SAVE=1 writes ``results/kernels_<device>.json``. Where that file is of the same GPU, a
median above the accepted one by more than both spreads fails.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("pytest_benchmark", reason="pip install -e .[bench]")

from bench import kernel_cases
from bench.kernel_cases import DTYPE, GPU, Case, Function
from bench.processor import processor

CASES = kernel_cases.all_cases()

RESULTS = Path(__file__).parent / "results"
ROUNDS = 32 if GPU else 16
DIRECTIONS = ("forward", "backward", "both")
PEAKS = {  # dense bf16 TFLOP/s and TB/s as the makers state them
    "A100-SXM4-80GB": (312, 2.039),
    "H100 80GB HBM3": (989, 3.35),
    "H200": (989, 4.8),
    "B200": (2250, 8.0),
    "MI300X": (1307, 5.3),
}
found: dict[str, Any] = {}


def leaves(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    return [
        x.detach().requires_grad_(case.backward and i not in case.constant)
        for i, x in enumerate(inputs)
    ]


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def gradients(out: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    wanted = [x for x in inputs if x.requires_grad]
    return list(torch.autograd.grad(out, wanted, grads))


def results(case: Case, function: Function, inputs: list[Tensor], double: bool) -> list[Tensor]:
    inputs = [x.double() if double and x.is_floating_point() else x for x in inputs]
    inputs = leaves(case, inputs)
    out = outputs(function(*inputs))
    if not case.backward:
        return out
    torch.manual_seed(1)
    grads = [torch.randn(x.shape, device=x.device).to(x.dtype) for x in out]
    return out + gradients(out, inputs, grads)


@cache
def check(case: Case) -> int:
    """The error rule at the small size; returns how many results there are."""
    torch.manual_seed(0)
    inputs = case.inputs(True)
    mine, theirs = (results(case, f, inputs, False) for f in (case.ours, case.torch))
    exact = results(case, case.exact, inputs, True)
    n_outputs = len(outputs(case.ours(*inputs)))
    for index, (a, b, c) in enumerate(zip(mine, theirs, exact, strict=True)):
        error, native = ((x.double() - c).abs().max().item() for x in (a, b))
        # A gradient of bfloat16 inputs is no better than its incoming gradient.
        dtype = a.dtype if a.dtype == torch.float32 else DTYPE
        steps = 2.0 if dtype == torch.float32 else 0.5
        floor = steps * torch.finfo(dtype).eps * c.abs().max().item()
        limit = (2 if index < n_outputs else 3) * native + floor
        assert error <= limit, f"{case.id}, result {index}: error {error:.2e} > {limit:.2e}"
    return len(exact)


def rotating(case: Case) -> list[list[Tensor]]:
    """Sets of inputs, together twice the L2 cache of the GPU; two on a CPU."""
    first = leaves(case, case.inputs(False))
    size = sum(x.numel() * x.element_size() for x in first)
    cache_size = torch.cuda.get_device_properties(0).L2_cache_size if GPU else 0
    more = max(1, min(ROUNDS - 1, 2 * cache_size // size))
    return [first, *(leaves(case, case.inputs(False)) for _ in range(more))]


def clock(run: Callable[[], Any]) -> float:
    """Seconds of ``run``: on a GPU between events, launched while a kernel before them sleeps."""
    if not GPU:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # about 1 ms
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def once(case: Case, function: Function, inputs: list[Tensor], direction: str) -> float:
    """Seconds of one call; what a direction leaves out happens before the clock starts."""
    ready: list[Any] = []

    def forward() -> None:
        ready[:] = outputs(function(*inputs))

    def backward() -> None:
        gradients(ready, inputs, ones)

    if direction == "forward":
        return clock(forward)
    forward()
    ones = [torch.ones_like(x) for x in ready]
    if direction == "backward":
        return clock(backward)
    return clock(lambda: (forward(), backward()))


def peak_memory(case: Case, function: Function, inputs: list[Tensor], direction: str) -> int | None:
    """Bytes beyond the inputs; only a GPU's allocator tells."""
    if not GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once(case, function, inputs, direction)
    return torch.cuda.max_memory_allocated() - before


def traffic(case: Case, inputs: list[Tensor], direction: str) -> int:
    """Bytes that must move: inputs and outputs once each; in the backward what it needs of them and
    their gradients.
    """
    with torch.no_grad():
        out = sum(x.numel() * x.element_size() for x in outputs(case.torch(*inputs)))
    sizes = [x.numel() * x.element_size() for x in inputs]
    trained = tuple(i for i, x in enumerate(inputs) if x.requires_grad)
    read = range(len(sizes)) if case.read is None else case.read
    written = trained if case.written is None else case.written
    forward, backward = sum(sizes) + out, out + sum(sizes[i] for i in (*read, *written))
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def summary(seconds: list[float], flops: int, size: int, memory: int | None) -> dict[str, Any]:
    quarter, median, three = statistics.quantiles(seconds, n=4)
    row: dict[str, Any] = {"ms": median * 1e3, "spread": (three - quarter) / median}
    row["tflop_per_s" if flops else "gb_per_s"] = (
        flops / median / 1e12 if flops else size / median / 1e9
    )
    name = torch.cuda.get_device_name(0) if GPU else ""
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    if peak:
        row["of_roofline"] = max(flops / peak[0] / 1e12, size / peak[1] / 1e12) / median
    if memory is not None:
        row["peak_bytes"] = memory
    return row


def measure(case: Case, direction: str) -> dict[str, Any]:
    """Provider -> median, spread, rate; and the median over rounds of peer / ours."""
    torch.manual_seed(0)
    providers = {"ours": case.ours, **case.peers()}
    sets = rotating(case)
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for function in providers.values():
        for inputs in sets[:2]:
            once(case, function, inputs, direction)
    for index in range(ROUNDS):
        inputs = sets[index % len(sets)]
        # Forth and back: who goes first pays for the memory that the last one gave back.
        for name in list(providers)[:: 1 if index % 4 < 2 else -1]:
            seconds[name].append(once(case, providers[name], inputs, direction))
    forward, backward = case.flops
    flops = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    size = traffic(case, sets[0], direction)
    rows: dict[str, Any] = {
        name: summary(times, flops, size, peak_memory(case, providers[name], sets[0], direction))
        for name, times in seconds.items()
    }
    for name, times in seconds.items():
        pairs = [t / mine for t, mine in zip(times, seconds["ours"], strict=True)]
        rows[name]["over_ours"] = statistics.median(pairs)
    return rows


def stamp() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True, text=True, cwd=RESULTS.parent,
    )  # fmt: skip
    device: dict[str, Any] = {"device": "cpu", "machine": processor()}
    if GPU:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True,
        ) if torch.version.hip is None else None  # fmt: skip
        device = {
            "device": torch.cuda.get_device_name(0),
            "driver": driver.stdout.split("\n")[0] if driver else torch.version.hip,
            "cuda": torch.version.cuda,
        }
    else:
        device |= {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    versions: dict[str, str] = {"torch": torch.__version__}
    for package in ("triton", "liger_kernel"):
        try:
            module = __import__(package)
            versions[package] = getattr(module, "__version__", "installed")
        except ImportError:
            versions[package] = "not installed"
    return {**device, **versions, "dtype": str(DTYPE), "commit": commit.stdout.strip()}


def path_of(device: str) -> Path:
    return RESULTS / f"kernels_{device.lower().replace(' ', '_')}.json"


def regression(new: dict[str, Any], accepted: dict[str, Any] | None) -> str | None:
    """Why ``new`` is slower than ``accepted`` by more than the spread of both, or None."""
    if accepted is None:
        return None
    limit = accepted["ms"] * (1 + accepted["spread"] + new["spread"])
    if new["ms"] <= limit:
        return None
    return f"{new['ms']:.4f} ms, accepted {accepted['ms']:.4f}, with both spreads {limit:.4f}"


@cache
def accepted() -> dict[str, Any]:
    path = path_of(stamp()["device"])
    return json.loads(path.read_text())["cases"] if GPU and path.exists() else {}


def accept(measured: dict[str, Any]) -> None:
    """Write the results file. It has one stamp, so it is of one run, and that a whole one: with the
    figures of a few cases alone, no other could be seen to regress.
    """
    wanted = {f"{case.id} {direction}" for case in CASES for direction in directions(case)}
    missing = sorted(wanted - measured.keys())
    assert not missing, f"not accepted: {len(missing)} results are missing, {missing[0]} first"
    facts = stamp()
    text = json.dumps({"stamp": facts, "cases": measured}, indent=1)
    path_of(facts["device"]).write_text(text + "\n")


def directions(case: Case) -> tuple[str, ...]:
    return DIRECTIONS if case.backward else DIRECTIONS[:1]


@pytest.fixture(scope="module", autouse=True)
def save():
    yield
    if os.environ.get("FASTGPT_BENCH_SAVE") and found:
        accept(found)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_kernel(benchmark, case, direction):
    if direction not in directions(case):
        pytest.skip(f"{case.name} has no gradient")
    check(case)
    rows = measure(case, direction)
    inputs = leaves(case, case.inputs(False))
    benchmark.group = f"{case.id} {direction}"
    benchmark.extra_info.update(rows)
    benchmark.pedantic(lambda: once(case, case.ours, inputs, direction), rounds=3)
    found[f"{case.id} {direction}"] = rounded(rows)
    peers = "  ".join(f"{n} {r['over_ours']:.2f}x" for n, r in rows.items() if n != "ours")
    print(f"\n{case.id} {direction}: {rows['ours']['ms']:.3f} ms; {peers}")
    judge(f"{case.id} {direction}", rows)


def judge(name: str, rows: dict[str, Any]) -> None:
    """Fail if ours is slower than what is accepted of the same GPU."""
    why = regression(rows["ours"], accepted().get(name, {}).get("ours"))
    assert why is None, f"{name}: {why}"


def rounded(rows: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {key: float(f"{value:.4g}") for key, value in row.items()}
        for name, row in rows.items()
    }


def test_the_rule_can_fail():
    old = {"ms": 1.0, "spread": 0.05}
    assert regression({"ms": 1.07, "spread": 0.03}, old) is None
    assert "1.0900 ms" in str(regression({"ms": 1.09, "spread": 0.03}, old))
    assert regression({"ms": 9.0, "spread": 0.0}, None) is None


def test_charts(tmp_path):
    plot = pytest.importorskip("bench.plot", reason="pip install matplotlib")
    rows = {"ours": {"ms": 1.0, "spread": 0.1, "over_ours": 1.0}}
    rows["torch"] = {"ms": 2.0, "spread": 0.1, "over_ours": 2.0}
    cases = {f"gelu-tanh {direction}": rows for direction in DIRECTIONS}
    path = tmp_path / "kernels_x.json"
    path.write_text(json.dumps({"stamp": {"device": "x", "torch": "2"}, "cases": cases}))
    written = plot.draw(path, tmp_path / "charts")
    assert [p.name for p in written] == [
        f"kernels_x_{direction}.{kind}" for direction in DIRECTIONS for kind in ("png", "svg")
    ]
    assert "gelu-tanh" in written[1].read_text()


class FakeEvent:
    """A CUDA event of a GPU on which everything takes a millisecond."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, _end: FakeEvent) -> float:
        return 1.0


def fake_liger() -> ModuleType:
    module = ModuleType("functional")
    vars(module).update(
        liger_cross_entropy=F.cross_entropy,
        liger_fused_linear_cross_entropy=lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
        liger_layer_norm=lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps),
        liger_rms_norm=lambda x, w, eps: F.rms_norm(x, w.shape, w, eps),
        liger_swiglu=lambda a, b: F.silu(a) * b,
    )
    return module


@pytest.fixture
def fake_gpu(monkeypatch):
    """This file as it is on an H100, for tensors without numbers: no kernel runs."""
    for module in (sys.modules[__name__], kernel_cases):
        monkeypatch.setattr(module, "GPU", True)
    monkeypatch.setattr(sys.modules[__name__], "ROUNDS", 2)
    for name, module in list(sys.modules.items()):
        if name.startswith("fastgpt_kernels") and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda x: True)
    replacements = {
        **{"Event": FakeEvent, "_sleep": lambda cycles: None, "synchronize": lambda: None},
        "get_device_name": lambda index: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=50 << 20),
        **{"reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 100},
        "max_memory_allocated": lambda: 300,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", fake_liger())
    answer = SimpleNamespace(stdout="570.1\n")
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: answer)
    with FakeTensorMode():
        yield {case.id: case for case in kernel_cases.all_cases()}


@pytest.mark.parametrize("id", [case.id for case in CASES])
def test_the_path_of_a_gpu(id, fake_gpu):
    """Each case at its size on a GPU, with every peer: shapes, operators, gradients, arithmetic."""
    case = fake_gpu[id]
    if not case.compiles:  # a loop over data, of which there is none here
        case = replace(case, torch=case.ours)
    for direction in directions(case):
        rows = rounded(measure(case, direction))
        peers = {"ours", "torch"} | ({"torch.compile"} if case.compiles else set())
        peers |= dict(case.others).keys() | ({"liger"} if case.liger else set())
        assert rows.keys() == peers
        for row in rows.values():
            assert row["ms"] == row["over_ours"] == 1.0
            assert row["peak_bytes"] == 200
            assert row["of_roofline"] > 0
        if (id, direction) == ("swiglu-rows", "both"):  # twice gate and up, y, three gradients
            rate = (2 * 3 + 2) * 16384 * 11008 * 2 / 1e-3
            assert rows["ours"]["gb_per_s"] == pytest.approx(rate / 1e9, rel=1e-3)
            assert rows["ours"]["of_roofline"] == pytest.approx(rate / 3.35e12, rel=1e-3)
    facts = stamp()
    assert (facts["device"], facts["driver"]) == ("NVIDIA H100 80GB HBM3", "570.1")
    assert path_of(facts["device"]).name == "kernels_nvidia_h100_80gb_hbm3.json"


def test_a_slower_run_of_the_same_gpu_fails(fake_gpu, monkeypatch, tmp_path):
    """From the file that a run accepts to the verdict on the next one."""
    monkeypatch.setattr(sys.modules[__name__], "RESULTS", tmp_path)
    accepted.cache_clear()
    row = {"ours": {"ms": 1.0, "spread": 0.05}}
    slower = {"ours": {"ms": 1.2, "spread": 0.05}}
    whole = {f"{case.id} {direction}": row for case in CASES for direction in directions(case)}
    judge("gelu-tanh forward", slower)  # nothing is accepted yet
    accepted.cache_clear()
    part = {name: row for name in whole if not name.startswith("gae")}
    with pytest.raises(AssertionError, match="1 results are missing, gae-rows forward"):
        accept(part)
    accept(whole)
    judge("gelu-tanh forward", row)
    with pytest.raises(AssertionError, match=r"gelu-tanh forward: 1\.2000 ms, accepted 1\.0000"):
        judge("gelu-tanh forward", slower)
    judge("a new case", slower)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    accepted.cache_clear()
    judge("gelu-tanh forward", slower)
    accepted.cache_clear()


@pytest.mark.parametrize("id", [case.id for case in CASES])
def test_what_is_checked_and_timed(id, fake_gpu, monkeypatch):
    """The check runs the kernel of the timing, which finds nothing of its inputs in the cache."""
    monkeypatch.setattr(sys.modules[__name__], "ROUNDS", 32)
    largest = SimpleNamespace(L2_cache_size=126 << 20)  # a B200's
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: largest)
    case = fake_gpu[id]
    small, timed = (case.inputs(size) for size in (True, False))
    assert [x.shape[-1] for x in small if x.dim() > 1] == [
        x.shape[-1] for x in timed if x.dim() > 1
    ]
    rotated = sum(x.numel() * x.element_size() for inputs in rotating(case) for x in inputs)
    assert rotated > 2 * largest.L2_cache_size


@pytest.mark.parametrize(
    ("id", "elements"),
    [  # in the backward: read, incoming gradients, written
        ("add_rms_norm-rows", (16384 * 4096) * (1 + 2 + 1) + 4096 * 2),
        ("add_layer_norm-rows", (16384 * 4096) * (1 + 2 + 1) + 4096 * 3),
        ("rms_norm-rows", (16384 * 4096) * (1 + 1 + 1) + 4096 * 2),
        ("rotary-heads", (8 * 32 * 4096 * 128) * (0 + 1 + 1) + 2 * 2 * 4096 * 64),  # float32 angles
        ("relu_squared-rows", (16384 * 11008) * (1 + 1 + 1)),
    ],
)
def test_least_traffic_of_a_backward(id, elements, fake_gpu):
    case = fake_gpu[id]
    assert traffic(case, rotating(case)[0], "backward") == 2 * elements


def test_every_public_function_has_a_case():
    import fastgpt_kernels

    measured = {case.name for case in CASES} | {"attention_with_lse"}  # attention's own kernel
    assert measured == set(fastgpt_kernels.__all__)
