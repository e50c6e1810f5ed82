"""Every head of some types is compressed and verified in the form that it takes, or refused before work starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import EXAMPLES
from tiny import BERT, BY_NAME, COMMON
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

import prune_peak
from prune_peak.errors import PrunePeakError
from prune_peak.models.discovery import discover_family
from prune_peak.models.families import FAMILIES
from prune_peak.models.forward import check_forward
from prune_peak.models.loading import ModelSpec, open_model
from prune_peak.models.miniature import build_miniature
from prune_peak.probes import Whole, probe_batches
from prune_peak.stats.calibration import calibrate

CONFIGS = {
    "Bert": BY_NAME["bert"].configure,
    "DebertaV2": BY_NAME["deberta-v2"].configure,
    "DistilBert": BY_NAME["distilbert"].configure,
    "Electra": BY_NAME["electra"].configure,
    "GPT2": BY_NAME["gpt2"].configure,
    "Llama": BY_NAME["llama-tied"].configure,
    "MPNet": lambda: transformers.MPNetConfig(**BERT, **COMMON),
}
# What a head gives besides its first output; these run by default, the others by `make real`
QUICK = {
    ("BertForPreTraining", None): "seq relationship logits",
    ("GPT2DoubleHeadsModel", None): "mc logits",
    ("GPT2ForSequenceClassification", None): None,
    ("LlamaForQuestionAnswering", 2): "end logits",
    ("LlamaForTokenClassification", 2): None,
    ("MPNetForMultipleChoice", 2): None,  # runs whole
}


def heads(prefix: str) -> list[str]:
    """The names of all classes of a type."""
    found = []
    for name in dir(transformers):
        model_class = getattr(transformers, name) if name.startswith(prefix) else None
        if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
            own = model_class.config_class is type(CONFIGS[prefix]())
            found += [name] if own and not name.endswith("PreTrainedModel") else []
    return found


ALL = [(name, pad) for prefix in CONFIGS for name in heads(prefix) for pad in (2, None)]


def save(name: str, folder: Path, **settings: Any) -> str:
    """A model of random weights, with the tokenizer of llama-mini."""
    config: PreTrainedConfig = CONFIGS[next(prefix for prefix in CONFIGS if name.startswith(prefix))]()
    for key, value in ({"vocab_size": 1024} | settings).items():
        setattr(config, key, value)
    model = getattr(transformers, name)(config)
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in key.lower() or "ln_" in key), std=0.15)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(folder)
    return str(folder)


def compress(model: str, text: Path, length: int = 16) -> set[str]:
    """The stages that were compared."""
    words = {"samples": 4, "sequence_length": length, "refit": False, "calibration": str(text)}
    result = prune_peak.compress(model, 0.3, text.parent / "cut", **words)  # type: ignore[arg-type]
    return {check["check"].rpartition(", ")[2] for check in result.verification.checks}


@pytest.mark.parametrize(
    ("name", "pad"), [pytest.param(*each, marks=() if each in QUICK else pytest.mark.real) for each in ALL]
)
def test_every_head(name: str, pad: int | None, tmp_path: Path, text: Path) -> None:
    model = save(name, tmp_path / "model", pad_token_id=pad)
    stages = compress(model, text)
    another = QUICK.get((name, pad))
    assert {"prefill 0", "prefill 1", *([f"{another} 0"] if another else [])} <= stages
    assert ("cached decoding" in stages) == getattr(transformers, name).can_generate()
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("model", "cut")]
    assert configs[0].get("pad_token_id") == configs[1].get("pad_token_id")


def test_all_quick_ones_are_there() -> None:
    assert QUICK.keys() <= set(ALL)
    assert len(ALL) > 80


@pytest.mark.parametrize("positions", [4, 16])
def test_short_windows(positions: int, tmp_path: Path, text: Path) -> None:
    """Decoding ends with the positions."""
    assert "cached decoding" in compress(save("GPT2LMHeadModel", tmp_path / "model", n_positions=positions), text, 4)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("BertForQuestionAnswering", {"num_labels": 3}, "stops with ValueError .too many values to unpack"),
        ("LlamaForSequenceClassification", {"return_dict": False}, "stops with AttributeError"),
        ("GPT2LMHeadModel", {"n_positions": 3}, "windows of 3 tokens; expected at least 4"),
    ],
)
def test_a_class_that_does_not_run_is_refused_early(
    name: str, settings: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_peak.job.plan_widths", lambda *_: pytest.fail("work has started"))
    with pytest.raises(PrunePeakError, match=reason):
        prune_peak.compress(save(name, tmp_path / "model", **settings), 0.3, tmp_path / "cut")


@pytest.mark.parametrize("kind", ["Afmoe", "Funnel"])
def test_a_kernel_that_does_not_run_without_weights_is_no_reason(kind: str, tmp_path: Path) -> None:
    """Those of experts want other types on meta."""
    model_class = getattr(transformers, f"{kind}For{'MaskedLM' if kind == 'Funnel' else 'CausalLM'}")
    model, _ = build_miniature(model_class, getattr(transformers, f"{kind}Config")())
    check_forward(ModelSpec("x", None, tmp_path, FAMILIES["bert"], model.config, model_class))


def test_an_error_of_a_class_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a class raises later."""
    model = open_model(save("BertForQuestionAnswering", tmp_path / "model"))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(transformers.BertForQuestionAnswering, "forward", stop)
    with pytest.raises(PrunePeakError, match="does not run: BertForQuestionAnswering of transformers"):
        Whole(model, torch.float32).run(probe_batches(model, 2))


def test_a_class_that_decodes_otherwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """xLSTM keeps a state of its own: windows are compared, and it is said that decoding is not."""
    model, _ = build_miniature(transformers.xLSTMForCausalLM, transformers.xLSTMConfig())
    model.save_pretrained(tmp_path)
    source = open_model(str(tmp_path))
    outputs = Whole(source, torch.float32).run(probe_batches(source, 2))
    assert set(outputs.logits) == {"prefill 0", "prefill 1"}
    assert "Cached decoding is not compared, because the original does not decode" in caplog.text


def test_a_head_that_changes_the_attention_runs_whole() -> None:
    """The classifier of Longformer adds global attention, which its body does not have."""
    for head, streamable in (("SequenceClassification", False), ("TokenClassification", True)):
        model_class = getattr(transformers, f"LongformerFor{head}")
        config = transformers.LongformerConfig(attention_window=8, hidden_size=48, intermediate_size=64)
        assert discover_family(model_class, config).streamable is streamable


def test_the_text_tower_of_a_retriever_is_found(tmp_path: Path) -> None:
    config = transformers.ColModernVBertConfig()
    config.architectures = ["ColModernVBertForRetrieval"]
    config.save_pretrained(tmp_path)
    inspection = prune_peak.inspect(str(tmp_path))
    assert "mlp" in [site.kind for site in inspection.sites if not site.in_place]
    assert any("vision" in part for part in inspection.unprunable)


def test_statistics_of_a_model_that_runs_whole(tmp_path: Path, text: Path) -> None:
    model = save("MPNetForMultipleChoice", tmp_path / "model")
    words = {"calibration": str(text), "samples": 4, "sequence_length": 16, "covariances": True}
    calibrate(model, tmp_path / "model.stats", **words)  # type: ignore[arg-type]
    result = prune_peak.compress(model, 0.3, tmp_path / "cut", stats=str(tmp_path / "model.stats"))
    assert result.refits
