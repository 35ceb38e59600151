"""Settings of checkpoints, spikes, metrics and schedules that contradict themselves: refused by name, with the remedy."""

import pytest

from longtrain.config.run import CheckpointConfig, LengthStage, MetricsConfig, SpikeConfig, TrainConfig


@pytest.mark.parametrize(
    "section, settings, said",
    [
        (TrainConfig, {"decay_steps": 2}, "train.decay_steps: has no effect with schedule: cosine; set schedule: wsd"),
        (
            TrainConfig,
            {"schedule": "wsd", "decay_steps": 9, "warmup_steps": 2},
            "train.decay_steps: 9 and 2 of warm-up are more than the 10",
        ),
        (
            TrainConfig,
            {"length_schedule": (LengthStage(from_step=0, seq_len=8, rope_scaling=0.0),)},
            r"length_schedule\[0\].rope_scaling: must be above 0",
        ),
        (
            TrainConfig,
            {"length_schedule": (LengthStage(from_step=0, seq_len=8, rope_base=-1.0),)},
            r"length_schedule\[0\].rope_base: must be above 0",
        ),
        (SpikeConfig, {"threshold": 1.0}, "spike.threshold: must be above 1, found 1; 2 is twice"),
        (SpikeConfig, {"window": 1}, "spike.window: must be at least 2"),
        (CheckpointConfig, {"every_steps": 0}, "checkpoint.every_steps: must be at least 1"),
        (CheckpointConfig, {"every_minutes": 0.0}, "checkpoint.every_minutes: must be above 0"),
        (CheckpointConfig, {"keep": 0}, "checkpoint.keep: must be at least 1"),
        (CheckpointConfig, {"resume": " "}, "checkpoint.resume: is empty; write auto, never, or the path"),
        (MetricsConfig, {"peak_tflops": 0.0}, "metrics.peak_tflops: must be above 0"),
    ],
)
def test_refused_with_the_setting_and_the_remedy(section, settings, said):
    with pytest.raises(ValueError, match=said):
        section(**({"steps": 10} if section is TrainConfig else {}), **settings)
