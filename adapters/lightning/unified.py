"""Loaded through the entry point `surgery.plugins` once `lightning.pytorch` is imported."""

from surgery.adapters.lightning.saving import teach_package

teach_package("lightning.pytorch")
