"""Loaded through the entry point `surgery.plugins` once `pytorch_lightning` is imported."""

from surgery.adapters.lightning.saving import teach_package

teach_package("pytorch_lightning")
