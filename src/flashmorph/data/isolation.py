"""Several documents in one row, kept apart: nothing of one reaches another, through attention, state or convolution.

Where all mixers of a host take the boundaries, rows go through as they are (`marked`); elsewhere they are cut at the
boundaries into batches of single documents (`cut`). `apart` says which, and a stage keeps it in its record.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flashmorph import distributed


@dataclass(frozen=True)
class Packed:
    """What one forward is given: `input_ids` `[batch, time]`, and `boundaries`, further arguments of the model.

    `real` `[batch, time]` is False at padding, `continues` `[batch, time]` where a token does not follow another of its
    document; None: no padding, and each row is one document. `loss_mask` `[batch, time]` is False at tokens that are
    not learnt; None: all are.
    """

    input_ids: torch.Tensor
    boundaries: dict[str, Any] = field(default_factory=dict)
    real: torch.Tensor | None = None
    continues: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None

    def run(self, decoder: Any) -> torch.Tensor:
        """Last hidden states of each token, `[tokens, width]`, padding left out.

        Without a cache and a mask: with either, transformers does not look for boundaries.
        """
        return self.tokens(decoder(input_ids=self.input_ids, use_cache=False, **self.boundaries).last_hidden_state)

    def tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` `[batch, time, ...]` of each token that is none of padding, `[tokens, ...]`."""
        return hidden.flatten(0, 1) if self.real is None else hidden[self.real]

    def next_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Places among `tokens` that have a next token in their document that is learnt, and those next tokens."""
        labels = self._continues() if self.loss_mask is None else self._continues() & self.loss_mask
        (labelled,) = self.tokens(labels).nonzero(as_tuple=True)
        return labelled - 1, self.tokens(self.input_ids)[labelled]

    def predicting(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of `hidden` `[tokens, ...]`, as `tokens` gives it, what predicts a token that is learnt.

        The last token of a document, whose next one is not there, counts where it is learnt itself.
        """
        if self.loss_mask is None:
            return hidden
        followed = self._continues()[:, 1:]
        learnt = self.loss_mask.clone()
        learnt[:, :-1] = torch.where(followed, self.loss_mask[:, 1:], self.loss_mask[:, :-1])
        return hidden[self.tokens(learnt)]

    def _continues(self) -> torch.Tensor:
        if self.continues is not None:
            return self.continues
        continues = torch.ones_like(self.input_ids, dtype=torch.bool)
        continues[:, 0] = False
        return continues


def apart(
    input_ids: torch.Tensor, starts: torch.Tensor | None, varlen: bool, loss_mask: torch.Tensor | None = None
) -> list[Packed]:
    """The documents of `input_ids` `[batch, time]`, apart.

    `varlen`: whether the model's mixers keep them apart in one row (`hosts.supports_varlen`). `starts` `[batch, time]`
    is True at each document's first token (None: each row is one document), `loss_mask` `[batch, time]` at each token
    that is learnt (None: all).
    """
    if starts is None:
        return [Packed(input_ids, loss_mask=loss_mask)]
    if varlen:
        return [marked(input_ids, starts, loss_mask)]
    return cut(input_ids, starts, loss_mask)


def as_often_everywhere(batches: list[Packed]) -> list[Packed]:
    """`batches`, and so many empty ones that every process has the same number.

    A model whose weights are divided runs in all processes at once. Of an empty one no token counts. To be made by all
    at once.
    """
    first = batches[0]
    nothing = torch.zeros_like(first.input_ids, dtype=torch.bool)
    empty = replace(first, real=nothing, continues=nothing, loss_mask=nothing)
    return batches + [empty] * (max(distributed.gather(len(batches))) - len(batches))


def token_order(
    input_ids: torch.Tensor, starts: torch.Tensor | None, varlen: bool, loss_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Where the tokens that `apart` runs, and that predict one of the mask, stand in `input_ids` `[batch, time]` end to
    end, in its order, `[tokens]`."""
    places = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
    packed = apart(places, starts, varlen, loss_mask)
    return torch.cat([each.predicting(each.tokens(each.input_ids)) for each in packed])


def how_apart(isolated: bool, varlen: bool) -> str:
    """In words, for a stage's record."""
    if not isolated:
        return "joined"
    return "apart by kernels" if varlen else "apart, rows cut at the boundaries"


def marked(input_ids: torch.Tensor, starts: torch.Tensor, loss_mask: torch.Tensor | None = None) -> Packed:
    """Rows as they are, with the arguments that tell each kind of layer where documents begin.

    `position_ids` and `cu_seq_lens_*` are for attention, `cu_seq_lens_q` also for linear states, `seq_idx` for short
    convolutions. A row's first token begins a document whatever `starts` says.
    """
    starts = _with_rows(starts)
    time = torch.arange(input_ids.shape[1], device=input_ids.device)
    begun = torch.where(starts, time, 0).cummax(1).values
    edges = _edges(starts)
    longest = int(edges.diff().max())
    boundaries = {
        "position_ids": time - begun,
        "seq_idx": (starts.cumsum(1) - 1).int(),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), edges.int()),
        **dict.fromkeys(("max_length_q", "max_length_k"), longest),
    }
    return Packed(input_ids, boundaries, continues=~starts, loss_mask=loss_mask)


def cut(input_ids: torch.Tensor, starts: torch.Tensor, loss_mask: torch.Tensor | None = None) -> list[Packed]:
    """One document a row, padded on the right, where causal layers do not look.

    Documents whose lengths lie between the same two powers of two share a batch, so that less than half is padding.
    """
    starts = _with_rows(starts)
    edges, flat = _edges(starts), input_ids.flatten()
    lengths = edges.diff()
    sizes = torch.tensor([int(length - 1).bit_length() for length in lengths.tolist()], device=input_ids.device)
    batches = []
    for size in sizes.unique().tolist():
        chosen, first = lengths[sizes == size], edges[:-1][sizes == size]
        time = torch.arange(int(chosen.max()), device=input_ids.device)
        real = time < chosen[:, None]
        places = (first[:, None] + time).clamp_max(len(flat) - 1)
        ids = torch.where(real, flat[places], 0)
        learnt = None if loss_mask is None else loss_mask.flatten()[places] & real
        batches.append(Packed(ids, real=real, continues=real & (time > 0), loss_mask=learnt))
    return batches


def _with_rows(starts: torch.Tensor) -> torch.Tensor:
    """`starts`, and the first token of each row."""
    starts = starts.clone()
    starts[:, 0] = True
    return starts


def _edges(starts: torch.Tensor) -> torch.Tensor:
    """Where documents begin in the rows end to end, and the end of the last, `[documents + 1]`."""
    return torch.cat([starts.flatten().nonzero()[:, 0], starts.new_tensor([starts.numel()], dtype=torch.long)])
