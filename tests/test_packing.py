"""Packed rows against one row at a time by each model's own forward: log-probs, gradients, and what cannot be packed."""

import logging

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils

from schemas.errors import UserError
from una_train import config, data, packing, policy

V, WINDOW = 50, 4
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
OLDER = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "mistral": lambda: tf.MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen2": lambda: tf.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": lambda: tf.Gemma2Config(
        **GROUPED,
        head_dim=8,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=0.5,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        attn_implementation="eager",  # transformers' SDPA leaves the cap out
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi": lambda: tf.PhiConfig(**GROUPED),
    "phi3": lambda: tf.Phi3Config(**GROUPED, sliding_window=WINDOW),
    "olmo": lambda: tf.OlmoConfig(**GROUPED),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED),
    "olmo3": lambda: tf.Olmo3Config(
        **GROUPED, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "cohere": lambda: tf.CohereConfig(**GROUPED, logit_scale=0.25),
    "cohere2": lambda: tf.Cohere2Config(
        **GROUPED, logit_scale=0.25, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "granite": lambda: tf.GraniteConfig(**GROUPED, logits_scaling=3.0),
    "gpt2": lambda: tf.GPT2Config(**OLDER, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZES),
    "starcoder2": lambda: tf.Starcoder2Config(**GROUPED, sliding_window=WINDOW),
    "smollm3": lambda: tf.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0]),
    "opt": lambda: tf.OPTConfig(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"}, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0
    ),
    "llama4": lambda: tf.Llama4TextConfig(
        **GROUPED,
        head_dim=8,
        attention_chunk_size=WINDOW,
        num_local_experts=2,
        intermediate_size_mlp=64,
        no_rope_layers=[1, 0],
    ),
}
UNPACKABLE = {
    "bloom": lambda: tf.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
    "gpt_oss": lambda: tf.GptOssConfig(
        **GROUPED,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "mamba": lambda: tf.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2),
}
ROWS = [  # tokens of each prompt and of its responses; with the first and the last, one prompt is short
    (1, [1, 6]),
    (9, [5, 1, 12]),
    (3, [2]),
    (2, [1, 1]),
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_is_eight_tokens(monkeypatch):
    """So that some prompts with their responses are one piece of work, and the others many."""
    monkeypatch.setattr(packing, "SHORT", 8)


def model_of(family):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config({**FAMILIES, **UNPACKABLE}[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # of matrices as small as this, or attention would not matter
                parameter.mul_(3 if parameter.std() > 0.05 else 6)
    return model


def split_of(rows=ROWS, seed=0):
    """A split of made-up tokens; the first two responses of a prompt are a comparison, each other one is a group."""
    rng = np.random.default_rng(seed)
    flat = lambda parts: data.Flat(np.concatenate(parts), np.array([len(x) for x in parts]))  # noqa: E731
    prompts, responses, groups, starts = [], [], [], [0]
    for length, lengths in rows:
        first = len(responses)
        prompts += [rng.integers(3, V, length)] * len(lengths)
        responses += [rng.integers(3, V, n) for n in lengths]
        numbers = list(range(first, first + len(lengths)))
        pair = [numbers[:2]] if len(numbers) > 1 else []
        groups += pair + [[i, -1] for i in numbers[2 * len(pair) :]]
        starts.append(len(groups))
    return data.Split(
        files=[],
        prompts=flat(prompts),
        responses=flat(responses),
        ref_logps=flat([rng.random(len(r)).astype(np.float32) for r in responses]),
        rewards=np.arange(len(responses), dtype=float),
        types=np.zeros(len(responses), np.int8),
        sources=np.zeros(len(responses), np.int32),
        source_names=["made up"],
        group_rows=np.array(groups),
        bundle_starts=np.array(starts),
    )


def one_by_one(model, split):
    """Log-probs of all response tokens by the model's plain forward, every row by itself."""
    found = []
    for row in range(len(split.lengths)):
        prompt, response = (torch.tensor(np.asarray(x[row])) for x in (split.prompts, split.responses))
        logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
        logps = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
        found.append(logps[torch.arange(len(response)), response])
    return torch.cat(found)


def with_gradients(model, compute):
    """Log-probs, and the gradient of a random weighted sum of them, of all trained parameters end to end."""
    model.zero_grad()
    logps = compute()
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(1))
    (logps * weights).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return logps.detach(), torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])


def assert_same(found, expected):
    assert (found[0] - expected[0]).abs().max() < 1e-5
    assert (found[1] - expected[1]).norm() < 1e-4 * expected[1].norm()


def scored(scorer, split, layout, chunked):
    scorer.use(layout != "padded", chunked)
    return scorer(data.collate(split, split.bundles(), layout))[0]


def settled(scorer, *settings):
    return policy.settle(scorer, config.load(None, ["dtype=float32", *settings]), CPU)


# --- every family ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_the_log_probs_and_gradients_of_rows_one_by_one(family):
    model, split = model_of(family), split_of()
    expected = with_gradients(model, lambda: one_by_one(model, split))
    scorer = policy.Scorer(model)
    assert settled(scorer) == "shared"
    for layout in ("shared", "rows", "padded"):
        for chunked in {False, scorer.chunked}:
            assert_same(with_gradients(model, lambda: scored(scorer, split, layout, chunked)), expected)  # noqa: B023
