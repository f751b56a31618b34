"""FLOPs that one device runs in a step, recomputation included, by formula.

A matmul of the forward pass costs twice its FLOPs again in the backward pass. On top
comes what `models.remat` recomputes, what blockwise attention recomputes by itself
(Dao et al., 2022: the scores), and the logits of a loss made in chunks.
"""

from jaxspeed.models.flops import model_flops
from jaxspeed.models.next_token import chunk_count
from jaxspeed.models.transformer import DecoderConfig
from jaxspeed.plan.activations import Activations


def step_flops(
    activations: Activations, *, remat: str, accumulation: int, num_devices: int
) -> float:
    """FLOPs of one device in a step.

    Args:
        activations: of one micro-batch.
        remat: the policy, a name in `models.remat`.
        accumulation: micro-batches in a step.
        num_devices: over which the model's FLOPs divide evenly.
    """
    model, length = activations.model, activations.length
    shared = num_devices // activations.shards
    tokens = activations.tokens * accumulation * shared
    total = model_flops(model, tokens, length)
    head = 2 * tokens * model.dim * model.vocab_size
    matmuls = 2 * tokens * layer_parameters(model) * model.num_layers
    scores = total / 3 - head - matmuls
    blockwise = activations.blockwise
    # Whole scores are computed for masked pairs as well.
    extra = scores / 2 if blockwise else 3 * scores
    if remat == "full":
        extra += matmuls - 2 * tokens * _last_matmul(model) * model.num_layers
    if remat in ("full", "dots_no_batch") or (remat == "dots" and blockwise):
        extra += scores if blockwise else 2 * scores
    columns = model.padded_vocab // activations.shards
    if chunk_count(activations.sequences, length, columns) > 1:
        extra += head
    return (total + extra) / num_devices


def layer_parameters(model: DecoderConfig) -> int:
    """Parameters of the matmuls of one layer."""
    attention, hidden = model.attention, model.feed_forward
    heads = 2 * (attention.heads + attention.kv_heads) * attention.head_dim
    return model.dim * (heads + (3 if hidden.gated else 2) * hidden.hidden_dim)


def _last_matmul(model: DecoderConfig) -> int:
    """Parameters of the matmul whose result no backward pass reads."""
    return model.dim * model.feed_forward.hidden_dim
