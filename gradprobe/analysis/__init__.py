"""What the experiments share: usable dumps in, Gram matrices on a device, spread over targets."""
