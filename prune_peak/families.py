"""The table: for every supported `model_type`, the names that cannot be asked of the stock class.

To add a family, add one row here and one tiny config in `tests/tiny.py`; every test of the law then runs over it.
Counts, widths, Linear or Conv1D, fused or not, and whether a bias is there are asked of the class itself (`sites.py`).
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class MLP:
    """Names inside one block: the modules that make the neurons, and the one that reads them."""

    makers: tuple[str, ...]
    reader: str
    width_key: str  # the config key of the number of neurons, or of their ratio to the hidden size
    bias_key: str | None = None  # the config key that gives the reader a bias, where it has none by nature
    constants: str | None = None  # the module whose bias takes the constants, where it is not the reader


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
    hosts: tuple[str, ...] = ()  # what to write where its own class cannot hold the result, best first (`hosts.py`)
    pooler: str | None = None  # path of what follows the blocks and, where it is there, has an MLP like theirs
    leftovers: tuple[str, ...] = ()  # patterns of tensors that published files hold for another head, and that are lost


def fused(
    module: str, reader: str, bias_key: str | None = None, fixed: bool = False, by_group: bool = False
) -> Attention:
    """An attention whose queries, keys and values one module makes."""
    return Attention(module, module, module, reader, bias_key, fixed=fixed, by_group=by_group)


LLAMA_MLP = MLP(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size", "mlp_bias")

LLAMA_ATTENTION = Attention(
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "attention_bias"
)

# Written where the class itself has no bias to fold into: Llama where the heads divide the hidden size, Granite where
# they do not, SmolLM3 where attention has a sliding window.
LLAMA_HOSTS = ("llama", "granite", "smollm3")

NEOX_MLP = MLP(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "intermediate_size")

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
        Family(
            "cohere",  # attention and MLP side by side: one bias takes the constants of both
            "layers",
            replace(LLAMA_MLP, bias_key="attention_bias", constants="self_attn.o_proj"),
            LLAMA_ATTENTION,
        ),
        Family("deit", "layers", VIT_MLP, VIT_ATTENTION),
        Family("dinov2", "encoder.layer", replace(VIT_MLP, width_key="mlp_ratio"), VIT_ATTENTION),
        Family(
            "deberta-v2",
            "encoder.layer",
            BERT_MLP,
            Attention(
                "attention.self.query_proj",
                "attention.self.key_proj",
                "attention.self.value_proj",
                "attention.output.dense",
                fixed=True,
            ),
            # of the published DeBERTa-v3: its heads of pretraining, which no stock class has
            leftovers=(r"^lm_predictions\.", r"^mask_predictions\."),
        ),
        Family(
            "distilbert",
            "transformer.layer",
            MLP(("ffn.lin1",), "ffn.lin2", "hidden_dim"),
            Attention("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", fixed=True),
        ),
        Family("electra", "encoder.layer", BERT_MLP, BERT_ATTENTION),
        Family(
            "falcon",
            "h",
            replace(NEOX_MLP, width_key="ffn_hidden_size", bias_key="bias"),
            fused("self_attention.query_key_value", "self_attention.dense", "bias", by_group=True),
            ("phi",),
        ),
        Family("gemma", "layers", LLAMA_MLP, LLAMA_ATTENTION, ("granite",)),
        Family("gemma2", "layers", LLAMA_MLP, LLAMA_ATTENTION),
        Family("gemma3_text", "layers", LLAMA_MLP, LLAMA_ATTENTION),
        Family(
            "gpt2",
            "h",
            MLP(("mlp.c_fc",), "mlp.c_proj", "n_inner"),
            fused("attn.c_attn", "attn.c_proj", fixed=True),
        ),
        Family(
            "gpt_neox",
            "layers",
            NEOX_MLP,
            fused("attention.query_key_value", "attention.dense", "attention_bias", by_group=True),
            ("phi",),
        ),
        Family(
            "gptj",
            "h",
            MLP(("mlp.fc_in",), "mlp.fc_out", "n_inner"),
            Attention("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"),
            ("phi",),
        ),
        Family("granite", "layers", LLAMA_MLP, LLAMA_ATTENTION),
        Family("hy_v3", "layers", LLAMA_MLP, LLAMA_ATTENTION),
        Family("ijepa", "layers", VIT_MLP, VIT_ATTENTION),
        # Llama itself refuses heads that do not divide the hidden size
        Family("llama", "layers", LLAMA_MLP, LLAMA_ATTENTION, ("granite",)),
        Family("mistral", "layers", LLAMA_MLP, LLAMA_ATTENTION, LLAMA_HOSTS),
        Family(
            "modernbert",
            "layers",
            MLP(("mlp.Wi",), "mlp.Wo", "intermediate_size", "mlp_bias"),
            Attention("attn.Wqkv", "attn.Wqkv", "attn.Wqkv", "attn.Wo", "attention_bias", fixed=True),
        ),
        Family("olmo", "layers", LLAMA_MLP, LLAMA_ATTENTION),
        # their norms of queries and keys span all heads
        Family("olmo2", "layers", LLAMA_MLP),
        Family("olmo3", "layers", LLAMA_MLP),
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
        Family(
            "phi3",
            "layers",
            replace(LLAMA_MLP, makers=("mlp.gate_up_proj",)),
            fused("self_attn.qkv_proj", "self_attn.o_proj", "attention_bias"),
            LLAMA_HOSTS,
        ),
        Family("qwen2", "layers", LLAMA_MLP, LLAMA_ATTENTION, LLAMA_HOSTS),
        Family("qwen3", "layers", LLAMA_MLP, LLAMA_ATTENTION, ("hy_v3",)),
        Family("roberta", "encoder.layer", BERT_MLP, BERT_ATTENTION, leftovers=BERT_LEFTOVERS),
        Family("siglip_vision_model", "encoder.layers", VIT_MLP, CLIP_ATTENTION, pooler="head"),
        Family("smollm3", "layers", LLAMA_MLP, LLAMA_ATTENTION),
        Family("stablelm", "layers", LLAMA_MLP),
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
