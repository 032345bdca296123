"""Losses on text: perplexity by position, losses by class of token."""

from html import escape

from flashmorph.records import Figures
from flashmorph.report.charts import Chart, Dots, Lines, Series
from flashmorph.report.looks import label, look
from flashmorph.report.markup import span
from flashmorph.report.recall import dodged
from flashmorph.report.source import Source

_STRONG = 2.0
_SHOWN_TOKENS = 320


def by_position(source: Source) -> Chart | None:
    """Perplexity by position in the context, from the run itself or from `evaluate`."""
    evaluated = source.evaluated["models"] if source.evaluated else {}
    for models in (source.models, evaluated):
        found = {
            name: each["perplexity_by_position"] for name, each in models.items() if "perplexity_by_position" in each
        }
        if found:
            return _positions(found)
    return None


def _positions(found: dict[str, list[Figures]]) -> Chart:
    series = []
    for number, (name, parts) in enumerate(found.items()):
        known = all(part["interval"] for part in parts)
        series.append(
            Series(
                label(name),
                [(part["from"] + part["to"]) / 2 for part in parts],
                [part["perplexity"] for part in parts],
                look(name, number),
                [part["interval"][0] for part in parts] if known else None,
                [part["interval"][1] for part in parts] if known else None,
                [
                    f"{label(name)}, tokens {part['from']:,}-{part['to']:,}: {part['perplexity']:.2f} "
                    f"({span(part['interval'])})"
                    for part in parts
                ],
            )
        )
    parts = next(iter(found.values()))
    ticks = {(part["from"] + part["to"]) / 2: f"{part['from']:,}-{part['to']:,}" for part in parts}
    panel = Lines("", "position in the context, tokens", "perplexity", series, log_x=True, x_ticks=ticks)
    over = {part.get("over", "rows") for each in found.values() for part in each}
    units = "documents, or blocks of text where few documents are so long" if len(over) > 1 else next(iter(over))
    note = f"Held-out text, the same for all; bars are 95 % intervals over {units}."
    return Chart("perplexity", "Perplexity by position", note, [panel])


def _compared(source: Source) -> dict[str, Figures]:
    models = source.evaluated["models"] if source.evaluated else {}
    return {
        name: each["minus_first"]["tokens"] for name, each in models.items() if "tokens" in each.get("minus_first", {})
    }


def classes(source: Source) -> Chart | None:
    """Loss by class of token, minus the first model's."""
    compared = _compared(source)
    if not compared or not source.evaluated:
        return None
    first = label(next(iter(source.evaluated["models"])))
    groups: dict[str, list[str]] = {}
    for each in next(iter(compared.values()))["classes"]:
        groups.setdefault(each["group"], []).append(each["class"])
    groups["kind"] = groups.pop("all") + groups.get("kind", [])
    ends = [
        end
        for each in compared.values()
        for one in each["classes"]
        for end in (*(one["interval"] or ()), one["difference"])
    ]
    room = 0.05 * (max(ends) - min(ends))
    limits = (min(*ends, 0) - room, max(*ends, 0) + room)
    panels = []
    for group, names in groups.items():
        series = []
        for number, (name, each) in enumerate(compared.items()):
            rows = {one["class"]: one for one in each["classes"]}
            some = [(index, rows[kind]) for index, kind in enumerate(names) if kind in rows]
            series.append(
                Series(
                    label(name),
                    [row["difference"] for _, row in some],
                    [dodged(index, number, len(compared)) for index, _ in some],
                    look(name, number),
                    [(row["interval"] or [row["difference"]])[0] for _, row in some],
                    [(row["interval"] or [row["difference"]])[-1] for _, row in some],
                    [
                        f"{label(name)}, {row['class']}: {row['difference']:+.3f} nats, {row['tokens']:,} tokens, "
                        f"{first}'s loss {row['first']:.2f}"
                        for _, row in some
                    ],
                )
            )
        title = "kind of token" if group == "kind" else group
        panels.append(Dots(title, "added loss, nats a token", "class of token", names, series, limits))
    note = f"Mean loss minus {first}'s on the same held-out text: right of 0 is worse. Bars are 95 % intervals."
    return Chart("tokens", "Which tokens are lost", note, panels)


def samples(source: Source) -> str:
    """The beginning of the text, each token in the colour of what it lost or gained."""
    compared = _compared(source)
    if not compared or not source.evaluated:
        return ""
    first = label(next(iter(source.evaluated["models"])))
    blocks = []
    for name, each in compared.items():
        sample, spans = each["sample"], []
        for token, kind, loss, difference in list(
            zip(sample["tokens"], sample["kinds"], sample["first"], sample["difference"], strict=True)
        )[:_SHOWN_TOKENS]:
            strength = min(1.0, abs(difference) / _STRONG)
            tip = f"{kind}: {first} {loss:.2f} nats, {label(name)} {difference:+.2f}"
            side = "worse" if difference > 0 else "better"
            spans.append(
                f'<span class="{side}" style="--s:{strength:.2f}" title="{escape(tip)}">{escape(token)}</span>'
            )
        blocks.append(f'<h4>{escape(label(name))}</h4><p class="sample">{"".join(spans)}</p>')
    about = (
        f"The beginning of the held-out text. Red: more loss than {first}'s, blue: less, at {_STRONG:g} nats in "
        "full colour. Hover for figures."
    )
    return f"<h3>Token by token</h3><p>{escape(about)}</p>{''.join(blocks)}"
