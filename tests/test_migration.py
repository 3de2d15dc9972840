"""A script written for Stable-Baselines' A2C or DDPG runs after its imports are changed, and sees the same things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env

from sbac import A2C, DDPG

# Which module of sbac has what a script imports from one of stable-baselines3.
IMPORTS = {
    "stable_baselines3": "sbac",
    "stable_baselines3.common.callbacks": "sbac.callbacks",
    "stable_baselines3.common.evaluation": "sbac.evaluation",
    "stable_baselines3.common.logger": "sbac.logger",
    "stable_baselines3.common.noise": "sbac.noise",
}

SCRIPT = '''
import os

import gymnasium as gym
import numpy as np
from stable_baselines3 import A2C, DDPG
from stable_baselines3.common.callbacks import (
    BaseCallback, CallbackList, CheckpointCallback, EvalCallback, EveryNTimesteps, StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import HParam, configure
from stable_baselines3.common.noise import NormalActionNoise


class Watch(BaseCallback):
    """Counts rewards and episodes, records its own values and looks at everything that a callback may see."""

    def __init__(self, verbose=0):
        super().__init__(verbose)
        self.seen, self.total_reward, self.ends, self.started, self.ended = set(), 0.0, 0, 0, 0

    def _on_training_start(self):
        hparam_dict = {"algorithm": self.model.__class__.__name__, "gamma": self.model.gamma}
        self.logger.record("hparams", HParam(hparam_dict, {"rollout/ep_len_mean": 0}), exclude=("stdout", "log", "csv"))

    def _on_rollout_start(self):
        self.started += 1

    def _on_step(self):
        infos, rewards, dones = self.locals["infos"], self.locals["rewards"], self.locals["dones"]
        assert len(infos) == len(rewards) == len(dones) == self.training_env.num_envs
        assert self.locals["new_obs"].shape == (len(rewards), *self.training_env.observation_space.shape[-1:])
        assert len(self.locals["actions"]) == len(rewards) and self.locals["self"] is self.model
        self.total_reward += float(np.sum(rewards))
        for info, done in zip(infos, dones):
            if done:
                self.ends += 1
                for key in ("episode", "terminal_observation", "TimeLimit.truncated"):
                    self.seen |= {f"info.{key}"} if key in info else set()
                self.seen |= {f"episode.{key}" for key in info["episode"]}
        self.logger.record("custom/total_reward", self.total_reward)
        self.logger.record_mean("custom/mean_reward", np.mean(rewards))
        assert self.num_timesteps == self.model.num_timesteps >= self.n_calls * self.training_env.num_envs
        return True

    def _on_rollout_end(self):
        self.ended += 1


def run(algorithm, env_id, folder, total_timesteps, **kwargs):
    make = lambda: gym.wrappers.TimeLimit(gym.make(env_id).unwrapped, 20)
    env, watch = make(), Watch()
    policy_kwargs = dict(net_arch=[16, 16])
    model = algorithm("MlpPolicy", env, gamma=0.98, policy_kwargs=policy_kwargs, seed=1, device="cpu", **kwargs)
    model.set_logger(configure(os.path.join(folder, "log"), ["csv", "log"]))
    stop = StopTrainingOnRewardThreshold(reward_threshold=1e9, verbose=0)
    evaluate = EvalCallback(
        make(), callback_on_new_best=stop, eval_freq=50, n_eval_episodes=2, deterministic=True, render=False, verbose=0,
        best_model_save_path=os.path.join(folder, "best"), log_path=os.path.join(folder, "eval"), warn=False,
    )
    checkpoint = CheckpointCallback(save_freq=80, save_path=os.path.join(folder, "checkpoints"), name_prefix="rl_model")
    callback = CallbackList([watch, evaluate, checkpoint, EveryNTimesteps(n_steps=30, callback=Watch())])
    model.learn(total_timesteps=total_timesteps, callback=callback, log_interval=1, tb_log_name="run")
    assert model.get_env().num_envs == model.n_envs == 1 and evaluate.best_mean_reward >= evaluate.last_mean_reward

    model.save(os.path.join(folder, "model"))
    obs, _ = env.reset()
    loaded = algorithm.load(os.path.join(folder, "model"), env=make())
    action, state = loaded.predict(obs, deterministic=True)
    assert action in loaded.action_space and state is None
    loaded.set_parameters(model.get_parameters(), exact_match=True)
    mean, std = evaluate_policy(loaded, make(), n_eval_episodes=3, deterministic=True, warn=False)
    rewards, lengths = evaluate_policy(loaded, make(), n_eval_episodes=3, return_episode_rewards=True, warn=False)
    assert len(rewards) == len(lengths) == 3 and np.isfinite([mean, std]).all()
    loaded.learn(20, reset_num_timesteps=True)
    return model, watch


model, watch = run(A2C, "CartPole-v1", os.path.join(FOLDER, "a2c"), 200, n_steps=5, ent_coef=0.01, use_rms_prop=True)
noise = NormalActionNoise(mean=np.zeros(1), sigma=0.1 * np.ones(1))
ddpg, ddpg_watch = run(
    DDPG, "Pendulum-v1", os.path.join(FOLDER, "ddpg"), 200, learning_rate=1e-3, buffer_size=1000, learning_starts=50,
    batch_size=16, tau=0.01, train_freq=1, gradient_steps=1, action_noise=noise,
)
ddpg.save_replay_buffer(os.path.join(FOLDER, "ddpg", "buffer"))
ddpg.load_replay_buffer(os.path.join(FOLDER, "ddpg", "buffer"))
ddpg.train(gradient_steps=2, batch_size=8)
'''


def migrated(script: str) -> str:
    """The script with other imports; no other line is touched."""
    lines = []
    for line in script.splitlines():
        words = line.split()
        if words[:1] == ["from"] and words[1] in IMPORTS:
            line = line.replace(words[1], IMPORTS[words[1]])
        lines.append(line)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The variables of the script when it has run, and its folder, with each library."""
    runs = {}
    for name, script in (("peer", SCRIPT), ("sbac", migrated(SCRIPT))):
        variables: dict[str, Any] = {"__name__": name, "FOLDER": str(tmp_path_factory.mktemp(name))}
        exec(compile(script, f"<the script with {name}>", "exec"), variables)
        runs[name] = variables
    return runs


def test_only_imports_were_changed():
    old, new = SCRIPT.splitlines(), migrated(SCRIPT).splitlines()
    changed = [line for line, other in zip(old, new, strict=True) if line != other]
    assert len(changed) == len(IMPORTS)
    assert all(line.startswith("from stable_baselines3") for line in changed)
    assert "stable_baselines3" not in "\n".join(new)


def test_the_script_runs_with_both_libraries_and_the_classes_are_theirs(both):
    assert type(both["peer"]["model"]).__module__.startswith("stable_baselines3.")
    assert type(both["sbac"]["model"]).__module__ == "sbac.a2c"
    assert type(both["sbac"]["ddpg"]).__module__ == "sbac.ddpg"


@pytest.mark.parametrize("watch", ["watch", "ddpg_watch"])
def test_callbacks_see_the_same(both, watch):
    peer, own = both["peer"][watch], both["sbac"][watch]
    ends = {"info.episode", "info.terminal_observation", "info.TimeLimit.truncated"}
    assert own.seen == peer.seen == ends | {"episode.r", "episode.l", "episode.t"}
    assert own.ends >= 10
    assert peer.ends >= 10
    assert vars(own).keys() >= {"model", "n_calls", "num_timesteps", "locals", "globals", "parent", "verbose"}
    assert (own.n_calls, own.num_timesteps, own.ended) == (peer.n_calls, peer.num_timesteps, peer.ended)
    assert own.started == peer.started
    assert set(own.locals) >= {"self", "new_obs", "rewards", "dones", "infos", "actions", "total_timesteps"}


@pytest.mark.parametrize("name", ["model", "ddpg"])
def test_models_have_the_same_attributes(both, name):
    """Those that scripts touch, with the same values where a value was given."""
    peer, own = both["peer"][name], both["sbac"][name]
    common = "policy device logger num_timesteps n_envs observation_space action_space learning_rate gamma verbose"
    common += " ep_info_buffer ep_success_buffer seed tensorboard_log policy_kwargs env policy_class"
    common += " learn predict save load get_env set_env get_parameters set_parameters set_logger"
    only = {
        "model": "n_steps gae_lambda ent_coef vf_coef max_grad_norm normalize_advantage rollout_buffer",
        "ddpg": "buffer_size learning_starts batch_size tau gradient_steps action_noise replay_buffer actor critic"
        " actor_target critic_target save_replay_buffer load_replay_buffer train",
    }[name]
    for attribute in f"{common} {only}".split():
        assert hasattr(peer, attribute), f"no longer in stable-baselines3: {attribute}"
        assert hasattr(own, attribute), attribute
        theirs = getattr(peer, attribute)
        if type(theirs) in (int, float, bool, str, type(None)):
            assert getattr(own, attribute) == theirs, attribute


@pytest.mark.parametrize("name", ["a2c", "ddpg"])
def test_the_same_files_are_written(both, name):
    folders = {library: Path(both[library]["FOLDER"]) / name for library in both}

    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)).removesuffix(".zip").removesuffix(".pkl") for path in folder.rglob("*.*")}

    assert files(folders["sbac"]) == files(folders["peer"])

    def columns(folder: Path) -> set[str]:
        return set((folder / "log" / "progress.csv").read_text().splitlines()[0].split(","))

    missing = columns(folders["peer"]) - columns(folders["sbac"])
    assert not missing, f"log keys of stable-baselines3 that sbac lacks: {missing}"


@pytest.mark.parametrize(("cls", "env_id"), [(A2C, "CartPole-v1"), (DDPG, "Pendulum-v1")])
def test_a_vector_environment_of_stable_baselines3_may_be_passed_in(cls, env_id):
    model = cls("MlpPolicy", make_vec_env(env_id, n_envs=2, env_kwargs={"max_episode_steps": 25}), seed=0).learn(300)
    assert (model.n_envs, model.num_timesteps) == (2, 300)
    assert model.episodes.count >= 12
    assert max(episode["l"] for episode in model.ep_info_buffer) <= 25
    assert np.isfinite(model.predict(model.get_env().reset())[0]).all()
