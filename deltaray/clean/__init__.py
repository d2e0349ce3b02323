"""What must not be said: secrets in texts of others and in our messages, and control characters on a terminal."""

from deltaray.clean.forms import Cleaner
from deltaray.clean.screen import printable
from deltaray.clean.secrets import keep_secret, known_secrets, secrets_of, without_secrets

__all__ = ["Cleaner", "keep_secret", "known_secrets", "printable", "secrets_of", "without_secrets"]
