"""Conversion: over random configs an output class computes what the ablated original does, or is refused."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_law import check_same, load
from tiny import BY_NAME, Tiny, widths_of

from prune_peak.conversion.choice import choose_conversion
from prune_peak.conversion.classes import OUTPUT_CLASSES
from prune_peak.errors import PrunePeakError, UsageError
from prune_peak.export.folder import FolderWriter
from prune_peak.models.config_checks import build_meta_model
from prune_peak.models.families import tensors_by_block
from prune_peak.models.loading import ModelSpec, open_model, open_model_spec
from prune_peak.probes import Outputs
from prune_peak.pruning.site_pruning import keep_best
from prune_peak.sites.finding import find_sites
from prune_peak.sites.hooks import ablated
from prune_peak.sites.plan import SitePlan

HIDDEN, WIDTH, KEPT, LENGTH = 24, 32, 16, 40
ORIGINAL, POSITIONS = 16, 32  # positions; fewer than tokens, so that scaling by length matters


@st.composite
def ropes(draw: st.DrawFn, rotated: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Rotary parameters for `rotated` dimensions of a head."""
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
        factors = st.lists(st.sampled_from([1.0, 1.5, 3.0]), min_size=rotated // 2, max_size=rotated // 2)
        rope |= {"short_factor": draw(factors), "long_factor": draw(factors), "factor": 2.0}
    return rope


@st.composite
def tinies(draw: st.DrawFn, family: str) -> Tiny:
    """A config of a family with output classes: heads, groups, windows, rotary positions, ties and biases."""
    heads = draw(st.sampled_from([2, 3, 6]))
    plain = family in ("Falcon", "GPTJ", "GPTNeoX")
    pairs = heads if plain else draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    own_width = plain or family in ("Phi3", "Cohere")
    head_dim = HIDDEN // heads if own_width else draw(st.sampled_from([4, 8]))
    values: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": draw(st.booleans()),
    }
    if not plain:
        values |= {"num_key_value_heads": pairs}
    if not own_width:
        values |= {"head_dim": head_dim}
    rotated = head_dim
    kinds = ("default", "longrope") if family == "Phi3" else ("default", "linear", "dynamic", "yarn", "llama3")
    if family not in ("Phi3", "Falcon", "GPTJ", "GPTNeoX", "Cohere"):
        kinds = (*kinds, "longrope")
    if family == "GPTNeoX":
        values["attention_bias"] = draw(st.booleans())
        kinds = ("default",)
    if family != "GPTJ":
        values["rope_parameters"] = draw(ropes(rotated, kinds))
    if family == "GPTNeoX":
        values["rope_parameters"]["partial_rotary_factor"] = draw(st.sampled_from([0.5, 1.0]))
    if family == "GPTJ":
        width = {"n_embd": HIDDEN, "n_inner": WIDTH, "n_head": heads, "n_layer": 2, "n_positions": 64}
        values = width | {"rotary_dim": 2 * draw(st.integers(1, head_dim // 2))}
        values["tie_word_embeddings"] = draw(st.booleans())
    if family == "Falcon":
        values["ffn_hidden_size"] = values.pop("intermediate_size")
        values["bias"] = draw(st.booleans())
        values |= draw(
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
        values["attention_bias"] = draw(st.booleans())
    if family in ("Llama", "Granite"):
        values["mlp_bias"] = draw(st.booleans())
    if family in ("Mistral", "Phi3"):
        values["sliding_window"] = draw(st.sampled_from([None, 6]))
    if family == "Phi3":
        values["original_max_position_embeddings"] = ORIGINAL
    if family in ("Qwen2", "Qwen3", "SmolLM3") and draw(st.booleans()):
        values |= {"use_sliding_window": True, "sliding_window": 6}
        values["layer_types"] = draw(st.permutations(["sliding_attention", "full_attention"]))
    return Tiny(f"drawn-{family}", family, settings=values)


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
    phases=[Phase.explicit, Phase.generate],  # shrinking a failure takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(data=st.data())
def test_output_class_equals_the_ablated_original(family: str, data: st.DataObject) -> None:
    tiny = data.draw(tinies(family))
    kinds = data.draw(st.sampled_from([("mlp",), ("attention",), ("mlp", "attention")]))
    unit = data.draw(st.sampled_from(["head", "group"]))
    with tempfile.TemporaryDirectory() as folder:
        source = open_model(str(tiny.save(Path(folder) / "source")))
        sites = find_sites(source.meta_model, source.family, kinds, unit)
        kept = {}
        for site in sites:
            units = site.neurons // site.unit // site.groups
            if site.label == "attention" and units == 1:
                return  # nothing to cut
            kept[site.name] = KEPT if site.label == "mlp" else max(1, units // 2) * site.unit * site.groups
        conversion = choose_conversion(source, sites, kept, source.dtype)
        plan = {}
        (Path(folder) / "cut").mkdir()
        for site in conversion.sites:
            fill = torch.randn(site.neurons) if site.folded_into is not None else torch.zeros(site.neurons)
            plan[site.name] = SitePlan(keep_best(site, torch.rand(site.neurons), kept[site.name]), fill)
        with FolderWriter(source, conversion, Path(folder) / "cut") as export:
            for block in {site.block for site in conversion.sites}:
                export.write_block(
                    block, {site.name: plan[site.name] for site in conversion.sites if site.block == block}
                )
            export.finish()
        original, ours = load(Path(folder) / "source", tiny.head), load(Path(folder) / "cut", tiny.head)
        tokens = torch.randint(3, 97, (2, LENGTH))
        with torch.inference_mode():
            with ablated(original, sites, plan):
                expected = Outputs({"prefill": original(tokens).logits})
            check_same(expected, Outputs({"prefill": ours(tokens).logits}))


def spec(name: str, folder: Path) -> ModelSpec:
    model = BY_NAME[name].build()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return open_model_spec(str(folder))


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


@pytest.mark.parametrize(("name", "kind", "output_class", "written_as", "zero_filled"), CHOICES)
def test_output_class_is_chosen(
    name: str, kind: str, output_class: str, written_as: str, zero_filled: tuple[str, ...], tmp_path: Path
) -> None:
    source = spec(name, tmp_path)
    sites = find_sites(source.meta_model, source.family, [kind])
    kept = widths_of(sites, {"mlp": 40, "attention": 16})
    conversion = choose_conversion(source, sites, kept, torch.float32, output_class)
    assert (conversion.model_class.__name__, conversion.zero_filled) == (written_as, zero_filled)
    assert all((site.folded_into is None) == bool(zero_filled) for site in conversion.sites)


@pytest.mark.parametrize(
    ("name", "output_class", "words"),
    [
        ("mistral-window", "granite", r"granite does not support layer_types, sliding_window.*These do: own \(with "
         r"a fill of zero in mlp\), smollm3"),
        ("mistral-odd-heads", "llama", r"number of heads that divides the hidden size, not 6.*do: .*granite"),
        ("gemma2", "granite", r"granite does not support .*softcapping.*These do: own"),
        ("opt", "llama", r"opt can only be written as itself.*These do: own"),
        ("phi", "llama", r"llama does not support layer_norm_eps"),
        ("gpt-neox-sequential", "phi", r"Phi's MLP is parallel to attention"),
        ("falcon-alibi", "phi", r"alibi"),
        ("granite", "llama", r"llama does not support attention_multiplier, embedding_multiplier"),
        ("qwen3", "llama", r"does not have model.layers.0.self_attn.q_norm.weight"),
    ],
)  # fmt: skip
def test_unsupported_output_class_is_refused(name: str, output_class: str, words: str, tmp_path: Path) -> None:
    source = spec(name, tmp_path)
    sites = find_sites(source.meta_model, source.family, ["mlp"])
    with pytest.raises(PrunePeakError, match=words):
        choose_conversion(source, sites, widths_of(sites, {"mlp": 40}), torch.float32, output_class)


def test_gemma_keeps_its_class_in_bfloat16(tmp_path: Path) -> None:
    """1 + a norm's weight in bfloat16 gave 1.3 times the rounding error of the original."""
    source = spec("gemma", tmp_path)
    sites = find_sites(source.meta_model, source.family, ["mlp"])
    conversion = choose_conversion(source, sites, widths_of(sites, {"mlp": 40}), torch.bfloat16)
    assert (conversion.model_class.__name__, conversion.zero_filled) == ("GemmaForCausalLM", ("mlp",))
    with pytest.raises(
        PrunePeakError, match="one plus a norm's weight loses digits in bfloat16, and granite requires it"
    ):
        choose_conversion(source, sites, widths_of(sites, {"mlp": 40}), torch.bfloat16, "granite")


def test_unknown_output_class_is_refused(tmp_path: Path) -> None:
    source = spec("llama-tied", tmp_path)
    sites = find_sites(source.meta_model, source.family, ["mlp"])
    with pytest.raises(
        UsageError, match=r"output_class='mamba': expected auto, own, or one of " + ", ".join(OUTPUT_CLASSES)
    ):
        choose_conversion(source, sites, widths_of(sites, {"mlp": 40}), torch.float32, "mamba")


def test_one_config_for_all_blocks(tmp_path: Path) -> None:
    """Widths are per site; a class with one width for all blocks rejects different ones."""
    source = spec("llama-tied", tmp_path)
    sites = find_sites(source.meta_model, source.family, ["mlp"])
    widths = widths_of(sites, {"mlp": 40}) | {sites[1].name: 32}
    with pytest.raises(PrunePeakError, match=r"one intermediate_size for all blocks, not 40 and 32"):
        choose_conversion(source, sites, widths, torch.float32)
    in_place = find_sites(source.meta_model, source.family, ["mlp"], keep_shape=True)
    assert choose_conversion(source, in_place, widths, torch.float32).kept[sites[1].name] == 32


def test_block_map(tmp_path: Path) -> None:
    """A hypothetical conversion that drops the first block of a Llama gives the weights of the shorter class."""
    source = open_model(str(BY_NAME["llama-biased"].save(tmp_path)))
    sites = find_sites(source.meta_model, source.family, ["mlp"])
    whole = choose_conversion(source, sites, widths_of(sites, {"mlp": WIDTH * 2 - 8}), torch.float32)
    config = copy.deepcopy(source.config)
    config.num_hidden_layers = len(sites) - 1
    meta_model = build_meta_model(source.model_class, config)
    shorter = replace(whole, config=config, meta_model=meta_model, sites=(), block_map=(None, 0, 1))
    model = source.model_class(config)
    tensors: dict[str, torch.Tensor] = {}
    for block, names in tensors_by_block(source.meta_model, source.family).items():
        tensors |= shorter.convert(block, {name: source.read(name) for name in names})
    assert set(tensors) == set(shorter.layout)
    model.load_state_dict(tensors)
    original = load(tmp_path, "ForCausalLM")
    del original.model.layers[0]
    for layer in original.model.layers:
        layer.self_attn.layer_idx -= 1
    tokens = torch.randint(3, 97, (2, 16))
    with torch.inference_mode():
        assert torch.allclose(model.eval()(tokens).logits, original(tokens).logits, atol=1e-5)
