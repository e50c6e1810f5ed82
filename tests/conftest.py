import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """Here, and not above: the process that only hands out the tests has no need of torch."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # more only cost time where models are tiny


@pytest.fixture(autouse=True)
def _few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes half a second; tests that look at one are marked `draws`."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr("prune_peak.studies.ablation.can_draw", lambda: False)
        monkeypatch.setattr("prune_peak.export.card._draw", lambda path, recipe: False)


@pytest.fixture(autouse=True)
def loud() -> None:
    """A command's `-q` holds for its process: the next test in it, whatever ran before, hears warnings again."""
    logging.getLogger("prune_peak").setLevel(logging.WARNING)


LAW_TABLE = Path(__file__).parent.parent / "docs" / "law.md"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write docs/law.md and the map in CONTRIBUTING.md")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """One process writes the table, for each of several would hold a part of it."""
    if config.getoption("--write-docs"):
        config.option.numprocesses = 0
        config.option.markexpr = ""


@pytest.fixture(scope="session")
def law_table(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, ...]]]:
    """Rows that the tests of the law add, one a case; `pytest tests/test_site_kinds.py --write-docs` keeps them."""
    rows: list[tuple[str, ...]] = []
    yield rows
    if request.config.getoption("--write-docs"):
        columns = (
            "case",
            "`model_type`",
            "cut",
            "written as",
            "fill",
            "padded",
            "prefill",
            "decode",
            "before",
            "after",
        )
        lines = [columns, ("---",) * len(columns), *sorted(rows)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in lines)
        LAW_TABLE.write_text(f"{LAW_INTRODUCTION}\n{table}\n")


LAW_INTRODUCTION = """# The law, measured

The largest difference between the logits of the written checkpoint and those of the original with its neurons held, as
a share of the largest logit, in float32; the bound is 2e-5. Tiny random models of stock classes, other neurons cut in
every block; a left-padded batch, a full one (of images, where those are seen), and 24 tokens decoded with a cache.
`before` and `after` are parameters.
Made by `pytest tests/test_site_kinds.py --write-docs`.
"""


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled text is cached apart from the user's."""
    import prune_peak.data.self_generated

    monkeypatch.setattr(prune_peak.data.self_generated, "HF_HOME", tmp_path_factory.getbasetemp() / "hf-home")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of the kind the example models were trained on: a few dozen windows."""
    from pydoc_data.topics import topics

    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000])
    return path
