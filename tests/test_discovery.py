"""What is found by asking a class: the same as the table, in classes that no line of ours knows, and proved."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from click.testing import CliRunner
from conftest import EXAMPLES
from tiny import TINY
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.models.auto import modeling_auto

import prune_peak
from prune_peak.cli.main import main
from prune_peak.errors import PrunePeakError
from prune_peak.io.checkpoint import Checkpoint
from prune_peak.models import config_checks
from prune_peak.models.asking import Asked
from prune_peak.models.attention_discovery import discover_attention
from prune_peak.models.discovery import discover_family, discover_stacks
from prune_peak.models.families import FAMILIES
from prune_peak.models.loading import ModelSpec, open_model
from prune_peak.models.miniature import build_miniature
from prune_peak.options import Budget
from prune_peak.proof import PROOF_BOUND, measure_law, prove
from prune_peak.pruning.budget import find_allocations
from prune_peak.sites.finding import find_sites

FIRST = {tiny.configure().model_type: tiny for tiny in reversed(TINY)}
# The table says more than the class tells
PARALLEL = {"cohere": "one bias takes the constants of both, so the MLP's is that of attention"}

# A type for each kind of structure; `make zoo` tries all
SAMPLE = {
    "albert": "one group of blocks that runs many times",
    "bart (causal)": "the decoder of an encoder-decoder",
    "big_bird (masked)": "a model that calls methods of its blocks",
    "clip (image)": "the tower for images of two",
    "ctrl": "a width that is named dff",
    "deberta (masked)": "a fused attention without KV groups",
    "falcon_h1": "Mamba beside attention",
    "gemma4_text": "heads that differ by block",
    "gpt_bigcode": "a width that the config leaves out",
    "hy_v3": "a dense block, then experts",
    "kimi_linear": "linear attention, convolutions, experts",
    "lfm3": "a gate beside queries, keys and values",
    "mobilebert": "four MLPs a block",
    "moshi": "a width that is half of the key's",
    "nomic_bert": "queries, keys and values that are one tensor on disk",
    "qwen2_moe": "a shared expert",
    "recurrent_gemma": "recurrent blocks between those with attention",
    "swin": "stages with one ratio",
    "xlnet": "states of another shape",
}

QUICK = ("albert", "ctrl", "moshi", "nomic_bert")  # the others run by `make real`


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_class_tells_what_the_table_says(model_type: str) -> None:
    """Blocks, projections, the key of the width and that of the bias."""
    tiny = FIRST[model_type]
    asked = Asked(getattr(transformers, f"{tiny.family}{tiny.head}"), tiny.configure())
    row = FAMILIES[model_type]
    [found] = discover_stacks(asked)
    [mlp] = found.mlps
    assert found.pooler == row.pooler
    assert found.blocks == row.blocks
    projections = (mlp.input_projections, mlp.output_projection, mlp.width_key)
    assert projections == (row.mlp.input_projections, row.mlp.output_projection, row.mlp.width_key)
    if model_type not in PARALLEL and not asked.has_bias(mlp.output_projection):
        opened = asked.bias_keys([mlp.output_projection])
        declared = row.mlp.bias_key if row.mlp.bias_key in asked.config.to_dict() else None
        assert opened.get(mlp.output_projection) == declared
    attention, _ = discover_attention(asked, found.blocks)
    if attention is not None:
        assert row.attention is not None
        expected = (row.attention.query, row.attention.key, row.attention.value, row.attention.output_projection)
        assert (attention.query, attention.key, attention.value, attention.output_projection) == expected


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.real) for name in SAMPLE]
)
def test_sample_of_the_zoo(name: str) -> None:
    """Small random models of stock classes, pruned, written, loaded and compared with the ablated original."""
    [(_, row)] = zoo.run([name])
    assert row.get("passed"), row
    assert "passed" not in row["attention"] or row["attention"]["passed"]


def head_classes(model_type: str) -> list[str]:
    """Every class that an auto class of transformers names for a model type."""
    found: dict[str, None] = {}
    for key, names in vars(modeling_auto).items():
        if key.endswith("MAPPING_NAMES") and not {"BACKBONE", "CONFIG"} & set(key.split("_")) and model_type in names:
            classes = names[model_type]
            found |= dict.fromkeys([classes] if isinstance(classes, str) else classes)
    return sorted(name for name in found if hasattr(transformers, name) and name != "JevForDecision")  # of two towers


HEADED = ("deberta-v2", "dinov3_vit", "distilbert", "electra", "gemma3_text", "gpt2", "mpnet", "qwen3_5_text")


@pytest.mark.real
@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [(each, name) for each in HEADED for name in head_classes(each)],
    ids=lambda each: each,
)
def test_every_head_class(model_type: str, class_name: str) -> None:
    row = zoo.try_type(model_type, class_name)
    assert row.get("passed"), row


@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "bitnet": "something else reads its neurons",  # a norm over them
        "bloom": "No key of its config is a width",
        "mamba": "has no input projections of its own",
        "llama4_text": "experts, or a convolution",
    }.items(),
)
def test_what_cannot_be_proved_is_refused(name: str, reason: str) -> None:
    rows = dict(zoo.run([name]))
    assert all(reason in row["reason"] for row in rows.values()), rows


def test_a_proof_that_proves_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.BioGptConfig()
    spec = ModelSpec(
        "x", None, Path(), discover_family(transformers.BioGptForCausalLM, config), config, *_class(config)
    )
    prove(spec, ["mlp"])
    difference, effect = measure_law(spec, ["mlp"])
    assert difference < PROOF_BOUND < effect
    monkeypatch.setattr("prune_peak.proof.LEAST_EFFECT", 1e9)
    with pytest.raises(PrunePeakError, match="proves nothing"):
        prove(spec, ["mlp"])


def _class(config: PreTrainedConfig) -> tuple[type[PreTrainedModel]]:
    return (transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)],)


def test_streaming_is_chosen_by_class() -> None:
    """ALBERT's group runs many times, so the model runs whole; ELECTRA's blocks run one by one."""
    for kind, streamable in (("Albert", False), ("Electra", True)):
        config = getattr(transformers, f"{kind}Config")()
        assert discover_family(getattr(transformers, f"{kind}ForMaskedLM"), config).streamable is streamable


class OddConfig(PreTrainedConfig):
    """Keys that no other class has."""

    model_type = "odd"

    def __init__(
        self, units: int = 48, odd_ffn_units: int = 96, floors: int = 3, open_bias: bool = False, **rest: object
    ):
        self.units, self.odd_ffn_units, self.floors, self.open_bias = units, odd_ffn_units, floors, open_bias
        self.vocab_size = 97
        super().__init__(**rest)


class OddFloor(nn.Module):
    """A block with a fused gate and up whose rows alternate."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.scale = nn.LayerNorm(config.units)
        self.both = nn.Linear(config.units, 2 * config.odd_ffn_units)
        self.back = nn.Linear(config.odd_ffn_units, config.units, bias=config.open_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.both(self.scale(hidden)).unflatten(-1, (-1, 2)).unbind(-1)
        return hidden + self.back(nn.functional.silu(gate) * up)


class OddBase(PreTrainedModel):
    config_class = OddConfig
    base_model_prefix = "odd"

    def _init_weights(self, module: nn.Module) -> None:
        pass


class OddModel(OddBase):
    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.units)
        self.floors = nn.ModuleList(OddFloor(config) for _ in range(config.floors))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, **_: object) -> BaseModelOutput:
        hidden = self.words(input_ids)
        for floor in self.floors:
            hidden = floor(hidden)
        return BaseModelOutput(last_hidden_state=hidden)


class OddForCausalLM(OddBase):
    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.odd = OddModel(config)
        self.head = nn.Linear(config.units, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: object) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.odd(input_ids).last_hidden_state))


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A class that transformers has under a name of which no line of ours knows."""
    AutoConfig.register("odd", OddConfig, exist_ok=True)
    monkeypatch.setattr(config_checks.transformers, "OddForCausalLM", OddForCausalLM, raising=False)
    model = OddForCausalLM(OddConfig(dtype="float32"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "model")
    yield tmp_path / "model"
    transformers.CONFIG_MAPPING._extra_content.pop("odd", None)


def test_an_unknown_class_with_other_keys(odd: Path, tmp_path: Path) -> None:
    source = open_model(str(odd))
    [mlp] = source.family.mlps
    assert (source.family.blocks, mlp.width_key, mlp.bias_key) == ("floors", "odd_ffn_units", "open_bias")
    assert mlp.interleaved
    prove(source, ["mlp"])
    found = zoo.prune_kind(odd, tmp_path / "cut", "mlp", 0.3)
    assert found["passed"], found
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["odd_ffn_units"] == round(0.7 * 96)


def test_experts_are_written_as_transformers_writes_them(tmp_path: Path) -> None:
    """One tensor of the class is many on disk; those that are not pruned are the same bytes."""
    model, _ = build_miniature(transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig())
    model.save_pretrained(tmp_path / "model")
    zoo.prune_kind(tmp_path / "model", tmp_path / "cut", "mlp", 0.3)
    before, after = Checkpoint(tmp_path / "model"), Checkpoint(tmp_path / "cut")
    experts = [name for name in before.names if ".experts." in name]
    assert len(experts) > 2
    assert all(torch.equal(before.read(name), after.read(name)) for name in experts)
    assert set(before.names) == set(after.names)


def test_compress_runs_a_model_whole(tmp_path: Path) -> None:
    """The command's whole path for a class that cannot be streamed: ALBERT, with the tokenizer of an example."""
    source = EXAMPLES / "roberta-mini"
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    config = transformers.AlbertConfig(
        vocab_size=vocabulary,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=80,
    )
    model = transformers.AlbertForMaskedLM(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "model")
    for path in source.glob("*token*"):
        shutil.copy(path, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("a tale of one and two and three " * 400)
    result = prune_peak.compress(
        str(tmp_path / "model"), 0.5, tmp_path / "cut", calibration=[str(text)], samples=8, sequence_length=32
    )
    assert result.verification.passed
    assert result.after.parameters < result.before.parameters
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "cut")
    assert loaded.config.intermediate_size == 32


def test_what_is_left_whole_is_named(tmp_path: Path) -> None:
    """Shared experts that are stacked, beside the MLP of other blocks."""
    config = transformers.InklingTextConfig(architectures=["InklingForCausalLM"])
    config.save_pretrained(tmp_path)
    with pytest.raises(PrunePeakError, match=r"moe_intermediate_size: .*experts"):
        prune_peak.inspect(str(tmp_path), 0.3)


MIXERS = {
    "DeepseekV3": ("self_attn", "multi-head latent attention (DeepseekV3Attention), in 2 of 2 blocks"),
    "Qwen3_5": ("linear_attn", "linear attention (Qwen3_5GatedDeltaNet), in 3 of 4 blocks"),
    "Bamba": ("mamba", "Mamba (BambaMixer), in 2 of 2 blocks"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_are_left_whole(name: str, tmp_path: Path) -> None:
    """The MLPs beside them are pruned."""
    model_class = getattr(transformers, f"{name}ForCausalLM")
    model, _ = build_miniature(model_class, model_class.config_class())
    model.config.architectures = [model_class.__name__]
    model.config.save_pretrained(tmp_path)
    inspection = prune_peak.inspect(str(tmp_path), 0.5)
    part, words = MIXERS[name]
    assert inspection.unprunable[f"left whole: {part}"] == words
    sites = {site.kind: site for site in inspection.sites}
    assert sites["mlp"].kept < sites["mlp"].neurons
    assert sites["mlp"].blocks == (1 if name == "DeepseekV3" else inspection.blocks)  # the other has experts
    if name == "Qwen3_5":
        assert sites["attention"].blocks == 1
        shown = CliRunner().invoke(main, ["inspect", str(tmp_path), "--ratio", "0.5"]).stdout
        assert "neurons in each of 1 of 4 blocks" in shown


def test_no_part_is_left_whole_where_all_are_pruned() -> None:
    inspection = prune_peak.inspect(str(EXAMPLES / "opt-mini"), 0.3)
    assert not [part for part in inspection.unprunable if part.startswith("left whole")]


def test_inspect_of_a_large_config_is_quick(tmp_path: Path) -> None:
    """70 billion parameters of a class that is asked: three seconds at most, beyond the import."""
    settings = {
        "model_type": "helium",
        "architectures": ["HeliumForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    start = time.thread_time()
    inspection = prune_peak.inspect(str(tmp_path), 0.3)
    assert time.thread_time() - start < 3  # of this thread: other processes do not count
    assert inspection.parameters > 70_000_000_000
    assert [site.kind for site in inspection.sites] == ["mlp"]


def test_ratios_keep_one_share_in_all_stages() -> None:
    config = transformers.SwinConfig()
    family = discover_family(transformers.SwinForImageClassification, config)
    spec = ModelSpec("swin", None, Path(), family, config, transformers.SwinForImageClassification)
    sites = find_sites(spec.meta_model, family)
    [widths] = find_allocations(spec, sites, Budget(ratio=0.3), "own")
    shares = {widths[site.name] / site.neurons for site in sites}
    assert len(shares) == 1
    assert math.isclose(shares.pop(), 0.7, abs_tol=0.05)
