"""Tokenizer against its peers: ``pytest bench/bench_tokenizer.py``, or the whole table.

``python bench/bench_tokenizer.py --vocabularies DIR --english FILE --multilingual FILE`` measures
the real vocabularies (``r50k_base.tiktoken``, ``cl100k_base.tiktoken``) with every peer that
``--peer-python`` has, each in fresh processes that take turns, one thread; ``tokenizer_peers.py``
says how. It writes ``results/tokenizer_cpu.json``. The tests need no files:

Every peer encodes with our vocabulary (trained here on the embedded text) and one thread, and must
give our ids before it is timed; a peer that is not installed is skipped with the reason. ``cold``
is the first pass of a fresh tokenizer, ``warm`` the next ones of the same. ``mb_per_s`` in the
output counts UTF-8 bytes. Compare figures of one run only: machines drift.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from processor import processor  # noqa: E402

from fastgpt.bpe import hf_json  # noqa: E402
from fastgpt.tokenizer import Tokenizer  # noqa: E402

if __name__ != "__main__":
    pytest.importorskip("pytest_benchmark", reason="pip install -e .[bench]")
os.environ["RAYON_NUM_THREADS"] = "1"  # Hugging Face's threads; read when its pool starts
os.environ["TOKENIZERS_PARALLELISM"] = "false"

VOCAB_SIZE = 32_000
PATTERNS = ("gpt2", "gpt4")
REGEX = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "gpt4": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
}

Encode = Callable[[str], Iterable[int]]


@cache
def text() -> str:
    """The embedded text, or the file that FASTGPT_BENCH_TEXT names."""
    path = os.environ.get("FASTGPT_BENCH_TEXT")
    if path:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    packed = files("fastgpt").joinpath("assets/pretrain.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8").replace("<|endoftext|>", "")


@cache
def documents() -> list[str]:
    """The text in pieces of about 4 KB."""
    return [text()[i : i + 4096] for i in range(0, len(text()), 4096)]


@cache
def trained(pattern: str) -> Tokenizer:
    return Tokenizer.train([text()], VOCAB_SIZE, pattern=pattern)


def fresh(pattern: str) -> Tokenizer:
    """An equal tokenizer whose caches are empty."""
    return type(trained(pattern))(trained(pattern).vocabulary)


def need(module: str) -> Any:
    return pytest.importorskip(module, reason=f"peer {module} is not installed")


def tiktoken_encoding(pattern: str) -> Any:
    tiktoken = need("tiktoken")
    vocabulary = trained(pattern).vocabulary
    ranks = {token: i for i, token in enumerate(vocabulary.tokens)}
    return tiktoken.Encoding(
        pattern, pat_str=REGEX[pattern], mergeable_ranks=ranks, special_tokens=vocabulary.specials
    )


def hugging_face(pattern: str) -> Any:
    tokenizers = need("tokenizers")
    return tokenizers.Tokenizer.from_str(hf_json.dumps(trained(pattern).vocabulary))


def report(benchmark: Any, size: int | None = None) -> None:
    benchmark.group = benchmark.group or benchmark.name.rsplit("[", 1)[0]
    if benchmark.stats:
        seconds = benchmark.stats.stats.min
        size = size or len(text().encode())
        benchmark.extra_info["mb_per_s"] = round(size / 1e6 / seconds, 1)


def to_numpy(name: str, pattern: str) -> Encode:
    if name == "fastgpt":
        return trained(pattern).encode_to_numpy
    if name == "tiktoken":
        return tiktoken_encoding(pattern).encode_to_numpy
    encoder = hugging_face(pattern)
    return lambda document: np.array(encoder.encode(document).ids)


def to_list(name: str, pattern: str) -> Encode:
    if name == "fastgpt":
        return trained(pattern).encode
    if name == "tiktoken":
        return tiktoken_encoding(pattern).encode_ordinary
    encoder = hugging_face(pattern)
    return lambda document: encoder.encode(document).ids


by_pattern = pytest.mark.parametrize("pattern", PATTERNS)
by_peer = pytest.mark.parametrize("peer", ["fastgpt", "tiktoken", "tokenizers"])


def check(encode: Encode, pattern: str) -> None:
    for document in documents()[::29]:
        assert list(encode(document)) == trained(pattern).encode(document)


@by_pattern
def test_encode_cold(benchmark, pattern):
    check(fresh(pattern).encode_to_numpy, pattern)
    benchmark.pedantic(
        lambda tokenizer: tokenizer.encode_to_numpy(text()),
        setup=lambda: ((fresh(pattern),), {}),
        rounds=5,
    )
    report(benchmark)


@by_pattern
@by_peer
def test_encode_warm(benchmark, peer, pattern):
    encode = to_numpy(peer, pattern)
    check(encode, pattern)
    if peer == "tokenizers":  # quadratic memory on one long text
        benchmark.pedantic(lambda: [encode(d) for d in documents()], rounds=2, warmup_rounds=1)
    else:
        benchmark.pedantic(encode, args=(text(),), rounds=5, warmup_rounds=1)
    report(benchmark)


@by_pattern
@by_peer
def test_encode_documents_to_lists(benchmark, peer, pattern):
    encode = to_list(peer, pattern)
    check(encode, pattern)
    rounds = 2 if peer == "tokenizers" else 5
    benchmark.pedantic(
        lambda: [encode(document) for document in documents()], rounds=rounds, warmup_rounds=1
    )
    report(benchmark)


@by_peer
@pytest.mark.parametrize("size", [12, 100])
def test_latency(benchmark, peer, size):
    encode = to_list(peer, "gpt4")
    check(encode, "gpt4")
    benchmark(encode, text()[5000 : 5000 + size])
    report(benchmark, size)


@by_peer
def test_decode(benchmark, peer):
    ids = trained("gpt4").encode(text())
    if peer == "fastgpt":
        decode: Callable[[list[int]], str] = trained("gpt4").decode
    else:
        make = {"tiktoken": tiktoken_encoding, "tokenizers": hugging_face}[peer]
        decode = make("gpt4").decode
    assert decode(ids) == text()
    benchmark.pedantic(decode, args=(ids,), rounds=3, warmup_rounds=1)
    report(benchmark)


def hugging_face_merges(pattern: str) -> list[str]:
    tokenizers = need("tokenizers")
    models, pre, trainers = (
        import_module(f"tokenizers.{name}") for name in ("models", "pre_tokenizers", "trainers")
    )
    peer = tokenizers.Tokenizer(models.BPE())
    split = pre.Split(tokenizers.Regex(hf_json.SPLIT_REGEX[pattern]), "isolated")
    peer.pre_tokenizer = pre.Sequence(
        [split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    peer.train_from_iterator(documents(), trainer)
    merges = json.loads(peer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def our_merges(pattern: str) -> list[str]:
    ours = Tokenizer.train(documents(), VOCAB_SIZE, pattern=pattern, num_threads=1)
    return json.loads(hf_json.dumps(ours.vocabulary))["model"]["merges"]


@pytest.mark.parametrize("peer", ["fastgpt", "tokenizers"])
@by_pattern
def test_train(benchmark, peer, pattern):
    if peer == "fastgpt":
        assert len(our_merges(pattern)) == VOCAB_SIZE - 257
        benchmark.pedantic(
            lambda: Tokenizer.train(documents(), VOCAB_SIZE, pattern=pattern, num_threads=1),
            rounds=3,
        )
    else:
        merges = benchmark.pedantic(hugging_face_merges, args=(pattern,), rounds=1)
        assert merges == our_merges(pattern)
    report(benchmark)


# --- The table

ENCODERS = ("fastgpt", "fastokens", "gigatoken", "tiktoken")
TRAINERS = ("fastgpt", "gigabpe", "rustbpe")
LOWER_IS_BETTER = ("us_12", "us_100", "seconds", "peak_mb")


def gpt2_json(ranks: Path, directory: Path) -> Path:
    """The GPT-2 vocabulary as the tokenizer.json that everybody has, with ByteLevel's own split."""
    path = directory / "gpt2.json"
    Tokenizer.from_file(ranks, pattern="gpt2", special_tokens={}).save(path)
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    path.write_text(json.dumps(content))
    return path


def versions(python: str) -> dict[str, str]:
    """The peers that this Python has."""
    names = sorted({*ENCODERS, *TRAINERS} - {"fastgpt"})
    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
    )
    run = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def measure(python: str, directory: Path, *args: object) -> dict[str, Any] | None:
    """What ``tokenizer_peers.py`` says in a fresh process; None, and why, where it cannot run."""
    environment = os.environ | {
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(directory),
    }
    script = Path(__file__).with_name("tokenizer_peers.py")
    command = [python, str(script), *map(str, args)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        reason = result.stderr.strip().splitlines()[-1:] or [f"exit {result.returncode}"]
        print("  skipped:", *args[:3], "-", *reason)
        return None
    return json.loads(result.stdout.splitlines()[-1])


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The best figure of each row over the rounds."""
    assert len({run.get("crc") for run in runs}) == 1, "ids differ between runs"
    return {
        key: (min if key in LOWER_IS_BETTER else max)(run[key] for run in runs) for key in runs[0]
    }


def compare(section: dict[str, dict[str, Any]]) -> None:
    """Adds our ratio to the best peer for each row: above 1 is better than all of them."""
    ours = section["fastgpt"]
    crcs = {peer: row.pop("crc", None) for peer, row in section.items()}
    exact = [peer for peer, crc in crcs.items() if crc == crcs["fastgpt"] and peer != "fastgpt"]
    for peer in crcs.keys() - {"fastgpt", *exact}:
        section[peer] = {"ids": "differ"}
    ratios = {}
    for key, value in ours.items():
        theirs = [section[peer][key] for peer in exact]
        if theirs:
            lower = key in LOWER_IS_BETTER
            ratio = min(theirs) / value if lower else value / max(theirs)
            ratios[key] = round(ratio, 2)
    section["ratio_to_best_peer"] = ratios


def table(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for vocab in ("r50k", "cl100k"):
        ranks = options.vocabularies / f"{vocab}_base.tiktoken"
        as_json = gpt2_json(ranks, directory) if vocab == "r50k" else ranks
        for name, text in (("english", options.english), ("multilingual", options.multilingual)):
            runs: dict[str, list[dict[str, Any]]] = {}
            for _ in range(options.rounds):
                for peer in ENCODERS:
                    file = as_json if peer == "fastokens" else ranks
                    args = (peer, "encode", vocab, file, text, options.mb)
                    if row := measure(options.peer_python, directory, *args):
                        runs.setdefault(peer, []).append(row)
            section = {peer: best(rows) for peer, rows in runs.items()}
            compare(section)
            found[f"{vocab} {name}"] = section
            print(f"{vocab} {name}", json.dumps(section, indent=1))
        args = ("fastgpt", "worst", vocab, ranks, "-", 0)
        found[f"{vocab} seconds for 1 MB of"] = measure(options.peer_python, directory, *args)
    runs = {}
    for _ in range(options.rounds):
        for peer in TRAINERS:
            args = (peer, "train", "r50k", "-", options.english, options.train_mb)
            if row := measure(options.peer_python, directory, *args):
                runs.setdefault(peer, []).append(row)
    section = {peer: best(rows) for peer, rows in runs.items()}
    compare(section)
    found[f"train 32000 on {options.train_mb:g} MB"] = section
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="the table of tokenizers")
    parser.add_argument("--vocabularies", type=Path, required=True)
    parser.add_argument("--english", type=Path, required=True)
    parser.add_argument("--multilingual", type=Path, required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--mb", type=float, default=20, help="of each text that is encoded")
    parser.add_argument("--train-mb", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    results = Path(__file__).with_name("results") / "tokenizer_cpu.json"
    parser.add_argument("--output", type=Path, default=results)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = table(options, Path(directory))
    header = {
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "peers": versions(options.peer_python),
        "text_mb": options.mb,
        "units": "MB of UTF-8 per processor second; us_N: microseconds for N characters",
    }
    options.output.write_text(json.dumps(header | found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
