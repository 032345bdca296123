"""Effects of single heads on an answer, by activation patching on counterfactual pairs (HydraHead, arXiv 2606.20097).

The readout of a text is the mean difference of the logits of its answer and of the changed one (equation 9, the tokens
of an answer weighted by 0.9 to the power of their number). A head's *receiver* effect is the share of the difference
between the two texts' readouts that vanishes if its output in the clean text is replaced by that in the changed one,
with all later attention held (equation 10). Its *sender* effect is the share that vanishes if what it sends to
receivers is replaced: the receivers see the replaced head, everything else does not. Ours, where the paper leaves it
open: receivers' outputs also pass on to receivers above them.
"""

from collections.abc import Collection

import torch

from flashmorph.hosts.parts import final_norm_of
from flashmorph.losses import Head
from flashmorph.model.morphable import Morphable
from flashmorph.model.order import rows_by_layer
from flashmorph.model.patching import Recording
from flashmorph.tasks.counterfactual import Pair

_DISCOUNT = 0.9
_LEAST_DIFFERENCE = 0.5
"""In nats of the readout; a pair with less says nothing (as an audit of the method has it)."""


class PairEffects:
    """A pair, run once: effects of each of `groups`, layers or key-value heads, `[groups]`, between 0 and 1.

    `counts`: whether the two texts' readouts differ enough to measure anything.
    """

    def __init__(self, morphable: Morphable, head: Head, pair: Pair, groups: int):
        device = morphable.device
        self._clean = Recording(morphable, torch.tensor([pair.clean], device=device))
        self._changed = Recording(morphable, torch.tensor([pair.changed], device=device))
        self._morphable, self._head, self._rows = morphable, head, rows_by_layer(groups, len(morphable.layers))
        self._at = [position - 1 for position in pair.answers]
        self._right = torch.tensor([pair.clean[position] for position in pair.answers], device=device)
        self._wrong = torch.tensor(pair.others, device=device)
        self._weights = _DISCOUNT ** torch.arange(len(pair.answers), device=device, dtype=torch.float32)
        self._readout = self._of(self._clean.last[:, self._at]).item()
        self._span = self._readout - self._of(self._changed.last[:, self._at]).item()

    @property
    def counts(self) -> bool:
        """Whether anything can be measured."""
        return self._span >= _LEAST_DIFFERENCE

    def receivers(self) -> list[float]:
        """The receiver effect of each group."""
        effects: list[float] = []
        for layer, rows in enumerate(self._rows):
            clean = self._clean.heads[layer][:, self._at]
            mixed = torch.cat([self._with(clean, self._changed.heads[layer][:, self._at], [n], rows) for n in rows])
            hidden = self._clean.hidden[layer][:, self._at].expand(len(rows), -1, -1)
            hidden = self._clean.after(layer, hidden, self._clean.projection(layer)(mixed))
            for above in range(layer + 1, len(self._rows)):
                hidden = self._clean.after(above, hidden, self._clean.attention(above, self._at))
            effects += self._shares(hidden)
        return effects

    def senders(self, receivers: Collection[int]) -> list[float]:
        """The sender effect of each group on these `receivers`, groups too."""
        return [self._sent(layer, number, receivers) for layer, rows in enumerate(self._rows) for number in rows]

    def layers_of(self, receivers: Collection[int]) -> list[int]:
        """The layers that have any of the receivers."""
        return [layer for layer, rows in enumerate(self._rows) if set(rows) & set(receivers)]

    def _sent(self, layer: int, number: int, receivers: Collection[int]) -> float:
        """Two streams: `full` holds the replaced head and what receivers make of it, `only` just the latter."""
        above = [each for each in self.layers_of(receivers) if each > layer]
        if not above:
            return 0.0
        heads = self._with(self._clean.heads[layer], self._changed.heads[layer], [number], self._rows[layer])
        full = self._clean.after(layer, self._clean.hidden[layer], self._clean.projection(layer)(heads))
        only = self._clean.hidden[above[0]][:, self._at]
        for each in range(layer + 1, len(self._rows)):
            if each > above[-1]:
                only = self._clean.after(each, only, self._clean.attention(each, self._at))
                continue
            attention = self._clean.attention(each)
            if each in above:
                own = [row for row in self._rows[each] if row in receivers]
                received = self._clean.heads_given(each, full)
                heads = self._with(self._clean.heads[each], received, own, self._rows[each])
                attention = self._clean.projection(each)(heads)
            if each >= above[0]:
                only = self._clean.after(each, only, attention[:, self._at])
            if each < above[-1]:
                full = self._clean.after(each, full, attention)
        return self._shares(only)[0]

    def _with(self, heads: torch.Tensor, others: torch.Tensor, chosen: Collection[int], rows: range) -> torch.Tensor:
        """`heads` `[batch, time, heads · head_dim]` with the chosen groups' part from `others`."""
        indices = [number - rows.start for number in chosen]
        mixed = heads.clone().unflatten(-1, (len(rows), -1))
        mixed[:, :, indices] = others.unflatten(-1, (len(rows), -1))[:, :, indices]
        return mixed.flatten(-2)

    def _shares(self, hidden: torch.Tensor) -> list[float]:
        """Shares of the difference that are gone, from outputs of the last layer `[rows, answers, width]`."""
        lost = self._readout - self._of(final_norm_of(self._morphable.model)(hidden))
        return (lost / self._span).clamp(0, 1).tolist()

    def _of(self, last: torch.Tensor) -> torch.Tensor:
        """The readout of last hidden states `[rows, answers, width]`, `[rows]`."""
        logits = self._head(last).float()
        right, wrong = (
            logits.gather(-1, tokens.expand(len(last), -1)[..., None])[..., 0] for tokens in (self._right, self._wrong)
        )
        return ((right - wrong) * self._weights).sum(-1) / self._weights.sum()
