# SPDX-License-Identifier: Apache-2.0
"""Files: adapter folders, checkpoints and merged models."""
