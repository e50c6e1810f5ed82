"""A small model of the same class: the config shrunk by rule, with random weights that no mistake can hide behind."""

import copy
import inspect
import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunePeakError, brief
from .config_checks import build_meta_model
from .config_keys import image_size, vision_config
from .families import computed_names

LAYERS = re.compile(r"(^|_)(n_?|num_)?(hidden_|encoder_|decoder_)?(layers?|depth|blocks)$")
VOCABULARY, TOKENS = re.compile(r"vocab_size$|^n_words$"), re.compile(r"(token_id|token_index|_idx)$")
POSITIONS = re.compile(r"position|n_ctx|n_positions|seq_len|context_length")
HEADS = re.compile(r"(heads?|num_kv|kv_groups|query_groups)$|(^|_)(n|num)_[a-z_]*heads?$")
KV = re.compile(r"kv|key_value|group")
EXPERTS = re.compile(r"experts?$|num_experts|n_routed")
DENSE = re.compile(r"dense_replace|dense_layers|moe_layer_start")  # blocks before the first one with experts
GROUPS = re.compile(r"n_groups?$|topk_groups?$|num_expert_groups?$")
CHOSEN = re.compile(r"experts_per_tok|top_?k|moe_k$|num_selected|experts_per_token")
HEAD_WIDTH = re.compile(r"head_dim|head_size|d_kv$|kv_channels|rotary_dim|head_width|d_head$")
WIDTH = re.compile(r"size|dim|hidden|width|inner|d_model|d_ff|rank|embd|embed|channels|ffn|intermediate|units|d_ssm")
INNER = re.compile(r"intermediate|ffn|inner")
NOT_WIDTH = re.compile(
    r"vocab|patch|image|window|kernel|stride|type|group|num_channels|chunk|block|bucket|^n_(?!embd|inner)|num_|max|conv"
)
IMAGES = "pixel_values"  # name of the input, (images, channels, height, width)
DECODER_IDS = "decoder_input_ids"  # name of the second input of an encoder-decoder, (texts, tokens)
STAGES = {"out_features", "out_indices", "stage_names"}  # of backbones, computed from the number of blocks
MOST_PARAMETERS, MOST_PIXELS = 100_000_000, 2**22
MOST_VALUE = 2**16  # of other keys; a config can ask for a loop without end
FEW_BLOCKS = 2  # more where so few do not show every kind of block
MOST_POSITIONS, FEW_TOKENS = 512, 256
# Divisors of heads and of their width; the weaker ones for classes with limits of their own
STRENGTHS = ((8, 8), (4, 8), (4, 4), (2, 4), (2, 2), (1, 8), (1, 4), (1, 2), (1, 1))


def shrink(config: PreTrainedConfig, heads: int, width: int, blocks: int = FEW_BLOCKS) -> PreTrainedConfig:
    """The config with fewer blocks, heads, tokens and experts, and with all widths divided by `heads * width`."""
    small = copy.deepcopy(config)
    values = {key: value for key, value in vars(small).items() if not key.startswith("_")}
    before = {value for key, value in values.items() if LAYERS.search(key) and isinstance(value, int)}
    lists = [value for value in values.values() if isinstance(value, list) and len(value) in before]
    blocks = max([blocks, *(_covering(each) for each in lists)])
    for key, value in values.items():
        vars(small)[key] = _shrunk(key, value, heads, width, blocks, before)
    for inner in getattr(config, "sub_configs", {}) or {}:
        part = getattr(config, inner, None)
        if isinstance(part, PreTrainedConfig):
            setattr(small, inner, shrink(part, heads, width, blocks))
    return small


def _shrunk(key: str, value: Any, heads: int, width: int, blocks: int, before: set[int]) -> Any:
    if isinstance(value, list) and len(value) in before and len(value) > blocks:
        return value[:blocks]
    if type(value) is not int:
        return value
    if DENSE.search(key):
        return min(value, 1)
    if LAYERS.search(key) and "encoder_blocks" not in key:  # the number of stages
        return min(value, blocks)
    if VOCABULARY.search(key):
        return min(value, FEW_TOKENS)
    if TOKENS.search(key):
        return value % FEW_TOKENS
    if POSITIONS.search(key):
        return min(value, MOST_POSITIONS)
    if GROUPS.search(key):
        return min(value, 1 if "top" in key else 2)
    if CHOSEN.search(key):
        return min(value, 2)
    if EXPERTS.search(key):
        return min(value, 8)
    if HEAD_WIDTH.search(key):
        return max(value // width, 4) if value > 4 else value
    if HEADS.search(key):
        return max(value // heads, min(value, 2 if KV.search(key) else 4))
    if WIDTH.search(key) and not NOT_WIDTH.search(key) and value >= 16:
        small = max(value // (heads * width), 4)
        return max(small // 8, 2) * 8 if INNER.search(key) else small  # kernels of experts take rows of 16 bytes
    return min(value, MOST_VALUE)


def _created(small: PreTrainedConfig, heads: int, width: int) -> PreTrainedConfig:
    """The config created again from its values, which checks them."""
    values = {key: value for key, value in small.to_dict().items() if key not in STAGES}
    for part in (values, *values.values()):
        if isinstance(part, dict) and part.get("per_layer_config"):  # settings that differ by block
            blocks = part["num_hidden_layers"]
            part["per_layer_config"] = {
                block: {key: _shrunk(key, value, heads, width, blocks, set()) for key, value in settings.items()}
                for block, settings in part["per_layer_config"].items()
                if int(block) < blocks
            }
    created: PreTrainedConfig = type(small)(**values)
    return created


def _covering(values: list[Any]) -> int:
    """How many of the first blocks show every kind of block."""
    kinds = list(map(str, values))
    return max(kinds.index(kind) + 1 for kind in kinds) if len(set(kinds)) <= 4 else 2


def build_miniature(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, blocks: int = FEW_BLOCKS
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The smallest model of a class that runs, with scaled random weights, and inputs for it.

    Raises:
        PrunePeakError: none runs; the message has the reason of the last one.
    """
    reason = ""
    for heads, width in STRENGTHS:
        try:
            small = _created(shrink(config, heads, width, blocks), heads, width)
            empty = build_meta_model(model_class, small)
            if sum(tensor.numel() for tensor in (*empty.parameters(), *empty.buffers())) > MOST_PARAMETERS:
                reason = reason or f"a small one would still have more than {MOST_PARAMETERS:,} parameters"
                break
            model = model_class(small).eval()
            model.config.use_cache = False
            randomize(model)
            inputs = make_inputs(model)
            with torch.inference_mode():
                model(**inputs)
        except Exception as error:  # classes have limits of their own; a weaker shrinking may fit
            reason = brief(error)
            continue
        return model, inputs
    raise PrunePeakError(f"no small {model_class.__name__} runs, so what is found in it cannot be proved: {reason}")


def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Weights of a size that shows every neuron in the output, and biases and norms that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or name in computed_names(model):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                is_kernel = parameter.dim() == 4 or parameter.shape[-1] == 1
                parameter.copy_(noise * (parameter[0].numel() if is_kernel else parameter.shape[-1]) ** -0.5)
            else:
                parameter.add_(0.1 * noise)


def make_inputs(model: PreTrainedModel, rows: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Random inputs: token ids, also of the decoder beside an encoder; or images."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == IMAGES:
        config = vision_config(model.config)
        height, width = image_size(config)
        if height * width > MOST_PIXELS:
            raise PrunePeakError(f"images of {height} x {width} pixels; expected at most {MOST_PIXELS:,} pixels")
        channels = getattr(config, "num_channels", 3)
        return {IMAGES: torch.randn(rows, channels, height, width, generator=generator)}
    vocabulary = model.config.get_text_config().vocab_size
    if takes_one_text(type(model), model.config):
        rows = 1
    shape = (rows, 2, length) if takes_choices(type(model)) else (rows, length)
    inputs = {"input_ids": torch.randint(min(6, vocabulary - 1), vocabulary, shape, generator=generator)}
    if takes_decoder_ids(type(model)):  # of another length, so that the tokens of both can be told apart
        shape = (rows, length - length // 4)
        inputs[DECODER_IDS] = torch.randint(min(6, vocabulary - 1), vocabulary, shape, generator=generator)
    return inputs


def takes_decoder_ids(model_class: type[PreTrainedModel]) -> bool:
    """Whether a class has a decoder that reads tokens of its own, beside an encoder."""
    return DECODER_IDS in inspect.signature(model_class.forward).parameters


def takes_choices(model_class: type[PreTrainedModel]) -> bool:
    """Whether a head takes several texts at a time, (questions, choices, tokens)."""
    return model_class.__name__.endswith("ForMultipleChoice")


def takes_one_text(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Whether a head takes one text at a time: a decoder's classifier looks for the last token before padding."""
    pad_token = getattr(config.get_text_config(), "pad_token_id", None)
    return model_class.__name__.endswith("ForSequenceClassification") and pad_token is None
