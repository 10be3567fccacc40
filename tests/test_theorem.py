"""UNA's theorem through the whole trainer, where every response can be enumerated and the optimum is known.

    π*(y|x) = π_ref(y|x)·exp(r(x,y)/β) / Z(x)    ⇔    r(x,y) = β·log(π*(y|x)/π_ref(y|x)) + β·log Z(x)

Responses are two tokens of a vocabulary of four, so a prompt has 16, and the dataset holds them all. A regression of
the implicit reward onto r reaches π* when something stands for β·log Z(x) = f(x) + c, or cancels it, and only then.
π_θ is read off the saved policy by transformers alone. Score space: r = logit(s); reward space: r = s.

Shapes: P prompts, Y responses of a prompt.
"""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from test_train import make_model, plain_logps, print_of, una_train, write_dataset

from schemas import feedback
from una_train.losses import OBJECTIVES, Options
from una_train.offsets import balance

VOCABULARY = 4
PROMPTS = [[0, 1], [1, 2], [2, 3]]
RESPONSES = [list(pair) for pair in itertools.product(range(VOCABULARY), repeat=2)]
BETA = 1 / 3
RUN = [
    "tracker=none", "eval_every=0", "save_every=0", "log_every=1000", "dtype=float32", f"beta={BETA}",
    "batch_size=1000", "learning_rate=1e-2", "warmup_ratio=0.05", "epochs=200",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# --- the world ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A Llama of four tokens whose distribution is not uniform; the tokenizer is there for the fingerprint only."""
    where = make_model(tmp_path_factory.mktemp("model") / "enumerable")
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, initializer_range=0.1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(where)
    return where


def token_logps(model_dir: Path) -> np.ndarray:
    """log π(token) [P, Y, 2] of all responses, nats."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    return np.array([[plain_logps(model, prompt, response) for response in RESPONSES] for prompt in PROMPTS])


@pytest.fixture(scope="module")
def ref_logps(model_dir) -> np.ndarray:
    """log π_ref(token) [P, Y, 2], as a dataset stores them."""
    found = token_logps(model_dir).astype(np.float32).astype(np.float64)
    assert np.allclose(np.exp(found.sum(-1)).sum(-1), 1, atol=1e-5)
    return found


SEED = 0


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def rewards() -> np.ndarray:
    """r [P, Y]: all above 0 and below 3, so every score σ(r) asks for more."""
    return np.random.default_rng(SEED).uniform(0.1, 3, (len(PROMPTS), len(RESPONSES)))


def optimum(ref_logps: np.ndarray, r: np.ndarray, beta: float = BETA) -> np.ndarray:
    """log π* [P, Y]."""
    unnormalised = ref_logps.sum(-1) + r / beta
    return unnormalised - np.log(np.exp(unnormalised).sum(-1, keepdims=True))


def divergence(logps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """KL of the second from the first, nats [P]."""
    return (np.exp(logps) * (logps - others)).sum(-1)


def messages(number: int) -> list[feedback.Message]:
    return [{"role": "user", "content": f"prompt {number}"}]


def text(response: list[int]) -> str:
    return " ".join(map(str, response))


def scored(rows: list[feedback.Row], ref_logps: np.ndarray) -> pa.Table:
    numbers = {feedback.prompt_id(messages(i)): i for i in range(len(PROMPTS))}
    out = []
    for row in rows:
        prompt, response = numbers[row["prompt_id"]], [int(token) for token in row["response"].split()]
        logps = ref_logps[prompt, RESPONSES.index(response)].tolist()
        ids = {"prompt_ids": PROMPTS[prompt], "response_ids": response}
        out.append({**row, **ids, "ref_logps": logps, "ref_logp": sum(logps)})
    return pa.Table.from_pylist(out, schema=feedback.SCORED)


def scores(s: np.ndarray, metadata: list[dict] | None = None) -> list[feedback.Row]:
    """A row for every prompt and response, of scores s [P, Y]."""
    return [
        row
        for i, of_prompt in enumerate(s)
        for response, one in zip(RESPONSES, of_prompt, strict=True)
        for row in feedback.score(messages(i), text(response), one, source="all", metadata=metadata and metadata[i])
    ]


@pytest.fixture
def trained(tmp_path, model_dir, ref_logps):
    """Train on rows with some settings, and return log π_θ [P, Y]."""

    def train(rows: list[feedback.Row], *sets: str) -> np.ndarray:
        dataset = write_dataset(tmp_path / "set", {"train": scored(rows, ref_logps)}, print_of(model_dir))
        una_train(dataset, model_dir, tmp_path / "out", [*RUN, *sets])
        return token_logps(tmp_path / "out" / "policy").sum(-1)

    return train
