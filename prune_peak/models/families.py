"""The table of supported families: names of modules and config keys for every `model_type`.

To add a family, add one row to FAMILIES and one tiny config to `tests/tiny.py`; the equivalence tests then cover it.
Counts, widths, layer types and biases are read from the stock class (`sites`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedModel

# names of lists of blocks, and the words of their paths
STACKS = {
    "vision": "vis(ion|ual)|image",
    "audio": "audio|speech",
    "text": "text|language",
    "decoder": "decoder",
    "encoder": "encoder",
}


@dataclass(frozen=True)
class MLP:
    """Module names inside one block: the input projections and the output projection of the MLP."""

    input_projections: tuple[str, ...]
    output_projection: str
    width_key: str  # config key of the number of neurons, or of its ratio to the hidden size
    bias_key: str | None = None  # config key that adds a bias to the output projection
    bias_module: str | None = None  # module whose bias absorbs the constants; default: the output projection
    interleaved: bool = False  # rows of a fused gate and up alternate; otherwise all of one, then all of the other


@dataclass(frozen=True)
class Experts:
    """The module inside one block that holds the weights of all experts, stacked, as transformers runs them."""

    module: str  # its path in the block
    inputs: Mapping[str, int]  # its parameters with one row for every neuron of an expert, and their axis
    output: str  # the parameter of the output projections, (experts, hidden, neurons) or (experts, neurons, hidden)
    width_key: str  # config key of the neurons of an expert
    bias: str | None = None  # the parameter that absorbs the constants, (experts, hidden)
    shared: tuple[MLP, ...] = ()  # MLPs for every token whose width is a multiple of an expert's
    # tensors of the block with one index for every expert, and its axis; empty if no expert can be removed
    router: Mapping[str, int] = field(default_factory=dict)
    count_key: str = ""  # config keys: of the experts of a block, of those that a token is given, of their groups
    chosen_key: str | None = None
    groups_key: str | None = None


@dataclass(frozen=True)
class Attention:
    """Module names inside one block: query, key and value (equal if fused), and the output projection."""

    query: str
    key: str
    value: str
    output_projection: str
    bias_key: str | None = None  # config key that adds a bias to the output projection
    per_head_parameters: tuple[str, ...] = ()  # optional parameters with one column per head
    head_dim_prunable: bool = False  # no rotation or norm of queries and keys, so heads can be narrower
    heads_prunable: bool = True  # a stock class supports fewer heads; otherwise heads are only folded
    grouped_qkv: bool = False  # fused rows are ordered by KV group; otherwise all queries, all keys, all values
    other_inputs: tuple[str, ...] = ()  # modules with as many rows for each head as for every other (a gate)
    heads_key: str = "num_attention_heads"  # config keys
    kv_heads_key: str | None = "num_key_value_heads"
    head_dim_key: str = "head_dim"


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    model_type: str
    blocks: str  # path of the list of blocks in the base model
    mlp: MLP | None = None
    attention: Attention | None = None
    output_classes: tuple[str, ...] = ()  # output classes if its own cannot represent the result, best first
    pooler: str | None = None  # path of an optional module after the blocks with an MLP like theirs
    ignored_tensors: tuple[str, ...] = ()  # patterns of published tensors that belong to another head
    other_mlps: tuple[MLP, ...] = ()  # more than one in a block, or another one in some blocks
    experts: Experts | None = None
    left_whole: Mapping[str, str] = field(default_factory=dict)  # config keys that look like widths; why they are not
    attention_unseen: str = ""  # why no attention was found in the class
    streamable: bool = True  # its blocks can run one by one
    discovered: bool = False  # asked of the class (models/discovery.py), not a row of the table
    reads_decoder_ids: bool = False  # its tokens are the decoder's, in a model that has an encoder too
    others: tuple["Family", ...] = ()  # the same of the model's other lists of blocks, in the order that they run

    @property
    def stacks(self) -> tuple["Family", ...]:
        """What can be pruned in each list of blocks. Block numbers count on from one list to the next."""
        return self, *self.others

    @property
    def named_stacks(self) -> dict[str, "Family"]:
        """The same by their names; those that would share a name by their paths."""
        names = [stack.stack for stack in self.stacks]
        return {
            name if names.count(name) == 1 else each.blocks: each for name, each in zip(names, self.stacks, strict=True)
        }

    @property
    def stack(self) -> str:
        """The name of the list of blocks: encoder, decoder, text, vision, audio, or its path.

        Example:
            >>> Family("t5", "encoder.block").stack, Family("clip", "vision_model.encoder.layers").stack
            ('encoder', 'vision')
        """
        return next((name for name, words in STACKS.items() if re.search(words, self.blocks)), self.blocks)

    @property
    def mlps(self) -> tuple[MLP, ...]:
        """All MLPs that a block can have."""
        return () if self.mlp is None else (self.mlp, *self.other_mlps)


def fused_attention(
    module: str,
    output_projection: str,
    bias_key: str | None = None,
    heads_prunable: bool = True,
    grouped_qkv: bool = False,
) -> Attention:
    """An attention with one module for queries, keys and values."""
    return Attention(
        module, module, module, output_projection, bias_key, heads_prunable=heads_prunable, grouped_qkv=grouped_qkv
    )


LLAMA_MLP = MLP(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size", "mlp_bias")
LLAMA_ATTENTION = Attention(
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "attention_bias"
)

# For classes without a bias: Llama if the heads divide the hidden size, Granite if not, SmolLM3 for sliding windows
LLAMA_OUTPUT_CLASSES = ("llama", "granite", "smollm3")
NEOX_MLP = MLP(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "intermediate_size")
CLIP_ATTENTION = replace(LLAMA_ATTENTION, output_projection="self_attn.out_proj", bias_key=None, heads_prunable=False)
VIT_MLP = MLP(("mlp.fc1",), "mlp.fc2", "intermediate_size")
VIT_ATTENTION = Attention(
    "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", head_dim_prunable=True
)
BERT_MLP = MLP(("intermediate.dense",), "output.dense", "intermediate_size")
BERT_ATTENTION = Attention(
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", heads_prunable=False
)
BERT_LEFTOVERS = (r"(^|\.)pooler\.", r"^cls\.seq_relationship\.")
FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "beit",
            "layers",
            VIT_MLP,
            replace(VIT_ATTENTION, per_head_parameters=("relative_position_bias.relative_position_bias_table",)),
        ),
        Family("bert", "encoder.layer", BERT_MLP, BERT_ATTENTION, ignored_tensors=BERT_LEFTOVERS),
        Family("camembert", "encoder.layer", BERT_MLP, BERT_ATTENTION, ignored_tensors=BERT_LEFTOVERS),
        Family("clip_vision_model", "encoder.layers", VIT_MLP, CLIP_ATTENTION),
        Family(
            "cohere",  # parallel attention and MLP: one bias absorbs the constants of both
            "layers",
            replace(LLAMA_MLP, bias_key="attention_bias", bias_module="self_attn.o_proj"),
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
                heads_prunable=False,
            ),
            # pretraining heads of the published DeBERTa-v3; no stock class has them
            ignored_tensors=(r"^lm_predictions\.", r"^mask_predictions\."),
        ),
        Family(
            "distilbert",
            "transformer.layer",
            MLP(("ffn.lin1",), "ffn.lin2", "hidden_dim"),
            Attention(
                "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", heads_prunable=False
            ),
        ),
        Family("electra", "encoder.layer", BERT_MLP, BERT_ATTENTION),
        Family(
            "falcon",
            "h",
            replace(NEOX_MLP, width_key="ffn_hidden_size", bias_key="bias"),
            fused_attention("self_attention.query_key_value", "self_attention.dense", "bias", grouped_qkv=True),
            ("phi",),
        ),
        Family("gemma", "layers", LLAMA_MLP, LLAMA_ATTENTION, ("granite",)),
        Family("gemma2", "layers", LLAMA_MLP, LLAMA_ATTENTION),
        Family("gemma3_text", "layers", LLAMA_MLP, LLAMA_ATTENTION),
        Family(
            "gpt2",
            "h",
            MLP(("mlp.c_fc",), "mlp.c_proj", "n_inner"),
            fused_attention("attn.c_attn", "attn.c_proj", heads_prunable=False),
        ),
        Family(
            "gpt_neox",
            "layers",
            NEOX_MLP,
            fused_attention("attention.query_key_value", "attention.dense", "attention_bias", grouped_qkv=True),
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
        # Llama rejects heads that do not divide the hidden size
        Family("llama", "layers", LLAMA_MLP, LLAMA_ATTENTION, ("granite",)),
        Family("mistral", "layers", LLAMA_MLP, LLAMA_ATTENTION, LLAMA_OUTPUT_CLASSES),
        Family(
            "modernbert",
            "layers",
            MLP(("mlp.Wi",), "mlp.Wo", "intermediate_size", "mlp_bias"),
            Attention("attn.Wqkv", "attn.Wqkv", "attn.Wqkv", "attn.Wo", "attention_bias", heads_prunable=False),
        ),
        Family("olmo", "layers", LLAMA_MLP, LLAMA_ATTENTION),
        # the norms of queries and keys span all heads
        Family("olmo2", "layers", LLAMA_MLP),
        Family("olmo3", "layers", LLAMA_MLP),
        # includes Galactica, an OPT without biases
        Family(
            "opt",
            "decoder.layers",
            MLP(("fc1",), "fc2", "ffn_dim", "enable_bias"),
            replace(
                LLAMA_ATTENTION, output_projection="self_attn.out_proj", bias_key="enable_bias", heads_prunable=False
            ),
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
            replace(LLAMA_MLP, input_projections=("mlp.gate_up_proj",)),
            fused_attention("self_attn.qkv_proj", "self_attn.o_proj", "attention_bias"),
            LLAMA_OUTPUT_CLASSES,
        ),
        Family("qwen2", "layers", LLAMA_MLP, LLAMA_ATTENTION, LLAMA_OUTPUT_CLASSES),
        Family("qwen3", "layers", LLAMA_MLP, LLAMA_ATTENTION, ("hy_v3",)),
        Family("roberta", "encoder.layer", BERT_MLP, BERT_ATTENTION, ignored_tensors=BERT_LEFTOVERS),
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
        Family("xlm-roberta", "encoder.layer", BERT_MLP, BERT_ATTENTION, ignored_tensors=BERT_LEFTOVERS),
    )
}


def tensors_by_block(model: PreTrainedModel, family: Family) -> dict[int | None, list[str]]:
    """Tensor names by block index (a pooler counts as one more block; None: all others), without tied copies."""
    paths = {path: index for index, path in enumerate(block_paths(model, family))}
    prefix = blocks_path(model, family).removesuffix(family.blocks)
    followers = tuple(f"{prefix}{stack.pooler}." for stack in family.stacks if stack.pooler)
    tied = {name for name, first in model.all_tied_weights_keys.items() if name != first}
    parts: dict[int | None, list[str]] = {None: [], **{block: [] for block in paths.values()}}
    numbered = re.compile(rf"^({'|'.join(re.escape(blocks_path(model, stack)) for stack in family.stacks)})\.\d+(?=\.)")
    for name in model.state_dict():
        inside = numbered.match(name)
        if inside is not None:
            parts[paths[inside.group()]].append(name)
        elif name not in tied and name not in computed_names(model):
            parts.setdefault(len(paths) if name.startswith(followers) else None, []).append(name)
    return parts


def computed_names(model: PreTrainedModel) -> set[str]:
    """Tensors that a class computes and never saves (Marian's positions)."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def block_paths(model: PreTrainedModel, family: Family) -> list[str]:
    """The paths of all blocks of a model, list after list; a block's number is its place here."""
    return [
        f"{blocks_path(model, stack)}.{index}"
        for stack in family.stacks
        for index in range(len(find_blocks(model, stack)))
    ]


def blocks_path(model: PreTrainedModel, family: Family) -> str:
    """Path of the (first) list of blocks in a model with or without a head."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return prefix + family.blocks


def find_blocks(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The (first) list of blocks."""
    blocks = model.get_submodule(blocks_path(model, family))
    assert isinstance(blocks, nn.ModuleList)
    return blocks
