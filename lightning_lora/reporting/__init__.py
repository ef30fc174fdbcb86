# SPDX-License-Identifier: Apache-2.0
"""A run's plots and tables."""

from lightning_lora.reporting.forgetting import plot_forgetting
from lightning_lora.reporting.learning import plot_learning, plot_run

__all__ = ["plot_forgetting", "plot_learning", "plot_run"]
