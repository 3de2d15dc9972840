"""Files that earlier versions wrote are loaded for ever. `tests.make_data` made them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest

import sbac
from sbac.archive import FORMAT_VERSION
from tests.make_data import DATA, MODELS

FILES = sorted(DATA.glob("*.zip"))


def test_there_is_a_file_of_each_algorithm_in_the_present_format() -> None:
    assert {f"{name}_format{FORMAT_VERSION}.zip" for name in MODELS} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_an_earlier_version_predicts_as_it_did_and_trains_on(path: Path) -> None:
    expected = np.load(path.with_suffix(".npz"))
    match = re.fullmatch(r"(\w+)_format\d+", path.stem)
    assert match is not None
    cls, env_id, arguments = MODELS[match[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sbac.load(path, env=env_id)
    assert type(model) is cls
    # Another machine may round sums differently.
    assert np.allclose(model.predict(expected["obs"])[0], expected["action"], rtol=0, atol=1e-6)
    assert model.num_timesteps == 14
    assert model.n_envs == arguments.get("n_envs", 1)
    for name, buffer in model._buffers().items():
        if name == "workers":
            assert all(state is not None for state in buffer.by_rank)
        else:
            assert buffer.size() == (4 if name == "rollout_buffer" else 14)
    before = model.n_updates
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps == 34 and model.n_updates > before


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_an_earlier_version_can_be_inspected(path: Path) -> None:
    content = sbac.inspect(path)
    assert content["state"] and not content["objects"]
    assert {array["name"].split("/")[0] for array in content["arrays"]} == {"policy", "optimizer", "state"}
