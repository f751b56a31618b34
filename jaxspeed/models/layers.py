"""Layers of the decoder as flax.nnx modules: norm, rotary positions, attention, MLP.

Legend for dims: B batch, S sequence, T cached sequence, D model, H heads, G key and
value heads, K head dim, F feed-forward, V vocabulary, L layers. A small letter is the
part of that dim on one device.

Every weight names its dims; the rules of `parallel` turn the names into specs. Layers
work on local shards inside `shard_map` and on whole arrays outside of it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxspeed.models.linear import is_quantized, linear
from jaxspeed.models.sparse_attention import SparseConfig
from jaxspeed.parallel import tensor

INIT_SCALE = 0.02
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """`kind` is "rms" (Zhang and Sennrich, 2019) or "layer" (Ba et al., 2016)."""

    kind: str = "rms"
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        _one_of("norm.kind", self.kind, ("rms", "layer"))


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """How a token knows where it is.

    Attributes:
        kind: "rope" (Su et al., 2021), "learned", or "alibi" (Press et al., 2022).
        max_length: rows of the learned table; otherwise what the model was made for.
        theta: rope's base.
        scaling: "none", "linear", or "llama3" (the frequency bands of Llama 3.1).
        factor: how much longer the sequences become by scaling.
        low_frequency, high_frequency, original_length: the bands of "llama3".
    """

    kind: str = "rope"
    max_length: int = 2048
    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        _one_of("position.kind", self.kind, ("rope", "learned", "alibi"))
        _one_of("position.scaling", self.scaling, ("none", "linear", "llama3"))


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention (Ainslie et al., 2023).

    Attributes:
        heads, kv_heads, head_dim: `kv_heads` divides `heads`.
        qkv_bias, out_bias: whether the projections have biases.
        qk_norm: RMS norm over the head dim of queries and keys (Qwen3).
        window: a token attends to itself and the `window - 1` before it; None to all.
        window_layers: the layers that have the window; None means all of them.
        sparse: a layout of blocks in place of a window.
    """

    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    sparse: SparseConfig = SparseConfig()

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"attention.heads={self.heads} is not a multiple of "
                f"attention.kv_heads={self.kv_heads}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention.window={self.window}; give at least 1 or None")
        if self.window is not None and self.sparse.mode != "dense":
            raise ValueError(
                f"attention.window={self.window} and attention.sparse.mode="
                f"{self.sparse.mode!r} are both given; keep one (mode 'local' is a "
                "window of blocks)"
            )


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
    """`gated` multiplies by a second projection (Shazeer, 2020)."""

    hidden_dim: int = 704
    activation: str = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _one_of("feed_forward.activation", self.activation, tuple(ACTIVATIONS))


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}; choose one of {list(allowed)}")


def weight(key: Array, shape: tuple[int, ...], dims: tuple[str, ...], scale: float):
    """A normally distributed parameter whose dims have names."""
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) * scale, dims=dims)


def constant(value: float, shape: tuple[int, ...], dims: tuple[str, ...]):
    """A parameter that starts at `value` everywhere."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), dims=dims)


class Norm(nnx.Module):
    """RMS or layer norm over the last dim, computed in float32."""

    def __init__(self, size: int, config: NormConfig, *, dim: str = "model") -> None:
        self.config = config
        self.scale = constant(1.0, (size,), (dim,))
        self.bias = constant(0.0, (size,), (dim,)) if config.kind == "layer" else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        if self.config.kind == "layer":
            y = y - y.mean(axis=-1, keepdims=True)
        variance = jnp.square(y).mean(axis=-1, keepdims=True)
        y = (y * jax.lax.rsqrt(variance + self.config.epsilon)).astype(x.dtype)
        last = (None,) * (x.ndim - 1)
        y = y * self.scale[last]
        return y if self.bias is None else y + self.bias[last]


def rope_frequencies(config: PositionConfig, head_dim: int) -> np.ndarray:
    """Radians per position for each pair of features, float32 [K / 2]."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequency = config.theta**-exponent
    if config.scaling == "linear":
        frequency = frequency / config.factor
    elif config.scaling == "llama3":
        turns = config.original_length * frequency / (2 * math.pi)
        low, high = config.low_frequency, config.high_frequency
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = keep * frequency + (1 - keep) * frequency / config.factor
    return frequency.astype(np.float32)


def rope(
    x: Float[Array, "B S H K"], positions: Int[Array, "B S"], config: PositionConfig
) -> Float[Array, "B S H K"]:
    """Rotates pairs (i, i + K/2) of features by an angle that grows with position."""
    frequency = jnp.asarray(rope_frequencies(config, x.shape[-1]))[None, None, None]
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def alibi_slopes(heads: int) -> np.ndarray:
    """ALiBi's slope per head, float32 [H] (Press et al., 2022, section 3).

    For a number of heads that is not a power of two: the slopes of the power below,
    then every other slope of the power above.
    """
    power = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** (-8.0 / power)
    slopes = [base**i for i in range(1, power + 1)]
    between = 2.0 ** (-4.0 / power)
    slopes += [between**i for i in range(1, 2 * (heads - power) + 1, 2)]
    return np.asarray(slopes, np.float32)


class Attention(nnx.Module):
    """Projections around an attention function; heads are split over `tensor`."""

    def __init__(
        self,
        dim: int,
        config: AttentionConfig,
        position: PositionConfig,
        norm: NormConfig,
        *,
        rngs: Any,
    ) -> None:
        heads, kv_heads, size = config.heads, config.kv_heads, config.head_dim
        self.config, self.position = config, position
        kv_dims = ("model", "kv_heads", "head")
        self.query = weight(
            rngs.params(), (dim, heads, size), ("model", "heads", "head"), INIT_SCALE
        )
        self.key = weight(rngs.params(), (dim, kv_heads, size), kv_dims, INIT_SCALE)
        self.value = weight(rngs.params(), (dim, kv_heads, size), kv_dims, INIT_SCALE)
        self.out = weight(
            rngs.params(), (heads, size, dim), ("heads", "head", "model"), INIT_SCALE
        )
        bias, kv_bias = ("heads", "head"), ("kv_heads", "head")
        has = config.qkv_bias
        self.query_bias = constant(0.0, (heads, size), bias) if has else None
        self.key_bias = constant(0.0, (kv_heads, size), kv_bias) if has else None
        self.value_bias = constant(0.0, (kv_heads, size), kv_bias) if has else None
        self.out_bias = constant(0.0, (dim,), ("model",)) if config.out_bias else None
        self.query_norm = Norm(size, norm, dim="head") if config.qk_norm else None
        self.key_norm = Norm(size, norm, dim="head") if config.qk_norm else None

    def project(self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]):
        """Queries [B, S, H@tensor, K], keys and values [B, S, G@tensor, K]."""

        def heads_of(param: Any, bias: Any, *, kv: bool) -> Array:
            def local(array: Array) -> Array:
                count, heads = self.config.kv_heads, self.config.heads
                return tensor.local_kv_heads(array, count, heads) if kv else array

            weight = param.get_value()
            if is_quantized(weight):
                y = linear(x, weight)
                y = local(y.reshape(*y.shape[:-1], -1, self.config.head_dim))
            else:
                y = jnp.einsum("bsd,dhk->bshk", x, local(weight))
            return y if bias is None else y + local(bias[...])[None, None]

        q = heads_of(self.query, self.query_bias, kv=False)
        k = heads_of(self.key, self.key_bias, kv=True)
        v = heads_of(self.value, self.value_bias, kv=True)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.position.kind == "rope":
            q, k = rope(q, positions, self.position), rope(k, positions, self.position)
        return q, k, v

    def slopes(self) -> Float[Array, " H"] | None:
        """ALiBi's slopes of this device's heads; None for other positions."""
        if self.position.kind != "alibi":
            return None
        return tensor.local_heads(jnp.asarray(alibi_slopes(self.config.heads)))

    def output(self, y: Float[Array, "B S H K"], region: tensor.Region) -> Array:
        """Back to the model dim, summed over heads: [B, S@tensor, D]."""
        weight = self.out.get_value()
        if is_quantized(weight):
            y = linear(y.reshape(*y.shape[:2], -1), weight)
        else:
            y = jnp.einsum("bshk,hkd->bsd", y, weight)
        y = region.leave(y)
        return y if self.out_bias is None else y + self.out_bias[None, None]


class FeedForward(nnx.Module):
    """Two matmuls with an activation between; the hidden dim is split over `tensor`."""

    def __init__(self, dim: int, config: FeedForwardConfig, *, rngs: Any) -> None:
        self.config = config
        hidden, columns = config.hidden_dim, ("model", "feed_forward")
        keys = (rngs.params(), rngs.params(), rngs.params())
        self.gate = (
            weight(keys[0], (dim, hidden), columns, INIT_SCALE)
            if config.gated
            else None
        )
        self.up = weight(keys[1], (dim, hidden), columns, INIT_SCALE)
        self.down = weight(keys[2], (hidden, dim), columns[::-1], INIT_SCALE)
        has = config.bias
        self.up_bias = constant(0.0, (hidden,), ("feed_forward",)) if has else None
        self.down_bias = constant(0.0, (dim,), ("model",)) if has else None

    def hidden(self, x: Float[Array, "B S D"]) -> Float[Array, "B S f"]:
        """What the second matmul takes, split over `tensor`."""
        activation = ACTIVATIONS[self.config.activation]
        up = linear(x, self.up.get_value())
        if self.up_bias is not None:
            up = up + self.up_bias[None, None]
        if self.gate is None:
            return activation(up)
        return activation(linear(x, self.gate.get_value())) * up

    def __call__(self, x: Float[Array, "B S D"], region: tensor.Region) -> Array:
        y = region.leave(linear(self.hidden(x), self.down.get_value()))
        return y if self.down_bias is None else y + self.down_bias[None, None]
