# SPDX-License-Identifier: Apache-2.0
"""A LightningModule and a LightningDataModule for people who have none: any causal model, instruction data.

``formats`` reads files, ``encoding`` makes tokens, ``checks`` looks at them, ``packing`` and ``collate`` make
batches, ``datamodule`` is the whole of it; ``loss`` and ``module`` are the model's side.
"""
