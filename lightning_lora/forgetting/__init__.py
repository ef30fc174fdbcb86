# SPDX-License-Identifier: Apache-2.0
"""Measuring forgetting: real lm-eval tasks, item by item against the base model. No Lightning in here."""

from lightning_lora.forgetting.monitor import Monitor
from lightning_lora.forgetting.offline import write_offline_task
from lightning_lora.forgetting.report import Report, TaskReport
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.tasks import load_tasks

__all__ = ["Monitor", "Report", "Scorer", "TaskReport", "load_tasks", "write_offline_task"]
