"""The shapes of the files that a report is made of: the keys that it reads, with their types."""

from typing import Annotated

from pydantic import Field, model_validator

from flashmorph.inputs.shapes import Count, Finite, Shape
from flashmorph.selection import BASELINE

Ends = Annotated[list[Finite], Field(min_length=2, max_length=2)]
_Some = Field(min_length=1)
_Context = Annotated[str, Field(pattern=r"^[1-9]\d{0,11}$")]
_Length = Annotated[int, Field(ge=1, le=2**40)]


class _Rate(Shape):
    recall: Finite
    interval: Ends
    questions: Count


class _Part(Shape):
    start: Count = Field(alias="from")
    end: Count = Field(alias="to")
    perplexity: float
    interval: Ends | None
    over: str = "rows"


class _Text(Shape):
    tokens: Count
    wanted: Count
    documents: Count


class Model(Shape):
    """Figures of one model in results.json."""

    recall: Finite
    recall_interval: Ends
    recall_by_task: Annotated[dict[str, _Rate], _Some]
    perplexity: float
    perplexity_interval: Ends | None = None
    perplexity_text: _Text | None = None
    perplexity_by_position: Annotated[list[_Part], _Some] | None = None
    cache_bytes: Annotated[dict[_Context, _Length], _Some]


class _Stage(Shape):
    stage: str
    digest: str
    seconds: Annotated[Finite, Field(ge=0)]
    tokens: Finite | None


class _Difference(Shape):
    difference: Finite
    interval: Ends


class _Ratio(Shape):
    ratio: float
    interval: Ends | None


class _Timing(Shape):
    context: _Length
    limit: Finite
    by_costs: Finite | None
    origin: str
    hybrid: Finite | None
    teacher: Finite | None

    @model_validator(mode="after")
    def _beside_the_teacher(self) -> "_Timing":
        if (self.hybrid is None) != (self.teacher is None):
            raise ValueError("hybrid and teacher are timed together")
        return self


class Results(Shape):
    """results.json, its models apart. Before version 0.2 there was no comparison with the teacher."""

    stages: list[_Stage]
    timing: _Timing | None = None
    worth: _Difference | None = Field(default=None, alias=f"recall_hybrid_minus_{BASELINE}")
    against_teacher: _Difference | None = Field(default=None, alias="recall_hybrid_minus_teacher")
    over_teacher: _Ratio | None = Field(default=None, alias="perplexity_hybrid_over_teacher")


class _Evaluation(Shape):
    questions: _Length
    length: _Length


class Recipe(Shape):
    """The fields of recipe.yaml that are read."""

    evaluate: _Evaluation


class Step(Shape):
    """A step of a search's trace that follows gradients."""

    step: Count
    logits: list[float]


class Errors(Shape):
    """The fields of the record of `align` that are read."""

    errors: list[float] = []


class _Cell(_Rate):
    depth: Finite


class _Row(_Rate):
    task: str
    length: _Length
    depths: list[_Cell]


class _Worst(Shape):
    task: str
    length: _Length
    depth: Finite | None
    recall: Finite


class _Grid(Shape):
    recall: Finite
    rows: Annotated[list[_Row], _Some]
    worst: list[_Worst]
    left_out: list[str] = []


class _Class(Shape):
    group: str
    name: str = Field(alias="class")
    tokens: Count
    first: Finite
    difference: Finite
    interval: Ends | None


class _Sample(Shape):
    tokens: list[str]
    kinds: list[str]
    first: list[Finite]
    difference: list[Finite]

    @model_validator(mode="after")
    def _of_each_token(self) -> "_Sample":
        if len({len(each) for each in (self.tokens, self.kinds, self.first, self.difference)}) > 1:
            raise ValueError("there must be as many tokens, kinds and figures")
        return self


class _Tokens(Shape):
    classes: list[_Class]
    sample: _Sample

    @model_validator(mode="after")
    def _with_all(self) -> "_Tokens":
        if "all" not in {each.group for each in self.classes}:
            raise ValueError("there must be a class of all tokens")
        return self


class _Minus(Shape):
    grid: _Difference | None = None
    tokens: _Tokens | None = None


class _Evaluated(Shape):
    grid: _Grid | None = None
    perplexity_by_position: Annotated[list[_Part], _Some] | None = None
    minus_first: _Minus = _Minus()


class Evaluate(Shape):
    """evaluate.json."""

    models: Annotated[dict[str, _Evaluated], _Some]
    weights: dict[str, str] = {}


class _Time(Shape):
    median: Annotated[Finite, Field(gt=0)]
    quartiles: Ends


class _Times(Shape):
    by_length: list[_Time]


class _Timed(Shape):
    prefill: _Times
    decode: _Times


class _Lengths(Shape):
    lengths: Annotated[list[_Length], _Some]


class _Machine(Shape):
    device: str
    dtype: str
    threads: Count


class Bench(Shape):
    """bench.json."""

    settings: _Lengths
    models: Annotated[dict[str, _Timed], _Some]
    machine: _Machine
    weights: dict[str, str] = {}

    @model_validator(mode="after")
    def _at_each_length(self) -> "Bench":
        for each in self.models.values():
            if {len(each.prefill.by_length), len(each.decode.by_length)} != {len(self.settings.lengths)}:
                raise ValueError("there must be a time at each length")
        return self


class _Compared(Shape):
    strategy: str
    budget: str
    seeds: Count
    flops: Annotated[Finite, Field(ge=0)]
    regret: Finite | None
    regret_spread: Finite | None
    rank: Finite | None


class _Truth(Shape):
    """Where all plans are known `plans` and `best`, else `best_known`."""

    plans: Count | None = None
    best: dict[str, str] | None = None
    best_known: dict[str, str] | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> "_Truth":
        if self.best_known is None and (self.plans is None or self.best is None):
            raise ValueError("there must be the number of plans and the best of them, or the best known one")
        return self


class Compare(Shape):
    """compare.json."""

    rows: list[_Compared]
    truths: dict[str, _Truth]

    @model_validator(mode="after")
    def _regret_has_a_rank(self) -> "Compare":
        found = {budget for budget, truth in self.truths.items() if truth.best_known is not None}
        if any(row.regret is not None and row.rank is None and row.budget not in found for row in self.rows):
            raise ValueError("a row with a regret must have a rank where all plans are known")
        return self
