"""A host is never wrong in silence: over random configs it computes what the ablated original does, or is refused."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_law import check_same, load
from tiny import BY_NAME, Tiny

from prune_peak.ablation import ablated
from prune_peak.errors import PrunePeakError, UsageError
from prune_peak.export import Export
from prune_peak.hosts import HOSTS, choose_target, lay_out
from prune_peak.selection import Choice, keep_best
from prune_peak.sites import find_sites
from prune_peak.source import Blueprint, open_blueprint, open_source
from prune_peak.verification import Outputs

HIDDEN, WIDTH, KEPT, LENGTH = 24, 32, 16, 40
ORIGINAL, POSITIONS = 16, 32  # positions; fewer than the text has, so that scaling by length shows


@st.composite
def ropes(draw: st.DrawFn, turned: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """How positions turn `turned` neurons of a head."""
    kind = draw(st.sampled_from(kinds))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 10000.0]))}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        rope["factor"] = draw(st.sampled_from([2.0, 4.0]))
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = ORIGINAL
    if kind == "yarn":
        rope["factor"] = POSITIONS / ORIGINAL
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        factors = st.lists(st.sampled_from([1.0, 1.5, 3.0]), min_size=turned // 2, max_size=turned // 2)
        rope |= {"short_factor": draw(factors), "long_factor": draw(factors), "factor": 2.0}
    return rope


@st.composite
def tinies(draw: st.DrawFn, family: str) -> Tiny:
    """A config of a hosted family: heads, groups, windows, rotary positions, ties and biases."""
    heads = draw(st.sampled_from([2, 3, 6]))
    plain = family in ("Falcon", "GPTJ", "GPTNeoX")
    pairs = heads if plain else draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    own_width = plain or family in ("Phi3", "Cohere")
    head_dim = HIDDEN // heads if own_width else draw(st.sampled_from([4, 8]))
    words: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": draw(st.booleans()),
    }
    if not plain:
        words |= {"num_key_value_heads": pairs}
    if not own_width:
        words |= {"head_dim": head_dim}
    turned = head_dim
    kinds = ("default", "longrope") if family == "Phi3" else ("default", "linear", "dynamic", "yarn", "llama3")
    if family not in ("Phi3", "Falcon", "GPTJ", "GPTNeoX", "Cohere"):
        kinds = (*kinds, "longrope")
    if family == "GPTNeoX":
        words["attention_bias"] = draw(st.booleans())
        kinds = ("default",)
    if family != "GPTJ":
        words["rope_parameters"] = draw(ropes(turned, kinds))
    if family == "GPTNeoX":
        words["rope_parameters"]["partial_rotary_factor"] = draw(st.sampled_from([0.5, 1.0]))
    if family == "GPTJ":
        width = {"n_embd": HIDDEN, "n_inner": WIDTH, "n_head": heads, "n_layer": 2, "n_positions": 64}
        words = width | {"rotary_dim": 2 * draw(st.integers(1, head_dim // 2))}
        words["tie_word_embeddings"] = draw(st.booleans())
    if family == "Falcon":
        words["ffn_hidden_size"] = words.pop("intermediate_size")
        words["bias"] = draw(st.booleans())
        words |= draw(
            st.sampled_from(
                [
                    {"multi_query": True},
                    {"multi_query": False},
                    {"new_decoder_architecture": True, "num_kv_heads": 1},
                    {"new_decoder_architecture": True, "num_kv_heads": heads, "num_ln_in_parallel_attn": 1},
                ]
            )
        )
    if family in ("Llama", "Granite", "Qwen3", "Gemma", "Cohere"):
        words["attention_bias"] = draw(st.booleans())
    if family in ("Llama", "Granite"):
        words["mlp_bias"] = draw(st.booleans())
    if family in ("Mistral", "Phi3"):
        words["sliding_window"] = draw(st.sampled_from([None, 6]))
    if family == "Phi3":
        words["original_max_position_embeddings"] = ORIGINAL
    if family in ("Qwen2", "Qwen3", "SmolLM3") and draw(st.booleans()):
        words |= {"use_sliding_window": True, "sliding_window": 6}
        words["layer_types"] = draw(st.permutations(["sliding_attention", "full_attention"]))
    return Tiny(f"drawn-{family}", family, settings=words)


FAMILIES = (
    *("Cohere", "Falcon", "Gemma", "GPTJ", "GPTNeoX", "Granite"),
    *("Llama", "Mistral", "Phi3", "Qwen2", "Qwen3", "SmolLM3"),
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=6,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # making a failure smaller would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(data=st.data())
def test_a_host_computes_what_the_ablated_original_does(family: str, data: st.DataObject) -> None:
    tiny = data.draw(tinies(family))
    kinds = data.draw(st.sampled_from([("mlp",), ("attention",), ("mlp", "attention")]))
    unit = data.draw(st.sampled_from(["head", "group"]))
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(str(tiny.save(Path(folder) / "source")))
        sites = find_sites(source.blank, source.family, kinds, unit)
        kept = {}
        for site in sites:
            units = site.neurons // site.unit // site.groups
            if site.kind == "attention" and units == 1:
                return  # nothing to cut
            kept[site.kind] = KEPT if site.kind == "mlp" else max(1, units // 2) * site.unit * site.groups
        target = choose_target(source, sites, kept, source.dtype)
        plan = {}
        (Path(folder) / "cut").mkdir()
        for site in target.sites:
            fill = torch.randn(site.neurons) if site.constants is not None else torch.zeros(site.neurons)
            plan[site.name] = Choice(keep_best(site, torch.rand(site.neurons), kept[site.kind]), fill)
        with Export(target, lay_out(target), Path(folder) / "cut") as export:
            for block in {site.block for site in target.sites}:
                export.write_block(block, {site.name: plan[site.name] for site in target.sites if site.block == block})
            export.finish()
        original, ours = load(Path(folder) / "source", tiny.head), load(Path(folder) / "cut", tiny.head)
        tokens = torch.randint(3, 97, (2, LENGTH))
        with torch.inference_mode():
            with ablated(original, sites, plan):
                expected = Outputs({"prefill": original(tokens).logits})
            check_same(expected, Outputs({"prefill": ours(tokens).logits}))


def blueprint(name: str, folder: Path) -> Blueprint:
    model = BY_NAME[name].build()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return open_blueprint(str(folder))


CHOICES = [
    ("llama-eight-heads", "mlp", "auto", "LlamaForCausalLM", ()),
    ("llama-eight-heads", "mlp", "own", "LlamaForCausalLM", ()),
    ("llama-eight-heads", "mlp", "llama", "LlamaForCausalLM", ()),
    ("llama-eight-heads", "mlp", "granite", "GraniteForCausalLM", ()),
    ("llama-eight-heads", "mlp", "smollm3", "SmolLM3ForCausalLM", ()),
    ("mistral", "mlp", "auto", "LlamaForCausalLM", ()),
    ("mistral", "mlp", "own", "MistralForCausalLM", ("mlp",)),
    ("mistral", "attention", "mistral", "MistralForCausalLM", ("attention",)),
    ("mistral-odd-heads", "mlp", "auto", "GraniteForCausalLM", ()),
    ("mistral-window", "mlp", "auto", "SmolLM3ForCausalLM", ()),
    ("phi3-part-of-each-head", "mlp", "auto", "Phi3ForCausalLM", ("mlp",)),
    ("qwen3", "mlp", "auto", "HYV3ForCausalLM", ()),
    ("qwen3", "mlp", "own", "Qwen3ForCausalLM", ("mlp",)),
    ("qwen3", "attention", "auto", "Qwen3ForCausalLM", ()),
    ("gemma2", "mlp", "auto", "Gemma2ForCausalLM", ("mlp",)),
    ("gemma", "mlp", "auto", "GraniteForCausalLM", ()),
    ("gptj", "mlp", "phi", "PhiForCausalLM", ()),
]


@pytest.mark.parametrize(("name", "kind", "host", "written_as", "zero_filled"), CHOICES)
def test_a_host_that_is_asked_for_is_written(
    name: str, kind: str, host: str, written_as: str, zero_filled: tuple[str, ...], tmp_path: Path
) -> None:
    source = blueprint(name, tmp_path)
    sites = find_sites(source.blank, source.family, [kind])
    kept = {kind: 40 if kind == "mlp" else 16}
    target = choose_target(source, sites, kept, torch.float32, host)
    assert (target.model_class.__name__, target.zero_filled) == (written_as, zero_filled)
    assert all((site.constants is None) == bool(zero_filled) for site in target.sites)


@pytest.mark.parametrize(
    ("name", "host", "words"),
    [
        ("mistral-window", "granite", r"granite has no place for layer_types, sliding_window.*These can: own \(with a "
         r"fill of zero in mlp\), smollm3"),
        ("mistral-odd-heads", "llama", r"Llama wants heads that divide the hidden size, not 6.*These can: .*granite"),
        ("gemma2", "granite", r"granite has no place for .*softcapping.*These can: own"),
        ("opt", "llama", r"opt is written as itself only.*These can: own"),
        ("phi", "llama", r"llama has no place for layer_norm_eps"),
        ("gpt-neox-sequential", "phi", r"its MLP after attention has no place in Phi"),
        ("falcon-alibi", "phi", r"alibi"),
        ("granite", "llama", r"llama has no place for attention_multiplier, embedding_multiplier"),
        ("qwen3", "llama", r"no place for model.layers.0.self_attn.q_norm.weight"),
    ],
)  # fmt: skip
def test_a_host_that_would_be_wrong_is_refused(name: str, host: str, words: str, tmp_path: Path) -> None:
    source = blueprint(name, tmp_path)
    sites = find_sites(source.blank, source.family, ["mlp"])
    with pytest.raises(PrunePeakError, match=words):
        choose_target(source, sites, {"mlp": 40}, torch.float32, host)


def test_gemma_is_itself_in_a_narrow_type(tmp_path: Path) -> None:
    """One plus a norm's weight, in bfloat16, put it at 1.3 times the distance that its own rounding has."""
    source = blueprint("gemma", tmp_path)
    sites = find_sites(source.blank, source.family, ["mlp"])
    target = choose_target(source, sites, {"mlp": 40}, torch.bfloat16)
    assert (target.model_class.__name__, target.zero_filled) == ("GemmaForCausalLM", ("mlp",))
    with pytest.raises(PrunePeakError, match="one plus a norm's weight loses digits in bfloat16, as granite needs it"):
        choose_target(source, sites, {"mlp": 40}, torch.bfloat16, "granite")


def test_a_host_of_no_name_is_refused(tmp_path: Path) -> None:
    source = blueprint("llama-tied", tmp_path)
    sites = find_sites(source.blank, source.family, ["mlp"])
    with pytest.raises(UsageError, match=r"--host mamba: expected auto, own, or one of " + ", ".join(HOSTS)):
        choose_target(source, sites, {"mlp": 40}, torch.float32, "mamba")
