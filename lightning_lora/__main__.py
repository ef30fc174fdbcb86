# SPDX-License-Identifier: Apache-2.0
"""``python -m lightning_lora`` is the command ``lightning-lora``."""

import sys

from lightning_lora.cli.main import main

sys.exit(main())
