"""A plan and a host become a folder: shards, config, side files.

Every tensor of the target class is copied, cut, folded, said in another class's words, or an explicit zero bias that
the host's flag opened; `hosts.lay_out` refuses anything else before the first byte.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .checkpoint import Writer, save_tensors
from .folding import clear, cut, fold
from .hosts import Layout, Target
from .narrowing import narrow_rows
from .selection import Choice, pack_plan
from .sites import tensors_by_block
from .source import SIDE_FILES, Source, names_on_disk

RECIPE_FILE = "prune_peak.json"
PLAN_FILE = "prune_peak_plan.safetensors"

# What older releases call the rotary base, where it is not rope_theta, and that of blocks with a window
ROPE_KEYS = {"modernbert": "global_rope_theta"}
LOCAL_ROPE_KEYS = {"gemma3_text": "rope_local_base_freq", "modernbert": "local_rope_theta"}

# What we write ourselves, or what belongs to the source's files alone
NOT_COPIED = {"config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", RECIPE_FILE}


class Export:
    """Writes the tensors of one plan: `write_block` as the choices come, then `finish` for what is left."""

    def __init__(self, target: Target, layout: Layout, folder: Path) -> None:
        assert isinstance(target.source, Source)
        self.source, self.target, self.layout, self.folder = target.source, target, layout, folder
        self._names = names_on_disk(target.blank)
        self._writer = Writer(folder, {self._names[name]: of for name, of in layout.items()})
        self._plan: dict[str, Choice] = {}

    def __enter__(self) -> "Export":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def write_block(self, block: int, plan: Mapping[str, Choice]) -> dict[str, str]:
        """Write a block as the choices for its sites change it; returns the digests of its tensors."""
        digests = self._write(block, plan)
        self._plan |= {name: choice.without_reader() for name, choice in plan.items()}
        return digests

    def holds_block(self, plan: Mapping[str, Choice], digests: Mapping[str, str]) -> bool:
        """Whether an earlier run wrote a block into the folder, with these digests; then it is as good as written."""
        if not self._writer.holds(digests):
            return False
        self._plan |= plan
        return True

    def finish(self) -> dict[str, str]:
        """Write the rest, the config, the plan and the side files; returns the digests of all tensors."""
        changed = {site.block for site in self.target.sites}
        for block in tensors_by_block(self.source.blank, self.source.family):
            if block not in changed:
                self._write(block, {})
        for name, (shape, dtype) in self.layout.items():
            if self._names[name] not in self._writer.digests:
                assert name.endswith(".bias"), name
                self._writer.write(self._names[name], torch.zeros(shape, dtype=dtype))
        digests = self._writer.finish()
        save_tensors(pack_plan(self._plan), self.folder / PLAN_FILE)
        write_config(self.target.config, self.folder / "config.json")
        copy_side_files(self.source.folder, self.folder)
        return digests

    def _write(self, block: int | None, plan: Mapping[str, Choice]) -> dict[str, str]:
        tensors = tell_block(self.target, plan, block)
        for name, tensor in tensors.items():
            self._writer.write(self._names[name], tensor.to(self.layout[name][1]))
        self.source.checkpoint.release()
        return {self._names[name]: self._writer.digests[self._names[name]] for name in tensors}


def tell_block(target: Target, plan: Mapping[str, Choice], block: int | None) -> dict[str, Tensor]:
    """The tensors of a block (None: those outside the blocks) as a plan changes them and as the target says them.

    Rows and columns are gone, or zero; constants are in the bias; a refitted reader is taken as it is. What was changed
    is float32.
    """
    source = target.source
    assert isinstance(source, Source)
    tensors = {name: source.read(name) for name in tensors_by_block(source.blank, source.family)[block]}
    if target.dialect is not None:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    # a bias that takes another site's constants too takes its own first
    sites = sorted((site for site in target.sites if site.block == block), key=lambda site: site.constants != site.bias)
    for site in sites:
        choice = plan[site.name]
        weight, bias = site.as_matrix(tensors[site.weight]), tensors.get(site.bias)
        for name, axis in site.cuts.items():
            tensor = tensors[name]
            if choice.narrowing is not None and (factors := choice.narrowing.factors(site.narrowed, name)) is not None:
                tensors[name] = narrow_rows(tensor, factors)
            elif site.in_place:
                tensors[name] = clear(tensor, site.idle(name, choice.keep), axis)
            else:
                tensors[name] = cut(tensor, site.rows(name, choice.keep, tensor.shape[axis]), axis)
        if choice.weight is not None:
            refitted = choice.weight
            if site.in_place:
                refitted = torch.zeros(weight.shape).index_copy(1, choice.keep, refitted)
            tensors[site.weight] = site.as_matrix(refitted)
        constant = fold(weight, bias, choice.fill, choice.keep) if choice.bias is None else choice.bias
        if site.constants == site.bias:
            tensors[site.bias] = constant
        elif site.constants is not None:
            tensors[site.constants] = constant + tensors.get(site.constants, torch.zeros(())).float()
    return target.tell(block, tensors)


def write_config(config: PreTrainedConfig, path: Path) -> None:
    """config.json, with the rope keys of older releases of transformers beside the new ones (they ignore the new)."""
    values = config.to_diff_dict()
    rope = getattr(config, "rope_parameters", None)
    if rope and "full_attention" in rope:  # one for each kind of block
        if config.model_type in LOCAL_ROPE_KEYS and "sliding_attention" in rope:
            values[LOCAL_ROPE_KEYS[config.model_type]] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope and "rope_theta" in rope:
        scaling = dict(rope)
        values[ROPE_KEYS.get(config.model_type, "rope_theta")] = scaling.pop("rope_theta")
        if "partial_rotary_factor" in scaling:
            values["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
        if scaling["rope_type"] == "longrope" and "original_max_position_embeddings" in scaling:
            values["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        if config.model_type not in ROPE_KEYS:  # ModernBERT knew no scaling, and now takes it for both kinds of block
            values["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_side_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation config, templates and licence travel along."""
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            if path.name not in NOT_COPIED and path.is_file():
                copy = folder / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
