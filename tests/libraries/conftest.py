"""What tests with real libraries share. They run in an environment of their own (`make
test-libraries`); elsewhere each is skipped that needs a library which is not there."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
