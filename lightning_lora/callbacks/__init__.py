# SPDX-License-Identifier: Apache-2.0
"""Callbacks: thin hooks on top of the rest, one file each."""
