"""Imported by the fork server of `faults.py` alone: one small run, after which its children find all imported."""

import tempfile
from pathlib import Path

import torch

from prune_peak import compress

torch.set_num_threads(1)  # threads do not survive a fork
with tempfile.TemporaryDirectory() as scratch:
    text = Path(scratch, "text.txt")
    text.write_text("To be warm is to have run before. " * 200)
    model = Path(__file__).parent.parent / "examples" / "llama-mini"
    compress(str(model), 0.3, Path(scratch, "cut"), calibration=str(text), samples=4, sequence_length=32)
