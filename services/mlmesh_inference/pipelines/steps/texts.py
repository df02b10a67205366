"""Steps for texts: tokens before an encoder, one vector a text behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.pipelines.steps.base import BuiltIn, Options, tensor
from mlmesh_inference.tensors import Array, Signature
from mlmesh_runtime.errors import InvalidInput


class TokenizeStep(BuiltIn):
    """mlmesh.tokenize: texts to tokens, cut to `tokens_max` and padded to the longest of the request.

    `text` BYTES of any shape, UTF-8, a text an element -> `input_ids`, `attention_mask`, `token_type_ids` INT64
    [count, tokens].

    Options: file (tokenizer.json, of the tokenizers library), tokens_max (256), multiple (1): the length is padded up
    to a multiple of it, so that requests of similar lengths share batches; chars_max (20,000) of a text.
    """

    def __init__(self, options: Options) -> None:
        from tokenizers import Tokenizer  # noqa: PLC0415  only versions with this step need it

        path = options.needed("file", "tokenizer.json")
        self._tokens_max = options.integer("tokens_max", 256, low=1, high=1 << 16)
        self._multiple = options.integer("multiple", 1, low=1, high=1 << 12)
        self._chars_max = options.integer("chars_max", 20_000, low=1, high=1 << 20)
        options.finish()
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
            self._tokenizer.enable_truncation(self._tokens_max)
        except Exception as error:  # the library raises nothing more particular
            raise EngineError(f"step '{options.step}': {path.name} is no tokenizer: {error}") from error
        padding = self._tokenizer.padding
        self._pad_id = int(padding["pad_id"]) if padding else 0
        self._tokenizer.no_padding()
        self.signature = Signature(
            inputs=(tensor("text", "BYTES"),),
            outputs=tuple(tensor(name, "INT64", -1, -1) for name in ("input_ids", "attention_mask", "token_type_ids")),
        )

    def compute(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See BuiltIn."""
        # One by one: a batch would start threads of the library's own.
        found = [self._tokenizer.encode(self._text(data, place)) for place, data in enumerate(inputs["text"].ravel())]
        longest = max((len(each.ids) for each in found), default=0)
        length = min(-(-longest // self._multiple) * self._multiple, max(self._tokens_max, longest))
        ids = np.full((len(found), length), self._pad_id, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, each in enumerate(found):
            size = len(each.ids)
            ids[row, :size] = each.ids
            mask[row, :size] = each.attention_mask
            types[row, :size] = each.type_ids
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    def _text(self, data: object, place: int) -> str:
        field = f"inputs[text][{place}]"
        if not isinstance(data, bytes) or len(data) > 4 * self._chars_max:
            raise InvalidInput(f"a text has at most {self._chars_max} characters", field=field, reason="SHAPE_MISMATCH")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise InvalidInput("a text must be UTF-8", field=field) from error
        if len(text) > self._chars_max:
            raise InvalidInput(f"a text has at most {self._chars_max} characters", field=field, reason="SHAPE_MISMATCH")
        return text


class MeanPoolStep(BuiltIn):
    """mlmesh.mean-pool: one vector a text, the mean over its tokens (Reimers and Gurevych, Sentence-BERT, 2019).

    `hidden` FP32 [count, tokens, size], `attention_mask` INT64 [count, tokens] -> `embedding` FP32 [count, size].
    Options: normalise (true): to length 1.
    """

    def __init__(self, options: Options) -> None:
        self._normalise = options.flag("normalise", default=True)
        options.finish()
        self.signature = Signature(
            inputs=(tensor("hidden", "FP32", -1, -1, -1), tensor("attention_mask", "INT64", -1, -1)),
            outputs=(tensor("embedding", "FP32", -1, -1),),
        )

    def compute(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See BuiltIn."""
        hidden, mask = inputs["hidden"], inputs["attention_mask"].astype(np.float32)
        if hidden.shape[:2] != mask.shape:
            raise EngineError(f"hidden states of {hidden.shape[:2]} tokens, a mask of {mask.shape}")
        summed = np.einsum("nsd,ns->nd", hidden, mask)
        pooled = summed / np.maximum(mask.sum(axis=1, keepdims=True), 1.0)
        if self._normalise:
            pooled /= np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return {"embedding": pooled.astype(np.float32, copy=False)}
