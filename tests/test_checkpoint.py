import json
from pathlib import Path
from threading import enumerate as enumerate_threads

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BY_NAME

from prune_peak.errors import PrunePeakError
from prune_peak.io.checkpoint import Checkpoint, _places, _read_through
from prune_peak.io.tensor_files import tensor_bytes
from prune_peak.io.writer import INDEX_FILE, Writer
from prune_peak.models.loading import open_model


def test_writer_round_trip(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(4),
        "d": torch.tensor(True),
        "e": torch.randn(2, 2).half(),
    }
    with Writer(tmp_path, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}) as writer:
        for name in reversed(tensors):  # any order
            writer.write(name, tensors[name])
        assert set(writer.finish()) == set(tensors)
    for read in (load_file(tmp_path / "model.safetensors"), {n: Checkpoint(tmp_path).read(n) for n in tensors}):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(read[name], tensor)
            assert read[name].dtype == tensor.dtype


def test_shards(tmp_path: Path) -> None:
    layout = {f"t{number}": ((100,), torch.float32) for number in range(5)}
    with Writer(tmp_path, layout, shard_size=1000) as writer:
        for number in range(5):
            writer.write(f"t{number}", torch.full((100,), float(number)))
        writer.finish()
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == 2000
    checkpoint = Checkpoint(tmp_path)
    assert [checkpoint.read(f"t{number}")[0].item() for number in range(5)] == [0, 1, 2, 3, 4]


def test_tensor_offsets(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "empty": torch.zeros(0, 3)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    data, places = path.read_bytes(), _places(path)
    assert {name: data[slice(*place)] for name, place in places.items()} == {
        name: bytes(tensor_bytes(tensor)) for name, tensor in tensors.items()
    }


def test_read_ahead_of_a_changed_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3)}, path)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read_ahead(["a"])
    for garbage in (b"", b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]", bytes(100)):
        path.write_bytes(garbage)
        _read_through(tmp_path, {"a": path.name})
    path.unlink()
    _read_through(tmp_path, {"a": path.name})
    checkpoint.release()
    threads = set(enumerate_threads())
    checkpoint.read_ahead(["a"])
    for thread in set(enumerate_threads()) - threads:
        thread.join(10)
        assert not thread.is_alive()
    with pytest.raises(PrunePeakError, match="was changed while it was read"):
        checkpoint.read("a")


def test_a_file_that_cannot_be_mapped_is_read_once(tmp_path: Path) -> None:
    """Files from before torch 1.6: `release` must not read them again."""
    state = {"a": torch.ones(3), "b": torch.zeros(2)}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    checkpoint = Checkpoint(tmp_path)
    first = checkpoint.read("a")
    checkpoint.release()
    assert checkpoint.read("a").data_ptr() == first.data_ptr()


def test_missing_tensor_is_an_error(tmp_path: Path) -> None:
    with Writer(tmp_path, {"a": ((1,), torch.float32)}) as writer, pytest.raises(ValueError, match="never written"):
        writer.finish()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_value_is_refused(value: float, tmp_path: Path) -> None:
    with Writer(tmp_path, {"a": ((1,), torch.float32)}) as writer, pytest.raises(PrunePeakError, match="finite"):
        writer.write("a", torch.tensor([value]))


def spoil_truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def spoil_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def spoil_extra(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.adapter.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors")


def spoil_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 10**9}))


def spoil_blocks(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "mamba"}')


def spoil_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Trainer"]}))


def spoil_quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))


def spoil_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def index(shard: str):  # type: ignore[no-untyped-def]
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()  # which is read before an index
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))

    return spoil


SPOILED = {
    "truncated": (spoil_truncated, "not a readable safetensors file"),
    "header of 2^60 bytes": (spoil_header, "not a readable safetensors file"),
    "missing tensor": (spoil_missing, "lacks 1 tensors"),
    "unknown tensor": (spoil_extra, "not part of"),
    "absurd width": (spoil_shape, "config and the weights of one model"),
    "absurd depth": (spoil_blocks, "expected 1 to 1000"),
    "config not JSON": (spoil_config, "not readable JSON"),
    "unknown model type": (spoil_type, "MambaModel has no MLP that can be pruned"),
    "class of another kind": (spoil_class, "Custom code is never run"),
    "quantized": (spoil_quantized, "quantized"),
    "no weights": (spoil_weights, "contains no weights"),
    "shard outside": (index("../model.safetensors"), "outside its folder"),
    "missing shard": (index("model-00001-of-00002.safetensors"), "does not exist"),
    "shard by absolute path": (index("/etc/passwd"), "outside its folder"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_damaged_checkpoints_are_refused(name: str, tmp_path: Path) -> None:
    spoil, words = SPOILED[name]
    spoil(BY_NAME["llama-untied"].save(tmp_path))
    with pytest.raises(PrunePeakError, match=words):
        open_model(str(tmp_path))


def test_different_tensors_are_not_tied(tmp_path: Path) -> None:
    BY_NAME["llama-tied"].save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(same, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert open_model(str(tmp_path)).config.tie_word_embeddings is True
    save_file(same | {"lm_head.weight": same["lm_head.weight"] + 1}, tmp_path / "model.safetensors")
    source = open_model(str(tmp_path))
    assert source.config.tie_word_embeddings is False
    assert torch.equal(source.read("lm_head.weight"), same["lm_head.weight"] + 1)


def test_read_error_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(PrunePeakError, match=r"contains no config\.json"):
        open_model(str(tmp_path))
    with pytest.raises(PrunePeakError, match="neither a folder nor a Hub id"):
        open_model("not/a/model/at/all")
