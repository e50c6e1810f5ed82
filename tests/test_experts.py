"""Mixtures of experts: whole experts leave, and experts become narrower."""

from pathlib import Path

import pytest
import torch
import transformers
import zoo
from conftest import EXAMPLES
from torch import Tensor

import prune_peak
from prune_peak.errors import PrunePeakError, UsageError
from prune_peak.export.recipe import read_plan, read_recipe
from prune_peak.models.loading import open_model
from prune_peak.models.miniature import build_miniature
from prune_peak.sites.experts import ExpertsSite, common_path
from prune_peak.sites.finding import find_sites
from prune_peak.sites.routing import Router
from prune_peak.stats.expert_use import ExpertUse, removal_order
from prune_peak.verification import verify

MIXTURE = EXAMPLES / "moe-mini"
KINDS = ("expert-mlp", "experts")

# Kinds of router and of experts, and a type that has them
CASES = {
    "deepseek_v3": "sigmoid, a correction bias, groups, a shared expert of the same key, a dense first block",
    "ernie4_5_moe": "a correction bias of one row",
    "glm4_moe": "groups, weights that are scaled",
    "gpt_oss": "a router with a bias, interleaved and transposed stacks, biases of the experts",
    "granitemoe": "three-dimensional weights on disk",
    "hy_v3": "a row of the table of families",
    "jamba": "blocks without experts, whose MLP has the same key",
    "mixtral": "other names on disk",
    "nemotron_h": "experts without a gate, of another hidden size than the model's",
    "olmoe": "weights that are not normalized again",
    "phimoe": "a router of its own",
    "qwen2_moe": "a shared expert of another key",
    "qwen3_moe": "the usual one",
}
QUICK = ("deepseek_v3", "gpt_oss", "qwen3_moe")  # the others run by `make real`


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.real) for n in CASES])
def test_law(name: str, kind: str, tmp_path: Path) -> None:
    """The written checkpoint computes what the original computes with these neurons or experts held."""
    config = zoo.make_config(name, zoo.HEADS["causal"][name])
    model, _ = build_miniature(getattr(transformers, zoo.HEADS["causal"][name]), config)
    model.save_pretrained(tmp_path / "model")
    for share in zoo.SHARES if kind == "experts" else (0.3,):
        try:
            row = zoo.prune_kind(tmp_path / "model", tmp_path / kind, kind, share)
            break
        except PrunePeakError:
            continue
    assert row["passed"], row
    if (name, kind) == ("gpt_oss", "expert-mlp"):
        assert row["folded_into"] == "bias"


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_mixture(kind: str, tmp_path: Path) -> None:
    """The whole way: a smaller model that verifies, and says what was pruned."""
    output = tmp_path / "out"
    result = prune_peak.compress(str(MIXTURE), 0.25, output, sites=(kind,), samples=4, sequence_length=64)
    assert result.share == {kind: 0.25}
    assert result.after.neurons[kind] * 4 == result.before.neurons[kind] * 3
    assert result.after.parameters < 0.8 * result.before.parameters
    assert verify(output, open_model(str(MIXTURE))).passed
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert model.config.num_experts == (6 if kind == "experts" else 8)
    assert model.config.moe_intermediate_size == (256 if kind == "experts" else 192)
    card = (output / "README.md").read_text()
    assert "25.0% of the " in card
    assert ("The router of every block chooses" in card) == (kind == "experts")
    assert ("replaced by a constant" in card) == (kind == "expert-mlp")


def test_both_kinds_and_attention(tmp_path: Path) -> None:
    ratio = {"experts": 0.25, "expert-mlp": 0.25, "attention": 0.5}
    prune_peak.compress(str(MIXTURE), ratio, tmp_path / "out", samples=4, sequence_length=64)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_experts, config.moe_intermediate_size, config.num_attention_heads) == (6, 192, 2)


def test_every_expert_has_neurons_of_its_own(tmp_path: Path) -> None:
    prune_peak.compress(str(MIXTURE), 0.5, tmp_path / "out", sites=("expert-mlp",), samples=4, sequence_length=64)
    plan = read_plan(tmp_path / "out")
    kept = {tuple(plan[f"model.layers.0.mlp.experts.{number}"].keep.tolist()) for number in range(8)}
    assert len(kept) == 8


@pytest.mark.real
def test_statistics_of_experts_come_from_a_file(tmp_path: Path) -> None:
    """The same plan as when they are measured."""
    options = {"samples": 4, "sequence_length": 64}
    prune_peak.calibrate(str(MIXTURE), tmp_path / "stats", covariances=True, **options)
    for kind in KINDS:
        prune_peak.compress(str(MIXTURE), 0.25, tmp_path / "read", sites=(kind,), stats=tmp_path / "stats", force=True)
        prune_peak.compress(str(MIXTURE), 0.25, tmp_path / "measured", sites=(kind,), force=True, **options)
        assert read_recipe(tmp_path / "read")["tensors"] == read_recipe(tmp_path / "measured")["tensors"]


def find_experts(block: int = 0) -> tuple[transformers.PreTrainedModel, ExpertsSite]:
    source = open_model(str(MIXTURE))
    site = find_sites(source.meta_model, source.family, ["experts"])[block]
    assert isinstance(site, ExpertsSite)
    return source.load(torch.float32), site


def test_the_order_of_removal_by_brute_force() -> None:
    """The first expert that leaves is the one without which the output of the block changes least."""
    model, site = find_experts()
    seen: list[tuple[Tensor, object]] = []
    block = model.model.layers[0].mlp
    calls: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    with torch.inference_mode(), site.observe(model, lambda norms, sample: seen.append((norms, sample))):
        model(input_ids=torch.randint(4, 1000, (2, 48), generator=torch.Generator().manual_seed(0)))
    [(norms, sample)] = seen
    order = removal_order(sample.router, sample.inputs, sample.grams)
    router = site.find_router(model)
    with torch.inference_mode():
        whole = block(calls[0])
        changes = []
        for expert in range(8):
            with router.among(torch.tensor([each for each in range(8) if each != expert])):
                changes.append((block(calls[0]) - whole).norm(dim=-1).sum())
    assert int(order.argmin()) == int(torch.stack(changes).argmin())
    assert sorted(order.tolist())[:6] == [0, 1, 2, 3, 4, 5]
    # two experts a token
    assert bool(((norms > 0).sum(1) == 2).all())


def test_a_router_among_some_is_that_of_the_pruned_model() -> None:
    model, site = find_experts()
    router, keep = site.find_router(model).copy(), torch.tensor([0, 2, 3, 5, 6, 7])
    inputs = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    weights = router.weigh(inputs, keep)
    logits = torch.nn.functional.linear(inputs, model.model.layers[0].mlp.gate.weight)[:, keep]
    best = logits.softmax(-1).topk(2)
    expected = torch.zeros(20, 8).scatter_(1, keep[best.indices], best.values / best.values.sum(-1, keepdim=True))
    torch.testing.assert_close(weights, expected)
    assert isinstance(router, Router)
    assert not any("down_proj" in name for name, _ in router.root.named_parameters())


def test_reap_is_the_mean_over_the_tokens_that_an_expert_serves() -> None:
    use = ExpertUse(experts=3, groups=1)
    use.add(torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 0.0]]), None)
    summary = use.summarize()
    assert summary.norm.tolist() == [2.0, 2.0, 0.0]
    assert summary.served.tolist() == [2, 1, 0]
    assert summary.stay is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.9, "sites": ("experts",)}, "a token is given 2 of them"),
        ({"ratio": 0.3, "sites": ("mlp",)}, "every MLP of this qwen3_moe is an expert.*sites='expert-mlp'"),
        ({"ratio": 0.3, "sites": ("experts",), "keep_shape": True}, "keep_shape=True cannot fold experts"),
        ({"target_params": 0.7, "sites": ("experts", "expert-mlp")}, "experts as one kind alone"),
        ({"ratio": 0.3, "sites": ("expert-mlp",), "score": "reap"}, "ranks whole experts"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises((PrunePeakError, UsageError), match=message):
        prune_peak.compress(str(MIXTURE), output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrunePeakError, match="has no stacked experts"):
        prune_peak.compress(str(EXAMPLES / "llama-mini"), 0.3, tmp_path / "out", sites=("experts",))


def test_inspect_shows_experts() -> None:
    kinds = {site.kind: site for site in prune_peak.inspect(str(MIXTURE), {"experts": 0.25}).sites}
    assert (kinds["experts"].blocks, kinds["experts"].neurons, kinds["experts"].kept) == (3, 8, 6)
    assert (kinds["expert-mlp"].blocks, kinds["expert-mlp"].neurons) == (3, 256)


def test_common_path() -> None:
    assert common_path(["a.mlp.experts", "a.mlp.gate.weight", "a.mlp.gate.bias"]) == "a.mlp"
    assert common_path(["a.experts", "b.gate.weight"]) == ""
