"""Which weights are read, and which settings travel: as stock transformers has it."""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLES
from test_compress import compress
from tiny import BY_NAME
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, MistralForSequenceClassification

from prune_peak.conversion.choice import choose_conversion
from prune_peak.models.loading import open_model
from prune_peak.sites.finding import find_sites

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
KEPT = {"license": "mit", "task_specific_params": {"a": 1}, "sentence_transformers": {"activation_fn": "x"}}


def write_weights(model: torch.nn.Module, name: str, folder: Path) -> None:
    """Weights as a single file, or as an index and two shards."""
    state = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    if name.startswith("model."):
        model.save_pretrained(folder, max_shard_size="50KB" if "index" in name else "1GB")  # type: ignore[operator]
    elif "index" not in name:
        torch.save(state, folder / name)
    else:
        parts = {f"pytorch_model-0000{n}-of-00002.bin": dict(list(state.items())[n - 1 :: 2]) for n in (1, 2)}
        for shard, part in parts.items():
            torch.save(part, folder / shard)
        places = {key: shard for shard, part in parts.items() for key in part}
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("present", [p for p in product((False, True), repeat=4) if any(p)])
def test_weights_are_those_of_transformers(present: tuple[bool, ...], tmp_path: Path) -> None:
    """Every combination of files, each with other weights."""
    folder = tmp_path / "model"
    for seed, (name, wanted) in enumerate(zip(WEIGHTS, present, strict=True)):
        if not wanted:
            continue
        written = tmp_path / str(seed)
        written.mkdir()
        write_weights(BY_NAME["llama-tied"].build(seed), name, written)
        BY_NAME["llama-tied"].build().config.save_pretrained(written)
        shutil.copytree(written, folder, dirs_exist_ok=True)
    stock = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    source = open_model(str(folder))
    assert all(torch.equal(source.read(name), stock[name]) for name in source.names)


def test_generation_settings_of_the_config(tmp_path: Path, text: Path) -> None:
    source = shutil.copytree(EXAMPLES / "llama-mini", tmp_path / "source")
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}))
    assert compress(source, tmp_path / "cut", text, "--samples", 4).exit_code == 0
    expected, found = (AutoModelForCausalLM.from_pretrained(f).generation_config for f in (source, tmp_path / "cut"))
    assert (found.repetition_penalty, found.no_repeat_ngram_size) == (1.3, 3)
    assert found.to_diff_dict() == expected.to_diff_dict()
    assert GenerationConfig.from_pretrained(tmp_path / "cut").repetition_penalty == 1.3


def save_with_keys(folder: Path, keys: dict[str, Any]) -> Path:
    config = BY_NAME["mistral"].configure()
    config.id2label = {0: "bad", 1: "good", 2: "neither"}
    config.label2id = {label: number for number, label in config.id2label.items()}
    MistralForSequenceClassification(config).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | keys))
    return folder


@pytest.mark.parametrize("output_class", ["own", "llama"])
def test_undeclared_keys_are_kept(output_class: str, tmp_path: Path) -> None:
    """But not those of code and of quantization, which the output does not have."""
    source = open_model(str(save_with_keys(tmp_path, KEPT | {"auto_map": {"AutoConfig": "mine.Mine"}})))
    sites = find_sites(source.meta_model, source.family)
    conversion = choose_conversion(source, sites, {site.name: 32 for site in sites}, torch.float32, output_class)
    conversion.config.save_pretrained(tmp_path / "written")
    written = AutoConfig.from_pretrained(tmp_path / "written")
    assert {key: getattr(written, key) for key in KEPT} == KEPT
    assert written.id2label == {0: "bad", 1: "good", 2: "neither"}
    assert "auto_map" not in json.loads((tmp_path / "written" / "config.json").read_text())
