"""Pure tensor functions: one per published loss."""
