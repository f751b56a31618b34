"""How the parameters of a decoder are addressed in a Hugging Face folder."""

from jaxspeed import spec
from jaxspeed.models.hugging_face.layout import LETTERS, Sizes
from jaxspeed.models.transformer import DecoderConfig
from jaxspeed.parallel.zero import SCANNED


def letters(leaf: spec.Leaf) -> str:
    """The dims of one layer's parameter by letter, `DHK`."""
    return "".join(LETTERS[name] for name in leaf.dims if name and name != SCANNED)


def layer_numbers(leaf: spec.Leaf) -> list[int | None]:
    """The layers stacked in a parameter; one None for a parameter outside of them."""
    return list(range(leaf.shape[0])) if leaf.dims[:1] == (SCANNED,) else [None]


def stored_sizes(config: DecoderConfig) -> Sizes:
    """Lengths in the files, by letter: the vocabulary is not padded there."""
    return {
        "D": config.dim,
        "H": config.attention.heads,
        "G": config.attention.kv_heads,
        "K": config.attention.head_dim,
        "F": config.feed_forward.hidden_dim,
        "V": config.vocab_size,
        "P": config.position.max_length,
    }
