"""Every kind of site in every tiny model: `prune` writes what `hold` computes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_law import check_same, cut_tiny, load, outputs
from tiny import ATTENTION_ONLY, MORE_HEADS, TINY, Tiny, random_inputs, unused_rows
from torch import Tensor
from transformers import PreTrainedModel

import prune_peak
from prune_peak.errors import PrunePeakError
from prune_peak.export.recipe import read_plan
from prune_peak.inspection import inspect
from prune_peak.io.checkpoint import Checkpoint
from prune_peak.models.families import FAMILIES
from prune_peak.options import UNITS
from prune_peak.sites.finding import SITE_KINDS, find_sites
from prune_peak.sites.folding import cut_mask
from prune_peak.sites.hooks import ablated
from prune_peak.sites.in_place import InPlace
from prune_peak.sites.mlp import Mlp
from prune_peak.sites.site import SiteKind
from prune_peak.verification import FLOAT32_BOUND

ALL = TINY + MORE_HEADS + ATTENTION_ONLY
ONE_GROUP = ("llama-one-group", "falcon-7b", "falcon-7b-biased-untied", "gemma-wide-heads")
DETECTED = 2 * FLOAT32_BOUND  # share of the largest logit
SAVE = {"dinov2-swiglu": {"save_original_format": False}}  # stock saving fuses the input projections of its MLP
FIRST_OF_FAMILY = [*{tiny.configure().model_type: tiny for tiny in reversed(ALL)}.values()]


def has_kind(tiny: Tiny, model: PreTrainedModel, kind: SiteKind) -> bool:
    if tiny.stiff and kind.label == "attention" and not isinstance(kind, InPlace):
        return False
    try:
        kind.check(model, FAMILIES[model.config.model_type])
    except PrunePeakError:
        return False
    return True


def cases() -> Iterator[Any]:
    """One variant (unit, fill) of every kind in every model; the others, and most folds in place, are `-m real`."""
    for number, tiny in enumerate(ALL):
        with torch.device("meta"):
            model = getattr(transformers, f"{tiny.family}{tiny.head}")(tiny.configure())
        kinds = [kind for kind in SITE_KINDS if has_kind(tiny, model, kind) and not kind.is_alone]  # test_blocks.py
        for kind in kinds:
            keep_shape = isinstance(kind, InPlace)
            units = [unit for unit in UNITS if kind.applies(unit, keep_shape)]
            if kind.label == "mlp":
                variants = [(("mlp",), "head", fill) for fill in ("mean", "peak")]
            else:
                both = ("mlp", "attention") if len({kind.label for kind in kinds}) == 2 else ("attention",)
                if tiny.name in ONE_GROUP:
                    units = [unit for unit in units if unit != "group"]
                variants = [(("attention",), units[0], "mean"), *((both, unit, "peak") for unit in units[1:] or units)]
            for at, (wanted, unit, fill) in enumerate(variants):
                chosen = at == number % len(variants) and (not keep_shape or tiny in FIRST_OF_FAMILY)
                case = f"{tiny.name}-{type(kind).__name__}-{'+'.join(wanted)}-{unit}-{fill}"
                marks = [] if chosen else [pytest.mark.real]
                yield pytest.param(tiny, kind, wanted, unit, fill, marks=marks, id=case)


@pytest.mark.parametrize(("tiny", "kind", "wanted", "unit", "fill"), list(cases()))
def test_prune_equals_hold(
    tiny: Tiny,
    kind: SiteKind,
    wanted: Sequence[str],
    unit: str,
    fill: str,
    tmp_path: Path,
    law_table: list[tuple[str, ...]],
) -> None:
    keep_shape = isinstance(kind, InPlace)
    folder, pruned = tiny.save(tmp_path / "source", **SAVE.get(tiny.name, {})), tmp_path / "pruned"
    source = cut_tiny(folder, pruned, fill, kinds=wanted, unit=unit, keep_shape=keep_shape)
    sites = find_sites(source.meta_model, source.family, wanted, unit, keep_shape)
    assert kind in {site.kind for site in sites}
    plan = read_plan(pruned)
    assert set(plan) == {site.name for site in sites}
    assert all(0 < len(plan[site.name].keep) < site.neurons for site in sites)
    original, ours = load(folder, tiny.head), load(pruned, tiny.head)
    written = first_logits(ours)
    assert distance(first_logits(original), written) > DETECTED, "pruning changes nothing, so the test proves nothing"
    with ablated(original, sites, plan):
        expected = outputs(original)
    differences = check_same(expected, outputs(ours, expected.decoded))

    # the comparison detects an omitted fold, and one swapped neuron at every site
    if any(site_plan.fill[cut_mask(len(site_plan.fill), site_plan.keep)].any() for site_plan in plan.values()):
        unfolded = {name: replace(site_plan, fill=site_plan.fill * 0) for name, site_plan in plan.items()}
        with ablated(original, sites, unfolded):
            assert distance(first_logits(original), written) > DETECTED
    swapped = {name: replace(site_plan, keep=swap_one(site_plan.keep)) for name, site_plan in plan.items()}
    with ablated(original, sites, swapped):
        assert distance(first_logits(original), written) > DETECTED

    before, after = original.num_parameters(), ours.num_parameters()
    state, other = original.state_dict(), ours.state_dict()
    if not keep_shape:
        assert after < before
        if (
            type(ours) is type(original) and tiny.name not in SAVE
        ):  # then tensors keep the names that older releases read
            assert set(Checkpoint(folder).names) <= set(Checkpoint(pruned).names)
    elif type(ours) is type(original):
        assert all(other[name].shape == tensor.shape for name, tensor in state.items())
        assert all(name.endswith(".bias") for name in other.keys() - state)
        for site in sites:
            for name, part in site.slices.items():
                idle = unused_rows(site, name, plan[site.name].keep)
                assert len(idle) == site.neurons - len(plan[site.name].keep) or name != site.weight
                assert not other[name].index_select(part.axis, idle).any()
    what = " and ".join("mlp" if label == "mlp" else f"{unit}s" for label in wanted) + ", in place" * keep_shape
    stages = (differences.get(stage, "-") for stage in ("padded", "prefill", "decode"))
    name = type(ours).__name__
    law_table.append((tiny.name, source.family.model_type, what, name, fill, *stages, f"{before:,}", f"{after:,}"))


@torch.inference_mode()
def first_logits(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(1)
    return model(**random_inputs(model, 2))[0]


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


def swap_one(keep: Tensor) -> Tensor:
    """The kept neurons with the first one exchanged for a pruned one."""
    pruned = next(neuron for neuron in range(len(keep) + 1) if neuron not in keep[1:] and neuron != keep[0])
    return torch.cat([torch.tensor([pruned]), keep[1:]]).sort().values


def test_attention_of_dinov2_with_swiglu(tmp_path: Path) -> None:
    """Its attention is pruned by heads, although its MLP is of an unsupported variant."""
    [tiny] = ATTENTION_ONLY
    folder = tiny.save(tmp_path / "source")
    inspection = inspect(str(folder), 0.5, sites=("attention",))
    assert [site.kind for site in inspection.sites] == ["attention"]
    assert "such as DINOv2's SwiGLU" in inspection.unprunable["mlp"]
    with pytest.raises(PrunePeakError, match="SwiGLU"):
        inspect(str(folder), 0.5)


class Toy(Mlp):
    """Neurons of MLPs under another name."""

    label = "toy"


def test_a_new_kind_needs_only_a_registry_entry(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune_peak.sites.finding.SITE_KINDS", [*SITE_KINDS, Toy()])
    folder = str(Path(__file__).parent.parent / "examples" / "opt-mini")
    options: dict[str, Any] = {"calibration": str(text), "samples": 8, "sequence_length": 64}
    toy = prune_peak.compress(folder, 0.3, tmp_path / "toy", sites=("toy",), **options)
    mlp = prune_peak.compress(folder, 0.3, tmp_path / "mlp", **options)
    assert toy.verification.passed
    assert toy.share == {"toy": mlp.share["mlp"]}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("toy", "mlp")]
    assert weights[0] == weights[1]
