"""What transformers models need: a kind for Conv1D, and saving and resizing as plain models."""

from __future__ import annotations

import os
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from surgery.checkpoint import plain_state_dict, save_dropconnect
from surgery.modules.kinds import LINEAR, columns, register_kind
from surgery.plugins import register_mixin
from surgery.surgeon import can_undo, reapplied, suspended


class PlainPreTrainedModel:
    """Mixin of operated `PreTrainedModel`s: what they write and resize is the plain model."""

    def save_pretrained(
        self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.save_pretrained`, with the keys and class of the plain model.

        Beside the weights lie `dropconnect.json` and, for `toward="pretrained"`, the anchors, from
        which `surgery.load_dropconnect` puts DropConnect back in place.
        """
        given = kwargs.get("state_dict")
        if can_undo(self):
            if given is not None:
                kwargs["state_dict"] = plain_state_dict(self, given)
            with suspended(self):
                result = type(self).save_pretrained(self, save_directory, *args, **kwargs)
        else:  # sharded by fully_shard: the classes cannot change now, but the keys can
            kwargs["state_dict"] = plain_state_dict(self, given)
            result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            save_dropconnect(self, save_directory)
        return result

    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.resize_token_embeddings`; the same sites stay operated, also where the
        module is replaced (an output head)."""
        with reapplied(self):
            type(self).resize_token_embeddings(self, *args, **kwargs)
        return self.get_input_embeddings()


def register() -> None:
    """Tell the core about transformers."""
    register_mixin(PreTrainedModel, PlainPreTrainedModel)
    register_kind(LINEAR.but(name="conv1d", classes=(Conv1D,), axes=columns))
