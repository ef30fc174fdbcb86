# SPDX-License-Identifier: Apache-2.0
"""Adapters in whole models: which modules, how they go in, how they are switched off."""
