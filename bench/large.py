"""A random Mistral-7B-shaped model, compressed within a budget of memory: `python bench/large.py --calibration FILE`.

Writes the checkpoint (14.5 GB in bfloat16, tensor by tensor), measures what any tool would have to do (read it once,
run the tokens through it block by block, write the result once, read it back), compresses it in a process of its own,
and deletes it all. Files leave the page cache before each measurement. With `--layers 2`: fewer blocks, same shapes.
With `--sites experts` or `--sites expert-mlp`: a random Qwen3-MoE of 3 billion parameters, 48 experts a block.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_llama import write_random_llama
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import prune_peak
from prune_peak.cli.parameters import Bytes
from prune_peak.data.sampling import draw_windows
from prune_peak.data.windows import into_batches
from prune_peak.models.execution import default_dtype
from prune_peak.models.loading import open_model
from prune_peak.models.streaming import BlockStream

MIXTURE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 48,
    "num_experts_per_tok": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
CHUNK = 64 * 2**20  # bytes


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Let the files of a folder leave the page cache, so that the next to read them reads the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK):
                pass


def write_once(path: Path, size: int) -> None:
    chunk = os.urandom(CHUNK)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, CHUNK):
            file.write(chunk[: size - start])
        os.fsync(file.fileno())


def run_bare(folder: Path, options: argparse.Namespace) -> float:
    """Seconds that the blocks take for the tokens of the calibration, without reading their weights."""
    source = open_model(str(folder))
    windows = draw_windows(source, options.calibration, options.samples, options.sequence_length, 0).calibration
    dtype = getattr(torch, options.dtype or default_dtype(source))
    seconds = 0.0
    for step in BlockStream(source, into_batches(windows), dtype).steps():
        seconds += timed(lambda: list(step.run()))  # noqa: B023 - called at once
    return seconds


def highest_memory() -> int:
    """Bytes that were resident at most in this process; mapped files count."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def run_compress(words: dict[str, Any], answers: "multiprocessing.Queue[tuple[float, int]]") -> None:
    torch.set_num_threads(words.pop("threads"))
    seconds = timed(lambda: prune_peak.compress(**words))
    answers.put((seconds, highest_memory()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True, help="a text")
    parser.add_argument("--layers", type=int, help="32; 12 of the mixture")
    parser.add_argument("--sites", default="mlp")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--max-memory", type=lambda text: Bytes().convert(text, None, None), default=4 * 10**9)
    parser.add_argument("--dtype", help="to compute in; bfloat16, as the weights are, if left out")
    parser.add_argument("--scratch", help="where to write; the system's folder for temporary files if left out")
    options = parser.parse_args()

    if options.sites == "mlp":
        model_class: type[PreTrainedModel] = MistralForCausalLM
        config: PreTrainedConfig = MistralConfig(num_hidden_layers=options.layers or 32)
    else:
        model_class, config = Qwen3MoeForCausalLM, Qwen3MoeConfig(num_hidden_layers=options.layers or 12, **MIXTURE)
    config.architectures, config.dtype = [model_class.__name__], torch.bfloat16
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        source, output = Path(scratch, "source"), Path(scratch, "output")
        write_random_llama(source, model_class, config)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        forget(source)
        read = timed(lambda: read_once(source))
        bare = run_bare(source, options)
        forget(source)
        words = {
            "model": str(source),
            "ratio": options.ratio,
            "sites": (options.sites,),
            "output": str(output),
            "calibration": options.calibration,
            "samples": options.samples,
            "sequence_length": options.sequence_length,
            "dtype": options.dtype,
            "max_memory": options.max_memory,
            "threads": torch.get_num_threads(),
        }
        fresh = multiprocessing.get_context("spawn")
        answers = fresh.Queue()
        process = fresh.Process(target=run_compress, args=(words, answers))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
        seconds, memory = answers.get()
        result = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        write = timed(lambda: write_once(Path(scratch, "written"), result))
        forget(output)
        back = timed(lambda: read_once(output))
    print(json.dumps({
        "sites": options.sites,
        "blocks": config.num_hidden_layers,
        "bytes": size,
        "bytes after": result,
        "tokens": options.samples * options.sequence_length,
        "threads": words["threads"],
        "torch": torch.__version__,
        "read once, s": round(read, 1),
        "bare forward, s": round(bare, 1),
        "write once, s": round(write, 1),
        "read back once, s": round(back, 1),
        "compress, s": round(seconds, 1),
        "ratio": round(seconds / (read + bare + write + back), 2),
        "budget, GB": options.max_memory / 1e9,
        "highest resident memory, GB": round(memory / 1e9, 2),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
