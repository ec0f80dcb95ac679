"""FlowKV: contiguous prefill-to-decode KV transfer, engine-free."""
