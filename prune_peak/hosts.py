"""From a family's config to the stock class that can hold the smaller shapes and the folded constants.

Each host is a function from the source's config to a new config, or a refusal; the first of a family's hosts that does
not refuse is written.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import GraniteConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, SmolLM3Config

from .errors import PrunePeakError
from .sites import Site
from .source import Blueprint, find_class

# Keys that every config has and no computation reads
IDENTITY = {"architectures", "model_type", "transformers_version", "_name_or_path", "pretraining_tp"}

# Keys that say where attention is windowed; read by `_layer_types`
WINDOW_KEYS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}


@dataclass(frozen=True)
class Target:
    """The class and config that are written."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    why: str  # what the better hosts of the family lack; empty where this is the first


class HostError(Exception):
    """Why a host cannot hold this model."""


def own(config: PreTrainedConfig) -> PreTrainedConfig:
    """The source's own class."""
    try:
        type(config)(**config.to_dict())  # only a new config is checked
    except Exception as error:  # the strict config classes raise their own kinds
        reason = str(error).strip().splitlines()[-1].strip()
        raise HostError(f"{config.model_type} refuses the smaller shape: {reason}") from None
    return config


def llama(config: PreTrainedConfig) -> PreTrainedConfig:
    """Rotary GQA decoders with RMSNorm and a gated MLP, whose attention sees the whole past."""
    _refuse_windows(config, "Llama")
    if config.hidden_size % config.num_attention_heads:
        raise HostError(f"Llama wants heads that divide the hidden size, not {config.num_attention_heads}")
    return _transfer(config, LlamaConfig, WINDOW_KEYS)


def granite(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same with any number of heads; Granite's multipliers are set to do nothing."""
    _refuse_windows(config, "Granite")
    head_dim = _head_dim(config)
    return _transfer(
        config, GraniteConfig, WINDOW_KEYS | {"head_dim"}, attention_multiplier=head_dim**-0.5, head_dim=head_dim
    )


def smollm3(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same with a sliding window, at all blocks or at some."""
    return _transfer(
        config,
        SmolLM3Config,
        WINDOW_KEYS | {"head_dim"},
        use_sliding_window=True,
        sliding_window=config.sliding_window,
        layer_types=_layer_types(config),
        no_rope_layers=[1] * config.num_hidden_layers,
        head_dim=_head_dim(config),
    )


HOSTS: dict[str, Callable[[PreTrainedConfig], PreTrainedConfig]] = {
    "own": own,
    "llama": llama,
    "granite": granite,
    "smollm3": smollm3,
}

# Which serving engines read a written class, biases included: read in their sources, not run here
ENGINES: dict[str, tuple[str, ...]] = {
    "gpt2": ("vLLM",),
    "gpt_neox": ("vLLM",),
    "granite": ("vLLM", "llama.cpp"),
    "llama": ("vLLM", "llama.cpp"),
    "opt": ("vLLM",),
    "phi": (),
    "smollm3": ("vLLM, by its Transformers backend",),
    "starcoder2": ("vLLM",),
}


def choose_target(source: Blueprint, sites: Sequence[Site], kept: Mapping[str, int], dtype: torch.dtype) -> Target:
    """The best host of the source's family.

    Args:
        sites: those that are cut.
        kept: neurons left at every site, by the site's kind.
        dtype: of the weights.
    """
    family, reasons = source.family, []
    settings: dict[str, object] = {}
    for site in sites:
        settings |= site.settings_at(kept[site.kind])
    smaller = copy.deepcopy(source.config)
    smaller.update(settings)
    for name in family.hosts:
        try:
            config = HOSTS[name](smaller)
        except HostError as reason:
            reasons.append(str(reason))
            continue
        if name != "own":
            config.update({**family.host_settings, **settings})
        config.dtype = dtype
        model_class = source.model_class if name == "own" else _same_head(source, config)
        config.architectures = [model_class.__name__]
        return Target(model_class, config, "; ".join(reasons))
    raise PrunePeakError(f"no stock class can hold a cut {source.name}: {'; '.join(reasons)}.")


def _layer_types(config: PreTrainedConfig) -> list[str]:
    window = getattr(config, "sliding_window", None)
    kind = "full_attention" if window is None else "sliding_attention"
    return getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers


def _refuse_windows(config: PreTrainedConfig, host: str) -> None:
    if "sliding_attention" in _layer_types(config):
        raise HostError(f"{host} has no sliding window")


def _head_dim(config: PreTrainedConfig) -> int:
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim


def _transfer(
    config: PreTrainedConfig, host: type[PreTrainedConfig], handled: set[str], **settings: object
) -> PreTrainedConfig:
    """The host's config with everything both classes know; a key that only the source knows must be `handled`."""
    values = config.to_dict()
    known = set(host().to_dict())
    lost = set(type(config)().to_dict()) - known - handled - IDENTITY
    if lost:
        raise HostError(f"{host.model_type} has no place for {', '.join(sorted(lost))}")
    shared = {key: value for key, value in values.items() if key in known - IDENTITY}
    return host(**(shared | settings))


def _same_head(source: Blueprint, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """MistralForCausalLM -> LlamaForCausalLM."""
    ours = type(source.config).__name__.removesuffix("Config")
    theirs = type(config).__name__.removesuffix("Config")
    return find_class(config, [theirs + source.model_class.__name__.removeprefix(ours)])
