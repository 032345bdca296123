"""A teacher's weights and their index, damaged: cut, garbled, of other shapes, or names that lead elsewhere."""

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flashmorph.convert.teacher import open_teacher
from hostile.config_files import DAMAGES, judge
from hostile.harness import OUTPUT, Case
from hostile.seeds import in_turn
from hostile.teachers import SOUND, copy_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ODD_NAMES = ["../outside.safetensors", "/etc/passwd", "..", ".", "", "sub/model.safetensors", "a\\b.safetensors", 3,
             None, [], {}, "x" * 5000, "model.bin", "../t/model.safetensors", "\u202e.safetensors",
             "no\0thing.safetensors", "config.json", "~/model.safetensors", True]  # fmt: skip


def generate(seed: int, number: int) -> Iterator[Case]:
    """So many damaged weights and indices."""
    return in_turn("weights", (_bytes, _header, _tensors, _odd_name, _index, _place), seed, number)


def _single(chance: random.Random, name: str, damage: Callable[[Path], Any], must_refuse: bool = True) -> Case:
    def prepare(folder: Path) -> list[str]:
        damage(copy_of(chance.choice(list(SOUND)), folder / "t") / WEIGHTS)
        return _command(folder)

    return Case("weights", name, prepare, must_refuse, judge=judge)


def _command(folder: Path) -> list[str]:
    return ["transplant", str(folder / "t"), "--output", str(folder / OUTPUT)]


def _bytes(chance: random.Random) -> Case:
    """The file cut, overwritten or empty."""
    damages: dict[str, Callable[[bytes], bytes]] = {
        "cut": lambda content: content[: chance.randrange(len(content))],
        "one byte short": lambda content: content[:-1],
        "bytes more": lambda content: content + chance.randbytes(chance.randint(1, 64)),
        "empty": lambda content: b"",
        "zero bytes": lambda content: bytes(len(content)),
        "random bytes": lambda content: chance.randbytes(len(content)),
        "a header of terabytes": lambda content: struct.pack("<Q", 1 << 42) + content[8:],
        "a header beyond all bytes": lambda content: b"\xff" * 8 + content[8:],
        "a header of no bytes": lambda content: bytes(8) + content[8:],
        "a pickle": lambda content: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "a zip": lambda content: b"PK\x03\x04" + content[4:],
        "a page": lambda content: b"<!doctype html><title>Sign in</title>",
    }
    name, damage = chance.choice(list(damages.items()))
    return _single(chance, name, lambda path: path.write_bytes(damage(path.read_bytes())))


def _header(chance: random.Random) -> Case:
    """Another JSON before the tensors."""

    def first(header: dict[str, Any]) -> dict[str, Any]:
        return next(value for name, value in header.items() if name != "__metadata__")

    damages: dict[str, Callable[[dict[str, Any]], Any]] = {
        "offsets beyond the file": lambda header: first(header).update(data_offsets=[0, 1 << 40]),
        "offsets backwards": lambda header: first(header).update(data_offsets=[8, 0]),
        "negative offsets": lambda header: first(header).update(data_offsets=[-8, 0]),
        "an overlap": lambda header: first(header).update(data_offsets=[2, 4]),
        "a shape of no numbers": lambda header: first(header).update(shape=["a"]),
        "a negative shape": lambda header: first(header).update(shape=[-1, 2]),
        "a huge shape": lambda header: first(header).update(shape=[1 << 62, 1 << 62]),
        "an unknown dtype": lambda header: first(header).update(dtype="F7"),
        "a dtype of no string": lambda header: first(header).update(dtype=[1]),
        "no dtype": lambda header: first(header).pop("dtype"),
        "metadata of no strings": lambda header: header.update(__metadata__={"format": 3}),
        "a tensor that is a list": lambda header: header.update(x=[1, 2]),
    }
    name, change = chance.choice(list(damages.items()))

    def damage(path: Path) -> None:
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return _single(chance, name, damage)


def _tensors(chance: random.Random) -> Case:
    """A sound file with other tensors in it."""

    def changed(path: Path, change: Callable[[dict[str, torch.Tensor], str], Any]) -> None:
        state = load_file(path)
        change(state, chance.choice([name for name, weight in state.items() if weight.ndim == 2]))
        save_file(state, path, {"format": "pt"})

    def put(value: Any) -> Callable[[dict[str, torch.Tensor], str], Any]:
        def change(state: dict[str, torch.Tensor], name: str) -> None:
            state[name] = value(state[name])

        return change

    def spoilt(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def spoil(weight: torch.Tensor) -> torch.Tensor:
            weight.view(-1)[chance.randrange(weight.numel())] = value
            return weight

        return spoil

    damages = {
        "a weight is missing": lambda state, name: state.pop(name),
        "no weights at all": lambda state, name: state.clear(),
        "a row too many": put(lambda weight: torch.cat([weight, weight[:1]])),
        "a column too few": put(lambda weight: weight[:, 1:].contiguous()),
        "one dimension": put(lambda weight: weight.flatten()),
        "no dimension": put(lambda weight: weight[0, 0].clone()),
        "no rows": put(lambda weight: weight[:0].clone()),
        "whole numbers": put(lambda weight: weight.to(torch.int8)),
        "truth values": put(lambda weight: weight > 0),
        "eight bits": put(lambda weight: weight.to(torch.float8_e4m3fn)),
        "complex numbers": put(lambda weight: weight.to(torch.complex64)),
        "no number": put(spoilt(float("nan"))),
        "infinity": put(spoilt(float("inf"))),
        "another name": lambda state, name: state.__setitem__("x" * 5000, state.pop(name)),
        "a name with markup": lambda state, name: state.__setitem__("[/]\n\x1b[31m", state.pop(name)),
        "a weight more": lambda state, name: state.__setitem__(name.replace("weight", "extra"), state[name].clone()),
    }
    name, change = chance.choice(list(damages.items()))
    return _single(chance, name, lambda path: changed(path, change), must_refuse=name != "a weight more")


def _odd_name(chance: random.Random) -> Case:
    """An index that gives a weight a file which is none beside it."""
    odd = chance.choice(ODD_NAMES)

    def change(values: dict[str, Any]) -> None:
        values["weight_map"][chance.choice(list(values["weight_map"]))] = odd

    return _with_index(chance, f"a file {odd!r}"[:60], change)


def _index(chance: random.Random) -> Case:
    """An index that is none, or misses something."""
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "no map": lambda values: values.pop("weight_map"),
        "an empty map": lambda values: values.update(weight_map={}),
        "a list as map": lambda values: values.update(weight_map=list(values["weight_map"])),
        "a string as map": lambda values: values.update(weight_map="model.safetensors"),
        "a missing file": lambda values: values["weight_map"].update(x="gone.safetensors"),
    }
    name = chance.choice([*changes, *DAMAGES])
    if name in changes:
        return _with_index(chance, name, changes[name])

    def prepare(folder: Path) -> list[str]:
        path = copy_of("llama", folder / "t", "8KB") / INDEX
        path.write_bytes(DAMAGES[name](chance, path.read_bytes()))
        return _command(folder)

    return Case("index", name, prepare, must_refuse=name not in ("a key twice", "spaces"), judge=judge)


def _with_index(chance: random.Random, name: str, change: Callable[[dict[str, Any]], Any]) -> Case:
    def prepare(folder: Path) -> list[str] | Callable[[], object]:
        path = copy_of("llama", folder / "t", "8KB") / INDEX
        save_file({"x": torch.ones(2)}, folder / "outside.safetensors")
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        return (lambda: open_teacher(str(folder / "t"))) if chance.random() < 0.7 else _command(folder)

    return Case("index", name, prepare, must_refuse=True)


def _place(chance: random.Random) -> Case:
    """Something else where the file should be."""
    damages: dict[str, Callable[[Path], Any]] = {
        "a folder": lambda path: path.mkdir(),
        "a pipe": lambda path: os.mkfifo(path),
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a dead link": lambda path: path.symlink_to("nowhere"),
        "a link in a circle": lambda path: path.symlink_to(path.name),
        "a link to another file": lambda path: path.symlink_to("config.json"),
        "a pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    }
    name, damage = chance.choice(list(damages.items()))

    def replace(path: Path) -> None:
        path.unlink()
        damage(path)

    return _single(chance, name, replace)
