"""Keys and passwords, which no message and no file is to hold: found in addresses, taken out of texts."""

import os
import re

CREDENTIALS = re.compile(r"(?<=://)[^\s/]+(?=@)")  # user:password of an address
SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD")  # ends of the names of environment variables and of parameters
SHORTEST = 8  # characters of a secret; less stands in a text by chance
PARAMETER = re.compile(rf"(?<=[?&;])([\w.~-]*(?:{'|'.join(SECRET_NAMES)})=)[^\s&;#'\"<>]+", re.IGNORECASE)
BEARER = re.compile(rf"\b(Bearer\s+)[\w.~+/=-]{{{SHORTEST},}}", re.IGNORECASE)  # of the header Authorization


def has_credentials(text: str) -> bool:
    """Whether an address in the text holds a user's name or password, or a key among its parameters."""
    return CREDENTIALS.search(text) is not None or PARAMETER.search(text) is not None


def without_secrets(text: str) -> str:
    """The text with *** in place of what addresses hold before their host, of keys among their parameters, of bearers'
    tokens, and of every secret of the environment."""
    text = CREDENTIALS.sub("***", text)
    text = BEARER.sub(r"\1***", PARAMETER.sub(r"\1***", text))
    secrets = {value for name, value in os.environ.items() if name.upper().endswith(SECRET_NAMES)}
    for value in sorted(secrets, key=len, reverse=True):
        if len(value) >= SHORTEST:
            text = text.replace(value, "***")
    return text
