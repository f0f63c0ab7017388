"""What pages take as given: small checkpoints, texts and trainers, in place of the reader's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["the", "match", "market", "film", "minister", "phone", "was", "good", "bad", "won", "fell"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tokenizer() -> Any:
    """Of a dozen words."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
    )


def bert_folder(folder: str = "checkpoint") -> str:
    """A folder with a BERT and its tokenizer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPE, max_position_embeddings=16, num_labels=2)
    return _saved(transformers.BertForSequenceClassification(config), folder)


def llama_folder(folder: str = "checkpoint") -> str:
    """A folder with a Llama and its tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    return _saved(transformers.LlamaForCausalLM(config), folder)


def vit_folder(folder: str = "checkpoint") -> str:
    """A folder with a ViT for images of 16 x 16."""
    torch.manual_seed(0)
    shape = {**SHAPE, "image_size": 16, "patch_size": 8, "num_labels": 3}
    return _saved(transformers.ViTForImageClassification(transformers.ViTConfig(**shape)), folder)


def _saved(model: Any, folder: str) -> str:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(Path(folder))


def texts(number: int = 16) -> list[dict[str, Any]]:
    """Encoded texts with labels: what Trainer takes for a data set."""
    encode, made = tokenizer(), []
    for i in range(number):
        text = " ".join(WORDS[(i * 5 + j * (i + 1)) % len(WORDS)] for j in range(3 + i % 4))
        made.append({"input_ids": encode(text)["input_ids"], "labels": i % 2})
    return made


def arguments(**options: Any) -> Any:
    """The arguments of a short run."""
    given = {
        "output_dir": "run",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    return transformers.TrainingArguments(**{**given, **options})
