# SPDX-License-Identifier: Apache-2.0
"""Strategies whose checkpoints hold adapters only: one behaviour, one file for each kind of strategy."""
