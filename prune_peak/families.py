"""The table: for every supported `model_type`, the names that cannot be asked of the stock class.

To add a family, add one row here and one tiny config in `tests/tiny.py`; every test of the law then runs over it.
Counts, widths, Linear or Conv1D, and whether a bias is there are asked of the class itself (`sites.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class MLP:
    """Names inside one block: the modules that make the neurons, and the one that reads them."""

    makers: tuple[str, ...]
    reader: str
    width_key: str  # the config key of the number of neurons, or of their ratio to the hidden size
    bias_key: str | None = None  # the config key that gives the reader a bias, where it has none by nature


@dataclass(frozen=True)
class Attention:
    """Names inside one block: what makes queries, keys and values (one module, perhaps), and what reads the heads."""

    query: str
    key: str
    value: str
    reader: str
    bias_key: str | None = None  # the config key that gives the reader a bias, where it has none by nature
    tables: tuple[str, ...] = ()  # parameters with a column for every head, where the class has them
    plain: bool = False  # nothing turns or norms queries and keys, so that heads can be narrower (`narrowing.py`)
    fixed: bool = False  # no stock class can hold it narrower: it can only be folded in place
    by_group: bool = False  # one module makes all three, KV group by KV group; else all queries, all keys, all values


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    model_type: str
    blocks: str  # path of the list of blocks, from the base model
    mlp: MLP
    attention: Attention | None = None
    hosts: tuple[str, ...] = ("own",)  # the classes that can hold the result, best first (`hosts.py`)
    host_settings: Mapping[str, object] = field(default_factory=dict)  # what is fixed here and optional in the hosts
    pooler: str | None = None  # path of what follows the blocks and, where it is there, has an MLP like theirs
    leftovers: tuple[str, ...] = ()  # patterns of tensors that published files hold for another head, and that are lost


LLAMA_MLP = MLP(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size", "mlp_bias")

LLAMA_ATTENTION = Attention(
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "attention_bias"
)

# Llama's mathematics without a bias to fold into: Llama itself holds them where the heads divide the hidden size,
# Granite where they do not, SmolLM3 where attention has a sliding window.
LLAMA_HOSTS = ("llama", "granite", "smollm3")

CLIP_ATTENTION = replace(LLAMA_ATTENTION, reader="self_attn.out_proj", bias_key=None, fixed=True)
VIT_MLP = MLP(("mlp.fc1",), "mlp.fc2", "intermediate_size")
VIT_ATTENTION = Attention("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", plain=True)

BERT_MLP = MLP(("intermediate.dense",), "output.dense", "intermediate_size")
BERT_ATTENTION = Attention(
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", fixed=True
)
BERT_LEFTOVERS = (r"(^|\.)pooler\.", r"^cls\.seq_relationship\.")

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "beit",
            "layers",
            VIT_MLP,
            replace(VIT_ATTENTION, tables=("relative_position_bias.relative_position_bias_table",)),
        ),
        Family("bert", "encoder.layer", BERT_MLP, BERT_ATTENTION, leftovers=BERT_LEFTOVERS),
        Family("camembert", "encoder.layer", BERT_MLP, BERT_ATTENTION, leftovers=BERT_LEFTOVERS),
        Family("clip_vision_model", "encoder.layers", VIT_MLP, CLIP_ATTENTION),
        Family("deit", "layers", VIT_MLP, VIT_ATTENTION),
        Family("dinov2", "encoder.layer", replace(VIT_MLP, width_key="mlp_ratio"), VIT_ATTENTION),
        Family(
            "distilbert",
            "transformer.layer",
            MLP(("ffn.lin1",), "ffn.lin2", "hidden_dim"),
            Attention("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", fixed=True),
        ),
        Family("electra", "encoder.layer", BERT_MLP, BERT_ATTENTION),
        Family(
            "gpt2",
            "h",
            MLP(("mlp.c_fc",), "mlp.c_proj", "n_inner"),
            Attention("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj", fixed=True),
        ),
        Family(
            "gpt_neox",
            "layers",
            MLP(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "intermediate_size"),
            Attention(
                "attention.query_key_value",
                "attention.query_key_value",
                "attention.query_key_value",
                "attention.dense",
                "attention_bias",
                fixed=True,
                by_group=True,
            ),
        ),
        Family("granite", "layers", LLAMA_MLP, LLAMA_ATTENTION),
        Family("ijepa", "layers", VIT_MLP, VIT_ATTENTION),
        # Llama itself refuses heads that do not divide the hidden size
        Family("llama", "layers", LLAMA_MLP, LLAMA_ATTENTION, ("own", "granite")),
        Family("mistral", "layers", LLAMA_MLP, LLAMA_ATTENTION, LLAMA_HOSTS),
        # Galactica is an OPT without biases
        Family(
            "opt",
            "decoder.layers",
            MLP(("fc1",), "fc2", "ffn_dim", "enable_bias"),
            replace(LLAMA_ATTENTION, reader="self_attn.out_proj", bias_key="enable_bias", fixed=True),
        ),
        Family(
            "phi",
            "layers",
            MLP(("mlp.fc1",), "mlp.fc2", "intermediate_size"),
            Attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
        ),
        # Qwen2 always has biases on q, k and v, and never one on o
        Family("qwen2", "layers", LLAMA_MLP, LLAMA_ATTENTION, LLAMA_HOSTS, {"attention_bias": True}),
        Family("roberta", "encoder.layer", BERT_MLP, BERT_ATTENTION, leftovers=BERT_LEFTOVERS),
        Family("siglip_vision_model", "encoder.layers", VIT_MLP, CLIP_ATTENTION, pooler="head"),
        Family("smollm3", "layers", LLAMA_MLP, LLAMA_ATTENTION),
        Family(
            "starcoder2",
            "layers",
            MLP(("mlp.c_fc",), "mlp.c_proj", "intermediate_size", "use_bias"),
            replace(LLAMA_ATTENTION, bias_key="use_bias"),
        ),
        Family("vit", "layers", VIT_MLP, VIT_ATTENTION),
        Family("vit_msn", "layers", VIT_MLP, VIT_ATTENTION),
        Family("xlm-roberta", "encoder.layer", BERT_MLP, BERT_ATTENTION, leftovers=BERT_LEFTOVERS),
    )
}
