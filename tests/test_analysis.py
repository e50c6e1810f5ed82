"""`analyze`: tables, pictures, and a report that a browser opens offline."""

import json
import re
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, look
from click.testing import CliRunner
from conftest import EXAMPLES

from prune_peak.cli.main import main
from prune_peak.errors import PrunePeakError, UsageError
from prune_peak.studies.analysis import NOISE, Analysis, analyze
from prune_peak.studies.distributions import MomentAccumulator
from prune_peak.studies.plots import _draw_histogram

LLAMA = str(EXAMPLES / "llama-mini")
PICTURES = ("histograms-mlp", "histograms-attention", "heads", "blocks", "drift")


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("analysis")
    words = "\n\n".join(topics[name] for name in sorted(topics))
    (folder / "topics.txt").write_text(words[:40_000])
    (folder / "backwards.txt").write_text(words[40_000:80_000][::-1])
    texts = [str(folder / "topics.txt"), str(folder / "backwards.txt")]
    options = {"samples": 4, "windows": 3, "sequence_length": 48}
    return analyze(LLAMA, folder / "out", data=texts, neuron=["mlp:1:17"], **options)  # type: ignore[arg-type]


def test_tables_hold_every_site_and_head(analysis: Analysis) -> None:
    written = json.loads((analysis.output / "distributions.json").read_text())
    assert written == json.loads(json.dumps(analysis.distributions))
    whole = [row for row in written if row["head"] is None]
    assert len(whole) == 2 * 3 * 2 * 2  # texts, blocks, kinds, first and rest
    assert len(written) - len(whole) == 2 * 3 * 4 * 2  # four heads a block
    assert {row["counted"] for row in whole if row["tokens"] == "first"} == {4}
    assert {row["counted"] for row in whole if row["tokens"] == "rest"} == {4 * 47}
    assert all((analysis.output / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in PICTURES)


def test_another_text_moves_neurons_further_than_other_windows_do(analysis: Analysis) -> None:
    def typical(other: str, number: str) -> float:
        values = [row[number] for row in analysis.stability if row["other"] == other and row["site"] == "mlp"]
        return sorted(values)[len(values) // 2]

    assert typical("backwards.txt", "mean_drift") > typical(NOISE, "mean_drift")
    assert len(analysis.stability) == 3 * 6  # each text with itself, and the two; six sites


def test_the_cross_table_knows_zero_and_its_own_differences(analysis: Analysis) -> None:
    rows = {tuple(row[key] for key in ("calibrated", "evaluated", "site", "fill")): row for row in analysis.cross}
    assert len(rows) == len(analysis.cross) == 2 * 2 * 2 * 4
    one, two = analysis.protocol["texts"]
    for evaluated in (one, two):
        for kind in ("mlp", "attention"):
            zeros = [rows[calibrated, evaluated, kind, "zero"]["cross_entropy_gained"] for calibrated in (one, two)]
            assert zeros[0] == zeros[1]
    peak, mean = rows[one, two, "mlp", "peak"], rows[one, two, "mlp", "mean"]
    difference = peak["cross_entropy_gained"] - mean["cross_entropy_gained"]
    assert peak["more_than_mean"] == pytest.approx(difference)


def test_the_report_asks_for_nothing_outside_itself(analysis: Analysis) -> None:
    page = (analysis.output / "report.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(links) == 1 + len(PICTURES)
    assert all(link.startswith("data:") for link in links)
    assert "<script" not in page
    assert "url(" not in page
    assert page.count("<table>") == 4
    assert re.search(r'<p class="conclusion">\d+% of the attention neurons have their peak off zero', page)
    assert re.search(r"<pre.*>prune-peak analyze \S+llama-mini .*--neuron mlp:1:17 .*</pre>\s*</footer>", page)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1100, 500], ids=["page", "phone"])  # headless windows are 500 wide at least
def test_a_browser_shows_the_report(analysis: Analysis, width: int) -> None:
    """No errors, no request, all pictures, and nothing wider than the screen."""
    seen = look(analysis.output / "report.html", width)
    assert seen["pictures"] == len(PICTURES)
    assert seen["entries"] == 0
    assert seen["wide"] <= 0
    assert seen["width"] == width
    assert seen["title"] == "How the neurons of llama-mini are distributed"


def test_a_neuron_that_hardly_moves_says_so() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    accumulator = MomentAccumulator(neurons=3, tokens=200)
    accumulator.add(torch.stack([torch.zeros(200), torch.arange(200.0).sub(120).relu(), torch.randn(200)], 1))
    shapes = accumulator.moments()
    said = []
    for neuron in range(3):
        axes = figure.add_subplot()
        _draw_histogram(axes, shapes, neuron)
        said.append([text.get_text() for text in axes.texts])
    assert said[0] == ["almost always 0"]
    assert re.fullmatch(r"0 for 6\d%\nof the tokens", said[1][0])
    assert said[2] == []


def test_the_command_prints_tables(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune_peak.studies.analysis.can_draw", lambda: False)
    arguments = ["analyze", "--model", LLAMA, "--data", str(text), "--samples", "2", "--sequence-length", "32", "-q"]
    told = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "one")])
    assert told.exit_code == 0, told.stderr
    assert "peak_off_zero" in told.stdout
    (tmp_path / "other.txt").write_text(text.read_text()[::-1])
    several = CliRunner().invoke(
        main, [*arguments, "--data", str(tmp_path / "other.txt"), "--output", str(tmp_path / "of")]
    )
    assert several.exit_code == 0, several.stderr
    assert "peak_drift" in several.stdout
    answer = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "two"), "--json"])
    assert set(json.loads(answer.stdout)) == {"protocol", "distributions", "stability", "cross"}
    assert not list((tmp_path / "two").glob("*.png"))
    assert (tmp_path / "two" / "report.html").is_file()
    assert "exists; pass --force" in CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "two")]).stderr


@pytest.mark.parametrize("neuron", ["mlp", "mlp:0", "mlp:0:x", "mlp:3:0", "mlp:0:384", "mlp:0:-1", "heads:0:0"])
def test_a_neuron_that_is_not_there_is_refused(neuron: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected KIND:BLOCK:NEURON, such as mlp:0:17, of blocks 0 to 2 with"):
        analyze(LLAMA, tmp_path / "out", neuron=[neuron])


def test_bad_input_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"two data sets are named text\.txt"):
        analyze(LLAMA, tmp_path / "out", data=[str(text), str(text)], samples=2, sequence_length=32)
    with pytest.raises(UsageError, match="samples=0"):
        analyze(LLAMA, tmp_path / "out", samples=0)
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:420])
    with pytest.raises(PrunePeakError, match=r"short\.txt.* too short"):
        analyze(LLAMA, tmp_path / "out", data=[str(text), str(short)], samples=2, sequence_length=64)
    with pytest.raises(PrunePeakError, match=r"none\.txt does not exist"):
        analyze(LLAMA, tmp_path / "out", data=[str(tmp_path / "none.txt")])
    assert not (tmp_path / "out").exists()
