"""Logits of our decoder against `transformers` on the same random weights.

    python -m tests.models.fidelity [--json]

prints, for every family and variation, the largest difference of any logit: on one
device, with the weights split over two (`tensor=2`), and of `transformers` itself after
we wrote the model back. The tests hold each below `TOLERANCE`.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from jaxspeed.mesh import make_mesh
from jaxspeed.models import Decoder, from_pretrained, save_pretrained

TOLERANCE = 1e-4
BATCH, LENGTH = 2, 24
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,  # every band has a frequency
}
ROPE_LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A small model that `transformers` makes.

    Attributes:
        name: family and variation.
        model_type: the family.
        options: of its configuration class, over `SMALL`.
        dtype: dtype of the files.
        max_shard_size: of the files, as `transformers` writes it.
    """

    name: str
    model_type: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    max_shard_size: str = "1GB"


GATED = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
SMALL: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": GATED | {"sliding_window": None},
    "qwen2": GATED,
    "qwen3": GATED,
    "gpt2": {
        "vocab_size": 131,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 40,
    },
    "bloom": {"vocab_size": 131, "hidden_size": 48, "n_layer": 3, "n_head": 4},
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5}
GELU = {"hidden_act": "gelu", "rms_norm_eps": 1e-2}
RELU = {"activation_function": "relu", "n_inner": 56}
WIDE_HEADS = {"head_dim": 10}
UPPER = WINDOWS | {"max_window_layers": 1}
MIXED = WINDOWS | {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
ONE_KV_HEAD = {"num_key_value_heads": 1}
CASES = (
    Case("llama", "llama"),
    Case("llama, 1 kv head, tied", "llama", ONE_KV_HEAD | TIED),
    Case("llama, 8 kv heads, gelu", "llama", {"num_key_value_heads": 8} | GELU),
    Case("llama, biases, head_dim 10", "llama", {"attention_bias": True} | WIDE_HEADS),
    Case(
        "llama, rope llama3, shards",
        "llama",
        {"rope_parameters": ROPE_LLAMA3},
        "float32",
        "20KB",
    ),
    Case(
        "llama, rope linear, float16",
        "llama",
        {"rope_parameters": ROPE_LINEAR},
        "float16",
    ),
    Case("llama, bfloat16, shards", "llama", {}, "bfloat16", "20KB"),
    Case("mistral, 4 kv heads", "mistral", {"num_key_value_heads": 4}),
    Case("mistral, window 7", "mistral", {"sliding_window": 7}),
    Case("qwen2, upper windows", "qwen2", UPPER),
    Case("qwen2, 1 kv head, tied", "qwen2", ONE_KV_HEAD | TIED),
    Case("qwen3, head_dim 10", "qwen3", WIDE_HEADS),
    Case(
        "qwen3, windows, biases", "qwen3", {"attention_bias": True} | MIXED, "bfloat16"
    ),
    Case("gpt2", "gpt2"),
    Case("gpt2, untied, relu, shards", "gpt2", UNTIED | RELU, "bfloat16", "20KB"),
    Case("bloom", "bloom"),
    Case("bloom, 6 heads, float16", "bloom", {"n_head": 6}, "float16"),
    Case("bloom, untied, shards", "bloom", UNTIED, "float32", "20KB"),
)


def write(case: Case, folder: Path) -> None:
    """Writes the case's folder with `transformers`.

    Every parameter is random, norms and biases too, and large enough that each of them
    moves the logits.
    """
    torch.set_num_threads(1)
    options = SMALL[case.model_type] | case.options
    config = transformers.AutoConfig.for_model(
        case.model_type, **options, bos_token_id=None, eos_token_id=None
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(len(case.name))
    with torch.no_grad():
        for name, value in model.named_parameters():
            center = 1.0 if "norm" in name or ".ln_" in name else 0.0
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(center + 0.3 * noise)
    model.to(getattr(torch, case.dtype))
    model.save_pretrained(folder, max_shard_size=case.max_shard_size)


def load_reference(folder: Path) -> Any:
    """The folder's model as `transformers` loads it, in float32."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    problems = {key: value for key, value in report.items() if value}
    if problems:
        raise ValueError(f"transformers loads {folder} with {problems}")
    return model.eval()


def reference_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of a `transformers` model."""
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@jax.jit
def our_logits(model: Decoder, tokens: jax.Array) -> jax.Array:
    """Logits of our decoder."""
    return model(tokens)


def tokens_for(case: Case) -> np.ndarray:
    """The same random tokens every time, int32 [BATCH, LENGTH]."""
    vocab_size = SMALL[case.model_type]["vocab_size"]
    random = np.random.default_rng(len(case.name))
    return random.integers(0, vocab_size, (BATCH, LENGTH), dtype=np.int32)


def measure(case: Case) -> dict[str, Any]:
    """The largest differences of logits for one case."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, written = Path(scratch, "theirs"), Path(scratch, "ours")
        tokens = tokens_for(case)
        write(case, folder)
        expected = reference_logits(load_reference(folder), tokens)
        one = from_pretrained(folder)
        mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
        two = from_pretrained(folder, mesh=mesh)
        save_pretrained(two, written)
        back = reference_logits(load_reference(written), tokens)
        found = {
            "one_device": our_logits(one, tokens),
            "tensor_2": our_logits(two, tokens),
            "written_back": back,
        }
        differences = {
            key: float(np.abs(np.asarray(logits) - expected).max())
            for key, logits in found.items()
        }
        spread = float(expected.std())
        return {"case": case.name, "logit_std": spread, **differences}


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if a difference is above the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for case in CASES:
        rows.append(measure(case))
        print(f"{len(rows)}/{len(CASES)} {case.name}", file=sys.stderr)
    columns = ("one_device", "tensor_2", "written_back")
    if options.json:
        environment = {"jax": jax.__version__, "transformers": transformers.__version__}
        print(
            json.dumps({"name": "fidelity", "rows": rows, "environment": environment})
        )
    else:
        print("largest difference of logits from transformers, float32")
        titles = ("1 device", "tensor=2", "written back")
        print(f"{'':30}{'std':>8}" + "".join(f"{title:>14}" for title in titles))
        for row in rows:
            cells = "".join(f"{row[column]:14.1e}" for column in columns)
            print(f"{row['case']:30}{row['logit_std']:8.2f}{cells}")
    worst = max(row[column] for row in rows for column in columns)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # float32 matmuls are float32 there
    jax.config.update("jax_num_cpu_devices", 2)
    sys.exit(main())
