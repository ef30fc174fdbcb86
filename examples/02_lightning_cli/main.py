# SPDX-License-Identifier: Apache-2.0
"""A plain LightningCLI over an ordinary LightningModule and DataModule: the adapters come from the YAML.

python examples/02_lightning_cli/main.py fit --config examples/02_lightning_cli/config.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch.cli import LightningCLI

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are not a package
from demo.shakespeare import Shakespeare, ShakespeareData

if __name__ == "__main__":
    LightningCLI(Shakespeare, ShakespeareData)
