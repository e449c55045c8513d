"""lm-evaluation-harness on an exported model: the numbers of ``fastgpt.evaluate``.

``make full`` installs the harness; elsewhere ``pip install -e '.[harness]'``.
"""

from __future__ import annotations

import json
import random

import pytest
import torch

from fastgpt.assess.tasks import evaluate_task, read_task
from fastgpt.chat import with_chat_tokens
from fastgpt.config import ModelConfig
from fastgpt.export import export
from fastgpt.generate import SamplingConfig, continuation, generate
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("uncompiled")]

TEXT = "the cat sat on the mat and the dog did not see what the owl said to it"


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(TEXT.split(), k=draw.randint(1, 6)))


@pytest.fixture
def harness(monkeypatch, tmp_path):
    """``lm_eval.simple_evaluate``, without a network and with its files below ``tmp_path``."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    pytest.importorskip("accelerate", reason="pip install -e '.[harness]'")
    return pytest.importorskip("lm_eval", reason="pip install -e '.[harness]'").simple_evaluate


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_chat_tokens(Tokenizer.train([TEXT], 300))


def make(tokenizer: Tokenizer, **shape) -> GPT:
    """Weights far from zero, so that choices differ."""
    torch.manual_seed(1)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": tokenizer.vocab_size}
    model = GPT(ModelConfig(**sizes, context=64, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def task(path, **values):
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
    means = {"aggregation": "mean", "higher_is_better": True}
    metrics = [{"metric": name, **means} for name in values.pop("means")]
    metrics += values.pop("metrics", [])
    return {"task": path.stem, **source, "test_split": "test", "metric_list": metrics, **values}


MODERN = {"qk_norm": True, "embed_norm": True, "norm_weight": False}
GPT2 = {"norm": "layer_norm", "mlp": "gelu_tanh", "position": "learned", "bias": True}


@pytest.mark.parametrize("shape", [MODERN, GPT2], ids=["own", "gpt2"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_choices_and_last_words(harness, tokenizer, tmp_path, shape, chat):
    model = make(tokenizer, **shape)
    export(model, tokenizer, tmp_path / "model")
    draw = random.Random(0)
    choices = write(
        tmp_path / "choices.jsonl",
        [
            {"prompt": sentence(draw), "choices": [sentence(draw) for _ in range(3)], "answer": 1}
            for _ in range(24)
        ],
    )
    words = write(tmp_path / "words.jsonl", [{"text": f"It {sentence(draw)} x"} for _ in range(24)])
    question = "{{prompt}}" if chat else "Question: {{prompt}}\nAnswer:"
    tasks = [
        task(
            choices,
            output_type="multiple_choice",
            doc_to_text=question,
            doc_to_choice="choices",
            doc_to_target="answer",
            target_delimiter="" if chat else " ",
            means=["acc", "acc_bytes"],
        )
    ]
    if not chat:
        perplexity = {"metric": "perplexity", "aggregation": "perplexity"}
        tasks.append(
            task(
                words,
                output_type="loglikelihood",
                doc_to_text="{{text.rpartition(' ')[0]}}",
                doc_to_target="{{' ' + text.rpartition(' ')[2]}}",
                means=["acc"],
                metrics=[{**perplexity, "higher_is_better": False}],
            )
        )
    options = {"pretrained": str(tmp_path / "model"), "trust_remote_code": True}
    options |= {"dtype": "float32", "add_bos_token": None if chat else True}
    found = harness(
        model="hf", model_args=options, tasks=tasks, device="cpu", apply_chat_template=chat
    )["results"]

    ours = evaluate_task(model, tokenizer, read_task(choices), chat=chat)
    assert 0 < ours["acc"] < 1
    assert found["choices"]["acc,none"] == ours["acc"]
    assert found["choices"]["acc_bytes,none"] == ours["acc_norm"]
    if not chat:
        ours = evaluate_task(model, tokenizer, read_task(words))
        assert found["words"]["acc,none"] == ours["acc"]
        assert found["words"]["perplexity,none"] == pytest.approx(ours["ppl"], rel=1e-4)


def test_written_answers(harness, tokenizer, tmp_path):
    model = make(tokenizer, **MODERN)
    export(model, tokenizer, tmp_path / "model")
    draw = random.Random(0)
    prompts = [sentence(draw) for _ in range(8)]
    path = write(tmp_path / "written.jsonl", [{"prompt": text, "answer": "x"} for text in prompts])
    asked = task(
        path,
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"do_sample": False, "max_gen_toks": 12, "until": ["<|end|>"]},
        means=["exact_match"],
    )
    options = {"pretrained": str(tmp_path / "model"), "trust_remote_code": True}
    found = harness(
        model="hf",
        model_args={**options, "dtype": "float32", "add_bos_token": True},
        tasks=[asked],
        device="cpu",
        batch_size=4,
    )["samples"]["written"]
    rows = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in prompts]
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0)
    new = generate(model, rows, sampling, stop_ids=[tokenizer.special_tokens["<|end|>"]])
    ours = [continuation(tokenizer, *pair) for pair in zip(rows, new, strict=True)]
    theirs = {sample["doc"]["prompt"]: sample["resps"][0][0] for sample in found}
    assert [theirs[text] for text in prompts] == ours
