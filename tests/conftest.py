import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers.utils import logging as transformers_logging

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled text is cached apart from the user's."""
    import prune_peak.texts

    monkeypatch.setattr(prune_peak.texts, "HF_HOME", tmp_path_factory.getbasetemp() / "hf-home")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of the kind the example models were trained on: a few dozen windows."""
    from pydoc_data.topics import topics

    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000])
    return path
