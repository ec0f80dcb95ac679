"""Sparse attention of a decode step: which tokens each KV head reads, chosen so that a share of mass is kept.

Everything here is the torch reference on which kernels and engine adapters stand. Shapes: ``H`` KV heads,
``G`` query heads a KV head (several query rows of one request fold into ``G``), ``n`` tokens of one request,
``m <= n`` of them clustered, ``C`` clusters, ``D`` the head size. Queries come multiplied by the softmax
scale.
"""
