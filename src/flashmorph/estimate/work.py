"""Operations of each stage: what runs forward, what backward, how often."""

from typing import NamedTuple

from transformers import PreTrainedConfig

from flashmorph.hosts import (
    FEED_FORWARD,
    HOST_TYPES,
    Host,
    configure,
    host_of,
    layer_products,
    layer_space,
    with_branches_to_train,
)
from flashmorph.mixers import Products
from flashmorph.mixers.products import operations
from flashmorph.model.recompute import recomputes
from flashmorph.plan import FULL
from flashmorph.recipe.outlook import least_rounds, num_models, search_tokens, signal_questions, swaps_of
from flashmorph.recipe.pricing import budget_of_recipe
from flashmorph.recipe.recipe import Recipe
from flashmorph.selection import BASELINE, STRATEGIES
from flashmorph.selection.racing import start_questions
from flashmorph.selection.search import plan_without_search
from flashmorph.stages import DistillSettings, ExtendSettings


class Pass(NamedTuple):
    """One share of a stage's work for each of its tokens: all products, and those of kernels, which skip
    pairs that a causal mask or a window hides; `again` are those that run a second time, to save memory."""

    name: str
    flops: float
    causal: float
    again: float = 0.0


class Work(NamedTuple):
    """`tokens` through `passes`."""

    tokens: int
    passes: list[Pass]

    @property
    def flops(self) -> float:
        """All operations, as counted on eager attention."""
        return self.tokens * sum(each.flops for each in self.passes)

    @property
    def causal(self) -> float:
        """Operations of kernels that skip what a causal mask or a window hides."""
        return self.tokens * sum(each.causal for each in self.passes)

    @property
    def once(self) -> float:
        """`causal` without the products that run a second time: the basis of the share of a GPU's peak (MFU)."""
        return self.causal - self.tokens * sum(each.again for each in self.passes)


class Model(NamedTuple):
    """A host's configuration and how much of it stays full in the hybrid: `kept` of its `heads` or layers."""

    host: Host
    config: PreTrainedConfig
    kept: int
    heads: int = 0

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.config.num_hidden_layers

    @property
    def num_full(self) -> float:
        """Full layers; of single heads as many as make a layer."""
        return self.kept if not self.heads else self.kept * self.layers / self.heads

    @property
    def groups(self) -> int:
        """Heads or layers, whichever are chosen."""
        return self.heads or self.layers

    @property
    def unit(self) -> str:
        """What they are, in words."""
        return "heads" if self.heads else "layers"

    @property
    def hybrid(self) -> PreTrainedConfig:
        """The configuration of a hybrid that keeps so much, from the first layer on."""
        options = [FULL] * self.kept + [self.switched] * (self.groups - self.kept)
        return self.host.with_plan(self.config, options)

    @property
    def switched(self) -> str:
        """The option of layers that are not full."""
        return next(option for option in self.host.mixers if option != FULL)

    @property
    def head(self) -> float:
        """Operations a token of the map to the vocabulary."""
        return 2 * self.config.hidden_size * self.config.vocab_size

    def part(self, name: str, context: int) -> list[Products]:
        """One part of a layer."""
        return layer_products(self.host, self.config, name, context)


def model_of(config: PreTrainedConfig, recipe: Recipe) -> Model:
    """The host of a teacher's configuration, with as many full layers as the budget has at regular intervals.

    A strategy that finds their number itself counts as one: linear mixers keep more.
    """
    budget = budget_of_recipe(config, recipe)
    host, own = configure(config, recipe.host)
    if STRATEGIES[recipe.select.strategy].finds_budget:
        return Model(host, own, 1)
    space = layer_space(host, own, budget)
    kept = len(plan_without_search(BASELINE, space, budget).full_groups)
    return Model(host, own, kept, len(space.groups) if space.has_heads else 0)


def model_in(config: PreTrainedConfig) -> Model:
    """The host of a teacher's or of a hybrid's configuration, every layer full.

    Raises:
        UserError: it is neither.
    """
    if config.model_type not in HOST_TYPES:
        host, config = configure(config)
    else:
        host = host_of(config)
        config = host.with_plan(config, [FULL] * config.num_hidden_layers)
    return Model(host, config, config.num_hidden_layers)


def align_work(model: Model, recipe: Recipe) -> Work:
    """The teacher forward; each branch forward, twice where its error is recomputed, and backward to its weights.

    Nothing where branches have no weights.
    """
    if not with_branches_to_train(model.host):
        return Work(0, [])
    length, layers = recipe.align.length, model.layers
    branch = model.part(model.switched, length)
    teacher = [*model.part(FULL, length), *model.part(FEED_FORWARD, length)]
    again = recipe.align.activation_checkpointing is True
    forward, about = (2, "branches forward, twice, and backward") if again else (1, "branches forward and backward")
    return Work(
        recipe.align.tokens_run,
        [
            _times("teacher forward", layers, operations(teacher)),
            _times(about, layers, operations(branch, forward, 1), (forward - 1) * operations(branch)[1]),
        ],
    )


def teacher_work(model: Model, recipe: Recipe) -> Work:
    """The teacher forward over every question twice, to answer it and for its loss; generated tokens are left out."""
    length = recipe.select.search.longest
    whole = Model(model.host, model.config, model.layers)
    forward = _times("teacher forward, twice", 2, body_forward(whole, length))
    return Work(recipe.select.teacher_questions * len(recipe.tasks) * length, [forward])


def signal_work(model: Model, recipe: Recipe) -> Work:
    """The plan with every layer full and that with none forward over every question."""
    length = recipe.select.search.longest
    both = [
        _times(f"{name} full forward", 0.5, body_forward(Model(model.host, model.config, number), length))
        for name, number in (("every layer", model.layers), ("no layer", 0))
    ]
    return Work(2 * signal_questions(recipe) * length, both)


def select_work(model: Model, recipe: Recipe) -> Work | None:
    """Every branch forward, and backward to the gates, where that takes too much memory with a second forward; and the
    least that the races after it take.

    None where only the search itself will tell.
    """
    tokens, mean = search_tokens(recipe)
    if tokens is None or not tokens:
        return None if tokens is None else Work(0, [])
    length = max(1, round(mean))
    mixers = [*model.part(FULL, length), *model.part(model.switched, length)]
    feed_forward = model.part(FEED_FORWARD, length)
    # The first layer's mixers have nothing below them that a gradient is asked for: it ends at gates behind heads.
    gated = [
        mixer.products(model.config, length)[-1] for mixer in model.host.mixers.values() if mixer.separable_by_head
    ]
    passes = [
        _times("every branch forward", model.layers, operations([*mixers, *feed_forward])),
        _times("mixers backward, no weights", model.layers - 1, operations(mixers, 0, 0, 1)),
        _times("output projections of the first layer backward", 1, operations(gated, 0, 0, 1)),
        _times("feed-forward backward", model.layers, operations(feed_forward, 0, 0, 1)),
    ]
    if recomputes(model.config, recipe.select.search.rows_at_once * length):
        # All but a layer's last product, whose result the backward does not need.
        again = operations([*mixers, *feed_forward[:-1]])
        passes.append(_times("every branch again, in the backward", model.layers, again, again[1]))
    if STRATEGIES[recipe.select.strategy].gradient_loss == "hidden":
        teacher = [*model.part(FULL, length), *model.part(FEED_FORWARD, length)]
        passes.append(_times("teacher forward", model.layers, operations(teacher)))
    if rounds := least_rounds(recipe):
        # On average half of the layers are shared. The plan itself has run in the round before.
        exchanges = model.kept * (model.groups - model.kept)
        plans = 1 + rounds * min(swaps_of(recipe).candidates, exchanges)
        raced = plans * start_questions(len(recipe.tasks)) * recipe.select.search.longest / 2 / tokens
        passes.append(_times("first questions of the races", raced, body_forward(model, recipe.select.search.longest)))
    return Work(tokens, passes)


def distill_work(model: Model, recipe: Recipe) -> Work:
    """The teacher forward, unless it has been; the student forward and backward."""
    settings, plans = recipe.distill, 2 if recipe.baseline else 1
    teacher = [] if settings.teacher_logits else _teacher(model, settings.length)
    return Work(settings.tokens_run * plans, [*teacher, *_training(model, settings)])


def logits_work(model: Model, recipe: Recipe) -> Work:
    """The teacher forward, once for all plans."""
    return Work(recipe.distill.tokens_run, _teacher(model, recipe.distill.length))


def _teacher(model: Model, length: int) -> list[Pass]:
    """The teacher forward."""
    layers = operations([*model.part(FULL, length), *model.part(FEED_FORWARD, length)])
    return [_times("teacher forward", model.layers, layers), Pass("teacher's logits", model.head, model.head)]


def extend_work(model: Model, recipe: Recipe) -> Work:
    """The student forward and backward."""
    assert recipe.extend
    plans = 2 if recipe.baseline else 1
    return Work(recipe.extend.tokens_run * plans, _training(model, recipe.extend))


def evaluate_work(model: Model, recipe: Recipe) -> Work:
    """All models forward over questions and held-out text; logits of the text alone; generated tokens are left out."""
    settings, models = recipe.evaluate, num_models(recipe)
    questions = settings.questions * settings.length * len(recipe.tasks)
    tokens = questions + settings.perplexity_tokens
    share = settings.perplexity_tokens / tokens
    whole = Model(model.host, model.config, model.layers)
    bodies = [("teacher forward", 1, whole), (f"{models - 1} hybrids forward", models - 1, model)]
    return Work(
        tokens,
        [
            *(_times(name, times, body_forward(each, settings.length)) for name, times, each in bodies),
            Pass("logits of the text", models * model.head * share, models * model.head * share),
        ],
    )


def body_forward(model: Model, length: int) -> tuple[float, float]:
    """Operations a token of the hybrid's layers, forward."""
    return _body(model, length, 1, 0, 0)


def _training(model: Model, settings: DistillSettings | ExtendSettings) -> list[Pass]:
    """The hybrid forward and backward."""
    forward, times = (2, ", twice,") if settings.activation_checkpointing is True else (1, "")
    return [
        _times(f"student forward{times} and backward", 1, _body(model, settings.length, forward, 1, 1)),
        Pass("student's logits and backward", 3 * model.head, 3 * model.head),
    ]


def _body(model: Model, length: int, forward: int, weights: int, inputs: int) -> tuple[float, float]:
    switched = model.layers - model.num_full
    counts = {FULL: model.num_full, model.switched: switched, FEED_FORWARD: model.layers}
    found = [(count, operations(model.part(part, length), forward, weights, inputs)) for part, count in counts.items()]
    return sum(count * flops for count, (flops, _) in found), sum(count * causal for count, (_, causal) in found)


def _times(name: str, times: float, flops: tuple[float, float], again: float = 0.0) -> Pass:
    return Pass(name, times * flops[0], times * flops[1], times * again)
