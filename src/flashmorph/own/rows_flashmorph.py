"""Mixers whose state has a size that follows from the number of tokens seen.

This file travels with every checkpoint: it imports torch and transformers only.
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F

from .mixer_flashmorph import OwnMixer, State


class RowMixer(OwnMixer):
    """A mixer that runs rows which have seen equally many tokens, none of them padding.

    Other rows are run one by one, and the tensors of their states are padded at the end of dimension 2 to the longest.
    """

    @abstractmethod
    def sizes(self, count: int) -> dict[str, int]:
        """The length of each tensor of the state in dimension 2, after `count` tokens."""
        ...

    @abstractmethod
    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: State) -> torch.Tensor:
        """The output of rows that have seen the same number of tokens, `state["count"]`; nothing where it is empty."""
        ...

    def forward(self, q, k, v, hidden, real, state):  # noqa: D102
        counts = state["count"] if state else torch.zeros(len(k), dtype=torch.long)
        if real is None and len(set(counts.tolist())) == 1:
            return self.run(q, k, v, {} if state is None else state)
        output, states = torch.zeros_like(q), []
        for row in range(len(k)):
            own = torch.ones(k.shape[2], dtype=torch.bool) if real is None else real[row].bool().cpu()
            positions = own.nonzero()[:, 0].to(k.device)
            kept: State = {}
            if state:
                sizes = self.sizes(int(counts[row]))
                kept = {name: state[name][row : row + 1, :, :size] for name, size in sizes.items()}
                kept["count"] = counts[row : row + 1]
            part = slice(row, row + 1)
            output[part, :, positions] = self.run(
                q[part][:, :, positions], k[part][:, :, positions], v[part][:, :, positions], kept
            )
            states.append(kept)
        if state is not None:
            for name in self.sizes(0):
                longest = max(each[name].shape[2] for each in states)
                padded = [F.pad(each[name], (0, 0, 0, longest - each[name].shape[2])) for each in states]
                state[name] = torch.cat(padded)
            state["count"] = torch.cat([each["count"] for each in states])
        return output


def counted(rows: int, count: int) -> torch.Tensor:
    """`count` for each row, `[rows]`, on the CPU, so that reading it waits for no GPU."""
    return torch.full((rows,), count, dtype=torch.long)
