"""The tasks of the study: models of `examples/`, sized for a second a run."""

import dataclasses
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from study.language import language_task, lora_task, lstm_task
from study.other import (
    addition_task,
    diffusion_task,
    digits_cnn_task,
    ppo_task,
    temporal_order_task,
)
from study.task import Task

# name -> (from a number of steps of the optimizer to the task, that number)
TASKS = {
    "transformer-adamw-broken": (
        lambda n: language_task("transformer-adamw-broken", n, broken=True),
        300,
    ),
    "transformer-adamw": (lambda n: language_task("transformer-adamw", n), 300),
    "transformer-lion": (
        lambda n: language_task("transformer-lion", n, "Lion", (1e-3, 3e-3, 1e-2)),
        300,
    ),
    "lora": (lora_task, 200),
    "temporal-order": (temporal_order_task, 1000),
    "addition": (addition_task, 1500),
    "digits-cnn": (digits_cnn_task, 400),
    "ppo": (ppo_task, 1920),
    "diffusion": (diffusion_task, 600),
}
# No choice was made on these: default and rates were fixed before their first run.
HELD_OUT = {
    "transformer-muon": (
        lambda n: language_task("transformer-muon", n, "Muon", (3e-3, 1e-2, 3e-2)),
        300,
    ),
    "lstm": (lstm_task, 500),
}


def make_task(name: str, quick: bool = False) -> Task:
    """The task of that name; with ``quick`` it trains for three steps and two seeds."""
    make, steps = (TASKS | HELD_OUT)[name]
    return dataclasses.replace(make(3), seeds=2) if quick else make(steps)
