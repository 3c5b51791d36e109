"""KL divergence from the predictions of one model to those of another: its only definition, in two forms.

Both give, for each token, sum over the vocabulary of p (log p - log q), in nats: p are the probabilities of the
reference, q those of the candidate. :func:`divergences` takes logarithms of both. :class:`Reference` keeps what many
candidates are compared with, makes no logarithm of a candidate's whole vocabulary, and can be differentiated.
"""

from __future__ import annotations

import torch


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Logarithms of probabilities over the last dimension, float32 of ``logits``' shape."""
    return logits.float().log_softmax(dim=-1)


def divergences(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The divergence of each token.

    Args:
        expected: log-probabilities of the reference, float32 [..., vocabulary].
        found: log-probabilities of the candidate, float32 [..., vocabulary].

    Returns:
        float32 [...], in nats.
    """
    return expected.exp().mul_(expected - found).sum(dim=-1)


class Reference:
    """Predictions that many candidates are compared with; 4 bytes for each token and word of the vocabulary.

    Args:
        logits: of the reference, float32 [..., vocabulary].
    """

    def __init__(self, logits: torch.Tensor) -> None:
        logs = log_probabilities(logits)
        self._probabilities = logs.exp()
        self._negative_entropy = (self._probabilities * logs).sum(-1)

    def divergences(self, logits: torch.Tensor) -> torch.Tensor:
        """The divergence of each token, differentiable by ``logits``.

        Args:
            logits: of the candidate, float32 [..., vocabulary].

        Returns:
            float32 [...], in nats.
        """
        # log q = logit - logsumexp, and the probabilities p sum to 1.
        return self._negative_entropy - (self._probabilities * logits).sum(-1) + logits.logsumexp(-1)
