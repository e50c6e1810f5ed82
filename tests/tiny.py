"""Tiny random models of stock classes, one or more for every family: what the law is tested on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

HIDDEN, WIDTH, BLOCKS, VOCABULARY, POSITIONS = 32, 64, 3, 97, 160


@dataclass(frozen=True)
class Tiny:
    """A config in a few words; every weight, biases and norms included, is random."""

    name: str
    family: str  # prefix of the transformers classes
    head: str = "ForCausalLM"
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, f"{self.family}Config")(
            **(FAMILY_SETTINGS[self.family] | COMMON | self.settings)
        )
        model = getattr(transformers, f"{self.family}{self.head}")(config).eval()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln_" in name else 0.0, std=0.15)
        return model

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Path:
        self.build(seed).to(dtype).save_pretrained(folder, **options)
        return folder


COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ROTARY = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": HIDDEN, "n_inner": WIDTH, "n_layer": BLOCKS, "n_head": 4, "n_positions": POSITIONS},
    "Llama": ROTARY,
    "Mistral": ROTARY | {"sliding_window": None},
    "SmolLM3": ROTARY,
    "OPT": {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
    },
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

TINY = [
    Tiny("gpt2", "GPT2", "LMHeadModel"),
    Tiny("gpt2-default-width", "GPT2", "LMHeadModel", {"n_inner": None}),
    Tiny("gpt2-untied", "GPT2", "LMHeadModel", {"tie_word_embeddings": False}),
    Tiny("llama-untied", "Llama"),
    Tiny("llama-tied", "Llama", settings={"tie_word_embeddings": True}),
    Tiny("llama-biased", "Llama", settings={"mlp_bias": True, "attention_bias": True}),
    Tiny("llama3-rope", "Llama", settings={"rope_parameters": LLAMA3_ROPE}),
    Tiny("llama-classifier", "Llama", "ForSequenceClassification"),
    Tiny("mistral", "Mistral"),
    Tiny("mistral-tied", "Mistral", settings={"tie_word_embeddings": True, "head_dim": 16}),
    Tiny("mistral-window", "Mistral", settings={"sliding_window": 8}),
    Tiny("smollm3", "SmolLM3"),
    Tiny("opt", "OPT"),
    Tiny("opt-gelu-untied", "OPT", settings={"activation_function": "gelu", "tie_word_embeddings": False}),
    Tiny("opt-350m", "OPT", settings={"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
]
BY_NAME = {tiny.name: tiny for tiny in TINY}
