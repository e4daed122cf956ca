"""The learning rate as a function of the step. No torch here."""

import math

from titans_pretrain.config import TrainSection


def learning_rate(step: int, train: TrainSection) -> float:
    """The learning rate of the optimizer step that comes after ``step`` steps.

    Linear from ``learning_rate / warmup_steps`` to the peak, then a half cosine that reaches
    ``learning_rate * min_learning_rate_ratio`` at the last step.
    """
    peak = train.learning_rate
    if step < train.warmup_steps:
        return peak * (step + 1) / train.warmup_steps
    last = train.steps - 1
    if last <= train.warmup_steps:
        return peak
    progress = min(1.0, (step - train.warmup_steps) / (last - train.warmup_steps))
    low = train.min_learning_rate_ratio
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
