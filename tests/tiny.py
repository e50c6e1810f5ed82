"""Tiny random models of stock classes, one or more for every family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel

from prune_peak.sites.in_place import InPlace
from prune_peak.sites.site import Site

HIDDEN, WIDTH, BLOCKS, VOCABULARY, POSITIONS = 32, 64, 3, 97, 160
IMAGE, PATCH = 24, 4
# Older releases nest the tower with projection one level deeper, which is refused
TOWER = "ModelWithProjection" if Version(transformers.__version__) >= Version("5.23") else "Model"


@dataclass(frozen=True)
class Tiny:
    """A tiny config; all weights, including biases and norms, are random."""

    name: str
    family: str  # prefix of the transformers classes
    head: str = "ForCausalLM"
    settings: dict[str, Any] = field(default_factory=dict)
    stiff: bool = False  # no stock class supports fewer heads for it, unlike for its family

    def configure(self) -> PreTrainedConfig:
        common = {} if self.family in VISION else COMMON
        kind = getattr(transformers, CONFIGS.get(self.family, f"{self.family}Config"))
        return kind(**(FAMILY_SETTINGS[self.family] | common | self.settings))

    def build(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = getattr(transformers, f"{self.family}{self.head}")(self.configure()).eval()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln_" in name else 0.0, std=0.15)
        return model

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Path:
        self.build(seed).to(dtype).save_pretrained(folder, **options)
        return folder


def random_inputs(model: PreTrainedModel, count: int, length: int = 64) -> dict[str, torch.Tensor]:
    """Noise as images, or random tokens."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(count, 3, IMAGE, IMAGE)}
    return {"input_ids": torch.randint(3, VOCABULARY, (count, length))}


def widths_of(sites: Sequence[Site], kept: Mapping[str, int]) -> dict[str, int]:
    """Widths by the names of the sites, from widths by their labels."""
    return {site.name: kept[site.label] for site in sites if site.label in kept}


def unused_rows(site: Site, name: str, keep: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor that a site folded in place does not need."""
    used = torch.zeros(site.neurons, dtype=torch.bool)
    used[keep] = True
    assert isinstance(site.kind, InPlace)
    return (~site.kind.used_rows(site, name, used)).nonzero()[:, 0]


COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ROTARY = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
FALCON = {
    "hidden_size": HIDDEN,
    "ffn_hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
BERT = {key: value for key, value in ROTARY.items() if key != "num_key_value_heads"}
VIT = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_labels": 5,
}
VISION: dict[str, dict[str, Any]] = {
    "Beit": VIT | {"use_mask_token": False},
    "CLIPVision": VIT | {"projection_dim": 16},
    "DeiT": VIT,
    "Dinov2": {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2},
    "IJepa": VIT,
    "SiglipVision": VIT,
    "ViT": VIT,
    "ViTMSN": VIT,
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}  # if not named after the classes
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": HIDDEN, "n_inner": WIDTH, "n_layer": BLOCKS, "n_head": 4, "n_positions": POSITIONS},
    "Cohere": ROTARY,
    "Falcon": FALCON,
    "Gemma": ROTARY | {"head_dim": 8},
    "Gemma2": ROTARY | {"head_dim": 8, "sliding_window": 8},
    "Gemma3": ROTARY | {"head_dim": 8, "sliding_window": 8},
    "GPTJ": {
        "n_embd": HIDDEN,
        "n_inner": WIDTH,
        "n_layer": BLOCKS,
        "n_head": 4,
        "n_positions": POSITIONS,
        "rotary_dim": 4,
    },
    "HYV3": ROTARY | {"head_dim": 8, "mlp_layer_types": ["dense"] * BLOCKS},
    "Llama": ROTARY,
    "Mistral": ROTARY | {"sliding_window": None},
    "SmolLM3": ROTARY,
    "Granite": ROTARY,
    "Qwen2": ROTARY,
    "Olmo": ROTARY,
    "Olmo2": ROTARY,
    "Olmo3": ROTARY | {"sliding_window": 8},
    "Phi": ROTARY,
    "Phi3": ROTARY | {"original_max_position_embeddings": 40},
    "Qwen3": ROTARY | {"head_dim": 8},
    "StableLm": ROTARY,
    "Starcoder2": ROTARY,
    "GPTNeoX": {key: value for key, value in ROTARY.items() if key != "num_key_value_heads"},
    "Bert": BERT,
    "Camembert": BERT,
    "Roberta": BERT,
    "XLMRoberta": BERT,
    "DebertaV2": BERT | {"type_vocab_size": 0},
    "ModernBert": BERT | {"local_attention": 16, "cls_token_id": 0, "sep_token_id": 1},
    "Electra": BERT | {"embedding_size": 16},
    "DistilBert": {"dim": HIDDEN, "hidden_dim": WIDTH, "n_layers": BLOCKS, "n_heads": 4},
    "OPT": {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
    },
} | VISION
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
# As in DeBERTa-v3
RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}

TINY = [
    Tiny("cohere", "Cohere"),
    Tiny("cohere-biased-untied", "Cohere", settings={"attention_bias": True, "tie_word_embeddings": False}),
    Tiny("cohere-qk-norm", "Cohere", settings={"use_qk_norm": True}, stiff=True),
    Tiny("falcon-7b", "Falcon"),
    Tiny("falcon-7b-biased-untied", "Falcon", settings={"bias": True, "tie_word_embeddings": False}),
    Tiny("falcon-40b", "Falcon", settings={"new_decoder_architecture": True, "num_kv_heads": 2}),
    Tiny(
        "falcon-11b",
        "Falcon",
        settings={"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    Tiny("falcon-no-groups", "Falcon", settings={"multi_query": False}),
    Tiny(
        "falcon-alibi",
        "Falcon",
        settings={"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
        stiff=True,
    ),
    Tiny("gemma", "Gemma"),
    Tiny("gemma-wide-heads", "Gemma", settings={"head_dim": 16, "num_key_value_heads": 1}),
    Tiny("gemma2", "Gemma2"),
    Tiny("gemma3", "Gemma3", settings={"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    Tiny("gptj", "GPTJ"),
    Tiny("hy-v3", "HYV3"),
    Tiny("olmo", "Olmo"),
    Tiny("olmo2", "Olmo2"),
    Tiny("olmo3", "Olmo3"),
    Tiny("phi3", "Phi3"),
    Tiny("phi3-window", "Phi3", settings={"sliding_window": 8}),
    Tiny("phi3-long-rope", "Phi3", settings={"rope_parameters": LONG_ROPE}),
    Tiny("phi3-part-of-each-head", "Phi3", settings={"rope_parameters": {"partial_rotary_factor": 0.5}}),
    Tiny("qwen3", "Qwen3"),
    Tiny("qwen3-biased-tied", "Qwen3", settings={"attention_bias": True, "tie_word_embeddings": True}),
    Tiny("stablelm", "StableLm", settings={"use_qkv_bias": True}),
    Tiny("gpt2", "GPT2", "LMHeadModel"),
    Tiny("gpt2-default-width", "GPT2", "LMHeadModel", {"n_inner": None}),
    Tiny("gpt2-untied", "GPT2", "LMHeadModel", {"tie_word_embeddings": False}),
    Tiny("llama-untied", "Llama"),
    Tiny("llama-tied", "Llama", settings={"tie_word_embeddings": True}),
    Tiny("llama-biased", "Llama", settings={"mlp_bias": True, "attention_bias": True}),
    Tiny("llama3-rope", "Llama", settings={"rope_parameters": LLAMA3_ROPE}),
    Tiny("llama-eight-heads", "Llama", settings={"num_attention_heads": 8}),
    Tiny("llama-no-groups", "Llama", settings={"num_key_value_heads": 4}),
    Tiny("llama-one-group", "Llama", settings={"num_key_value_heads": 1}),
    Tiny("llama-classifier", "Llama", "ForSequenceClassification"),
    Tiny("mistral", "Mistral"),
    Tiny("mistral-tied", "Mistral", settings={"tie_word_embeddings": True, "head_dim": 16}),
    Tiny("mistral-window", "Mistral", settings={"sliding_window": 8}),
    Tiny("mistral-odd-heads", "Mistral", settings={"num_attention_heads": 6, "head_dim": 8}),
    Tiny("smollm3", "SmolLM3"),
    Tiny("smollm3-window", "SmolLM3", settings={"use_sliding_window": True, "sliding_window": 8}),
    Tiny(
        "granite", "Granite", settings={"residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 3.0}
    ),
    Tiny("qwen2", "Qwen2"),
    Tiny("qwen2-tied-yarn", "Qwen2", settings={"tie_word_embeddings": True, "rope_parameters": YARN_ROPE}),
    Tiny("qwen2-window", "Qwen2", settings=WINDOW | {"max_window_layers": 0}),
    Tiny("qwen2-mixed-window", "Qwen2", settings=WINDOW | {"max_window_layers": 1}),
    Tiny("phi", "Phi"),
    Tiny("phi-tied-qk-norm", "Phi", settings={"tie_word_embeddings": True, "qk_layernorm": True}, stiff=True),
    Tiny("starcoder2", "Starcoder2"),
    Tiny("starcoder2-window-no-bias", "Starcoder2", settings={"use_bias": False, "sliding_window": 8}),
    Tiny("gpt-neox-parallel", "GPTNeoX"),
    Tiny("gpt-neox-tied", "GPTNeoX", settings={"tie_word_embeddings": True, "attention_bias": False}),
    Tiny("gpt-neox-sequential", "GPTNeoX", settings={"use_parallel_residual": False}, stiff=True),
    Tiny("bert", "Bert", "ForMaskedLM"),
    Tiny("bert-classifier", "Bert", "ForSequenceClassification"),
    Tiny("camembert", "Camembert", "ForMaskedLM"),
    Tiny("roberta", "Roberta", "ForMaskedLM"),
    Tiny("roberta-untied", "Roberta", "ForMaskedLM", {"tie_word_embeddings": False}),
    Tiny("xlm-roberta", "XLMRoberta", "ForMaskedLM"),
    Tiny("deberta-v2", "DebertaV2", "ForMaskedLM"),
    Tiny("deberta-v3", "DebertaV2", "ForMaskedLM", RELATIVE),
    Tiny("modernbert", "ModernBert", "ForMaskedLM"),
    Tiny("modernbert-biased", "ModernBert", "ForMaskedLM", {"attention_bias": True, "mlp_bias": True}),
    Tiny("electra", "Electra", "ForMaskedLM"),
    Tiny("distilbert", "DistilBert", "ForMaskedLM"),
    Tiny("opt-no-bias", "OPT", settings={"enable_bias": False}),
    Tiny("opt", "OPT"),
    Tiny("opt-gelu-untied", "OPT", settings={"activation_function": "gelu", "tie_word_embeddings": False}),
    Tiny("opt-350m", "OPT", settings={"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    Tiny("beit", "Beit", "ForImageClassification"),
    Tiny("beit-relative", "Beit", "Model", {"use_relative_position_bias": True, "layer_scale_init_value": 0.0}),
    Tiny("clip-tower", "CLIPVision", TOWER),
    Tiny("deit", "DeiT", "ForImageClassification"),
    Tiny("dinov2", "Dinov2", "ForImageClassification"),
    Tiny("ijepa", "IJepa", "ForImageClassification"),
    Tiny("siglip-tower", "SiglipVision", "Model"),
    Tiny("vit", "ViT", "ForImageClassification"),
    Tiny("vit-msn", "ViTMSN", "ForImageClassification"),
    Tiny("vit-no-qkv-bias", "ViT", "ForImageClassification", {"qkv_bias": False}),
]
# Other classes with the same blocks, for test_site_kinds only
MORE_HEADS = [
    Tiny("beit-body", "Beit", "Model"),
    Tiny("clip-tower-body", "CLIPVision", "Model"),
    Tiny("deit-body", "DeiT", "Model"),
    Tiny("deit-distilled", "DeiT", "ForImageClassificationWithTeacher"),
    Tiny("dinov2-body", "Dinov2", "Model"),
    Tiny("ijepa-body", "IJepa", "Model"),
    Tiny("siglip-tower-no-head", "SiglipVision", "Model", {"vision_use_head": False}),
    Tiny("vit-body", "ViT", "Model"),
    Tiny("vit-msn-body", "ViTMSN", "Model"),
]
# MLPs of an unsupported variant, for test_site_kinds only
ATTENTION_ONLY = [Tiny("dinov2-swiglu", "Dinov2", "ForImageClassification", {"use_swiglu_ffn": True})]
BY_NAME = {tiny.name: tiny for tiny in TINY + ATTENTION_ONLY}
