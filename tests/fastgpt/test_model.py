"""The model against transformers, against the papers' formulas in float64, and against itself."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import fastgpt_kernels
from fastgpt.config import ModelConfig
from fastgpt.model import GPT, Context, KVCache
from fastgpt.presets import PRESETS
from fastgpt_kernels._common import row_layout

pytestmark = pytest.mark.usefixtures("uncompiled", "seeded")

GPT2 = ModelConfig(
    n_layer=2, n_head=4, n_embd=32, vocab_size=67, context=24, norm="layer_norm",
    mlp="gelu_tanh", position="learned", bias=True,
)  # fmt: skip
GPT3 = dataclasses.replace(GPT2, window=4)
LLAMA = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=32, d_ff=48, vocab_size=67, context=24,
    norm_eps=1e-6, mlp="swiglu", tied=False,
)  # fmt: skip
PALM = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=1, n_embd=32, head_dim=16, vocab_size=67, context=24,
    norm="layer_norm", mlp="swiglu", parallel=True,
)  # fmt: skip
MODERN = ModelConfig(
    n_layer=2, n_head=2, n_embd=32, vocab_size=67, context=24, norm_weight=False,
    qk_norm=True, embed_norm=True, logit_softcap=15.0,
)  # fmt: skip
FAMILIES = {"gpt2": GPT2, "gpt3": GPT3, "llama": LLAMA, "palm": PALM, "modern": MODERN}
families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """A model in which no weight is at a value that would hide a mistake (0, 1, tiny)."""
    model = GPT(config, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_ids(config: ModelConfig, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape)


def assert_same_function(model: GPT, peer, pairs) -> None:
    """Logits and, by ``pairs`` of (our parameter, gradient of the peer's), all gradients agree."""
    ids = random_ids(model.config, 3, 21)
    ours, theirs = model.logits(model(ids)), peer(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    names = set()
    for name, gradient in pairs:
        names.add(name)
        torch.testing.assert_close(
            model.get_parameter(name).grad, gradient(), atol=2e-5, rtol=1e-3, msg=name
        )
    assert names == {name for name, _ in model.named_parameters()}


def copy_and_pair(model: GPT, mapping, transposed=False):
    """Give the peer our weights; return pairs for `assert_same_function`."""
    pairs = []
    for name, peers in mapping.items():
        flip = transposed and name.endswith("weight") and "norm" not in name and name[0] != "w"
        parts = model.get_parameter(name).detach().split([p.shape[1 if flip else 0] for p in peers])
        for peer, part in zip(peers, parts, strict=True):
            peer.data.copy_(part.t() if flip else part)

        def gradient(peers=peers, flip=flip):
            return torch.cat([p.grad.t() if flip else p.grad for p in peers])

        pairs.append((name, gradient))
    return pairs


def test_gpt2_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_head=4, n_embd=32, vocab_size=67, n_positions=24,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
        )
    )  # fmt: skip
    body = peer.transformer
    mapping = {
        "wte.weight": [body.wte.weight],
        "wpe.weight": [body.wpe.weight],
        "norm.weight": [body.ln_f.weight],
        "norm.bias": [body.ln_f.bias],
    }
    for i, block in enumerate(body.h):
        modules = {
            "attn_norm": block.ln_1,
            "mlp_norm": block.ln_2,
            "attn.qkv": block.attn.c_attn,
            "attn.proj": block.attn.c_proj,
            "mlp.up": block.mlp.c_fc,
            "mlp.down": block.mlp.c_proj,
        }
        for name, module in modules.items():
            mapping[f"blocks.{i}.{name}.weight"] = [module.weight]
            mapping[f"blocks.{i}.{name}.bias"] = [module.bias]
    model = random_model(GPT2)
    assert_same_function(model, peer, copy_and_pair(model, mapping, transposed=True))


def test_llama_with_grouped_queries_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
            intermediate_size=48, vocab_size=67, max_position_embeddings=24, rms_norm_eps=1e-6,
            tie_word_embeddings=False, attn_implementation="eager",
        )
    )  # fmt: skip
    mapping = {
        "wte.weight": [peer.model.embed_tokens.weight],
        "head.weight": [peer.lm_head.weight],
        "norm.weight": [peer.model.norm.weight],
    }
    for i, block in enumerate(peer.model.layers):
        attn, mlp = block.self_attn, block.mlp
        modules = {
            "attn_norm": [block.input_layernorm],
            "mlp_norm": [block.post_attention_layernorm],
            "attn.qkv": [attn.q_proj, attn.k_proj, attn.v_proj],
            "attn.proj": [attn.o_proj],
            "mlp.up": [mlp.up_proj],
            "mlp.gate": [mlp.gate_proj],
            "mlp.down": [mlp.down_proj],
        }
        for name, parts in modules.items():
            mapping[f"blocks.{i}.{name}.weight"] = [part.weight for part in parts]
    model = random_model(LLAMA)
    assert_same_function(model, peer, copy_and_pair(model, mapping))


def norm64(x, weight):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rope64(x_TD):
    """Rotate the pairs (i, i + D/2) by position * 10000^(-2i/D), one by one."""
    T, D = x_TD.shape
    out = torch.empty_like(x_TD)
    for t in range(T):
        for i in range(D // 2):
            angle = t * 10000.0 ** (-2 * i / D)
            a, b = x_TD[t, i], x_TD[t, i + D // 2]
            out[t, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def palm64(weights, ids_T):
    """PaLM (arXiv:2204.02311, section 2) in float64: y = x + MLP(LN(x)) + Attention(LN(x))."""
    x = weights["wte.weight"][ids_T]
    for layer in range(PALM.n_layer):
        w = {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"blocks.{layer}.")}
        h = norm64(x, w["attn_norm.weight"])
        qkv = h @ w["attn.qkv.weight"].T
        D = PALM.head_dim
        k, v = rope64(qkv[:, 4 * D : 5 * D]), qkv[:, 5 * D :]
        heads = []
        for i in range(4):
            scores = rope64(qkv[:, i * D : (i + 1) * D]) @ k.T / math.sqrt(D)
            scores = scores + torch.full_like(scores, -math.inf).triu(1)
            heads.append(scores.softmax(-1) @ v)
        gate, up = h @ w["mlp.gate.weight"].T, h @ w["mlp.up.weight"].T
        mlp = (gate * torch.sigmoid(gate) * up) @ w["mlp.down.weight"].T
        x = x + torch.cat(heads, -1) @ w["attn.proj.weight"].T + mlp
    return norm64(x, weights["norm.weight"]) @ weights["wte.weight"].T


def test_palm_is_the_papers_formula_in_float64():
    model = random_model(PALM)
    ids = random_ids(PALM, 2, 13)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    expected = torch.stack([palm64(weights, row) for row in ids])
    torch.testing.assert_close(model.logits(model(ids)).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "formula"),
    {
        "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x: (
            0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        ),
        "relu_squared": lambda x: torch.where(x > 0, x * x, 0.0),
    }.items(),
)
def test_mlp_activations(kind, formula):
    mlp = random_model(dataclasses.replace(MODERN, mlp=kind)).blocks[0].mlp
    x = torch.randn(5, 32)
    expected = formula(x.double() @ mlp.up.weight.double().T) @ mlp.down.weight.double().T
    torch.testing.assert_close(mlp(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_query_and_key_norms_bound_the_scores_whatever_the_weights():
    model = random_model(MODERN)
    ids = random_ids(MODERN, 1, 9)
    before = model(ids)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:64] *= 1000.0  # queries and keys
    torch.testing.assert_close(model(ids), before, atol=1e-4, rtol=1e-4)


def test_logit_softcap_is_a_scaled_tanh():
    model = random_model(MODERN)
    hidden = 20 * torch.randn(7, 32)
    raw = hidden.double() @ model.wte.weight.double().T
    assert raw.abs().max() > 15
    expected = 15 * torch.tanh(raw / 15)
    torch.testing.assert_close(model.logits(hidden).double(), expected, atol=1e-4, rtol=1e-4)


@families
def test_no_position_sees_a_later_one(config):
    model, ids = random_model(config), random_ids(config, 2, 17)
    changed = ids.clone()
    changed[:, 9:] = (ids[:, 9:] + 1) % config.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(-1).any()


@families
def test_documents_of_a_row_do_not_see_each_other(config):
    model, ids = random_model(config), random_ids(config, 2, 20)
    starts = torch.tensor([[0] * 6 + [6] * 14, [0] * 11 + [11] * 9], dtype=torch.int32)
    hidden = model(ids, doc_start=starts)
    for row, cut in enumerate((6, 11)):
        for part in (slice(0, cut), slice(cut, 20)):
            changed = ids.clone()
            changed[row, part] = (ids[row, part] + 1) % config.vocab_size
            same = (model(changed, doc_start=starts) == hidden).all(-1)
            assert same.sum() == 40 - (part.stop - part.start)
            assert not same[row, part].any()


@pytest.mark.parametrize("config", [LLAMA, PALM, MODERN], ids=["llama", "palm", "modern"])
def test_a_masked_document_equals_a_run_of_its_own(config):
    """With rotary positions only distances count, so the place in the row does not."""
    model, ids = random_model(config), random_ids(config, 1, 20)
    starts = torch.tensor([[0] * 6 + [6] * 14], dtype=torch.int32)
    apart = torch.cat([model(ids[:, :6]), model(ids[:, 6:])], dim=1)
    torch.testing.assert_close(model(ids, doc_start=starts), apart, atol=2e-5, rtol=1e-4)


@families
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "places", [[5, 30, 45, 46, 62], list(range(3, 63, 2))], ids=["few", "many"]
)
def test_places_get_what_the_whole_pass_gives_them(places, packed, config):
    """Hidden states and all gradients, whether the last block computes few or many of 3 x 21."""
    model, ids = random_model(config), random_ids(config, 3, 21)
    options = {}
    if packed:
        starts = torch.zeros(3, 21, dtype=torch.int32)
        starts[0, 9:], starts[2, 1:], starts[2, 4:] = 9, 1, 4
        positions = torch.arange(21) - starts
        options = {"doc_start": starts, "positions": positions.long()}
    at = torch.tensor(places)
    whole = model(ids, **options).flatten(0, 1)[at]
    grad = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, list(model.parameters()), grad, allow_unused=True)
    found = model(ids, places=at, **options)
    torch.testing.assert_close(found, whole, atol=2e-5, rtol=1e-5)
    gradients = torch.autograd.grad(found, list(model.parameters()), grad, allow_unused=True)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_places_are_refused_with_a_cache():
    model = random_model(GPT2)
    cache = KVCache(model, 1, 4, torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="without a cache"):
        model(random_ids(GPT2, 1, 2), cache=cache, places=torch.tensor([1]))


def test_every_second_layer_sees_only_its_window():
    model = random_model(GPT3)
    x = torch.randn(1, 12, 32)
    changed = x.clone()
    changed[:, 3] += 1.0
    context = Context(rotary=None, doc_start_BT=None, cache=None)
    reached = []
    for block in model.blocks:
        difference = block.attn(changed, context) - block.attn(x, context)
        reached.append(difference.abs().amax(-1)[0].nonzero().flatten().tolist())
    assert reached == [list(range(3, 12)), [3, 4, 5, 6]]


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache_gives_what_the_whole_sequence_gives(config, dtype):
    model, ids = random_model(config, dtype), random_ids(config, 2, 18)
    with torch.no_grad():
        whole = model(ids)
        cache = KVCache(model, 2, 18, torch.zeros(2, dtype=torch.int64))
        pieces = [model(piece, cache=cache) for piece in ids.split([5, 1, 1, 3, 1, 7], dim=1)]
    assert cache.length == 18
    scale = whole.abs().max().item()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert (torch.cat(pieces, 1) - whole).abs().max().item() < tolerance * scale


@families
def test_left_padding_changes_nothing(config):
    model = random_model(config)
    rows = [random_ids(config, n) for n in (9, 1, 4)]
    steps = random_ids(config, 3, 5)
    pads = torch.tensor([0, 8, 5])
    padded = torch.stack([F.pad(row, (9 - len(row), 0), value=3) for row in rows])
    with torch.no_grad():
        cache = KVCache(model, 3, 14, pads)
        hidden = [model(padded, cache=cache)[:, -1:]]
        hidden += [model(step, cache=cache) for step in steps.split(1, dim=1)]
        batched = torch.cat(hidden, 1)
        for i, row in enumerate(rows):
            alone = model(torch.cat([row, steps[i]])[None])[0, len(row) - 1 :]
            torch.testing.assert_close(batched[i], alone, atol=1e-5, rtol=1e-4)


def test_flops_by_hand():
    config = ModelConfig(
        n_layer=3, n_head=4, n_kv_head=2, n_embd=8, head_dim=6, d_ff=20, vocab_size=50, mlp="swiglu"
    )
    attention = 8 * 24 + 2 * 8 * 12 + 24 * 8  # q, k and v, out
    mlp = 3 * 8 * 20
    products = 3 * (attention + mlp) + 50 * 8
    scores = 3 * 4 * (6 * 2 * 2) * 10  # layers x heads x (q k^T and p v: 2 D each) x keys
    assert config.flops_per_token(10) == 3 * (2 * products + scores)


@pytest.mark.parametrize("name", ["cpu-tiny", "cpu-gpt2"])
def test_loss_at_initialisation_is_that_of_a_uniform_guess(name):
    config = dataclasses.replace(ModelConfig(**PRESETS[name]["model"]), n_layer=2, context=64)
    model = GPT(config)
    ids = random_ids(config, 2, 64)
    with torch.no_grad():
        loss = F.cross_entropy(model.logits(model(ids))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(config.vocab_size), abs=0.15)


def test_initialisation_scales():
    config = dataclasses.replace(GPT2, n_embd=256, n_layer=8, vocab_size=1000)
    stds = {name: p.std().item() for name, p in GPT(config).named_parameters() if p.dim() == 2}
    for name, std in stds.items():
        residual = name.endswith(("proj.weight", "down.weight"))
        assert std == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.05), name
    model = GPT(dataclasses.replace(MODERN, init="zero_proj"))
    assert not any(block.attn.proj.weight.any() for block in model.blocks)
    assert not any(block.mlp.down.weight.any() for block in model.blocks)


@families
def test_bfloat16_activations_keep_float32_weights_gradients_and_logits(config):
    model, ids = random_model(config, torch.bfloat16), random_ids(config, 2, 8)
    hidden = model(ids)
    logits = model.logits(hidden)
    assert (hidden.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    logits.square().mean().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_no_norm_needs_a_copy(monkeypatch):
    """Kernels walk rows of at most two strides: heads come to their norms untransposed."""
    inputs = []

    def recorded(x, *args):
        inputs.append(x)
        return fastgpt_kernels.rms_norm(x, *args)

    monkeypatch.setattr("fastgpt.model.rms_norm", recorded)
    GPT(MODERN)(random_ids(MODERN, 2, 9))
    assert {x.shape[-1] for x in inputs} == {MODERN.n_embd, MODERN.attn_dim}
    assert all(row_layout(x).tensor is x for x in inputs)
