"""The whole way from a model to a smaller one that stock transformers loads."""

import json
import logging
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from . import __version__
from .calibration import (
    SAMPLES,
    SELF,
    SEQUENCE_LENGTH,
    Windows,
    calibrate,
    choose_windows,
    into_batches,
    load_tokenizer,
    own_windows,
    tokenize_text,
    window_length,
)
from .errors import PrunePeakError, UsageError, VerificationError
from .evaluation import Perplexity, Verification, measure_perplexity, verify
from .export import RECIPE_FILE, Export, lay_out
from .hosts import choose_target
from .selection import FILLS, kept_width, select
from .sites import find_sites
from .source import Source, open_source

log = logging.getLogger(__name__)

EVALUATED = 24  # windows of an --evaluate text, from its start
DISK_MARGIN = 50_000_000  # bytes that must stay free beside the output


@dataclass(frozen=True)
class Size:
    """How large a checkpoint is."""

    neurons: int  # of the MLP, over all blocks
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Compression:
    """What `compress` did: where the result is, and its numbers before and after."""

    output: Path
    model_class: str
    before: Size
    after: Size
    share: float  # of the neurons that were cut
    perplexity_before: Perplexity | None
    perplexity_after: Perplexity | None
    verification: Verification

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"output": str(self.output)}


def compress(
    model: str,
    ratio: float,
    output: str | Path | None = None,
    *,
    fill: str = "peak",
    calibration: str = SELF,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    multiple_of: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    evaluate: str | Path | None = None,
    force: bool = False,
) -> Compression:
    """Cut a share of a model's MLP neurons and write a smaller checkpoint that stock transformers loads.

    Args:
        model: a folder or a Hub id.
        ratio: the share of the neurons to cut at every block.
        output: the folder to write; `./<name>-peak-<ratio>` by default.
        fill: the constant a cut neuron is held at: peak, mean, median or zero.
        calibration: a text file, or "self" for text that the model writes itself.
        samples, sequence_length: windows of calibration, and their tokens.
        multiple_of: kept widths are a multiple of this (default 32; 8 for widths below 512).
        dtype: the type to compute in; the files keep the source's.
        evaluate: a text to measure perplexity on, before and after; held-out windows of the calibration otherwise.
        force: replace an existing output.

    Raises:
        PrunePeakError: bad input, before work starts, or a result that does not verify.

    Example:
        >>> result = compress("examples/opt-mini", 0.3, "out", force=True)  # doctest: +SKIP
        >>> result.after.parameters < result.before.parameters              # doctest: +SKIP
        True
    """
    _check_options(fill, samples)
    source = open_source(model, revision)
    sites = find_sites(source.blank, source.family)
    kept = kept_width(sites[0].neurons, ratio, multiple_of)
    target = choose_target(source, kept)
    layout = lay_out(source, sites, target)
    folder = Path(output) if output is not None else Path(f"{Path(model).resolve().name}-peak-{ratio}")
    compute = _compute_dtype(source, dtype)
    length = window_length(source, sequence_length)
    scored = None if evaluate is None else tokenize_text(Path(evaluate), load_tokenizer(source), length)[:EVALUATED]
    partial = _prepare_output(folder, force, sum(torch.Size(s).numel() * d.itemsize for s, d in layout.values()))
    try:
        windows = _find_windows(source, calibration, samples, length, seed)
        with Export(source, target, layout, partial) as export:
            for site, summary in calibrate(source, sites, into_batches(windows.calibration), compute):
                weight = site.as_matrix(source.read(site.weight))
                export.write_site(site, select(summary, weight, kept, fill))
            digests = export.finish()
        written = open_source(str(partial))
        text = f"held-out windows of {windows.source}" if evaluate is None else Path(evaluate).name
        scored = windows.held_out if scored is None else scored
        before = measure_perplexity(source, scored, text, compute) if len(scored) else None
        after = measure_perplexity(written, scored, text, compute) if len(scored) else None
        recipe = {
            "prune_peak": __version__,
            "source": {"model": model, "revision": source.revision, "digest": source.digest},
            "options": {
                "ratio": ratio,
                "sites": "mlp",
                "fill": fill,
                "refit": False,
                "calibration": calibration if calibration == SELF else Path(calibration).name,
                "samples": len(windows.calibration),
                "sequence_length": length,
                "multiple_of": multiple_of,
                "dtype": str(compute).removeprefix("torch."),
                "seed": seed,
            },
            "calibration_digest": windows.digest,
            "host": target.model_class.__name__,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "before": asdict(_measure_size(source)),
            "after": asdict(_measure_size(written)),
            "perplexity": {"before": before and asdict(before), "after": after and asdict(after)},
            "tensors": digests,
        }
        _write_json(partial / RECIPE_FILE, recipe)
        verification = verify(partial, source)
        if not verification.passed:
            failed = [f"{check['check']} ({check['seen']})" for check in verification.checks if not check["passed"]]
            raise VerificationError(
                f"the compressed model does not compute what it should, so it was not kept: {'; '.join(failed)}."
            )
        _write_json(partial / RECIPE_FILE, recipe | {"verification": verification.checks})
    except PrunePeakError:
        shutil.rmtree(partial)
        raise
    result = Compression(
        output=folder,
        model_class=target.model_class.__name__,
        before=_measure_size(source),
        after=_measure_size(written),
        share=1 - kept / sites[0].neurons,
        perplexity_before=before,
        perplexity_after=after,
        verification=verification,
    )
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return result


def _check_options(fill: str, samples: int) -> None:
    if fill not in FILLS:
        raise UsageError(f"--fill {fill}: expected one of {', '.join(FILLS)}.")
    if samples < 1:
        raise UsageError(f"--samples {samples}: expected at least one window.")


def _compute_dtype(source: Source, dtype: str | None) -> torch.dtype:
    """The type asked for; else the source's, but float32 for float16, whose range activations overflow."""
    if dtype is None:
        return torch.float32 if source.dtype is torch.float16 else source.dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def _find_windows(source: Source, calibration: str, samples: int, length: int, seed: int) -> Windows:
    if calibration == SELF:
        return own_windows(source, samples, length, seed)
    windows = choose_windows(Path(calibration), source, samples, length, seed)
    if len(windows.calibration) < samples:
        log.warning(
            "%s holds %d windows of %d tokens to calibrate on, fewer than the %d asked for; used them all.",
            calibration,
            len(windows.calibration),
            length,
            samples,
        )
    return windows


def _prepare_output(folder: Path, force: bool, size: int) -> Path:
    """The empty folder to write into, beside the final name."""
    partial = folder.with_name(folder.name + ".partial")
    for path, meaning in ((folder, "exists"), (partial, "was left by a run that did not end")):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise PrunePeakError(f"{path} is a file; choose another --output.")
        if path.exists() and not force:
            raise PrunePeakError(f"{path} {meaning}; pass --force to replace it, or choose another --output.")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        raise PrunePeakError(f"{partial} cannot be written ({error.strerror}).") from None
    if free < size + DISK_MARGIN:
        partial.rmdir()
        raise PrunePeakError(
            f"{folder.parent} has {free / 1e9:.2f} GB free; the result needs {size / 1e9:.2f} GB. "
            "Choose another --output."
        )
    return partial


def _measure_size(source: Source) -> Size:
    neurons = sum(site.neurons for site in find_sites(source.blank, source.family))
    return Size(neurons=neurons, parameters=source.parameters, bytes=source.size)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
