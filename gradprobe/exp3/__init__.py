"""Exp 3: which tokens carry the signal of the policy gradient, and which its noise."""
