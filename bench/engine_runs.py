"""One engine, in an environment of its own: what it computes of some folders, as JSON. `bench/engines.py` calls it.

ENVIRONMENT/bin/python bench/engine_runs.py ENGINE TASK.json RESULT.json

TASK.json has the tokens of a prompt, how many to write, and the folders, as the engine's own converter wrote them. The
speed is measured in turns: every folder once, then every folder again.
"""

import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

TOP = 20
TURNS = 3


class Runner(NamedTuple):
    """A loaded folder: its greedy tokens after others, and the log-probabilities of the next token by its id."""

    write: Callable[[list[int], int], list[int]]
    read: Callable[[list[int]], dict[int, float]]


def take_top(logits: Any) -> dict[int, float]:
    """The largest log-probabilities of one place, from its logits over the vocabulary."""
    values = [float(value) for value in logits]
    largest = max(values)
    total = largest + math.log(math.fsum(math.exp(value - largest) for value in values))
    best = sorted(range(len(values)), key=lambda token: -values[token])[:TOP]
    return {token: values[token] - total for token in best}


def load_transformers(folder: str) -> Runner:
    import torch
    from transformers import AutoModelForCausalLM

    return run_stock(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def run_stock(model: Any) -> Runner:
    """A model with the interface of transformers."""
    import torch

    def write(tokens: list[int], count: int) -> list[int]:
        given = torch.tensor([tokens])
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        mask = torch.ones_like(given)
        written = model.generate(input_ids=given, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
        return [int(token) for token in written[0, len(tokens) :]]

    def read(tokens: list[int]) -> dict[int, float]:
        with torch.inference_mode():
            given = torch.tensor([tokens])
            return take_top(model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0, -1].float())

    return Runner(write, read)


def load_peft(folder: str) -> Runner:
    """The adapter that was trained on top, read back onto the folder, and switched off: what is below is as it was."""
    import torch
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.base_model.disable_adapter_layers()
    return run_stock(model)


def load_torchao(folder: str) -> Runner:
    """Weights of eight bits."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    quantize_(model.base_model, Int8WeightOnlyConfig())
    return run_stock(model)


def load_vllm(folder: str) -> Runner:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process
    from vllm import LLM, SamplingParams

    settings = {"max_model_len": 512, "max_num_seqs": 1, "max_logprobs": TOP, "gpu_memory_utilization": 0.1}
    model = LLM(model=folder, dtype="float32", enforce_eager=True, distributed_executor_backend="uni", **settings)

    def answer(tokens: list[int], **settings: Any) -> Any:
        sampling = SamplingParams(temperature=0, ignore_eos=True, **settings)
        [done] = model.generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False)
        return done.outputs[0]

    def read(tokens: list[int]) -> dict[int, float]:
        [place] = answer(tokens, max_tokens=1, logprobs=TOP).logprobs
        return {token: each.logprob for token, each in place.items()}

    return Runner(lambda tokens, count: list(answer(tokens, max_tokens=count).token_ids), read)


def load_openvino(folder: str) -> Runner:
    """OpenVINO GenAI writes; its logits are read with optimum-intel, from the same file."""
    import numpy
    from openvino import Tensor
    from openvino_genai import LLMPipeline, TokenizedInputs
    from optimum.intel import OVModelForCausalLM

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipeline = LLMPipeline(folder, "CPU", **exact)
    read = run_stock(OVModelForCausalLM.from_pretrained(folder, ov_config=exact)).read

    def write(tokens: list[int], count: int) -> list[int]:
        given = numpy.array([tokens], numpy.int64)
        inputs = TokenizedInputs(Tensor(given), Tensor(numpy.ones_like(given)))
        return list(pipeline.generate(inputs, max_new_tokens=count, ignore_eos=True, do_sample=False).tokens[0])

    return Runner(write, read)


def load_ctranslate2(folder: str) -> Runner:
    import ctranslate2
    import numpy

    model = ctranslate2.Generator(folder, compute_type="float32", intra_threads=1)
    names = json.loads(Path(folder, "vocabulary.json").read_text())

    def write(tokens: list[int], count: int) -> list[int]:
        lengths = {"max_length": count, "min_length": count}
        prompt = [names[token] for token in tokens]
        [done] = model.generate_batch([prompt], sampling_topk=1, include_prompt_in_result=False, **lengths)
        return list(done.sequences_ids[0])

    def read(tokens: list[int]) -> dict[int, float]:
        return take_top(numpy.array(model.forward_batch([tokens]))[0, -1])

    return Runner(write, read)


def load_onnx(folder: str) -> Runner:
    import onnxruntime_genai as genai

    model = genai.Model(folder)

    def start(tokens: list[int], length: int) -> Any:
        settings = genai.GeneratorParams(model)
        settings.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = genai.Generator(model, settings)
        generator.append_tokens(tokens)
        return generator

    def write(tokens: list[int], count: int) -> list[int]:
        generator = start(tokens, len(tokens) + count)
        written: list[int] = []
        while len(written) < count:
            generator.generate_next_token()
            written.append(int(generator.get_next_tokens()[0]))
        return written

    return Runner(write, lambda tokens: take_top(start(tokens, len(tokens) + 1).get_logits().reshape(-1)))


def load_mlx(folder: str) -> Runner:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model = load(folder)[0]

    def write(tokens: list[int], count: int) -> list[int]:
        return [int(token) for token, _ in generate_step(mx.array(tokens), model, max_tokens=count)]

    def read(tokens: list[int]) -> dict[int, float]:
        return take_top(model(mx.array([tokens]))[0, -1].tolist())

    return Runner(write, read)


def load_llama_cpp(file: str) -> Runner:
    """By cyllama, which has llama.cpp built in."""
    import gguf
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
        """Has what cyllama 0.2.18 asks for to know how many logits there are."""

        n_vocab = property(lambda self: self.get_vocab().n_vocab)

    llama_cpp.disable_logging()
    model, parameters = Model(file), llama_cpp.LlamaContextParams()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 512, 1, 1
    parameters.type_k = parameters.type_v = gguf.GGMLQuantizationType.F32  # float16 by default
    parameters.flash_attn_type = 0  # which computes in float16

    def write(tokens: list[int], count: int, logits: bool = False) -> Any:
        context = llama_cpp.LlamaContext(model, parameters)
        batch = llama_cpp.LlamaBatch(n_tokens=512, embd=0, n_seq_max=1)
        seen, given, written = 0, tokens, []
        while True:
            batch.set_batch(given, seen, True)
            context.decode(batch)
            last = context.get_logits_ith(len(given) - 1)
            if logits:
                return take_top(last)
            written.append(max(range(len(last)), key=last.__getitem__))
            if len(written) == count:
                return written
            seen, given = seen + len(given), written[-1:]

    return Runner(write, lambda tokens: write(tokens, 1, logits=True))


ENGINES: dict[str, Callable[[str], Runner]] = {
    "transformers": load_transformers,
    "peft": load_peft,
    "torchao": load_torchao,
    "vllm": load_vllm,
    "openvino": load_openvino,
    "ctranslate2": load_ctranslate2,
    "onnxruntime-genai": load_onnx,
    "mlx": load_mlx,
    "llama.cpp": load_llama_cpp,
}


def run(engine: str, task: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens, log-probabilities after the prompt, and tokens a second of every folder."""
    tokens, count = task["prompt"], task["count"]
    runners: dict[str, Runner] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, folder in task["folders"].items():
        try:
            runner = ENGINES[engine](folder)
            found[name] = {"tokens": runner.write(tokens, count), "top": runner.read(tokens)}
        except Exception as error:  # whatever an engine raises where it does not know a class or a shape
            found[name] = {"refused": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
            traceback.print_exc()
        else:
            runners[name] = runner
    calls = {name: partial(runner.write, tokens, count) for name, runner in runners.items()}
    for name, rate in time_in_turns(calls, count).items():
        found[name]["rate"] = rate
    return found


def run_sentences(task: dict[str, Any]) -> dict[str, Any]:
    """Vectors of sentences from every folder, and sentences a second."""
    from sentence_transformers import SentenceTransformer

    models = {name: SentenceTransformer(folder) for name, folder in task["folders"].items()}
    found: dict[str, Any] = {
        name: {"vectors": model.encode(task["sentences"]).tolist()} for name, model in models.items()
    }
    many = task["sentences"] * 32
    calls = {name: partial(model.encode, many) for name, model in models.items()}
    for name, rate in time_in_turns(calls, len(many)).items():
        found[name]["rate"] = rate
    return found


def time_in_turns(calls: Mapping[str, Callable[[], Any]], units: int) -> dict[str, float]:
    """Units a second of every call: the median of its turns."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            rates[name].append(units / (time.perf_counter() - started))
    return {name: statistics.median(of) for name, of in rates.items()}


def main() -> None:
    engine, task, result = sys.argv[1:]
    read = json.loads(Path(task).read_text())
    found = run_sentences(read) if engine == "sentences" else run(engine, read)
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
