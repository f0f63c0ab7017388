"""HuggingFace PEFT: adapter files of an operated model are plain.

Loaded through the entry point `surgery.plugins` once `peft` models can exist.
"""

from peft.peft_model import PeftModel

from surgery.savers import teach, writes_plain

teach(PeftModel, "save_pretrained", writes_plain)
