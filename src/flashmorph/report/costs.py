"""Savings of the hybrid, and the cost of making it."""

from flashmorph.bench import timing_in_words
from flashmorph.report.charts import Chart, Lines, Series
from flashmorph.report.looks import label, look
from flashmorph.report.markup import duration, paragraph, sentence, size, table
from flashmorph.report.source import Source
from flashmorph.units import counted

_KINDS = {"prefill": "reading the whole context", "decode": "writing one token after it"}


def cache(source: Source) -> Chart:
    """Cache of one sequence against context. Plans of the same budget need the same, so two lines are enough."""
    series = []
    for name in ("teacher", "hybrid"):
        found = source.models[name]["cache_bytes"]
        contexts = sorted(map(int, found))
        hover = [f"{label(name)}, {context:,} tokens: {size(found[str(context)])}" for context in contexts]
        sizes = [found[str(context)] / 2**20 for context in contexts]
        series.append(Series(label(name), contexts, sizes, look(name), hover=hover))
    note = "One sequence, computed from the configuration in the checkpoint's dtype, states of the mixers included."
    ticks = {float(context): f"{context:,}" for context in series[0].x}
    panel = Lines("", "context, tokens", "cache, MiB", series, log_x=True, log_y=True, x_ticks=ticks)
    return Chart("cache", "Cache against context", note, [panel])


def speed(source: Source) -> Chart | None:
    """Time against context, where `bench` ran."""
    measured = source.benched
    if not measured:
        return None
    lengths = measured["settings"]["lengths"]
    panels = []
    for kind, about in _KINDS.items():
        series = []
        for number, (name, each) in enumerate(measured["models"].items()):
            rows = each[kind]["by_length"]
            series.append(
                Series(
                    label(name),
                    lengths,
                    [1e3 * row["median"] for row in rows],
                    look(name, number),
                    [1e3 * row["quartiles"][0] for row in rows],
                    [1e3 * row["quartiles"][1] for row in rows],
                    [
                        f"{label(name)}, {length:,} tokens: {1e3 * row['median']:,.2f} ms"
                        for length, row in zip(lengths, rows, strict=True)
                    ],
                )
            )
        ticks = {float(length): f"{length:,}" for length in lengths}
        panels.append(Lines(about, "context, tokens", "time, ms", series, log_x=True, log_y=True, x_ticks=ticks))
    machine = measured["machine"]
    threads = counted(machine["threads"], "thread")
    note = f"Medians, bars are quartiles; {machine['device']}, {machine['dtype']}, {threads}."
    return Chart("speed", "Time against context", note, panels)


def token_time(source: Source) -> str:
    """The time of a token against the budget, where that was in milliseconds."""
    timing = source.results.get("timing")
    return f"<h3>Time of a token</h3>{paragraph(sentence(timing_in_words(timing)))}" if timing else ""


def stages(source: Source) -> str:
    """The cost of each stage."""
    rows, seconds, tokens = [], 0.0, 0
    for stage in source.results["stages"]:
        seconds, tokens = seconds + stage["seconds"], tokens + (stage["tokens"] or 0)
        name = (source.labels.get(stage["digest"]) or stage["stage"]).replace("_", " ")
        rows.append((name, f"{stage['tokens']:,}" if stage["tokens"] else "", duration(stage["seconds"])))
    rows.append(("all", f"{tokens:,}", duration(seconds)))
    return table(("stage", "tokens trained on or searched with", "time"), rows, len(rows) - 1)
