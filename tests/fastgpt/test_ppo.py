"""The experience of a reinforcement run: what is sampled, credited, learned from and saved."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt.config import ModelConfig
from fastgpt.data.batches import PackedDataset, ShardWriter, open_shard
from fastgpt.distributed import World
from fastgpt.errors import DataError, UsageError
from fastgpt.model import GPT
from fastgpt.preference.reward_model import RewardModel
from fastgpt.rl.actor_critic import ActorCritic
from fastgpt.rl.config import RLConfig
from fastgpt.rl.experience import Experience, Problem, weights_hash
from fastgpt.rl.rollout import sample_responses

pytestmark = pytest.mark.usefixtures("uncompiled", "seeded")

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=12, context=32)
END, PAD, GOOD = 3, 0, 5
ALONE = World(0, 1, torch.device("cpu"))
PROMPTS = [[1 + i % 11] * (1 + i % 3) for i in range(13)]
SMALL = RLConfig(
    rollout=16,
    minibatches=2,
    epochs=2,
    max_new_tokens=6,
    kl_stop=0.0,
    kl_coef=0.1,
    missing_end_penalty=0.5,
)


def count_good(rows, numbers) -> torch.Tensor:
    """A bandit: each GOOD token counts."""
    assert len(numbers) == len(rows.mask_BR)
    return ((rows.ids_BR == GOOD) & rows.mask_BR).sum(1).float()


def make(config: RLConfig = SMALL, micro: int = 16, seed: int = 1, **options: Any) -> Experience:
    torch.manual_seed(0)
    policy, reference = GPT(SHAPE), GPT(SHAPE)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    reference.load_state_dict(policy.state_dict())
    reference.requires_grad_(False).eval()
    value = RewardModel.from_gpt(policy) if config.algorithm == "ppo" else None
    problem = Problem(
        ActorCritic(policy, value),
        reference,
        PROMPTS[:10],
        PROMPTS[10:],
        count_good,
        END,
        PAD,
        seed,
        micro,
        **options,
    )
    return Experience(config, problem, ALONE)


def move(experience: Experience, scale: float = 0.05) -> None:
    """Take the policy away from the reference."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in experience.problem.model.policy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def update(experience: Experience, step: int, lr: float = 0.0) -> float:
    """One optimizer step as the loop makes it (plain gradient descent); the mean loss."""
    model = experience.problem.model
    batches = experience.batches(step)
    targets = sum(len(batch["targets_BT"]) for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = experience.loss(model, batch)
        (loss / targets).backward()
        total += loss.item()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(lr * parameter.grad)
    return total / targets


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "reinforce"])
def test_the_ratio_is_1_before_the_first_update(algorithm, temperature):
    config = dataclasses.replace(SMALL, algorithm=algorithm, group=None, temperature=temperature)
    experience = make(config, micro=3)
    move(experience)
    for step in range(2):  # both halves of the rollout
        for batch in experience.batches(step):
            experience.loss(experience.problem.model, batch)
        means = experience.stats.means
        assert means["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert abs(means["approx_kl"]) < 1e-9
        assert means["clip_fraction"] == 0
    update(experience, 2, lr=1.0)
    update(experience, 3)
    assert abs(experience.stats.means["ratio"] - 1) > 1e-3


def test_one_temperature_samples_and_scores_policy_and_reference():
    """Another one anywhere would show as a KL of a model to itself, or as other samples."""
    experience = make(dataclasses.replace(SMALL, temperature=0.6))
    generator = torch.Generator().manual_seed(1)
    experience.batches(0)
    assert abs(experience.values["kl"]) < 1e-5
    assert abs(experience.evaluate()[0]["val_kl"]) < 1e-5
    rows = experience.rollout.rows
    prompts = [
        row[:n].tolist() for row, n in zip(rows.tokens_BT, rows.prompt_lengths_B, strict=True)
    ]
    uniforms = torch.rand(16, 6, generator=generator, dtype=torch.float64)
    ends = {"end_id": END, "pad_id": PAD}
    policy = experience.problem.model.policy
    expected, other = (
        sample_responses(policy, prompts, uniforms, temperature=t, **ends) for t in (0.6, 1.0)
    )
    assert torch.equal(rows.ids_BR, expected)
    assert not torch.equal(other, expected)


def test_a_single_update_needs_no_scoring_before_it():
    """GRPO takes the log-probabilities of its own pass: the same loss, gradients and figures."""
    single = dataclasses.replace(SMALL, algorithm="grpo", minibatches=1, epochs=1)
    found = []
    for config in (single, dataclasses.replace(single, epochs=2)):
        experience = make(config, micro=3)
        move(experience)
        loss = update(experience, 0)
        gradients = [p.grad.clone() for p in experience.problem.model.parameters()]
        assert experience.rollout is not None
        found.append((loss, gradients, experience.metrics(), experience.rollout.columns))
    (loss, gradients, means, columns), (scored_loss, scored, scored_means, scored_columns) = found
    assert "old_log_probs" not in columns
    assert "old_log_probs" in scored_columns
    assert means["ratio"] == 1
    assert loss == pytest.approx(scored_loss, rel=1e-4)
    torch.testing.assert_close(gradients, scored, atol=1e-6, rtol=1e-4)
    assert means == pytest.approx(scored_means, rel=1e-4, abs=1e-5)
    assert abs(means["kl"]) > 0.01


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_micro_batches_of_unequal_length_are_one_batch(algorithm):
    losses, gradients, means = [], [], []
    for micro in (16, 3, 1):
        config = dataclasses.replace(SMALL, algorithm=algorithm, entropy_coef=0.01)
        experience = make(config, micro=micro)
        move(experience)
        first = experience.batches(0)
        assert len(first) == -(-8 // micro)
        experience = make(config, micro=micro)
        move(experience)
        losses.append(update(experience, 0))
        gradients.append([p.grad.clone() for p in experience.problem.model.parameters()])
        means.append(experience.stats.means)
    for loss, gradient, mean in zip(losses[1:], gradients[1:], means[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)
        assert mean == pytest.approx(means[0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_terms_of_the_loss_and_their_signs(algorithm):
    """At ratio 1 the policy's term is the mean of -A, and a value is that of the rollout."""
    config = dataclasses.replace(SMALL, algorithm=algorithm, entropy_coef=0.5, vf_coef=0.3)
    experience = make(config)
    move(experience)
    (batch,) = experience.batches(0)
    n = len(batch["targets_BT"])
    loss = experience.loss(experience.problem.model, batch).item() / n
    expected = -batch["advantages_N"].mean() - 0.5 * experience.stats.means["entropy"]
    if algorithm == "ppo":
        error = batch["old_values_N"] - batch["returns_N"]
        expected += 0.3 * 0.5 * error.square().mean()
    else:
        difference = batch["old_log_probs_N"] - batch["ref_log_probs_N"]
        expected += 0.1 * ((-difference).exp() - 1 + difference).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-4)


def test_every_response_is_used_once_in_each_pass():
    experience = make()
    for _ in range(2):
        used = []
        for step in range(2):
            (batch,) = experience.batches(step)
            used += batch["tokens_BT"].tolist()
        rows = experience.rollout.rows.tokens_BT.tolist()
        assert sorted(used) == sorted(rows)
        assert used != rows
    assert experience.rollouts == 1
    experience.batches(4)
    assert experience.rollouts == 2


def test_a_policy_that_moved_too_far_gets_a_new_rollout():
    experience = make(dataclasses.replace(SMALL, kl_stop=1e-4))
    update(experience, 0, lr=0.01)
    assert not experience.stopped  # before the first update nothing has moved
    update(experience, 1)
    assert experience.rollouts == 1
    experience = make(dataclasses.replace(SMALL, kl_stop=1e-4))
    update(experience, 0, lr=2.0)
    update(experience, 1, lr=2.0)
    assert experience.stats.means["approx_kl"] > 1e-4
    update(experience, 2)
    assert experience.rollouts == 2


def by_hand(experience: Experience, config: RLConfig) -> list[list[float]]:
    """Advantages by their definitions, a response at a time; values are 0 without a model."""
    rollout = experience.rollout
    columns = {name: x.double() for name, x in rollout.columns.items()}
    lengths = rollout.rows.mask_BR.sum(1).tolist()
    scores, rewards = [], []
    for b, n in enumerate(lengths):
        ids = rollout.rows.ids_BR[b, :n].tolist()
        score = ids.count(GOOD) - (0.5 if ids[-1] != END else 0.0)
        kl = [
            float(columns["old_log_probs"][b, t] - columns["ref_log_probs"][b, t]) for t in range(n)
        ]
        scores.append((score, sum(kl)))
        rewards.append([-0.1 * k for k in kl[:-1]] + [score - 0.1 * kl[-1]])
    if config.algorithm in ("grpo", "rloo"):
        found = []
        for b, n in enumerate(lengths):
            first = b - b % 4
            group = range(first, first + 4)
            if config.algorithm == "grpo":
                own = np.array([scores[i][0] for i in group])
                advantage = (scores[b][0] - own.mean()) / (own.std(ddof=1) + 1e-4)
            else:
                own = [scores[i][0] - 0.1 * scores[i][1] for i in group]
                others = sum(own) - own[b - first]
                advantage = own[b - first] - others / 3
            found.append([advantage] * n)
        return found
    found = []
    for b, n in enumerate(lengths):
        if config.algorithm == "ppo":
            values = [*columns["old_values"][b, :n].tolist(), 0.0]  # nothing behind the end
            delta = [rewards[b][t] + values[t + 1] - values[t] for t in range(n)]
            found.append([sum(0.95 ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])
        else:
            found.append([sum(rewards[b][t:]) for t in range(n)])
    return found


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "reinforce"])
def test_advantages_by_their_definitions(algorithm):
    config = dataclasses.replace(
        SMALL,
        algorithm=algorithm,
        group=4 if algorithm in ("grpo", "rloo") else 1,
        whiten_advantages=False,
    )
    experience = make(config)
    move(experience)
    experience.batches(0)
    rollout = experience.rollout
    mask, advantages = rollout.rows.mask_BR, rollout.columns["advantages"]
    assert (advantages[~mask] == 0).all()
    assert set(rollout.rows.ended_B(END).tolist()) == {True, False}
    assert experience.values["kl"] != 0
    for row, expected in zip(advantages, by_hand(experience, config), strict=True):
        assert row[: len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
    if algorithm == "ppo":
        returns = advantages + rollout.columns["old_values"]
        torch.testing.assert_close(rollout.columns["returns"][mask], returns[mask])


def test_whitened_advantages_and_rewards():
    experience = make(dataclasses.replace(SMALL, whiten_rewards=True))
    experience.batches(0)
    mask = experience.rollout.rows.mask_BR
    advantages = experience.rollout.columns["advantages"][mask]
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages.std().item() == pytest.approx(1, abs=1e-5)


def test_the_responses_to_a_prompt_are_neighbours():
    experience = make(dataclasses.replace(SMALL, algorithm="grpo", group=4))
    experience.batches(0)
    rows = experience.rollout.rows
    for first in range(0, 16, 4):
        lengths = rows.prompt_lengths_B[first : first + 4].tolist()
        assert len(set(lengths)) == 1
        prompts = rows.tokens_BT[first : first + 4, : lengths[0]]
        assert (prompts == prompts[0]).all()
        assert prompts[0].tolist() in PROMPTS[:10]


def test_metrics_count_no_padding():
    experience = make()
    move(experience)
    experience.batches(0)
    rollout, values = experience.rollout, experience.values
    lengths = rollout.rows.mask_BR.sum(1).tolist()
    rows = [r[:n].tolist() for r, n in zip(rollout.rows.ids_BR, lengths, strict=True)]
    kl = [
        sum((a[t] - b[t]).item() for t in range(n))
        for a, b, n in zip(
            rollout.columns["old_log_probs"],
            rollout.columns["ref_log_probs"],
            lengths,
            strict=True,
        )
    ]
    pairs = [tuple(p) for row in rows for p in itertools.pairwise(row)]
    scores = [row.count(GOOD) for row in rows]
    assert values["kl"] == pytest.approx(np.mean(kl), abs=1e-5)
    assert values["length"] == np.mean(lengths)
    assert values["eos_rate"] == np.mean([row[-1] == END for row in rows])
    assert values["distinct_2"] == len(set(pairs)) / len(pairs)
    assert values["score"] == pytest.approx(np.mean(scores))
    assert values["score_std"] == pytest.approx(np.std(scores, ddof=1))
    update(experience, 1)
    entropy = experience.stats.means["entropy"]
    assert 0 < entropy <= np.log(12)


def test_the_kl_coefficient_follows_the_kl():
    config = dataclasses.replace(SMALL, kl_target=50.0, kl_horizon=100)
    experience = make(config)
    experience.batches(0)
    assert experience.values["kl_coef"] == 0.1
    assert experience.kl_coef == pytest.approx(0.1 * (1 - 0.2 * 16 / 100))
    fixed = make(dataclasses.replace(config, kl_controller="fixed"))
    fixed.batches(0)
    assert fixed.kl_coef == 0.1


@pytest.mark.parametrize(
    ("algorithm", "coef", "adapts"),
    [("ppo", 0.05, True), ("rloo", 0.05, True), ("reinforce", 0.05, True), ("grpo", 0.04, False)],
)
def test_the_kl_coefficient_by_default(algorithm, coef, adapts):
    """GRPO's is the constant of its publication; where the KL is a reward, a controller."""
    config = dataclasses.replace(
        SMALL, algorithm=algorithm, group=None, kl_coef=None, kl_target=50.0, kl_horizon=100
    )
    experience = make(config)
    batch = experience.batches(0)[0]
    assert experience.values["kl_coef"] == coef
    assert (experience.kl_coef != coef) == adapts
    if algorithm == "grpo":
        assert batch["kl_loss_coef"] == torch.tensor(coef)
    chosen = dataclasses.replace(config, kl_coef=0.3, kl_controller="adaptive")
    experience = make(chosen)
    experience.batches(0)
    assert experience.values["kl_coef"] == 0.3
    assert experience.kl_coef < 0.3


def test_values_are_in_the_units_of_the_scores():
    """Of the reward model, as normalised: what stands before a token says what will be scored."""
    experience = make()
    value = experience.problem.model.value
    assert value is not None
    with torch.no_grad():
        value.normalize(0.5, 0.25)
        experience.batches(0)
        rollout = experience.rollout
        assert rollout is not None
        rows, found = rollout.rows, rollout.columns["old_values"]
        expected = value.values(rows.tokens_BT)
    for b, n in enumerate(rows.prompt_lengths_B.tolist()):
        length = int(rows.mask_BR[b].sum())
        torch.testing.assert_close(found[b, :length], expected[b, n - 1 : n - 1 + length])


def test_the_value_model_can_learn_alone_first():
    experience = make(dataclasses.replace(SMALL, critic_warmup=1))
    update(experience, 0)
    model = experience.problem.model
    assert all((p.grad == 0).all() for p in model.policy.parameters())
    assert any((p.grad != 0).any() for p in model.value.parameters())
    update(experience, 1)
    assert any((p.grad != 0).any() for p in model.policy.parameters())


def test_the_value_model_learns_what_is_to_come():
    """Alone, while the policy stays: what it says of new responses explains their returns."""
    config = dataclasses.replace(SMALL, rollout=64, critic_warmup=10**6, kl_coef=0.0)
    experience = make(config)
    value = experience.problem.model.value
    optimizer = torch.optim.AdamW(value.parameters(), lr=1e-2)
    explained = []
    for step in range(48):
        update(experience, step)
        optimizer.step()
        explained.append(experience.values["explained_variance"])
    assert explained[0] < 0
    assert np.mean(explained[16:]) > 0.15


@pytest.mark.parametrize("micro", [16, 3])
def test_pretraining_text_counts_by_its_mean(micro, tmp_path):
    """Once in a step, however many micro-batches it has."""
    with ShardWriter(tmp_path / "x.bin", vocab_size=12, tokenizer_hash="0" * 64) as writer:
        writer.append(np.arange(400) % 11)
    shard = open_shard(tmp_path / "x.bin", vocab_size=12, tokenizer_hash="0" * 64)
    text = PackedDataset([shard], 8, seed=1)
    plain = update(make(micro=micro), 0)
    config = dataclasses.replace(SMALL, ptx_coef=2.0, ptx_batch=4)
    experience = make(config, micro=micro, ptx=text)
    mixed = update(experience, 0)
    windows = torch.from_numpy(text.rows(np.arange(4)))
    with torch.no_grad():
        model = experience.problem.model.policy
        logits = model.logits(model(windows[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert mixed - plain == pytest.approx(2.0 * loss.item(), rel=1e-4)


def test_the_policy_learns_what_pays_and_the_reference_stays():
    experience = make(dataclasses.replace(SMALL, rollout=64, kl_coef=0.0, kl_controller="fixed"))
    reference = experience.problem.reference
    before = weights_hash(reference)
    start, _ = experience.evaluate()
    optimizer = torch.optim.AdamW(experience.problem.model.parameters(), lr=1e-2)
    for step in range(40):
        update(experience, step)
        optimizer.step()
    end, rows = experience.evaluate()
    assert end["val_score"] > start["val_score"] + 1.5
    assert end["val_kl"] > 1 > start["val_kl"] == 0
    assert len(rows.mask_BR) == 3
    assert weights_hash(reference) == before != weights_hash(experience.problem.model.policy)
    assert all(parameter.grad is None for parameter in reference.parameters())


@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_state_brings_back_a_run_in_the_middle_of_its_epochs(steps):
    whole, half = make(micro=3), make(micro=3)
    for step in range(steps):
        update(whole, step)
        update(half, step)
    resumed = make(micro=3)
    state = json.loads(json.dumps(half.state()))
    resumed.load(state, half.tensors())
    assert resumed.metrics() == whole.metrics()
    for step in range(steps, steps + 5):
        one, two = whole.batches(step), resumed.batches(step)
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)
        assert whole.state() == resumed.state()


@pytest.mark.parametrize("changed", ["reference", "reward", "prompts", "no reward"])
def test_state_of_another_run_is_refused(changed):
    reward = RewardModel(SHAPE)
    sources = {"--init": "runs/sft", "--reward": "runs/rm"}
    experience = make(reward=reward, sources=sources)
    state = json.loads(json.dumps(experience.state()))
    move(experience)  # the policy moves, what the run began with does not
    problem = experience.problem
    Experience(SMALL, problem, ALONE).load(state, experience.tensors())
    with torch.no_grad():
        if changed == "reference":
            problem.reference.wte.weight[3, 4] += 1e-3
        elif changed == "reward":
            reward.bias += 1e-3  # trained alike, normalised otherwise
        elif changed == "prompts":
            problem = dataclasses.replace(problem, prompts=[*PROMPTS[:9], [4, 4]])
        else:
            problem = dataclasses.replace(problem, reward=None)
    kind, message = {
        "reference": (UsageError, "--init runs/sft: the weights there are not those that this run"),
        "reward": (UsageError, "--reward runs/rm: the weights there are not those that this run"),
        "prompts": (DataError, "--prompts: the prompts are not what this run began with"),
        "no reward": (UsageError, "--reward runs/rm: this run had one when it began"),
    }[changed]
    with pytest.raises(kind, match=message):
        Experience(SMALL, problem, ALONE).load(state, experience.tensors())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout": 10, "minibatches": 4}, "--rollout 10 is not a multiple of --minibatches 4"),
        ({"algorithm": "grpo", "group": 1}, "--group 1: grpo compares responses"),
        ({"algorithm": "rloo", "rollout": 12}, "--rollout 12 is not a multiple of --group 8"),
        ({"temperature": 0.0}, "--temperature 0: it must be above 0"),
        ({"gamma": 1.5}, "--gamma 1.5: between 0 and 1"),
        ({"epochs": 0}, "--epochs 0: it must be at least 1"),
        ({"kl_coef": -0.1}, "--kl-coef -0.1: it must be at least 0"),
        ({"rollout": 512, "kl_horizon": 100}, "--kl-horizon 100: less than a --rollout of 512"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        RLConfig(**options).check()


def test_the_defaults_are_in_range():
    for algorithm in ("ppo", "grpo", "rloo", "reinforce"):
        RLConfig(algorithm=algorithm).check()
    assert RLConfig().total_steps == 128 * 16
