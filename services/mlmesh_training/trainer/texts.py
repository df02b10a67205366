"""Classifiers of texts: the recipe "text", which fine-tunes the MiniLM sentence encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlmesh_training.trainer import cleaning, data, encoder, registered, sources
from mlmesh_training.trainer.definition import Axis, Classification, Loaded, Part, Settings, ShippedFile
from mlmesh_training.trainer.reporter import PermanentError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEQUENCE = Axis(name="sequence", low=2, high=512)
TOKENIZER_FILE = "tokenizer.json"
_NOT_OURS = {"_name_or_path", "transformers_version"}


class EncoderClassifier(Classification):
    """Fine-tunes an encoder.

    The model takes `input_ids` and `attention_mask`, INT64 [batch, sequence], as the tokenizer that is shipped with it
    makes them; both dimensions are dynamic.
    """

    input_names: Sequence[str] = ("input_ids", "attention_mask")
    axes: Mapping[str, Mapping[int, Axis]] = {"input_ids": {1: SEQUENCE}, "attention_mask": {1: SEQUENCE}}
    schedule = "LINEAR"

    def load(self, dataset: str, folder: str, *, seed: int, settings: Settings) -> Loaded:
        """Read, clean, split and tokenize. Errors: PermanentError."""
        read = sources.texts(dataset) if dataset else registered.texts(Path(folder))
        found, counts = cleaning.texts(read)
        classes, labels = cleaning.encoded(found.labels)
        split = data.split(classes, seed=seed)
        most = int(settings["tokens_max"])
        ids, mask, cut = _tokenized(_tokenizer(most), found.texts)
        lengths = mask[split.train].sum(dim=1)
        statistics = {
            "kind": "text",
            "encoder": encoder.origin(),
            "tokens_max": most,
            "tokens_mean": float(lengths.float().mean()),
            "tokens_longest": int(lengths.max()),
            "cleaning": {**counts, "texts_cut": cut},
            "split": split.sizes(),
        }

        def part(rows: data.Classes) -> Part:
            chosen = torch.from_numpy(rows)
            return Part(inputs=(ids[chosen], mask[chosen]), targets=torch.from_numpy(classes[rows]))

        return Loaded(
            train=part(split.train),
            validation=part(split.validation),
            test=part(split.test),
            labels=labels,
            fingerprint=data.text_fingerprint(read.texts, read.labels),
            statistics=statistics,
        )

    def build(self, settings: Settings, loaded: Loaded) -> nn.Module:
        """The encoder with its weights, and a new last layer."""
        folder = encoder.model_folder()
        return encoder.TextClassifier(
            encoder.Encoder.pretrained(folder, frozen=int(settings["frozen_layers"])),
            hidden=encoder.Shape.read(folder).hidden_size,
            classes=len(loaded.labels),
            dropout=settings["dropout"],
        )

    def files(self, loaded: Loaded) -> Sequence[ShippedFile]:
        """The tokenizer, which cuts and pads as the training did, and the configuration."""
        most = int(loaded.statistics["tokens_max"])
        tokenizer = _tokenizer(most).to_str(pretty=False)
        original: dict[str, Any] = json.loads((encoder.model_folder() / "config.json").read_bytes())
        document = {
            **{name: value for name, value in original.items() if name not in _NOT_OURS},
            "tokens_max": most,
            "pooling": "mean",
            "id2label": {str(index): label for index, label in enumerate(loaded.labels)},
            "label2id": {label: index for index, label in enumerate(loaded.labels)},
        }
        config = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
        return (
            ShippedFile(path=TOKENIZER_FILE, data=tokenizer.encode(), media_type="application/json"),
            ShippedFile(path="config.json", data=config.encode(), media_type="application/json"),
        )

    def describe(self, loaded: Loaded) -> Mapping[str, str]:
        """How to feed it."""
        return {
            "input_layout": "NS",
            "tokenizer": TOKENIZER_FILE,
            "tokens_max": str(loaded.statistics["tokens_max"]),
            "encoder": str(loaded.statistics["encoder"]),
        }


def _tokenizer(most: int) -> Tokenizer:
    """The encoder's tokenizer, which cuts texts to so many tokens and pads a batch to its longest."""
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - few jobs need it
    except ImportError as error:
        raise PermanentError("recipe 'text' needs the package tokenizers, which is not installed") from error
    try:
        made = Tokenizer.from_file(str(encoder.model_folder() / TOKENIZER_FILE))
    except Exception as error:  # the library raises nothing more particular
        raise PermanentError(f"the encoder's tokenizer cannot be read: {error}") from error
    made.enable_truncation(most)
    made.enable_padding()
    return made


def _tokenized(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor, int]:
    """Tokens and mask, int64 [texts, longest], and how many texts were cut."""
    # One by one: a batch would start threads, which a process that forks must not have.
    found = [tokenizer.encode(text) for text in texts]
    longest = max(len(each.ids) for each in found)
    ids = torch.zeros(len(found), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, each in enumerate(found):
        ids[row, : len(each.ids)] = torch.tensor(each.ids)
        mask[row, : len(each.ids)] = 1
    return ids, mask, sum(bool(each.overflowing) for each in found)


minilm = EncoderClassifier()
