"""What the scripts share: exact per-token gradients of a language model's policy, and their statistics."""

__version__ = "0.1.0"
