"""Keys and passwords, which no message and no file is to hold: found in addresses, taken out of texts."""

import os
import re

CREDENTIALS = re.compile(r"(?<=://)[^\s/]+(?=@)")  # user:password of an address
SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD")  # ends of the names of environment variables
SHORTEST = 8  # characters of a secret; less stands in a text by chance


def has_credentials(text: str) -> bool:
    """Whether an address in the text holds a user's name or password."""
    return CREDENTIALS.search(text) is not None


def without_secrets(text: str) -> str:
    """The text with *** in place of what addresses hold before their host, and of every secret of the environment."""
    text = CREDENTIALS.sub("***", text)
    secrets = {value for name, value in os.environ.items() if name.upper().endswith(SECRET_NAMES)}
    for value in sorted(secrets, key=len, reverse=True):
        if len(value) >= SHORTEST:
            text = text.replace(value, "***")
    return text
