"""Every way a checkpoint may lie on disk gives the same compressed tensors."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_law import cut_tiny, load, outputs
from tiny import BY_NAME, POSITIONS, TINY, Tiny

from prune_peak.errors import PrunePeakError
from prune_peak.models.loading import open_model


def save_legacy(tiny: Tiny, folder: Path, shards: int = 1, zipped: bool = True, base: bool = False) -> Path:
    """As releases before safetensors saved: tied weights included, in one `.bin` or several."""
    model = tiny.build()
    model = model.base_model if base else model
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names = list(state)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {name: state[name] for name in names[number::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


WAYS = {
    "safetensors, sharded": lambda tiny, folder: tiny.save(folder, max_shard_size="20KB"),
    "bin": lambda tiny, folder: save_legacy(tiny, folder),
    "bin, before zip": lambda tiny, folder: save_legacy(tiny, folder, zipped=False),
    "bin, sharded": lambda tiny, folder: save_legacy(tiny, folder, shards=3),
}


@pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.name)
def test_every_way_in_gives_the_same_tensors(tiny: Tiny, tmp_path: Path) -> None:
    plain = open_model(str(tiny.save(tmp_path / "plain")))
    for way, save in WAYS.items():
        source = open_model(str(save(tiny, tmp_path / way)))
        assert source.names.keys() == plain.names.keys(), way
        assert all(torch.equal(source.read(name), plain.read(name)) for name in plain.names), way
        assert all(source.dtype_of(name) == plain.dtype_of(name) for name in plain.names), way


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "vit"])
def test_every_way_in_is_cut_alike(name: str, way: str, tmp_path: Path) -> None:
    slices = []
    for folder, save in (("plain", Tiny.save), ("other", WAYS[way])):
        torch.manual_seed(0)
        cut_tiny(save(BY_NAME[name], tmp_path / folder), tmp_path / f"{folder}-cut", "mean")
        slices.append(load_file(tmp_path / f"{folder}-cut" / "model.safetensors"))
    assert slices[0].keys() == slices[1].keys()
    assert all(torch.equal(slices[0][name], slices[1][name]) for name in slices[0])


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2", "gpt-neox-parallel"])
def test_a_base_class_in_a_bin(name: str, tmp_path: Path) -> None:
    cut_tiny(save_legacy(BY_NAME[name], tmp_path / "source", base=True), tmp_path / "cut", "mean")
    assert load(tmp_path / "cut", "Model").num_parameters() > 0


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "llama-tied"])
def test_names_without_the_prefix(name: str, tmp_path: Path) -> None:
    """A class with a head whose file holds the names of its body, as old uploads do."""
    tiny = BY_NAME[name]
    expected = outputs(tiny.build())
    folder = save_legacy(tiny, tmp_path / "source")
    prefix = tiny.build().base_model_prefix + "."
    state = torch.load(folder / "pytorch_model.bin")
    torch.save({key.removeprefix(prefix): value for key, value in state.items()}, folder / "pytorch_model.bin")
    source = open_model(str(folder))
    for key, value in tiny.build().state_dict().items():
        assert torch.equal(source.read(key), value)
    cut_tiny(folder, tmp_path / "cut", "mean")
    assert outputs(load(tmp_path / "cut", tiny.head)).logits["prefill"].shape == expected.logits["prefill"].shape


class Payload:
    """Runs when it is unpickled."""

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return Path.touch, (Path("payload-ran"),)


def test_a_pickle_with_a_payload_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_legacy(BY_NAME["opt"], tmp_path / "source")
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({"model.decoder.embed_tokens.weight": Payload()}, folder / "pytorch_model.bin")
        with pytest.raises(PrunePeakError, match="a pickle can run code"):
            open_model(str(folder))
    assert not (tmp_path / "payload-ran").exists()


def test_a_bin_that_holds_more_than_tensors_is_refused(tmp_path: Path) -> None:
    folder = save_legacy(BY_NAME["opt"], tmp_path / "source")
    torch.save({"model": {"weight": torch.ones(1)}, "step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(PrunePeakError, match="more than named tensors"):
        open_model(str(folder))


REFUSED = {
    "decoder of another encoder": ({"model_type": "bert", "add_cross_attention": True}, "one half of an encoder-dec"),
    "mixture of experts": (
        {"model_type": "llama4_text", "num_local_experts": 8},
        "has no MLP that can be pruned.*experts",
    ),
    "remote code": ({"model_type": "mine", "auto_map": {"AutoModel": "evil.Model"}}, "custom code"),
    "quantized": ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "a quantized checkpoint"),
    "unknown": ({"model_type": "bloomer"}, "'bloomer', which is not one of transformers"),
    "no width": (
        {"model_type": "bloom"},
        "BloomForCausalLM has no MLP that can be pruned. No key of its config is a width",
    ),
    "no type": ({}, "None, which is not one of transformers"),
    "width of words": ({"model_type": "llama", "hidden_size": "wide"}, "not a valid llama config"),
    "negative width": ({"model_type": "llama", "hidden_size": -64}, "not a valid llama config"),
    "no blocks": ({"model_type": "llama", "num_hidden_layers": 0}, "expected 1 to 1000"),
    "blocks of words": ({"model_type": "opt", "num_hidden_layers": "many"}, "expected 1 to 1000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, words = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(PrunePeakError, match=words):
        open_model(str(tmp_path))


@pytest.mark.parametrize("name", ["LICENSE", "model.safetensors"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, tmp_path: Path) -> None:
    folder = BY_NAME["opt"].save(tmp_path / "source")
    (tmp_path / "secret").write_text("a secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(PrunePeakError, match="link out of its folder"):
        open_model(str(folder))


def test_the_links_of_the_hub_cache_are_fine(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    BY_NAME["opt"].save(blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert open_model(str(snapshot)).parameters > 0


def test_what_another_head_left_in_the_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Published BERTs hold a pooler and a sentence classifier that the masked LM does not have."""
    folder = BY_NAME["bert"].save(tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    more = {"bert.pooler.dense.weight": torch.randn(32, 32), "cls.seq_relationship.bias": torch.randn(2)}
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})
    source = open_model(str(folder))
    assert not set(more) & set(source.names.values())
    assert all(f"tensor {name} is not part of BertForMaskedLM" in caplog.text for name in more)


def test_a_config_that_names_no_class_opens_the_body(tmp_path: Path) -> None:
    """As DeBERTa-v3 is published: no `architectures`, and heads of pretraining that no stock class has."""
    source = BY_NAME["deberta-v3"].save(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    body = {name: tensor for name, tensor in tensors.items() if name.startswith("deberta.")}
    body |= {f"{head}.dense.weight": torch.zeros(3, 3) for head in ("lm_predictions.lm_head", "mask_predictions")}
    save_file(body, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    opened = open_model(str(source))
    assert opened.model_class.__name__ == "DebertaV2Model"
    cut_tiny(source, tmp_path / "cut", "mean")
    load(tmp_path / "cut", "Model")


def test_positions_that_padding_takes_are_not_for_windows(tmp_path: Path) -> None:
    assert open_model(str(BY_NAME["bert"].save(tmp_path / "bert"))).positions == POSITIONS
    assert open_model(str(BY_NAME["roberta"].save(tmp_path / "roberta"))).positions == POSITIONS - 3  # padding is 2
