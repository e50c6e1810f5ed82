"""The law over the model types of the installed transformers: `make zoo`, or `python bench/zoo.py bert seq2seq`.

For every type with a causal, a masked, a sequence-to-sequence or an image class: a small random model (the default
config shrunk by rule) is saved, opened, calibrated on random inputs, pruned by 30 %, written, loaded by its class, and
compared with the original whose pruned neurons are held by hooks. Prints one JSON object: what was found and measured
for every type.
"""

import json
import logging
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

from prune_peak.conversion.choice import choose_conversion
from prune_peak.errors import PrunePeakError, brief
from prune_peak.export.folder import FolderWriter
from prune_peak.models.asking import Asked
from prune_peak.models.discovery import discover_stacks
from prune_peak.models.loading import open_model
from prune_peak.models.miniature import build_miniature, make_inputs, takes_decoder_ids
from prune_peak.options import OWN, Budget, PruningOptions
from prune_peak.proof import LEAST_EFFECT, PROOF_BOUND, SHARES, compare_outputs, prove
from prune_peak.pruning.budget import find_allocations
from prune_peak.pruning.site_pruning import plan_site, select
from prune_peak.sites.finding import find_sites
from prune_peak.stats.collection import collect

HEADS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
EXPERT_KINDS = ("expert-mlp", "experts")
# What the default config leaves out and every checkpoint's own config says
COMPLETED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 8, "num_hidden_layers": 24, "num_dense_layers": 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "xmod": {"default_language": "en_XX"},
}


def list_types() -> dict[str, tuple[str, str]]:
    """Head and class of every type: its causal class, else its masked one, else its image classifier."""
    types: dict[str, tuple[str, str]] = {}
    for head, names in HEADS.items():
        for model_type, name in names.items():
            types.setdefault(f"{model_type} ({head})", (model_type, name if isinstance(name, str) else name[0]))
    return types


def make_config(model_type: str, class_name: str) -> PreTrainedConfig:
    """The default config, completed; for the decoder alone of an encoder-decoder, as that of a decoder."""
    config: PreTrainedConfig = CONFIG_MAPPING[model_type](**COMPLETED.get(model_type, {}))
    if model_type == "reformer":
        config.is_decoder = class_name == "ReformerModelWithLMHead"
    if getattr(config, "is_encoder_decoder", False) and not takes_decoder_ids(getattr(transformers, class_name)):
        config.is_encoder_decoder, config.is_decoder = False, True
        config.add_cross_attention = False
    return config


def try_type(model_type: str, class_name: str) -> dict[str, Any]:
    """What was found in a type and what the law gave, or why it cannot be pruned."""
    try:
        model_class = getattr(transformers, class_name)
        config = make_config(model_type, class_name)
        discover_stacks(Asked(model_class, config))  # quick, where there is nothing to try
        model, _ = build_miniature(model_class, config)
    except PrunePeakError as error:
        return {"reason": str(error)}
    except Exception as error:  # classes raise their own kinds
        return {"reason": f"no small model of the default config: {brief(error)}"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        try:
            family = open_model(str(folder)).family
            main = EXPERT_KINDS[0] if family.mlp is None else "mlp"
            found = prune_kind(folder, Path(scratch) / main, main, 0.3)
        except PrunePeakError as error:
            return {"reason": str(error).replace(str(folder), "the small model")}
        others = [] if family.experts is None else [kind for kind in EXPERT_KINDS if kind != main]
        return found | {kind: _try_kind(folder, Path(scratch), kind) for kind in ("attention", *others)}


def _try_kind(folder: Path, scratch: Path, kind: str) -> dict[str, Any]:
    reason = ""
    for share in SHARES:
        try:
            return prune_kind(folder, scratch / f"{kind}-{share}", kind, share)
        except PrunePeakError as error:
            reason = str(error).replace(str(folder), "the small model")
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # of the class
            reason = brief(error)
    return {"reason": reason}


def prune_kind(folder: Path, output: Path, kind: str, ratio: float) -> dict[str, Any]:
    """Prune one kind of site, and compare.

    Raises:
        PrunePeakError: it cannot be pruned.
    """
    source = open_model(str(folder))
    family = source.family
    prove(source, [kind])
    sites = find_sites(source.meta_model, family, [kind])
    budget = Budget(ratio=ratio, sites=(kind,), multiple_of=1)
    kept = find_allocations(source, sites, budget, OWN)[0]
    conversion = choose_conversion(source, sites, kept, source.dtype, OWN)
    original = source.load(torch.float32)
    inputs = make_inputs(original, 8)  # every choice of a multiple-choice head is a window
    batches = [{name: each if each.is_floating_point() else each.flatten(0, -2) for name, each in inputs.items()}]
    plans: dict[int, dict[str, Any]] = defaultdict(dict)
    for observed in collect(source, conversion.sites, batches, torch.float32):
        site = observed.site
        if kind == "experts":
            plans[site.block][site.name] = plan_site(source, observed, kept[site.name], PruningOptions()).plan
            continue
        weight, _ = site.read_projection(source)
        plans[site.block][site.name] = select(site, observed.stats.summarize(), weight, kept[site.name], "mean")
    output.mkdir()
    with FolderWriter(source, conversion, output) as writer:
        for block, plan in plans.items():
            writer.write_block(block, plan)
        writer.finish()
    written, info = conversion.model_class.from_pretrained(output, output_loading_info=True)
    wrong = {what: sorted(map(str, names)) for what, names in info.items() if names}
    if wrong:
        raise PrunePeakError(f"the written folder does not load: {wrong}")
    plan = {name: each for block in plans.values() for name, each in block.items()}
    difference, effect = compare_outputs(original, written.eval(), conversion.sites, plan, make_inputs(original))
    first = conversion.sites[0]
    return {
        "kind": kind,
        "class": conversion.model_class.__name__,
        "blocks": family.blocks,
        "sites": len(sites),
        "keys": sorted({key for site in sites for key in site.config_values}),
        "folded_into": "zero" if first.folded_into is None else first.bias_key or "bias",
        "streamed": family.streamable,
        "difference": difference,
        "effect": effect,
        "passed": bool(difference <= PROOF_BOUND and effect >= LEAST_EFFECT),
    }


def run(names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Try the types of these names or heads (all of them without names)."""
    types = {
        name: each
        for name, each in list_types().items()
        if not names or {name, each[0], name.partition(" (")[2].rstrip(")")} & set(names)
    }
    for name, (model_type, class_name) in tqdm(types.items(), unit="type"):
        try:
            yield name, try_type(model_type, class_name)
        except Exception as error:  # a fault of ours: it is shown, and the other types are tried
            yield name, {"reason": f"{type(error).__name__}: {brief(error)}", "fault": True}


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps(versions | {"types": dict(run(sys.argv[1:]))}, indent=1))


if __name__ == "__main__":
    main()
