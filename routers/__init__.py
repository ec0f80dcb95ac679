"""Choice of a worker among many, and the prefill/decode proxy."""
