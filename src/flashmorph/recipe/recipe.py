"""All settings of a run, in one validated file. `demo`, `laptop`, `default` and `chat` are shipped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from flashmorph.data.corpus import DEMO, Corpus, Mixture, shares_of
from flashmorph.devices import use_bf16
from flashmorph.errors import UserError, quoted, unknown
from flashmorph.evaluation import EvaluateSettings
from flashmorph.hosts import OWN
from flashmorph.inputs.readyaml import read_yaml, sentence
from flashmorph.inputs.settings import Many, Name, Settings
from flashmorph.recipe.source import SHIPPED, recipe_values
from flashmorph.records import SettingValues
from flashmorph.selection import DEFAULT_STRATEGY, STRATEGIES
from flashmorph.selection.searchdata import SearchSettings
from flashmorph.stages import AlignSettings, DistillSettings, ExtendSettings
from flashmorph.tasks import TaskSettings

_LEAST_SHARE = 1e-9
_REPLACED = {
    "extend.isolate_documents": "say `extend.documents: joined` (documents in a row see each other) or `long` (only "
    "documents that fill rows on their own)",
}
"""Settings of earlier versions, each with the message about its replacement."""


class SourceSettings(Settings):
    """The source of text: `demo`, a file, a folder, or the name of a dataset, which is streamed.

    In place of `column` a row may have `messages`, `conversations` or `conversation`, `prompt` and `completion`, or
    `instruction`, `input` and `output`; `tools` is what a conversation may call.
    """

    source: Name
    config: Name | None = None
    column: Name = "text"
    split: Name = Field(default="train", description="which split of a dataset is read; ours are taken from it")
    loss_on: Literal["all", "replies"] = Field(
        default="all", description="targets: all tokens, or replies and completions"
    )

    @property
    def single(self) -> Corpus:
        """The text of this source alone."""
        return Corpus(self.source, self.config, self.column, self.split, self.loss_on == "replies")

    @model_serializer(mode="wrap")
    def _without_own_source(self, handler: SerializerFunctionWrapHandler) -> SettingValues:
        """A mixture has no source of its own."""
        values = handler(self)
        if values.get("mixture"):
            return {name: value for name, value in values.items() if name not in SourceSettings.model_fields}
        return values


class PartSettings(SourceSettings):
    """One source of several. `weight` is its share of the tokens, as a part of the sum of all weights."""

    weight: float = Field(gt=0, le=1e9)


class DataSettings(SourceSettings):
    """The text of a run: one source, or several in `mixture`.

    `haystack` is the text around facts: that text, or one repeated sentence (RULER's NIAH-S1).
    """

    source: Name = DEMO
    mixture: tuple[PartSettings, ...] | None = Field(default=None, min_length=1)
    haystack: Literal["text", "repeated"] = "text"
    max_passes: int | None = Field(default=4, gt=0, le=10**9, description="how often a stage may repeat the text")

    @model_validator(mode="after")
    def _one_or_several(self) -> "DataSettings":
        own = {name: DataSettings.model_fields[name].default for name in SourceSettings.model_fields}
        if self.mixture and any(getattr(self, name) != default for name, default in own.items()):
            raise ValueError("give either one source or a mixture of several, each with its own settings")
        weights = [each.weight for each in self.mixture or ()]
        if weights and min(weights) < _LEAST_SHARE * sum(weights):
            raise ValueError(f"a weight is less than {_LEAST_SHARE:g} of all: leave that source out")
        return self

    @property
    def corpus(self) -> Corpus | Mixture:
        """The text itself."""
        if not self.mixture:
            return self.single
        total = sum(each.weight for each in self.mixture)
        return Mixture(tuple(each.single for each in self.mixture), tuple(each.weight / total for each in self.mixture))

    @property
    def about(self) -> str:
        """The sources in words."""
        if not self.mixture:
            return self.source
        return ", ".join(f"{share:.0%} {part.source}" for part, share in shares_of(self.corpus))


class SelectSettings(Settings):
    """The search for layers. `settings` are the strategy's own (`flashmorph select --help`).

    With `require_signal` (`pipeline/signal.py`) tasks that the teacher cannot do are left out of the search. `costs` is
    the file of costs that a budget in milliseconds is spent by.
    """

    strategy: str = DEFAULT_STRATEGY
    settings: SettingValues = Field(default_factory=dict)
    search: SearchSettings = SearchSettings()
    require_signal: bool = Field(default=True, description="a task counts only where full attention answers better")
    teacher_questions: Many = Field(default=16, description="questions a task for the teacher, before align")
    costs: Name | None = Field(default=None, description="what `bench --costs` or `estimate --costs` wrote")


def _as_text(value: Any) -> str:
    """`budget: 2` is `budget: "2"`; `Budget.parse` refuses what is no budget."""
    return value if isinstance(value, str) else quoted(value)


class Recipe(Settings):
    """One run of `flashmorph morph`."""

    budget: Annotated[str, BeforeValidator(_as_text)] = "25%"
    seed: int = Field(default=0, ge=0, lt=2**32, strict=True)
    bf16: Literal["auto"] | bool = "auto"
    shard: bool | Literal["auto"] = Field(
        default="auto",
        description="shard weights over processes (`model/sharding.py`); `auto`: where they do not fit otherwise",
    )
    baseline: Literal["uniform"] | None = None
    style: Literal["lines", "prose"] = "prose"
    chat_template: bool = Field(
        default=False, description="ask a search's questions, and those in training rows, through the chat template"
    )
    tasks: dict[Name, TaskSettings]
    data: DataSettings = DataSettings()
    host: SettingValues = Field(default_factory=dict, description="the host's own settings (`flashmorph hosts`)")
    calibration_rows: Many = Field(default=8, description="rows that branches are started from")
    align: AlignSettings = AlignSettings()
    select: SelectSettings = SelectSettings()
    distill: DistillSettings = DistillSettings()
    extend: ExtendSettings | None = ExtendSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        default=(), description="where the log of training goes besides log.jsonl"
    )

    _given: frozenset[str] = PrivateAttr(default=frozenset())
    _of_default: tuple[str, ...] = PrivateAttr(default=())

    @model_validator(mode="before")
    @classmethod
    def _heads_need_mixers(cls, values: Any) -> Any:
        """A budget in heads asks for the host that takes them."""
        if not isinstance(values, dict) or not str(values.get("budget", "")).strip().startswith("heads="):
            return values
        host = values.get("host") or {}
        if not isinstance(host, dict) or "mixers" in host:
            return values
        return {**values, "host": {"mixers": OWN.usual_mixers(host), **host}}

    def bf16_on(self, device: torch.device) -> bool:
        """Whether matrices are multiplied in bfloat16 there."""
        return use_bf16(device) if self.bf16 == "auto" else self.bf16

    @property
    def given(self) -> frozenset[str]:
        """The settings that the user has set, by their names: in a file of their own, or one by one."""
        return self._given

    @property
    def of_default(self) -> tuple[str, ...]:
        """The groups of settings that the user's file leaves out, so that they are those of `default`."""
        return self._of_default

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(source: str | Path, changes: SettingValues | None = None) -> Recipe:
    """Read a shipped recipe by name or a YAML file, then apply `changes` (`{"align.tokens": 1000}`).

    Groups of settings that a file leaves out are those of `default` (`recipe_values`).

    Raises:
        UserError: no such recipe, not UTF-8, no YAML, an unknown key (the nearest known one is named) or a bad value.
    """
    values, left_out = recipe_values(source)
    name = str(source)
    changes = changes or {}
    if _changes_strategy(values, changes):
        # Settings of one strategy mean nothing to another.
        values["select"]["settings"] = {}
    if (alone := [key for key in changes if key.startswith("extend.")]) and "extend.tokens" not in changes:
        if "extend" in values and values["extend"] is None:
            raise UserError(
                f"recipe {name} has no stage `extend`, so {alone[0]} alone would train on the published billion of "
                "tokens: give its size too, for example --set extend.tokens=20000000"
            )
    for key, value in changes.items():
        _set(values, key, value)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"recipe {name}: {sentence(error, Recipe, _REPLACED)}") from error
    if recipe.select.strategy not in STRATEGIES:
        raise UserError(unknown("strategy", recipe.select.strategy, STRATEGIES))
    if not recipe.tasks:
        raise UserError(f"recipe {name} needs at least one task")
    own = {} if str(source) in SHIPPED else {key: each for key, each in values.items() if key not in left_out}
    recipe._given = frozenset((*_names(own), *_names(_nested(changes))))
    recipe._of_default = tuple(group for group in left_out if not {group, f"{group}.source"} & {*changes})
    return recipe


def setting(recipe: BaseModel, key: str) -> Any:
    """The value of a setting by its name, such as `align.tokens`; None inside of a group that is left out."""
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def with_settings(recipe: Recipe, values: SettingValues) -> Recipe:
    """The recipe with other values, by the names of their settings."""
    for key, value in values.items():
        recipe = _with(recipe, key, value)
    return recipe


def parse_changes(settings: list[str]) -> SettingValues:
    """Read `key=value` pairs; values are YAML.

    Raises:
        UserError: one has no `=`, or its value is no YAML.
    """
    changes = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set {quoted(setting)} must be key=value, for example --set align.tokens=1000000")
        changes[key.strip()] = read_yaml(value, f"--set {key}")
    return changes


def _changes_strategy(values: SettingValues, changes: SettingValues) -> bool:
    chosen = values.get("select")
    if not isinstance(chosen, dict) or "select.strategy" not in changes:
        return False
    return chosen.get("strategy", DEFAULT_STRATEGY) != changes["select.strategy"]


def _set(values: SettingValues, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:  # Also one that the recipe switches off.
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(f"--set {quoted(key)}: {quoted(parent)} is not a group of settings")
    values[last] = value


def _with(settings: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return settings.model_copy(update={name: _with(getattr(settings, name), rest, value) if rest else value})


def _nested(changes: SettingValues) -> SettingValues:
    values: SettingValues = {}
    for key, value in changes.items():
        _set(values, key, value)
    return values


def _names(values: SettingValues, before: str = "") -> Iterator[str]:
    """The names of all values in nested groups."""
    for name, value in values.items():
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from _names(value, f"{before}{name}.")
