"""moedist trains Mixture-of-Experts language models over ranks that are not alike."""

__version__ = "0.1.0"
