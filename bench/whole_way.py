"""The whole way of some models, as a user goes it: `make whole-way`, or `python bench/whole_way.py [NAME ...]`.

Each model is inspected, compressed, healed (where heal takes its class), verified, evaluated, loaded by the class that
its config names, used as in examples/, pushed to a Hub on the loopback interface and loaded from there. Every step is a
process of its own. The table goes to docs/data/whole_way.json; the exit code is 1 if a step failed. SmolLM2 and MiniLM
come from packages (bench/smollm2.py, bench/minilm.py).

    python bench/whole_way.py load FOLDER   # one of the steps: no tensor may be missing or left over
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import transformers
from minilm import write_minilm
from smollm2 import write_smollm2
from transformers import AutoConfig

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DIGITS = EXAMPLES / "digits"
RECORD = ROOT / "docs" / "data" / "whole_way.json"
sys.path.append(str(ROOT / "tests"))

from loopback_hub import TOKEN, USER, LoopbackHub  # noqa: E402


@dataclass(frozen=True)
class Way:
    """A model, the options of its steps, and the example that uses it."""

    model: str
    ratio: str
    compress: tuple[str, ...]
    use: tuple[str, ...]
    calibration: str = "{text}"
    data: str = "{text}"
    heals: bool = False
    evaluates: bool = True  # False: predicts nothing that evaluate measures


SHORT = ("--samples", "8", "--sequence-length", "128")
WAYS = {
    "SmolLM2": Way("{smollm2}", "mlp=0.2,attention=0.3333", SHORT, ("text_pipeline.py", "{folder}"), heals=True),
    "moe-mini": Way(
        str(EXAMPLES / "moe-mini"),
        "expert-mlp=0.3",
        ("--samples", "8"),
        ("text_pipeline.py", "{folder}"),
        heals=True,
    ),
    "MiniLM": Way(
        "{minilm}",
        "0.3",
        SHORT,
        ("sentence_embeddings.py", "{folder}", "One sentence.", "Another."),
        evaluates=False,
    ),
    "vit-mini": Way(
        str(EXAMPLES / "vit-mini"),
        "0.3",
        (),
        ("image_classification.py", "{folder}", str(sorted((DIGITS / "held-out" / "7").iterdir())[0])),
        calibration=str(DIGITS / "calibration"),
        data=str(DIGITS / "held-out"),
    ),
}


def list_steps(way: Way, folder: Path, name: str, places: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """The name and the command of every step."""
    model, calibration, data = (text.format(**places) for text in (way.model, way.calibration, way.data))
    prune_peak, quiet = [sys.executable, "-m", "prune_peak"], ["-q", "--json"]
    healed = folder.parent / f"{folder.name}-healed" if way.heals else folder
    yield "inspect", [*prune_peak, "inspect", model, "--ratio", way.ratio]
    compress = [
        "compress",
        model,
        "--ratio",
        way.ratio,
        *way.compress,
        "--calibration",
        calibration,
        "--output",
        str(folder),
    ]
    yield "compress", [*prune_peak, *compress, *quiet]
    if way.heals:
        heal = ["heal", str(folder), "--original", model, "--data", data, "--tokens", "5k", "--output", str(healed)]
        yield "heal", [*prune_peak, *heal, *quiet]
    yield "verify", [*prune_peak, "verify", str(healed), *([] if way.heals else ["--original", model])]
    if way.evaluates:
        yield "evaluate", [*prune_peak, "evaluate", model, str(healed), "--data", data, "--windows", "8"]
    load = [sys.executable, str(Path(__file__)), "load"]
    yield "load", [*load, str(healed)]
    script, *words = way.use
    yield "use", [sys.executable, str(EXAMPLES / script), *(word.format(folder=healed) for word in words)]
    yield "push", [*prune_peak, "push", str(healed), f"{USER}/{name}"]
    yield "load from the Hub", [*load, f"{USER}/{name}"]


def load(name: str) -> None:
    """A folder or Hub id, by the class that its config names."""
    [written_as] = AutoConfig.from_pretrained(name).architectures
    _, info = getattr(transformers, written_as).from_pretrained(name, output_loading_info=True)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        sys.exit(f"{name}, {written_as}: {wrong}")


def go(name: str, places: dict[str, str], scratch: Path, hub: LoopbackHub) -> dict[str, float | str]:
    """Seconds of every step, until one fails."""
    variables = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(scratch / "cache"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    row: dict[str, float | str] = {}
    for step, command in list_steps(WAYS[name], scratch / name, name, places):
        started = time.perf_counter()
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        seconds = round(time.perf_counter() - started, 1)
        lines = done.stderr.strip().splitlines() or ["no message"]
        row[step] = seconds if done.returncode == 0 else f"failed: {lines[-1]}"
        print(f"{name}: {step}: {row[step]}", flush=True)
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
            break
    return row


def main() -> None:
    match sys.argv[1:]:
        case ["load", name]:
            load(name)
            return
        case []:
            names = list(WAYS)
        case names if not set(names) <= set(WAYS):
            sys.exit(f"expected names of {', '.join(WAYS)}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        places = {"text": str(scratch / "text.txt"), "smollm2": "", "minilm": ""}
        Path(places["text"]).write_text("\n\n".join(topics.values()))
        if "SmolLM2" in names:
            places["smollm2"] = str(write_smollm2(scratch / "source"))
        if "MiniLM" in names:
            places["minilm"] = str(write_minilm(scratch / "minilm"))
        (scratch / "hub").mkdir()
        with LoopbackHub({}, storage=scratch / "hub") as hub:
            rows = {name: go(name, places, scratch, hub) for name in names}
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip(),
        "machine": f"{os.cpu_count()} cores",
        "command": "make whole-way",
    }
    before = json.loads(RECORD.read_text())["ways"] if RECORD.is_file() else {}
    RECORD.write_text(json.dumps(about | {"ways": before | rows}, indent=1) + "\n")
    sys.exit(any(isinstance(cell, str) for row in rows.values() for cell in row.values()))


if __name__ == "__main__":
    main()
