# SPDX-License-Identifier: Apache-2.0
"""Adapter layers and packed weights in plain PyTorch."""
