"""The law: the written checkpoint computes what the original computes with its cut neurons held at their fills."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import BY_NAME, MORE_HEADS, TINY, VISION, VOCABULARY, Tiny, random_inputs
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

from prune_peak.ablation import ablated
from prune_peak.blocks import Batch
from prune_peak.calibration import calibrate, into_batches
from prune_peak.checkpoint import Checkpoint
from prune_peak.errors import PrunePeakError
from prune_peak.export import Export
from prune_peak.families import FAMILIES
from prune_peak.hosts import choose_target, lay_out
from prune_peak.planning import narrow_heads
from prune_peak.selection import Choice, select
from prune_peak.sites import Site, cuttable_kinds, find_sites
from prune_peak.source import Source, open_source
from prune_peak.verification import FLOAT32_BOUND, Outputs, read_plan

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
) -> Source:
    """Calibrate on random tokens and write, without a tokenizer; returns the opened source.

    The MLP keeps `KEPT` neurons; attention half of its heads, KV groups or neurons, or a little more.
    """
    output.mkdir()
    source = open_source(str(folder))
    sites = find_sites(source.blank, source.family, kinds, unit, keep_shape)
    kept = {site.kind: kept_mlp(site) if site.kind == "mlp" else kept_attention(site) for site in sites}
    target = choose_target(source, sites, kept, source.dtype)
    batches = batches or into_batches(random_inputs(source.blank, 6)[source.blank.main_input_name], tokens=128)
    plans: dict[int, dict[str, Choice]] = defaultdict(dict)
    for observed in calibrate(source, target.sites, batches, torch.float32):
        site, summary = observed.site, observed.stats.summarize()
        weight = site.as_matrix(source.read(site.weight))
        choice = select(site, summary, weight, kept[site.kind], fill)
        if site.narrowed:
            choice = replace(choice, narrowing=narrow_heads(observed, kept[site.kind])[0])
        plans[site.block][site.name] = choice
    with Export(target, lay_out(target), output) as export:
        for block, plan in plans.items():
            export.write_block(block, plan)
        export.finish()
    return source


def kept_mlp(site: Site) -> int:
    return KEPT // site.step * site.step


def kept_attention(site: Site) -> int:
    units = site.neurons // (site.unit * site.groups)
    return (units // 2 + (units > 2)) * site.unit * site.groups


def load(folder: Path, head: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The folder by transformers alone, with nothing missing, unexpected or mismatched."""
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
    """Asserts the law; returns the largest difference of each stage."""
    differences = {}
    for stage, logits in expected.logits.items():
        difference = ((ours.logits[stage] - logits).abs().max() / logits.abs().max()).item()
        assert difference < FLOAT32_BOUND, stage
        differences[stage] = f"{difference:.0e}"
    if expected.decoded is not None:
        assert torch.equal(expected.decoded, ours.decoded)
    return differences


MLP, ATTENTION, BOTH = ("mlp",), ("attention",), ("mlp", "attention")
ALL = TINY + MORE_HEADS
NARROWER = [
    tiny for tiny in ALL if "attention" in cuttable_kinds(FAMILIES[tiny.configure().model_type]) and not tiny.stiff
]
ONE_GROUP = ("llama-one-group", "falcon-7b", "falcon-7b-biased-untied", "gemma-wide-heads")
CASES = []
for number, tiny in enumerate(ALL):
    cases = [(tiny, MLP, "head", "mean"), (tiny, MLP, "head", "peak")]
    if tiny in NARROWER:
        unit = "neuron" if tiny.family in VISION else "head" if tiny.name in ONE_GROUP else "group"
        cases += [(tiny, ATTENTION, "head", "mean"), (tiny, ATTENTION if unit == "neuron" else BOTH, unit, "peak")]
    # every other one is left to `-m real`: another fill of the same MLP, another unit of the same attention
    CASES += [pytest.param(*case, marks=[pytest.mark.real] * ((at + number) % 2)) for at, case in enumerate(cases)]


@pytest.mark.parametrize(("tiny", "kinds", "unit", "fill"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_written_checkpoint_equals_the_ablated_original(
    tiny: Tiny, kinds: tuple[str, ...], unit: str, fill: str, tmp_path: Path, law_table: list[tuple[str, ...]]
) -> None:
    source = cut_tiny(tiny.save(tmp_path / "source"), tmp_path / "cut", fill, kinds=kinds, unit=unit)
    plan = read_plan(tmp_path / "cut")
    sites = find_sites(source.blank, source.family, kinds, unit)
    assert set(plan) == {site.name for site in sites}
    if "mlp" in kinds:
        keeps = [plan[site.name].keep for site in sites if site.kind == "mlp"]
        assert all(len(keep) == kept_mlp(sites[-1]) for keep in keeps)
        assert not torch.equal(keeps[0], keeps[1])
    original = load(tmp_path / "source", tiny.head)
    dense = outputs(original)
    with ablated(original, sites, plan):
        expected = outputs(original)
    stage = next(iter(dense.logits))
    changed = (dense.logits[stage] - expected.logits[stage]).abs().max() / dense.logits[stage].abs().max()
    assert changed > 1e-3, "the ablation changes nothing, so this test proves nothing"
    ours = load(tmp_path / "cut", tiny.head)
    seen = check_same(expected, outputs(ours, expected.decoded))
    before, after = original.num_parameters(), ours.num_parameters()
    assert after < before
    if type(ours) is type(original):  # then tensors keep the names that stock saving gives, and older releases know
        assert set(Checkpoint(tmp_path / "source").names) <= set(Checkpoint(tmp_path / "cut").names)
    stages = (seen.get(stage, "-") for stage in ("padded", "prefill", "decode"))
    sizes = (f"{before:,}", f"{after:,}")
    what = " and ".join(kind if kind == "mlp" else f"{unit}s" for kind in kinds)
    law_table.append((tiny.name, source.family.model_type, what, type(ours).__name__, fill, *stages, *sizes))


ONE_EACH = {tiny.configure().model_type: tiny for tiny in TINY}.items()
IN_PLACE = [(tiny, ATTENTION, "neuron") for model_type, tiny in ONE_EACH if FAMILIES[model_type].attention]
IN_PLACE += [(BY_NAME[name], ATTENTION, "head") for name in ("bert", "gpt2", "gpt-neox-parallel", "llama-one-group")]
IN_PLACE += [(BY_NAME[name], BOTH, "group") for name in ("opt-no-bias", "mistral-window")]


@pytest.mark.parametrize(("tiny", "kinds", "unit"), IN_PLACE, ids=lambda value: getattr(value, "name", str(value)))
def test_what_is_folded_in_place_equals_the_ablated_original(
    tiny: Tiny, kinds: tuple[str, ...], unit: str, tmp_path: Path, law_table: list[tuple[str, ...]]
) -> None:
    folder = tiny.save(tmp_path / "source")
    source = cut_tiny(folder, tmp_path / "cut", "mean", kinds=kinds, unit=unit, keep_shape=True)
    plan, sites = read_plan(tmp_path / "cut"), find_sites(source.blank, source.family, kinds, unit, keep_shape=True)
    original, ours = load(folder, tiny.head), load(tmp_path / "cut", tiny.head)
    with ablated(original, sites, plan):
        expected = outputs(original)
    seen = check_same(expected, outputs(ours, expected.decoded))
    shapes = {name: tensor.shape for name, tensor in original.state_dict().items()}
    written = ours.state_dict()
    if type(ours) is not type(original):  # the class that has a bias for the constants says all in other words
        sites = []
        assert ours.num_parameters() >= original.num_parameters()
    else:
        assert all(written[name].shape == shape for name, shape in shapes.items())
        assert all(name.endswith(".bias") for name in written.keys() - shapes)
    for site in sites:
        assert 0 < len(plan[site.name].keep) < site.neurons
        idle = {name: site.idle(name, plan[site.name].keep) for name in site.cuts}
        assert len(idle[site.weight]) == site.neurons - len(plan[site.name].keep)
        for name, axis in site.cuts.items():
            assert not written[name].index_select(axis, idle[name]).any()
    stages = (seen.get(stage, "-") for stage in ("padded", "prefill", "decode"))
    sizes = (f"{original.num_parameters():,}", f"{ours.num_parameters():,}")
    what = " and ".join(kind if kind == "mlp" else f"{unit}s" for kind in kinds) + ", in place"
    law_table.append((tiny.name, source.family.model_type, what, type(ours).__name__, "mean", *stages, *sizes))


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt-neox-parallel", "distilbert", "opt", "llama-eight-heads"])
def test_a_head_that_goes_whole_is_zero_and_no_other_is(name: str, tmp_path: Path) -> None:
    """Queries, keys and values of the first head are idle, as the stock class orders them: moving them is not felt."""
    tiny = BY_NAME[name]
    model = tiny.build()
    source = open_source(str(tiny.save(tmp_path / "source")))
    site = find_sites(source.blank, source.family, ATTENTION, keep_shape=True)[0]
    state, keep = model.state_dict(), torch.arange(site.neurons // 2, site.neurons)
    idle = {name: site.idle(name, keep) for name in site.cuts}
    assert all(len(idle[name]) * 2 == state[name].shape[axis] for name, axis in site.cuts.items())
    state[site.weight].index_fill_(site.cuts[site.weight], idle[site.weight], 0)
    expected = outputs(model)
    for name, axis in site.cuts.items():
        if name != site.weight:
            state[name].index_fill_(axis, idle[name], 3.0)
    check_same(expected, outputs(model, expected.decoded))


def test_what_no_stock_class_can_hold_is_refused(tmp_path: Path) -> None:
    source = open_source(str(BY_NAME["opt"].save(tmp_path / "opt")))
    with pytest.raises(PrunePeakError, match=r"no stock class can hold a narrower attention of the family opt"):
        find_sites(source.blank, source.family, ["attention"])
    # a norm over each head has the width of the hidden size over the heads, which a narrower attention changes
    BY_NAME["phi-tied-qk-norm"].save(tmp_path / "phi")
    with pytest.raises(PrunePeakError, match="layernorm"):
        cut_tiny(tmp_path / "phi", tmp_path / "cut", "mean", kinds=ATTENTION)


@pytest.mark.parametrize("name", ["gpt2", "llama-biased", "mistral-window", "opt-350m"])
def test_attention_implementations_agree(name: str, tmp_path: Path) -> None:
    tiny = BY_NAME[name]
    source = cut_tiny(tiny.save(tmp_path / "source"), tmp_path / "cut", "mean")
    plan, sites = read_plan(tmp_path / "cut"), find_sites(source.blank, source.family)
    original, ours = load(tmp_path / "source", tiny.head), load(tmp_path / "cut", tiny.head)
    original.set_attn_implementation("eager")
    ours.set_attn_implementation("eager")
    with ablated(original, sites, plan):
        expected = outputs(original)
    check_same(expected, outputs(ours, expected.decoded))


def test_window_is_really_shorter_than_the_text(tmp_path: Path) -> None:
    """Control: the same weights without the window give something else, so the window case proves the window."""
    folder = BY_NAME["mistral-window"].save(tmp_path / "source")
    windowed = load(folder, "ForCausalLM")
    expected = outputs(windowed)
    full = AutoModelForCausalLM.from_pretrained(folder, sliding_window=None).eval()
    assert (outputs(full).logits["prefill"] - expected.logits["prefill"]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "opt"])
def test_base_class_checkpoint_stays_one(name: str, tmp_path: Path) -> None:
    tiny = BY_NAME[name]
    tiny.build().base_model.save_pretrained(tmp_path / "source")
    source = cut_tiny(tmp_path / "source", tmp_path / "cut", "mean")
    assert source.model_class.__name__ == f"{tiny.family}Model"
    plan, sites = read_plan(tmp_path / "cut"), find_sites(source.blank, source.family)
    original = load(tmp_path / "source", "Model")
    with ablated(original, sites, plan):
        expected = outputs(original)
    check_same(expected, outputs(load(tmp_path / "cut", "Model")))


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "mistral-window", "opt-350m"])
def test_a_cut_checkpoint_can_be_cut_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = BY_NAME[name]
    cut_tiny(tiny.save(tmp_path / "source"), tmp_path / "once", "mean")
    monkeypatch.setattr("test_law.KEPT", 24)
    source = cut_tiny(tmp_path / "once", tmp_path / "twice", "mean")
    plan, sites = read_plan(tmp_path / "twice"), find_sites(source.blank, source.family)
    once = load(tmp_path / "once", tiny.head)
    with ablated(once, sites, plan):
        expected = outputs(once)
    check_same(expected, outputs(load(tmp_path / "twice", tiny.head), expected.decoded))
