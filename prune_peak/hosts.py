"""From a family's config to the stock class that can hold the smaller shapes and the folded constants.

The family's own class comes first. Where it has no bias for the constants, or refuses the shapes, one of `HOSTS` does
the same mathematics with both; where none does, the family's own class is written and the constants are zero. What a
class can hold is asked of the class: it is built on `meta`, and every shape compared.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GraniteConfig,
    HYV3Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SmolLM3Config,
)

from .dialects import DIALECTS, Dialect, HostError, Words
from .errors import PrunePeakError, UsageError, brief
from .families import FAMILIES
from .sites import Site, blocks_path, find_sites, tensors_by_block
from .source import Blueprint, build_blank, find_class

AUTO, OWN = "auto", "own"

# Keys that every config has and no computation reads
IDENTITY = {"architectures", "model_type", "transformers_version", "_name_or_path", "pretraining_tp", "dtype"}
TRAINING = ("dropout", "pdrop")  # how keys end that count in training only

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Host:
    """A stock class that other families are written as."""

    config_class: type[PreTrainedConfig]
    settings: Callable[[Words], Words]  # what it must be told beside what a family says


def llama(words: Words) -> Words:
    """Rotary GQA decoders with RMSNorm and a gated MLP, whose attention sees the whole past."""
    if words["hidden_size"] % words["num_attention_heads"]:
        raise HostError(f"Llama wants heads that divide the hidden size, not {words['num_attention_heads']}")
    return {}


def granite(words: Words) -> Words:
    """The same with any number of heads; Granite's multipliers are set to do nothing."""
    return {"attention_multiplier": words["head_dim"] ** -0.5}


def smollm3(words: Words) -> Words:
    """The same with a sliding window, at all blocks or at some."""
    blocks = words["num_hidden_layers"]
    return {
        "use_sliding_window": "layer_types" in words,
        "layer_types": words.get("layer_types", ["full_attention"] * blocks),
        "no_rope_layers": [1] * blocks,
    }


def hy_v3(words: Words) -> Words:
    """The same with norms of queries and keys; made for mixtures of experts, and here without any."""
    return {
        "mlp_layer_types": ["dense"] * words["num_hidden_layers"],
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 1,
    }


def phi(words: Words) -> Words:
    """Rotary GQA decoders with attention beside a plain MLP, both of one LayerNorm."""
    return {}


HOSTS = {
    "granite": Host(GraniteConfig, granite),
    "hy_v3": Host(HYV3Config, hy_v3),
    "llama": Host(LlamaConfig, llama),
    "phi": Host(PhiConfig, phi),
    "smollm3": Host(SmolLM3Config, smollm3),
}

# Which serving engines read a written class, biases included: read in their sources, not run here
ENGINES: dict[str, tuple[str, ...]] = {
    "gemma2": ("vLLM",),
    "gpt2": ("vLLM",),
    "gpt_neox": ("vLLM",),
    "gptj": ("vLLM",),
    "granite": ("vLLM", "llama.cpp (not the converter, where heads are fewer)"),
    "hy_v3": ("vLLM, by its Transformers backend",),
    "llama": ("vLLM", "llama.cpp"),
    "opt": ("vLLM",),
    "smollm3": ("vLLM, by its Transformers backend",),
    "starcoder2": ("vLLM (not with fewer heads)",),
}


@dataclass(frozen=True)
class Target:
    """The class and config that are written, and how the source's tensors are said there."""

    source: Blueprint
    host: str  # a name of `HOSTS`, or "own"
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    blank: PreTrainedModel  # the class without any numbers
    sites: tuple[Site, ...]  # those that are cut; where there is no bias for the constants, without
    kept: Mapping[str, int]  # neurons, by the kind of site
    dialect: Dialect | None = None
    words: Words | None = None  # the source's config as the dialect says it
    why: str = ""  # what the better hosts lack; empty where this is the first

    @property
    def zero_filled(self) -> tuple[str, ...]:
        """The kinds of site whose constants have no place and must be zero."""
        return tuple(sorted({site.kind for site in self.sites if site.constants is None}))

    def tell(self, block: int | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a block of the source (None: of all outside the blocks), cut and folded, as they are written."""
        ours = blocks_path(self.source.blank, self.source.family)
        theirs = blocks_path(self.blank, FAMILIES[self.config.model_type])
        if block is not None:
            ours, theirs = f"{ours}.{block}.", f"{theirs}.{block}."
        else:
            ours = ours.removesuffix(self.source.family.blocks)
            theirs = theirs.removesuffix(FAMILIES[self.config.model_type].blocks)
        inside = {name.removeprefix(ours): tensor for name, tensor in tensors.items() if name.startswith(ours)}
        beside = {name: tensor for name, tensor in tensors.items() if not name.startswith(ours)}  # the head
        if self.dialect is not None:
            assert self.words is not None
            inside = self.dialect.outside(inside) if block is None else self.dialect.block(self.words, inside)
        return {theirs + name: tensor for name, tensor in inside.items()} | beside


def choose_target(
    source: Blueprint, sites: Sequence[Site], kept: Mapping[str, int], dtype: torch.dtype, host: str = AUTO
) -> Target:
    """The class to write: the best that holds shapes and constants, or the one asked for.

    Args:
        sites: those that are cut.
        kept: neurons left at every site, by the site's kind.
        dtype: of the weights.
        host: "auto", "own", or a name of `HOSTS`. In its own class, and where no class has a place for them, the
            constants of a family are zero; `Target.zero_filled` says where.

    Raises:
        UsageError: a host of another name.
        PrunePeakError: the host, or every one, cannot hold the model.
    """
    family = source.family
    if host not in (AUTO, OWN, family.model_type, *HOSTS):
        raise UsageError(f"--host {host}: expected {AUTO}, {OWN}, or one of {', '.join(HOSTS)}.")
    wanted = OWN if host == family.model_type else host
    names = list(dict.fromkeys([OWN, *family.hosts, *([] if wanted == AUTO else [wanted])]))
    targets: dict[str, Target] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            target = _build(source, sites, kept, dtype, name)
            lay_out(target)
        except HostError as reason:
            reasons[name] = str(reason)
            continue
        targets[name] = target
        if wanted in (AUTO, name) and not target.zero_filled:
            return replace(target, why="; ".join(reasons.values()))
        if target.zero_filled:
            lacking = sorted({site.bias for site in sites if site.kind in target.zero_filled and site.block == 0})
            reasons[name] = f"{target.model_class.__name__} has no {', '.join(lacking)}"
    chosen = targets.get(OWN if wanted == AUTO else wanted)
    if chosen is not None:
        return replace(chosen, why="; ".join(reasons.values()) if wanted == AUTO else reasons[wanted])
    why = "; ".join(reasons.values()) if wanted == AUTO else reasons[wanted]
    others = ", ".join(
        name + (f" (with a fill of zero in {' and '.join(target.zero_filled)})" if target.zero_filled else "")
        for name, target in targets.items()
    )
    what = "no stock class can hold" if wanted == AUTO else f"{wanted} cannot hold"
    raise PrunePeakError(f"{what} a cut {source.name}: {why}." + (f" These can: {others}." if others else ""))


def _build(source: Blueprint, sites: Sequence[Site], kept: Mapping[str, int], dtype: torch.dtype, name: str) -> Target:
    settings: Words = {}
    for site in sites:
        settings |= site.settings_at(kept[site.kind])
    dialect = words = None
    if name == OWN:
        config, model_class = _own_config(source, sites, settings), source.model_class
    else:
        dialect = DIALECTS.get(source.family.model_type)
        if dialect is not None and dialect.rounds and dtype.itemsize < torch.float32.itemsize:
            raise HostError(f"{dialect.rounds} loses digits in {str(dtype).removeprefix('torch.')}, as {name} needs it")
        words = _say(source, settings, dialect)
        config = _host_config(HOSTS[name], source, words, {site.kind for site in sites})
        model_class = _same_head(source, config)
    config.dtype = dtype
    config.architectures = [model_class.__name__]
    try:
        blank = build_blank(model_class, config)
    except Exception as error:  # as modules do where shapes do not fit
        raise _refused(config, error) from None
    if name == OWN:
        held = blank.state_dict()
        sites = [site if site.constants in held else replace(site, constants=None) for site in sites]
    return Target(source, name, model_class, config, blank, tuple(sites), kept, dialect, words)


def _own_config(source: Blueprint, sites: Sequence[Site], settings: Words) -> PreTrainedConfig:
    """The source's config with the smaller shapes, and with the biases that it can open."""
    known = type(source.config)().to_dict()
    openers = {site.bias_key: True for site in sites if site.bias_key in known}
    config = copy.deepcopy(source.config)
    # head_dim is read even where no config declares it; ViT's have no groups to speak of
    said = {key: value for key, value in settings.items() if key == "head_dim" or hasattr(config, key)}
    try:
        config.update(said | openers)
        type(config)(**config.to_dict())  # only a new config is checked
    except Exception as error:  # the strict config classes raise their own kinds
        raise _refused(config, error) from None
    return config


def _refused(config: PreTrainedConfig, error: Exception) -> HostError:
    reason = str(error).strip().splitlines()[-1].strip()
    return HostError(f"{config.model_type} refuses the smaller shape: {reason}")


def _say(source: Blueprint, settings: Words, dialect: Dialect | None) -> Words:
    """What the source's config says, with the smaller shapes, in its hosts' words."""
    if source.family.attention is None or source.family.attention.fixed:
        raise HostError(f"{source.family.model_type} is written as itself only")
    values = source.config.to_dict()
    heads = dict(find_sites(source.blank, source.family, ["attention"])[0].settings)
    words = {key: values[key] for key in type(source.config)().to_dict() if key not in IDENTITY and key in values}
    words |= heads | settings
    return words if dialect is None else dialect.words(words)


def _host_config(host: Host, source: Blueprint, words: Words, kinds: set[str]) -> PreTrainedConfig:
    """The host's config, with the biases that take the constants open."""
    name = host.config_class.model_type
    settings: dict[str, Any] = host.settings(words)
    row = FAMILIES[name]
    for kind, part in (("mlp", row.mlp), ("attention", row.attention)):
        if kind in kinds and part is not None and part.bias_key is not None:
            settings[part.bias_key] = True
    known = {*host.config_class().to_dict(), "head_dim"}
    # what is switched off needs no place
    said = {key for key, value in words.items() if value not in (None, False, 0) and not key.endswith(TRAINING)}
    lost = sorted(said - known)
    if lost:
        raise HostError(f"{name} has no place for {', '.join(lost)}")
    try:
        return host.config_class(**{key: value for key, value in words.items() if key in known} | settings)
    except Exception as error:  # the strict config classes raise their own kinds
        raise HostError(f"{name} refuses the config: {brief(error)}") from None


def _same_head(source: Blueprint, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """MistralForCausalLM -> LlamaForCausalLM."""
    ours = type(source.config).__name__.removesuffix("Config")
    theirs = type(config).__name__.removesuffix("Config")
    name = theirs + source.model_class.__name__.removeprefix(ours)
    try:
        return find_class(config, [name])
    except PrunePeakError:
        raise HostError(f"there is no {name}") from None


def lay_out(target: Target) -> Layout:
    """Name, shape and type of every tensor to write.

    Raises:
        HostError: the class needs a tensor that is not there, has no place for one, or wants another shape.
    """
    state = target.blank.state_dict()
    twins = {twin: first for twin, first in target.blank.all_tied_weights_keys.items() if twin != first}
    told: dict[str, Tensor] = {}
    ours = target.source.blank.state_dict()
    for block, names in tensors_by_block(target.source.blank, target.source.family).items():
        told |= target.tell(block, _shapes(target, block, {name: ours[name] for name in names}))
    layout: Layout = {}
    name = target.model_class.__name__
    for tensor, empty in state.items():
        if tensor in twins:
            continue
        shape = tuple(empty.shape)
        if tensor in told:
            if shape != tuple(told[tensor].shape):
                raise HostError(f"{name} wants {tensor} as {shape}, the cut gives {tuple(told[tensor].shape)}")
            dtype = told[tensor].dtype
        elif tensor.endswith(".bias") and (weight := tensor.removesuffix("bias") + "weight") in {*told, *twins}:
            dtype = told[twins.get(weight, weight)].dtype
        else:
            raise HostError(f"{name} needs {tensor}, which {target.source.name} does not have")
        layout[tensor] = (shape, dtype)
    lost = [tensor for tensor in told if tensor not in layout and tensor not in twins]
    if lost:
        raise HostError(f"{name} has no place for {', '.join(lost[:3])}")
    return layout


def _shapes(target: Target, block: int | None, blanks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a block (None: of all outside the blocks) as they are after the cut, without numbers."""
    tensors = {name: blank.to(target.source.dtype_of(name)) for name, blank in blanks.items()}
    for site in target.sites:
        if site.block != block:
            continue
        for name, axis in site.cuts.items():
            shape = list(tensors[name].shape)
            shape[axis] = site.size_at(name, shape[axis], target.kept[site.kind])
            tensors[name] = tensors[name].new_empty(shape)
        if site.constants is not None:
            tensors.setdefault(site.constants, tensors[site.weight].new_empty(site.hidden))
    return tensors


def layout_bytes(layout: Layout) -> int:
    """Of all tensors together."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())
