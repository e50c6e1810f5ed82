"""`heal` for heads other than a causal one: masked language models, encoders, classifiers, and images."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import EXAMPLES
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

import prune_peak
from prune_peak.cli.main import main
from prune_peak.data.windows import IGNORED
from prune_peak.evaluation.divergence import divergence
from prune_peak.healing import objectives, training, windows
from prune_peak.healing.objectives import HiddenStates, find_objective, measure_distance
from prune_peak.healing.training import collate, into_batches
from prune_peak.healing.windows import HealingData, choose_data, load_data
from prune_peak.models.loading import open_model

ROBERTA, VIT = EXAMPLES / "roberta-mini", EXAMPLES / "vit-mini"
CPU = torch.device("cpu")
HEADS: list[tuple[str, dict[str, Any], str]] = [
    ("Model", {}, "HiddenStates"),
    ("ForSequenceClassification", {}, "Classes"),
]
OTHER_HEADS: list[tuple[str, dict[str, Any], str]] = [
    ("ForSequenceClassification", {"num_labels": 1}, "Values"),
    ("ForSequenceClassification", {"problem_type": "multi_label_classification", "num_labels": 3}, "Labels"),
    ("ForTokenClassification", {}, "TokenClasses"),
    ("ForQuestionAnswering", {}, "TokenClasses"),
    ("ForMultipleChoice", {}, "Values"),
]


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """Short runs are evaluated more than once, on little data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LEAST_STEPS", 2)
        patch.setattr(windows, "HELD_OUT", 512)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:40_000])
    return path


@pytest.fixture(scope="module")
def cut(text: Path) -> Path:
    """roberta-mini without half of its MLP neurons."""
    prune_peak.compress(ROBERTA, 0.5, text.parent / "cut", calibration=str(text), samples=4)
    return text.parent / "cut"


def heal(folder: Path, original: Path, *words: object) -> Any:
    return CliRunner().invoke(main, ["heal", str(folder), "--original", str(original), *map(str, words), "-q"])


def test_a_masked_model(cut: Path, text: Path) -> None:
    """It comes nearer at the masked tokens of held-out windows; the card tells, `verify` measures again."""
    result = heal(cut, ROBERTA, "--data", text, "--tokens", "4k", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["divergence_after"] < 0.95 * found["divergence_before"]
    healed = cut.parent / "cut-healed"
    model, info = AutoModelForMaskedLM.from_pretrained(healed, output_loading_info=True)
    assert not any(info.values())
    recipe = json.loads((cut / "prune_peak.json").read_text())
    rows = choose_data(open_model(str(ROBERTA)), recipe, str(text), 4000, 0).held_out
    original = AutoModelForMaskedLM.from_pretrained(ROBERTA)
    told = []
    for row in rows:
        masked = row["labels"] != IGNORED
        assert 0.1 < masked.float().mean() < 0.2
        with torch.inference_mode():
            pair = [each(row["input_ids"][None]).logits[0, masked] for each in (original, model)]
        told.append(divergence(*pair).mean().item())
    assert sum(told) / len(told) == pytest.approx(found["divergence_after"], rel=1e-4)
    assert "held-out windows of this data, its divergence from the original (KL per masked token" in (
        healed / "README.md"
    ).read_text().replace("\n", " ")
    words = ["verify", str(healed), "--original", str(ROBERTA), "--data", str(text), "-q"]
    assert "as near to the original as told" in CliRunner().invoke(main, words).stdout


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
@pytest.mark.real
def test_adapters_of_a_masked_model(cut: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    words = ("--data", text, "--tokens", "4k", "--method", "lora", "--output", tmp_path / "healed", "--json")
    result = heal(cut, ROBERTA, *words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["divergence_after"] < found["divergence_before"]
    first, second = (load_file(folder / "model.safetensors") for folder in (cut, tmp_path / "healed"))
    assert first.keys() == second.keys()


def test_own_text_of_a_masked_model_is_refused(cut: Path) -> None:
    result = heal(cut, ROBERTA, "--data", "self", "--output", cut.parent / "none")
    assert result.exit_code == 1
    assert "is a RobertaForMaskedLM, which generates no data; pass a text with --data" in result.stderr
    assert not (cut.parent / "none").exists()


@pytest.mark.parametrize(
    ("head", "settings", "objective"),
    [*HEADS, *(pytest.param(*head, marks=pytest.mark.real) for head in OTHER_HEADS)],
)
def test_every_head_learns(
    head: str, settings: dict[str, Any], objective: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps bring a model with noise in its weights nearer to the original."""
    folder, name = tmp_path / "model", f"Roberta{head}"
    torch.manual_seed(0)
    stock = getattr(transformers, name).from_pretrained(ROBERTA, **settings)
    stock.save_pretrained(folder)
    for path in ROBERTA.glob("token*.json"):
        shutil.copy(path, folder)
    source = open_model(str(folder))
    found = find_objective(source)
    assert type(found).__name__ == objective
    model = add_noise(source.load(torch.float32))
    recipe = {"options": {"sequence_length": 32, "calibration": []}}
    data = choose_data(source, recipe, str(text), 2048, 0)
    held_out = into_batches(found, data.held_out, CPU)
    original = source.load(torch.float32)
    before = measure_distance(found, original, model, held_out)
    monkeypatch.setitem(training.RATES, "full", 3e-5)
    training.train(found, original, model, data, 2048, "full", tmp_path / "run", 0, 512, True)
    after = measure_distance(found, original, model, held_out)
    assert 0 < after.divergence < before.divergence
    same = measure_distance(found, original, original, held_out)
    assert same.divergence == pytest.approx(0, abs=1e-6)
    assert same.score != before.score


@torch.no_grad()
def add_noise(model: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        if "output.dense.weight" in name:
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape)
    return model


def test_padding_does_not_count() -> None:
    """Of a row with padding, only the states of its tokens; the pooled state counts as much as they do together."""
    torch.manual_seed(0)
    original, model = (
        BaseModelOutputWithPooling(last_hidden_state=torch.randn(1, 4, 8), pooler_output=torch.randn(1, 8))
        for _ in range(2)
    )
    learned = HiddenStates(open_model(str(ROBERTA)))
    mask = torch.tensor([[1, 1, 1, 0]])
    found = learned.distances(original, model, {"attention_mask": mask})
    model.last_hidden_state[:, 3] = 100.0
    assert torch.equal(found, learned.distances(original, model, {"attention_mask": mask}))
    alone = learned.distances(
        *(BaseModelOutputWithPooling(last_hidden_state=o.last_hidden_state[:, :3]) for o in (original, model)), {}
    )
    pooled = learned.distances(
        *(BaseModelOutputWithPooling(last_hidden_state=o.pooler_output[:, None]) for o in (original, model)), {}
    )
    assert torch.allclose(found, (alone + pooled) / 2)


@pytest.fixture(scope="module")
def small_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vit-mini without most of its MLP neurons."""
    folder = tmp_path_factory.mktemp("vit") / "cut"
    data = str(EXAMPLES / "digits" / "calibration")
    prune_peak.compress(VIT, 0.9, folder, calibration=data, samples=32)
    return folder


def test_an_image_classifier(small_vit: Path, tmp_path: Path) -> None:
    """It comes nearer; a stopped run resumes to the same bytes, though the class has other names than its files."""
    words = ("--data", EXAMPLES / "digits" / "held-out", "--tokens", "4k")
    result = heal(small_vit, VIT, *words, "--output", tmp_path / "one", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["divergence_after"] < found["divergence_before"]
    assert found["score_original"] == 1
    card = (tmp_path / "one" / "README.md").read_text()
    assert "4,000 patches of held-out to predict what the original predicts" in card
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Progress", Stop)
        assert heal(small_vit, VIT, *words, "--output", tmp_path / "two").exit_code == 130
    assert list((tmp_path / "two.partial" / "training").glob("checkpoint-*"))
    assert heal(small_vit, VIT, *words, "--output", tmp_path / "two").exit_code == 0
    for name in ("model.safetensors", "prune_peak.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


class Stop(transformers.TrainerCallback):  # type: ignore[misc]
    """Interrupts a run after its third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_images_are_disjoint(small_vit: Path, tmp_path: Path) -> None:
    """From each other and from those of the calibration; a file of them gives the same again."""
    recipe = json.loads((small_vit / "prune_peak.json").read_text())
    data = choose_data(open_model(str(VIT)), recipe, str(EXAMPLES / "digits" / "calibration"), 10**6, 0)
    assert data.patches == 16
    assert data.tokens == 16 * len(data.train)
    assert len(data.train) + len(data.held_out) == 100 - 32
    assert len({row["pixel_values"].numpy().tobytes() for row in [*data.train, *data.held_out]}) == 68
    data.save(tmp_path / "data.safetensors")
    again = load_data(tmp_path / "data.safetensors")
    assert isinstance(again, HealingData)
    assert (again.digest, again.tokens) == (data.digest, data.tokens)
    assert collate(again.train[:2])["labels"].shape == (2, 1)


def test_too_few_images(small_vit: Path, tmp_path: Path) -> None:
    """None is left where the calibration took all."""
    (tmp_path / "few").mkdir()
    for path in sorted((EXAMPLES / "digits" / "calibration").glob("*.png"))[:4]:
        shutil.copy(path, tmp_path / "few")
    prune_peak.compress(VIT, 0.5, tmp_path / "cut", calibration=str(tmp_path / "few"), samples=4)
    result = heal(tmp_path / "cut", VIT, "--data", tmp_path / "few")
    assert result.exit_code == 1
    assert "has 0 images besides those of the calibration" in result.stderr.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "few"]


def test_a_head_that_is_not_supported(cut: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "MODEL_FOR_MASKED_LM_MAPPING_NAMES", {})
    result = heal(cut, ROBERTA, "--data", text, "--output", cut.parent / "none")
    assert result.exit_code == 1
    assert "is a RobertaForMaskedLM; heal supports" in result.stderr.replace("\n", " ")


@pytest.mark.real
def test_experts(text: Path, tmp_path: Path) -> None:
    """A mixture with fewer experts, in bfloat16, is healed and resumes to the same bytes."""
    original = EXAMPLES / "moe-mini"
    words = ("--data", text, "--tokens", "2k")
    options: dict[str, Any] = {"calibration": str(text), "samples": 2, "sites": ["experts"]}
    prune_peak.compress(original, 0.5, tmp_path / "cut", **options)
    result = heal(tmp_path / "cut", original, *words, "--output", tmp_path / "one", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["divergence_after"] < 0.95 * found["divergence_before"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "one"))
    assert {name: (t.shape, t.dtype) for name, t in first.items()} == {n: (t.shape, t.dtype) for n, t in second.items()}
    assert any(not torch.equal(first[name], second[name]) for name in first if "experts" in name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Progress", Stop)
        assert heal(tmp_path / "cut", original, *words, "--output", tmp_path / "two").exit_code == 130
    assert heal(tmp_path / "cut", original, *words, "--output", tmp_path / "two").exit_code == 0
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
