"""Speculative decoding without a draft model."""

import torch
from torch import Tensor

from gpt import GPT, Decoder, KVCache
from sologpt.errors import UserError
from sologpt.native import Native


class Lookup:
    """Prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding), for one row.

    The draft is what followed the latest earlier match of the last tokens. One forward reads up to n draft
    tokens at little more than the cost of one. While the caller's next token is the draft's, its logits are
    there already. At the first other token, the rest of the draft is dropped.
    """

    def __init__(self, model: GPT, n: int, decode: Decoder | None = None) -> None:
        if not 1 <= n <= model.config.sequence_len:
            most = model.config.sequence_len
            raise UserError(f"lookup must draft at least 1 token and at most {most}, not {n}")
        self.model = model
        self.n = n
        self.decode = decode or model.step
        self.prefill = getattr(decode, "prefill", model.prefill)
        self.ids = torch.zeros(0, dtype=torch.long)  # what the cache holds if the whole draft is right, (S,)
        self.logits: list[Tensor] = []  # after each draft token that is still to come, (1, V)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, kv_cache: KVCache) -> Tensor:
        if kv_cache.batch_size != 1:
            raise ValueError(f"lookup drafts for one row, not for {kv_cache.batch_size}")
        length = int(kv_cache.lengths)
        if self.logits and self.drafted(ids, kv_cache.ids[0], length):
            kv_cache.lengths += 1
            return self.logits.pop(0)
        seen = torch.cat((kv_cache.ids[0, :length], ids))  # (S,)
        room = min(self.model.config.sequence_len, kv_cache.max_len) - len(seen)
        draft = self.draft(seen)[: max(room, 0)]
        if not len(draft):
            self.logits = []
            return self.decode(ids, kv_cache)
        logits = self.read(torch.cat((ids, draft))[None], kv_cache)  # (1, 1 + n, V)
        kv_cache.truncate(length + 1)  # the draft's keys and values stay in their slots
        first, *self.logits = logits[0].split(1)
        self.ids = torch.cat((seen, draft))
        return first

    def read(self, idx: Tensor, kv_cache: KVCache) -> Tensor:
        """One forward: idx (1, T) to logits (1, T, V)."""
        if isinstance(self.decode, Native):
            return self.decode.read(idx, kv_cache)
        return self.model(idx, kv_cache=kv_cache)

    def drafted(self, ids: Tensor, cached: Tensor, length: int) -> bool:
        """Whether ids is the next draft token and the cache still holds the draft."""
        n = len(self.ids)
        if length != n - len(self.logits) or ids != self.ids[length]:
            return False
        return torch.equal(cached[:n], self.ids)

    def draft(self, seen: Tensor) -> Tensor:
        """Return n tokens after the latest earlier match of the last three, or two, of seen (S,).

        If fewer follow the match, they repeat. Without a match, there are none.
        """
        for ngram in (3, 2):
            if len(seen) <= ngram:
                continue
            earlier = seen[:-1].unfold(0, ngram, 1)  # (S - ngram, ngram)
            matches = (earlier == seen[-ngram:]).all(dim=-1).nonzero()  # (matches, 1)
            if len(matches):
                start = int(matches[-1]) + ngram
                return seen[start + torch.arange(self.n, device=seen.device) % (len(seen) - start)]
        return seen[:0]
