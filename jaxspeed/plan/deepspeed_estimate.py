"""DeepSpeed's two estimates of the memory of model states, for people who compare.

Both count bytes for mixed-precision Adam: per parameter 2 for the 16-bit weight, and 18
for 16-bit and 32-bit gradients (2 + 4), the 32-bit weight (4) and two moments (8); the
ZeRO paper, which keeps no 32-bit gradients, has 16 in all. Activations are not in
them. DeepSpeed, `runtime/zero/stage_1_and_2.py` and `runtime/zero/stage3.py`,
`estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs`.
What this library itself needs is `estimate`'s answer.
"""

from typing import Literal, NamedTuple

Offload = Literal["none", "optimizer", "all"]

BUFFER_FACTOR = 1.5
"""DeepSpeed's allowance for further buffers in host memory."""


class DeepSpeedBytes(NamedTuple):
    """Bytes of model states: on one GPU, and in the host memory of one node."""

    gpu: int
    host: int


def deepspeed_stage_2(
    params: int,
    *,
    gpus_per_node: int,
    nodes: int = 1,
    offload: Literal["none", "optimizer"] = "none",
) -> DeepSpeedBytes:
    """What DeepSpeed expects of ZeRO stage 2 (and 1).

    Args:
        params: number of parameters Ψ.
        gpus_per_node, nodes: their product is the number of shards.
        offload: `optimizer` keeps optimizer state and gradients in host memory.

    Raises:
        ValueError: a count below 1, or an unknown `offload`.
    """
    gpus = _gpus(params, gpus_per_node, nodes)
    if offload == "optimizer":
        return DeepSpeedBytes(
            gpu=2 * params, host=int(params * max(4 * gpus, 16) * BUFFER_FACTOR)
        )
    _check_offload(offload, ("none", "optimizer"))
    return DeepSpeedBytes(
        gpu=2 * params + int(18 * params / gpus),
        host=int(params * 4 * gpus_per_node * BUFFER_FACTOR),
    )


def deepspeed_stage_3(
    params: int,
    largest_layer: int,
    *,
    gpus_per_node: int,
    nodes: int = 1,
    offload: Offload = "none",
    sharded_init: bool = True,
) -> DeepSpeedBytes:
    """What DeepSpeed expects of ZeRO stage 3.

    Args:
        params: number of parameters Ψ.
        largest_layer: parameters of the largest layer, whole while it is used.
        gpus_per_node, nodes: their product is the number of shards.
        offload: `optimizer` keeps optimizer state and gradients in host memory, `all`
            the 16-bit weights as well.
        sharded_init: weights are created in shards (`zero.Init`), never whole.

    Raises:
        ValueError: a count below 1, or an unknown `offload`.
    """
    gpus = _gpus(params, gpus_per_node, nodes)
    if largest_layer < 1:
        raise ValueError(f"largest_layer is {largest_layer}; give at least 1")
    _check_offload(offload, ("none", "optimizer", "all"))
    on_gpu = {"none": 18, "optimizer": 2, "all": 0}[offload]
    gpu = 4 * largest_layer + int(on_gpu * params / gpus)
    if offload == "none":
        whole = largest_layer if sharded_init else params
        host = whole * 4 * gpus_per_node
    else:
        per_param = {"optimizer": 16, "all": 18}[offload] / nodes
        if not sharded_init:
            per_param = max(4 * gpus_per_node, per_param)
        host = params * per_param
    return DeepSpeedBytes(gpu=gpu, host=int(host * BUFFER_FACTOR))


def _gpus(params: int, gpus_per_node: int, nodes: int) -> int:
    counts = dict(params=params, gpus_per_node=gpus_per_node, nodes=nodes)
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; give at least 1")
    return gpus_per_node * nodes


def _check_offload(offload: str, allowed: tuple[str, ...]) -> None:
    if offload not in allowed:
        raise ValueError(f"offload is {offload!r}; choose one of {list(allowed)}")
