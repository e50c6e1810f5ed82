"""A row of the table resolved on one model: where its neurons are made, and where they are read."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .families import Family


@dataclass(frozen=True)
class Site:
    """One output projection and the neurons it reads."""

    kind: str
    block: int
    name: str  # path of the reading module, as `model.get_submodule` takes it
    neurons: int
    hidden: int
    cuts: Mapping[str, int]  # every tensor with a neuron axis, and that axis
    transposed: bool  # the reader is a Conv1D, stored as (neurons, hidden)

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The reader's weight as (hidden, neurons), however it is stored."""
        return weight.T if self.transposed else weight


def find_sites(model: PreTrainedModel, family: Family) -> list[Site]:
    """The MLP sites of a model, one a block, in order."""
    sites = []
    path = blocks_path(model, family)
    for index in range(len(find_blocks(model, family))):
        block = f"{path}.{index}"
        reader = model.get_submodule(f"{block}.{family.mlp.reader}")
        assert isinstance(reader.weight, nn.Parameter)
        neuron_axis = 0 if isinstance(reader, Conv1D) else 1
        neurons, hidden = reader.weight.shape[neuron_axis], reader.weight.shape[1 - neuron_axis]
        cuts = {f"{block}.{family.mlp.reader}.weight": neuron_axis}
        for name in family.mlp.makers:
            maker = model.get_submodule(f"{block}.{name}")
            cuts[f"{block}.{name}.weight"] = 1 if isinstance(maker, Conv1D) else 0
            if maker.bias is not None:
                cuts[f"{block}.{name}.bias"] = 0
        sites.append(
            Site(
                kind="mlp",
                block=index,
                name=f"{block}.{family.mlp.reader}",
                neurons=neurons,
                hidden=hidden,
                cuts=cuts,
                transposed=isinstance(reader, Conv1D),
            )
        )
    return sites


def blocks_path(model: PreTrainedModel, family: Family) -> str:
    """Path of the list of blocks from the model itself, which may or may not be its own body."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return prefix + family.blocks


def find_blocks(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The list of blocks itself."""
    blocks = model.get_submodule(blocks_path(model, family))
    assert isinstance(blocks, nn.ModuleList)
    return blocks
