"""Every change to an upstream symbol, one file a symbol."""
