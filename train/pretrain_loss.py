"""What `pretrain_base.py` minimises: cross-entropy over a whole vocabulary, in chunks, of one target or of several.

Besides the next token, some positions predict the words around them, behind as well as ahead, from a linear map of
their hidden state. Language modelling alone leaves in a state what the next token needs; this keeps what the text is
about, and classification lives on that. (Words around a word as targets: skip-gram, Mikolov et al. 2013,
https://arxiv.org/abs/1310.4546; bags of words from a text's state: Xiao et al. 2023, https://arxiv.org/abs/2305.02564.)
"""

import torch


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted cross-entropy of a linear head without ever holding all logits.

    Gradients are taken chunk by chunk in the forward pass, so nothing is computed twice and the logits of one chunk
    stay in the processor's cache. hidden (P, H), weight (V, H), targets (P, K) of equal share, position_weights (P,)
    -> sum of losses; products run in the type of `hidden`, the gradient of the weight is summed in its own.
    """

    CHUNK = 512  # positions

    @staticmethod
    def forward(ctx, hidden, weight, targets, position_weights, chunk_loss):
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        head = weight.to(hidden.dtype)
        for start in range(0, len(hidden), ChunkedCrossEntropy.CHUNK):
            chunk = slice(start, start + ChunkedCrossEntropy.CHUNK)
            losses, grad_logits = chunk_loss(hidden[chunk] @ head.t(), targets[chunk], position_weights[chunk])
            # Of the softmax's gradient, probability less the target's share, the share is still to be taken off.
            shares = position_weights[chunk, None].to(head.dtype) / targets.shape[1]
            grad_logits.scatter_add_(1, targets[chunk], -shares.expand(-1, targets.shape[1]))
            total += losses.sum()
            torch.mm(grad_logits, head, out=grad_hidden[chunk])
            grad_weight += grad_logits.t() @ hidden[chunk]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None


def chunk_loss(logits, targets, position_weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits (P, V) and targets (P, K): weighted float32 losses (P,), and probabilities times weight (P, V) in the
    type of the logits.

    One exponential a logit: taking them again, as softmax behind log-softmax does, costs more than the products.
    """
    largest = logits.amax(-1, keepdim=True).float()
    exponentials = (logits.float() - largest).exp().to(logits.dtype)
    total = exponentials.float().sum(-1, keepdim=True)
    of_targets = logits.gather(1, targets).float().mean(1, keepdim=True)
    losses = (total.log() + largest - of_targets)[:, 0] * position_weights
    return losses, (exponentials.float() * (position_weights[:, None] / total)).to(logits.dtype)


class ContextPrediction(torch.nn.Module):
    """Every `EVERY`-th position predicts `DRAWN` words from around it, through a map of its own and the model's head.

    Args:
        hidden_size: of the states.
        token_counts: how often each token (V,) stands in the corpus; frequent ones are drawn less.
        markers: the first so many ids are never drawn.
        reach: how many tokens behind a position and ahead of it are its context.
    """

    EVERY = 4
    DRAWN = 8
    FREQUENT = 1e-4  # share of the corpus up to which a token is drawn at its full rate

    def __init__(self, hidden_size: int, token_counts: torch.Tensor, markers: int, reach: tuple[int, int]):
        super().__init__()
        self.map = torch.nn.Linear(hidden_size, hidden_size, bias=False)
        torch.nn.init.eye_(self.map.weight)
        shares = token_counts / token_counts.sum()
        rates = (self.FREQUENT / shares.clamp(min=1e-12)).sqrt().clamp(max=1)  # as word2vec draws
        rates[:markers] = 0
        self.register_buffer("rates", rates, persistent=False)
        self.reach = tuple(reach)

    def forward(self, hidden, head_weight, ids, weights, generator, loss_of_chunk) -> torch.Tensor:
        """Mean cross-entropy; hidden (B, T, H), ids and weights (B, T + 1)."""
        targets, position_weights = self.draw(ids, weights, generator)
        mapped = hidden[:, :: self.EVERY].flatten(0, 1) @ self.map.weight.t().to(hidden.dtype)
        total = ChunkedCrossEntropy.apply(mapped, head_weight, targets, position_weights, loss_of_chunk)
        return total / len(targets)

    def draw(self, ids, weights, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets (B * P, DRAWN) and position weights (B * P,), 0 where nothing is in reach and 1 elsewhere.

        What has no weight (a task's template) is not drawn.
        """
        last = ids.shape[1] - 1
        positions = torch.arange(0, last, self.EVERY, device=ids.device)
        places = positions[:, None] + torch.arange(-self.reach[0], self.reach[1] + 1, device=ids.device)  # (P, W)
        inside = (places >= 0) & (places <= last)
        places = places.clamp(0, last)
        chances = ((self.rates[ids] * (weights > 0))[:, places] * inside).flatten(0, 1)  # (B * P, W)
        some = chances.sum(-1) > 0
        chances[~some] = 1
        drawn = torch.multinomial(chances, self.DRAWN, replacement=True, generator=generator)
        return ids[:, places].flatten(0, 1).gather(1, drawn), some.float()
