"""The study measures what it says: its hooks are the law's, its errors are right, and a stopped one goes on."""

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import EXAMPLES
from tiny import BY_NAME, TINY, VOCABULARY, Tiny

from prune_peak import compress
from prune_peak.cli.main import main
from prune_peak.data.sampling import split_windows
from prune_peak.errors import PrunePeakError, UsageError
from prune_peak.evaluation.quality import (
    MASKED_ACCURACY,
    PERPLEXITY,
    EvalSet,
    WindowScores,
    build_eval_set,
    evaluate_model,
)
from prune_peak.export.recipe import read_plan
from prune_peak.models.loading import IMAGES, open_model
from prune_peak.options import FILLS, SELF
from prune_peak.sites.finding import find_sites
from prune_peak.sites.hooks import ablated, draw_others, resampled
from prune_peak.sites.plan import SitePlan
from prune_peak.studies.ablation import Study, ablate, conclude
from prune_peak.studies.curves import CROSS_ENTROPY, Curve, is_significant, mean_and_error
from prune_peak.studies.options import AblateOptions
from prune_peak.studies.runner import TrialRunner, find_studied, load_whole, summarize
from prune_peak.studies.study_data import load_study_data
from prune_peak.studies.trials import Trial

LLAMA = str(EXAMPLES / "llama-mini")
SMALL: dict[str, Any] = {"samples": 2, "sequence_length": 48, "seeds": 2, "fraction": (0.0, 0.5)}


def bench_of(tiny: Tiny, folder: Path) -> TrialRunner:
    """On random tokens, every one of which is to be predicted at its own place."""
    source = open_model(str(tiny.save(folder)))
    sites = find_studied(source)
    windows = torch.randint(3, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    eval_set = EvalSet(PERPLEXITY, "noise", [{"input_ids": part} for part in windows.split(1)], windows.split(1))
    return TrialRunner(tiny.build(), sites, summarize(source, sites, windows, torch.float32), eval_set)


def check_equal(ours: WindowScores, theirs: WindowScores) -> None:
    assert torch.equal(ours.losses, theirs.losses)
    assert torch.equal(ours.hits, theirs.hits)


KINDS = ("mlp", "attention")
FEW = [BY_NAME[name] for name in ("gpt2", "llama-biased", "opt", "bert")]


@pytest.mark.parametrize("tiny", {tiny.family: tiny for tiny in TINY}.values(), ids=lambda tiny: tiny.name)
def test_every_site_of_every_family_can_be_studied(tiny: Tiny, tmp_path: Path) -> None:
    source = open_model(str(tiny.save(tmp_path)))
    sites = find_studied(source)
    kinds = ["mlp"] if source.family.attention is None else ["attention", "mlp"]
    assert [site.label for site in sites][: 3 * len(kinds)] == 3 * kinds
    assert {site.unit for site in sites} == {1}


@pytest.mark.parametrize("tiny", FEW, ids=lambda tiny: tiny.name)
def test_resampling_from_its_own_token_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    runner = bench_of(tiny, tmp_path)
    baseline = runner.evaluate()
    none_kept = {site.name: torch.empty(0, dtype=torch.int64) for site in runner.sites}
    with resampled(runner.model, runner.sites, none_kept, torch.arange):
        check_equal(runner.evaluate(), baseline)
    with resampled(runner.model, runner.sites, none_kept, draw_others(torch.Generator().manual_seed(0))):
        assert (runner.evaluate().losses - baseline.losses).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiny", FEW, ids=lambda tiny: tiny.name)
def test_zero_at_fraction_one_is_a_weight_of_zero(tiny: Tiny, kind: str, tmp_path: Path) -> None:
    runner = bench_of(tiny, tmp_path)
    baseline = runner.evaluate()
    held = runner.measure(Trial(kind, "zero", 1.0, 0))
    check_equal(runner.evaluate(), baseline)  # the hooks are gone
    for site in runner.sites:
        if site.label == kind:
            torch.nn.init.zeros_(runner.model.get_parameter(site.weight))
    zeroed = runner.evaluate()
    check_equal(held, zeroed)
    assert (zeroed.losses - baseline.losses).abs().max() > 1e-4


def test_the_peak_of_a_constant_neuron_is_that_constant(tmp_path: Path) -> None:
    tiny, neuron = BY_NAME["gpt2"], 5
    model = tiny.build()
    for block in model.transformer.h:
        block.mlp.c_fc.weight.data[:, neuron] = 0.0
        block.mlp.c_fc.bias.data[neuron] = 0.7
    model.save_pretrained(tmp_path)
    source = open_model(str(tmp_path))
    sites = find_studied(source, ["mlp"])
    windows = torch.randint(3, VOCABULARY, (4, 32))
    summaries = summarize(source, sites, windows, torch.float32)
    constant = model.transformer.h[0].mlp.act(torch.tensor(0.7)).item()
    assert [summary.peak[neuron].item() for summary in summaries.values()] == pytest.approx([constant] * len(sites))
    others = torch.tensor([index for index in range(sites[0].neurons) if index != neuron])
    plan = {name: SitePlan(others, summary.peak.float()) for name, summary in summaries.items()}
    with torch.inference_mode(), ablated(model, sites, plan):
        held = model(windows).logits
    torch.testing.assert_close(held, model(windows).logits, rtol=1e-5, atol=1e-5)


def test_an_ablation_at_the_plan_of_an_export_equals_that_export(text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": str(text), "samples": 4, "sequence_length": 48}
    compress(LLAMA, {"mlp": 0.3, "attention": 0.5}, tmp_path / "cut", refit=False, **options)
    source = open_model(LLAMA)
    sites = find_sites(source.meta_model, source.family, KINDS)
    eval_set = build_eval_set(source, split_windows(source, str(text), 4, 4, 48, 0).held_out, "text")
    runner = TrialRunner(load_whole(source, torch.float32), sites, {}, eval_set)
    dense = runner.evaluate()
    with ablated(runner.model, sites, read_plan(tmp_path / "cut")):
        held = runner.evaluate()
    written = evaluate_model(open_model(str(tmp_path / "cut")), eval_set)
    torch.testing.assert_close(written.losses, held.losses, rtol=2e-5, atol=0)
    assert torch.equal(written.hits, held.hits)
    assert (held.losses - dense.losses).abs().min() > 0.01


def test_a_resampled_token_takes_every_value_once_and_never_its_own() -> None:
    draw = draw_others(torch.Generator().manual_seed(0))
    for tokens in (2, 3, 100):
        others = draw(tokens)
        assert sorted(others.tolist()) == list(range(tokens))
        assert not (others == torch.arange(tokens)).any()


@pytest.fixture(scope="module")
def study_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("study") / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:30_000])
    return str(path)


def test_the_same_seed_gives_the_same_rows(study_text: str, tmp_path: Path) -> None:
    studies = [
        ablate(LLAMA, tmp_path / str(number), calibration=study_text, seed=seed, **SMALL)
        for number, seed in enumerate((0, 0, 5))
    ]
    assert studies[0].to_json() == studies[1].to_json()
    losses = [[row["cross_entropy"] for row in study.measurements if row["fraction"]] for study in studies]
    assert not set(losses[0]) & set(losses[2])


def test_table_is_tidy(study_text: str, tmp_path: Path) -> None:
    study = ablate(LLAMA, tmp_path / "study", calibration=study_text, **SMALL)
    rows = json.loads((tmp_path / "study" / "measurements.json").read_text())
    assert rows == study.to_json()
    assert list(rows[0])[:6] == ["model", "site", "fill", "fraction", "select", "seed"]
    assert list(rows[0])[6:10] == ["cross_entropy", "cross_entropy_stderr", "top1", "top1_stderr"]
    trials = [(row["site"], row["fill"], row["fraction"], row["seed"]) for row in rows]
    assert len(set(trials)) == len(trials) == 2 * (len(FILLS) + 1) * 2 * 2
    assert len({row["cross_entropy"] for row in rows if row["fraction"] == 0}) == 1  # intact, under every fill
    with (tmp_path / "study" / "measurements.csv").open() as file:
        assert [float(row["top1"]) for row in csv.DictReader(file)] == [row["top1"] for row in rows]
    areas = json.loads((tmp_path / "study" / "areas.json").read_text())
    mean = [row["cross_entropy"] for row in rows if (row["site"], row["fill"]) == ("mlp", "peak") and row["fraction"]]
    expected = (sum(mean) / 2 - rows[0]["cross_entropy"]) * 0.5 / 2  # one trapezoid, a triangle
    assert areas[0]["area"] == pytest.approx(expected)


def test_the_conclusion_names_what_the_errors_tell_apart() -> None:
    def area(fill: str, value: float) -> dict[str, Any]:
        return {"site": "mlp", "metric": CROSS_ENTROPY, "fill": fill, "area": value}

    areas = [area("peak", 0.5), area("zero", 2.0), area("mean", 0.6)]
    for significant in (True, False):
        comparisons = [
            {"site": "mlp", "metric": CROSS_ENTROPY, "fill": "peak", "other": "zero", "significant": significant},
            {"site": "mlp", "metric": CROSS_ENTROPY, "fill": "zero", "other": "mean", "significant": True},
        ]
        said = conclude(Study(Path(), {}, (), areas, comparisons, ()))
        assert said.startswith("In mlp neurons, peak costs least (0.500 nats) and zero most (2.000)")
        assert said.endswith("which the errors do not tell apart.") is not significant


def test_stopped_study_resumes(study_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ablate(LLAMA, tmp_path / "whole", calibration=study_text, **SMALL)
    measured: list[Trial] = []
    measure = TrialRunner.measure

    def stop_at_the_eighth(runner: TrialRunner, trial: Trial) -> WindowScores:
        measured.append(trial)
        if len(measured) == 8:
            raise KeyboardInterrupt
        return measure(runner, trial)

    monkeypatch.setattr(TrialRunner, "measure", stop_at_the_eighth)
    options = ["--samples", "2", "--sequence-length", "48", "--seeds", "2", "--fraction", "0", "--fraction", "0.5"]
    output = str(tmp_path / "stopped")
    arguments = ["ablate", "--model", LLAMA, "--calibration", study_text, "--output", output, "-q", *options]
    stopped = CliRunner().invoke(main, arguments)
    assert stopped.exit_code == 130
    assert "the same command resumes" in stopped.stderr
    file = tmp_path / "stopped" / "trials.jsonl"
    assert len(file.read_text().splitlines()) == 8  # the question, and seven cells
    with file.open("a") as half:
        half.write('{"site": "mlp", "fi')
    study = ablate(LLAMA, tmp_path / "stopped", calibration=study_text, **SMALL)
    assert len(measured) == len(set(measured)) + 1 == study.protocol["trials"] + 1
    assert study.to_json() == whole.to_json()
    for changed in ({"samples": 3}, {"sequence_length": 40}, {"dtype": "bfloat16"}, {"select": "ranked"}):
        with pytest.raises(PrunePeakError, match="belongs to another study"):
            ablate(LLAMA, tmp_path / "stopped", calibration=study_text, **(SMALL | changed))
    assert ablate(LLAMA, tmp_path / "stopped", calibration=study_text, **SMALL).to_json() == whole.to_json()
    again = ablate(LLAMA, tmp_path / "stopped", calibration=study_text, force=True, **(SMALL | {"samples": 3}))
    assert again.measurements[0]["windows"] == 3


def test_a_default_study_runs_the_model_91_times_a_seed(study_text: str, tmp_path: Path) -> None:
    passes = 0

    def count(module: torch.nn.Module, _: Any) -> None:
        nonlocal passes
        passes += type(module).__name__ == "LlamaForCausalLM"

    with torch.nn.modules.module.register_module_forward_pre_hook(count):
        study = ablate(LLAMA, tmp_path / "study", calibration=study_text, samples=2, sequence_length=16, seeds=1)
    assert len(study.measurements) == 100
    assert passes == 91  # fraction 0 once; the calibration runs the blocks alone, once


def test_a_ranked_study_cuts_what_a_score_ranks_lowest(study_text: str, tmp_path: Path) -> None:
    options = SMALL | {"fraction": (0.3,), "sites": ("mlp",), "fill": ("mean", "resample")}
    random, ranked = (
        ablate(LLAMA, tmp_path / select, calibration=study_text, select=select, **options)
        for select in ("random", "ranked")
    )
    assert [row["seed"] for row in ranked.measurements if row["fraction"]] == [0, 0]
    for fill in ("mean", "resample"):
        losses = [
            max(row["cross_entropy"] for row in study.measurements if row["fraction"] and row["fill"] == fill)
            for study in (random, ranked)
        ]
        assert losses[1] < losses[0]


def test_calibration_and_evaluation_share_no_window(study_text: str) -> None:
    source = open_model(LLAMA)
    for samples, scored in ((6, 6), (6, 2), (500, 500)):
        windows = split_windows(source, study_text, samples, scored, 48, 0)
        rows = [{tuple(row) for row in part.tolist()} for part in (windows.calibration, windows.held_out)]
        assert all(rows)
        assert not rows[0] & rows[1]


def test_several_texts_share_no_window(study_text: str, tmp_path: Path) -> None:
    """A text to calibrate on is one of two to evaluate on."""
    (tmp_path / "other.txt").write_text(Path(study_text).read_text()[::-1])
    words = {"calibration": study_text, "data": [study_text, str(tmp_path / "other.txt")]}
    study_data = load_study_data(open_model(LLAMA), AblateOptions(samples=8, windows=8, sequence_length=48, **words))
    evaluated = torch.cat([batch["input_ids"] for batch in study_data.eval_set.batches])
    rows = [{tuple(row) for row in part.tolist()} for part in (study_data.calibration, evaluated)]
    assert len(rows[1]) == 8
    assert not rows[0] & rows[1]


def test_own_text_needs_no_text(tmp_path: Path) -> None:
    study = ablate(LLAMA, tmp_path / "study", fill=["peak"], **SMALL)
    assert study.protocol["calibration"] == study.protocol["text"] == "the model's own text"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fill": ["average"]}, "fill='average'"),
        ({"fraction": [1.5]}, "fraction=1.5"),
        ({"sites": ["heads"]}, "sites='heads'"),
        ({"select": "best"}, "select='best'"),
        ({"score": "elimination"}, "score='elimination'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"seeds": 0}, "seeds=0"),
        ({"samples": 0}, "samples=0"),
        ({"windows": 0}, "windows=0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_usage_errors(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        ablate(LLAMA, tmp_path / "study", **options)
    assert not (tmp_path / "study").exists()


def test_unsupported_studies(text: Path, tmp_path: Path) -> None:
    tiny = BY_NAME["gpt2"].build()
    tiny.transformer.save_pretrained(tmp_path / "body")
    with pytest.raises(PrunePeakError, match="GPT2Model, which predicts nothing"):
        ablate(str(tmp_path / "body"), tmp_path / "study", calibration=str(text))
    text.write_text("Too short.")
    with pytest.raises(PrunePeakError, match="fewer than one window"):
        ablate(LLAMA, tmp_path / "study", calibration=str(text))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "trials.jsonl").write_text("something else\n")
    with pytest.raises(PrunePeakError, match=r"another study \(unreadable\)"):
        ablate(LLAMA, tmp_path / "study", **SMALL)


def test_standard_errors_cover_windows_and_seeds() -> None:
    """Over many simulated studies the mean of the squared errors is the variance of the means."""
    generator = torch.Generator().manual_seed(0)
    for window_spread, seed_spread in ((1.0, 0.0), (0.0, 1.0), (0.7, 0.7)):
        seen = []
        for _ in range(600):
            windows = window_spread * torch.randn(1, 8, generator=generator)
            seeds = seed_spread * torch.randn(6, 1, generator=generator)
            seen.append(mean_and_error(windows + seeds + 0.5 * torch.randn(6, 8, generator=generator)))
        means, errors = torch.tensor(seen).T
        assert 0.9 < errors.square().mean() / means.var() < 1.3
    assert mean_and_error(torch.tensor([[2.0]])) == (2.0, None)
    values = torch.randn(1, 9, generator=generator, dtype=torch.float64)
    assert mean_and_error(values)[1] == pytest.approx(values.std().item() / 3)


def test_an_area_is_that_of_trapezoids_and_no_order_is_claimed_within_the_errors() -> None:
    fractions = (0.0, 0.5, 1.0)
    changes = torch.tensor(fractions, dtype=torch.float64)[:, None, None].expand(3, 2, 4)
    assert torch.equal(
        Curve("mlp", "zero", CROSS_ENTROPY, fractions, changes).areas(), torch.full((2, 4), 0.5).double()
    )
    assert is_significant(-1.0, 0.3)
    assert not is_significant(-1.0, 0.4)
    assert not is_significant(1.0, None)


@pytest.mark.draws
def test_the_command_prints_the_table_and_draws(study_text: str, tmp_path: Path) -> None:
    arguments = ["ablate", "--model", LLAMA, "--calibration", study_text, "--samples", "2", "--sequence-length", "32"]
    arguments += ["--fill", "peak", "--fraction", "0.3", "--seeds", "1", "--output", str(tmp_path / "study"), "-q"]
    answer = CliRunner().invoke(main, [*arguments, "--json"])
    assert answer.exit_code == 0, answer.stderr
    assert [row["fraction"] for row in json.loads(answer.stdout)] == [0.0, 0.3, 0.0, 0.3]
    picture = (tmp_path / "study" / "degradation.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    page = (tmp_path / "study" / "report.html").read_text()
    [cost] = [row["area"] for row in json.loads((tmp_path / "study" / "areas.json").read_text())
              if (row["site"], row["metric"]) == ("mlp", CROSS_ENTROPY)]  # fmt: skip
    assert f"n mlp neurons, peak costs {cost:.3f} nats" in page
    assert base64.b64encode(picture).decode() in page
    assert f"prune-peak ablate {LLAMA} --sequence-length 32 --calibration {study_text}" in page
    told = CliRunner().invoke(main, arguments)
    assert told.exit_code == 0
    assert "Area under the curve, increase of cross-entropy in nats" in told.stdout
    assert (tmp_path / "study" / "degradation.png").read_bytes() == picture


def test_without_matplotlib_the_tables_are_written(
    study_text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ablate(LLAMA, tmp_path / "study", calibration=study_text, fill=["peak"], **SMALL)
    assert (tmp_path / "study" / "measurements.csv").is_file()
    assert not (tmp_path / "study" / "degradation.png").exists()
    assert [record.message for record in caplog.records if "[plots]" in record.message]


def test_masked_model_is_evaluated_on_masked_tokens(study_text: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"fill": ["mean", "resample"], "fraction": (0.6,), "seeds": 1, "samples": 6}
    study = ablate(str(EXAMPLES / "roberta-mini"), tmp_path / "study", calibration=study_text, **options)
    assert study.protocol["metric"] == MASKED_ACCURACY
    rows = {(row["site"], row["fill"], row["fraction"]): row for row in study.measurements}
    for site in KINDS:
        assert rows[site, "mean", 0.0]["top1"] > 0.35
        losses = [rows[site, fill, 0.6]["cross_entropy"] for fill in ("mean", "resample")]
        assert rows[site, "mean", 0.0]["cross_entropy"] < losses[0] < losses[1]


VIT, DIGITS = str(EXAMPLES / "vit-mini"), EXAMPLES / "digits"


def test_image_classifier_is_evaluated_on_labels(tmp_path: Path) -> None:
    options: dict[str, Any] = {"fill": ["zero", "resample"], "fraction": (0.6,), "seeds": 1, "samples": 20}
    study = ablate(VIT, tmp_path / "study", data=str(DIGITS / "held-out"), windows=40, **options)
    assert (study.protocol["metric"], study.protocol["windows"]) == ("image accuracy", 40)
    rows = {(row["site"], row["fill"], row["fraction"]): row for row in study.measurements}
    assert rows["mlp", "zero", 0.0]["top1"] > 0.8
    assert rows["mlp", "resample", 0.6]["cross_entropy"] > rows["mlp", "resample", 0.0]["cross_entropy"]
    with pytest.raises(PrunePeakError, match="pass a folder of labelled images with data"):
        ablate(VIT, tmp_path / "other")
    with pytest.raises(PrunePeakError, match="is a file, and the model takes images"):
        ablate(VIT, tmp_path / "other", data=__file__)
    with pytest.raises(PrunePeakError, match="is a folder of images, and the model reads text"):
        ablate(LLAMA, tmp_path / "other", data=str(DIGITS / "held-out"))


def test_calibration_and_evaluation_images_are_disjoint() -> None:
    source = open_model(VIT)
    for calibration in (SELF, str(DIGITS / "held-out")):
        study_data = load_study_data(
            source, AblateOptions(calibration=calibration, data=str(DIGITS / "held-out"), samples=50, windows=60)
        )
        parts = [
            {image.numpy().tobytes() for image in part}
            for part in (study_data.calibration, study_data.eval_set.batches[0][IMAGES])
        ]
        assert len(parts[0]) == 50
        assert len(parts[1]) == 60
        assert not parts[0] & parts[1]
