"""Brute force: substrings counted by looking at every place."""

from __future__ import annotations


def occurrences(texts, string):
    size = len(string)
    return sum(text[i : i + size] == string for text in texts for i in range(len(text) - size + 1))


def followers(texts, string):
    """How often each token followed ``string``."""
    size, found = len(string), {}
    for text in texts:
        for i in range(len(text) - size):
            if text[i : i + size] == string:
                found[text[i + size]] = found.get(text[i + size], 0) + 1
    return found


def longest_followed(texts, text, longest):
    """The longest suffix of ``text``, up to ``longest`` tokens, that something followed; maybe empty."""
    for size in range(min(longest, len(text)), 0, -1):
        if followers(texts, text[-size:]):
            return text[-size:]
    return []
