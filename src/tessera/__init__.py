"""Tessera serves large language models. One promise sets it apart: the layout never changes the answer."""

__version__ = "0.1.0"
