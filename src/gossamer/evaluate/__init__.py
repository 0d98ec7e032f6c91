"""How good a model is, counted honestly."""

from gossamer.evaluate.perplexity import Score, evaluate, token_loss

__all__ = ["Score", "evaluate", "token_loss"]
