"""bittailor: fit one transformer to many devices by measured cost. The command is `bittailor`; see README.md."""

__version__ = "0.1.0"
