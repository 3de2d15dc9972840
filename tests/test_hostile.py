"""Bad files give an `ArchiveError` or what they were made of, take no memory to speak of, and run nothing."""

from __future__ import annotations

import io
import pickle
import resource
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.hostile import MAKERS, Mutator, Payload, attack, members


@pytest.mark.parametrize("name", MAKERS)
def test_bad_files_are_refused_or_load_as_the_original(name: str, tmp_path: Path) -> None:
    """A short version of what `tests.hostile` does by hand."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, wrong = attack(name, 78, seed=0, folder=tmp_path)
    assert wrong == []
    assert sum(outcomes.values()) == 78
    assert outcomes["zip_bomb: refused"] == outcomes["path_that_leads_elsewhere: refused"] == 6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17, "in KiB: 128 MiB, with the tests' own"
    assert not list(tmp_path.glob("**/evil*"))


def test_the_payload_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.exists()


def test_numpy_would_run_the_payload_if_it_were_allowed_to(tmp_path: Path) -> None:
    file = io.BytesIO()
    MAKERS["A2C"][0]().save(file, full=True)
    trap = tmp_path / "trap"
    mutator = Mutator(file.getvalue(), trap, seed=0)
    (part,) = [part for part in members(mutator.pickled_array()).values() if mutator.payload in part]
    with suppress(AttributeError):  # what it makes is no array
        np.load(io.BytesIO(part), allow_pickle=True)
    assert trap.exists()
