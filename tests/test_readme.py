"""The README's Python works as written, block after block."""

import json
import pathlib
import re

import jax
import numpy as np
from flax import nnx

import jaxspeed as js
from jaxspeed import cli

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        config = js.models.DecoderConfig(vocab_size=256, dim=32, num_layers=1)
        decoder = js.models.Decoder(config, rngs=nnx.Rngs(0))
        js.models.save_pretrained(decoder, "folder")
        pathlib.Path("ds_config.json").write_text(
            json.dumps(
                {
                    "train_batch_size": 64,
                    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                    "zero_optimization": {"stage": 2},
                }
            )
        )
        names = {"tokens": np.zeros((1, 8), np.int32)}
        blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        assert len(blocks) == 4
        for number, block in enumerate(blocks):
            exec(compile(block, f"README block {number}", "exec"), names)
    assert names["logits"].shape == (1, 8, 256)
    assert names["config"].zero.stage == 2
    assert pathlib.Path("copy/config.json").exists()


def test_the_commands_exist():
    named = set(re.findall(r"^\| `jaxspeed ([\w-]+)` \|", README, re.MULTILINE))
    assert named == set(cli.COMMANDS)


def test_the_files_it_links_to_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
