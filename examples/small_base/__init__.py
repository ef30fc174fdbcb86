# SPDX-License-Identifier: Apache-2.0
"""The built-in small base: a tiny Llama, its public-domain text and its general benchmark."""
