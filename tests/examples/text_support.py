"""A BERT of a few thousand numbers that knows the words of the example's own tasks."""

from pathlib import Path

import torch
import transformers
from text_demo.data import TextTask, read_tasks
from text_demo.sample import write_sample
from text_demo.settings import TEMPLATE


def sample(folder: Path, limit: int = 0) -> list[TextTask]:
    """The tasks made of templates, from files of all three formats."""
    return read_tasks(write_sample(folder), 0, limit, TEMPLATE)


def tiny_bert(folder: Path, tasks: list[TextTask], prefixed: bool = False) -> Path:
    """Two blocks of width 32, saved as a bare encoder, or with a head as BERT is published."""
    texts = [text for t in tasks for rows in t.splits.values() for text, _ in rows]
    texts += [prompt for task in tasks for prompt in task.prompts]
    words = sorted({word.strip(".").lower() for text in texts for word in text.split()})
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    kind = transformers.BertForMaskedLM if prefixed else transformers.BertModel
    kind(config).save_pretrained(folder)
    return folder
