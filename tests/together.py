"""What two processes do together, for test_ranks.py: `torchrun --nproc_per_node 2 tests/together.py FOLDER`."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import random_qwen3, tiny_tokenizer
from safetensors.torch import save_file
from test_objective import objective_on
from test_step import KINDS, step_of
from test_training import SETTINGS, rows_in, settings_of, student_and_teacher
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flashmorph import distributed
from flashmorph.convert.in_memory import transplant
from flashmorph.data.heldout import HeldOut
from flashmorph.errors import UserError
from flashmorph.evaluation import answer_scores, text_losses
from flashmorph.model import recompute
from flashmorph.model.frozen import narrow
from flashmorph.model.morphable import Morphable, attach
from flashmorph.model.sharding import in_turn, is_sharded, shard_morphable, shard_student, shard_teacher, whole
from flashmorph.plan import Budget
from flashmorph.stages import RowsWithLogits, align, alignment_errors, distill, extend, write_logits
from flashmorph.tasks import Prompt

CPU = torch.device("cpu")


def morphable_of(seed: int = 0, bf16: bool = False) -> Morphable:
    model, _ = transplant(random_qwen3(seed, vocab_size=len(tiny_tokenizer())))
    tokens = torch.randint(97, (4, 48), generator=torch.Generator().manual_seed(seed))
    morphable, _ = attach(model, tokens)
    model.config.dtype = torch.bfloat16
    narrow(model, bf16, [weight for each in morphable.branch_parameters() for weight in each])
    return morphable


def trained(kind: str, folder: Path, sharded: bool, bf16: bool = False, **changes) -> dict[str, torch.Tensor]:
    """The weights that five steps of a stage end with, whole; empty in all processes but the first."""
    settings = settings_of(SETTINGS[kind], **{"steps": 5, "checkpoint_steps": 3, **changes})
    rows = rows_in(folder / str(distributed.rank()), settings.rows)
    if kind == "align":
        made = (lambda: shard_morphable(morphable_of(0, bf16), CPU, bf16)) if sharded else lambda: morphable_of(0, bf16)
        morphable = in_turn(made, CPU)
        assert is_sharded(morphable) == sharded
        align(morphable, rows, settings, folder, 0, bf16)
        ids = torch.tensor([rows[row]["input_ids"] for row in range(4)])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert all(0 < error < 10 for error in alignment_errors(morphable, ids))
        return whole(morphable.branch_state())
    student, teacher = student_and_teacher()
    teacher.config.dtype = torch.bfloat16
    narrow(teacher, bf16)
    if sharded:
        shard_student(student, CPU, bf16)
        shard_teacher(teacher, CPU, bf16)
        assert all(isinstance(weight, DTensor) for weight in student.model.layers.parameters())
    run = {"distill": lambda: distill(student, teacher, rows, settings, folder, 0, bf16)}
    run["extend"] = lambda: extend(student, rows, settings, folder, 0, bf16)
    run[kind]()
    assert all(isinstance(weight, DTensor) for weight in student.parameters()) == sharded
    return whole(dict(student.named_parameters()))


def trained_weights_are_shared_whatever_their_shape() -> None:
    """A weight that trains and is not divided would go its own way on every rank; that of `dash` is a vector."""
    model, _ = transplant(random_qwen3(0), {"mixers": "full,dash,linear", "chunk": 4})
    morphable, _ = attach(model, torch.randint(97, (2, 24)))
    shard_morphable(morphable, CPU)
    weights = [weight for each in morphable.branch_parameters() for weight in each]
    assert len(weights) > 2 and all(isinstance(weight, DTensor) for weight in weights)


def searched(folder: Path, sharded: bool, again: bool = False) -> dict[str, list]:
    """Losses and gradients of gates, and losses of plans, on more parts than there are processes."""
    recompute.KEPT_BYTES = 0 if again else 2**30
    morphable = morphable_of()
    if sharded:
        shard_morphable(morphable, CPU)
        assert is_sharded(morphable)
    rows = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
    objective = objective_on(morphable, folder, rows, batch_tokens=3 * 96)
    gates = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    space, budget = morphable.space(Budget("layers", 1)), Budget("layers", 1)
    plans = [space.plan([group], budget) for group in space.groups]
    found: dict[str, list] = {}
    for loss in ("answers", "hidden"):
        value, gradient = objective.gradient(gates, 3, loss)
        found[loss] = [value, *gradient.flatten().tolist()]
    objective.evaluate(plans[:1], [4, 2])
    found["plans"] = objective.evaluate(plans).flatten().tolist()
    found["text"] = objective.text_losses(plans)
    found["cost"] = [objective.cost.tokens_forward, objective.cost.tokens_backward, objective.cost.flops]
    return found


def judged(folder: Path) -> dict[str, list]:
    """What models answer, lose on text and store as a teacher, in more batches than there are processes."""
    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(0)
    model = random_qwen3(vocab_size=len(tokenizer)).requires_grad_(False)
    forwards: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    rows = [torch.randint(97, (length,), generator=generator).tolist() for length in (9, 30, 17, 5, 26, 21, 12)]
    prompts = [Prompt(ids, 1, ("e", "never said"), anywhere=True) for ids in rows]
    reports: list[tuple[float, float]] = []
    found: dict[str, list] = {
        "scores": answer_scores(model, tokenizer, prompts, 60, lambda done, total: reports.append((done, total)))
    }
    assert all(0 < done <= total == 7 for done, total in reports) and len(reports) > 1
    text = HeldOut(rows, list(range(7)), [0] * 7, 30, 120)
    found["text"] = text_losses(model, text, 40).tolist()
    rows, settings = rows_in(folder / str(distributed.rank()), 7), settings_of(SETTINGS["distill"], rows=1)
    write_logits(transplant(random_qwen3(0))[0], rows, settings, 5, folder)
    stored = RowsWithLogits(rows, folder)
    found["logits"] = [stored[row][name].tolist() for row in range(7) for name in ("values", "indices")]
    found["forwards"] = distributed.gather(len(forwards))
    return found


def main(folder: Path) -> None:
    torch.manual_seed(0)
    assert distributed.join(CPU) == CPU and dist.get_world_size() == distributed.count() == 2
    assert distributed.gather(distributed.rank()) == [0, 1]
    assert distributed.first(lambda: (distributed.rank(), distributed.count())) == (0, 1)
    assert distributed.rounds("abc") == [[("a", True), ("b", True)], [("c", True), ("c", False)]]
    try:
        distributed.first(lambda: (_ for _ in ()).throw(UserError("no room")))
    except UserError as error:
        assert str(error) == "no room"
    else:
        raise AssertionError("both should have been told")
    trained_weights_are_shared_whatever_their_shape()
    views: list[bool] = []
    wrap = DistributedDataParallel.__init__

    def keep(wrapper: DistributedDataParallel, *given, **settings) -> None:
        wrap(wrapper, *given, **settings)
        views.append(wrapper.gradient_as_bucket_view)

    DistributedDataParallel.__init__ = keep
    for kind in SETTINGS:
        weights = trained(kind, folder / f"{kind}-sharded", True)
        if distributed.is_first():
            save_file(weights, folder / f"{kind}-sharded.safetensors")
        for sharded in (False, True):
            trained(kind, folder / f"{kind}-bf16-{sharded}", sharded, bf16=True)
    weights = trained("extend", folder / "extend-again", True, activation_checkpointing=True, micro_batch_tokens=24)
    if distributed.is_first():
        save_file(weights, folder / "extend-again.safetensors")
    for kind in KINDS:
        for micro_rows, sharded in ((1, False), (None, False), (2, True)):
            name = f"{kind}-step-{micro_rows}"
            gradients, loss = step_of(kind, folder / name, micro_rows, sharded)
            if distributed.is_first():
                save_file(gradients, folder / f"{name}.safetensors", {"loss": str(loss)})
    kinds = {"whole": (False, False), "divided": (True, False), "divided-again": (True, True)}
    every = [distributed.gather(searched(folder / name, *kind)) for name, kind in kinds.items()]
    assert all(one == other for one, other in every), "both must be told the same"
    evaluated = distributed.gather(judged(folder / "judged"))
    assert evaluated[0] == evaluated[1]
    assert views and all(views), "DDP must keep no second copy of the gradients"
    if distributed.is_first():
        (folder / "searched.json").write_text(json.dumps([one for one, _ in every]))
        (folder / "judged.json").write_text(json.dumps(evaluated[0]))
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
