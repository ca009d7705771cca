"""The engine: exact gradients of log π_t with respect to rows of linear weights."""
