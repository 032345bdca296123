"""Document isolation in packed rows: no attention, recurrent state or convolution crosses a boundary.

If all mixers of a host support varlen, rows run as they are, with boundary arguments (`marked`). Otherwise they are
split at the boundaries into batches of single documents (`cut`). `apart` chooses, and a stage records the choice.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flashmorph import distributed
from flashmorph.mixers.mixer import LayerArguments


@dataclass(frozen=True)
class Packed:
    """The input of one forward: `input_ids` `[batch, time]` and `boundaries`, keyword arguments of the decoder.

    `real` `[batch, time]` is False at padding; None: there is none. `continues` `[batch, time]` is False at the first
    token of each document; None: each row is one document. `loss_mask` `[batch, time]` is False at tokens that are
    not targets of the loss; None: all are.
    """

    input_ids: torch.Tensor
    boundaries: LayerArguments = field(default_factory=dict)
    real: torch.Tensor | None = None
    continues: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None

    def run(self, decoder: Any) -> torch.Tensor:
        """Last hidden states of each token, `[tokens, width]`, without padding.

        It passes neither a cache nor a mask: with either, transformers ignores the boundaries.
        """
        return self.tokens(decoder(input_ids=self.input_ids, use_cache=False, **self.boundaries).last_hidden_state)

    def tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` `[batch, time, ...]` without padding, `[tokens, ...]`."""
        return hidden.flatten(0, 1) if self.real is None else hidden[self.real]

    def next_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices into `tokens` whose next token is a target of the loss in the same document, and those targets; both
        `[targets]`."""
        labels = self._continues() if self.loss_mask is None else self._continues() & self.loss_mask
        (labelled,) = self.tokens(labels).nonzero(as_tuple=True)
        return labelled - 1, self.tokens(self.input_ids)[labelled]

    def predicting(self, hidden: torch.Tensor) -> torch.Tensor:
        """The entries of `hidden` `[tokens, ...]` (as from `tokens`) that predict a target of the loss.

        The last token of a document has no next one; it is included if it is a target itself.
        """
        if self.loss_mask is None:
            return hidden
        followed = self._continues()[:, 1:]
        targets = self.loss_mask.clone()
        targets[:, :-1] = torch.where(followed, self.loss_mask[:, 1:], self.loss_mask[:, :-1])
        return hidden[self.tokens(targets)]

    def _continues(self) -> torch.Tensor:
        if self.continues is not None:
            return self.continues
        continues = torch.ones_like(self.input_ids, dtype=torch.bool)
        continues[:, 0] = False
        return continues


def apart(
    input_ids: torch.Tensor, starts: torch.Tensor | None, varlen: bool, loss_mask: torch.Tensor | None = None
) -> list[Packed]:
    """The documents of `input_ids` `[batch, time]`, isolated from each other.

    `varlen`: whether the model's mixers isolate documents within a row (`hosts.supports_varlen`). `starts`
    `[batch, time]` is True at each document's first token (None: each row is one document), `loss_mask`
    `[batch, time]` at each target of the loss (None: all tokens).
    """
    if starts is None:
        return [Packed(input_ids, loss_mask=loss_mask)]
    if varlen:
        return [marked(input_ids, starts, loss_mask)]
    return cut(input_ids, starts, loss_mask)


def as_often_everywhere(batches: list[Packed]) -> list[Packed]:
    """`batches`, padded with empty ones so that every rank has the same number. All ranks must call it.

    A sharded model runs on all ranks at once. No token of an empty batch counts.
    """
    first = batches[0]
    nothing = torch.zeros_like(first.input_ids, dtype=torch.bool)
    empty = replace(first, real=nothing, continues=nothing, loss_mask=nothing)
    return batches + [empty] * (max(distributed.gather(len(batches))) - len(batches))


def token_order(
    input_ids: torch.Tensor, starts: torch.Tensor | None, varlen: bool, loss_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Indices `[tokens]` into the flattened `input_ids` `[batch, time]` of the positions that enter the loss, in the
    order in which `apart` runs them."""
    indices = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
    packed = apart(indices, starts, varlen, loss_mask)
    return torch.cat([each.predicting(each.tokens(each.input_ids)) for each in packed])


def how_apart(isolated: bool, varlen: bool) -> str:
    """How documents are isolated, in words for a stage's record."""
    if not isolated:
        return "joined"
    return "apart by kernels" if varlen else "apart, rows cut at the boundaries"


def marked(input_ids: torch.Tensor, starts: torch.Tensor, loss_mask: torch.Tensor | None = None) -> Packed:
    """Rows as they are, with the arguments that give each kind of layer the document boundaries.

    `position_ids` and `cu_seq_lens_*` are for attention, `cu_seq_lens_q` also for linear states, `seq_idx` for short
    convolutions. Shapes as in `apart`; a row's first token always begins a document.
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
    """One document a row, padded on the right, which causal layers do not see. Shapes as in `apart`.

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
        indices = (first[:, None] + time).clamp_max(len(flat) - 1)
        ids = torch.where(real, flat[indices], 0)
        targets = None if loss_mask is None else loss_mask.flatten()[indices] & real
        batches.append(Packed(ids, real=real, continues=real & (time > 0), loss_mask=targets))
    return batches


def _with_rows(starts: torch.Tensor) -> torch.Tensor:
    """`starts` `[batch, time]`, also True at the first token of each row."""
    starts = starts.clone()
    starts[:, 0] = True
    return starts


def _edges(starts: torch.Tensor) -> torch.Tensor:
    """Offsets `[documents + 1]` of the documents in the flattened rows, and the end of the last one."""
    return torch.cat([starts.flatten().nonzero()[:, 0], starts.new_tensor([starts.numel()], dtype=torch.long)])
