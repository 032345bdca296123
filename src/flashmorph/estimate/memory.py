"""Memory of each stage on one GPU: what stands there throughout, and what grows with the tokens that run at once.

Weights, gradients and moments of Adam are exact. What is kept for the backward is an estimate: inputs and outputs of
every linear map in the width that products run in, of experts those of the chosen, and six hidden states in float32
for norms and residuals. With attention that does not store its scores that is within 15 % of what PyTorch keeps on a
CPU. Kernels of linear mixers are taken to keep no more than that either; what PyTorch's references keep, two to five
times as much, is counted by `sizes.py`.
"""

from typing import NamedTuple

from flashmorph.estimate.sizes import Sizes
from flashmorph.estimate.work import Model
from flashmorph.hosts import FEED_FORWARD, with_branches_to_train
from flashmorph.losses import logits_bytes
from flashmorph.mixers.products import number_bytes
from flashmorph.model.recompute import recomputes
from flashmorph.plan import FULL
from flashmorph.recipe.recipe import Recipe
from flashmorph.stages import DistillSettings, ExtendSettings, TrainSettings

_FLOAT32, _FLOAT64, _BF16 = 4, 8, 2
_TRAINED = 4 * _FLOAT32
_HIDDEN_STATES = 6
_CHUNKS_OF_LOGITS = 5
_CONTEXT = 4_096


class Share(NamedTuple):
    """One share of a stage's memory in bytes; `sharded` ones are divided among GPUs where weights are.

    `gathered` bytes then stand whole beside them.
    """

    name: str
    formula: str
    bytes: float
    sharded: bool = True
    gathered: float = 0.0


class Memory(NamedTuple):
    """`shares` stand throughout; `per_token` bytes are kept for each of `tokens`, in rows of `length`.

    `setting` is what to lower where they do not fit; with `keeps_layers` the inside of layers could be computed again
    instead (`activation_checkpointing`). Where weights are sharded, what the first process does `alone` is done in the
    memory of its CPU.
    """

    shares: list[Share]
    per_token: float = 0.0
    tokens: int = 0
    length: int = 1
    setting: str = ""
    alone: bool = False
    keeps_layers: bool = False

    def bytes(self, gpus: int = 1) -> float:
        """All of it on each of `gpus` GPUs that share weights, gradients and moments."""
        if gpus > 1 and self.alone:
            return 0.0
        fixed = sum(share.bytes / (gpus if share.sharded else 1) for share in self.shares)
        fixed += sum(share.gathered for share in self.shares) if gpus > 1 else 0
        return fixed + self.per_token * self.tokens

    def tokens_within(self, limit: float, gpus: int = 1) -> int:
        """The most tokens at once, in whole rows, that stay within `limit` bytes; 0 where no row does."""
        left = limit - self._replace(tokens=0).bytes(gpus)
        if left <= 0 or not self.per_token:
            return 0
        return int(left / self.per_token) // self.length * self.length


def stage_memory(
    model: Model, sizes: Sizes, recipe: Recipe, num_gpus: int, bf16: bool, kind: str = "cuda"
) -> dict[str, Memory]:
    """The memory of each stage, its batch divided among `num_gpus`, on devices of a `kind`.

    Raises:
        UserError: so many GPUs cannot share a stage's batch evenly.
    """
    host, branches, switched = sizes.host, sizes.branches, model.switched
    hybrid, width = sizes.hybrid(switched, model.num_full), model.config.hidden_size
    number = _BF16 if bf16 else _FLOAT32
    outer = host - model.layers * (sizes.parts[FULL].parameters + sizes.parts[FEED_FORWARD].parameters)
    own, size_of_head = number_bytes(model.config), model.config.vocab_size * width
    wide = min(own, _FLOAT32) if bf16 else _FLOAT32
    of_chunks, formula = _CHUNKS_OF_LOGITS * logits_bytes(kind), f"{_CHUNKS_OF_LOGITS} · {logits_bytes(kind)}"
    chunks = Share("chunks of logits", formula, of_chunks, False)
    frozen = [
        Share("host's decoder layers", f"{wide} · (host - embedding and head)", wide * (host - outer)),
        Share("its embedding and head", f"{wide} · embedding and head", wide * outer, False),
    ]
    student = [
        Share(
            "student: weights, gradients, two moments",
            "16 · hybrid (sharded: and 8 · embedding and head)",
            _TRAINED * hybrid,
            gathered=2 * _FLOAT32 * outer,
        ),
        *([Share("its weights in bfloat16", "2 · hybrid", _BF16 * hybrid)] if bf16 else []),
        Share("gradient of the head, as it is summed", "4 · vocabulary · hidden", _FLOAT32 * size_of_head, False),
        chunks,
    ]

    copied_of = "branches" if own == wide else "hybrid"

    def kept(part: str) -> float:
        """Bytes a token that one part of one layer keeps."""
        return sizes.parts[part].kept_bytes(bf16)

    residual = _HIDDEN_STATES * _FLOAT32 * width
    mixers = model.num_full * kept(FULL) + (model.layers - model.num_full) * kept(switched)
    every = kept(FULL) + kept(switched) + kept(FEED_FORWARD) + residual
    largest = max(kept(FULL), kept(switched)) + kept(FEED_FORWARD) + residual
    branch = kept(switched) + residual
    at_once = 1 if recipe.align.activation_checkpointing is True else model.layers
    aligned = model.layers * (_FLOAT32 + number) * width + at_once * branch
    search, stored = recipe.select.search, recipe.distill.teacher_logits
    tokens = search.rows_at_once * search.longest
    # A layer that runs again keeps its input; what its gradient needs besides stands for one layer at a time.
    again = recomputes(model.config, tokens)
    searched = model.layers * _FLOAT32 * width + every if again else model.layers * every
    # Autocast makes copies of what is wider.
    copied, name = (host + branches, "(host + branches)") if wide == _FLOAT32 else (branches, "branches")
    cast = (f"2 · {name} / layers", model.layers) if again else (f"2 · {name}", 1)
    part = max(sizes.parts[FULL].parameters + sizes.parts[FEED_FORWARD].parameters, model.config.vocab_size * width)

    def trained(settings: DistillSettings | ExtendSettings) -> float:
        """Bytes a token of a backward: of every layer, or each layer's input and the layer at work."""
        if settings.activation_checkpointing is True:
            return model.layers * _FLOAT32 * width + largest
        return mixers + model.layers * (kept(FEED_FORWARD) + residual)

    stages = {
        "transplant": Memory([Share("a layer or the embedding, in float64", "8 · part", _FLOAT64 * part, False)]),
        "align": _batched(recipe.align, num_gpus, aligned, [
            *frozen,
            Share("branches: weights, gradients, two moments", "16 · branches", _TRAINED * branches),
        ]),
        "select": Memory(
            [
                *frozen,
                Share("branches", "4 · branches", _FLOAT32 * branches),
                *([Share("copies in bfloat16", cast[0], _BF16 * copied / cast[1])] if bf16 else []),
                chunks,
            ],
            searched,
            tokens,
            search.longest,
            "select.search.micro_batch_tokens",
        ),
        "build": Memory([
            Share("host", f"{wide} · host", wide * host),
            Share("branches", "4 · branches", _FLOAT32 * branches),
            # What has the dtype of the checkpoint already is not copied.
            Share("hybrid", f"{own} · {copied_of}", own * (branches if own == wide else hybrid)),
        ], alone=True),
        "distill": _batched(
            recipe.distill, num_gpus, trained(recipe.distill), student if stored else [*frozen, *student]
        ),
    }  # fmt: skip
    if stored:
        # A forward without gradients holds one layer's inside.
        forward = kept(FULL) + kept(FEED_FORWARD) + residual
        rows = recipe.distill.division(1).rows
        stages["logits"] = Memory(
            [Share("host", f"{wide} · host", wide * host, False), chunks],
            forward,
            rows * recipe.distill.length,
            recipe.distill.length,
            "distill.micro_batch_tokens",
        )
    if not with_branches_to_train(model.host):
        del stages["align"]
    settings = recipe.evaluate
    # In one process, which keeps the cache of all layers and one layer's inside.
    dtype = settings.dtype_on(kind)
    width = {"auto": own, "float32": _FLOAT32}.get(dtype, _BF16)
    mixer = max(sizes.parts[option].kept_bytes(width < _FLOAT32) for option in (FULL, switched))
    inside = mixer + sizes.parts[FEED_FORWARD].kept_bytes(width < _FLOAT32) + residual
    stages["evaluate"] = Memory(
        [Share("the larger of host and hybrid", f"{width} · parameters", width * max(host, hybrid), False), chunks],
        model.layers * _cache_per_token(model) * width + inside,
        max(1, settings.tokens_at_once // settings.length) * settings.length,
        settings.length,
        "evaluate.batch_tokens",
    )
    if recipe.extend:
        stages["extend"] = _batched(recipe.extend, num_gpus, trained(recipe.extend), student)
    return stages


def _cache_per_token(model: Model) -> float:
    """Numbers in the cache of a full layer for each token."""
    return model.host.mixers[FULL].cache_bytes(model.config, _CONTEXT) / _CONTEXT / number_bytes(model.config)


def _batched(settings: TrainSettings, num_gpus: int, per_token: float, shares: list[Share]) -> Memory:
    """A stage that trains: the rows that one GPU runs at once."""
    rows = settings.division(num_gpus).rows
    keeps_layers = settings.activation_checkpointing is not True
    tokens, setting = rows * settings.length, f"{settings.stage}.micro_batch_tokens"
    return Memory(shares, per_token, tokens, settings.length, setting, keeps_layers=keeps_layers)
