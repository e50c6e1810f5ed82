"""A plan and a host become a folder: shards, config, side files.

The target class is built on `meta` and its state dict walked: every tensor is copied, cut, folded, or an explicit zero
bias that the host's flag opened. Anything else is a refusal, before the first byte.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .checkpoint import Writer, save_tensors
from .errors import PrunePeakError
from .folding import clear, cut, fold
from .hosts import Target
from .selection import Choice
from .sites import Site
from .source import SIDE_FILES, Source, build_blank

RECIPE_FILE = "prune_peak.json"
PLAN_FILE = "prune_peak_plan.safetensors"

# What we write ourselves, or what belongs to the source's files alone
NOT_COPIED = {"config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", RECIPE_FILE}

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def lay_out(source: Source, sites: Sequence[Site], target: Target) -> Layout:
    """Name, shape and type of every tensor to write.

    Raises:
        PrunePeakError: the target class needs a tensor that is neither copied, cut, folded nor a zero bias.
    """
    blank = build_blank(target.model_class, target.config)
    twins = {twin for twin, first in blank.all_tied_weights_keys.items() if twin != first}
    cuts = {name: (site, axis) for site in sites for name, axis in site.cuts.items()}
    source_state = source.blank.state_dict()
    layout: Layout = {}
    for name, empty in blank.state_dict().items():
        shape = tuple(empty.shape)
        if name in twins:
            continue
        if name in source_state:
            dtype = source.checkpoint.dtype(source.names[source.tied.get(name, name)])
            expected = tuple(source_state[name].shape)
            if name in cuts:
                axis = cuts[name][1]
                expected = (*expected[:axis], shape[axis], *expected[axis + 1 :])
        elif name.endswith(".bias"):
            weight = name.removesuffix("bias") + "weight"
            dtype = source.checkpoint.dtype(source.names[weight])
            expected = (blank.state_dict()[weight].shape[0],)
        else:
            raise PrunePeakError(f"{target.model_class.__name__} needs {name}, which {source.name} does not have.")
        if shape != expected:
            raise PrunePeakError(f"{target.model_class.__name__} wants {name} as {shape}, the cut gives {expected}.")
        layout[name] = (shape, dtype)
    lost = [name for name in source.names if name not in layout and name not in twins]
    if lost:
        raise PrunePeakError(f"{target.model_class.__name__} has no place for {', '.join(lost[:3])}.")
    return layout


class Export:
    """Writes the tensors of one plan: `write_site` as the choices come, then `finish` for all the others."""

    def __init__(self, source: Source, target: Target, layout: Layout, folder: Path) -> None:
        self.source, self.target, self.layout, self.folder = source, target, layout, folder
        self._writer = Writer(folder, layout)
        self._plan: dict[str, Tensor] = {}

    def __enter__(self) -> "Export":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def write_site(self, site: Site, choice: Choice) -> None:
        for name, tensor in cut_site(self.source, site, choice).items():
            self._writer.write(name, tensor.to(self.layout[name][1]))
        self._plan[f"{site.name}.keep"] = choice.keep
        self._plan[f"{site.name}.fill"] = choice.fill
        self.source.checkpoint.release()

    def finish(self) -> dict[str, str]:
        """Write the rest, the config, the plan and the side files; returns the digests of all tensors."""
        for name, (shape, dtype) in self.layout.items():
            if name in self._writer.digests:
                continue
            if name in self.source.names:
                self._writer.write(name, self.source.read(name))
                self.source.checkpoint.release()
            else:
                self._writer.write(name, torch.zeros(shape, dtype=dtype))
        digests = self._writer.finish()
        save_tensors(self._plan, self.folder / PLAN_FILE)
        write_config(self.target.config, self.folder / "config.json")
        copy_side_files(self.source.folder, self.folder)
        return digests


def cut_site(source: Source, site: Site, choice: Choice) -> dict[str, Tensor]:
    """The tensors of a site as the plan changes them: rows and columns gone, or zero; constants in the bias (float32).

    A refitted reader is taken as it is.
    """
    tensors = {}
    for name, axis in site.cuts.items():
        tensor = source.read(name)
        if site.in_place:
            tensors[name] = clear(tensor, site.idle(name, choice.keep), axis)
        else:
            tensors[name] = cut(tensor, site.rows(choice.keep, tensor.shape[axis]), axis)
    weight = site.as_matrix(source.read(site.weight))
    if choice.weight is not None and choice.bias is not None:
        refitted = choice.weight
        if site.in_place:
            refitted = torch.zeros(weight.shape).index_copy(1, choice.keep, refitted)
        return tensors | {site.weight: site.as_matrix(refitted), site.bias: choice.bias}
    bias = source.read(site.bias) if site.bias in source.names else None
    tensors[site.bias] = fold(weight, bias, choice.fill, choice.keep)
    return tensors


def write_config(config: PreTrainedConfig, path: Path) -> None:
    """config.json, with the rope keys of older releases of transformers beside the new ones (they ignore the new)."""
    values = config.to_diff_dict()
    rope = getattr(config, "rope_parameters", None)
    if rope and "rope_theta" in rope:
        scaling = dict(rope)
        values["rope_theta"] = scaling.pop("rope_theta")
        if "partial_rotary_factor" in scaling:
            values["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
        values["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_side_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation config, templates and licence travel along."""
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            if path.name not in NOT_COPIED and path.is_file():
                shutil.copyfile(path, folder / path.name)
