"""Recipes are data that the algorithms accept."""

import tomllib
from importlib import resources

import pytest
from torch import nn

from sbac.loading import ALGORITHMS
from sbac.noise import NormalActionNoise
from sbac.recipes import load_recipe, read_value, registered_id
from sbac.schedules import LinearSchedule

RECIPES = [
    (name, env_id)
    for name in ALGORITHMS
    for env_id in tomllib.loads((resources.files("sbac.recipes") / f"{name}.toml").read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("name", "env_id"), RECIPES)
def test_each_recipe_builds_a_model(name: str, env_id: str) -> None:
    recipe = load_recipe(name, env_id)
    assert recipe.pop("n_timesteps") > 0
    with ALGORITHMS[name]("MlpPolicy", env_id, **recipe) as model:
        for argument, value in recipe.items():
            if argument != "action_noise":
                assert getattr(model, argument) == value


def test_no_recipe_is_empty() -> None:
    assert load_recipe("a2c", "NoSuchEnvironment-v0") == {}
    assert load_recipe("nothing", "CartPole-v1") == {}


def test_an_id_without_a_version_is_its_newest() -> None:
    assert registered_id("CartPole") == "CartPole-v1"
    assert registered_id("some.module:CartPole") == "some.module:CartPole-v1"
    for env_id in ("CartPole-v0", "CartPole-v1", "NoSuchEnvironment", "no id?"):
        assert registered_id(env_id) == env_id
    assert load_recipe("a2c", "CartPole") == load_recipe("a2c", "CartPole-v1") != {}
    assert load_recipe("a2c", "CartPole-v0") == {}


def test_values_are_read_as_data() -> None:
    assert read_value("learning_rate", "lin_0.001") == LinearSchedule(0.001, 0.0)
    assert read_value("learning_rate", 0.001) == 0.001
    assert read_value("policy_kwargs", {"activation_fn": "ReLU"}) == {"activation_fn": nn.ReLU}
    noise = read_value("action_noise", {"kind": "normal", "mean": 0.0, "sigma": 0.3})
    assert isinstance(noise, NormalActionNoise)
    with pytest.raises(ValueError, match="kind"):
        read_value("action_noise", {"kind": "brown"})
    with pytest.raises(ValueError, match=r"activation_fn.*'RELUU'.*'ReLU'"):
        read_value("policy_kwargs", {"activation_fn": "RELUU"})
