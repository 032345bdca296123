"""Options that commands share, and the run that they make."""

import logging
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmorph.cli.conflicts import replaced_mixture, require_use
from flashmorph.errors import UserError, quoted
from flashmorph.records import SettingValues
from flashmorph.surface.terminal import Terminal

OUT, ERR = Terminal(), Terminal(stderr=True)
_DIGITS = 15

TeacherArgument = Annotated[
    str,
    typer.Argument(
        help="`tiny`, a local folder or GGUF file, or a model on the hub, `ORG/NAME` or `ORG/NAME@REVISION`.",
        metavar="TEACHER",
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; continues what is there.")]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="`demo`, `laptop`, `default`, `chat` or a YAML file; groups of settings that a file leaves out are those "
        "of `default`. Default: `demo` for `tiny`, else `default`."
    ),
]
KeptRecipeOption = Annotated[
    str | None,
    typer.Option(
        help="`demo`, `laptop`, `default`, `chat` or a YAML file. Default: the one that the run has, if any; else "
        "`demo` for `tiny` and `default` for others."
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        help="What may stay full: `7` or `25%` (layers), `heads=21` or `heads=25%` (key-value heads), "
        "`kv=64MiB@32768` (cache of one sequence), `ms=4.2@32768` (a token, with `--set select.costs=FILE` of "
        "`bench --costs`). Default: the recipe's."
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change one setting of the recipe: `align.tokens=1000000`.")
]
DataOption = Annotated[
    str | None, typer.Option(help="Text to train on: a file, a folder, or a dataset on the hub (streamed).")
]
FromOption = Annotated[list[Path] | None, typer.Option("--from", help="Another run whose finished stages may be used.")]
RepeatOption = Annotated[bool, typer.Option("--allow-repeat", help="Let stages repeat the text more than 4 times.")]
UnusedOption = Annotated[
    bool,
    typer.Option("--allow-unused", help="Continue where stored weights are not used as stored, and report which."),
]
BaselineOption = Annotated[
    str | None, typer.Option(help="Also train a plan that takes no search, for comparison: `uniform`.")
]
StrategyOption = Annotated[
    str | None,
    typer.Option(
        help="How layers are chosen: `budgeted-gates` (the default), `race`, `uniform`, ... `flashmorph select --help` "
        "lists them."
    ),
]
PlanOption = Annotated[Path | None, typer.Option(help="Build this plan instead of selecting one.")]
LayersOption = Annotated[str | None, typer.Option(help="Keep these layers full instead of selecting: `1,2,6`.")]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Also replace files that are not flashmorph's; never links, folders, devices."),
]
DeviceOption = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1` (the second GPU) or `mps`.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the results as JSON on stdout, and nothing else there.")
]


WindowOption = Annotated[
    int | None, typer.Option(min=2, help="Switch layers to a sliding window of so many tokens: no new weights.")
]
MixersOption = Annotated[
    str | None,
    typer.Option(
        help="Switch single key-value heads, in a model type of our own, which transformers alone serves: `full` and "
        "one or more of `window`, `linear`, `gated_delta_net`, `mamba2`, `thin`, `pooled`, `dash`."
    ),
]


@dataclass(kw_only=True)
class Options:
    """The options of every command that works on a run."""

    teacher: str
    output: Path
    recipe: str | None = None
    budget: str | None = None
    changes: list[str] | None = None
    data: str | None = None
    others: list[Path] | None = None
    allow_repeat: bool = False
    strategy: str | None = None
    baseline: str | None = None
    device: str = "auto"
    json: bool = False
    window: int | None = None
    mixers: str | None = None
    plan: Path | None = None
    layers: str | None = None
    allow_unused: bool = False
    recipe_of: tuple[Path, ...] = ()
    """Runs or models; where no recipe is given, that of the first one that has one is taken."""

    @property
    def kept_recipe(self) -> Path | None:
        """The recipe of the first of `recipe_of` that has one; None where there is none, or a recipe is given."""
        from flashmorph.run.folder import RECIPE

        kept = (folder / RECIPE for folder in self.recipe_of if not self.recipe)
        return next((path for path in kept if path.is_file()), None)


def quiet() -> None:
    """No library's own notices and bars between ours, and no more threads than cores."""
    import datasets
    import transformers

    from flashmorph.devices import limit_threads

    limit_threads()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    for name in ("accelerate", "datasets", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def recipe_of(options: Options) -> Any:
    """The recipe that a command's options make."""
    from flashmorph.recipe.recipe import load_recipe, parse_changes
    from flashmorph.run.open import of_data, shipped_recipe

    require_use(options)
    changes: SettingValues = {}
    if options.data:
        changes |= of_data(options.data)
    changes |= parse_changes(options.changes or [])
    given: dict[str, Any] = {
        "budget": options.budget,
        "select.strategy": options.strategy,
        "baseline": options.baseline,
        "host.window": options.window,
        "host.mixers": options.mixers,
    }
    changes |= {key: value for key, value in given.items() if value is not None}
    if options.allow_repeat:
        changes["data.max_passes"] = None
    return load_recipe(options.recipe or options.kept_recipe or shipped_recipe(options.teacher), changes)


def fitted(recipe: Any, config: Any, say: Callable[[str], None]) -> Any:
    """The recipe with its contexts within the teacher's; the changes are printed in one line."""
    from flashmorph.recipe.fitting import fit

    recipe, notice = fit(recipe, config)
    if notice:
        say(notice)
    return recipe


def open_run(options: Options, stages: Collection[str], keep_recipe: bool = True) -> Any:
    """The run of a command that goes through `stages`, on the terminal; see `flashmorph.open_run`."""
    from flashmorph import distributed
    from flashmorph.cli.screen import RichScreen
    from flashmorph.devices import pick_device
    from flashmorph.run.open import open_run

    quiet()
    distributed.join(pick_device(options.device))
    screen = RichScreen(ERR if options.json and distributed.is_first() else OUT)
    recipe = recipe_of(options)
    if notice := replaced_mixture(options, recipe):
        screen.say(notice)
    if options.kept_recipe:
        screen.say(f"recipe: {options.kept_recipe} (--recipe takes another)")
    return open_run(
        options.teacher,
        options.output,
        recipe=recipe,
        plan=options.plan,
        layers=options.layers,
        others=options.others or (),
        device=options.device,
        allow_unused=options.allow_unused,
        stages=stages,
        keep_recipe=keep_recipe,
        screen=screen,
    )


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers above 0, given with commas.

    Raises:
        UserError: `text` is something else.
    """
    parts = text.replace("_", "").split(",")
    if not all(part.strip().isdecimal() and len(part) <= _DIGITS and int(part) > 0 for part in parts):
        raise UserError(f"{option} {quoted(text)} must be whole numbers with commas, for example {option} 256,512")
    return list(dict.fromkeys(int(part) for part in parts))


def names(option: str, text: str) -> list[str]:
    """Names given with commas.

    Raises:
        UserError: there is none.
    """
    parts = [name.strip() for name in text.split(",") if name.strip()]
    if not parts:
        raise UserError(f"{option} needs at least one name")
    return list(dict.fromkeys(parts))
