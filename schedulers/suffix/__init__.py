"""Drafts from what was said before: suffixes of texts, how often each was followed by what, and drafts of it.

Source: SuffixDecoding, arXiv 2411.04975, sections 3 and 4; one structure for a group of requests as in Seer,
arXiv 2511.14617.
"""
