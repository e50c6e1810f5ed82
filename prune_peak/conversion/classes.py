"""Stock classes that other families can be written as, and the serving engines that have run them.

An output class is one function under `@register("model_type")`: the config values that it needs besides the converted
ones. Families name their output classes in models/families.py.
"""

from collections.abc import Callable

from .mappings import ConfigDict, UnsupportedClass

Settings = Callable[[ConfigDict], ConfigDict]

OUTPUT_CLASSES: dict[str, Settings] = {}


def register(model_type: str) -> Callable[[Settings], Settings]:
    """Make a class available as an output class."""

    def decorate(settings: Settings) -> Settings:
        OUTPUT_CLASSES[model_type] = settings
        return settings

    return decorate


@register("granite")
def granite(config: ConfigDict) -> ConfigDict:
    """Like Llama, with any number of heads; Granite's multipliers are set to have no effect."""
    return {"attention_multiplier": config["head_dim"] ** -0.5}


@register("hy_v3")
def hy_v3(config: ConfigDict) -> ConfigDict:
    """Like Llama, with norms of queries and keys; a class for mixtures of experts, used without experts."""
    return {
        "mlp_layer_types": ["dense"] * config["num_hidden_layers"],
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 1,
    }


@register("llama")
def llama(config: ConfigDict) -> ConfigDict:
    """Rotary GQA decoders with RMSNorm, a gated MLP and full attention."""
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UnsupportedClass(
            f"llama requires a number of heads that divides the hidden size, not {config['num_attention_heads']}"
        )
    return {}


@register("phi")
def phi(config: ConfigDict) -> ConfigDict:
    """Rotary GQA decoders with attention and a plain MLP in parallel, after one LayerNorm."""
    return {}


@register("smollm3")
def smollm3(config: ConfigDict) -> ConfigDict:
    """Like Llama, with a sliding window in all blocks or in some."""
    blocks = config["num_hidden_layers"]
    return {
        "use_sliding_window": "layer_types" in config,
        "layer_types": config.get("layer_types", ["full_attention"] * blocks),
        "no_rope_layers": [1] * blocks,
    }


# Serving engines that have run a written class, biases included: docs/engines.md has the runs
ENGINES: dict[str, tuple[str, ...]] = {
    "granite": ("vLLM 0.32.0", "OpenVINO GenAI 2026.4.1.0", "ONNX Runtime GenAI 0.18.0", "llama.cpp (cyllama 0.2.18)"),
    "llama": (
        "vLLM 0.32.0",
        "OpenVINO GenAI 2026.4.1.0",
        "CTranslate2 4.8.5",
        "ONNX Runtime GenAI 0.18.0",
        "MLX-LM 0.32.2",
        "llama.cpp (cyllama 0.2.18)",
    ),
}
