"""A stand-in for a model, of which only names count."""

from __future__ import annotations

import torch


class Named(torch.nn.Module):
    """A module with parameters of just these names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def named_parameters(self):
        return [(name, torch.nn.Parameter(torch.zeros(1))) for name in self.names]
