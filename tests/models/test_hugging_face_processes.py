"""Two processes load one folder into shards of both, and write it back together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxspeed.models import Decoder, DecoderConfig, from_pretrained, save_pretrained

PROCESS = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jaxspeed.mesh import make_mesh
from jaxspeed.models import from_pretrained, save_pretrained
from jaxspeed.parallel.zero import Zero
mesh = make_mesh(data=2, tensor=2)
model = from_pretrained(sys.argv[3], mesh=mesh, zero=Zero(stage=3, min_size=16))
assert not model.layers.attention.query[...].is_fully_addressable
save_pretrained(model, sys.argv[4], max_shard_bytes=100_000)
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    config = DecoderConfig(vocab_size=31, dim=32, num_layers=2)
    first, second = tmp_path / "first", tmp_path / "second"
    save_pretrained(Decoder(config, rngs=nnx.Rngs(params=0)), first)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(rank), first, second],
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert len(list(second.glob("model-*.safetensors"))) > 2
    both = (from_pretrained(first), from_pretrained(second))
    a, b = (jax.tree.leaves(nnx.state(model)) for model in both)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
