"""From a family's config to the stock class that can hold the smaller shapes and the folded constants.

Each host is a function from the source's config to a new config, or a refusal; the first of a family's hosts that does
not refuse is written.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, SmolLM3Config

from .errors import PrunePeakError
from .source import Source, find_class

# Keys that every config has and no computation reads
IDENTITY = {"architectures", "model_type", "transformers_version", "_name_or_path"}


@dataclass(frozen=True)
class Target:
    """The class and config that are written."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig


class HostError(Exception):
    """Why a host cannot hold this model."""


def own(config: PreTrainedConfig) -> PreTrainedConfig:
    """The source's own class."""
    return copy.deepcopy(config)


def llama(config: PreTrainedConfig) -> PreTrainedConfig:
    """Rotary GQA decoders with RMSNorm and a gated MLP, whose attention sees the whole past."""
    if getattr(config, "sliding_window", None) is not None:
        raise HostError("Llama has no sliding window")
    return _transfer(config, LlamaConfig, handled={"sliding_window"})


def smollm3(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same with a sliding window."""
    blocks = config.num_hidden_layers
    target = _transfer(
        config,
        SmolLM3Config,
        handled={"sliding_window", "head_dim"},
        sliding_window=config.sliding_window,
        use_sliding_window=True,
        layer_types=["sliding_attention"] * blocks,
        no_rope_layers=[1] * blocks,
        head_dim=config.head_dim,
    )
    return target


HOSTS: dict[str, Callable[[PreTrainedConfig], PreTrainedConfig]] = {"own": own, "llama": llama, "smollm3": smollm3}


def choose_target(source: Source, kept: int) -> Target:
    """The best host of the source's family for an MLP of `kept` neurons, with its bias opened."""
    reasons = []
    for name in source.family.hosts:
        try:
            config = HOSTS[name](source.config)
        except HostError as reason:
            reasons.append(str(reason))
            continue
        setattr(config, source.family.mlp.width_key, kept)
        if source.family.mlp.bias_key is not None:
            setattr(config, source.family.mlp.bias_key, True)
        config.dtype = source.dtype
        model_class = source.model_class if name == "own" else _same_head(source, config)
        config.architectures = [model_class.__name__]
        return Target(model_class, config)
    raise PrunePeakError(f"no stock class can hold a cut {source.name}: {'; '.join(reasons)}.")


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


def _same_head(source: Source, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """MistralForCausalLM -> LlamaForCausalLM."""
    ours = type(source.config).__name__.removesuffix("Config")
    theirs = type(config).__name__.removesuffix("Config")
    return find_class(config, [theirs + source.model_class.__name__.removeprefix(ours)])
