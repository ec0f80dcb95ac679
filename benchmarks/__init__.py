"""One module a claim, with the peer in the same run."""
