"""What must not be said: secrets in texts of others and in our messages, and control characters on a terminal."""

from deltaray.text.forms import Cleaner
from deltaray.text.screen import printable
from deltaray.text.secrets import keep_secret, known_secrets, secrets_of, without_secrets

__all__ = ["Cleaner", "keep_secret", "known_secrets", "printable", "secrets_of", "without_secrets"]
