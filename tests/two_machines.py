"""Two ranks of two machines, each with a cache of its own, for test_ranks.py: `two_machines.py GGUF FOLDER`."""

import json
import os
import sys
from pathlib import Path

import torch

FILE, FOLDER = sys.argv[1], Path(sys.argv[2])
RANK = int(os.environ["RANK"])
CACHE = FOLDER / f"cache-{RANK}"
os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", XDG_CACHE_HOME=str(CACHE), HF_HOME=str(CACHE / "hub"))

from flashmorph import distributed  # noqa: E402
from flashmorph.convert.teacher import open_on_every_machine  # noqa: E402
from flashmorph.errors import UserError  # noqa: E402

distributed.join(torch.device("cpu"))
teacher = open_on_every_machine(FILE)
assert teacher.folder.is_relative_to(CACHE) and teacher.config.model_type == "qwen3" and teacher.tokenizer()


def problem_with(name: str) -> str:
    try:
        open_on_every_machine(name)
    except UserError as error:
        return str(error)
    return ""


if RANK == 1:  # The same file, read on the other machine into something else.
    path = teacher.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.01}))
problems = [problem_with(FILE)]
if RANK == 1:
    path.write_text("{")
problems.append(problem_with(FILE))
every = distributed.gather(problems)
if RANK == 0:
    (FOLDER / "problems.json").write_text(json.dumps(every))
distributed.leave()
