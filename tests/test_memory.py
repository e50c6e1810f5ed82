"""Memory planning: plans, refusals, and equal results for every plan."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLES
from test_compress import digests, run
from tiny import TINY, VOCABULARY, random_inputs

from prune_peak import memory
from prune_peak.data.windows import into_batches
from prune_peak.errors import PrunePeakError, UsageError
from prune_peak.memory import BASE_MEMORY, Workload, plan_execution
from prune_peak.models.execution import ExecutionConfig
from prune_peak.models.loading import Model, open_model
from prune_peak.models.streaming import BlockStream
from prune_peak.pruning import site_pruning
from prune_peak.sites.finding import find_sites
from prune_peak.stats.stats_file import load_statistics

MINI = EXAMPLES / "llama-mini"
LARGE = [tiny for tiny in TINY if tiny.name in ("llama", "gpt2", "vit", "bert", "falcon", "gemma3", "opt", "deberta")]


@pytest.fixture(scope="module")
def mini() -> Model:
    return open_model(str(MINI))


def load(source: Model, tokens: int = 2**20, length: int = 64, refit: bool = True) -> Workload:
    return Workload(find_sites(source.meta_model, source.family), tokens, length, refit, torch.float32)


def least(source: Model, asked: Workload) -> int:
    """What the smallest budget is that is not refused."""
    with pytest.raises(PrunePeakError) as refusal:
        plan_execution(source, asked, max_memory=1)
    return int(float(str(refusal.value).split(" needs ")[1].split(" GB")[0]) * 1e9) + 10**7


def test_smaller_budgets_use_the_disk_then_smaller_batches(mini: Model) -> None:
    asked = load(mini, tokens=10**6)
    plans = [plan_execution(mini, asked, budget) for budget in (8 * 10**9, BASE_MEMORY + 10**8, least(mini, asked))]
    assert [plan.hidden_states_on_disk for plan in plans] == [False, True, True]
    assert [plan.release_memory for plan in plans] == [False, True, True]
    assert plans[0].batch_tokens == plans[1].batch_tokens == memory.BATCH_TOKENS > plans[2].batch_tokens
    assert plans[0].needed > plans[1].needed > plans[2].needed


def test_too_small_budget_is_refused(mini: Model) -> None:
    with pytest.raises(
        PrunePeakError,
        match=r"needs 0\.\d\d GB of memory .* the budget is 0\.10 GB.*a max_memory of 0\.\d\d GB or more\.$",
    ):
        plan_execution(mini, load(mini), 10**8)
    with pytest.raises(PrunePeakError, match="generates its own text with the whole model"):
        plan_execution(mini, Workload((), 64, 64, False, torch.float32, samples_text=True), 10**8)


def test_hidden_states_in_a_file_are_the_same(tmp_path: Path) -> None:
    source = open_model(str(TINY[0].save(tmp_path)))
    batches = into_batches(torch.randint(3, VOCABULARY, (5, 24)), tokens=48)  # the last one is shorter
    streams = [
        BlockStream(source, batches, torch.bfloat16, ExecutionConfig(hidden_states_on_disk=hidden_states_on_disk))
        for hidden_states_on_disk in (False, True)
    ]
    outputs = []
    for stream in streams:
        powers = torch.stack([step.powers() for step in stream.steps()])
        outputs.append((powers, [output.logits for output in stream.outputs()]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert all(torch.equal(first, second) for first, second in zip(outputs[0][1], outputs[1][1], strict=True))


@pytest.mark.parametrize("tiny", LARGE, ids=lambda tiny: tiny.name)
def test_blocks_run_on_another_device(tiny: object, tmp_path: Path) -> None:
    """`meta` replaces a GPU: a tensor left on the CPU would raise an error."""
    source = open_model(str(tiny.save(tmp_path)))  # type: ignore[attr-defined]
    stream = BlockStream(
        source, [random_inputs(source.meta_model, 2)], torch.float32, ExecutionConfig(device=torch.device("meta"))
    )
    step = next(stream.steps())
    assert all(value.is_meta for value in [*step.block.parameters(), *step.block.buffers()])
    assert step.output(0).is_meta


def test_refitted_weights_of_one_block_in_memory(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refitted weights of written blocks are freed."""
    readers: list[weakref.ref[torch.Tensor]] = []
    alive = []
    refit_best = site_pruning.refit_best

    def refitting(*args: Any) -> Any:
        alive.append(sum(reader() is not None for reader in readers))
        choice, fitted = refit_best(*args)
        readers.append(weakref.ref(choice.weight))
        return choice, fitted

    monkeypatch.setattr(site_pruning, "refit_best", refitting)
    words = ("--ratio", 0.3, "--calibration", text, "--samples", 4, "--sequence-length", 32, "-q")
    assert run("compress", "--model", MINI, "--output", tmp_path / "cut", *words).exit_code == 0
    assert len(alive) > 2
    assert not any(alive)
    assert not any(reader() is not None for reader in readers)


def test_missing_device_is_refused(mini: Model) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match=r"device='cuda': torch .* finds no such device here. Use device='cpu'\."):
        plan_execution(mini, load(mini), device="cuda")


def test_a_tiny_budget_ends_in_a_sentence(mini: Model) -> None:
    """Nothing needs less, so the memory that is enough is all the advice."""
    with pytest.raises(PrunePeakError, match=r"budget is 0\.01 GB\. Pass a max_memory of 0\.\d\d GB or more\.$"):
        plan_execution(mini, load(mini), 10_000_000)


@pytest.mark.real
def test_a_budget_from_the_command_line(tmp_path: Path, text: Path) -> None:
    words = ("--ratio", 0.3, "--calibration", text, "--samples", 8, "--sequence-length", 32, "--json", "-q")
    for name, budget in (("tight", "0.65GB"), ("wide", "8GB"), ("default", None)):
        extra = () if budget is None else ("--max-memory", budget)
        result = run("compress", "--model", MINI, "--output", tmp_path / name, *words, *extra)
        assert result.exit_code == 0, result.output
    recipes = [json.loads((tmp_path / name / "prune_peak.json").read_text()) for name in ("tight", "wide")]
    assert [recipe["options"]["max_memory"] for recipe in recipes] == [650_000_000, 8_000_000_000]
    assert recipes[0]["tensors"] == recipes[1]["tensors"], "all tokens fit into one batch"
    assert digests(tmp_path / "wide").keys() == digests(tmp_path / "default").keys()
    refused = run("compress", "--model", MINI, "--output", tmp_path / "no", *words, "--max-memory", "100MB")
    assert refused.exit_code == 1
    assert "the budget is 0.10 GB" in refused.stderr
    assert not (tmp_path / "no.partial").exists()


def test_dry_run_reports_the_plan(text: Path) -> None:
    words = ("compress", "--model", MINI, "--ratio", 0.3, "--calibration", text, "--samples", 4, "--dry-run", "--json")
    answer = json.loads(run(*words, "--max-memory", "2GB").stdout)
    assert BASE_MEMORY < answer["memory"] <= 2 * 10**9
    assert run(*words, "--max-memory", "100MB").exit_code == 1


def test_memory_with_statistics_from_a_file(tmp_path: Path, text: Path) -> None:
    """Covariances need the same memory; there are no hidden states and no sampled text."""
    plans = {}
    for samples in (2, 40):  # fewer tokens than neurons, and more
        path = tmp_path / f"{samples}.stats"
        words = ("--output", path, "--samples", samples, "--covariances", "-q")
        assert run("calibrate", "--model", MINI, *words, "--calibration", text).exit_code == 0
        told = run("compress", "--model", MINI, "--ratio", 0.3, "--stats", path, "--dry-run", "--json", "-q")
        plans[samples] = json.loads(told.stdout)["memory"]
    source = open_model(str(MINI))
    sites = find_sites(source.meta_model, source.family)
    asked = load_statistics(tmp_path / "40.stats", source, sites).workload(source, sites, for_refit=True)
    assert (asked.tokens, asked.is_measured, asked.samples_text) == (40 * 128, True, False)
    spilling = replace(asked, is_measured=False)
    assert memory._most_resident(source, asked, 128, False) == memory._most_resident(source, spilling, 128, True)
    neurons = sites[0].neurons
    assert memory._most_resident(source, asked, 128, False) >= BASE_MEMORY + 40 * neurons**2
    assert plans[40] >= plans[2] > BASE_MEMORY


def test_planned_by_default(mini: Model) -> None:
    plan = plan_execution(mini, load(mini, tokens=4096))
    assert (plan.batch_tokens, plan.hidden_states_on_disk, plan.whole_size) == (
        ExecutionConfig().batch_tokens,
        False,
        memory.WHOLE_SIZE,
    )
