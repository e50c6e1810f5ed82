"""The written checkpoint computes what the original computes with its pruned neurons held at their fills.

Helpers and special cases; `test_site_kinds.py` tests every kind of site in every family.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import BY_NAME, VOCABULARY, random_inputs, unused_rows
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    CLIPVisionModelWithProjection,
    DeiTForImageClassificationWithTeacher,
    DynamicCache,
    PreTrainedModel,
)

from prune_peak.conversion.choice import choose_conversion
from prune_peak.data.windows import into_batches
from prune_peak.errors import PrunePeakError
from prune_peak.export.folder import FolderWriter
from prune_peak.export.recipe import read_plan
from prune_peak.models.loading import Model, open_model
from prune_peak.models.stream import Batch
from prune_peak.probes import Outputs
from prune_peak.pruning.site_pruning import select
from prune_peak.sites.finding import find_sites
from prune_peak.sites.hooks import ablated
from prune_peak.sites.plan import SitePlan
from prune_peak.sites.site import Site
from prune_peak.stats.collection import collect
from prune_peak.verification import FLOAT32_BOUND

KEPT = 40
AUTO = {
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForImageClassification": AutoModelForImageClassification,
    "ForImageClassificationWithTeacher": DeiTForImageClassificationWithTeacher,
    "Model": AutoModel,
    "ModelWithProjection": CLIPVisionModelWithProjection,
}


def cut_tiny(
    folder: Path,
    output: Path,
    fill: str,
    batches: list[Batch] | None = None,
    kinds: Sequence[str] = ("mlp",),
    unit: str = "head",
    keep_shape: bool = False,
) -> Model:
    """Calibrate on random tokens and write, without a tokenizer; returns the source model.

    The MLP keeps `KEPT` neurons; attention at least half of its heads, KV groups or neurons.
    """
    output.mkdir()
    source = open_model(str(folder))
    sites = find_sites(source.meta_model, source.family, kinds, unit, keep_shape)
    kept = {site.name: kept_mlp(site) if site.label == "mlp" else kept_attention(site) for site in sites}
    conversion = choose_conversion(source, sites, kept, source.dtype)
    batches = batches or into_batches(
        random_inputs(source.meta_model, 6)[source.meta_model.main_input_name], tokens=128
    )
    plans: dict[int, dict[str, SitePlan]] = defaultdict(dict)
    for observed in collect(source, conversion.sites, batches, torch.float32):
        site, summary = observed.site, observed.stats.summarize()
        weight = site.as_matrix(source.read(site.weight))
        site_plan = select(site, summary, weight, kept[site.name], fill)
        moments = [(moments.mean, moments.covariance) for moments in observed.outputs]
        plans[site.block][site.name], _ = site.kind.complete(site, site_plan, moments)
    with FolderWriter(source, conversion, output) as export:
        for block, plan in plans.items():
            export.write_block(block, plan)
        export.finish()
    return source


def kept_mlp(site: Site) -> int:
    return KEPT // site.kind.step(site, 1) * site.kind.step(site, 1)


def kept_attention(site: Site) -> int:
    units = site.neurons // (site.unit * site.groups)
    return (units // 2 + (units > 2)) * site.unit * site.groups


def load(folder: Path, head: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the folder by transformers, with nothing missing, unexpected or mismatched."""
    auto = AUTO.get(head, AutoModelForCausalLM)
    model, info = auto.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not any(info.values()), info
    return model.eval()


@torch.inference_mode()
def outputs(model: PreTrainedModel, teacher: torch.Tensor | None = None) -> Outputs:
    """Logits of a prefill, of a left-padded prefill, and of 24 tokens decoded with a cache; or of images."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        torch.manual_seed(1)
        seen = model(**random_inputs(model, 2))
        pooled = getattr(seen, "pooler_output", None)
        return Outputs({"prefill": seen[0]} | ({} if pooled is None else {"pooled": pooled}))
    tokens = torch.randint(3, VOCABULARY, (2, 48), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :11] = 0
    tokens[1, :11] = model.config.pad_token_id
    padded = model(tokens, attention_mask=mask)
    logits = {"padded": padded[0][mask.bool()] if padded[0].dim() == 3 else padded[0]}
    if not model.can_generate():
        return Outputs(logits)
    cache, fed = DynamicCache(config=model.config), tokens[:1]
    steps = []
    for step in range(24):
        output = model(fed, past_key_values=cache, use_cache=True).logits
        logits.setdefault("prefill", output)
        steps.append(output[:, -1])
        fed = output[:, -1].argmax(-1, keepdim=True) if teacher is None else teacher[:, step : step + 1]
    logits["decode"] = torch.stack(steps, 1)
    return Outputs(logits, logits["decode"].argmax(-1))


def check_same(expected: Outputs, ours: Outputs) -> dict[str, str]:
    """Assert that outputs are equal; return the largest difference of each stage."""
    differences = {}
    for stage, logits in expected.logits.items():
        difference = ((ours.logits[stage] - logits).abs().max() / logits.abs().max()).item()
        assert difference < FLOAT32_BOUND, stage
        differences[stage] = f"{difference:.0e}"
    if expected.decoded is not None:
        assert torch.equal(expected.decoded, ours.decoded)
    return differences


ATTENTION = ("attention",)


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt-neox-parallel", "distilbert", "opt", "llama-eight-heads"])
def test_idle_rows_have_no_effect(name: str, tmp_path: Path) -> None:
    """With its first heads pruned in place, queries, keys and values of these heads do not change the output."""
    tiny = BY_NAME[name]
    model = tiny.build()
    source = open_model(str(tiny.save(tmp_path / "source")))
    site = find_sites(source.meta_model, source.family, ATTENTION, keep_shape=True)[0]
    state, keep = model.state_dict(), torch.arange(site.neurons // 2, site.neurons)
    idle = {name: unused_rows(site, name, keep) for name in site.slices}
    assert all(len(idle[name]) * 2 == state[name].shape[part.axis] for name, part in site.slices.items())
    state[site.weight].index_fill_(site.slices[site.weight].axis, idle[site.weight], 0)
    expected = outputs(model)
    for name, part in site.slices.items():
        if name != site.weight:
            state[name].index_fill_(part.axis, idle[name], 3.0)
    check_same(expected, outputs(model, expected.decoded))


def test_unsupported_attention_is_refused(tmp_path: Path) -> None:
    source = open_model(str(BY_NAME["opt"].save(tmp_path / "opt")))
    with pytest.raises(PrunePeakError, match=r"no stock class supports fewer heads for the family opt"):
        find_sites(source.meta_model, source.family, ["attention"])
    # a norm over each head has hidden size / heads values, which pruning heads would change
    BY_NAME["phi-tied-qk-norm"].save(tmp_path / "phi")
    with pytest.raises(PrunePeakError, match="layernorm"):
        cut_tiny(tmp_path / "phi", tmp_path / "cut", "mean", kinds=ATTENTION)


@pytest.mark.parametrize("name", ["gpt2", "llama-biased", "mistral-window", "opt-350m"])
def test_attention_implementations_agree(name: str, tmp_path: Path) -> None:
    tiny = BY_NAME[name]
    source = cut_tiny(tiny.save(tmp_path / "source"), tmp_path / "cut", "mean")
    plan, sites = read_plan(tmp_path / "cut"), find_sites(source.meta_model, source.family)
    original, ours = load(tmp_path / "source", tiny.head), load(tmp_path / "cut", tiny.head)
    original.set_attn_implementation("eager")
    ours.set_attn_implementation("eager")
    with ablated(original, sites, plan):
        expected = outputs(original)
    check_same(expected, outputs(ours, expected.decoded))


def test_window_is_shorter_than_the_text(tmp_path: Path) -> None:
    """Control: without the window, the same weights give other logits."""
    folder = BY_NAME["mistral-window"].save(tmp_path / "source")
    windowed = load(folder, "ForCausalLM")
    expected = outputs(windowed)
    full = AutoModelForCausalLM.from_pretrained(folder, sliding_window=None).eval()
    assert (outputs(full).logits["prefill"] - expected.logits["prefill"]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "opt"])
def test_base_class_is_kept(name: str, tmp_path: Path) -> None:
    tiny = BY_NAME[name]
    tiny.build().base_model.save_pretrained(tmp_path / "source")
    source = cut_tiny(tmp_path / "source", tmp_path / "cut", "mean")
    assert source.model_class.__name__ == f"{tiny.family}Model"
    plan, sites = read_plan(tmp_path / "cut"), find_sites(source.meta_model, source.family)
    original = load(tmp_path / "source", "Model")
    with ablated(original, sites, plan):
        expected = outputs(original)
    check_same(expected, outputs(load(tmp_path / "cut", "Model")))


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mistral-window", "opt-350m"])
def test_pruning_twice(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = BY_NAME[name]
    cut_tiny(tiny.save(tmp_path / "source"), tmp_path / "once", "mean")
    monkeypatch.setattr("test_law.KEPT", 24)
    source = cut_tiny(tmp_path / "once", tmp_path / "twice", "mean")
    plan, sites = read_plan(tmp_path / "twice"), find_sites(source.meta_model, source.family)
    once = load(tmp_path / "once", tiny.head)
    with ablated(once, sites, plan):
        expected = outputs(once)
    check_same(expected, outputs(load(tmp_path / "twice", tiny.head), expected.decoded))
