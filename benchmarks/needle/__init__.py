"""A tiny Llama trained here to find needles, its prompts, and how often dense attention answers them."""
