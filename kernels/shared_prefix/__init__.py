"""Attention for requests that begin with the same blocks: what is shared is read once for all of them.

FlashInfer calls such a split of one attention matrix composable formats (arXiv 2501.01005). Who shares what
is in ``runs``, what a step computes in ``layout``, the attention in ``fused`` and, in torch, in
``reference``.
"""
