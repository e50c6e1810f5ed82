"""Choice of the class to write: the first stock class that supports the smaller shapes and the folded constants.

The family's own class comes first. Where it has no bias for the constants, or does not support the shapes, an
equivalent class of `OUTPUT_CLASSES` is tried. Without one, the own class is written with zero constants. Every class is
built on `meta`, and all shapes are compared.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ..errors import PrunePeakError, UsageError, brief, spell
from ..models.config_checks import build_meta_model, find_class
from ..models.config_keys import all_keys, write_key
from ..models.families import FAMILIES, blocks_path, find_blocks
from ..models.loading import ModelSpec
from ..options import AUTO, OWN
from ..sites.attention import measure_heads, modules_of
from ..sites.blocks import Blocks, join_runs, removed_blocks
from ..sites.mlp import Mlp
from ..sites.site import Site
from .classes import OUTPUT_CLASSES
from .fewer_blocks import drop_blocks, number_blocks
from .layout import Conversion
from .mappings import CLASS_MAPPINGS, ClassMapping, ConfigDict, UnsupportedClass

# Keys of every config that no computation reads
IDENTITY = {"architectures", "model_type", "transformers_version", "_name_or_path", "pretraining_tp", "dtype"}
TRAINING = ("dropout", "pdrop")  # ends of keys that only matter in training
# Keys that describe files or weights that are not written
NOT_WRITTEN = {"auto_map", "custom_pipelines", "quantization_config", "torch_dtype"}


def choose_conversion(
    source: ModelSpec, sites: Sequence[Site], kept: Mapping[str, int], dtype: torch.dtype, output_class: str = AUTO
) -> Conversion:
    """The conversion to the best class, or to the requested one.

    Args:
        sites: the sites to prune.
        kept: neurons kept, by the name of the site.
        dtype: of the weights.
        output_class: "auto", "own", or a name of `OUTPUT_CLASSES`.

    Raises:
        UsageError: an unknown class.
        PrunePeakError: no class, or not the requested one, supports the pruned model.
    """
    family, sites = source.family, join_runs(sites)
    if output_class not in (AUTO, OWN, family.model_type, *OUTPUT_CLASSES):
        raise UsageError(
            f"{spell('output_class', output_class)}: expected {AUTO}, {OWN}, or one of {', '.join(OUTPUT_CLASSES)}."
        )
    wanted = OWN if output_class == family.model_type else output_class
    names = list(dict.fromkeys([OWN, *family.output_classes, *([] if wanted == AUTO else [wanted])]))
    conversions: dict[str, Conversion] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            conversion = _build(source, sites, kept, dtype, name)
            conversion.layout  # noqa: B018 - refuses what does not fit
        except UnsupportedClass as unsupported:
            reasons[name] = str(unsupported)
            continue
        conversions[name] = conversion
        if wanted in (AUTO, name) and not conversion.zero_filled:
            return _with_reason(conversion, "; ".join(reasons.values()))
        if conversion.zero_filled:
            lacking = sorted(
                {site.bias for site in sites if site.label in conversion.zero_filled and site.block == sites[0].block}
            )
            reasons[name] = f"{conversion.model_class.__name__} has no {', '.join(lacking)}"
    reason = "; ".join(reasons.values()) if wanted == AUTO else reasons[wanted]
    chosen = conversions.get(OWN if wanted == AUTO else wanted)
    if chosen is not None:
        return _with_reason(chosen, reason)
    others = ", ".join(
        name + (f" (with a fill of zero in {' and '.join(conversion.zero_filled)})" if conversion.zero_filled else "")
        for name, conversion in conversions.items()
    )
    what = "no stock class supports" if wanted == AUTO else f"{wanted} does not support"
    raise PrunePeakError(f"{what} a pruned {source.name}: {reason}." + (f" These do: {others}." if others else ""))


def _with_reason(conversion: Conversion, reason: str) -> Conversion:
    explained = replace(conversion, reason=reason)
    vars(explained)["layout"] = conversion.layout  # the cached property
    return explained


def _build(
    source: ModelSpec, sites: Sequence[Site], kept: Mapping[str, int], dtype: torch.dtype, name: str
) -> Conversion:
    shape = _merge_shapes(source, sites, kept)
    mapping = config_dict = block_map = None
    original, removed = source, removed_blocks(sites)
    if removed:
        source = drop_blocks(source, removed)
        block_map = number_blocks(len(find_blocks(original.meta_model, original.family)), removed)
    if name == OWN:
        config, model_class = _own_config(source, sites, shape), source.model_class
    else:
        mapping = CLASS_MAPPINGS.get(source.family.model_type)
        if mapping is not None and mapping.inexact_step and dtype.itemsize < torch.float32.itemsize:
            narrow = str(dtype).removeprefix("torch.")
            raise UnsupportedClass(f"{mapping.inexact_step} loses digits in {narrow}, and {name} requires it")
        config_dict = _convert_config(source, shape, mapping)
        config = _other_config(
            name, config_dict, {Mlp.label if site.label == Blocks.label else site.label for site in sites}
        )
        model_class = _same_head(source, config)
    _carry_over(source.config, config)
    config.dtype = dtype
    config.architectures = [model_class.__name__]
    try:
        meta_model = build_meta_model(model_class, config)
    except Exception as error:  # modules raise their own kinds where shapes do not fit
        raise _refused(config, error) from None
    if name == OWN:
        state = meta_model.state_dict()
        sites = [site if _has_bias(site, state, block_map) else replace(site, folded_into=None) for site in sites]
    return Conversion(
        original,
        name,
        model_class,
        config,
        meta_model,
        tuple(sites),
        kept,
        mapping,
        config_dict,
        block_map=block_map,
    )


def _has_bias(site: Site, written: Mapping[str, Any], block_map: Sequence[int | None] | None) -> bool:
    """Whether the written class has the bias that takes the constants of a site."""
    number = site.block if block_map is None or site.block >= len(block_map) else block_map[site.block]
    name = site.folded_into
    return name is not None and name.replace(f".{site.block}.", f".{number}.", 1) in written


def _merge_shapes(source: ModelSpec, sites: Sequence[Site], kept: Mapping[str, int]) -> ConfigDict:
    """The config values of all pruned sites.

    Raises:
        UnsupportedClass: sites with different widths, for which a config has one value.
    """
    shape: ConfigDict = {}
    for site in sites:
        for key, value in site.kind.config(site, kept[site.name]).items():
            if shape.setdefault(key, value) != value:
                raise UnsupportedClass(
                    f"{source.family.model_type} has one {key} for all blocks, not {shape[key]} and {value}"
                )
    return shape


def _own_config(source: ModelSpec, sites: Sequence[Site], shape: ConfigDict) -> PreTrainedConfig:
    """The source's config with the smaller shapes, and with the biases that it can open."""
    config = copy.deepcopy(source.config)
    keys = {key for key, _ in all_keys(config)} | {*config.attribute_map}
    biases = {site.bias_key: True for site in sites if site.bias_key is not None and site.bias_key in keys}
    # head_dim is read even where a config does not declare it; ViT has no KV groups
    values = {key: value for key, value in shape.items() if key.endswith("head_dim") or key in keys}
    try:
        for key, value in (values | biases).items():
            write_key(config, key, value)
        type(config)(**config.to_dict())  # configs are only checked when they are created
    except Exception as error:  # the strict config classes raise their own kinds
        raise _refused(config, error) from None
    return config


def _refused(config: PreTrainedConfig, error: Exception) -> UnsupportedClass:
    reason = str(error).strip().splitlines()[-1].strip()
    return UnsupportedClass(f"{config.model_type} does not support the smaller shape: {reason}")


def _convert_config(source: ModelSpec, shape: ConfigDict, mapping: ClassMapping | None) -> ConfigDict:
    """The source's config with the smaller shapes, in the keys of its output classes."""
    if source.family.attention is None or not source.family.attention.heads_prunable:
        raise UnsupportedClass(f"{source.family.model_type} can only be written as itself")
    block = f"{blocks_path(source.meta_model, source.family)}.0"
    groups, each, head_dim = measure_heads(source.meta_model, modules_of(source.family), block)
    heads = {"num_attention_heads": groups * each, "num_key_value_heads": groups, "head_dim": head_dim}
    values = source.config.to_dict()
    config = {key: values[key] for key in type(source.config)().to_dict() if key not in IDENTITY and key in values}
    config |= heads | shape
    return config if mapping is None else mapping.config(config)


def _other_config(name: str, config: ConfigDict, kinds: set[str]) -> PreTrainedConfig:
    """The config of another class, with the biases that take the constants."""
    config_class, row = CONFIG_MAPPING[name], FAMILIES[name]
    settings: dict[str, Any] = OUTPUT_CLASSES[name](config)
    for kind, part in (("mlp", row.mlp), ("attention", row.attention)):
        if kind in kinds and part is not None and part.bias_key is not None:
            settings[part.bias_key] = True
    known = {*config_class().to_dict(), "head_dim"}
    # a setting that is off can be left out
    used = {key for key, value in config.items() if value not in (None, False, 0) and not key.endswith(TRAINING)}
    if lost := sorted(used - known):
        raise UnsupportedClass(f"{name} does not support {', '.join(lost)}")
    try:
        return config_class(**{key: value for key, value in config.items() if key in known} | settings)
    except Exception as error:  # the strict config classes raise their own kinds
        raise UnsupportedClass(f"{name} does not accept the config: {brief(error)}") from None


def _carry_over(source: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Keep the keys that neither class declares (a licence, settings of other libraries)."""
    declared = {*type(source)().to_dict(), "head_dim"}
    for key, value in source.to_dict().items():
        if key in NOT_WRITTEN:
            vars(config).pop(key, None)
        elif key not in declared and not hasattr(config, key):
            setattr(config, key, copy.deepcopy(value))


def _same_head(source: ModelSpec, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """MistralForCausalLM -> LlamaForCausalLM."""
    prefix, other = (type(part).__name__.removesuffix("Config") for part in (source.config, config))
    name = other + source.model_class.__name__.removeprefix(prefix)
    try:
        return find_class(config, [name])
    except PrunePeakError:
        raise UnsupportedClass(f"transformers has no {name}") from None
