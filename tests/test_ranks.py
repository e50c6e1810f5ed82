"""Two processes give what one gives, and end together."""

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

from prune_peak.progress import RUN_FILE
from prune_peak.stats import COUNTS, EDGES, Stats

# of windows of 128 tokens a batch has 32, so two processes have one batch each
CUT = ("--model", EXAMPLES / "llama-mini", "--ratio", "mlp=0.3,attention=0.5", "--samples", 40, "-q")

# Begins as `python -m prune_peak` does, with a second process that FAILURE happens to in the second block
FAILING = """
import os, signal
from prune_peak import calibration, cli
from prune_peak.errors import PrunePeakError

class Watch(calibration.Watch):
    def see(self, neurons):
        if os.environ["RANK"] == "1" and self.site.block == 1:
            FAILURE
        super().see(neurons)

calibration.Watch = Watch
cli.main()
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
def test_two_processes_give_the_plan_of_one(tmp_path: Path, text: Path) -> None:
    words = ("compress", *CUT, "--calibration", text, "--json", "--output")
    shared = run_together("-m", "prune_peak", *words, tmp_path / "shared")
    assert shared.returncode == 0, shared.stderr
    assert all(check["passed"] for check in json.loads(shared.stdout)["verification"]["checks"])
    assert run(*words, tmp_path / "alone").exit_code == 0
    plans, models = (
        [load_file(tmp_path / name / file) for name in ("shared", "alone")]
        for file in ("prune_peak_plan.safetensors", "model.safetensors")
    )
    for name, value in plans[1].items():  # peaks too: histograms are counts, and so exact
        assert torch.equal(plans[0][name], value), name
    for name, value in models[1].items():
        assert torch.allclose(models[0][name], value, rtol=1e-3, atol=1e-5), name


@pytest.mark.real
@pytest.mark.parametrize(
    ("failure", "stays"),
    [('raise PrunePeakError("block 1 is bad")', False), ("os.kill(os.getpid(), signal.SIGKILL)", True)],
    ids=["refuses", "killed"],
)
def test_a_process_that_fails_ends_both(failure: str, stays: bool, tmp_path: Path, text: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.replace("FAILURE", failure))
    words = ("compress", *CUT, "--calibration", text, "--output", tmp_path / "cut")
    failed = run_together(script, *words)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert not (tmp_path / "cut").exists()
    if stays:  # and can be gone on with
        assert (tmp_path / "cut.partial" / RUN_FILE).exists()
    else:
        assert failed.stderr.count("Error: block 1 is bad") == 1
        assert not (tmp_path / "cut.partial").exists()


@pytest.mark.real
def test_more_processes_than_batches_are_refused(tmp_path: Path, text: Path) -> None:
    words = ("--model", EXAMPLES / "opt-mini", "--ratio", 0.3, "--samples", 4, "--calibration", text)
    refused = run_together("-m", "prune_peak", "compress", *words, "--output", tmp_path / "cut")
    assert refused.returncode == 1
    assert refused.stderr.count("2 processes cannot share 1 batches") == 1


def test_shares_count_what_the_whole_counts() -> None:
    """Of many tokens a part is taken into the histogram: the same, however they are shared."""
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
