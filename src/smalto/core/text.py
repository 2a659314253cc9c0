"""Text of others, such as names of files and labels, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text with every character escaped that a terminal cannot show or would obey."""
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def printable_lines(text: str) -> str:
    """Return text of several lines, each of them ``printable``."""
    return "\n".join(map(printable, text.split("\n")))
