"""GGUF: the same logits and the same greedy text as stock transformers, by llama.cpp itself."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import EXAMPLES
from tiny import BY_NAME, Tiny
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import prune_peak
from prune_peak.cli.main import main
from prune_peak.export.formats import export_model

gguf = pytest.importorskip("gguf")

ROTARY = ["llama-untied", "llama-tied", "llama-biased", "llama3-rope", "llama-no-groups", "llama-one-group", "qwen2"]
TEXT = "The function is called with 12 arguments; it's \n\n  what `Ünïcode` (3.14) does."


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, words), "--format", "gguf", "-q"])


def with_tokenizer(tiny: Tiny, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A random model with the vocabulary of the trained examples, two rows more than it needs."""
    sizes = {"vocab_size": 1026, "hidden_size": 64, "head_dim": 16, "bos_token_id": 0, "eos_token_id": 0}
    Tiny(tiny.name, tiny.family, tiny.head, tiny.settings | sizes | settings).save(folder, dtype)
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(folder)
    return folder


class LlamaCpp:
    """A file as llama.cpp computes it, in float32 where it has a choice."""

    def __init__(self, file: Path) -> None:
        cython = pytest.importorskip("cyllama.llama.llama_cpp")
        cython.disable_logging()

        class Model(cython.LlamaModel):
            """Has what cyllama 0.2.18 asks for to know how many logits there are."""

            n_vocab = property(lambda self: self.get_vocab().n_vocab)

        model, parameters = Model(str(file)), cython.LlamaContextParams()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 128, 1, 1
        parameters.type_k = parameters.type_v = gguf.GGMLQuantizationType.F32  # float16 by default
        parameters.flash_attn_type = 0  # which computes in float16
        self.vocabulary = model.get_vocab()
        self._batch = cython.LlamaBatch(n_tokens=128, embd=0, n_seq_max=1)
        self._context = cython.LlamaContext(model, parameters)
        self._seen = 0

    def read(self, tokens: list[int]) -> torch.Tensor:
        """The logits at each of these tokens, which go on from those before."""
        self._batch.set_batch(tokens, self._seen, True)
        self._context.decode(self._batch)
        self._seen += len(tokens)
        return torch.tensor([self._context.get_logits_ith(place) for place in range(len(tokens))])


@torch.inference_mode()
def check_same(folder: Path, file: Path, bound: float) -> None:
    """Tokens and logits of a prompt, then 24 greedy tokens."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    model = LlamaCpp(file)
    assert model.vocabulary.tokenize(TEXT, True, True) == tokens
    assert model.vocabulary.detokenize(tokens) == TEXT
    seen = model.read(tokens)
    greedy = [int(seen[-1].argmax())]
    while len(greedy) < 24:
        greedy.append(int(model.read(greedy[-1:])[-1].argmax()))
    expected = stock(torch.tensor([tokens])).logits[0]
    written = stock.generate(torch.tensor([tokens]), max_new_tokens=24, do_sample=False, eos_token_id=None)[0]
    assert ((seen - expected).abs().max() / expected.abs().max()).item() < bound
    assert greedy == written[len(tokens) :].tolist()


@pytest.mark.parametrize("name", ROTARY)
def test_stock_models(name: str, tmp_path: Path) -> None:
    folder = with_tokenizer(BY_NAME[name], tmp_path / "model")
    result = run(folder, tmp_path / "model.gguf")
    assert result.exit_code == 0, result.output
    check_same(folder, tmp_path / "model.gguf", 2e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_narrow_types(dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    folder = with_tokenizer(BY_NAME["llama-biased"], tmp_path / "model", dtype)
    assert run(folder, tmp_path / "model.gguf").exit_code == 0
    check_same(folder, tmp_path / "model.gguf", bound)


@pytest.mark.parametrize(
    ("ratio", "output_class"), [({"mlp": 0.3, "attention": 0.5}, "Llama"), ({"attention": 0.25}, "Granite")]
)
def test_compressed_models(ratio: dict[str, float], output_class: str, tmp_path: Path, text: Path) -> None:
    """Hosts of both kinds, with constants in the biases: three heads of 16 do not divide a hidden size of 64."""
    source = with_tokenizer(BY_NAME["llama-no-groups"], tmp_path / "model")
    result = prune_peak.compress(
        str(source),
        ratio,
        tmp_path / "cut",
        samples=4,
        sequence_length=64,
        calibration=str(text),
    )
    assert result.model_class == f"{output_class}ForCausalLM"
    assert run(tmp_path / "cut", tmp_path / "cut.gguf").exit_code == 0
    check_same(tmp_path / "cut", tmp_path / "cut.gguf", 2e-5)


def test_a_window_becomes_the_context_length(tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mistral with a window is written as SmolLM3, which has windows; the file has none."""
    source = with_tokenizer(BY_NAME["mistral-window"], tmp_path / "source", sliding_window=100)
    folder = tmp_path / "model"
    prune_peak.compress(str(source), 0.3, folder, samples=4, sequence_length=64, calibration=str(text))
    export_model(folder, tmp_path / "model.gguf", format="gguf")
    assert "the context length of the file is 100, not 160." in caplog.text
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["llama.context_length"].contents() == 100
    check_same(folder, tmp_path / "model.gguf", 2e-5)


def test_bos_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    folder = with_tokenizer(BY_NAME["llama-untied"], tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    export_model(folder, tmp_path / "model.gguf", format="gguf")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == "smollm"
    check_same(folder, tmp_path / "model.gguf", 2e-5)


def test_the_file_holds_every_tensor(tmp_path: Path) -> None:
    """By the gguf package's own reader, so that it is seen where llama.cpp is not installed too."""
    folder = with_tokenizer(BY_NAME["qwen2"], tmp_path / "model")
    export_model(folder, tmp_path / "model.gguf", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: torch.tensor(numpy.array(tensor.data)) for tensor in reader.tensors}
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert len(tensors) == len(state)
    assert torch.equal(tensors["token_embd.weight"], state["model.embed_tokens.weight"])
    for block in range(3):
        prefix = f"model.layers.{block}"
        assert torch.equal(tensors[f"blk.{block}.ffn_down.weight"], state[f"{prefix}.mlp.down_proj.weight"])
        assert torch.equal(tensors[f"blk.{block}.attn_v.bias"], state[f"{prefix}.self_attn.v_proj.bias"])
        for part, heads in (("q", 4), ("k", 2)):
            for leaf in ("weight", "bias"):
                theirs = tensors[f"blk.{block}.attn_{part}.{leaf}"]
                ours = state[f"{prefix}.self_attn.{part}_proj.{leaf}"]
                for head in range(heads):
                    for pair in range(8):
                        for half in range(2):
                            assert torch.equal(theirs[16 * head + 2 * pair + half], ours[16 * head + 8 * half + pair])


def test_same_command_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_model(EXAMPLES / "llama-mini", tmp_path / name, format="gguf")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


MATHEMATICS = {
    "granite": ("granite", {}, "has embedding_multiplier = 3.0; the GGUF architecture llama supports only 1."),
    "yarn": ("qwen2-tied-yarn", {}, "has yarn positions"),
    "gelu": ("llama-untied", {"hidden_act": "gelu"}, "has the activation gelu"),
    "no positions": ("smollm3", {"no_rope_layers": [1, 0, 1]}, "has blocks without rotary positions"),
    "opt": ("opt", {}, "expected a causal LM of one of the model types"),
    "classifier": ("llama-classifier", {}, "is a LlamaForSequenceClassification"),
}


@pytest.mark.parametrize(("name", "settings", "words"), MATHEMATICS.values(), ids=MATHEMATICS)
def test_other_mathematics_is_refused(name: str, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    tiny = BY_NAME[name]
    Tiny(name, tiny.family, tiny.head, tiny.settings | settings).save(tmp_path / "model")
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(tmp_path / "model")
    result = run(tmp_path / "model", tmp_path / "model.gguf")
    assert result.exit_code == 1
    assert words in result.stderr
    assert not list(tmp_path.glob("*.gguf*"))


def unigram() -> Tokenizer:
    return Tokenizer(Unigram([("<s>", 0.0), ("a", -1.0)], unk_id=0))


def by_metaspace() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(EXAMPLES / "llama-mini" / "tokenizer.json"))
    tokenizer.pre_tokenizer = Metaspace()
    return tokenizer


def lowercased() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(EXAMPLES / "llama-mini" / "tokenizer.json"))
    tokenizer.normalizer = Lowercase()
    return tokenizer


TOKENIZERS = {
    "unigram": (unigram, "it is a Unigram, not a byte-level BPE"),
    "metaspace": (by_metaspace, "it splits text by Metaspace"),
    "lowercase": (lowercased, "it normalizes by Lowercase"),
}


@pytest.mark.parametrize(("make", "words"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_other_tokenizers_are_refused(make: Callable[[], Tokenizer], words: str, tmp_path: Path) -> None:
    folder = shutil.copytree(EXAMPLES / "llama-mini", tmp_path / "model")
    make().save(str(folder / "tokenizer.json"))
    result = run(folder, tmp_path / "model.gguf")
    assert result.exit_code == 1
    assert words in result.stderr


def test_more_tokens_than_the_model_knows(tmp_path: Path) -> None:
    folder = BY_NAME["llama-untied"].save(tmp_path / "model")
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(folder)
    result = run(folder, tmp_path / "model.gguf")
    assert result.exit_code == 1
    assert "has the token 1023, but the vocabulary has 97" in result.stderr


def test_files_that_are_there_and_a_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    there = run(EXAMPLES / "llama-mini", tmp_path / "model.gguf")
    assert there.exit_code == 1
    assert "exists; pass --force" in there.stderr
    assert (tmp_path / "model.gguf").read_text() == "mine"
    assert run(EXAMPLES / "llama-mini", tmp_path / "model.gguf", "--force").exit_code == 0
    assert "is a folder; expected a file" in run(EXAMPLES / "llama-mini", ".", "--force").stderr
    monkeypatch.setitem(sys.modules, "gguf", None)
    missing = run(EXAMPLES / "llama-mini", tmp_path / "other.gguf")
    assert missing.exit_code == 1
    assert "pip install 'prune-peak[gguf]'" in missing.stderr
