"""Packing: documents of many lengths into rows of exactly the context length.

In: documents as token ids and roles. Out: TokenBatch, what training takes.
The surprising thing: padding at the end of a row counts as a document of its own, so that attention needs no second mask.

Shapes: B rows, S tokens of a row (the context length).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from openemu3.tokenization.sequence import Role


@dataclass(frozen=True)
class TokenBatch:
    """Packed rows. The target of position s is the token at s + 1 where documents[s] == documents[s + 1]; elsewhere there is none.

    Args:
        token_ids: int64 [B, S].
        roles: uint8 [B, S], values of `Role`; a token of role PADDING is never a target.
        documents: int32 [B, S], the number of the document within its row (0, 1, 2, ...); padding is one more document, the last. In
            plain packing all documents of a row have number 0.
        sample_ids: of each row, the samples that its documents are of, in their order.
    """

    token_ids: Tensor
    roles: Tensor
    documents: Tensor
    sample_ids: tuple[tuple[str, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding. (Codes that are no target have role PADDING, too, but no row's documents end with a code.)"""
        is_padded = self.roles[:, -1:] == Role.PADDING
        return int(self.token_ids.numel() - (is_padded & (self.documents == self.documents[:, -1:])).sum())
