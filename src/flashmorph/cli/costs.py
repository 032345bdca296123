"""`--costs` of `bench` and `estimate`: the file that budgets in milliseconds are spent by."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flashmorph.cli.options import ERR, OUT, Options, numbers, quiet, recipe_of
from flashmorph.errors import UserError
from flashmorph.files import write_json
from flashmorph.records import Figures
from flashmorph.surface.outputs import claim_output, json_of, made_by

CostsOption = Annotated[
    Path | None,
    typer.Option("--costs", help="Write the time of each layer or head here, for budgets such as `ms=4.2@32768`."),
]


def claim_costs(path: Path, command: str, force: bool, option: str, contexts: str | None) -> int:
    """The one context that costs are asked for at, once it is clear that the file can be written.

    Raises:
        UserError: see `claim_output`; or there is another number of contexts than one.
    """
    claim_output(path, json_of(f"{command} --costs"), force)
    given = numbers(option, contexts) if contexts else []
    if len(given) != 1:
        raise UserError(f"--costs is about one context: give {option} that of the budget, for example {option} 32768")
    return given[0]


def measure_for(options: Options, settings: Any, dtype: Any, device: Any) -> tuple[Any, Figures]:
    """`measure_costs` of a teacher, in the host that the options' recipe moves it into."""
    from flashmorph.bench import measure_costs, model_for_costs
    from flashmorph.cli.screen import RichScreen
    from flashmorph.convert.teacher import locate
    from flashmorph.hosts import host_of

    quiet()
    folder, recipe, screen = locate(options.teacher)[0], recipe_of(options), RichScreen(ERR)
    model = model_for_costs(folder, recipe.host, dtype, device, screen.say, options.allow_unused)
    with screen.stage("bench", f"{options.teacher}, {', '.join(host_of(model.config).mixers)}") as report:
        return measure_costs(model, options.teacher, settings, report)


def write_costs(path: Path, command: str, costs: Any, figures: Figures, as_json: bool) -> None:
    """Write the costs, and show them."""
    import json

    values = {**made_by(f"{command} --costs"), **costs.to_dict(), **({"rounds": figures} if figures else {})}
    write_json(path, values)
    if as_json:
        print(json.dumps(values, indent=2))
        return
    rows = list(costs.groups.values())
    ms = {option: [1e-3 * row[option] for row in rows] for option in rows[0]}
    unit = "head" if any(group.kv_head is not None for group in costs.groups) else "layer"
    lines = [
        f"{costs.host} after {costs.context:,} tokens, {costs.origin}: every plan takes {1e-3 * costs.base:,.3f} ms a "
        "token, and besides",
        *(f"  a {option} {unit}: {each[0]:,.3f} ms" for option, each in ms.items()),
    ]
    for option, each in figures.get("seconds_of_a_group_beyond_full", {}).items():
        low, high = (1e3 * end for end in each["quartiles"])
        lines.append(f"  {option} less full: {1e3 * each['median']:+,.3f} ms a {unit} ({low:+,.3f} to {high:+,.3f})")
    if "seconds" in figures:
        # Not the sum of the above: a model of one kind of layers does not pay for having two.
        lines.append(
            f"  the model without any other {unit}: {1e3 * figures['seconds']['full']['median']:,.3f} ms a token"
        )
    lines.append(f"written: {path}; spend it with --budget ms=LIMIT@{costs.context} --set select.costs={path}")
    for line in lines:
        OUT.print(line, highlight=False, markup=False, soft_wrap=True)
