"""The corpus: hostile and broken inputs by kind; each is a name, what damages the valid things, and what is said of it.

`valid.py` makes the valid things; a kind names those that its command reads, and the command. `{}` in a command stands
for the folder that they lie in.
"""

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import BY_NAME

Damage = Callable[[Path], object]

CANARY = "canary"  # code that should never run makes a file of this name, in the folder that this variable names
DROP = object()
ESCAPES = "\x1b]0;owned\x07\x1b[31m\nError: all is well"  # names the window, turns red, and adds a line
DEEP = "[" * 100_000


@dataclass(frozen=True)
class Kind:
    """Inputs that the same command reads."""

    needs: tuple[str, ...]  # of the valid things
    command: tuple[str, ...]
    cases: Mapping[str, tuple[Damage, str]]  # name: damage, words of the error
    code: int = 1


class Payload:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open(__import__('os').environ['{CANARY}'] + '/{CANARY}', 'w')",)


CODE = f"import os\nopen(os.environ['{CANARY}'] + '/{CANARY}', 'w')\nraise SystemExit('untrusted code')\n"


# What damages -----------------------------------------------------------------------------------------------------


def change(name: str, **values: Any) -> Damage:
    """Keys of a JSON file said otherwise."""

    def damage(folder: Path) -> None:
        path = folder / name
        told = json.loads(path.read_text()) if path.exists() else {}
        told |= values
        path.write_text(json.dumps({key: value for key, value in told.items() if value is not DROP}))

    return damage


def change_inside(name: str, *keys: str, to: Any) -> Damage:
    """One value deep in a JSON file."""

    def damage(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        inner = told
        for key in keys[:-1]:
            inner = inner[key]
        inner.pop(keys[-1], None)
        if to is not DROP:
            inner[keys[-1]] = to
        (folder / name).write_text(json.dumps(told))

    return damage


def put(name: str, content: str | bytes) -> Damage:
    """A file with another content."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def remove(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    return damage


def link(name: str, to: str) -> Damage:
    def damage(folder: Path) -> None:
        remove(name)(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(to)

    return damage


def pipe(name: str) -> Damage:
    """A reader waits for a writer that never comes."""

    def damage(folder: Path) -> None:
        remove(name)(folder)
        os.mkfifo(folder / name)

    return damage


def make_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        remove(name)(folder)
        (folder / name).mkdir()

    return damage


def cut_off(name: str, length: int) -> Damage:
    """A file that ends early, or with that much removed from its end."""
    return lambda folder: put(name, (folder / name).read_bytes()[:length])(folder)


def all_of(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage


def nothing(folder: Path) -> None:
    """For commands that are wrong by themselves."""


def header(name: str, edit: Callable[[dict[str, Any]], Any], length: int | None = None) -> Damage:
    """A safetensors file with another header, and the length that it has or one that it has not."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        size = int.from_bytes(data[:8], "little")
        told = json.loads(data[8 : 8 + size])
        edited = edit(told)
        text = edited if isinstance(edited, bytes) else json.dumps(told if edited is None else edited).encode()
        start = (len(text) if length is None else length).to_bytes(8, "little")
        (folder / name).write_bytes(start + text + data[8 + size :])

    return damage


def tensors(name: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """A safetensors file of other tensors, and the same metadata."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        held = load_file(folder / name)
        edited = edit(held)
        held = edited if isinstance(edited, dict) else held
        save_file({key: value.contiguous() for key, value in held.items()}, folder / name, told.get("__metadata__"))

    return damage


def entry(tensor: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda told: told[tensor].update(values)


def metadata(key: str, edit: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    """What our own files say of themselves, in a JSON string."""

    def damage(told: dict[str, Any]) -> None:
        edited = edit(json.loads(told["__metadata__"][key]))
        told["__metadata__"][key] = edited if isinstance(edited, str) else json.dumps(edited)

    return damage


def pickled(value: Any) -> Damage:
    """A `.bin` as torch saves it."""
    return lambda folder: torch.save(value, folder / "legacy/pytorch_model.bin")


def state(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """A `.bin` whose state dict was changed."""

    def damage(folder: Path) -> None:
        held = torch.load(folder / "legacy/pytorch_model.bin")
        edited = edit(held)
        torch.save(edited if isinstance(edited, dict) else held, folder / "legacy/pytorch_model.bin")

    return damage


def rezipped(kind: int, copies: int = 1) -> Damage:
    """A `.bin` packed, as torch never does, with a gigabyte of zeros in it; or its parts named several times."""

    def damage(folder: Path) -> None:
        path = folder / "legacy/pytorch_model.bin"
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, data in parts.items():
                archive.writestr(name, data)
            for number in range(copies):
                with archive.open(f"archive/data/bomb{number}", "w") as bomb:
                    for _ in range(64):
                        bomb.write(bytes(2**20))

    return damage


def overlapping(folder: Path) -> None:
    """A zip whose directory names one part a thousand times: as large as a thousand, and stored once."""
    path = folder / "legacy/pytorch_model.bin"
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    start, size = (int.from_bytes(data[end + at : end + at + 4], "little") for at in (16, 12))
    directory = data[start : start + size] * 100
    count = (100 * int.from_bytes(data[end + 10 : end + 12], "little")).to_bytes(2, "little")
    tail = data[end : end + 8] + count * 2 + len(directory).to_bytes(4, "little") + data[end + 16 :]
    path.write_bytes(data[:start] + directory + tail)


def picture(width: int, height: int, name: str = "images/a.png") -> Damage:
    """A PNG that claims a size, with a few bytes behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    parts = chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return put(name, b"\x89PNG\r\n\x1a\n" + parts)


def tarred(folder: Path) -> None:
    """As torch saved before its pickles."""
    with tarfile.open(folder / "legacy/pytorch_model.bin", "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            told = tarfile.TarInfo(name)
            data = pickle.dumps(Payload())
            told.size = len(data)
            archive.addfile(told, io.BytesIO(data))


# What is damaged --------------------------------------------------------------------------------------------------

SHORT = ("--samples", "2", "--sequence-length", "32", "--no-refit", "--output", "{}/out", "-q")
CUT = ("compress", "--model", "{}/model", "--ratio", "0.3", "--calibration", "{}/text.txt", *SHORT)
CUT_SHARDED = ("compress", "--model", "{}/sharded", "--ratio", "0.3", "--calibration", "{}/text.txt", *SHORT)
CUT_LEGACY = ("compress", "--model", "{}/legacy", "--ratio", "0.3", "--calibration", "{}/text.txt", *SHORT)
CUT_VIT = ("compress", "--model", "{}/vit", "--ratio", "0.3", "--calibration", "{}/images", *SHORT, "--samples", "9")
CUT_JSONL = ("compress", "--model", "{}/model", "--ratio", "0.3", "--calibration", "{}/text.jsonl", *SHORT)
CUT_STATS = ("compress", "--model", "{}/model", "--ratio", "0.3", "--stats", "{}/model.stats", "--no-refit")
CUT_STATS = (*CUT_STATS, "--output", "{}/out", "-q")


def cut(model: str) -> tuple[str, ...]:
    return ("compress", "--model", f"{{}}/{model}", "--ratio", "0.3", "--calibration", "{}/text.txt", *SHORT)


def refitting(stats: str) -> tuple[str, ...]:
    return ("compress", "--model", "{}/model", "--ratio", "0.3", "--stats", f"{{}}/{stats}", "--output", "{}/out", "-q")


GO_ON = ("compress", "--model", "{}/model", "--ratio", "0.3", "--calibration", "{}/text.txt", *SHORT[:-3])
GO_ON = (*GO_ON, "--output", "{}/stopped", "-q")
VERIFY = ("verify", "{}/cut", "--original", "{}/model", "-q")

C, MAP, H = "model/config.json", "sharded/model.safetensors.index.json", "model/model.safetensors"
NORM = "model.norm.weight"  # the last tensor in the file
DOWN = "model.layers.0.mlp.down_proj.weight"
SITE = "model.layers.0.mlp.down_proj"


def config(**values: Any) -> Damage:
    return change(C, **values)


def other_config(name: str, **values: Any) -> Damage:
    """The config of another family, changed; it is refused before its weights are looked for."""

    def damage(folder: Path) -> None:
        BY_NAME[name].build().config.save_pretrained(folder / "model")
        change(C, architectures=[f"{BY_NAME[name].family}{BY_NAME[name].head}"], **values)(folder)

    return damage


BROKEN_JSON: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", ""),
    "half": ('{"a": ', ""),
    "list": ("[1, 2]", ""),
    "null": ("null", ""),
    "not UTF-8": (b'{"a": "\xff"}', ""),
    "nested too deeply": (DEEP, ""),
    "a number of 5000 digits": ('{"a": ' + "9" * 5000 + "}", ""),
}


def broken(name: str, words: str, **others: str) -> dict[str, tuple[Damage, str]]:
    """A JSON file that holds no JSON, or cannot be read at all."""
    cases = {f"{Path(name).name} {what}": (put(name, text), words) for what, (text, _) in BROKEN_JSON.items()}
    return cases | {
        f"{Path(name).name} a pipe": (pipe(name), others.get("pipe", "neither a file nor a folder")),
        f"{Path(name).name} a link out": (link(name, "/etc/hostname"), "a link out of its folder"),
    }


INVALID = "is not a valid llama config"
MISMATCH = "Use the config and the weights of one model"
CONFIG = {
    **broken(C, "config.json"),
    "link to a device": (link(C, "/dev/zero"), "a link out of its folder"),
    "circular links": (all_of(link(C, "b"), link("model/b", "config.json")), "a link out of its folder"),
    "dangling link": (link(C, "gone.json"), "neither a file nor a folder"),
    "folder": (make_folder(C), "is not readable JSON"),
    "missing": (remove(C), "contains no config.json"),
    "no type": (config(model_type=DROP), "the model type None, which is not one of transformers"),
    "type a number": (config(model_type=5), "the model type 5"),
    "type a list": (config(model_type=["llama"]), "the model type ['llama']"),
    "type with escapes": (config(model_type=ESCAPES), r"\x1b]0;owned\x07\x1b[31m\nError: all is well"),
    "type of a megabyte": (config(model_type="x" * 2**20), "..."),
    "decoder of an encoder": (config(is_encoder_decoder=True), "one half of an encoder-decoder"),
    "experts": (
        config(model_type="mixtral", num_local_experts=8, architectures=["MixtralForCausalLM"]),
        "are not part of MixtralForCausalLM",
    ),
    "blocks of another name": (
        config(model_type="bart", architectures=["BartForCausalLM"], decoder_layers=10**7),
        "sets decoder_layers to 10000000; expected 0 to 1000",
    ),
    "images without end": (
        config(model_type="data2vec-vision", architectures=["Data2VecVisionModel"], image_size=10**6),
        "no small Data2VecVisionModel runs",
    ),
    "multimodal": (config(model_type="llava", text_config={}), "expected a stock llava class"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "a quantized checkpoint"),
    "custom code": (
        all_of(config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}), put("model/mine.py", CODE)),
        "custom code ('mine'), which is never run",
    ),
    "custom class": (
        all_of(
            config(architectures=["Mine"], auto_map={"AutoModelForCausalLM": "mine.Mine"}), put("model/mine.py", CODE)
        ),
        "Custom code is never run",
    ),
    "class of another family": (config(architectures=["OPTForCausalLM"]), "expected a stock llama class"),
    "class that is none": (config(architectures=["Trainer"]), "expected a stock llama class"),
    "class by path": (config(architectures=["../../evil"]), "expected a stock llama class"),
    "classes in an object": (config(architectures={"a": 1}), INVALID),
    "class a number": (config(architectures=[5]), "expected a stock llama class"),
    "attention from the Hub": (config(attn_implementation="evil/kernel"), "code from the Hub and is never run"),
    "attention from the Hub, inner key": (config(_attn_implementation_internal={"": "evil/kernel"}), "code from the"),
    "attention unknown": (config(attn_implementation="evil"), INVALID),
    "weights elsewhere": (config(transformers_weights="../vit/model.safetensors"), "sets transformers_weights to"),
    "an adapter": (change("model/adapter_config.json", base_model_name_or_path="/etc"), "contains an adapter"),
    "width 10^9": (config(hidden_size=10**9), MISMATCH),
    "width -1": (config(hidden_size=-1), INVALID),
    "width 0": (config(hidden_size=0), MISMATCH),
    "width string": (config(hidden_size="wide"), INVALID),
    "width null": (config(hidden_size=None), INVALID),
    "width one and a half": (config(hidden_size=1.5), INVALID),
    "width infinite": (config(hidden_size=float("inf")), INVALID),
    "width 10^40": (config(hidden_size=10**40), INVALID),
    "neurons 10^9": (config(intermediate_size=10**9), MISMATCH),
    "neurons 0": (config(intermediate_size=0), MISMATCH),
    "neurons -64": (config(intermediate_size=-64), INVALID),
    "neurons a list": (config(intermediate_size=[64]), INVALID),
    "heads 10^9": (config(num_attention_heads=10**9), "is not a multiple of the number of attention heads"),
    "heads 0": (config(num_attention_heads=0), INVALID),
    "heads -4": (config(num_attention_heads=-4), INVALID),
    "heads 3": (config(num_attention_heads=3), INVALID),
    "groups 10^9": (config(num_key_value_heads=10**9), MISMATCH),
    "groups 0": (config(num_key_value_heads=0), INVALID),
    "groups 3": (config(num_key_value_heads=3), MISMATCH),
    "head 10^9 wide": (config(head_dim=10**9), "needs tables of"),
    "head 0 wide": (config(head_dim=0), INVALID),
    "blocks 10^9": (config(num_hidden_layers=10**9), "expected 1 to 1000"),
    "blocks 10^9 of GPT-2": (other_config("gpt2", n_layer=10**9), "expected 1 to 1000"),
    "blocks 10^9 of DistilBERT": (other_config("distilbert", n_layers=10**9), "expected 1 to 1000"),
    "blocks 0": (config(num_hidden_layers=0), "expected 1 to 1000"),
    "blocks -1": (config(num_hidden_layers=-1), "expected 1 to 1000"),
    "blocks string": (config(num_hidden_layers="many"), "expected 1 to 1000"),
    "missing blocks": (config(num_hidden_layers=3), "lacks 9 tensors"),
    "surplus blocks": (config(num_hidden_layers=1), "not part of"),
    "vocabulary 10^9": (config(vocab_size=10**9), MISMATCH),
    "vocabulary 0": (config(vocab_size=0), INVALID),
    "vocabulary -1": (config(vocab_size=-1), INVALID),
    "labels 10^9": (config(num_labels=10**9), "expected 1 to 1000000"),
    "positions 10^9 of GPT-J": (other_config("gptj", n_positions=10**9), "needs tables of"),
    "positions string": (config(max_position_embeddings="far"), INVALID),
    "padding 10^9": (config(pad_token_id=10**9), INVALID),
    "activation unknown": (config(hidden_act="os.system"), INVALID),
    "activation a list": (config(hidden_act=["silu"]), INVALID),
    "rotary a list": (config(rope_parameters=[1]), INVALID),
    "rotary of an unknown kind": (config(rope_parameters={"rope_type": "evil", "rope_theta": 1.0}), INVALID),
    "rotary string": (config(rope_parameters={"rope_type": "default", "rope_theta": "x"}), INVALID),
    "epsilon string": (config(rms_norm_eps="small"), INVALID),
    "epsilon NaN": (config(rms_norm_eps=float("nan")), "not finite"),
    "dtype a function": (config(dtype="save"), INVALID),
    "unknown dtype": (config(dtype="float9"), INVALID),
    **broken("model/generation_config.json", "generation_config.json"),
}


def index(**weight_map: Any) -> Damage:
    """Where the tensors lie, said otherwise."""

    def damage(folder: Path) -> None:
        told = json.loads((folder / MAP).read_text())
        told["weight_map"] |= weight_map
        (folder / MAP).write_text(json.dumps(told))

    return damage


def where(shard: Any) -> Damage:
    return index(**{NORM: shard})


FIRST = "model-00001-of-00004.safetensors"
INDEX = {
    **broken(MAP, "is not a checkpoint index"),
    "no map": (change(MAP, weight_map=DROP), "is not a checkpoint index"),
    "map a list": (change(MAP, weight_map=[FIRST]), "is not a checkpoint index"),
    "map null": (change(MAP, weight_map=None), "is not a checkpoint index"),
    "map empty": (change(MAP, weight_map={}), "lacks 21 tensors"),
    "shard a number": (where(5), "must map names to file names"),
    "shard a list": (where([FIRST]), "must map names to file names"),
    "shard above": (where("../model/model.safetensors"), "is outside its folder"),
    "shard by absolute path": (where("/etc/passwd"), "is outside its folder"),
    "shard below": (where("sub/model.safetensors"), "is outside its folder"),
    "shard hidden": (where(".model.safetensors"), "is outside its folder"),
    "shard without a name": (where(""), "does not exist"),
    "shard the folder above": (where(".."), "is outside its folder"),
    "shard with a zero byte": (where("model\0.safetensors"), "does not exist"),
    "shard of half a surrogate": (where("model\ud800.safetensors"), "does not exist"),
    "shard of a long name": (where("x" * 5000), "does not exist"),
    "shard with escapes": (where(ESCAPES), r"\x1b]0;owned"),
    "missing shard": (where("model-00005-of-00004.safetensors"), "does not exist"),
    "shard of another tensor": (where(FIRST), "which does not contain it"),
    "missing tensor": (index(**{"model.none.weight": FIRST}), "which does not contain it"),
    "shard a link out": (link(f"sharded/{FIRST}", "/etc/hostname"), "a link out of its folder"),
    "shard a pipe": (pipe(f"sharded/{FIRST}"), "neither a file nor a folder"),
    "shard a folder": (make_folder(f"sharded/{FIRST}"), "does not exist"),
    "shard empty": (put(f"sharded/{FIRST}", ""), "not a readable safetensors file"),
}

UNREADABLE = "not a readable safetensors file"
HEADER = {
    "empty": (put(H, ""), UNREADABLE),
    "seven bytes": (put(H, b"1234567"), UNREADABLE),
    "of zero bytes": (header(H, lambda told: None, 0), UNREADABLE),
    "of 2^60 bytes": (header(H, lambda told: None, 2**60), UNREADABLE),
    "of 2^64 bytes": (header(H, lambda told: None, 2**64 - 1), UNREADABLE),
    "too long": (header(H, lambda told: None, 10**5), UNREADABLE),
    "not JSON": (header(H, lambda told: b"{" * 100), UNREADABLE),
    "a list": (header(H, lambda told: b"[]      "), UNREADABLE),
    "not UTF-8": (header(H, lambda told: b"\xff" * 8), UNREADABLE),
    "nested too deeply": (header(H, lambda told: DEEP.encode()), UNREADABLE),
    "of no tensors": (header(H, lambda told: {}), UNREADABLE),
    "truncated data": (cut_off(H, -100), UNREADABLE),
    "trailing data": (lambda folder: put(H, (folder / H).read_bytes() + b"more")(folder), UNREADABLE),
    "overlapping tensors": (header(H, entry(NORM, data_offsets=[0, 128])), UNREADABLE),
    "offsets backwards": (header(H, entry(NORM, data_offsets=[128, 0])), UNREADABLE),
    "offsets beyond the end": (header(H, entry(NORM, data_offsets=[2**40, 2**40 + 128])), UNREADABLE),
    "offsets negative": (header(H, entry(NORM, data_offsets=[-128, 0])), UNREADABLE),
    "offsets string": (header(H, entry(NORM, data_offsets=["a", "b"])), UNREADABLE),
    "one offset": (header(H, entry(NORM, data_offsets=[0])), UNREADABLE),
    "type unknown": (header(H, entry(NORM, dtype="F33")), UNREADABLE),
    "type with escapes": (header(H, entry(NORM, dtype=ESCAPES)), UNREADABLE),
    "type of quantized weights": (
        tensors(H, lambda held: held.update({NORM: held[NORM].to(torch.float8_e4m3fn)})),
        "F8_E4M3",
    ),
    "integer weights": (
        tensors(H, lambda held: held.update({NORM: held[NORM].long()})),
        "is stored as torch.int64",
    ),
    "boolean weights": (
        tensors(H, lambda held: {n: t.bool() for n, t in held.items()}),
        "is stored as torch.bool",
    ),
    "shape of other size": (header(H, entry(NORM, shape=[33])), UNREADABLE),
    "shape negative": (header(H, entry(NORM, shape=[-32])), UNREADABLE),
    "shape that overflows": (header(H, entry(NORM, shape=[2**62, 2**62])), UNREADABLE),
    "shape string": (header(H, entry(NORM, shape=["a"])), UNREADABLE),
    "scalar shape": (tensors(H, lambda held: held.update({NORM: held[NORM][0]})), MISMATCH),
    "shape transposed": (tensors(H, lambda held: held.update({DOWN: held[DOWN].T})), MISMATCH),
    "shape too short": (tensors(H, lambda held: held.update({NORM: held[NORM][:-1]})), MISMATCH),
    "metadata a list": (header(H, lambda told: told.update(__metadata__=[])), UNREADABLE),
    "metadata of numbers": (header(H, lambda told: told.update(__metadata__={"a": 1})), UNREADABLE),
    "missing tensor": (tensors(H, lambda held: held.pop(NORM)), "lacks 1 tensors"),
    "extra tensor": (tensors(H, lambda held: held.update(more=torch.ones(1))), "not part of"),
    "extra tensor, with escapes": (tensors(H, lambda held: held.update({ESCAPES: torch.ones(1)})), r"\x1b]0;owned"),
    "duplicate tensor": (header(H, lambda told: json.dumps(told).replace("lm_head.weight", NORM).encode()), UNREADABLE),
    **{
        f"names with the prefix {prefix}": (
            tensors(H, lambda held, prefix=prefix: {prefix + name: tensor for name, tensor in held.items()}),
            f"have the prefix {prefix} of ",
        )
        for prefix in ("_orig_mod.", "base_model.model.", "module.", "_fsdp_wrapped_module.")
    },
    "names with a prefix inside": (
        tensors(H, lambda held: {name.replace(".0.", ".0._orig_mod."): tensor for name, tensor in held.items()}),
        "Save model._orig_mod with `save_pretrained` instead",
    ),
    "a tensor by two names": (
        tensors(H, lambda held: held.update({"norm.weight": held[NORM].clone()})),
        "are the same tensor",
    ),
    "NaN weight": (tensors(H, lambda held: held[DOWN].view(-1)[7].fill_(float("nan"))), "not finite"),
    "infinite weight": (tensors(H, lambda held: held[DOWN].view(-1)[7].fill_(float("inf"))), "not finite"),
    "NaN head": (
        tensors(H, lambda held: held["lm_head.weight"].fill_(float("nan"))),
        "tensor 'lm_head.weight' contains values that are not finite",
    ),
    "folder": (make_folder(H), "contains no weights"),
    "pipe": (pipe(H), "neither a file nor a folder"),
    "link out": (link(H, "/etc/hostname"), "a link out of its folder"),
    "link to a device": (link(H, "/dev/zero"), "a link out of its folder"),
    "missing": (remove(H), "contains no weights"),
}

BIN = "legacy/pytorch_model.bin"
PICKLE = "a pickle can run code"
LEGACY = {
    "a payload": (pickled({"a": Payload()}), PICKLE),
    "a payload, before zip": (put(BIN, pickle.dumps({"a": Payload()})), PICKLE),
    "a payload as the whole": (pickled(Payload()), PICKLE),
    "a payload in a tar": (tarred, PICKLE),
    "a module": (pickled(torch.nn.Linear(2, 2)), PICKLE),
    "empty": (put(BIN, ""), PICKLE),
    "noise": (put(BIN, bytes(range(256)) * 10), PICKLE),
    "text": (put(BIN, "<html>404</html>"), PICKLE),
    "truncated": (cut_off(BIN, -1000), PICKLE),
    "a zip without tensors": (lambda folder: zipfile.ZipFile(folder / BIN, "w").close(), PICKLE),
    "a zip bomb": (rezipped(zipfile.ZIP_DEFLATED), "unpacks to more than its size"),
    "overlapping parts": (overlapping, "unpacks to more than its size"),
    "a list": (pickled([torch.ones(1)]), "more than named tensors"),
    "a number": (pickled(5), "more than named tensors"),
    "a training state": (pickled({"model": {"a": torch.ones(1)}, "step": 3}), "more than named tensors"),
    "numbers for names": (pickled({5: torch.ones(1)}), "more than named tensors"),
    "a tensor of one number that claims 10^18": (
        state(lambda held: held.update({NORM: torch.ones(1).expand(10**9, 10**9)})),
        "larger than its stored data",
    ),
    "a sparse tensor": (
        state(lambda held: held.update({NORM: torch.sparse_coo_tensor([[0]], [1.0], (10**9,))})),
        "larger than its stored data",
    ),
    "a quantized tensor": (
        state(lambda held: held.update({NORM: torch.quantize_per_tensor(torch.ones(32), 1.0, 0, torch.qint8)})),
        "qint8",
    ),
    "complex numbers": (state(lambda held: held.update({NORM: held[NORM].to(torch.complex64)})), "complex64"),
    "missing tensor": (state(lambda held: held.pop(NORM)), "lacks 1 tensors"),
    "extra tensor": (state(lambda held: held.update(more=torch.ones(1))), "not part of"),
    "NaN weight": (state(lambda held: held[DOWN].view(-1)[7].fill_(float("nan"))), "not finite"),
    "index out of the folder": (
        all_of(
            remove("legacy/pytorch_model.bin"),
            change("legacy/pytorch_model.bin.index.json", weight_map={NORM: "../model/model.safetensors"}),
        ),
        "is outside its folder",
    ),
    "pipe": (pipe(BIN), "neither a file nor a folder"),
}

T, TC = "model/tokenizer.json", "model/tokenizer_config.json"
NO_TOKENIZER = "has no tokenizer that transformers can load"
TOKENIZER = {
    **{name: case for name, case in broken(T, NO_TOKENIZER).items() if "5000" not in name},
    **{name: case for name, case in broken(TC, NO_TOKENIZER).items() if "5000" not in name},
    "missing": (remove(T, TC), NO_TOKENIZER),
    "of an unknown kind": (change_inside(T, "model", "type", to="Evil"), NO_TOKENIZER),
    "without a vocabulary": (change_inside(T, "model", "vocab", to=DROP), NO_TOKENIZER),
    "vocabulary string": (change_inside(T, "model", "vocab", to={"a": "b"}), NO_TOKENIZER),
    "token id 10^9": (change_inside(T, "model", "vocab", "e", to=10**9), "produces the token 1000000000"),
    "unknown merges": (change_inside(T, "model", "merges", to=[["xx", "yy"]]), NO_TOKENIZER),
    "empty vocabulary": (
        all_of(change_inside(T, "model", "vocab", to={}), change_inside(T, "model", "merges", to=[])),
        "has 0 tokens, fewer than one window",
    ),
    "custom class": (
        all_of(
            change(TC, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]}),
            change(C, model_type="llama", tokenizer_class="Mine"),
            put("model/mine.py", CODE),
            remove(T),
        ),
        NO_TOKENIZER,
    ),
    "special tokens of numbers": (change(TC, bos_token=5), NO_TOKENIZER),
    "template link out": (
        link("model/additional_chat_templates/x.jinja", "/etc/hostname"),
        "a link out of its folder",
    ),
}

TEXT = {
    "missing": (remove("text.txt"), "text.txt does not exist, and is no id of a Hub data set"),
    "empty": (put("text.txt", ""), "has 0 tokens"),
    "short": (put("text.txt", "a b"), "fewer than one window"),
    "not UTF-8": (put("text.txt", b"\xff\xfe\xfa"), "is not a readable UTF-8 text"),
    "UTF-16": (put("text.txt", "The quick brown fox".encode("utf-16")), "is not a readable UTF-8 text"),
    "folder": (make_folder("text.txt"), "not a file"),
    "pipe": (pipe("text.txt"), "not a file"),
    "link to a device": (link("text.txt", "/dev/zero"), "not a file"),
}
LINES = 'line 2: expected an object with a "text"'
GOOD = '{"text": "good"}\n'
JSONL = {
    "empty": (put("text.jsonl", ""), "has 0 tokens"),
    "not JSON": (put("text.jsonl", GOOD + "good\n"), LINES),
    "a list": (put("text.jsonl", GOOD + "[1]\n"), LINES),
    "a number": (put("text.jsonl", GOOD + "1\n"), LINES),
    "no text": (put("text.jsonl", GOOD + '{"body": "x"}\n'), LINES),
    "a text of numbers": (put("text.jsonl", GOOD + '{"text": 5}\n'), LINES),
    "a text of nothing": (put("text.jsonl", GOOD + '{"text": null}\n'), LINES),
    "lone surrogate": (put("text.jsonl", GOOD + '{"text": "\\ud800"}\n'), LINES),
    "nested too deeply": (put("text.jsonl", GOOD + DEEP + "\n"), LINES),
    "empty line": (put("text.jsonl", GOOD + "\n" + GOOD), "fewer than one window"),
    "pipe": (pipe("text.jsonl"), "not a file"),
}

V, P = "vit/config.json", "vit/preprocessor_config.json"
NO_IMAGE, NO_PROCESSOR = "is not a readable image", "has no image processor that transformers can load"
IMAGES = {
    "a text": (put("images/a.png", "hello"), NO_IMAGE),
    "empty": (put("images/a.png", ""), NO_IMAGE),
    "truncated": (cut_off("images/b.jpg", 500), NO_IMAGE),
    "a header alone": (picture(24, 24), NO_IMAGE),
    "a bomb of 50000 x 50000": (picture(50_000, 50_000), NO_IMAGE),
    "of no width": (picture(0, 24), NO_IMAGE),
    "of 2^31 lines": (picture(1, 2**31 - 1), NO_IMAGE),
    "a strip": (picture(20_000, 4), "expected a ratio of the sides of at most 50"),
    "a program": (put("images/a.eps", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"), NO_IMAGE),
    "a drawing": (put("images/a.svg", '<svg xmlns="http://www.w3.org/2000/svg"/>'), NO_IMAGE),
    "a pickle": (put("images/a.png", pickle.dumps(Payload())), NO_IMAGE),
    "nothing but a pipe": (all_of(remove("images"), make_folder("images"), pipe("images/a.png")), "has no image"),
    "none": (all_of(remove("images"), make_folder("images")), "has no image"),
    "name with escapes": (put(f"images/{ESCAPES}", "x"), r"\x1b]0;owned"),
    **{name: case for name, case in broken(P, NO_PROCESSOR).items() if "5000" not in name},
    "missing processor": (remove(P), NO_PROCESSOR),
    "resized to 10^9": (change(P, size={"height": 10**9, "width": 10**9}), "expected 1 to 4096"),
    "resized to -1": (change(P, size={"height": -1, "width": 24}), "expected 1 to 4096"),
    "resized to a string": (change(P, size={"height": "a", "width": 24}), NO_PROCESSOR),
    "resized to another size": (
        change(P, size={"height": 32, "width": 32}),
        "does not accept the output of its image processor",
    ),
    "means string": (change(P, image_mean="a"), "the image processor"),
    "custom processor": (
        all_of(
            change(P, image_processor_type="Mine", auto_map={"AutoImageProcessor": "mine.Mine"}),
            put("vit/mine.py", CODE),
        ),
        NO_PROCESSOR,
    ),
    "patch 0": (change(V, patch_size=0), "is not a valid vit config"),
    "image 10^9": (change(V, image_size=10**9), MISMATCH),
    "missing labels": (change(V, id2label={}, label2id={}), "not part of"),
}

S = "model.stats"
NO_STATS = "is not a statistics file"
M = "prune_peak_statistics"
FIELD = f"{SITE}/stats/"
NOT_ALL = "does not hold all of"
STATS = {
    "missing": (remove(S), "is not a readable safetensors file"),
    "empty": (put(S, ""), UNREADABLE),
    "pipe": (pipe(S), "(not a file)"),
    "folder": (make_folder(S), "(not a file)"),
    "weights": (lambda folder: shutil.copy(folder / H, folder / S), NO_STATS),
    "header of 2^60 bytes": (header(S, lambda told: None, 2**60), UNREADABLE),
    "no metadata": (header(S, lambda told: told.pop("__metadata__") and None), NO_STATS),
    "metadata not JSON": (header(S, metadata(M, lambda about: "{")), NO_STATS),
    "metadata a list": (header(S, metadata(M, lambda about: [])), NO_STATS),
    "metadata brackets without end": (header(S, metadata(M, lambda about: DEEP)), NO_STATS),
    "of another model": (header(S, metadata(M, lambda about: about | {"model": "x"})), "of another model"),
    "options a list": (header(S, metadata(M, lambda about: about | {"options": []})), NO_STATS),
    "missing options": (header(S, metadata(M, lambda about: about | {"options": {}})), NO_STATS),
    "unknown dtype": (
        header(S, metadata(M, lambda about: about | {"options": about["options"] | {"dtype": "evil"}})),
        NO_STATS,
    ),
    "samples string": (
        header(S, metadata(M, lambda about: about | {"options": about["options"] | {"samples": "x"}})),
        NO_STATS,
    ),
    **{
        f"{name} {value}": (
            header(S, metadata(M, lambda about, told={name: value}: about | {"options": about["options"] | told})),
            NO_STATS,
        )
        for name, value in (("samples", None), ("samples", 10**18), ("sequence_length", 10**18), ("seed", "x"))
    },
    "text a number": (header(S, metadata(M, lambda about: about | {"text": 5})), NO_STATS),
    "missing site": (
        tensors(S, lambda held: {n: t for n, t in held.items() if not n.startswith(FIELD)}),
        "of every site",
    ),
    "missing field": (tensors(S, lambda held: held.pop(f"{FIELD}sum")), NOT_ALL),
    "extra field": (tensors(S, lambda held: held.update({f"{FIELD}evil": torch.ones(1)})), NOT_ALL),
    "NaN sum": (tensors(S, lambda held: held[f"{FIELD}sum"].fill_(float("nan"))), NOT_ALL),
    "integer sum": (
        tensors(S, lambda held: held.update({f"{FIELD}sum": held[f"{FIELD}sum"].long()})),
        NOT_ALL,
    ),
    "a short sum": (tensors(S, lambda held: held.update({f"{FIELD}sum": held[f"{FIELD}sum"][:-1]})), NOT_ALL),
    "a pivot of no axes": (tensors(S, lambda held: held.update({f"{FIELD}pivot": torch.tensor(1.0)})), "of every site"),
    "no tokens": (tensors(S, lambda held: held[f"{FIELD}counts"].zero_()), NOT_ALL),
    "tokens negative": (tensors(S, lambda held: held[f"{FIELD}counts"].neg_()), NOT_ALL),
    "windows of 10^9": (tensors(S, lambda held: held["held_out"].fill_(10**9)), NO_STATS),
    "windows of random floats": (tensors(S, lambda held: held.update(held_out=torch.rand(2, 2))), NO_STATS),
    "missing windows": (tensors(S, lambda held: held.pop("held_out")), NO_STATS),
}

GRAMS, TAPES = "gram.stats", "tape.stats"
PRODUCTS, ROWS = f"{SITE}/gram/fitted/", f"{SITE}/activations/"


def field(file: str, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors(file, lambda held: held.update({name: edit(held[name])}))


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().view(-1).index_fill_(0, torch.tensor(0), float("nan")).view(tensor.shape)


GRAM = {
    "NaN product": (field(GRAMS, f"{PRODUCTS}products", nan), NOT_ALL),
    "products too few": (field(GRAMS, f"{PRODUCTS}products", lambda values: values[:-1]), NOT_ALL),
    "integer products": (field(GRAMS, f"{PRODUCTS}products", lambda values: values.long()), NOT_ALL),
    "negative products": (field(GRAMS, f"{PRODUCTS}products", lambda values: -values), "are not positive definite"),
    "NaN sum of products": (field(GRAMS, f"{PRODUCTS}sum", nan), NOT_ALL),
    "a short sum of products": (field(GRAMS, f"{PRODUCTS}sum", lambda values: values[:-1]), NOT_ALL),
    "a pivot of 10^7": (field(GRAMS, f"{PRODUCTS}pivot", lambda values: torch.zeros(10**7)), NOT_ALL),
    "products of no tokens": (field(GRAMS, f"{PRODUCTS}count", torch.zeros_like), NOT_ALL),
    "count with two elements": (field(GRAMS, f"{PRODUCTS}count", lambda count: count[None].repeat(2)), NOT_ALL),
    "NaN power": (field(GRAMS, f"{SITE}/power/median", nan), NOT_ALL),
    "power 0": (field(GRAMS, f"{SITE}/power/median", torch.zeros_like), NOT_ALL),
    "missing products": (tensors(GRAMS, lambda held: held.pop(f"{PRODUCTS}products")), NOT_ALL),
}
TAPE = {
    "NaN row": (field(TAPES, f"{ROWS}rows", nan), NOT_ALL),
    "integer rows": (field(TAPES, f"{ROWS}rows", lambda rows: rows.long()), NOT_ALL),
    "rows of fewer neurons": (field(TAPES, f"{ROWS}rows", lambda rows: rows[:, 1:]), NOT_ALL),
    "rows of one axis": (field(TAPES, f"{ROWS}rows", lambda rows: rows.flatten()), NOT_ALL),
    "no rows": (field(TAPES, f"{ROWS}rows", lambda rows: rows[:0]), NOT_ALL),
    "batches of more rows": (field(TAPES, f"{ROWS}batches", lambda batches: batches + 1), NOT_ALL),
    "batches of fewer than none": (
        field(TAPES, f"{ROWS}batches", lambda batches: torch.cat([-batches, 2 * batches])),
        NOT_ALL,
    ),
    "no batches": (field(TAPES, f"{ROWS}batches", lambda batches: batches[:0]), NOT_ALL),
}

R, N = "cut/prune_peak.json", "cut/prune_peak_plan.safetensors"
NO_RECIPE, NO_FIT = "is not a folder that prune-peak wrote", "does not fit"
KEEP, FILL = f"{SITE}.keep", f"{SITE}.fill"
PLAN = {
    **broken(R, NO_RECIPE),
    "missing recipe": (remove(R), NO_RECIPE),
    "missing options": (change(R, options=DROP), NO_RECIPE),
    "sites string": (change_inside(R, "options", "sites", to="mlp"), NO_RECIPE),
    "sites unknown": (change_inside(R, "options", "sites", to=["evil"]), NO_RECIPE),
    "no sites": (change_inside(R, "options", "sites", to=[]), NO_RECIPE),
    "sites of lists": (change_inside(R, "options", "sites", to=[["mlp"]]), NO_RECIPE),
    "unit unknown": (change_inside(R, "options", "unit", to="evil"), NO_RECIPE),
    "refit string": (change_inside(R, "options", "refit", to="yes"), NO_RECIPE),
    "no widths": (change(R, sites=DROP), NO_RECIPE),
    "widths a list": (change(R, sites=[]), NO_RECIPE),
    "width string": (change_inside(R, "sites", SITE, to={"kept": "all"}), NO_RECIPE),
    "a width of -1": (change_inside(R, "sites", SITE, to={"kept": -1}), NO_RECIPE),
    "a width of 10^9": (change_inside(R, "sites", SITE, to={"kept": 10**9}), NO_FIT),
    "a site without a width": (change_inside(R, "sites", SITE, to={}), NO_RECIPE),
    "the widths of other sites": (change(R, sites={"evil": {"kept": 1}}), NO_FIT),
    "tensors a list": (change(R, tensors=[]), NO_RECIPE),
    "missing plan": (remove(N), UNREADABLE),
    "plan empty": (put(N, ""), UNREADABLE),
    "plan a pipe": (pipe(N), "neither a file nor a folder"),
    "plan a link out": (link(N, "/etc/hostname"), "a link out of its folder"),
    "plan with a header of 2^60 bytes": (header(N, lambda told: None, 2**60), UNREADABLE),
    "plan of something else": (lambda folder: shutil.copy(folder / S, folder / N), "is not a plan"),
    "missing site": (tensors(N, lambda held: {n: t for n, t in held.items() if not n.startswith(SITE)}), NO_FIT),
    "no kept neurons": (tensors(N, lambda held: held.update({KEEP: held[KEEP][:0]})), NO_FIT),
    "missing kept neuron": (tensors(N, lambda held: held.update({KEEP: held[KEEP][1:]})), NO_FIT),
    "a kept neuron beyond the last": (tensors(N, lambda held: held[KEEP][-1].fill_(10**9)), NO_FIT),
    "a kept neuron negative": (tensors(N, lambda held: held[KEEP][0].fill_(-1)), NO_FIT),
    "kept neurons twice": (tensors(N, lambda held: held[KEEP][1].copy_(held[KEEP][0])), NO_FIT),
    "kept neurons backwards": (tensors(N, lambda held: held.update({KEEP: held[KEEP].flip(0)})), NO_FIT),
    "fractional kept neurons": (tensors(N, lambda held: held.update({KEEP: held[KEEP].float()})), NO_FIT),
    "NaN fill": (tensors(N, lambda held: held[FILL].fill_(float("nan"))), NO_FIT),
    "missing fill": (tensors(N, lambda held: held.pop(FILL)), "is not a plan"),
    "a short fill": (tensors(N, lambda held: held.update({FILL: held[FILL][:-1]})), NO_FIT),
    "unexpected narrowing": (
        tensors(N, lambda held: held.update({f"{SITE}.query": torch.ones(1), f"{SITE}.key": torch.ones(1)})),
        NO_FIT,
    ),
    "weights a link out": (link("cut/model.safetensors", "/etc/hostname"), "a link out of its folder"),
    "weights truncated": (cut_off("cut/model.safetensors", -100), UNREADABLE),
}

G = "stopped.partial"
PROGRESS = {
    **{
        name: (damage, "different options")
        for name, (damage, _) in broken(f"{G}/run.json", "").items()
        if "link" not in name
    },
    "missing fingerprint": (change(f"{G}/run.json", fingerprint=DROP), "different options"),
    "fingerprint a list": (change(f"{G}/run.json", fingerprint=[]), "different options"),
    "other options": (
        change_inside(f"{G}/run.json", "fingerprint", "seed", to=1),
        "different options (seed)",
    ),
    "found a list of numbers": (change(f"{G}/run.json", found=[1]), "different options"),
    "other calibration": (
        change(f"{G}/run.json", found={"calibration": "x"}),
        "belongs to an unfinished run with another calibration",
    ),
    "a link": (all_of(remove(G), link(G, "model")), "stopped.partial is a file"),
    "a file": (all_of(remove(G), put(G, "x")), "stopped.partial is a file"),
    "checkpoint a link out": (all_of(remove(f"{G}/checkpoint"), link(f"{G}/checkpoint", "../model")), "a link out"),
    "weights a link out": (link(f"{G}/checkpoint/model.safetensors", "../../model/model.safetensors"), "a link out"),
    "weights a pipe": (pipe(f"{G}/checkpoint/model.safetensors"), "neither a file nor a folder"),
}

Q = "heads/config.json"
THREE_LABELS = change(Q, id2label={0: "a", 1: "b", 2: "c"}, label2id={})
HEADS = {
    "three ends of an answer": (THREE_LABELS, MISMATCH),
    "three ends of an answer, with their weights": (
        all_of(
            THREE_LABELS,
            tensors(
                "heads/model.safetensors",
                lambda held: {n: torch.cat([t, t[:1]]) if "qa_outputs" in n else t for n, t in held.items()},
            ),
        ),
        "does not run: BertForQuestionAnswering of transformers",
    ),
    "class of another family": (change(Q, model_type="llama"), "expected a stock llama class"),
    "no vocabulary": (change(Q, vocab_size=None), "is not a valid bert config"),
    "a vocabulary of half a token": (change(Q, vocab_size=0.5), "is not a valid bert config"),
    "no positions": (change(Q, max_position_embeddings=0), MISMATCH),
    "positions -1": (change(Q, max_position_embeddings=-1), "is not a valid bert config"),
    "head with escapes": (change(Q, architectures=[f"BertFor{ESCAPES}"]), r"\x1b]0;owned"),
    "an encoder as a decoder with another": (change(Q, is_decoder=True, add_cross_attention=True), "encoder-decoder"),
    "labels of 10^7": (change(Q, num_labels=10**7), "expected 1 to 1000000"),
}

J = "sentences/modules.json"


def modules(**values: Any) -> Damage:
    """`modules.json` that says something else of its second module."""
    model = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    pooling = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    return put(J, json.dumps([model, pooling | values]))


BESIDE, NO_LIST = "expected one beside it", "is not a list of modules"
SENTENCES = {
    **{name: case for name, case in broken(J, NO_LIST).items() if "link" not in name and "pipe" not in name},
    "modules a pipe": (pipe(J), "(not a file)"),
    "modules a link out": (link(J, "/etc/hostname"), NO_LIST),
    "modules of numbers": (put(J, "[1, 2]"), NO_LIST),
    "modules without a path": (put(J, '[{"type": "x"}]'), NO_LIST),
    "folder above": (modules(path="../model"), BESIDE),
    "folder above, by name": (modules(path=".."), BESIDE),
    "folder itself": (modules(path="."), BESIDE),
    "folder by absolute path": (modules(path="/etc"), BESIDE),
    "folder of another system": (modules(path="..\\\\model"), BESIDE),
    "folder below": (modules(path="1_Pooling/../../model"), BESIDE),
    "folder with escapes": (modules(path=f"a/{ESCAPES}"), r"\x1b]0;owned"),
    "folder a number": (modules(path=5, type="mine.Mine"), "'mine.Mine', whose code is not copied"),
    "folder a link out": (all_of(remove("sentences/1_Pooling"), link("sentences/1_Pooling", "/etc")), "a link out"),
    "file a link out": (link("sentences/1_Pooling/config.json", "/etc/hostname"), "a link out of its folder"),
    "file a pipe": (pipe("sentences/1_Pooling/vocab.txt"), "neither a file nor a folder"),
    "weights that are a pickle": (put("sentences/1_Pooling/pytorch_model.bin", pickle.dumps(Payload())), "is a pickle"),
    "class of custom code": (
        all_of(modules(type="mine.Pooling"), put("sentences/mine.py", CODE)),
        "'mine.Pooling', whose code is not copied and never run",
    ),
    "class with escapes": (modules(type=ESCAPES), r"\x1b]0;owned"),
    "licence a link out": (link("sentences/LICENSE", "/etc/hostname"), "a link out of its folder"),
    "policy a pipe": (pipe("sentences/USE_POLICY.md"), "neither a file nor a folder"),
    "notes a link out": (link("sentences/customers.txt", "/etc/hostname"), "a link out of its folder"),
}

GGUF = {
    "token id 10^9": (change_inside("cut/tokenizer.json", "model", "vocab", "zz", to=10**9), "the token 1000000000"),
    "tokenizer of an unknown kind": (change_inside("cut/tokenizer.json", "model", "type", to="Evil"), NO_TOKENIZER),
    "config empty": (put("cut/config.json", ""), "is not readable JSON"),
    "weights a pipe": (pipe("cut/model.safetensors"), "neither a file nor a folder"),
    "extra weight": (tensors("cut/model.safetensors", lambda held: held.update(more=torch.ones(1))), "not part of"),
}

KINDS = {
    "config": Kind(("model", "text.txt"), CUT, CONFIG),
    "index": Kind(("sharded", "text.txt"), CUT_SHARDED, INDEX),
    "header": Kind(("model", "text.txt"), CUT, HEADER),
    "bin": Kind(("legacy", "text.txt", "model"), CUT_LEGACY, LEGACY),
    "tokenizer": Kind(("model", "text.txt"), CUT, TOKENIZER),
    "text": Kind(("model", "text.txt"), CUT, TEXT),
    "jsonl": Kind(("model", "text.jsonl"), CUT_JSONL, JSONL),
    "images": Kind(("vit", "images"), CUT_VIT, IMAGES),
    "stats": Kind(("model", "model.stats"), CUT_STATS, STATS),
    "gram": Kind(("model", GRAMS), refitting(GRAMS), GRAM),
    "tape": Kind(("model", TAPES), refitting(TAPES), TAPE),
    "plan": Kind(("cut", "model", "model.stats"), VERIFY, PLAN),
    "stopped run": Kind(("stopped.partial", "model", "text.txt"), GO_ON, PROGRESS),
    "heads": Kind(("heads", "text.txt"), cut("heads"), HEADS),
    "sentences": Kind(("sentences", "text.txt"), cut("sentences"), SENTENCES),
    "gguf": Kind(("cut",), ("export", "{}/cut", "{}/out.gguf", "--format", "gguf", "-q"), GGUF),
}

# Words that are wrong by themselves: name: (command, words of the error, exit code)
BARE = ("compress", "--model", "{}/model", "--calibration", "{}/text.txt", *SHORT)
OPTIONS: dict[str, tuple[tuple[str, ...], str, int]] = {
    "ratio string": ((*BARE, "--ratio", "lots"), "expected a number", 2),
    "ratio NaN": ((*BARE, "--ratio", "nan"), "must be between 0 and 1", 2),
    "ratio infinite": ((*BARE, "--ratio", "inf"), "must be between 0 and 1", 2),
    "ratio 0": ((*BARE, "--ratio", "0"), "must be between 0 and 1", 2),
    "ratio 1": ((*BARE, "--ratio", "1"), "must be between 0 and 1", 2),
    "ratio -1": ((*BARE, "--ratio", "-1"), "must be between 0 and 1", 2),
    "ratio with escapes": ((*BARE, "--ratio", ESCAPES), r"\x1b]0;owned", 2),
    "ratio of nothing": ((*BARE, "--ratio", "mlp="), "expected a number", 2),
    "ratio of an unknown kind": ((*BARE, "--ratio", "evil=0.3"), "expected", 2),
    "ratio twice": ((*BARE, "--ratio", "mlp=0.3=0.4"), "expected a number", 2),
    "no ratio": (BARE, "how much to prune", 2),
    "bytes string": ((*BARE, "--target-bytes", "lots"), "expected a size", 2),
    "bytes infinite": ((*BARE, "--target-bytes", "1e999GB"), "expected a size", 2),
    "bytes negative": ((*BARE, "--target-bytes", "-5GB"), "expected a size", 2),
    "bytes too few": ((*BARE, "--target-bytes", "1B"), "the target cannot be reached", 1),
    "share of parameters 2": ((*BARE, "--target-params", "2"), "expected a share", 2),
    "share of parameters NaN": ((*BARE, "--target-params", "nan"), "expected a share", 2),
    "sites unknown": ((*BARE, "--ratio", "0.3", "--sites", "evil"), "evil", 2),
    "no sites": ((*BARE, "--ratio", "0.3", "--sites", ""), "expected mlp, experts, expert-mlp, blocks, attention", 2),
    "samples 0": ((*BARE, "--ratio", "0.3", "--samples", "0"), "expected at least 1", 2),
    "window of 1": ((*BARE, "--ratio", "0.3", "--sequence-length", "1"), "expected at least 2", 2),
    "window of -5": ((*BARE, "--ratio", "0.3", "--sequence-length", "-5"), "expected at least 2", 2),
    "multiple of 0": ((*BARE, "--ratio", "0.3", "--multiple-of", "0"), "expected at least 1", 2),
    "multiple of 10^9": ((*BARE, "--ratio", "0.3", "--multiple-of", "1000000000"), "would keep none", 1),
    "seed 2^70": ((*BARE, "--ratio", "0.3", "--seed", str(2**70)), "is not in the range", 2),
    "unknown output class": ((*BARE, "--ratio", "0.3", "--output-class", "evil"), "evil", 2),
    "output class with escapes": ((*BARE, "--ratio", "0.3", "--output-class", ESCAPES), r"\x1b]0;owned", 2),
    "fill unknown": ((*BARE, "--ratio", "0.3", "--fill", "evil"), "'evil' is not one of", 2),
    "option unknown": ((*BARE, f"--{ESCAPES}"), r"\x1b]0;owned", 2),
    "command unknown": ((ESCAPES,), r"\x1b]0;owned", 2),
    "model without a name": (("inspect", ""), "contains no config.json", 1),
    "model with escapes": (("inspect", f"{{}}/{ESCAPES}"), r"\x1b]0;owned", 1),
    "model of a long name": (("inspect", "x" * 5000), "File name too long", 1),
    "model of two slashes": (("inspect", "a/b/c"), "neither a folder nor a Hub id", 1),
    "model a file": (("inspect", "{}/text.txt"), "is a file; expected", 1),
    "model a device": (("inspect", "/dev/zero"), "is a file; expected", 1),
    "text a device": (
        ("compress", "--model", "{}/model", "--ratio", "0.3", "--calibration", "/dev/zero", *SHORT),
        "not a file",
        1,
    ),
    "missing text": (
        ("compress", "--model", "{}/model", "--ratio", "0.3", "--calibration", "{}/n.txt", *SHORT),
        "n.txt does not exist",
        1,
    ),
    "text of a long name": (
        ("compress", "--model", "{}/model", "--ratio", "0.3", "--calibration", "x" * 5000, *SHORT),
        "does not exist, and is no id of a Hub data set",
        1,
    ),
    "images for a model of text": (
        ("compress", "--model", "{}/model", "--ratio", "0.3", "--calibration", "{}/images", *SHORT),
        "is a folder of images, and the model reads text",
        1,
    ),
    "text for a model of images": (
        ("compress", "--model", "{}/vit", "--ratio", "0.3", "--calibration", "{}/text.txt", *SHORT),
        "is a file, and the model takes images",
        1,
    ),
    "part of a text": ((*BARE, "--ratio", "0.3", "--dataset-split", "test"), "is for a Hub data set", 2),
    "column of a text": ((*BARE, "--ratio", "0.3", "--text-column", "body"), "is for data with columns", 2),
    "column with escapes": (
        ("evaluate", "--model", "{}/model", "--data", "{}/text.jsonl", "--text-column", ESCAPES, "-q"),
        r"\x1b]0;owned",
        1,
    ),
    "memory of 10 MB": ((*BARE, "--ratio", "0.3", "--max-memory", "10MB"), "Pass a --max-memory of 0.", 1),
    "output of a long name": ((*BARE, "--ratio", "0.3", "--output", "x" * 5000), "File name too long", 1),
    "output in the place of a file": ((*BARE, "--ratio", "0.3", "--output", "{}/text.txt"), "text.txt is a file", 1),
    "output below a file": ((*BARE, "--ratio", "0.3", "--output", "{}/text.txt/out"), "cannot be written", 1),
    "output in the place of the model": (
        (*BARE, "--ratio", "0.3", "--output", "{}/model"),
        "contains the model itself",
        2,
    ),
    "neuron string": (
        ("analyze", "--model", "{}/model", "--data", "{}/text.txt", "--neuron", "a:b:c", "--output", "{}/out", "-q"),
        "expected KIND:BLOCK:NEURON",
        2,
    ),
    "fraction 2": (("ablate", "--model", "{}/model", "--fraction", "2", "-q"), "expected at most 1", 2),
    "repository name with a space": (("push", "{}/model", "a b", "-q"), "not a valid name of a repository", 2),
    "folder without a recipe": (("verify", "{}/model", "-q"), "is not a folder that prune-peak wrote", 1),
    "GGUF of images": (("export", "{}/vit", "{}/out.gguf", "--format", "gguf", "-q"), "expected a causal LM", 1),
}
