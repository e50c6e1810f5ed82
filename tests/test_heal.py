"""`heal`: a compressed model comes nearer to the original, and what is written keeps its promises."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import EXAMPLES
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_card import run_pasted
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import prune_peak
from prune_peak.cli.main import main
from prune_peak.data.chat import find_template, generate_chats, is_loop
from prune_peak.data.sampling import sample_windows
from prune_peak.data.windows import IGNORED
from prune_peak.evaluation.divergence import divergence
from prune_peak.evaluation.talk import measure_talk, read_prompts, warn_of_answers_before
from prune_peak.healing import training
from prune_peak.healing.objectives import NextTokens
from prune_peak.healing.training import collate, into_batches
from prune_peak.healing.windows import choose_data
from prune_peak.models.loading import open_model

LLAMA = EXAMPLES / "llama-mini"
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}<|assistant|>\n"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words), "-q"])


@pytest.fixture(scope="module", autouse=True)
def _often() -> Iterator[None]:
    """Short runs are evaluated and kept more than once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LEAST_STEPS", 4)
        yield


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama-mini without half of its MLP neurons; `text.txt` beside it is what it was calibrated on."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("heal")
    (folder / "text.txt").write_text("\n\n".join(topics[name] for name in sorted(topics))[:150_000])
    prune_peak.compress(LLAMA, 0.5, folder / "cut", calibration=str(folder / "text.txt"), samples=16)
    return folder / "cut"


def heal(cut: Path, output: Path, *words: object) -> Result:
    return run("heal", cut, "--original", LLAMA, "--data", cut.parent / "text.txt", "--output", output, *words)


@pytest.fixture(scope="module")
def healed(cut: Path) -> Path:
    output, data = cut.parent / "healed", str(cut.parent / "text.txt")
    result = prune_peak.heal(cut, original=str(LLAMA), data=data, tokens=8000, output=output)
    assert result.divergence_after < 0.95 * result.divergence_before
    assert result.score_original < result.score_after < result.score_before
    return cut.parent / "healed"


def test_the_written_folder(cut: Path, healed: Path) -> None:
    """Same class, names, shapes and types; nothing missing; nearer to the original on held-out windows."""
    model, info = AutoModelForCausalLM.from_pretrained(healed, output_loading_info=True)
    assert not any(info.values())
    first, second = (load_file(folder / "model.safetensors") for folder in (cut, healed))
    assert {name: (t.shape, t.dtype) for name, t in first.items()} == {n: (t.shape, t.dtype) for n, t in second.items()}
    assert (healed / "config.json").read_bytes() == (cut / "config.json").read_bytes()
    assert not (healed / "prune_peak_plan.safetensors").exists()
    recipe = json.loads((healed / "prune_peak.json").read_text())
    parent = json.loads((cut / "prune_peak.json").read_text())
    data = choose_data(open_model(str(LLAMA)), parent, str(cut.parent / "text.txt"), 8000, 0)
    assert recipe["healing"]["data_digest"] == data.digest
    assert recipe["healing"]["parent_tensors"] == parent["tensors"]
    inputs = torch.stack([row["input_ids"] for row in data.held_out])
    original = AutoModelForCausalLM.from_pretrained(LLAMA)
    with torch.inference_mode():
        pair = [each(inputs).logits[:, :-1].flatten(0, 1) for each in (original, model)]
    assert divergence(*pair).mean().item() == pytest.approx(recipe["healing"]["divergence"]["after"], rel=1e-4)


@pytest.mark.real
def test_the_commands_of_the_card(healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(LLAMA, tmp_path / "llama-mini")
    shutil.copy(healed.parent / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_pasted(ModelCard.load(healed / "README.md")) == ["compress", "heal", "verify"]
    again = load_file(tmp_path / "pruned-healed" / "model.safetensors")
    for name, tensor in load_file(healed / "model.safetensors").items():
        assert torch.equal(tensor, again[name])


def test_the_card_tells(healed: Path) -> None:
    card = (healed / "README.md").read_text()
    assert (
        "It was then trained on 8,000 tokens of text.txt to predict what the original predicts (all weights)." in card
    )
    assert "--output pruned\nprune-peak heal pruned --original ./llama-mini" in card
    assert "prune-peak verify pruned-healed --original ./llama-mini" in card
    assert "Healing changed all weights" in card
    assert "plan.safetensors" not in card


def test_verify(healed: Path, cut: Path, tmp_path: Path) -> None:
    words = ("verify", healed, "--original", LLAMA)
    assert "as near to the original as told" in run(*words, "--data", cut.parent / "text.txt").stdout
    assert run(*words).exit_code == 0
    changed = shutil.copytree(healed, tmp_path / "changed")
    tensors = {name: tensor.clone() for name, tensor in load_file(changed / "model.safetensors").items()}
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert run("verify", changed).exit_code == 3
    recipe = json.loads((changed / "prune_peak.json").read_text())
    from prune_peak.io.tensor_files import digest_tensor

    recipe["tensors"] = {name: digest_tensor(tensor) for name, tensor in tensors.items()}
    (changed / "prune_peak.json").write_text(json.dumps(recipe))
    forged = run("verify", changed, "--original", LLAMA, "--data", cut.parent / "text.txt")
    assert forged.exit_code == 3
    assert "FAILED  as near to the original as told" in forged.stdout


@pytest.mark.parametrize("healing", [{}, {"parent_tensors": [], "data": 1, "tokens": 1, "seed": 0}, None])
def test_a_damaged_recipe_of_healing_is_refused(healing: Any, healed: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(healed, tmp_path / "changed")
    recipe = json.loads((changed / "prune_peak.json").read_text())
    (changed / "prune_peak.json").write_text(json.dumps(recipe | {"healing": healing}))
    result = run("verify", changed, "--original", LLAMA)
    assert result.exit_code == 1
    assert "no readable prune_peak.json" in result.stderr


def test_rows_are_disjoint(cut: Path) -> None:
    """From each other, and from the calibration and its held-out windows."""
    original, text = open_model(str(LLAMA)), str(cut.parent / "text.txt")
    recipe = json.loads((cut / "prune_peak.json").read_text())
    data = choose_data(original, recipe, text, 10**9, 0)
    used = sample_windows(original, [text], 16, recipe["options"]["sequence_length"], 0)
    parts = [{bytes(row["input_ids"].numpy()) for row in rows} for rows in (data.train, data.held_out)]
    parts.append({bytes(window.numpy()) for window in torch.cat([used.calibration, used.held_out])})
    assert min(map(len, parts)) > 10
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not parts[first] & parts[second]


class Stop(TrainerCallback):  # type: ignore[misc]
    """Interrupts a run after its ninth step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 9:
            raise KeyboardInterrupt


def test_a_stopped_run_resumes_to_the_same_bytes(
    cut: Path, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training, "Progress", Stop)
        assert heal(cut, tmp_path / "healed", "--tokens", "8k").exit_code == 130
    assert not (tmp_path / "healed").exists()
    assert list((tmp_path / "healed.partial" / "training").glob("checkpoint-*"))
    other = heal(cut, tmp_path / "healed", "--tokens", "9k")
    assert "belongs to an unfinished run with different options (tokens)" in other.stderr
    assert heal(cut, tmp_path / "healed", "--tokens", "8k").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]
    for name in ("model.safetensors", "prune_peak.json", "config.json"):
        assert (tmp_path / "healed" / name).read_bytes() == (healed / name).read_bytes(), name


@pytest.mark.real
def test_accumulated_gradients_are_those_of_one_pass(cut: Path, tmp_path: Path) -> None:
    """Rows of different lengths: a mean of means would differ."""
    original = open_model(str(LLAMA))
    recipe = json.loads((cut / "prune_peak.json").read_text())
    data = choose_data(original, recipe, str(cut.parent / "text.txt"), 4096, 0)
    for number, row in enumerate(data.train):
        row["labels"][: 16 * (number % 7)] = IGNORED
    states = []
    for at_once in (512, 128):
        models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (LLAMA, cut)]
        best = training.train(
            NextTokens(original), *models, data, 4096, "full", tmp_path / str(at_once), 0, at_once, True
        )
        states.append(best.state_dict())
    start = AutoModelForCausalLM.from_pretrained(cut).state_dict()
    moved = math.sqrt(sum((states[0][n] - start[n]).square().sum().item() for n in start))
    apart = math.sqrt(sum((states[0][n] - states[1][n]).square().sum().item() for n in start))
    assert moved > 0.05
    assert apart < 1e-2 * moved  # Adam's first steps are signs: rounding turns those of the smallest gradients


def test_nothing_is_written_where_nothing_improves(cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.RATES, "full", 1.0)
    result = heal(cut, tmp_path / "healed", "--tokens", "3k")
    assert result.exit_code == 1
    assert "does not get better by this" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.real
def test_own_text_without_a_template(cut: Path, tmp_path: Path) -> None:
    result = heal(cut, tmp_path / "healed", "--tokens", "6k", "--data", "self", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["data"] == "the original's own text"
    assert found["divergence_after"] < found["divergence_before"]
    checked = run("verify", tmp_path / "healed", "--original", LLAMA)
    assert checked.exit_code == 0
    assert "as near to the original as told" in checked.stdout


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
@pytest.mark.real
def test_lora(cut: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = heal(cut, tmp_path / "healed", "--tokens", "8k", "--method", "lora", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["divergence_after"] < found["divergence_before"]
    first, second = (load_file(folder / "model.safetensors") for folder in (cut, tmp_path / "healed"))
    assert first.keys() == second.keys()


REFUSED: list[tuple[tuple[str, ...], str, int]] = [
    (("heal", "{cut}"), "was compressed from a local folder, llama-mini; pass --original DIR.", 2),
    (("heal", "{cut}", "--original", str(EXAMPLES / "opt-mini")), "is not the model that", 1),
    (("heal", "{cut}", "--original", str(LLAMA)), "text.txt, which is not here; pass --data FILE, or --data self.", 2),
    (("heal", "{healed}", "--original", str(LLAMA)), "is healed already", 2),
    (("heal", str(LLAMA)), "is not a folder that prune-peak wrote", 1),
    (
        ("heal", "{cut}", "--original", str(LLAMA), "--data", "{text}", "--max-memory", "100MB"),
        "the budget is 0.10 GB",
        1,
    ),
    (
        ("heal", "{cut}", "--original", str(LLAMA), "--data", "{text}", "--tokens", "many"),
        "such as 50000, 50k or 1M",
        2,
    ),
    (
        ("heal", "{cut}", "--original", str(LLAMA), "--data", "{text}", "--output", "{cut}"),
        "contains the model itself",
        2,
    ),
    (("heal", "{cut}", "--original", str(LLAMA), "--data", "{short}"), "expected at least 2, one to train on", 1),
]


@pytest.mark.parametrize(("words", "message", "code"), REFUSED)
def test_refusals(
    words: tuple[str, ...], message: str, code: int, cut: Path, healed: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("A word. " * 40)
    places = {"cut": cut, "healed": healed, "text": cut.parent / "text.txt", "short": tmp_path / "short.txt"}
    result = run(*(word.format(**places) for word in words))
    assert result.exit_code == code, result.output
    assert message in result.stderr.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_dry_run(cut: Path, tmp_path: Path) -> None:
    costs = []
    for method in ("full", "lora"):
        words = ("--tokens", "8k", "--dry-run", "--json", "--method", method)
        costs.append(json.loads(heal(cut, tmp_path / "healed", *words).stdout))
    assert costs[0]["memory"] > costs[1]["memory"]
    assert 0 <= costs[0]["minutes"] < 5
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama-mini with a chat template."""
    folder = shutil.copytree(LLAMA, tmp_path_factory.mktemp("chat") / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_chats(chatty: Path) -> None:
    """The question and the answer count; what the template writes does not."""
    model = open_model(str(chatty))
    template = find_template(model)
    assert template is not None
    tokenizer = template.tokenizer
    assert tokenizer.decode(template.before) == "<|user|>\n"
    chats = generate_chats(model, 600, 128, 0)
    assert sum(len(ids) for ids, _ in chats) >= 600
    for ids, labels in chats:
        text = tokenizer.decode(ids)
        question, answer = text.removeprefix("<|user|>\n").split("\n<|assistant|>", 1)
        counted = labels != IGNORED
        assert torch.equal(labels[counted], ids[1:][counted[:-1]])
        assert tokenizer.decode(labels[counted]) == question + answer
        assert not is_loop(tokenizer(answer)["input_ids"][:-2])


def test_a_template_that_raises_is_not_used(chatty: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chatty, tmp_path / "broken")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert find_template(open_model(str(folder))) is None


def test_padding_does_not_count() -> None:
    rows = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (3, 5)]
    batch = collate(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert (batch["labels"] != IGNORED).sum() == 8
    objective = NextTokens(open_model(str(LLAMA)))
    assert [part["input_ids"].shape for part in into_batches(objective, rows, torch.device("cpu"))] == [(2, 5)]


def test_talk(chatty: Path, cut: Path, tmp_path: Path) -> None:
    """The original against itself and against the compressed one."""
    small = shutil.copytree(cut, tmp_path / "small")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copy(chatty / name, small)
    first, same, other = measure_talk([open_model(str(f)) for f in (chatty, chatty, small)], read_prompts()[:4])
    assert (first.answers, first.loops, first.ends) == (same.answers, same.loops, same.ends)
    assert same.divergence == pytest.approx(0, abs=1e-6)
    assert other.divergence > 0.05
    assert first.template
    (tmp_path / "prompts.txt").write_text("Why?\n\nHow?\n")
    result = run("evaluate", chatty, small, "--prompts", tmp_path / "prompts.txt")
    assert result.exit_code == 0, result.output
    assert "answers that loop" in result.stdout
    assert "of 2" in result.stdout
    assert "> Why?" in result.stdout


@pytest.mark.real
def test_compress_warns_of_talk_and_heals(chatty: Path, cut: Path, tmp_path: Path) -> None:
    words = ("--ratio", 0.8, "--calibration", cut.parent / "text.txt", "--samples", 8, "--output", tmp_path / "small")
    result = run("compress", chatty, *words, "--heal", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["talk"][1]["divergence"] > 0.5
    assert found["healed"]["output"] == str(tmp_path / "small-healed")
    recipe = json.loads((tmp_path / "small" / "prune_peak.json").read_text())
    assert recipe["talk"]["before"]["prompts"] == 16
    if found["warnings"]:
        assert "mends a part of it" in found["warnings"][0]
    assert "answers that loop, of 16" in (tmp_path / "small" / "README.md").read_text()


def test_prompts_are_disjoint() -> None:
    """Those that quality is measured on at the end are not those of the package."""
    other = EXAMPLES.parent / "bench" / "prompts.txt"
    first, second = read_prompts(), read_prompts(other)
    assert len(first) == len(second) == 40
    assert not set(first) & set(second)


@pytest.mark.real
def test_two_processes_are_one(cut: Path, healed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "prune_peak", "heal"]
    words = [cut, "--original", LLAMA, "--data", cut.parent / "text.txt", "--tokens", "8k", "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *map(str, [*words, tmp_path / "healed"])], check=True, env=environment, timeout=300)
    recipes = [json.loads((folder / "prune_peak.json").read_text()) for folder in (healed, tmp_path / "healed")]
    first, second = (recipe["healing"]["divergence"]["after"] for recipe in recipes)
    assert second == pytest.approx(first, rel=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


def test_a_healed_card_says_that_answers_were_not_measured_again() -> None:
    talk = {"before": {"prompts": 16, "loops": 0}, "after": {"prompts": 16, "loops": 8}}
    [warning] = warn_of_answers_before({"talk": talk, "warnings": ["its answers are worse: 8 of 16 loop"]})
    assert "before healing 8 of 16 looped (the original's: 0)" in warning
    assert warn_of_answers_before({"talk": talk, "warnings": []}) == []
    assert warn_of_answers_before({"talk": {}, "warnings": ["perplexity"]}) == []
