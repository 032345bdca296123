"""`open_run`: teacher, recipe and folder of a run, all of them checked before anything is written."""

from collections.abc import Collection, Iterable
from pathlib import Path

from flashmorph import distributed
from flashmorph.convert.hub import EMBEDDED
from flashmorph.convert.teacher import open_on_every_machine
from flashmorph.data.corpus import unread_of
from flashmorph.devices import pick_device
from flashmorph.errors import UserError
from flashmorph.hosts import host_for, with_branches_to_train
from flashmorph.progress import Logged, Screen
from flashmorph.recipe.fitting import fit
from flashmorph.recipe.given import given_plan
from flashmorph.recipe.notices import notices, of_default
from flashmorph.recipe.outlook import check
from flashmorph.recipe.preflight import preflight, reach_text
from flashmorph.recipe.recipe import Recipe, load_recipe, parse_changes
from flashmorph.records import SettingValues
from flashmorph.run.folder import STAGES, RunFolder
from flashmorph.run.marker import Owner, require_same_teacher
from flashmorph.run.run import Run


def open_run(
    teacher: str,
    output: Path | str,
    *,
    recipe: Recipe | Path | str | None = None,
    changes: Iterable[str] = (),
    data: str | None = None,
    plan: Path | None = None,
    layers: str | None = None,
    others: Iterable[Path] = (),
    device: str = "auto",
    allow_unused: bool = False,
    stages: Collection[str] | None = None,
    keep_recipe: bool = True,
    screen: Screen | None = None,
) -> Run:
    """A run of `teacher` in the folder `output`, for `morph`; what is finished there is not run again.

    Device, recipe, teacher, plan and text are checked in this order, before the folder is touched. Contexts above the
    teacher's limit are capped. Under torchrun the process joins the others; it leaves them by `distributed.leave` after
    success, never after an error.

        run = open_run("Qwen/Qwen3-0.6B", "runs/hybrid", changes=["budget=7", "distill.tokens=20000000"], data="texts/")

    Args:
        teacher: `tiny`, a local folder or GGUF file, or a model on the hub, `ORG/NAME` or `ORG/NAME@REVISION`.
        output: Folder of the run: new, empty, or an earlier run of this teacher, which goes on.
        recipe: Settings: a name (`demo`, `laptop`, `default`, `chat`), a YAML file, or a `Recipe`, which is taken as it
            is. By default `demo` for `tiny`, `default` for others.
        changes: Single settings of a recipe by name, such as `align.tokens=1000000`.
        data: Text to train on in place of the recipe's: a file, a folder, or a dataset on the hub.
        plan: A file with a plan, which is built instead of searching for one.
        layers: The same by numbers of layers that stay full, `1,2,6`.
        others: Folders of other runs whose finished stages may be used.
        device: `auto`, `cpu`, `cuda`, `cuda:1` (the second GPU) or `mps`.
        allow_unused: Whether stored weights of the teacher that are not used are reported, not refused.
        stages: Those that the run will go through; by default `every_stage`.
        keep_recipe: Whether the folder keeps the recipe: where a checkpoint or its branches are made.
        screen: Where progress and notices are shown; by default notices are logged.

    Raises:
        UserError: a teacher, recipe, plan, text or device that does not do, or a folder that holds something else or a
            run of another teacher.
        ValueError: `changes` or `data` beside a `Recipe`.
    """
    screen, output, own_device = screen or Logged(), Path(output), distributed.join(pick_device(device))
    stages = stages or every_stage(plan is not None or layers is not None)
    recipe = _recipe(recipe, teacher, changes, data)
    if recipe.of_default:
        screen.say(of_default(recipe))
    opened = open_on_every_machine(teacher)
    if opened.note:
        screen.say(opened.note)
    owner = Owner(name=teacher, digest=opened.digest)
    distributed.first(lambda: require_same_teacher(output, owner))
    config = opened.config
    recipe, notice = fit(recipe, config)
    if notice:
        screen.say(notice)
    check(opened, recipe, distributed.count())
    given = given_plan(opened.name, config, recipe, plan, layers, opened.revision)
    if tokenizer := opened.tokenizer():
        for line in distributed.first(lambda: unread_of(recipe.data.corpus)):
            screen.say(line)
        distributed.first(lambda: preflight(recipe, tokenizer, config, stages))
        reads_text = set(stages) - {"align"} or with_branches_to_train(host_for(config, recipe.host))
        if reads_text and not (output / STAGES).exists():
            # A resumed run may have all its text already.
            distributed.first(lambda: reach_text(recipe, tokenizer))
    for notice in distributed.first(lambda: notices(recipe, config, tokenizer, stages)):
        screen.say(notice)
    if recipe.shard is True and not distributed.are_several():
        raise UserError("shard=true shards weights over processes, and there is one: start it with torchrun")
    if distributed.are_several():
        screen.say(f"{distributed.count()} processes share the work, this one on {own_device}")
    folder = RunFolder(output, tuple(map(Path, others)), owner)
    if keep_recipe:
        folder.keep_recipe(recipe.to_yaml())
    run = Run(opened, recipe, folder, own_device, screen, given, allow_unused)
    run.shards = run.must_shard()
    run.say_what_is_too_large(stages)
    return run


def every_stage(given: bool) -> tuple[str, ...]:
    """The stages of `morph` that read text or ask questions: with a `given` plan none that searches."""
    return ("align", *(() if given else ("select",)), "distill", "extend", "evaluate")


def shipped_recipe(teacher: str) -> str:
    """The name of the recipe that is taken for a teacher where none is given."""
    return "demo" if teacher in EMBEDDED else "default"


def of_data(source: str) -> SettingValues:
    """The changes of a recipe that put one source of text in place of its own."""
    return {"data.source": source, "data.config": None, "data.mixture": None}


def _recipe(recipe: Recipe | Path | str | None, teacher: str, changes: Iterable[str], data: str | None) -> Recipe:
    values = {**(of_data(data) if data else {}), **parse_changes(list(changes))}
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe or shipped_recipe(teacher), values)
    if values:
        raise ValueError("changes and data are for a recipe that is read by name; this one has its values already")
    return recipe
