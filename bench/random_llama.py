"""A random Llama of 1.3 billion parameters in bfloat16 (2.7 GB on disk): `python bench/random_llama.py FOLDER`.

For measuring memory and time, not quality. Written tensor by tensor, so that making it needs little memory itself. The
tokenizer is that of `examples/llama-mini`.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from prune_peak.export.folder import write_config
from prune_peak.io.writer import Writer
from prune_peak.models.config_checks import build_meta_model
from prune_peak.models.weight_names import split_merged

EXAMPLE = Path(__file__).parent.parent / "examples" / "llama-mini"
LARGE = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=24,
    num_attention_heads=16,
    vocab_size=32000,
    architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
)


def write_random_llama(
    folder: Path, model_class: type[PreTrainedModel] = LlamaForCausalLM, config: PreTrainedConfig = LARGE
) -> None:
    model = build_meta_model(model_class, config)
    state = split_merged(model, model.state_dict())  # as published checkpoints have them, expert by expert
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with Writer(folder, {name: (tuple(empty.shape), config.dtype) for name, empty in state.items()}) as writer:
        for name, empty in state.items():
            scale = 1.0 if name.endswith("norm.weight") else 0.02
            writer.write(name, torch.randn(empty.shape, generator=generator).mul_(scale).to(config.dtype))
        writer.finish()
    write_config(config, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_random_llama(Path(sys.argv[1]))
