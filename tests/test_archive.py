"""The model file: exact and atomic in writing; in reading, believing nothing and executing nothing."""

import io
import json
import os
import pickle
import stat
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbac import archive as room
from sbac.archive import (
    Archive,
    ArchiveError,
    array_to_tensor,
    inspect_archive,
    read_archive,
    tensor_to_array,
    write_archive,
)

ARRAYS = {
    "policy/actor.mu.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "policy/actor.mu.0.bias": np.array([np.nan, -0.0, np.inf], np.float32),
    "policy/critic.bfloat": tensor_to_array(torch.tensor([1.0, -2.5]).bfloat16()),
    "optimizer/policy/0/step": np.array(7.0),
    "optimizer/policy/0/exp_avg": np.arange(6, dtype=np.float32).reshape(2, 3) + 1,
    "state/replay/obs": np.arange(12, dtype=np.uint8).reshape(3, 2, 2),
    "state/replay/é": np.zeros((0, 4), np.int64),
}
META = {"class": "TD3", "counters": {"num_timesteps": 12}}


def example(**changes: Any) -> Archive:
    content: dict[str, Any] = {
        "meta": dict(META),
        "config": {"gamma": 0.99, "policy": "MlpPolicy", "net_arch": [64, 64], "text": "é\ud800"},
        "arrays": dict(ARRAYS),
        "state": {"generator": {"key": 2**100}, "rewards": [0.1, -0.0]},
    }
    return Archive(**{**content, **changes})


def to_bytes(archive: Archive) -> bytes:
    file = io.BytesIO()
    write_archive(file, archive)
    return file.getvalue()


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        return {name: source.read(name) for name in source.namelist()}


def rezip(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED, honest: bool = True) -> bytes:
    """A zip of these members, whose checksums agree with its content if it is `honest`."""
    parts = dict(parts)
    if honest:
        meta = json.loads(parts.pop("meta.json"))
        meta["checksums"] = {name: zlib.crc32(content) for name, content in parts.items()}
        parts["meta.json"] = json.dumps(meta).encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name, content in parts.items():
            target.writestr(name, content)
    return file.getvalue()


def assert_same(found: Archive, expected: Archive) -> None:
    assert {name: found.meta[name] for name in expected.meta} == expected.meta
    assert json.dumps(found.config) == json.dumps(expected.config)
    assert json.dumps(found.state) == json.dumps(expected.state)
    assert list(found.arrays) == list(expected.arrays)
    for name, array in expected.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes()


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


# Writing and reading


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "model", example())
    assert path == tmp_path / "model.zip"
    found = read_archive(path)
    assert_same(found, example())
    assert found.meta["format"] == "sbac"
    assert found.meta["format_version"] == 1
    assert found.meta["versions"]["torch"] == str(torch.__version__)
    assert found.objects == {}


def test_read_arrays_are_writable_native_and_own_their_memory() -> None:
    arrays = {
        "a/big_endian": np.arange(6, dtype=">f8").reshape(2, 3),
        "a/fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "a/strided": np.arange(20)[::-3],
        "a/transposed": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
        "a/scalar": np.array(True),
        "a/complex": np.array([1 + 2j]),
        "a/empty": np.zeros((3, 0, 2)),
    }
    found = read_archive(io.BytesIO(to_bytes(Archive(arrays=arrays)))).arrays
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=False)
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype.newbyteorder("=")
        assert found[name].dtype.isnative
        flags = found[name].flags
        assert flags.writeable
        assert flags.owndata
        assert flags.c_contiguous


def test_equal_contents_give_equal_bytes_whatever_the_layout(tmp_path: Path) -> None:
    array = np.arange(6.0).reshape(2, 3)
    first = to_bytes(Archive(arrays={"a/x": array}))
    assert to_bytes(Archive(arrays={"a/x": np.asfortranarray(array)})) == first
    assert to_bytes(Archive(arrays={"a/x": array.astype(">f8")})) == first
    assert write_archive(tmp_path / "one.zip", Archive(arrays={"a/x": array})).read_bytes() == first


def test_a_file_written_again_after_reading_is_the_same() -> None:
    content = to_bytes(example())
    assert to_bytes(read_archive(io.BytesIO(content))) == content


def test_members_chooses_what_is_read(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "model", example(objects={"a": len}))
    found = read_archive(path, members=lambda name: not name.startswith("state"))
    assert found.state is None
    assert list(found.arrays) == [name for name in ARRAYS if not name.startswith("state/")]
    assert read_archive(path, allow_pickle=True, members=lambda name: False).objects is None


def test_any_layout_of_tensors_and_every_dtype_comes_back() -> None:
    values = torch.tensor([[0.5, -1.0, 2.0], [0.0, 4.0, -8.0]])
    dtypes = [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int8,
        torch.bool,
        torch.complex64,
    ]
    tensors = {str(dtype): values.to(dtype) for dtype in dtypes}
    tensors["transposed"] = values.bfloat16().T
    tensors["scalar"] = torch.tensor(1.5).bfloat16()
    tensors["empty"] = torch.zeros(0, 3, dtype=torch.bfloat16)
    tensors["parameter"] = torch.nn.Parameter(values.bfloat16())

    archive = Archive(arrays={f"a/{name}": tensor_to_array(tensor) for name, tensor in tensors.items()})
    found = read_archive(io.BytesIO(to_bytes(archive))).arrays
    for name, tensor in tensors.items():
        again = array_to_tensor(found[f"a/{name}"])
        assert again.dtype == tensor.dtype
        assert again.shape == tensor.shape
        assert torch.equal(again.to(torch.complex128), tensor.detach().to(torch.complex128))


def test_tensors_share_their_memory_with_their_arrays() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.zeros(2, dtype=dtype)
        array_to_tensor(tensor_to_array(tensor))[0] = 1.0
        assert tensor[0] == 1.0


def test_large_arrays_are_not_copied_in_memory(tmp_path: Path) -> None:
    array = np.zeros((4096, 1024), np.float64)  # 32 MiB
    tracemalloc.start()
    try:
        for layout in (array, array.T):
            write_archive(tmp_path / "model", Archive(arrays={"a/x": layout}))
            assert tracemalloc.get_traced_memory()[1] < array.nbytes / 4
        read_archive(tmp_path / "model")
        assert tracemalloc.get_traced_memory()[1] < array.nbytes * 1.25
    finally:
        tracemalloc.stop()


def test_inspect_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr(np, "empty", lambda *_: pytest.fail("allocated"))
    path = write_archive(tmp_path / "model", example(objects={"a": len}))
    found = inspect_archive(path)
    assert found["meta"]["class"] == "TD3"
    assert found["config"]["net_arch"] == [64, 64]
    assert found["state"] is True
    assert found["objects"] is True
    weight = {"name": "policy/actor.mu.0.weight", "shape": (2, 3), "dtype": "float32", "bytes": 24}
    assert found["arrays"][0] == weight
    assert found["arrays"][2]["dtype"] == "bfloat16"
    assert [entry["name"] for entry in found["arrays"]] == list(ARRAYS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrays": {"x": np.zeros(1)}}, "'x.npy' is no name"),
        ({"arrays": {"../x": np.zeros(1)}}, "no name"),
        ({"arrays": {"/etc/x": np.zeros(1)}}, "no name"),
        ({"arrays": {"a/..\\x": np.zeros(1)}}, "no name"),
        ({"arrays": {"c:/x": np.zeros(1)}}, "no name"),
        ({"arrays": {"a/\0": np.zeros(1)}}, "no name"),
        ({"arrays": {"a/x": np.array([None])}}, "dtype object"),
        ({"arrays": {"a/x": np.array(["text"])}}, "dtype <U4"),
        ({"arrays": {"a/x": np.zeros(1, [("load", "<u2")])}}, "dtype"),
        ({"config": {"a": (1, 2)}}, "config.json cannot hold .* not be the same"),
        ({"config": {1: 2}}, "config.json"),
        ({"config": {"a": float("nan")}}, "config.json"),
        ({"config": {"a": np.float32(1)}}, "config.json"),
        ({"state": [1]}, "state.json"),
        ({"meta": {"a": object()}}, "meta.json"),
        ({"objects": {"policy": (i for i in ())}}, r"cannot pickle one of \['policy'\]"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_archive(tmp_path / "model", example())
    before = path.read_bytes()
    with pytest.raises(ArchiveError, match=message):
        write_archive(path, example(**changes))
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["model.zip"]


def test_json_beyond_its_limit_is_neither_written_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    content = to_bytes(example(config={"a": "x" * 5000}))
    monkeypatch.setattr(room, "_MAX_JSON", 4000)
    with pytest.raises(ArchiveError, match=r"config\.json"):
        read_archive(io.BytesIO(content))
    with pytest.raises(ArchiveError, match=r"config\.json"):
        to_bytes(example(config={"a": "x" * 5000}))


# Paths


def test_suffixes_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert write_archive("model", example()) == Path("model.zip")
    assert write_archive("deep/er/model.v1", example()) == Path("deep/er/model.v1")
    assert write_archive(Path("buffer"), example(), suffix=".replay") == Path("buffer.replay")
    assert sorted(entry.name for entry in tmp_path.rglob("*") if entry.is_file()) == [
        "buffer.replay",
        "model.v1",
        "model.zip",
    ]
    for name in ("model", "model.zip", Path("model"), "deep/er/model.v1"):
        assert_same(read_archive(name), example())


def test_reading_finds_the_file_that_writing_made(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("something else")
    write_archive(tmp_path / "model", example())
    assert_same(read_archive(tmp_path / "model"), example())

    write_archive(tmp_path / "step_0.5.zip", example())
    assert_same(read_archive(tmp_path / "step_0.5"), example())


def test_a_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    write_archive(tmp_path / "pendulum", example())
    (tmp_path / "pendulm.py").touch()  # nearer, and no model
    for name in ("pendulm", "pendulm.zip"):
        with pytest.raises(FileNotFoundError, match=r"did you mean .*pendulum\.zip"):
            read_archive(tmp_path / name)
    for absent in (tmp_path / "xyz", tmp_path / "no" / "folder"):
        with pytest.raises(FileNotFoundError, match=r"no model file .*; give a \.zip that a model's save wrote"):
            inspect_archive(absent)


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        read_archive(tmp_path)
    (tmp_path / "model.zip").mkdir()
    with pytest.raises(OSError, match=r"any earlier one is unchanged.*model\.zip"):
        write_archive(tmp_path / "model.zip", example())
    assert names_in(tmp_path) == ["model.zip"]


def test_open_files_can_be_written_and_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        assert write_archive(file, example()) is None
        assert_same(read_archive(file), example())


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_a_symbolic_link_and_permissions_survive(tmp_path: Path) -> None:
    real = write_archive(tmp_path / "real.zip", example())
    fresh = stat.S_IMODE(real.stat().st_mode)
    (tmp_path / "plain").touch()
    assert fresh == stat.S_IMODE((tmp_path / "plain").stat().st_mode)

    real.chmod(0o640)
    (tmp_path / "link.zip").symlink_to(real)
    write_archive(tmp_path / "link.zip", example(state=None))
    assert (tmp_path / "link.zip").is_symlink()
    assert read_archive(real).state is None
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


# Atomicity


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError("no luck"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
) -> None:
    path = write_archive(tmp_path / "model", example())
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        write_archive(path, example(state=None))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["model.zip"]


def test_the_file_is_synced_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        assert Path(source).parent == Path(target).parent
        assert_same(read_archive(source), example())
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_archive(tmp_path / "model", example())
    assert events == ["file", "replace", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_at_any_size_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "model", example())
    before = path.read_bytes()
    program = """
import os, resource, sys
import numpy as np
from sbac.archive import Archive, write_archive
big = Archive(arrays={f"a/{i}": np.ones((40_000,), np.float32) for i in range(3)})
for limit in (0, 1, 100, 4096, 160_000, 200_000, 400_000, 480_500, 481_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_archive(sys.argv[1], big)
    except OSError as error:
        assert error.filename == sys.argv[1], error
        assert "unchanged" in str(error), error
    else:
        sys.exit(f"a limit of {limit} bytes was no obstacle")
    assert os.listdir(os.path.dirname(sys.argv[1])) == ["model.zip"]
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, resource.RLIM_INFINITY))
write_archive(os.path.join(os.path.dirname(sys.argv[1]), "big"), big)
"""
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["big.zip", "model.zip"]


# Damage


def reads_as_original_or_not_at_all(content: bytes) -> bool:
    try:
        found = read_archive(io.BytesIO(content))
    except ArchiveError:
        return False
    assert_same(found, example())
    return True


def test_every_truncation_is_an_error() -> None:
    content = to_bytes(example())
    for length in range(0, len(content), 7):
        assert not reads_as_original_or_not_at_all(content[:length])
        assert not reads_as_original_or_not_at_all(content[length + 1 :]) or length == 0


def test_random_damage_is_an_error_or_without_effect() -> None:
    content = to_bytes(example())
    generator = np.random.default_rng(0)
    outcomes = []
    for _ in range(600):
        damaged = bytearray(content)
        for position in generator.integers(len(content), size=generator.integers(1, 4)):
            damaged[position] ^= 1 << generator.integers(8)
        outcomes.append(reads_as_original_or_not_at_all(bytes(damaged)))
    assert 0 < sum(outcomes) < len(outcomes) / 2


def test_every_bit_of_the_directory_is_an_error_or_without_effect() -> None:
    content = to_bytes(example(arrays={"policy/w": ARRAYS["policy/actor.mu.0.weight"]}))
    start = content.index(b"PK\x01\x02")
    for position in range(start, len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            try:
                found = read_archive(io.BytesIO(damaged))
            except ArchiveError:
                continue
            assert found.arrays["policy/w"].tobytes() == ARRAYS["policy/actor.mu.0.weight"].tobytes()
            assert found.config == example().config


def test_blocks_of_zeros_or_of_another_place_are_errors_or_without_effect() -> None:
    content = to_bytes(example())
    generator = np.random.default_rng(1)
    for _ in range(200):
        size = int(generator.integers(1, 200))
        here, there = generator.integers(len(content) - size, size=2)
        filler = content[there : there + size] if generator.random() < 0.5 else bytes(size)
        reads_as_original_or_not_at_all(content[:here] + filler + content[here + size :])


def test_members_swapped_lost_or_added_are_errors() -> None:
    parts = members(to_bytes(example()))
    assert reads_as_original_or_not_at_all(rezip(parts, honest=False))

    one, other = "policy/actor.mu.0.weight.npy", "optimizer/policy/0/exp_avg.npy"
    swapped = {**parts, one: parts[other], other: parts[one]}
    with pytest.raises(ArchiveError, match=r"exp_avg\.npy, policy/actor\.mu\.0\.weight\.npy"):
        read_archive(io.BytesIO(rezip(swapped, honest=False)))

    for name in parts:
        lost = {key: content for key, content in parts.items() if key != name}
        assert not reads_as_original_or_not_at_all(rezip(lost, honest=False))
    with pytest.raises(ArchiveError, match=r"policy/new\.npy"):
        read_archive(io.BytesIO(rezip({**parts, "policy/new.npy": parts[one]}, honest=False)))


# Hostile and foreign files


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_no_planted_pickle_runs(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    payload = pickle.dumps(Bomb(trap))
    original = members(to_bytes(example(objects={"a": Bomb(trap)})))
    array = io.BytesIO()
    np.save(array, np.array([Bomb(trap)], object), allow_pickle=True)

    for name in original:
        for planted in (payload, array.getvalue()):
            content = rezip({**original, name: planted}, honest=name != "meta.json")
            for read in (read_archive, inspect_archive):
                try:
                    read(io.BytesIO(content))
                except ArchiveError:
                    continue
                # Neither reads the pickle unasked, nor does inspecting read the state.
                assert name == "objects.pkl" or (name == "state.json" and read is inspect_archive)
    assert not trap.exists()

    # The trap itself works.
    read_archive(io.BytesIO(rezip({**original, "objects.pkl": payload})), members=lambda _: False, allow_pickle=True)
    assert not trap.exists()
    with pytest.raises(ArchiveError, match=r"objects\.pkl"):
        read_archive(io.BytesIO(rezip({**original, "objects.pkl": payload})), allow_pickle=True)
    assert trap.exists()


def test_objects_need_leave() -> None:
    def double(x: int) -> int:
        return 2 * x

    file = io.BytesIO(to_bytes(example(objects={"policy_kwargs.f": double})))
    assert read_archive(file).objects is None
    objects = read_archive(file, allow_pickle=True).objects
    assert objects is not None
    function = objects["policy_kwargs.f"]
    assert callable(function)
    assert function(4) == 8


def test_objects_that_cannot_be_loaded_are_an_archive_error() -> None:
    parts = members(to_bytes(example(objects={"a": 1})))
    gone = b"cno_such_module\nThing\n."
    with pytest.raises(ArchiveError, match=r"no_such_module.*must be importable"):
        read_archive(io.BytesIO(rezip({**parts, "objects.pkl": gone})), allow_pickle=True)


@pytest.mark.parametrize(
    "content",
    [
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}\n", bytes(4)),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}\n", bytes(8)),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}\n", bytes(8)),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -2)}\n", bytes(8)),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 10**30)}\n"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1" + "0" * 30 + ")}\n"),
        npy("{'descr': '<f4', 'fortran_order': True, 'shape': (1, 2)}\n", bytes(8)),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", bytes(8)),
        npy("{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,)}\n"),
        npy("{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000,)}\n"),
        npy("{'descr': [('bfloat16', '<u4')], 'fortran_order': False, 'shape': (1,)}\n", bytes(4)),
        npy("{'descr': [('bfloat16', '|O')], 'fortran_order': False, 'shape': (1,)}\n", bytes(8)),
        npy("{'descr': [('a', '<u2'), ('b', '<u2')], 'fortran_order': False, 'shape': (1,)}\n", bytes(4)),
        npy("{'descr': '<f4', 'fortran_order': False}\n", bytes(4)),
        npy("__import__('os').mkdir('trap')\n", bytes(4)),
        npy("(" * 5000, bytes(4)),
        npy("-" * 5000 + "1", bytes(4)),
        npy("x" * 60000, bytes(4)),
        b"\x93NUMPY\x02\x00",
        b"\x93NUMPY",
        b"",
    ],
)
def test_lying_arrays_are_refused_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    file = rezip({**members(to_bytes(example(arrays={}))), "policy/w.npy": content})
    tracemalloc.start()
    try:
        for read in (read_archive, inspect_archive):
            if b"0" * 30 in content and read is inspect_archive:
                continue  # no bytes, as it claims; only making it is impossible
            with pytest.raises(ArchiveError, match=r"'policy/w\.npy'"):
                read(io.BytesIO(file))
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["config.json", "policy/w.npy", "meta.json"])
def test_compressed_members_are_refused_without_being_expanded(name: str) -> None:
    parts = {**members(to_bytes(example(arrays={}))), "policy/w.npy": bytes(2**25)}
    parts[name] = bytes(2**25)
    file = rezip(parts, zipfile.ZIP_DEFLATED, honest=False)
    assert len(file) < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError, match="compressed"):
            read_archive(io.BytesIO(file))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_members_that_share_their_bytes_are_refused() -> None:
    content = bytearray(rezip({**members(to_bytes(example(arrays={}))), "policy/w.npy": bytes(2**16)}))
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        start, entry = source.start_dir, source.getinfo("policy/w.npy")
        file = io.BytesIO(bytes(content[:start]))
        target = zipfile.ZipFile(file, "a")
        for info in source.infolist():
            target.filelist.append(info)
        for index in range(3):
            twin = zipfile.ZipInfo(f"policy/{index}.npy")
            twin.header_offset, twin.CRC = entry.header_offset, entry.CRC
            twin.file_size = twin.compress_size = entry.file_size
            target.filelist.append(twin)
        target.start_dir = start
        target._didModify = True
        target.close()
    with pytest.raises(ArchiveError, match="claim more bytes"):
        read_archive(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize(
    "name",
    [
        "../evil.npy",
        "/etc/evil.npy",
        "policy/../../evil.npy",
        "policy\\..\\evil.npy",
        "policy/./evil.npy",
        "policy//evil.npy",
        "C:/evil.npy",
        "policy/evil.py",
        "policy/",
        "evil.npy",
        "notes.txt",
        "policy/meta.json",
        "META.JSON",
    ],
)
def test_names_that_are_no_members_are_refused(name: str) -> None:
    parts = members(to_bytes(example()))
    file = rezip({**parts, name: parts["policy/actor.mu.0.weight.npy"]})
    with pytest.raises(ArchiveError, match="no member of a model file"):
        read_archive(io.BytesIO(file))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["config.json", "meta.json", "policy/actor.mu.0.weight.npy"])
def test_two_members_of_one_name_are_refused(name: str) -> None:
    content = to_bytes(example())
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as target:
        target.writestr(name, members(content)[name])
    with pytest.raises(ArchiveError, match="two members of the same name"):
        read_archive(file)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "1",
        "null",
        "",
        "{",
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        "\ufeff{}",
        "[" * 100_000,
        "1" * 5000,
        "{1: 2}",
    ],
)
@pytest.mark.parametrize("name", ["config.json", "state.json", "meta.json"])
def test_json_is_strict_and_must_be_an_object(name: str, text: str) -> None:
    parts = {**members(to_bytes(example())), name: text.encode()}
    with pytest.raises(ArchiveError, match=name):
        read_archive(io.BytesIO(rezip(parts, honest=name != "meta.json")))


def test_the_error_names_file_and_member(tmp_path: Path) -> None:
    parts = members(to_bytes(example()))
    path = tmp_path / "model.zip"
    path.write_bytes(rezip({**parts, "policy/actor.mu.0.bias.npy": b"junk"}))
    with pytest.raises(ArchiveError) as caught:
        read_archive(path)
    assert str(path) in str(caught.value)
    assert "'policy/actor.mu.0.bias.npy'" in str(caught.value)


def test_a_newer_format_names_its_writer_whatever_else_it_holds() -> None:
    parts = {**members(to_bytes(example())), "new/kind.bin": b""}
    meta = json.loads(parts["meta.json"])
    meta.update(format_version=2, versions={"sbac": "9.8"})
    del meta["checksums"]
    parts["meta.json"] = json.dumps(meta).encode()
    for read in (read_archive, inspect_archive):
        with pytest.raises(ArchiveError, match=r"sbac 9\.8 in format 2.*upgrade"):
            read(io.BytesIO(rezip(parts, honest=False)))


@pytest.mark.parametrize(
    "changes", [{"format": "other"}, {"format_version": 0}, {"format_version": "1"}, {"format_version": True}]
)
def test_a_strange_format_is_refused(changes: dict[str, Any]) -> None:
    parts = members(to_bytes(example()))
    parts["meta.json"] = json.dumps({**json.loads(parts["meta.json"]), **changes}).encode()
    with pytest.raises(ArchiveError, match="does not say that this is a model file"):
        read_archive(io.BytesIO(rezip(parts, honest=False)))


def test_older_formats_are_migrated_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    content = to_bytes(example())

    def rename(archive: Archive) -> Archive:
        archive.config["discount"] = archive.config.pop("gamma")
        return archive

    def double(archive: Archive) -> Archive:
        archive.config["discount"] *= 2
        return archive

    monkeypatch.setattr(room, "FORMAT_VERSION", 3)
    monkeypatch.setattr(room, "_MIGRATIONS", {1: rename, 2: double})
    found = read_archive(io.BytesIO(content))
    assert found.config["discount"] == 2 * 0.99
    assert found.meta["format_version"] == 3


def test_foreign_files_are_recognised(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.zip"
    for content in (b"", b"text", pickle.dumps({"a": 1}), b"PK\x05\x06"):
        foreign.write_bytes(content)
        with pytest.raises(ArchiveError, match="is not a model file"):
            read_archive(foreign)
    torch.save({"a": torch.zeros(3)}, foreign)
    with pytest.raises(ArchiveError, match=r"no meta\.json"):
        read_archive(foreign)


def test_files_of_stable_baselines3_are_recognised(tmp_path: Path) -> None:
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    stable_baselines3.A2C("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "theirs")
    for read in (read_archive, inspect_archive):
        with pytest.raises(ArchiveError, match="Stable-Baselines3 file, not a model file of sbac: A2C"):
            read(tmp_path / "theirs")
