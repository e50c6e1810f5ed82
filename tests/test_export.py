"""What a config says to older releases of transformers, which read other keys (`bench/readers.py` lets them)."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import LONG_ROPE
from transformers import Gemma3TextConfig, LlamaConfig, ModernBertConfig, Olmo3Config, PreTrainedConfig

from prune_peak.export.folder import write_config

PLAIN = {"rope_type": "default", "rope_theta": 5e4}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e4}
TWO = {"full_attention": LINEAR, "sliding_attention": PLAIN}
SCALING = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "older"),
    [
        (LlamaConfig(rope_parameters=PLAIN), {"rope_theta": 5e4, "rope_scaling": None}),
        (LlamaConfig(rope_parameters=LINEAR), {"rope_theta": 3e4, "rope_scaling": SCALING}),
        (LlamaConfig(rope_parameters=LONG_ROPE), {"rope_theta": 1e4, "original_max_position_embeddings": 40}),
        (Olmo3Config(rope_parameters=TWO), {"rope_theta": 3e4, "rope_scaling": SCALING}),
        (Gemma3TextConfig(rope_parameters=TWO), {"rope_theta": 3e4, "rope_local_base_freq": 5e4}),
        (ModernBertConfig(rope_parameters=TWO), {"global_rope_theta": 3e4, "local_rope_theta": 5e4}),
    ],
    ids=["llama", "linear", "longrope", "olmo3", "gemma3", "modernbert"],
)
def test_older_keys_of_rotary_positions(config: PreTrainedConfig, older: dict[str, Any], tmp_path: Path) -> None:
    config.rope_parameters = config.rope_parameters | (
        {"original_max_position_embeddings": 40} if "original_max_position_embeddings" in older else {}
    )
    write_config(config, tmp_path / "config.json")
    said = json.loads((tmp_path / "config.json").read_text())
    assert {key: said.get(key, "nothing") for key in older} == older
    read = type(config).from_pretrained(tmp_path)
    assert read.rope_parameters == config.rope_parameters
