"""Whole blocks leave, and the MLP before them takes over what they added."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES
from test_law import check_same, load, outputs
from tiny import BY_NAME, Tiny, random_inputs

import prune_peak
from prune_peak.conversion.choice import choose_conversion
from prune_peak.conversion.fewer_blocks import drop_blocks
from prune_peak.data.windows import Windows, into_batches
from prune_peak.errors import PrunePeakError, UsageError
from prune_peak.export.folder import FolderWriter
from prune_peak.export.recipe import read_recipe
from prune_peak.models.execution import ExecutionConfig
from prune_peak.models.loading import Model, open_model, open_model_spec
from prune_peak.options import PruningOptions
from prune_peak.proof import prove
from prune_peak.pruning.block_choice import cheapest_runs, choose_blocks
from prune_peak.pruning.site_pruning import plan_site
from prune_peak.sites.blocks import join_runs
from prune_peak.sites.finding import find_sites
from prune_peak.sites.hooks import ablated
from prune_peak.sites.plan import SitePlan
from prune_peak.stats.calibration import Calibration
from prune_peak.stats.collection import collect
from prune_peak.studies.runner import find_studied
from prune_peak.verification import FLOAT32_BOUND, verify

KINDS = ("blocks",)
LISTS = {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["sliding_attention"], "sliding_window": 8}
# One for every way in which a class depends on the number of a block, and for every place of the constants
CASES = {
    "bert": {},  # ends in a LayerNorm
    "distilbert": {"n_layers": 5},
    "gpt2": {"n_layer": 5},
    "llama-untied": {},
    "mistral": {},  # written as Llama, for the bias
    "smollm3": LISTS | {"no_rope_layers": [1, 1, 0, 1, 1], "use_sliding_window": True},
    "qwen3": LISTS | {"use_sliding_window": True},  # written as HYV3
    "cohere": {},  # the bias of another module
    "vit": {},
}


def build(name: str, **settings: object) -> Tiny:
    """A tiny model of five blocks."""
    tiny = BY_NAME[name]
    blocks = {} if {"n_layer", "n_layers"} & set(settings) else {"num_hidden_layers": 5}
    return replace(tiny, settings={**tiny.settings, **blocks, **settings})


def remove(source: Model, output: Path, removed: Sequence[int], refit: bool) -> dict[str, SitePlan]:
    """Write a model without some blocks; the plans by site."""
    sites = [site for site in find_sites(source.meta_model, source.family, KINDS) if {*site.removed} & {*removed}]
    kept = {site.name: site.always_kept for site in sites}
    conversion = choose_conversion(source, sites, kept, source.dtype)
    inputs = random_inputs(source.meta_model, 6)[source.meta_model.main_input_name]
    plans: dict[int, dict[str, SitePlan]] = defaultdict(dict)
    for stats in collect(source, conversion.sites, into_batches(inputs, tokens=128), torch.float32, refit):
        result = plan_site(source, stats, kept[stats.site.name], PruningOptions(refit=refit))
        plans[stats.site.block][stats.site.name] = result.plan
    output.mkdir()
    with FolderWriter(source, conversion, output) as writer:
        for block, plan in plans.items():
            writer.write_block(block, plan)
        writer.finish()
    return {name: plan for block in plans.values() for name, plan in block.items()}


VARIANTS = [
    pytest.param(name, refit, marks=() if refit == (number % 2 == 0) else pytest.mark.real)
    for number, name in enumerate(CASES)
    for refit in (True, False)
]


@pytest.mark.parametrize(("name", "refit"), VARIANTS)
def test_law(name: str, refit: bool, tmp_path: Path) -> None:
    """The written checkpoint computes what the original computes with the map in the place of the blocks."""
    tiny = build(name, **CASES[name])
    source = open_model(str(tiny.save(tmp_path / "source")))
    plan = remove(source, tmp_path / "cut", (1, 2, 4), refit)
    every = find_sites(source.meta_model, source.family, KINDS)
    sites = join_runs([site for site in every if site.removed in [(1,), (2,), (4,)]])
    assert [site.removed for site in sites] == [(1, 2), (4,)]
    original, written = load(tmp_path / "source", tiny.head), load(tmp_path / "cut", tiny.head)
    plain = outputs(original)
    with ablated(original, sites, plan):
        expected = outputs(original)
    check_same(expected, outputs(written, expected.decoded))
    shown = next(iter(plain.logits))
    change = (plain.logits[shown] - expected.logits[shown]).abs().max() / plain.logits[shown].abs().max()
    assert change > 2 * FLOAT32_BOUND, "removing the blocks changes nothing, so the test proves nothing"


@pytest.mark.parametrize("name", ["smollm3", "qwen3"])
def test_lists_of_the_config_lose_the_same_entries(name: str, tmp_path: Path) -> None:
    settings = CASES[name]
    spec = open_model_spec(str(build(name, **settings).save(tmp_path / "source")))
    config = drop_blocks(spec, [1, 2]).config
    assert config.num_hidden_layers == 3
    for key, value in settings.items():
        if isinstance(value, list):
            assert getattr(config, key) == [value[0], *value[3:]], key


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("gemma2", {}, "does not add what its MLP gives"),
        ("olmo2", {}, "does not add what its MLP gives"),
        ("gpt2", {"n_layer": 5, "scale_attn_by_inverse_layer_idx": True}, "differ by"),
    ],
)
def test_refused(name: str, settings: dict[str, object], reason: str, tmp_path: Path) -> None:
    """Before any activation is measured."""
    spec = open_model_spec(str(build(name, **settings).save(tmp_path / "source")))
    with pytest.raises(PrunePeakError, match=reason):
        prove(spec, KINDS)


def test_blocks_leave_alone() -> None:
    with pytest.raises(UsageError, match="blocks leave alone"):
        prune_peak.inspect(str(EXAMPLES / "llama-mini"), 0.3, sites=("mlp", "blocks"))
    with pytest.raises(UsageError, match="not whole blocks"):
        find_studied(open_model(str(EXAMPLES / "llama-mini")), KINDS)
    with pytest.raises(UsageError, match="statistics file holds nothing of whole blocks"):
        prune_peak.compress(str(EXAMPLES / "llama-mini"), 0.3, sites=KINDS, stats="any.stats")


def test_a_target_is_reached_with_the_fewest_blocks() -> None:
    model = str(EXAMPLES / "llama-mini")
    for target, kept in ((0.9, 2), (0.72, 1)):
        inspection = prune_peak.inspect(model, target_params=target, sites=KINDS)
        assert [site.kept for site in inspection.sites if site.kind == "blocks"] == [kept]
        assert inspection.parameters_after <= target * inspection.parameters
    with pytest.raises(PrunePeakError, match="with the first block alone, 328,960 parameters remain"):
        prune_peak.inspect(model, target_params=0.3, sites=KINDS)


def test_the_block_that_does_nothing_leaves(tmp_path: Path) -> None:
    """And without it, the model computes the same."""
    tiny = build("llama-untied")
    model = tiny.build()
    for projection in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[3].get_submodule(projection).weight.data.zero_()
    model.save_pretrained(tmp_path / "source")
    source = open_model(str(tmp_path / "source"))
    sites = find_sites(source.meta_model, source.family, KINDS)
    tokens = random_inputs(model, 6)["input_ids"]
    calibration = Calibration(Windows("random", tokens[:4], tokens[4:]), {"dtype": "float32"}, lambda *_: ())
    for refit in (True, False):
        chosen = choose_blocks(source, sites, 1, calibration, PruningOptions(refit=refit), ExecutionConfig())
        assert list(chosen) == ["model.layers.2.mlp.down_proj"]
    remove(source, tmp_path / "cut", [3], refit=True)
    expected = outputs(model)
    check_same(expected, outputs(load(tmp_path / "cut", tiny.head), expected.decoded))


def test_runs_with_the_smallest_costs() -> None:
    costs = {(0, 1): 1.0, (1, 1): 0.5, (2, 1): 1.0, (3, 1): 4.0, (0, 2): 1.4, (1, 2): 3.0, (2, 2): 9.0}
    assert cheapest_runs(costs, 1) == [(1, 1)]
    assert cheapest_runs(costs, 2) == [(0, 2)]
    assert cheapest_runs(costs, 3) == [(0, 2), (3, 1)]  # not block 2, which is gone, before block 3


@pytest.mark.parametrize("name", ["llama-mini", pytest.param("roberta-mini", marks=pytest.mark.real)])
def test_commands(name: str, tmp_path: Path) -> None:
    """compress, its card and its recipe; verify, and what it finds wrong."""
    model, output = str(EXAMPLES / name), tmp_path / "cut"
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the {n} dogs of {n + 1} houses ran to the {n % 7} hills." for n in range(1500)))
    inspection = prune_peak.inspect(model, 0.34, sites=KINDS)
    assert [(site.neurons, site.kept) for site in inspection.sites if site.kind == "blocks"] == [(3, 2)]
    result = prune_peak.compress(
        model, 0.34, output, sites=KINDS, calibration=(str(text),), samples=8, sequence_length=64, refit=False
    )
    assert result.after.neurons["blocks"] == 2
    assert result.after.parameters == inspection.parameters_after
    recipe = read_recipe(output)
    removed = [block for site in recipe["sites"].values() for block in site["removed"]]
    assert len(removed) == 1
    card = (output / "README.md").read_text()
    assert "33% of the blocks pruned" in card
    assert f"These left: {removed[0]}, counted from 0." in card
    assert verify(output, open_model(model)).passed
    recipe["sites"][next(iter(recipe["sites"]))]["removed"] = [3 - removed[0]]  # the other one
    (output / "prune_peak.json").write_text(json.dumps(recipe))
    with pytest.raises(PrunePeakError, match="is not the original of this folder"):
        verify(output, open_model(model))
