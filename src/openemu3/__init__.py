"""openemu3: the open, complete Emu3. One transformer over text, image and video tokens; see README.md for a first picture."""

__version__ = "0.1.0"
