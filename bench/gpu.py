"""What docs/performance.md measures, on an accelerator: `python bench/gpu.py [FOLDER ...]`.

For each model (SmolLM2 and a random Mistral of 7 billion parameters, or the folders that are named): moments over the
bare forward, a whole `compress` over reading, forward and writing, memory of the device, healing over a bare loop of
teacher and student, and the result in float32 against that of the processor. It prints JSON, for `docs/data/gpu.json`.

Where there is no accelerator it says so, and runs the same code on the processor with a small example.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from large import write_once
from random_llama import write_random_llama
from safetensors.torch import load_file
from smollm2 import write_smollm2
from transformers import MistralConfig, MistralForCausalLM

import prune_peak
from prune_peak.data.sampling import draw_windows
from prune_peak.data.windows import into_batches
from prune_peak.evaluation.divergence import divergence
from prune_peak.models.execution import DTYPES, ExecutionConfig, default_dtype, find_device
from prune_peak.models.loading import open_model
from prune_peak.models.whole import open_stream
from prune_peak.sites.finding import find_sites
from prune_peak.stats.collection import collect

EXAMPLE = Path(__file__).parent.parent / "examples" / "llama-mini"
RATIO = 0.3
COMPARED = 1_000_000_000  # parameters; the processor takes too long for a larger model
HEALED = 1_000_000_000  # parameters; more, with the states of AdamW in float32, do not fit
ROWS, ROW = 4, 256  # of a step of healing


def timed(device: torch.device, work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def measure_costs(folder: Path, text: Path, device: torch.device, samples: int, scratch: Path) -> dict[str, Any]:
    source = open_model(str(folder))
    windows = draw_windows(source, str(text), samples, 512, 0).calibration
    batches, dtype = into_batches(windows), DTYPES[default_dtype(source)]
    sites, execution = find_sites(source.meta_model, source.family), ExecutionConfig(device=device)

    def run(for_refit: bool | None) -> None:
        if for_refit is None:
            for _ in open_stream(source, batches, dtype, execution).steps():
                pass
        else:
            for _ in collect(source, sites, batches, dtype, for_refit, execution):
                pass

    run(None)  # warm-up
    forward, moments, products = (timed(device, lambda f=f: run(f)) for f in (None, False, True))  # type: ignore[misc]
    write = timed(device, lambda: write_once(scratch / "written", source.size))
    (scratch / "written").unlink()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    words = {"calibration": str(text), "samples": samples, "device": device.type, "force": True}
    compress = timed(device, lambda: prune_peak.compress(str(folder), RATIO, scratch / "pruned", **words))
    found = {"parameters": source.parameters, "tokens": windows.numel(), "read and forward, s": forward}
    found |= {"moments": moments / forward, "products": products / forward, "write, s": write}
    found |= {"compress, s": compress, "compress over read, forward and write": compress / (forward + write)}
    if device.type != "cpu":
        found["memory of the device, GB"] = torch.accelerator.max_memory_allocated() / 1e9
    return found


def measure_healing(folder: Path, text: Path, device: torch.device, tokens: int, scratch: Path) -> dict[str, float]:
    """Tokens a second of `heal`, all of it, and of a bare loop over as many tokens."""
    original, student = (open_model(str(each)).load(torch.float32).to(device) for each in (folder, scratch / "pruned"))
    windows = draw_windows(open_model(str(folder)), str(text), ROWS, ROW, 0).calibration.to(device)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4)

    def loop() -> None:
        for batch in islice(cycle([windows]), -(-tokens // windows.numel())):
            with torch.no_grad():
                expected = original(input_ids=batch).logits.flatten(0, 1)
            divergence(expected, student(input_ids=batch).logits.flatten(0, 1)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    bare = timed(device, loop)
    words = {"original": str(folder), "data": str(text), "tokens": tokens, "device": device.type, "force": True}
    heal = timed(device, lambda: prune_peak.heal(scratch / "pruned", output=scratch / "healed", **words))
    return {"heal, tokens a second": tokens / heal, "bare loop": tokens / bare, "ratio": bare / heal}


def compare(folder: Path, text: Path, device: torch.device, samples: int, scratch: Path) -> dict[str, float]:
    """The result in float32 against the processor's: neurons that differ, and the largest difference of a tensor."""
    tensors, losses = [], []
    for name in ("cpu", device.type):
        output = scratch / f"on-{name}"
        words = {"calibration": str(text), "samples": samples, "dtype": "float32", "device": name, "force": True}
        losses.append(prune_peak.compress(str(folder), RATIO, output, **words).quality_after)
        parts = [load_file(path) for path in sorted(output.glob("*.safetensors"))]
        tensors.append({name: value for part in parts for name, value in part.items()})
    ours, theirs = tensors
    kept = [name for name in ours if name.endswith(".keep")]
    moved = sum(int((~torch.isin(ours[name], theirs[name])).sum()) for name in kept)
    floats = [name for name, value in ours.items() if value.is_floating_point()]
    largest = max(float((ours[n].float() - theirs[n].float()).abs().max() / ours[n].float().abs().max().clamp_min(1e-9))
                  for n in floats)  # fmt: skip
    found = {"neurons kept by one alone": moved, "largest relative difference of a tensor": largest}
    if losses[0] is not None and losses[1] is not None:
        found["difference of the loss"] = abs(losses[0].loss - losses[1].loss)
    return found


def measure(folder: Path, text: Path, device: torch.device, samples: int, tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        found = measure_costs(folder, text, device, samples, scratch)
        if found["parameters"] <= HEALED:
            found["healing"] = measure_healing(folder, text, device, tokens, scratch)
        if found["parameters"] <= COMPARED:
            found["against the processor"] = compare(folder, text, device, samples, scratch)
    return found


def main() -> None:
    device = find_device("auto")
    is_dry = device.type == "cpu"
    card = "none: a dry run on the processor" if is_dry else torch.get_device_module(device).get_device_name()
    print(f"accelerator: {card}", file=sys.stderr)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as name:
        text, large = Path(name, "text.txt"), Path(name, "mistral-7b")
        text.write_text("\n\n".join(topics.values()))
        folders = [*map(Path, sys.argv[1:])] or ([EXAMPLE] if is_dry else [write_smollm2(Path(name, "smollm2")), large])
        if large in folders:
            config = MistralConfig(num_hidden_layers=32, architectures=["MistralForCausalLM"], dtype="bfloat16")
            write_random_llama(large, MistralForCausalLM, config)
        samples, tokens = (2, 512) if is_dry else (48, 50_000)
        models = {folder.name: measure(folder, text, device, samples, tokens) for folder in folders}
    result = {"card": card, "torch": torch.__version__, "commit": commit, "command": "python bench/gpu.py"}
    print(json.dumps(result | {"models": models}, indent=2))


if __name__ == "__main__":
    main()
