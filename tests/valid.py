"""One small valid thing of every kind that the commands read: what the hostile inputs are damaged from."""

import json
from pathlib import Path

import torch
from PIL import Image
from tiny import Tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

import prune_peak
from prune_peak.export.resume import ResumableRun
from prune_peak.stats.calibration import calibrate

LLAMA = Tiny("valid", "Llama", settings={"vocab_size": 300, "num_hidden_layers": 2})
VIT = Tiny("valid-vit", "ViT", "ForImageClassification", {"num_hidden_layers": 2})
BERT = Tiny("valid-bert", "Bert", "Model", {"vocab_size": 300, "num_hidden_layers": 2})
HEADS = Tiny("valid-heads", "Bert", "ForQuestionAnswering", {"vocab_size": 300, "num_hidden_layers": 2})
SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog does not care. "
BUDGET = {"ratio": 0.3, "samples": 2, "sequence_length": 32, "refit": False}


def make_tokenizer(folder: Path) -> None:
    """Byte-level BPE with BOS and EOS, of fewer tokens than the model knows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SENTENCE * 20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def make_all(folder: Path) -> Path:
    """Models, texts, images, and what our own commands write of them; the same bytes every time."""
    model = LLAMA.save(folder / "model")
    make_tokenizer(model)
    make_tokenizer(LLAMA.save(folder / "sharded", max_shard_size="50KB"))
    legacy = LLAMA.build()
    legacy.config.architectures = [type(legacy).__name__]
    legacy.config.save_pretrained(folder / "legacy")
    torch.save(legacy.state_dict(), folder / "legacy" / "pytorch_model.bin")
    make_tokenizer(folder / "legacy")
    vit = VIT.save(folder / "vit")
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(vit)
    make_tokenizer(HEADS.save(folder / "heads"))
    sentences = BERT.save(folder / "sentences")
    make_tokenizer(sentences)
    (sentences / "1_Pooling").mkdir()
    (sentences / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (sentences / "modules.json").write_text(json.dumps(modules))
    (folder / "images").mkdir()
    for number, name in enumerate(("a.png", "b.jpg", "c.webp", "d.bmp", "e.gif", "f.tiff")):
        pixels = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / "images" / name)
    text = folder / "text.txt"
    text.write_text(SENTENCE * 60)
    rows = [json.dumps({"text": SENTENCE * 6, "number": number}) for number in range(10)]
    (folder / "text.jsonl").write_text("\n".join(rows) + "\n")
    prune_peak.compress(str(model), output=folder / "cut", calibration=str(text), **BUDGET)
    calibrate(str(model), folder / "model.stats", calibration=str(text), samples=2, sequence_length=32)
    words = {"calibration": str(text), "samples": 8, "sequence_length": 32}
    calibrate(str(model), folder / "gram.stats", covariances=True, **words)
    calibrate(str(model), folder / "tape.stats", covariances=True, **words | {"samples": 1})
    leave_partial(model, text, folder / "stopped")
    return folder


def leave_partial(model: Path, text: Path, output: Path) -> None:
    """What a run leaves that is interrupted after its first block: `<output>.partial`."""
    save_block = ResumableRun.save_block

    def note_and_stop(self: ResumableRun, *args: object) -> None:
        save_block(self, *args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    ResumableRun.save_block = note_and_stop  # type: ignore[method-assign, assignment]
    try:
        prune_peak.compress(str(model), output=output, calibration=str(text), **BUDGET)
    except KeyboardInterrupt:
        pass
    finally:
        ResumableRun.save_block = save_block  # type: ignore[method-assign]
