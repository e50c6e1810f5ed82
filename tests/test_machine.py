"""How a run keeps to its memory: what is planned, what is refused, and that the numbers stay the same."""

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

from prune_peak import machine, planning
from prune_peak.blocks import BlockStream
from prune_peak.calibration import into_batches
from prune_peak.errors import PrunePeakError
from prune_peak.machine import BASE_MEMORY, Load, Machine, plan_machine
from prune_peak.sites import find_sites
from prune_peak.source import Source, open_source
from prune_peak.stats_file import load_statistics

MINI = EXAMPLES / "llama-mini"
LARGE = [tiny for tiny in TINY if tiny.name in ("llama", "gpt2", "vit", "bert", "falcon", "gemma3", "opt", "deberta")]


@pytest.fixture(scope="module")
def mini() -> Source:
    return open_source(str(MINI))


def load(source: Source, tokens: int = 2**20, length: int = 64, refit: bool = True) -> Load:
    return Load(find_sites(source.blank, source.family), tokens, length, refit, torch.float32)


def least(source: Source, asked: Load) -> int:
    """What the smallest budget is that is not refused."""
    with pytest.raises(PrunePeakError) as refusal:
        plan_machine(source, asked, max_memory=1)
    return int(float(str(refusal.value).split(" needs ")[1].split(" GB")[0]) * 1e9) + 10**7


def test_a_smaller_budget_spills_first_then_runs_fewer_tokens(mini: Source) -> None:
    asked = load(mini, tokens=10**6)
    plans = [plan_machine(mini, asked, budget) for budget in (8 * 10**9, BASE_MEMORY + 10**8, least(mini, asked))]
    assert [plan.spills for plan in plans] == [False, True, True]
    assert [plan.frugal for plan in plans] == [False, True, True]
    assert plans[0].batch_tokens == plans[1].batch_tokens == machine.BATCH_TOKENS > plans[2].batch_tokens
    assert plans[0].needed > plans[1].needed > plans[2].needed


def test_what_cannot_be_kept_to_is_refused_with_what_would_be(mini: Source) -> None:
    with pytest.raises(PrunePeakError, match=r"needs 0\.\d\d GB of memory .* may use 0\.10 GB.*larger --max-memory"):
        plan_machine(mini, load(mini), 10**8)
    with pytest.raises(PrunePeakError, match="writes its own text from the whole model"):
        plan_machine(mini, Load((), 64, 64, False, torch.float32, samples_text=True), 10**8)


def test_hidden_states_in_a_file_are_the_same(tmp_path: Path) -> None:
    source = open_source(str(TINY[0].save(tmp_path)))
    batches = into_batches(torch.randint(3, VOCABULARY, (5, 24)), tokens=48)  # the last one is shorter
    streams = [BlockStream(source, batches, torch.bfloat16, Machine(spills=spills)) for spills in (False, True)]
    outputs = []
    for stream in streams:
        powers = torch.stack([step.powers() for step in stream.steps()])
        outputs.append((powers, [output.logits for output in stream.outputs()]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert all(torch.equal(first, second) for first, second in zip(outputs[0][1], outputs[1][1], strict=True))


@pytest.mark.parametrize("tiny", LARGE, ids=lambda tiny: tiny.name)
def test_blocks_run_on_another_device(tiny: object, tmp_path: Path) -> None:
    """`meta` stands in for one: whatever of a block or its call were left behind would not mix with it."""
    source = open_source(str(tiny.save(tmp_path)))  # type: ignore[attr-defined]
    stream = BlockStream(source, [random_inputs(source.blank, 2)], torch.float32, Machine(device=torch.device("meta")))
    step = next(stream.steps())
    assert all(value.is_meta for value in [*step.block.parameters(), *step.block.buffers()])
    assert step.answer(0).is_meta


def test_the_refitted_reader_of_one_block_is_held(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks there are: those that are written leave the memory."""
    readers: list[weakref.ref[torch.Tensor]] = []
    alive = []
    refit_best = planning.refit_best

    def refitting(*args: Any) -> Any:
        alive.append(sum(reader() is not None for reader in readers))
        choice, fitted = refit_best(*args)
        readers.append(weakref.ref(choice.weight))
        return choice, fitted

    monkeypatch.setattr(planning, "refit_best", refitting)
    words = ("--ratio", 0.3, "--calibration", text, "--samples", 4, "--sequence-length", 32, "-q")
    assert run("compress", "--model", MINI, "--output", tmp_path / "cut", *words).exit_code == 0
    assert len(alive) > 2
    assert not any(alive)
    assert not any(reader() is not None for reader in readers)


def test_without_a_device_the_processor_does_it(mini: Source, caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert plan_machine(mini, load(mini), device="cuda").device.type == "cpu"
    assert "no cuda device" in caplog.text


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
    assert "may use 0.10 GB" in refused.stderr
    assert not (tmp_path / "no.partial").exists()


def test_the_dry_run_tells_what_is_planned(text: Path) -> None:
    words = ("compress", "--model", MINI, "--ratio", 0.3, "--calibration", text, "--samples", 4, "--dry-run", "--json")
    answer = json.loads(run(*words, "--max-memory", "2GB").stdout)
    assert BASE_MEMORY < answer["memory"] <= 2 * 10**9
    assert run(*words, "--max-memory", "100MB").exit_code == 1


def test_statistics_from_a_file_are_solved_in_memory_too(tmp_path: Path, text: Path) -> None:
    """Their products are as large as measured ones; hidden states there are none, and no text to sample."""
    plans = {}
    for samples in (2, 40):  # fewer tokens than neurons, and more
        path = tmp_path / f"{samples}.stats"
        words = ("--output", path, "--samples", samples, "--gram", "-q")
        assert run("calibrate", "--model", MINI, *words, "--calibration", text).exit_code == 0
        told = run("compress", "--model", MINI, "--ratio", 0.3, "--stats", path, "--dry-run", "--json", "-q")
        plans[samples] = json.loads(told.stdout)["memory"]
    source = open_source(str(MINI))
    sites = find_sites(source.blank, source.family)
    asked = load_statistics(tmp_path / "40.stats", source, sites).weigh(source, sites, for_refit=True)
    assert (asked.tokens, asked.is_measured, asked.samples_text) == (40 * 128, True, False)
    spilling = replace(asked, is_measured=False)
    assert machine._most_resident(source, asked, 128, False) == machine._most_resident(source, spilling, 128, True)
    neurons = sites[0].neurons
    assert machine._most_resident(source, asked, 128, False) >= BASE_MEMORY + 40 * neurons**2
    assert plans[40] >= plans[2] > BASE_MEMORY


def test_planned_by_default(mini: Source) -> None:
    plan = plan_machine(mini, load(mini, tokens=4096))
    assert (plan.batch_tokens, plan.spills, plan.whole_size) == (Machine().batch_tokens, False, machine.WHOLE_SIZE)
