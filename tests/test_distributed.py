"""Two processes give the result of one process, and one that fails stops the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES
from safetensors.torch import load_file
from test_compress import run

from prune_peak.export.resume import RUN_FILE
from prune_peak.stats.histogram import COUNTS, EDGES, Stats

# a batch has 32 windows of 128 tokens, so each of two processes has one batch
CUT = ("--model", EXAMPLES / "llama-mini", "--ratio", "mlp=0.3,attention=0.5", "--samples", 40, "-q")

# `python -m prune_peak`, in whose rank 1 FAILURE runs in the second block
FAILING = """
import os, signal
from prune_peak.stats import collection
from prune_peak.cli.main import main
from prune_peak.errors import PrunePeakError

class FailingObserver(collection.SiteObserver):
    def add(self, neurons):
        if os.environ["RANK"] == "1" and self.site.block == 1:
            FAILURE
        super().add(neurons)

collection.SiteObserver = FailingObserver
main()
"""


def run_together(*words: object) -> subprocess.CompletedProcess[str]:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    return subprocess.run(
        [str(word) for word in (*torchrun, *words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.real
def test_two_processes_match_one(tmp_path: Path, text: Path) -> None:
    words = ("compress", *CUT, "--calibration", text, "--json", "--output")
    shared = run_together("-m", "prune_peak", *words, tmp_path / "shared")
    assert shared.returncode == 0, shared.stderr
    assert all(check["passed"] for check in json.loads(shared.stdout)["verification"]["checks"])
    assert run(*words, tmp_path / "alone").exit_code == 0
    plans, models = (
        [load_file(tmp_path / name / file) for name in ("shared", "alone")]
        for file in ("prune_peak_plan.safetensors", "model.safetensors")
    )
    for name, value in plans[1].items():  # peaks too, because histograms are exact counts
        assert torch.equal(plans[0][name], value), name
    for name, value in models[1].items():
        assert torch.allclose(models[0][name], value, rtol=1e-3, atol=1e-5), name


@pytest.mark.real
def test_two_processes_measure_the_statistics_of_one(tmp_path: Path, text: Path) -> None:
    words = ("calibrate", *CUT[:2], "--samples", 40, "-q", "--covariances", "--calibration", text, "--output")
    shared = run_together("-m", "prune_peak", *words, tmp_path / "shared")
    assert shared.returncode == 0, shared.stderr
    assert run(*words, tmp_path / "alone").exit_code == 0
    first, second = (load_file(tmp_path / name) for name in ("shared", "alone"))
    assert first.keys() == second.keys()
    for name, value in second.items():
        if value.is_floating_point():
            bound = 1e-6 * max(1.0, float(value.abs().max()))
            assert float((first[name] - value).abs().max()) <= bound, name
        else:
            assert torch.equal(first[name], value), name


@pytest.mark.real
def test_resume_with_two_processes(tmp_path: Path, text: Path) -> None:
    """Rank 0 skips the blocks that are written; the other rank collects only the rest."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.replace("FAILURE", "os.kill(os.getpid(), signal.SIGKILL)"))
    words = ("compress", *CUT, "--calibration", text, "--output")
    assert run_together(script, *words, tmp_path / "resumed").returncode == 1
    resumed = run_together("-m", "prune_peak", *words, tmp_path / "resumed")
    assert resumed.returncode == 0, resumed.stderr
    assert run_together("-m", "prune_peak", *words, tmp_path / "direct").returncode == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("resumed", "direct"))
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.real
def test_not_finite_activations_are_one_error(tmp_path: Path, text: Path) -> None:
    """All ranks find them in the sums; rank 0 reports them once."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.replace("FAILURE", 'neurons = neurons * float("inf")'))
    failed = run_together(script, "compress", *CUT, "--calibration", text, "--output", tmp_path / "cut")
    assert failed.returncode == 1
    assert failed.stdout == ""
    [error] = [line for line in failed.stderr.splitlines() if line.startswith("Error: ")]  # torchrun adds its own lines
    assert "model.layers.1." in error
    assert "has activations that are not finite" in error
    assert failed.stderr.count("not finite") == 1
    assert not (tmp_path / "cut.partial").exists()


@pytest.mark.real
def test_split_over_two_kinds_with_two_processes(tmp_path: Path, text: Path) -> None:
    """The allocation collects once, and the cut a second time."""
    words = ("compress", *CUT[:2], "--samples", 40, "-q", "--target-params", 0.9, "--sites", "mlp,attention")
    words = (*words, "--no-refit", "--calibration", text, "--output")
    shared = run_together("-m", "prune_peak", *words, tmp_path / "shared")
    assert shared.returncode == 0, shared.stderr
    assert run(*words, tmp_path / "alone").exit_code == 0
    plans = [load_file(tmp_path / name / "prune_peak_plan.safetensors") for name in ("shared", "alone")]
    assert all(torch.equal(plans[0][name], value) for name, value in plans[1].items())


@pytest.mark.real
@pytest.mark.parametrize(
    ("failure", "keeps_run"),
    [('raise PrunePeakError("block 1 is bad")', False), ("os.kill(os.getpid(), signal.SIGKILL)", True)],
    ids=["refuses", "killed"],
)
def test_failing_process_stops_both(failure: str, keeps_run: bool, tmp_path: Path, text: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.replace("FAILURE", failure))
    words = ("compress", *CUT, "--calibration", text, "--output", tmp_path / "cut")
    failed = run_together(script, *words)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert not (tmp_path / "cut").exists()
    if keeps_run:  # for a resume
        assert (tmp_path / "cut.partial" / RUN_FILE).exists()
    else:
        assert failed.stderr.count("Error: block 1 is bad") == 1
        assert not (tmp_path / "cut.partial").exists()


@pytest.mark.real
def test_more_processes_than_batches(tmp_path: Path, text: Path) -> None:
    words = ("--model", EXAMPLES / "opt-mini", "--ratio", 0.3, "--samples", 4, "--calibration", text)
    refused = run_together("-m", "prune_peak", "compress", *words, "--output", tmp_path / "cut")
    assert refused.returncode == 1
    assert refused.stderr.count("2 processes cannot share 1 batches") == 1


def test_shares_sum_to_the_whole() -> None:
    """The histogram counts the same subset of many tokens, however they are shared."""
    values = torch.randn(40_000, 3)
    whole, shares = Stats(3, 40_000), [Stats(3, 40_000, before) for before in (0, 17_001, 30_000)]
    assert whole.stride > 1
    whole.add(values)
    for share, part in zip(shares, values.split([17_001, 12_999, 10_000]), strict=True):
        for name in EDGES:
            setattr(share, name, getattr(whole, name))
        share.add(part)
    for name in (*COUNTS, "histogram", "repeats"):
        total = sum(torch.as_tensor(getattr(share, name)) for share in shares)
        assert torch.equal(total, torch.as_tensor(getattr(whole, name))), name
