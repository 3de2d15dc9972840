"""Files that were damaged by chance or by intent, made from one that is whole, and what becomes of loading them.

By hand: ``python -m tests.hostile --files 2000 --seed 0``.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import resource
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sbac
from sbac import A2C, DDPG, TD3
from sbac.archive import ArchiveError
from sbac.base import BaseAlgorithm
from sbac.prioritized import PrioritizedReplayBuffer
from sbac.schedules import LinearSchedule

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [4]}, "seed": 0}
REPLAY: dict[str, Any] = {**SMALL, "learning_starts": 8, "batch_size": 4, "buffer_size": 30}
MAKERS: dict[str, tuple[Callable[[], BaseAlgorithm], str]] = {
    "A2C": (lambda: A2C("MlpPolicy", "CartPole-v1", n_envs=2, **SMALL), "CartPole-v1"),
    "DDPG": (lambda: DDPG("MlpPolicy", "Pendulum-v1", **REPLAY), "Pendulum-v1"),
    "TD3": (
        lambda: TD3(
            "MlpPolicy",
            "Pendulum-v1",
            replay_buffer_class=PrioritizedReplayBuffer,
            normalize_obs=True,
            learning_rate=LinearSchedule(1e-3, 1e-4),
            **REPLAY,
        ),
        "Pendulum-v1",
    ),
}
JSONS = ("config.json", "state.json", "meta.json")
PATHS = ("../evil.npy", "/tmp/evil.npy", "policy/../../evil.npy", "policy\\..\\evil.npy", "C:/evil.npy", "evil.py")
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 10**12, 2**70, 1e308, 0.5, "", "x", "os.system", [], [1], {}),
    *({"__class__": "os.system"}, {"__class__": "torch.nn.Module"}, {"__float__": "nan"}, {"__tuple__": [1]}),
    {"__object__": "arguments.policy", "describe": "x"},
    {"__array__": {"dtype": "<f4", "shape": [10**12], "data": ""}},
)


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return (Path.mkdir, (self.trap,))


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        return {name: source.read(name) for name in source.namelist()}


def zipped(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED, honest: bool = True) -> bytes:
    """A zip of these members, in which the checksums of the format agree with them if it is `honest`."""
    if honest:
        meta = json.loads(parts["meta.json"])
        meta["checksums"] = {name: zlib.crc32(part) for name, part in parts.items() if name != "meta.json"}
        parts = {**parts, "meta.json": json.dumps(meta).encode()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name, part in parts.items():
            target.writestr(name, part)
    return file.getvalue()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested lists and dicts where a value stands."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


class Mutator:
    """Makes bad files out of a good one.

    Args:
        content: The good one.
        trap: What a payload would make.
        seed: Of all that is random.
    """

    def __init__(self, content: bytes, trap: Path, seed: int) -> None:
        self.content = content
        self.parts = members(content)
        self.payload = pickle.dumps(Payload(trap))
        self.random = np.random.default_rng(seed)

    # By chance: checksums tell, so that what is loaded is the original.

    def flipped_bits(self) -> bytes:
        damaged = bytearray(self.content)
        for position in self.random.integers(len(damaged), size=self.random.integers(1, 6)):
            damaged[position] ^= 1 << self.random.integers(8)
        return bytes(damaged)

    def cut_short(self) -> bytes:
        return self.content[: self.random.integers(len(self.content))]

    def block_of_another_place(self) -> bytes:
        size = int(self.random.integers(1, 500))
        here, there = self.random.integers(len(self.content) - size, size=2)
        return self.content[:here] + self.content[there : there + size] + self.content[here + size :]

    def swapped_members(self) -> bytes:
        one, other = self.random.choice([name for name in self.parts if name != "meta.json"], 2, replace=False)
        return zipped({**self.parts, one: self.parts[other], other: self.parts[one]}, honest=False)

    # By intent: checksums and all else agree.

    def honestly_swapped_members(self) -> bytes:
        one, other = self.random.choice([name for name in self.parts if name != "meta.json"], 2, replace=False)
        return zipped({**self.parts, one: self.parts[other], other: self.parts[one]})

    def lost_member(self) -> bytes:
        lost = self.random.choice([name for name in self.parts if name != "meta.json"])
        return zipped({name: part for name, part in self.parts.items() if name != lost})

    def lying_shape(self) -> bytes:
        name = self._array_name()
        array = np.load(io.BytesIO(self.parts[name]))
        lengths = (0, 1, 2, 3, 7, 10**6, 10**12, -1, 2**63)
        shape = tuple(int(self.random.choice(lengths)) for _ in range(self.random.integers(0, 4)))
        header = str({"descr": array.dtype.str, "fortran_order": False, "shape": shape}) + "\n"
        text = header.encode("latin1")
        data = array.tobytes()
        if self.random.random() < 0.5:  # as much as it says, where that is little
            size = int(np.prod([min(abs(length), 10**6) for length in shape])) * array.itemsize
            data = bytes(min(size, 10**5))
        return zipped({**self.parts, name: b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data})

    def other_array(self) -> bytes:
        """A whole array, of another shape or dtype, or with other values."""
        name = self._array_name()
        array = np.load(io.BytesIO(self.parts[name]))
        ways: list[Callable[[], np.ndarray]] = [
            lambda: array.astype(self.random.choice(["<f8", "<f4", "<i8", "|u1", "|b1", "<c8"])),
            lambda: np.concatenate([array.ravel(), array.ravel()[:1]]),
            lambda: array[None],
            lambda: array.ravel()[:-1],
            lambda: np.full_like(array, self.random.choice([-1, 0, 1, 99])) if array.dtype.kind != "u" else array[:0],
            lambda: np.full(array.shape, np.nan),
            lambda: np.full(array.shape, np.iinfo(np.int64).min),
            lambda: np.zeros(()),
        ]
        file = io.BytesIO()
        np.save(file, ways[self.random.integers(len(ways))]())
        return zipped({**self.parts, name: file.getvalue()})

    def strange_json(self) -> bytes:
        """JSON in which one value is another."""
        name = str(self.random.choice(JSONS))
        value = json.loads(self.parts[name])
        places = list(_places(value))
        owner, key = places[self.random.integers(len(places))]
        owner[key] = STRANGE[self.random.integers(len(STRANGE))]
        honest = name != "meta.json" or isinstance(value, dict)
        return zipped({**self.parts, name: json.dumps(value).encode()}, honest=honest)

    def zip_bomb(self) -> bytes:
        name = str(self.random.choice(list(self.parts)))
        return zipped({**self.parts, name: bytes(2**24)}, zipfile.ZIP_DEFLATED, honest=name != "meta.json")

    def path_that_leads_elsewhere(self) -> bytes:
        return zipped({**self.parts, str(self.random.choice(PATHS)): self.parts[self._array_name()]})

    def pickle_in_a_member(self) -> bytes:
        name = str(self.random.choice([*self.parts, "objects.pkl", "policy/data.pkl", "archive/data.pkl"]))
        before = self.parts.get(name, b"")
        part = [self.payload, before + self.payload, self.payload + before][self.random.integers(3)]
        return zipped({**self.parts, name: part}, honest=name != "meta.json")

    def pickled_array(self) -> bytes:
        """An array of objects, as NumPy would unpickle it."""
        file = io.BytesIO()
        np.save(file, np.array([0, None], object), allow_pickle=True)
        part = file.getvalue()
        part = part[: part.index(b"\n") + 1] + self.payload
        return zipped({**self.parts, self._array_name(): part})

    def _array_name(self) -> str:
        return str(self.random.choice([name for name in self.parts if name.endswith(".npy")]))


BY_CHANCE = (Mutator.flipped_bits, Mutator.cut_short, Mutator.block_of_another_place, Mutator.swapped_members)
BY_INTENT = (
    Mutator.honestly_swapped_members,
    Mutator.lost_member,
    Mutator.lying_shape,
    Mutator.other_array,
    Mutator.strange_json,
    Mutator.zip_bomb,
    Mutator.path_that_leads_elsewhere,
    Mutator.pickle_in_a_member,
    Mutator.pickled_array,
)


def everything(model: BaseAlgorithm) -> dict[str, bytes]:
    """What a full checkpoint holds, as bytes."""
    file = io.BytesIO()
    model.save(file, full=True)
    return members(file.getvalue())


def attack(name: str, n_files: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Load bad files, made of a full checkpoint.

    Args:
        name: One of `MAKERS`.
        n_files: How many.
        seed: Of what is bad about them.
        folder: An empty one.

    Returns:
        How often each kind of damage was refused, loaded as the original, and loaded as something else; and what went
        wrong: errors that are no `ArchiveError`, models that are not the original although nobody forged the checksums,
        and code that ran.
    """
    make, env_id = MAKERS[name]
    model = make().learn(21)
    model.save(folder / "original", full=True)
    original = everything(sbac.load(folder / "original", env=env_id))
    trap = folder / "trap"
    mutator = Mutator((folder / "original.zip").read_bytes(), trap, seed)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for i in range(n_files):
        mutate = (*BY_CHANCE, *BY_INTENT)[i % (len(BY_CHANCE) + len(BY_INTENT))]
        content = mutate(mutator)
        for read in (sbac.inspect, lambda file: sbac.load(file, env=env_id)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = read(io.BytesIO(content))
            except ArchiveError:
                outcome = "refused"
                continue
            except Exception as error:
                outcome = "failed"
                wrong.append(f"{mutate.__name__} {i}: {error!r}")
                (folder / f"failed_{i}.zip").write_bytes(content)
                continue
            if isinstance(found, BaseAlgorithm):
                outcome = "the original" if everything(found) == original else "another"
                if outcome == "another" and mutate in BY_CHANCE:
                    wrong.append(f"{mutate.__name__} {i}: loaded as something else")
        outcomes[f"{mutate.__name__}: {outcome}"] += 1
    if trap.exists():
        wrong.append("a payload ran")
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for name in MAKERS:
        with tempfile.TemporaryDirectory() as folder:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            outcomes, wrong = attack(name, options.files, options.seed, Path(folder))
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"{name}: {options.files} files, largest resident memory {before // 1024} MiB before, {after // 1024} after"
        )
        print(*(f"  {outcome}: {count}" for outcome, count in sorted(outcomes.items())), sep="\n")
        print(*wrong[:50], sep="\n")
        failed = failed or bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
