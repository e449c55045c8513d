"""The rows of bench_posttraining.py in TRL and transformers; runs in an interpreter with these."""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import posttraining_workload as work


def tokenizer(directory: Path) -> Any:
    """A word for each id, for trainers that insist on a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {work.PAD: "<pad>", work.EOS: "<eos>", 2: "<unk>"}
    words = {names.get(i, f"w{i}"): i for i in range(work.VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(directory / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), padding_side="left", **special
    )


def peer_options(name: str, row: str, steps: int) -> dict[str, Any]:
    """Arguments of a trainer; every value that is not named here is TRL's default."""
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "bf16": name == "trl-bf16",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": steps,
        "learning_rate": work.RATES[row],
    }
    if name != "trl":
        options["gradient_checkpointing"] = False
    return options


def clock() -> tuple[Any, list[float]]:
    """A callback, and when the steps ended."""
    from transformers import TrainerCallback

    ended: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended.append(time.perf_counter())

    return Clock(), ended


def history(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def causal(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="float32")


def scoring(directory: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    options: Any = {"num_labels": 1, "dtype": "float32"}
    return AutoModelForSequenceClassification.from_pretrained(directory, **options)


def peer_sft(name: str, steps: int, directory: Path) -> dict:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": ids, "completion_mask": [int(i >= n) for i in range(len(ids))]}
        for ids, n in work.chats(steps)
    ]
    config = SFTConfig(
        **peer_options(name, "sft", steps),
        per_device_train_batch_size=work.SFT_ROWS,
        packing=True,
        max_length=work.CONTEXT,
        completion_only_loss=True,
    )
    callback, ended = clock()
    trainer = SFTTrainer(
        model=causal(directory),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(directory),
        callbacks=[callback],
    )
    counts: list[int] = []
    collate = trainer.data_collator

    def counting(examples: Any) -> Any:
        batch = collate(examples)
        counts.append(batch["input_ids"].numel())  # flattened: there is no padding
        return batch

    trainer.data_collator = counting
    trainer.train()
    return {"losses": history(trainer, "loss"), **work.rates(ended, counts[1:])}


def peer_reward(name: str, steps: int, directory: Path) -> dict:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [{"chosen_ids": a, "rejected_ids": b} for _, a, b in work.pairs(work.PAIRS * steps)]
    callback, ended = clock()
    trainer = RewardTrainer(
        model=scoring(directory),
        args=RewardConfig(
            **peer_options(name, "reward", steps), per_device_train_batch_size=work.PAIRS
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(directory),
        callbacks=[callback],
    )
    trainer.train()
    return {"losses": history(trainer, "loss"), **work.rates(ended, [work.PAIRS] * steps)}


def peer_ppo(name: str, steps: int, directory: Path) -> dict:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rows = Dataset.from_list([{"input_ids": ids} for ids in work.prompts(work.SAMPLES * steps)])
    micro = 8 if name == "trl" else work.SAMPLES
    options = peer_options(name, "ppo", steps)
    del options["max_steps"]
    config = PPOConfig(
        **options,
        total_episodes=work.SAMPLES * steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=work.SAMPLES // micro,
        num_mini_batches=1,
        num_ppo_epochs=4,
        response_length=work.RESPONSE,
        temperature=1.0,
        num_sample_generations=0,
    )
    callback, ended = clock()
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer(directory),
        model=causal(directory),
        ref_model=causal(directory),
        reward_model=scoring(directory),
        value_model=scoring(directory),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        callbacks=[callback],
    )
    trainer.train()
    return {
        "entropies": [x / work.RESPONSE for x in history(trainer, "objective/entropy")],
        "lengths": [float(work.RESPONSE)] * steps,
        **work.rates(ended, [work.SAMPLES] * steps),
    }


def peer_grpo(name: str, steps: int, directory: Path) -> dict:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        return [work.common_ids(ids) for ids in completion_ids]

    rows = [
        {"prompt": " ".join(f"w{i}" for i in ids)} for ids in work.prompts(work.SAMPLES * steps)
    ]
    config = GRPOConfig(
        **peer_options(name, "grpo", steps),
        per_device_train_batch_size=work.SAMPLES,
        num_generations=work.GROUP,
        max_completion_length=work.RESPONSE,
        beta=0.02,
    )
    callback, ended = clock()
    trainer = GRPOTrainer(
        model=causal(directory),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(directory),
        callbacks=[callback],
    )
    trainer.train()
    return {
        "entropies": history(trainer, "entropy"),
        "lengths": history(trainer, "completions/mean_length"),
        **work.rates(ended, [work.SAMPLES] * steps),
    }


def peer_generate(name: str, steps: int, directory: Path) -> dict:
    import torch

    ids = torch.tensor(work.prompts(work.ROWS, work.READ, work.READ))
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": work.NEW,
        "min_new_tokens": work.NEW,
        "do_sample": False,
    }
    exact = causal(directory).eval()
    work.enlarge(exact)
    model = causal(directory).eval()
    work.enlarge(model)
    if name == "transformers-bf16":
        model = model.bfloat16()
    began, found = [], ids
    for _ in range(steps + 1):
        began.append(time.perf_counter())
        found = model.generate(ids, **options)
    counts = [found[:, ids.shape[1] :].numel()] * len(began)
    new = exact.generate(ids, **options)[:, ids.shape[1] :]
    timed = found[:, ids.shape[1] :]
    return {"ids": new.tolist(), "timed_ids": timed.tolist(), **work.rates(began, counts)}


def main() -> None:
    row, name, steps, weights = sys.argv[1:]
    rows = {
        "sft": peer_sft,
        "reward": peer_reward,
        "ppo": peer_ppo,
        "grpo": peer_grpo,
        "generate": peer_generate,
    }
    print("\n" + json.dumps(rows[row](name, int(steps), Path(weights))))


if __name__ == "__main__":
    main()
