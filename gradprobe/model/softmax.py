"""The softmax where a model is certain: 1 − π is a sum over the other words, never a difference.

All of ∂ log π_y / ∂ logits hangs on 1 − π_y. A float32 π_y next to 1 holds nothing of it below 1e-7, the other words'
π_j do: ∂ log π_y / ∂ z_j = −π_j, and 1 − π_y = Σ_{j≠y} π_j.
"""

import torch


class Softmax:
    """π at n places, told relative to its likeliest word.

    Args:
        logits: [n, vocab] float32 or float64.

    Attributes:
        others: [n, vocab] π_j / max π, and 0 for the likeliest word.
        weight: [n] float64, their sum: what the others weigh beside the likeliest.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        top = logits.max(dim=-1, keepdim=True)
        self._top = top.indices
        # Bounded, so that a logit of minus infinity weighs nothing and is no NaN.
        self._below = (logits - top.values).clamp_(min=-1e4)
        self.others = self._below.exp().scatter_(-1, self._top, 0.0)
        self.weight = self.others.sum(dim=-1, dtype=torch.float64)

    @property
    def tail_mass(self) -> torch.Tensor:
        """[n] float64, 1 − max π."""
        return self.weight / (1 + self.weight)

    @property
    def entropy(self) -> torch.Tensor:
        """[n] float64, nats: of terms that are all positive."""
        return self.weight.log1p() - torch.linalg.vecdot(self.others, self._below).double() / (1 + self.weight)

    @property
    def sum_p2(self) -> torch.Tensor:
        """[n] float64, Σ π²."""
        return (1 + torch.linalg.vecdot(self.others, self.others).double()) / (1 + self.weight) ** 2

    def log_prob(self, ids: torch.Tensor) -> torch.Tensor:
        """[n] float64, log π of the words `ids`, [n], nats."""
        return self._below.gather(-1, ids[:, None])[:, 0].double() - self.weight.log1p()

    def not_drawn(self, ids: torch.Tensor) -> torch.Tensor:
        """[n] float64, 1 − π of the words `ids`, [n]."""
        return torch.where(self._is_top(ids), self.weight, 1 + self.weight - self._drawn(ids)) / (1 + self.weight)

    def logit_norm(self, ids: torch.Tensor) -> torch.Tensor:
        """[n] float64, ‖onehot − π‖, the length of the gradient of log π of the words `ids`, [n], in the logits."""
        # Unless the likeliest word was drawn, it is one of the others, and no difference is near 0.
        squares = torch.linalg.vecdot(self.others, self.others).double()
        others = squares - self._drawn(ids) ** 2 + ~self._is_top(ids)
        return (self.not_drawn(ids) ** 2 + others / (1 + self.weight) ** 2).sqrt()

    def logit_gradient(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, vocab] onehot − π, the gradient of log π of the words `ids`, [n], in the logits; `others` is used up."""
        not_drawn = self.not_drawn(ids)[:, None]
        gradient = self.others.scatter_(-1, self._top, 1.0).mul_((-1 / (1 + self.weight))[:, None].type_as(self.others))
        return gradient.scatter_(-1, ids[:, None], not_drawn.type_as(gradient))

    def log_prob_along(self, ids: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """[n] float64, how fast log π of `ids`, [n], moves where the logits move by `change`, [n, vocab].

        Σ_{j≠y} π_j (ż_y − ż_j): a sum over the other words, so that it is exact where the model is certain too.
        """
        behind = change.gather(-1, ids[:, None]) - change
        of_top = behind.gather(-1, self._top)[:, 0].double()
        return (torch.linalg.vecdot(self.others, behind).double() + of_top) / (1 + self.weight)

    def _drawn(self, ids: torch.Tensor) -> torch.Tensor:
        return self.others.gather(-1, ids[:, None])[:, 0].double()

    def _is_top(self, ids: torch.Tensor) -> torch.Tensor:
        return ids == self._top[:, 0]
