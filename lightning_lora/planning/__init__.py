# SPDX-License-Identifier: Apache-2.0
"""Memory, time and cost of a run before it is started, from a model's configuration alone."""
