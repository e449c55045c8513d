"""What PPO's stage asks of prompts and scorers: who answers what, and where a score is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastgpt.assess.judges import RewardJudge
from fastgpt.chat import end_id, render_prompt, with_chat_tokens
from fastgpt.config import ModelConfig
from fastgpt.data.examples import Message, Prompt
from fastgpt.distributed import World
from fastgpt.model import GPT
from fastgpt.ppo import PPOConfig, _prepare, _Scorer
from fastgpt.preference.reward_model import RewardModel
from fastgpt.rl.actor_critic import ActorCritic
from fastgpt.rl.config import RLConfig
from fastgpt.rl.rollout import Rows
from fastgpt.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("uncompiled", "seeded")

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_chat_tokens(Tokenizer.train(["the cat sat on the mat"], 270))


@pytest.fixture
def shape(tokenizer) -> ModelConfig:
    return ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=tokenizer.vocab_size, context=32)


def test_adam_is_that_of_ppo():
    """Stiennon et al. and Huang et al. 2024 (arXiv:2403.17031): eps 1e-5, a linear decay."""
    optim = PPOConfig().optim
    assert (optim.optimizer, optim.eps, optim.schedule) == ("adamw", 1e-5, "linear")
    assert (optim.weight_decay, optim.min_lr) == (0.0, 0.0)


def test_a_prompt_is_scored_under_the_number_it_was_sampled_under(tokenizer, shape, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"cat {i}", "answer": i}) for i in range(20)))
    config = PPOConfig(
        reward_fn="math:fsum", prompts=(path,), rl=RLConfig(max_new_tokens=4, eval_prompts=3),
        model=shape,
    )  # fmt: skip
    policy = GPT(shape)
    _, problem, scorer = _prepare(config, ActorCritic(policy, None), policy, tokenizer, ALONE)
    assert (len(problem.prompts), len(problem.held_out)) == (17, 3)
    asked = [render_prompt(tokenizer, prompt.messages) for prompt in scorer.prompts]
    assert asked == [*problem.prompts, *problem.held_out]
    assert sorted(prompt.reference for prompt in scorer.prompts) == list(range(20))
    assert [p.reference for p in scorer.prompts] != list(range(20)), "shuffled"
    rows = Rows.join(
        problem.held_out, torch.zeros(3, 4, dtype=torch.int64), end_id=1, pad_id=2, context=32
    )
    assert scorer.held_out(rows) == scorer.prompts[-3:]


def test_the_reward_model_reads_a_response_as_it_was_trained_to(tokenizer, shape):
    """At the first end, or at the last token of what has none; and texts come without their end."""
    model = RewardModel(shape).eval()
    model.normalize(0.3, 0.5)
    end, pad = end_id(tokenizer), tokenizer.eot_id
    texts = ["the cat", "", "the mat sat"]
    prompts = [[Message(role="user", content=text)] for text in ("who", "the cat sat", "on")]
    ids = [tokenizer.encode(text) for text in texts]
    width = max(map(len, ids))
    rows = torch.full((3, width), pad)
    for row, text in zip(rows, ids, strict=True):
        row[: len(text)] = torch.tensor(text)
        row[len(text) : len(text) + 1] = end  # the longest has no room for it
    asked = [render_prompt(tokenizer, prompt) for prompt in prompts]
    joined = Rows.join(asked, rows, end_id=end, pad_id=pad, context=32)
    given = [Prompt(prompt, None, Path("p.jsonl"), 1) for prompt in prompts]
    scorer = _Scorer(tokenizer, given, model, None, None, ALONE, "")
    found = scorer(joined, [0, 1, 2])
    judged = RewardJudge(model, tokenizer)(prompts, texts)
    assert found[:2].tolist() == pytest.approx(judged[:2], abs=1e-5)
    with torch.no_grad():
        cut = model.raw(
            torch.tensor([[*asked[2], *ids[2]]]), torch.tensor([len(asked[2]) + width - 1])
        )
    assert found[2].item() == pytest.approx((cut.item() - 0.3) / 0.5, abs=1e-5)
    assert abs(found[2].item() - judged[2]) > 1e-3, "the end makes a difference"
    assert scorer.texts(joined) == texts
    rows[0, len(ids[0])], rows[1, 0] = tokenizer.vocab_size + 1, end  # a model may have more rows
    assert scorer.texts(Rows.join(asked, rows, end_id=end, pad_id=pad, context=32)) == texts
    scorer.function = lambda prompts, responses, references: [len(text) for text in responses]
    assert (scorer(joined, [0, 1, 2]) - found).tolist() == pytest.approx([7, 0, 11], abs=1e-5)
