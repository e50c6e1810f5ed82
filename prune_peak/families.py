"""The table: for every supported `model_type`, the names that cannot be asked of the stock class.

To add a family, add one row here and one tiny config in `tests/tiny.py`; every test of the law then runs over it.
Counts, widths, Linear or Conv1D, and whether a bias is there are asked of the class itself (`sites.py`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MLP:
    """Names inside one block: the modules that make the neurons, and the one that reads them."""

    makers: tuple[str, ...]
    reader: str
    width_key: str  # the config key of the number of neurons
    bias_key: str | None = None  # the config key that gives the reader a bias, where it has none by nature


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    model_type: str
    blocks: str  # path of the list of blocks, from the base model
    mlp: MLP
    hosts: tuple[str, ...] = ("own",)  # the classes that can hold the result, best first (`hosts.py`)


LLAMA_MLP = MLP(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size", "mlp_bias")

FAMILIES = {
    family.model_type: family
    for family in (
        Family("gpt2", "h", MLP(("mlp.c_fc",), "mlp.c_proj", "n_inner")),
        Family("llama", "layers", LLAMA_MLP),
        # Mistral has no bias to fold into; its mathematics are Llama's, and SmolLM3's where it has a window.
        Family("mistral", "layers", LLAMA_MLP, hosts=("llama", "smollm3")),
        Family("smollm3", "layers", LLAMA_MLP),
        Family("opt", "decoder.layers", MLP(("fc1",), "fc2", "ffn_dim")),
    )
}
