"""What an optimiser is made of, and which steps it does not take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxgpt.config.conversion import require


@dataclass(frozen=True)
class OptimizerConfig:
    """Clip by global norm, AdamW (or Muon for matrices), warm up, decay."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the blocks' matrices and adamw for the rest"""
    learning_rate: float = 1e-3
    """peak learning rate of AdamW"""
    final_learning_rate: float = 1e-4
    """learning rate at the last step (cosine, linear, wsd)"""
    muon_learning_rate: float = 0.02
    """learning rate of Muon's matrices where the schedule is at 1; they follow the same one"""
    muon_beta: float = 0.95
    """decay of Muon's momentum"""
    schedule: Literal["cosine", "linear", "inverse-sqrt", "noam", "wsd", "constant"] = "cosine"
    """what follows the linear warm-up; noam is inverse-sqrt with learning-rate a factor of 1 / sqrt(width x warm-up)"""
    warmup_steps: int = 100
    """steps from zero to the peak"""
    warmup_share: float | None = None
    """the same as a share of the run's steps, instead"""
    decay_share: float = 0.2
    """wsd: the share of the run, at its end, in which the rate falls"""
    beta1: float = 0.9
    """decay of the first moment"""
    beta2: float = 0.99
    """decay of the second moment"""
    epsilon: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.1
    """decoupled decay, on matrices only"""
    layer_decay: float = 1.0
    """the learning rate of each layer as a share of that of the layer above it; a task's head has the whole"""
    clip_norm: float | None = 1.0
    """largest global norm of the gradient (None: no clipping)"""
    skip_spikes: float | None = None
    """leave out steps whose loss or gradient norm is so many standard deviations above the mean of the last 128, as 6
    (None: only those that are not finite)"""
    max_skipped: int = 10
    """end the run after so many steps in a row were left out"""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_learning_rate", "epsilon"):
            value = getattr(self, name)
            require(value > 0, f"optimizer.{name.replace('_', '-')} is {value}; it must be positive")
        for name in ("final_learning_rate", "warmup_steps", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name.replace('_', '-')} is {value}; it must not be negative")
        share = self.warmup_share
        require(share is None or 0 <= share <= 1, f"optimizer.warmup-share is {share}; it must be in [0, 1]")
        require(0 < self.layer_decay <= 1, f"optimizer.layer-decay is {self.layer_decay}; it must be in (0, 1]")
        for name in ("beta1", "beta2", "muon_beta"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name.replace('_', '-')} is {value}; it must be in [0, 1)")
        require(0 < self.decay_share <= 1, f"optimizer.decay-share is {self.decay_share}; it must be in (0, 1]")
        norm = self.clip_norm
        require(norm is None or norm > 0, f"optimizer.clip-norm is {norm}; it must be positive, or None")
        spikes = self.skip_spikes
        require(spikes is None or spikes > 0, f"optimizer.skip-spikes is {spikes}; it must be positive, or None")
        require(self.max_skipped >= 1, f"optimizer.max-skipped is {self.max_skipped}; it must be at least 1")
