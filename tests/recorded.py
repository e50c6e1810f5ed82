"""The figures of README and docs, made of the recorded runs in docs/data.

`TABLES` holds what stands between the marks `<!-- table: NAME -->` and `<!-- end of NAME -->`, `STATED` the sentences
that state a figure, each as it must stand in its page. `compare` finds what differs, and figures that are in neither.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DATA = ROOT / "docs" / "data"
REASON = 220  # characters of a reason


@cache
def load(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text())


def make_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(row)} |") for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


# --- README


def printed() -> str:
    """What `compress` prints of sizes and quality."""
    run = load("compress")
    rows = [("", "before", "after", "change")]
    for name in ("neurons", "parameters", "bytes"):
        before, after = run[name]
        cells = (f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}")
        rows.append(("MLP neurons" if name == "neurons" else name, *cells))
    before, after = run["perplexity"]
    rows.append(("perplexity", f"{before:.2f}", f"{after:.2f}", f"x{after / before:.3f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
               for row in rows]  # fmt: skip
    neurons, parameters = (1 - after / before for before, after in (run["neurons"], run["parameters"]))
    told = f"Pruned: {neurons:.1%} of the MLP neurons (asked 30%: multiples of 32) = {parameters:.1%} of the model."
    return "\n".join(["```", *aligned, told, "", "Verified. Written to SmolLM2-peak-0.3.", "```"])


def expected() -> str:
    """What pruning the MLP of SmolLM2 costs and gives."""
    methods, latency = load("quality")["methods"], load("performance")["latency"]
    names = ("magnitude", "FLAP", "prune-peak")
    healed = {2: [run["perplexity"][2] for run in load("healing")["runs"][2:]]}
    speeds = {place: (latency["prefill_ratio"][n], latency["decode_ratio"][n]) for n, place in enumerate((2, 3))}
    rows = []
    for place, parameters in enumerate(methods["parameters"]):
        first, *others = (methods["perplexity"][name][place] for name in names)
        cells = [methods["columns"][place].removeprefix("mlp "), f"{parameters / 1e6:.0f} M", f"{first:,.0f}"]
        cells += [f"{value:.2f}" for value in others]
        cells.append(", ".join(f"{value:.2f}" for value in healed.get(place, ())))
        rows.append([*cells, ", ".join(f"x{value:.2f}" for value in speeds.get(place, ()))])
    head = ("MLP pruned", "parameters", "deleted by magnitude", "FLAP's criterion", "prune-peak", "healed*", "speed**")
    return make_table(head, rows)


def state_readme() -> list[str]:
    quality, healing, types = load("quality"), load("healing")["runs"], load("zoo")
    [talk] = [run["talk"] for run in healing if "talk" in run]
    counts = [count_types(types["types"], head) for head in HEADS]
    release = ".".join(types["transformers"].split(".")[:2])
    first, second = (f"{run['tokens']:,}" for run in healing[2:])
    return [
        f"SmolLM2-135M-Instruct, perplexity on WikiText-2 test; {quality['methods']['dense']:.1f} before.",
        f"{healing[2]['perplexity'][1]:.2f} before healing, then {first} and {second} tokens",
        f"{talk[1]['loops']} of 40 answers loop before healing and {talk[2]['loops']} after (original: "
        f"{talk[0]['loops']})",
        f"Of the types of transformers {release}, {counts[0]} causal language models, {counts[1]} masked ones, "
        f"{counts[2]} sequence-to-sequence ones and {counts[3]} image classifiers",
    ]


# --- docs/quality.md

METHODS = {
    "magnitude": "magnitude",
    "optipfair": "optipfair 0.4.2, its best criterion",
    "Wanda-sp": "Wanda-sp",
    "FLAP": "FLAP's criterion, mean bias",
    "peak": "prune-peak `--no-refit` (peak)",
    "prune-peak": "**prune-peak**",
}


def compare_methods() -> str:
    methods = load("quality")["methods"]
    rows = []
    for name, label in METHODS.items():
        values = methods["perplexity"][name]
        pattern = "**{}**" if name == "prune-peak" else "{}"
        cells = [pattern.format(f"{value:.2f}" if value < 1000 else f"{value:.0f}") for value in values]
        rows.append([label, *cells, *["-"] * (len(methods["columns"]) - len(cells))])
    return make_table(["", "MLP 10 %", "20 %", "30 %", "50 %", "1 of 3 heads of every group", "2 of 3"], rows)


def describe_targets() -> str:
    targets = load("quality")["targets"]
    rows = []
    for row in targets["rows"]:
        asked = f" ({row['asked']:,})" if "asked" in row else ""
        chose = f": {row['chose']}" if "chose" in row else ""
        sizes = (f"{row['parameters']:,}", f"{row['bytes']:,}")
        rows.append([f"`{row['options']}`{asked}{chose}", *sizes, f"{row['perplexity']:.2f}"])
    return make_table(["asked", "parameters", "bytes", f"perplexity (dense {targets['dense']:.2f})"], rows)


def describe_gemma() -> str:
    """A class whose MLP has no bias, so that pruned neurons are held at zero."""
    gemma = load("quality")["gemma"]
    rows = [(row["what"], f"`{row['options']}`", f"{row['perplexity']:,.2f}") for row in gemma["rows"]]
    return make_table(["", "options", f"perplexity (dense {gemma['dense']:.2f})"], rows)


def with_heads(values: Sequence[float]) -> str:
    """A figure of the MLP, and in brackets that of heads."""
    return " ".join([f"{values[0]:.2f}", *(f"({value:.2f})" for value in values[1:])]) if values else ""


def compare_texts() -> str:
    rows = []
    for row in load("quality")["calibrated on"]["rows"]:
        ours = with_heads(row["prune-peak"]) + (f"; {row['at 50 %']:.2f} at 50 %" if "at 50 %" in row else "")
        if "elimination alone" in row and len(row["elimination alone"]) > 1:
            ours += f"; with elimination alone, which is no option, {with_heads(row['elimination alone'])}"
        rows.append([row["text"], with_heads(row.get("peak", ())), with_heads(row.get("mean", ())), ours])
    return make_table(["calibrated on", "peak", "mean", "prune-peak"], rows)


def state_quality() -> list[str]:
    quality, costs = load("quality"), load("performance")
    both, texts, latency = quality["both kinds"], quality["calibrated on"], costs["latency"]
    foreign = texts["rows"][-1]
    calibration, large = costs["calibration"]["rows"], costs["large"]
    shares = [f"{share:.0%}".replace("%", " %") for share in latency["share"][1:]]
    gemma = quality["gemma"]
    return [
        f"bfloat16; dense {quality['methods']['dense']:.2f}",
        f"{100 * gemma['share']:.1f} % of its MLP cut: {gemma['parameters'][0]:,} -> {gemma['parameters'][1]:,} "
        "parameters.",
        f"{both['perplexity'][0]:.2f} becomes {both['perplexity'][1]:.2f} with {both['parameters'][0]:,} -> "
        f"{both['parameters'][1]:,} parameters",
        f"a fill of zero gave {foreign['zero'][0]:.2f} ({foreign['zero'][1]:.2f} for heads)",
        f"with elimination alone the refit gave {foreign['elimination alone'][0]:.2f} there, and "
        f"{texts['elimination alone']['WikiText-2 validation, 48 windows']:.2f} on WikiText-2",
        f"SmolLM2 with {shares[0]} and {shares[1]} of its MLP cut reads a prompt {latency['prefill_ratio'][0]:.2f} and "
        f"{latency['prefill_ratio'][1]:.2f} times as fast and writes {latency['decode_ratio'][0]:.2f} and "
        f"{latency['decode_ratio'][1]:.2f} times as fast on two cores, where the number of its "
        "parameters would predict "
        f"{latency['parameters_ratio'][0]:.2f} and {latency['parameters_ratio'][1]:.2f}.",
        f"Peaks and moments alone took {calibration[0]['ratio'][0]:.2f} times the bare forward pass of the same tokens "
        f"({calibration[2]['ratio'][0]:.2f} in a model of 1.3 billion), and a whole `compress` with "
        "elimination and refit, "
        f"verification apart, {calibration[3]['ratio'][0]:.2f} times.",
        f"writing 1.3 billion parameters took {costs['export']['ratio']:.2f} times a copy of the file",
        f"in {large['compress'] / 60:.0f} minutes and {large['memory_gb']:.2f} GB, {large['ratio']:.2f} times",
    ]


# --- docs/performance.md


def compare_speed() -> str:
    latency = load("performance")["latency"]
    rows = []
    for label, name in (("prefill", "prefill"), ("decoding", "decode")):
        first, *others = latency[name]
        cells = [f"{v:.1f} (x{r:.3f})" for v, r in zip(others, latency[f"{name}_ratio"], strict=True)]
        rows.append([f"{label}, tokens per second", f"{first:.1f}", *cells])
    rows.append(["inverse of the parameters", "", *(f"x{value:.3f}" for value in latency["parameters_ratio"])])
    shares = [", ".join(f"{value:.2f}" for value in pair) for pair in latency["share_of_that"]]
    rows += [["share of that: prefill, decoding", "", *shares], ["peak memory, MB", *map(str, latency["memory_mb"])]]
    return make_table(["", "dense", "30 %", "50 %"], rows)


def describe_costs() -> str:
    rows = []
    for row in load("performance")["calibration"]["rows"]:
        seconds = ["; ".join(", ".join(f"{v:.1f}" for v in run) for run in row[key]) for key in ("bare", "ours")]
        rows.append(
            [row["what"], *seconds, *("; ".join(f"{v:.2f}" for v in row[key]) for key in ("ratio", "processor"))]
        )
    return make_table(["what", "bare", "ours", "ratio", "of processor time"], rows)


def list_figures(result: dict[str, Any]) -> str:
    """The numbers that a script printed, by their names; of several runs one after the other."""
    parts = []
    for key, value in result.items():
        several = value if isinstance(value, list) else [value]
        if several and all(type(each) in (int, float) for each in several):
            parts.append(f"{key} {', '.join(f'{each:,}' for each in several)}")
        elif several and all(isinstance(each, dict) for each in several):
            parts.append("; ".join(map(list_figures, several)))
    return ", ".join(parts)


def describe_bench() -> str:
    rows = []
    for run in load("bench").values():
        place = f"{run['date']}, {run['machine']}"
        rows.append([f"`{run['command']}`", list_figures(run["result"]), f"`{run['commit']}`", place])
    return make_table(["command", "figures", "commit", "when and where"], rows)


def describe_growth() -> str:
    growth = load("performance")["growth"]
    head = ["doubled", "calibration, s", "exponent (expected)", "choice, s", "exponent (expected)"]
    rows = []
    for row in growth["rows"]:
        cells = [row["doubled"]]
        for what, exponent in (("calibration", "exponent"), ("choice", "choice_exponent")):
            cells += [f"{growth[what]:.2f} to {row[what]:.2f}", "{:.2f} ({})".format(*row[exponent])]
        rows.append(cells)
    return make_table(head, rows)


def describe_curve() -> str:
    head = ["windows", "tokens", "minutes", "text, 30 %", "text, 50 %", "own text, 30 %", "own text, 50 %"]
    rows = [[f"{windows}", f"{512 * windows:,}", f"{minutes:.1f}", *(f"{value:.2f}" for value in values)]
            for windows, minutes, *values in load("performance")["curve"]["rows"]]  # fmt: skip
    return make_table(head, rows)


def give(values: Sequence[float], digits: int = 1) -> str:
    *most, last = (f"{value:.{digits}f}" for value in values)
    return f"{', '.join(most)} and {last}"


def state_performance() -> list[str]:
    costs = load("performance")
    export, ranks, large, work = (costs[name] for name in ("export", "ranks", "large", "work"))
    budgets, block, curve, sampling = (costs[name] for name in ("budgets", "block", "curve", "sampling"))
    rows = {row[0]: row[2:] for row in curve["rows"]}
    early, late = ([rows[a][n] - rows[b][n] for n in range(4)] for a, b in ((12, 48), (48, 192)))
    return [
        f"a random Llama of 1.3 billion parameters took {give(export['ours'])} s, a copy of its weights "
        f"{give(export['copy'])} s: {export['ratio']:.2f}, with {export['memory_gb']:.2f} GB resident at most.",
        f"were {ranks['ratio']:.2f} times as fast as one, whole commands with their imports: "
        f"{give(ranks['alone'])} s alone, "
        f"{give(ranks['shared'])} s shared.",
        f"was {ranks['compress']['ratio']:.2f} times as fast, {ranks['compress']['alone']:.1f} s alone and "
        f"{ranks['compress']['shared']:.1f} s shared",
        f"reading it once took {large['read']:.1f} s, the bare forward {large['forward']:.1f}, writing the result once "
        f"{large['write']:.1f}, reading it back {large['read_back']:.1f}, and compressing it, evaluations and "
        f"verification included, {large['compress']:.1f}: {large['ratio']:.2f} times the sum. It held "
        f"{large['memory_gb']:.2f} GB at most.",
        f"{work['tflop']:.1f} TFLOP for 24,576 tokens",
        f"are {work['products_tflop']:.1f} TFLOP over 30 blocks: {work['products']:.2f} of the forward",
        f"8 GFLOP a site, {work['choosing']:.2f} of the forward",
        f"{budgets['budgets_gb'][0]:.1f} GB was refused, for {budgets['planned_gb']:.2f} were planned; a run held "
        f"{budgets['held_gb'][0]:.2f} GB at most within {budgets['budgets_gb'][1]}, and "
        f"{budgets['held_gb'][1]:.2f} within "
        f"{budgets['budgets_gb'][2]}.",
        f"the block {block['block'][0]:.1f} to {block['block'][1]:.1f}, peaks and moments "
        f"{block['moments']:.2f}, products "
        f"{block['products']:.1f}, elimination {block['elimination']:.2f}, refit {block['refit']:.2f}.",
        f"(float32, dense {curve['dense']:.2f})",
        f"From 12 windows to 48, perplexity falls by {early[0]:.1f} at 30 % and {early[1]:.1f} at 50 % on a text, by "
        f"{early[2]:.1f} and {early[3]:.1f} on own text; four times the tokens again, and four times the "
        "cost, buy another "
        f"{late[0]:.1f} and {late[1]:.1f}, {late[2]:.1f} and {late[3]:.1f}; beyond 192 nothing is gained.",
        f"On two threads its pass took {curve['two_threads_minutes']:.1f} minutes.",
        f"{sampling['windows']} windows took {sampling['seconds']} seconds on two threads "
        f"({sampling['seconds_float32']} from the model in float32)",
    ]


# --- docs/healing.md and docs/models.md


def describe_run(name: str, run: dict[str, Any]) -> str:
    distances, perplexities = run["divergence"], run["perplexity"]
    cells = [
        name,
        f"{run['tokens']:,}",
        run["method"],
        " -> ".join(f"{value:.3f}" for value in distances),
        " / ".join(f"{value:.2f}" for value in perplexities),
    ]
    talks = run.get("talk")
    cells += [
        " / ".join(str(talk["loops"]) for talk in talks) if talks else "",
        " / ".join(str(talk["ends"]) for talk in talks) if talks else "",
        " / ".join(f"{talk['divergence']:.2f}" for talk in talks[1:]) if talks else "",
        f"{run['minutes']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def describe_runs() -> str:
    recorded = load("healing")
    head = "| compressed | tokens | method | KL, held out | perplexity | loops | ends | KL along answers | minutes |"
    rows = [describe_run(run["name"], run) for run in recorded["runs"]]
    return "\n".join([head, "|---" * 9 + "|", *rows])


def describe_heads() -> str:
    """Healed models of other heads: the distance that was minimized, and a measure of the task on data never seen."""
    head = (
        "| model | pruned | learned on | distance, held out | measure on test data | original / compressed / healed |"
    )
    rows = []
    for run in load("heal_heads")["runs"]:
        cells = [
            run["model"],
            run["pruned"],
            run["learned"],
            " -> ".join(f"{value:.4f}" for value in run["divergence"]),
            run["task"],
            " / ".join(f"{value:.4f}" for value in run["test"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, "|---" * 6 + "|", *rows])


def describe_constants(row: dict[str, Any]) -> str:
    """Where the constants of a kind of site go."""
    return {"zero": "held at zero", "bias": "its bias"}.get(
        row["folded_into"], f"bias opened by `{row['folded_into']}`"
    )


def describe_type(name: str, row: dict[str, Any]) -> str:
    attention = row["attention"]
    heads = f"{describe_constants(attention)}, {attention['difference']:.0e}" if attention.get("passed") else "no"
    keys = ", ".join(f"`{key}`" for key in row["keys"])
    run = "one by one" if row["streamed"] else "whole"
    width = row if row["kind"] == "expert-mlp" else row.get("expert-mlp", {})
    experts = ", ".join(
        words for words, found in (("narrower", width), ("fewer", row.get("experts", {}))) if found.get("passed")
    )
    cells = [name, keys, describe_constants(row), f"{row['difference']:.0e}", heads, experts or "no", run]
    return f"| {' | '.join(cells)} |"


def describe_experts() -> str:
    """What removed and narrower experts cost, by the way to choose them; a column for every seed."""
    runs = load("experts")["runs"]
    rows = [
        [f"{100 * row['ratio']:.0f} % of the {UNITS[row['kind']]}", row["way"]]
        + [f"{each['increase']:.3f}" for each in alike]
        for alike in sorted(zip(*runs, strict=True), key=lambda alike: (alike[0]["kind"], alike[0]["ratio"]))
        for row in alike[:1]
    ]
    return make_table(["pruned", "chosen by", *(f"seed {seed}" for seed in range(len(runs)))], rows)


HEADS = {"causal": "causal language", "masked": "masked language", "seq2seq": "sequence-to-sequence", "image": "image"}


def count_types(types: dict[str, Any], head: str) -> str:
    """How many types with this head pass, of how many."""
    of = [row for name, row in types.items() if name.endswith(f"({head})")]
    return f"{sum(bool(row.get('passed')) for row in of)} of {len(of)}"


def describe_types() -> str:
    """Counts, the types that pass, and the others with their reasons."""
    recorded = load("zoo")
    types = recorded["types"]
    passed = {name: row for name, row in types.items() if row.get("passed")}
    counts = []
    for head, words in HEADS.items():
        heads = sum(bool(row.get("attention", {}).get("passed")) for name, row in types.items() if f"({head})" in name)
        counts.append(f"{count_types(types, head)} {words} models ({heads} with their heads)")
    return "\n".join(
        [
            f"transformers {recorded['transformers']}: {', '.join(counts)}. None gave a wrong result.",
            "",
            "| type | config keys of the MLPs | constants go to | law | heads: constants, law | experts | blocks run |",
            "|---|---|---|---|---|---|---|",
            *(describe_type(name, row) for name, row in sorted(passed.items())),
            "",
            "The others are refused:",
            "",
            *(f"- {name}: {shorten(row['reason'])}" for name, row in sorted(types.items()) if name not in passed),
        ]
    )


def shorten(reason: str) -> str:
    """One line without what Markdown would read."""
    text = " ".join(reason.split()).replace("|", "/").replace("<", "").replace("*", "")
    return text if len(text) <= REASON else text[:REASON].rsplit(" ", 1)[0] + " ..."


# --- docs/experts.md

UNITS = {"experts": "experts", "expert-mlp": "neurons of every expert"}


# --- docs/blocks.md

REPLACED = {"removed": "nothing", "mean": "its mean contribution", "map": "the map"}


def describe_blocks() -> str:
    """What one of three blocks costs the examples, by what replaces it."""
    rows = []
    for run in load("blocks")["small"]:
        (accuracy, loss), (accuracy_after, loss_after) = run["before"], run["after"]
        accuracies = f"{100 * accuracy:.1f} %, {100 * accuracy_after:.1f} %"
        rows.append([f"`{run['model']}`", REPLACED[run["way"]], accuracies, f"{loss:.3f}, {loss_after:.3f}"])
    return make_table(["model", "replaced by", "accuracy before, after", "cross-entropy before, after"], rows)


def describe_fewer_blocks() -> str:
    """What a real model costs without some of its blocks."""
    first, *others = load("blocks")["model"]
    rows = [[f"{len(run['removed'])}: {', '.join(map(str, run['removed']))}", f"{run['parameters']:,}",
             f"{run['perplexity']:.2f}"] for run in others]  # fmt: skip
    dense = f"dense {first['perplexity']:.2f}, {first['parameters']:,} parameters"
    return make_table(["blocks that leave", "parameters", f"perplexity ({dense})"], rows)


def state_blocks() -> list[str]:
    latency = load("blocks")["latency"]
    decode, prefill = ([f"{ratio:.2f}" for ratio in latency[name]] for name in ("decode", "prefill"))
    fewer, narrower = (f"{count:,}" for count in latency["parameters"])
    return [
        f"Without 6 blocks ({fewer} parameters) it writes {', '.join(decode[:-1])} and {decode[-1]} times as fast as "
        f"with narrower MLPs ({narrower}), in three runs, and reads {', '.join(prefill[:-1])} and {prefill[-1]} times "
        "as fast.",
    ]


# --- docs/study.md


def with_error(cell: Sequence[Any], sign: str = "") -> str:
    """A figure and its error; bold where the difference is significant."""
    text = f"{cell[0]:{sign}.3f} ± {cell[1]:.3f}"
    return f"**{text}**" if len(cell) > 2 else text


def describe_intact() -> str:
    rows = [[row["model"], f"{with_error(row['loss'])}, {row['top1']:.1f} %", row["command"]]
            for row in load("study")["intact"]]  # fmt: skip
    return make_table(["model", "intact: cross-entropy, top-1", "the command"], rows)


def describe_fills(name: str, sign: str = "", keys: Sequence[str] = ("model", "neurons")) -> Callable[[], str]:
    def describe() -> str:
        found = load("study")[name]
        rows = [[*row[: len(keys)], *(with_error(cell, sign) for cell in row[len(keys) :])] for row in found["rows"]]
        return make_table([*keys, *found["columns"]], rows)

    return describe


def describe_distributions() -> str:
    found = load("study")["distributions"]
    patterns = ("{:.1f}%", "{:.2f}", "{:+.2f}", "{:.1f}", "{:.1f}%")
    rows = [[*row[:2], *(pattern.format(value) for pattern, value in zip(patterns, row[2:], strict=True))]
            for row in found["rows"]]  # fmt: skip
    return make_table(["model, text", "neurons", *found["columns"]], rows)


def describe_stability() -> str:
    found = load("study")["stability"]
    rows = [[*row[:2], *(f"{value:.3f}" for value in row[2:])] for row in found["rows"]]
    return make_table(["model", "neurons", *found["columns"]], rows)


def state_study() -> list[str]:
    study = load("study")
    smollm2, roberta, mlp, seed, head = study["curves"]
    [neuron], (first, second) = study["neuron"], study["costs"]
    gained, earlier = smollm2["gained"], seed["one seed of an earlier run"]
    drifts = {row[1]: row[2:] for row in study["stability"]["rows"] if row[0] == "smollm2"}
    peaks = next(row[3:] for row in study["cross"]["rows"] if row[:3] == ["smollm2", "attention", "peak"])
    roberta_peaks = next(row[2:5] for row in study["comparisons"]["rows"] if row[:2] == ["roberta-mini", "attention"])
    errors = [difference / error for difference, error in roberta_peaks]
    return [
        f"its intact cross-entropy is {mlp['intact']:.3f} there.",
        f"gains {gained['mean']:.2f} nats at the mean, {gained['peak']:.2f} at the peak, {gained['zero']:.2f} at zero.",
        f"is not significant ({min(errors):.1f} to {max(errors):.1f} errors)",
        f"gains {roberta['gained']['peak']:.1f} nats, more than resampling with {roberta['gained']['resample']:.1f}.",
        f"reaches {neuron['first']} at first tokens, where its median is {neuron['median']} and its mean "
        f"{neuron['mean']}.",
        f"{earlier['mean']:.1f} nats gained at the mean, {earlier['median']:.1f} at the median.",
        f"gains {with_error(head['gained']['zero'])} nats",
        f"moves means by {drifts['attention'][3]:.2f} deviations in attention and {drifts['mlp'][3]:.2f} "
        "in the MLP, peaks by "
        f"{drifts['attention'][1]:.2f} and {drifts['mlp'][1]:.2f}.",
        f"the peak costs {peaks[1][0]:.2f} to {peaks[0][0]:.2f} nats more than the mean, across texts "
        f"{peaks[2][0]:.2f} more and "
        f"{-peaks[3][0]:.2f} less",
        f"{first['seconds']:.1f} s, which is {first['passes']:.2f} times the 92 forward passes it made "
        "(body and head, as an "
        f"evaluation needs them), {first['rows']:.2f} times one pass for each of the 100 rows. Against "
        "the body alone it is "
        f"{first['body'][0]:.2f} and {first['body'][1]:.2f} times: SmolLM2's head over 49,152 tokens costs "
        f"{first['head']:.0%} of its body.".replace("%", " %"),
        f"{second['seconds']:.1f} s, {second['passes']:.2f} times the 92 passes, {second['rows']:.2f} "
        "times a pass for each row; "
        f"against the body alone {second['body'][0]:.2f} and {second['body'][1]:.2f}, for the head is "
        f"{second['head']:.0%} of "
        "the body there.".replace("%", " %"),
    ]


def state_guide() -> list[str]:
    both, only = (row["perplexity"] for row in reversed(load("quality")["targets"]["rows"][:2]))
    costs = load("performance")
    budgets = costs["budgets"]
    return [
        f"(perplexity {only:.2f}; both kinds: {both:.2f})",
        f"a model of 7 billion parameters was compressed in {costs['large']['memory_gb']:.2f} GB.",
        f"planned to take {budgets['planned_gb']:.2f} GB, held {budgets['held_gb'][0]:.2f} in a budget of "
        f"{budgets['budgets_gb'][1]} and {budgets['held_gb'][1]:.2f} in one of {budgets['budgets_gb'][2]}",
    ]


def state_models() -> list[str]:
    found = load("narrow_heads")
    uncut, neurons, heads = (found[name] for name in ("uncut", "half of the neurons", "half of the heads"))
    return [
        f"({100 * uncut[0]:.1f} % of 360 held-out images, cross-entropy {uncut[1]:.3f}) half of the neurons gave "
        f"{100 * neurons[0]:.1f} % ({neurons[1]:.3f}), half of the heads, the same parameters, {100 * heads[0]:.1f} % "
        f"({heads[1]:.3f})"
    ]


# --- docs/engines.md


def describe_engine(engine: dict[str, Any]) -> list[list[str]]:
    """A row for every folder that an engine ran or refused; the engine is named in the first."""
    versions = ", ".join(f"{name} {version}" for name, version in engine.get("versions", {}).items())
    if "failed" in engine:
        return [[engine["name"], versions, "", "", "", "", shorten(engine["failed"])]]
    rows = []
    for name, row in engine["folders"].items():
        named = ["", ""] if rows else [engine["name"], versions]
        cells = [*named, f"{name} ({row['class'].removesuffix('ForCausalLM')})"]
        if "refused" in row:
            rows.append([*cells, "", "", "", f"refused: {shorten(row['refused'])}"])
            continue
        gap = f"; the best two of transformers are {row['gap']:.3f} apart there" if row.get("gap") is not None else ""
        tokens = f"{row['same']}{gap}" if "same" in row else ""
        speed = f"x{row['ratio']:.2f}" if row.get("ratio") and name != "original" else ""
        rows.append([*cells, tokens, f"{row['difference']:.0e}", speed, ""])
    return rows


def describe_engines() -> str:
    head = ["engine", "versions", "model", "tokens", "log-probabilities", "speed", ""]
    return make_table(head, (row for engine in load("engines")["engines"] for row in describe_engine(engine)))


def list_commands() -> str:
    blocks = []
    for engine in load("engines")["engines"]:
        lines = "\n".join(engine["commands"])
        blocks += [f"### {engine['name']}", "", "```", lines, "```", ""]
        if answer := engine.get("answer"):
            blocks += ["It printed:", "", "```", answer, "```", ""]
    return "\n".join(blocks).rstrip()


def describe_ways() -> str:
    ways = load("whole_way")["ways"]
    steps = max(ways.values(), key=len)
    cells = {name: [f"{row[step]:.0f}" if step in row else "" for step in steps] for name, row in ways.items()}
    return make_table(["seconds", *steps], ([name, *row] for name, row in cells.items()))


# --- all pages

TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"printed": printed, "expected": expected},
    "docs/quality.md": {
        "methods": compare_methods,
        "targets": describe_targets,
        "gemma": describe_gemma,
        "texts": compare_texts,
    },
    "docs/performance.md": {
        "speed": compare_speed,
        "costs": describe_costs,
        "growth": describe_growth,
        "curve": describe_curve,
        "bench": describe_bench,
    },
    "docs/healing.md": {"heads": describe_heads, "runs": describe_runs},
    "docs/experts.md": {"experts": describe_experts},
    "docs/blocks.md": {"blocks": describe_blocks, "fewer blocks": describe_fewer_blocks},
    **{f"docs/{name}.md": {} for name in ("guide", "choose", "chat", "evaluate", "serve", "faq", "how-it-works")},
    "docs/models.md": {"types": describe_types},
    "docs/engines.md": {"engines": describe_engines, "commands": list_commands, "ways": describe_ways},
    "docs/study.md": {
        "intact": describe_intact,
        "areas": describe_fills("areas"),
        "comparisons": describe_fills("comparisons", "+"),
        "distributions": describe_distributions,
        "stability": describe_stability,
        "cross": describe_fills("cross", "+", ("model", "neurons", "fill")),
    },
}
STATED: dict[str, Callable[[], list[str]]] = {
    "README.md": state_readme,
    "docs/quality.md": state_quality,
    "docs/performance.md": state_performance,
    "docs/guide.md": state_guide,
    "docs/models.md": state_models,
    "docs/blocks.md": state_blocks,
    "docs/study.md": state_study,
}
NOT_PROSE = re.compile(r"```.*?```|`[^`]*`|<!--.*?-->|<picture>.*?</picture>|\]\([^)]*\)", re.DOTALL)
# Names and settings, in which a number is no figure
SETTINGS = re.compile(
    r"SmolLM2(-135M)?(-Instruct)?|WikiText-2|Python 3\.11|Apache 2\.0|torch 2\.13\.0"
    r"|transformers 5\.\d+(\.0)?|cyllama [\d.]+|from [45]\.\d+(\.\d+)?|optipfair 0\.4\.2"
    r"|\d{4}-\d\d-\d\d|4 bits|Shibayama 2024|OPT-1\.3B|arXiv 2408\.17322|[\d.]+ billion"
    r"|[\d,]+ (tokens|windows)|\d+ x \d+ tokens"
)
FIGURE = re.compile(r"\d+[.,]\d+")


def mark(name: str, table: str) -> str:
    return f"<!-- table: {name} -->\n\n{table}\n\n<!-- end of {name} -->"


def write_tables(text: str, page: str) -> str:
    """The page with its tables as they are recorded."""
    for name, describe in TABLES[page].items():
        pattern = re.compile(rf"<!-- table: {name} -->.*?<!-- end of {name} -->", re.DOTALL)
        assert len(pattern.findall(text)) == 1, (page, name)
        text = pattern.sub(lambda _, n=name, d=describe: mark(n, d()), text)  # type: ignore[misc]
    return text


def compare(text: str, page: str, figure: re.Pattern[str] = FIGURE) -> list[str]:
    """What of a page is not what was recorded: tables, sentences, and figures that stand in neither."""
    wrong = []
    for name, describe in TABLES[page].items():
        table = mark(name, describe())
        if table not in text:
            wrong.append(f"table {name}")
        text = text.replace(table, "")
    text = " ".join(text.split())
    for sentence in STATED.get(page, list)():
        if sentence not in text:
            wrong.append(sentence)
        text = text.replace(sentence, "")
    prose = SETTINGS.sub("", NOT_PROSE.sub("", text))
    return wrong + [prose[max(0, found.start() - 40) : found.end() + 10] for found in figure.finditer(prose)]
