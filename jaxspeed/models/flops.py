"""Model FLOPs: the arithmetic that a training step needs, however it is carried out.

Recomputed activations, padding of the vocabulary and masked scores are not needed, so
they do not count: the ratio of these FLOPs to what the chips could have done in the
same time is the model-FLOPs utilisation (PaLM, Chowdhery et al., 2022, appendix B).
"""

from jaxspeed.models.transformer import DecoderConfig


def matmul_parameters(config: DecoderConfig) -> int:
    """Parameters that every token is multiplied with.

    The projections of all layers and the projection to the vocabulary (the table where
    it is tied); not the lookup of the embedding, norms, biases and learned positions.
    """
    attention, hidden = config.attention, config.feed_forward
    heads = 2 * (attention.heads + attention.kv_heads) * attention.head_dim
    matrices = 3 if hidden.gated else 2
    layer = config.dim * (heads + matrices * hidden.hidden_dim)
    return config.num_layers * layer + config.dim * config.vocab_size


def model_flops(config: DecoderConfig, tokens: int, sequence_length: int) -> float:
    """FLOPs of one training step, forward and backward, on all devices together.

    `tokens * (6 N + 12 H K (visible keys, summed over layers))`: N are the matmul
    parameters, each used in one multiply-add forward and two backward; H heads of size
    K make scores and weighted values, again thrice (PaLM, appendix B: 6 N + 12 L H K S
    per token). A token sees S / 2 keys on average, since attention is causal, and with
    a window of W < S tokens W - W² / 2S, with a sparse layout those of the blocks it
    lists. Documents packed into one sequence see less; that is not taken off.

    Args:
        config: the model.
        tokens: tokens in the step, `batch.size * sequence_length`.
        sequence_length: S.
    """
    attention = config.attention
    keys = sum(
        _visible_keys(config, layer, sequence_length)
        for layer in range(config.num_layers)
    )
    scores = 12 * attention.heads * attention.head_dim * keys
    return float(tokens * (6 * matmul_parameters(config) + scores))


def _visible_keys(config: DecoderConfig, layer: int, sequence_length: int) -> float:
    """Keys that a token sees on average over the sequence."""
    attention, sparse = config.attention, config.attention.sparse
    if sparse.mode != "dense" and (sparse.layers is None or layer in sparse.layers):
        return sparse.visible_keys(attention.heads, sequence_length)
    layers, seen = attention.window_layers, sequence_length
    if attention.window is not None and (layers is None or layer in layers):
        seen = min(attention.window, sequence_length)
    return seen - seen**2 / (2 * sequence_length)
