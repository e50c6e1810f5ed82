"""How much is cut: ratios by kind, and targets of parameters and bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLES
from test_compress import run
from tiny import BY_NAME, widths_of

import prune_peak
from prune_peak.conversion.choice import choose_conversion
from prune_peak.data.sampling import draw_windows
from prune_peak.data.windows import into_batches
from prune_peak.errors import PrunePeakError, UsageError
from prune_peak.evaluation.quality import build_eval_set
from prune_peak.inspection import inspect
from prune_peak.models.execution import ExecutionConfig
from prune_peak.models.loading import open_model
from prune_peak.options import AUTO, Budget, PruningOptions
from prune_peak.pruning.allocation import choose_allocation
from prune_peak.pruning.budget import count_parameters, find_allocations
from prune_peak.sites.finding import find_sites
from prune_peak.stats.collection import collect

MINI = str(EXAMPLES / "llama-mini")


@pytest.mark.parametrize("asked", [{}, {"ratio": 0.3, "target_params": 0.8}, {"target_params": 0.8, "target_bytes": 9}])
def test_exactly_one_budget(asked: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="pass one of ratio, target_params and target_bytes"):
        Budget(**asked)


def test_ratio_names_sites() -> None:
    assert Budget(ratio={"attention": 0.3, "mlp": 0.2}).kinds == ("attention", "mlp")
    assert Budget(ratio=0.3).kinds == ("mlp",)
    assert Budget(ratio=0.3, sites=("attention",)).kinds == ("attention",)
    with pytest.raises(UsageError, match="names mlp, but sites names attention"):
        Budget(ratio={"mlp": 0.2}, sites=("attention",))


@pytest.mark.parametrize("target", [0.9, 0.8, 0.7])
def test_the_widest_mlp_within_the_target(target: float) -> None:
    inspection = inspect(MINI, target_params=target)
    assert inspection.parameters_after <= target * inspection.parameters
    [mlp, _] = inspection.sites
    wider = inspect(MINI, 1 - (mlp.kept + mlp.step) / mlp.neurons)
    assert wider.parameters_after > target * inspection.parameters


def test_bytes_are_parameters_of_the_files_type() -> None:
    dense = inspect(MINI)
    assert inspect(MINI, target_bytes=int(0.8 * dense.bytes)).sites == inspect(MINI, target_params=0.8).sites


@pytest.mark.parametrize("told", [None, "float32"])
def test_bytes_are_those_of_the_files(told: str | None, tmp_path: Path) -> None:
    BY_NAME["llama-tied"].save(tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": told}))
    source = open_model(str(tmp_path))
    sites = find_sites(source.meta_model, source.family)
    [kept] = find_allocations(source, sites, Budget(target_bytes=int(0.9 * source.size)), AUTO)
    assert kept == find_allocations(source, sites, Budget(target_params=0.9), AUTO)[0]
    after = count_parameters(choose_conversion(source, sites, kept, source.dtype).meta_model) * source.dtype.itemsize
    assert 0.8 * source.size < after <= 0.9 * source.size


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"target_params": 0.9999}, None),
        ({"target_params": 0.1}, "the target cannot be reached: with one unit left at every site"),
        ({"target_bytes": 10**9}, "is within the target already"),
        ({"target_params": 0.8, "multiple_of": 4096}, "multiples of 4096 of 384 neurons would keep none"),
    ],
)
def test_targets_out_of_reach_are_refused(asked: dict[str, float], words: str | None) -> None:
    if words is None:
        assert inspect(MINI, **asked).sites[0].kept == 376
    else:
        with pytest.raises(PrunePeakError, match=words):
            inspect(MINI, **asked)


def test_target_over_both_kinds(tmp_path: Path, text: Path) -> None:
    result = prune_peak.compress(
        MINI,
        output=tmp_path / "cut",
        target_params=0.7,
        sites=("mlp", "attention"),
        calibration=str(text),
        samples=16,
    )
    assert result.verification.passed
    assert result.after.parameters <= 0.7 * result.before.parameters
    recipe = json.loads((tmp_path / "cut" / "prune_peak.json").read_text())
    assert recipe["options"]["target_params"] == 0.7
    assert recipe["options"]["sites"] == sorted({site["kind"] for site in recipe["sites"].values()})


@pytest.mark.parametrize(
    ("name", "target"), [("llama-mini", 0.7), pytest.param("mistral-mini", 0.85, marks=pytest.mark.real)]
)
def test_best_allocation_is_chosen(
    name: str, target: float, tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is foretold of every split is what the written checkpoint loses."""
    model, kinds = str(EXAMPLES / name), ("mlp", "attention")
    asked: dict[str, Any] = {"calibration": str(text), "samples": 16}
    with caplog.at_level("INFO", "prune_peak.pruning.allocation"):
        taken = prune_peak.compress(model, output=tmp_path / "taken", target_params=target, sites=kinds, **asked)
    foretold = [record.args[1] for record in caplog.records if record.name == "prune_peak.pruning.allocation"]  # type: ignore[index]
    source = open_model(model)
    sites = find_sites(source.meta_model, source.family, kinds)
    allocations = find_allocations(source, sites, Budget(target_params=target), AUTO)
    losses = []
    for number, kept in enumerate(allocations):
        ratio = {site.label: 1 - kept[site.name] / site.neurons for site in sites if site.name in kept}
        losses.append(prune_peak.compress(model, ratio, tmp_path / str(number), **asked).quality_after.loss)
    assert foretold == pytest.approx(losses, abs=1e-4)
    assert len(set(losses)) == len(allocations) > 1
    assert taken.quality_after.loss == pytest.approx(min(losses), rel=1e-6)


def test_allocations_are_compared_on_the_cpu(text: Path) -> None:
    """`meta` stands in for a device that blocks run on: an exam on it would have no losses."""
    source = open_model(MINI)
    sites = find_sites(source.meta_model, source.family, ("mlp", "attention"))
    allocations = find_allocations(source, sites, Budget(target_params=0.7), AUTO)
    windows = draw_windows(source, str(text), 4, 64, 0)
    eval_set = build_eval_set(source, windows.held_out, "held out")
    batches = into_batches(windows.calibration)
    taken = [
        choose_allocation(
            source,
            collect(source, sites, batches, torch.float32, for_refit=True),
            allocations,
            PruningOptions(),
            eval_set,
            torch.float32,
            ExecutionConfig(device=torch.device(name)),
        )
        for name in ("cpu", "meta")
    ]
    assert taken[0] == taken[1]


def test_allocations_have_the_widest_mlp() -> None:
    source = open_model(MINI)
    sites = find_sites(source.meta_model, source.family, ("mlp", "attention"))
    allocations = find_allocations(source, sites, Budget(target_params=0.8), AUTO)
    by_label = [{site.label: kept[site.name] for site in sites if site.name in kept} for kept in allocations]
    # of 128 neurons: one head or two of each group
    assert [kept.get("attention") for kept in by_label] == [64, None]
    for kept in by_label:
        widths = [widths_of(sites, {"attention": 128, **kept, "mlp": kept["mlp"] + more}) for more in (0, 8)]
        narrow, wide = (
            count_parameters(choose_conversion(source, sites, each, source.dtype).meta_model) for each in widths
        )
        assert narrow <= 0.8 * source.parameters < wide


@pytest.mark.parametrize(("unit", "cache"), [("head", 1.0), ("group", 0.5)])
def test_attention_is_cut_from_the_command_line(unit: str, cache: float, tmp_path: Path, text: Path) -> None:
    words = ("--ratio", "mlp=0.2,attention=0.5", "--unit", unit, "--calibration", text, "--samples", 16, "--json", "-q")
    result = run("compress", "--model", MINI, "--output", tmp_path / "cut", *words)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["share"] == {"mlp": pytest.approx(0.2, abs=0.02), "attention": 0.5}
    assert answer["after"]["cache"] == cache * answer["before"]["cache"]
    assert run("verify", tmp_path / "cut", "--original", MINI).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ratio", "0.3", "--target-params", "0.8"), "pass one of --ratio"),
        (("--target-params", "1.5"), "expected a share between 0 and 1"),
        (("--target-bytes", "many"), "expected a size such as 2GB"),
        (("--ratio", "mlp:0.3"), "expected a number, or mlp=NUMBER"),
        (("--ratio", "0.3", "--sites", "embedding"), "expected mlp, experts, expert-mlp, blocks, attention"),
    ],
)
def test_wrong_usage(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = run("compress", "--model", MINI, "--output", tmp_path / "cut", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_size_units() -> None:
    dense = inspect(MINI).bytes
    result = run("inspect", MINI, "--target-bytes", f"{dense * 0.8 / 1e6}MB", "--json")
    assert json.loads(result.stdout)["budget"] == f"bytes{int(dense * 0.8)}"


def test_fill_auto_reports_the_chosen_fills(tmp_path: Path, text: Path) -> None:
    words = ("--fill", "auto", "--no-refit", "--calibration", text, "--samples", 16, "-q", "--json")
    result = run("compress", "--model", MINI, "--ratio", 0.3, "--output", tmp_path / "cut", *words)
    assert result.exit_code == 0, result.output
    assert sum(json.loads(result.stdout)["fills"].values()) == 3
    fills = json.loads((tmp_path / "cut" / "prune_peak.json").read_text())["fills"]
    assert set(fills) == {f"model.layers.{block}.mlp.down_proj" for block in range(3)}
    assert set(fills.values()) <= {"peak", "mean", "median", "zero"}
