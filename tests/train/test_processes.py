"""Two processes with `jax.distributed`: the losses of one, and its checkpoints."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import jax
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
address = "127.0.0.1:" + port
jax.distributed.initialize(
    address, 2, rank, coordinator_bind_address=address, initialization_timeout=60
)
import jaxspeed as js
from tests.parallel import contract
engine = js.initialize(
    js.Config(
        zero=js.Zero(stage=3, min_size=64),
        checkpoint=js.Checkpoint(directory=folder),
    ),
    lambda rngs: js.models.Decoder(contract.MODEL, rngs=rngs),
    contract.OPTIMIZER,
    mesh=js.make_mesh(data=2, tensor=2),
)
state = engine.init(jax.random.key(1))
batches = list(contract.batches())
for batch in batches[:3]:
    state, metrics = engine.step(state, batch)
    print("loss", float(metrics["loss"]), flush=True)
engine.save(state, {"rank": 0})
engine.wait()
state, notes = engine.restore()
for batch in batches[3:]:
    state, metrics = engine.step(state, batch)
    print("loss", float(metrics["loss"]), flush=True)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_processes_train_save_and_restore_as_one(tmp_path):
    from tests.parallel import contract

    root = str(pathlib.Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": root,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    script, port = tmp_path / "run.py", free_port()
    script.write_text(SCRIPT)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), port, str(tmp_path / "saved")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-3000:]
    losses = [
        [float(line.split()[1]) for line in out.splitlines() if line[:4] == "loss"]
        for out, _ in results
    ]
    assert losses[0] == losses[1]
    expected = contract.one_device().losses
    assert losses[0] == pytest.approx(list(expected), rel=contract.LOSS_TOLERANCE)
