"""A config without `architectures`: the class is read from the weights, or the model is refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny import TINY, Tiny

from prune_peak.errors import PrunePeakError
from prune_peak.inspection import inspect
from prune_peak.models.loading import open_model

FIRST = {tiny.family: tiny for tiny in reversed(TINY)}
MAPPINGS = [
    getattr(transformers, f"MODEL_{task}MAPPING")
    for task in (
        "",
        "FOR_CAUSAL_LM_",
        "FOR_MASKED_LM_",
        "FOR_SEQUENCE_CLASSIFICATION_",
        "FOR_TOKEN_CLASSIFICATION_",
        "FOR_QUESTION_ANSWERING_",
        "FOR_MULTIPLE_CHOICE_",
        "FOR_IMAGE_CLASSIFICATION_",
    )
]
# Classes with the same tensors as another, for two labels
AMBIGUOUS = {f"ModernBertFor{task}" for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")}


def save_unnamed(tiny: Tiny, model_class: type, folder: Path) -> Path:
    """A tiny model of a class, whose config does not name it."""
    config = tiny.configure()
    if model_class in transformers.MODEL_FOR_CAUSAL_LM_MAPPING.values():
        config.is_decoder = True
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["architectures"]
    path.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("tiny", FIRST.values(), ids=FIRST)
def test_class_from_the_weights(tiny: Tiny, tmp_path: Path) -> None:
    kind = type(tiny.configure())
    for number, mapping in enumerate(MAPPINGS):
        if kind not in mapping:
            continue
        found = mapping[kind]
        for model_class in found if isinstance(found, tuple) else (found,):
            folder = save_unnamed(tiny, model_class, tmp_path / f"{number}-{model_class.__name__}")
            if model_class.__name__ in AMBIGUOUS:
                with pytest.raises(PrunePeakError, match='Add the right one: "architectures"'):
                    open_model(str(folder))
                continue
            opened = open_model(str(folder))
            if mapping is transformers.MODEL_MAPPING and "lm_head.weight" in opened.tied:  # such a head has no tensors
                assert opened.model_class is transformers.MODEL_FOR_CAUSAL_LM_MAPPING[kind]
            else:
                assert opened.model_class is model_class
            assert inspect(str(folder)).model_class == opened.model_class.__name__


def test_class_without_weights(tmp_path: Path) -> None:
    for family, name in (("Llama", "LlamaForCausalLM"), ("Roberta", "RobertaModel"), ("ViT", "ViTModel")):
        folder = save_unnamed(FIRST[family], getattr(transformers, name), tmp_path / family)
        (folder / "model.safetensors").unlink()
        assert inspect(str(folder)).model_class == name
