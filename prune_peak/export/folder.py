"""The output folder: plan + conversion -> shards, config, side files.

Every tensor of the written class is copied, sliced, folded, converted, or a zero bias that the config opens.
`Conversion.layout` refuses anything else before the first byte.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..conversion.layout import Conversion
from ..errors import PrunePeakError, spell
from ..io.side_files import find_left_behind, find_side_files
from ..io.tensor_files import save_tensors
from ..io.untrusted import MODULES, find_modules, module_classes, read_json
from ..io.writer import Writer, is_finite
from ..models.config_checks import read_generation
from ..models.families import FAMILIES, tensors_by_block
from ..models.loading import Model
from ..models.weight_names import names_on_disk, split_merged
from ..progress import track
from ..sites.plan import SitePlan, pack_plan
from ..sites.site import Tensors
from .recipe import PLAN_FILE

# Keys of the rotary base in older releases, and of that of blocks with a window
ROPE_KEYS = {"modernbert": "global_rope_theta"}
LOCAL_ROPE_KEYS = {"gemma3_text": "rope_local_base_freq", "modernbert": "local_rope_theta"}

GENERATION_FILE = "generation_config.json"
CONFIGS = ("tokenizer_config.json", "processor_config.json", "generation_config.json")  # that can name code
NAMED = 8  # of the files that are not copied

log = logging.getLogger(__name__)


class FolderWriter:
    """Writes the tensors of one plan: `write_block` block by block, then `finish` for the rest."""

    def __init__(self, source: Model, conversion: Conversion, folder: Path) -> None:
        self.source, self.conversion, self.layout, self.folder = source, conversion, conversion.layout, folder
        self._names = names_on_disk(conversion.meta_model)
        layout = {self._names[name]: of for name, of in self.layout.items() if name in self._names}
        merged = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in self.layout.items()
            if name not in self._names
        }
        for disk, tensor in split_merged(conversion.meta_model, merged).items():
            layout[disk] = (tuple(tensor.shape), tensor.dtype)
        self._writer = Writer(folder, layout)
        self._plan: dict[str, SitePlan] = {}

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def write_block(self, block: int, plan: Mapping[str, SitePlan]) -> dict[str, str]:
        """Write a block, pruned by the plans of its sites; returns the digests of its tensors."""
        digests = self._write(block, plan)
        self._plan |= {name: choice.without_weights() for name, choice in plan.items()}
        return digests

    def holds_block(self, plan: Mapping[str, SitePlan], digests: Mapping[str, str]) -> bool:
        """Whether an earlier run wrote this block with these digests; then it is not written again."""
        if not self._writer.holds(digests):
            return False
        self._plan |= plan
        return True

    def finish(self) -> dict[str, str]:
        """Write the other tensors, the config, the plan and the side files; returns the digests of all tensors."""
        changed = {site.block for site in self.conversion.sites}
        unchanged = [
            block for block in tensors_by_block(self.source.meta_model, self.source.family) if block not in changed
        ]
        for block in track(unchanged, "write the rest", "block"):
            self._write(block, {})
        for name, (shape, dtype) in self.layout.items():
            if name in self._names and self._names[name] not in self._writer.digests:
                assert name.endswith(".bias"), name
                self._writer.write(self._names[name], torch.zeros(shape, dtype=dtype))
        digests = self._writer.finish()
        save_tensors(pack_plan(self._plan), self.folder / PLAN_FILE)
        write_config(self.conversion.config, self.folder / "config.json")
        copy_side_files(self.source.folder, self.folder)
        if self.conversion.model_class.can_generate() and not (self.folder / GENERATION_FILE).exists():
            read_generation(self.source.folder).to_json_file(self.folder / GENERATION_FILE)
        return digests

    def _write(self, block: int | None, plan: Mapping[str, SitePlan]) -> dict[str, str]:
        merged: Tensors = {}
        disk_names = []
        for name, tensor in prune_block(self.source, self.conversion, plan, block).items():
            written = tensor.to(self.layout[name][1])
            if tensor.dtype != written.dtype and is_finite(tensor) and not is_finite(written):
                narrow, kind = str(written.dtype).removeprefix("torch."), self.source.model_class.__name__
                raise PrunePeakError(
                    f"the new values of {name}, which take the constants of the pruned neurons, are too large for "
                    f"{narrow}; the original's are not. Save it in bfloat16 first ({kind}.from_pretrained(DIR, "
                    f"dtype='bfloat16').save_pretrained(OTHER)), or try {spell('refit', False)} or another "
                    f"{spell('fill')}."
                )
            if name in self._names:
                self._writer.write(self._names[name], written)
                disk_names.append(self._names[name])
            else:
                merged[name] = written
        for disk, tensor in split_merged(self.conversion.meta_model, merged).items():
            self._writer.write(disk, tensor.contiguous())
            disk_names.append(disk)
        self.source.checkpoint.release()
        return {disk: self._writer.digests[disk] for disk in disk_names}


def prune_block(source: Model, conversion: Conversion, plan: Mapping[str, SitePlan], block: int | None) -> Tensors:
    """The tensors of a source block (None: outside the blocks), pruned by a plan and converted.

    Tensors that change are float32.
    """
    tensors = {name: source.read(name) for name in tensors_by_block(source.meta_model, source.family)[block]}
    if conversion.mapping is not None:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    return conversion.prune(block, tensors, plan)


def write_config(config: PreTrainedConfig, path: Path) -> None:
    """Write config.json, with the rope keys of older releases of transformers too, because they ignore the new ones."""
    values = config.to_diff_dict()
    rope = getattr(config, "rope_parameters", None) if config.model_type in FAMILIES else None  # others are newer
    if rope and "full_attention" in rope:  # one per kind of block
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
        if config.model_type not in ROPE_KEYS:  # ModernBERT had no scaling, and now applies it to both kinds of block
            values["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_side_files(source: Path) -> None:
    """Refuse modules of sentence-transformers that are not copied: pickles, and classes of code beside the weights.

    What else is not copied is named, once.

    Raises:
        PrunePeakError: such a module; the output would lack it.
    """
    for module in find_modules(source):
        for path in (source / module).rglob("*.bin"):
            if not any(path.parent.glob("*.safetensors")):
                raise PrunePeakError(
                    f"{path} is a pickle, which is not copied; expected model.safetensors beside it. Load {source} "
                    "with sentence-transformers and save it again."
                )
    custom = [name for name in module_classes(source) if not name.startswith("sentence_transformers.")]
    if custom:
        raise PrunePeakError(
            f"{source / MODULES} names the class {custom[0]!r}, whose code is not copied and never run. Remove the "
            "file to compress the model without its modules."
        )
    others = find_left_behind(source)
    if others:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        log.warning("Not copied, because no loader of the model reads it: %s%s.", ", ".join(others[:NAMED]), more)


def _remove_code(path: Path) -> None:
    with suppress(OSError, ValueError):  # broken files are left as they are
        settings = read_json(path)
        if isinstance(settings, dict) and settings.pop("auto_map", None) is not None:
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy what loaders read beside the weights, and the terms of use, without references to code (`auto_map`)."""
    for name in find_side_files(source):
        path, copy = source / name, folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        if "/" not in name and name.endswith(CONFIGS):
            _remove_code(copy)
    for name in find_modules(source):  # some have no file (Normalize)
        (folder / name).mkdir(parents=True, exist_ok=True)
