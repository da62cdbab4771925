"""Train slices of a quantised language model on a device, by forward-mode differentiation.

The ground floor of the system: it imports neither ``export`` nor ``coordinator``, and never torch
or transformers. Importing this package loads no engine; modules that need one import it themselves.
"""

__version__ = "0.1.0"
