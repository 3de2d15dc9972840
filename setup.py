"""Metadata of sbac. Settings of tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "sbac/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
assert VERSION is not None, "sbac/__init__.py states no __version__"

EXTRAS = {
    "mujoco": ["gymnasium[mujoco]>=1.1"],
    "box2d": ["gymnasium[box2d]>=1.1"],
    "atari": ["ale-py>=0.10", "opencv-python-headless>=4.8"],
    "video": ["gymnasium[other]>=1.1", "moviepy>=2.0"],
    "envpool": ["envpool>=1.0"],
    "peers": ["stable-baselines3>=2.4", "sbx-rl>=0.20"],
    "minari": ["minari>=0.5", "h5py>=3.10"],
    "tests": [
        "pytest>=8.0",
        "stable-baselines3>=2.4",
        "gymnasium[mujoco,box2d]>=1.1",
        "moviepy>=2.0",
        "minari>=0.5",
        "h5py>=3.10",
        "ale-py>=0.10",
        "opencv-python-headless>=4.8",
        "envpool>=1.0; platform_system == 'Linux'",
        "ruff>=0.6",
        "mypy>=1.11",
    ],
    "docs": ["sphinx>=8.0", "myst-parser>=4.0", "furo>=2024.8", "sphinx-mathjax-offline>=0.0.2"],
}

setup(
    name="sbac",
    version=VERSION[1],
    description="Actor-critic reinforcement learning in PyTorch: A2C, A3C, DDPG and TD3, exact, fast and readable.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["sbac", "sbac.recipes"],
    package_data={"sbac": ["py.typed"], "sbac.recipes": ["*.toml"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.4",
        "numpy>=1.26",
        "gymnasium[classic-control]>=1.1",
        "cloudpickle>=3.0",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "rich>=13.0",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["sbac=sbac.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
